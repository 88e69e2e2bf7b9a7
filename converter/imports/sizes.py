"""Other sizes of inputs than those that a model declares: freed, or fixed.

Exporters write sizes that they have seen into a graph: into targets of Reshape, sizes of Resize,
ends of Slice. Where such a number is one of the tensor that the node reads, the node asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from logshift.converter.imports.editor import Editor, Rule, Stays, Use, opset_of
from logshift.converter.ort import attempt
from logshift.kernels.errors import ConversionError, InputError

InputShapes = Mapping[str, Sequence["int | str | None"]]

_TO_THE_END = 2**63 - 1
_UNKNOWN = 64  # a size that is tried where a model declares none
_SCALES = 10  # operator set since which Resize has scales, and Reshape's shape is an input


def give_sizes(model: onnx.ModelProto, shapes: InputShapes) -> bool:
    """Let inputs have other sizes, in place.

    Parameters
    ----------
    model : onnx.ModelProto
    shapes : mapping of input name to sizes
        None frees a size, a text does so and names it, a number fixes it. "" is the only input.

    Returns
    -------
    bool
        Whether any size is another than it was.

    Raises
    ------
    InputError
        If there is no such input, or it has another number of axes.
    ConversionError
        If the model cannot run at these sizes, or mixes samples then.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v for v in model.graph.input if v.name not in initializers}
    before = {name: _sizes(value) for name, value in inputs.items()}
    for name, sizes in shapes.items():
        if not name and len(inputs) == 1:
            (name,) = inputs
        if name not in inputs:
            known = ", ".join(map(repr, inputs))
            raise InputError(f"input_shapes: the model has no input {name!r}; it has {known}")
        dims = inputs[name].type.tensor_type.shape.dim
        _check(name, sizes, before[name])
        for axis, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
            dim.Clear()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size or f"{name}_dim_{axis}"
    changed = {n: s for n, s in before.items() if s != _sizes(inputs[n])}
    recurrent = dict.fromkeys([("", op) for op in ("LSTM", "GRU", "RNN")], _start_from_zero)
    Editor(model).apply(recurrent)
    unchanged = onnx.ModelProto()
    unchanged.CopyFrom(model)
    fixed = any(isinstance(size, int) for sizes in changed.values() for size in sizes)
    if changed and not (fixed and not _ask_anew(model, inputs, before)):
        _prove(model, unchanged, inputs, before)
    return bool(changed)


def _sizes(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(
        d.dim_value if d.dim_value > 0 else d.dim_param for d in value.type.tensor_type.shape.dim
    )


def _check(name: str, sizes: Sequence[int | str | None], declared: tuple[int | str, ...]) -> None:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise InputError(
            f"input_shapes[{name!r}] is {sizes!r}; give a size for every axis, None to free it"
        )
    if len(sizes) != len(declared):
        raise InputError(
            f"input_shapes[{name!r}] has {len(sizes)} sizes; the input has {len(declared)}:"
            f" {declared}"
        )
    for size in sizes:
        if not (size is None or isinstance(size, str) or type(size) is int and size > 0):
            raise InputError(
                f"input_shapes[{name!r}]: {size!r} is neither a size, nor None, nor a name"
            )


# --- numbers in the graph -------------------------------------------------------------------------


def _ask_anew(
    model: onnx.ModelProto,
    inputs: Mapping[str, onnx.ValueInfoProto],
    before: Mapping[str, tuple[int | str, ...]],
) -> bool:
    """Let nodes ask for sizes that they were told, in place.

    Returns whether onnxruntime can run the model at all, which others will complain about.
    """
    feed = {
        name: np.ones(
            [d if isinstance(d, int) else 1 if axis == 0 else _UNKNOWN
             for axis, d in enumerate(before[name])],
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for name, value in inputs.items()
    }  # fmt: skip
    if (seen := _shapes(model, before, feed)) is None:
        return False
    if opset_of(model) < _SCALES:
        return True
    batch = _only_batch(inputs, before)

    def rule(change: Rule) -> Rule:
        def checked(n: Use) -> None:
            if n.x(0) not in seen or n.y() not in seen or n.x(0) in n.edit.tensors:
                raise Stays("its sizes are not known")
            change(n)

        return checked

    changes = {
        "Reshape": lambda n: _reshape(n, seen[n.x(0)], seen[n.y()], batch),
        "Resize": lambda n: _resize(n, seen[n.x(0)], seen[n.y()]),
        "Slice": lambda n: _slice(n, seen[n.x(0)]),
        "Expand": lambda n: _expand(n, seen[n.x(0)]),
    }
    Editor(model).apply({("", op): rule(change) for op, change in changes.items()})
    return True


def _only_batch(
    inputs: Mapping[str, onnx.ValueInfoProto], before: Mapping[str, tuple[int | str, ...]]
) -> int | None:
    """Return the batch that the model had, if nothing else changes."""
    if any(_sizes(value)[1:] != before[name][1:] for name, value in inputs.items()):
        return None
    (batch, *others) = {sizes[0] for sizes in before.values() if sizes}
    return batch if not others and isinstance(batch, int) else None


def _shapes(
    model: onnx.ModelProto,
    declared: Mapping[str, tuple[int | str, ...]],
    feed: Mapping[str, np.ndarray],
) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of all tensors of the model as it was; None if it cannot be run."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        if value.name in declared:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, feed[value.name].shape, strict=True):
                dim.Clear()
                dim.dim_value = size
    names = [name for node in copy.graph.node for name in node.output if name]
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        results = attempt(copy, feed)
    except Exception:  # onnxruntime's exceptions share no useful base
        return None
    found = {n: y.shape for n, y in zip(names, results, strict=True) if isinstance(y, np.ndarray)}
    return found | {name: x.shape for name, x in feed.items()}


def _reshape(n: Use, x: tuple[int, ...], y: tuple[int, ...], batch: int | None) -> None:
    """Take the first and last sizes from the tensor itself where they are its own.

    What is between them stays, or is what is left over if it is one axis.
    """
    target = n.weight(1).ravel().tolist()
    if (n.get("allowzero", 0) and 0 in target) or len(target) != len(y):
        raise Stays("it is as it is")
    first = _shared(x, y)
    if batch is not None:
        whole = _with_batch(x, y, first, batch)
        n.emit("Reshape", [n.x(0), n.constant("shape", whole, np.int64)], n.y(), name=n.name)
        return
    last = min(_shared(x[::-1], y[::-1]), min(len(x), len(y)) - first)
    middle = target[first : len(target) - last]
    if len(middle) == 1 and y[first] > 1:
        middle = [-1]
    front = n.constant("front", [0] * first + middle, np.int64)
    if not last:
        n.emit("Reshape", [n.x(0), front], n.y(), name=n.name)
        return
    begin, end = (n.constant("end", [v], np.int64) for v in (len(x) - last, len(x)))
    own = n.emit("Slice", [n.emit("Shape", [n.x(0)]), begin, end])
    n.emit("Reshape", [n.x(0), n.emit("Concat", [front, own], axis=0)], n.y(), name=n.name)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first sizes are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _with_batch(x: tuple[int, ...], y: tuple[int, ...], first: int, batch: int) -> list[int]:
    """Return the target of a Reshape where nothing but the batch will be another one.

    It is the first axis, or one of the first that stay, or a part of the last axis but one, as
    the heads of an attention have it.
    """
    whole = list(y)
    if batch in x[:first]:
        whole[:first] = [0] * first
    elif y[:1] == (batch,):
        whole[0] = -1
    elif len(y) > 1:
        whole[-2] = -1
    return whole


def _resize(n: Use, x: tuple[int, ...], y: tuple[int, ...]) -> None:
    """Say how many times larger a picture gets instead of how large."""
    n.weight(3)
    axes = n.get("axes", list(range(len(x))))
    scales = [_scale(x[axis], y[axis]) for axis in axes]
    inputs = [n.x(0), n.x(1), n.constant("scales", scales)]
    given = {k: v for k, v in n.attributes.items() if k != "keep_aspect_ratio_policy"}
    n.emit("Resize", inputs, n.y(), name=n.name, **given)


def _scale(before: int, after: int) -> np.float32:
    """Return a scale of float32 that gives exactly this size."""
    scale = np.float32(after / before)
    while np.floor(np.float32(before) * scale) < after:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


def _slice(n: Use, x: tuple[int, ...]) -> None:
    """Go to the end where that is where it ended."""
    ends = n.weight(2).ravel().tolist()
    axes = n.weight(3).ravel().tolist() if n.x(3) else [*range(len(ends))]
    ends = [_TO_THE_END if end == x[axis] else end for end, axis in zip(ends, axes, strict=True)]
    inputs = list(n.node.input)
    inputs[2] = n.constant("ends", ends, np.int64)
    n.emit("Slice", inputs, n.y(), name=n.name)


def _expand(n: Use, x: tuple[int, ...]) -> None:
    """Leave sizes as they are that it only repeats."""
    target = n.weight(1).ravel().tolist()
    for place in range(1, min(len(x), len(target)) + 1):
        if target[-place] == x[-place]:
            target[-place] = 1
    n.emit("Expand", [n.x(0), n.constant("shape", target, np.int64)], n.y(), name=n.name)


def _start_from_zero(n: Use) -> None:
    """Leave out initial states that are zero, and hold the size of the batch."""
    inputs = list(n.node.input)
    for index in (5, 6):
        if (state := n.array(index)) is not None and not state.any():
            inputs[index] = ""
    n.emit_all(n.node.op_type, inputs, n.node.output, name=n.name, **n.attributes)


# --- proof ----------------------------------------------------------------------------------------


def _prove(
    model: onnx.ModelProto,
    unchanged: onnx.ModelProto,
    inputs: Mapping[str, onnx.ValueInfoProto],
    before: Mapping[str, tuple[int | str, ...]],
) -> None:
    """Run a model at sizes that it has been given: twice those that it had, where they are free."""
    rng, named = np.random.default_rng(0), dict[str, int]()
    feed = {}
    for name, value in inputs.items():
        shape = []
        for axis, (size, old) in enumerate(zip(_sizes(value), before[name], strict=True)):
            if isinstance(size, str):
                least = old if isinstance(old, int) else _UNKNOWN if axis else 1
                size = named.setdefault(size, 2 * least)
            shape.append(size)
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if dtype.kind == "f":
            feed[name] = rng.standard_normal(shape).astype(dtype)
        else:
            feed[name] = np.ones(shape, dtype)
    results = _run(model, feed, before)
    try:
        given = _run(unchanged, feed, before)
    except ConversionError:
        given = []
    if given and all(map(_near, given, results)):
        return  # the sizes are free without any change: it is what it was
    freed = (
        isinstance(_sizes(v)[0], str) and before[n][:1] != _sizes(v)[:1] for n, v in inputs.items()
    )
    if all(freed):
        _prove_batch(model, feed, before, results)


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, 1e-2, 1e-3, equal_nan=True)


def _run(
    model: onnx.ModelProto,
    feed: Mapping[str, np.ndarray],
    before: Mapping[str, tuple[int | str, ...]],
) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        return attempt(copy, feed)
    except Exception as error:  # onnxruntime's exceptions share no useful base
        found = re.search(r"(\w+) node\. Name:'([^']*)'", str(error))
        where = f"{found[1]} {found[2]!r}" if found else str(error)
        sizes = ", ".join(f"{name!r} {x.shape}" for name, x in feed.items())
        raise ConversionError(
            f"input_shapes: with inputs {sizes} the model does not run, because of {where}: it is"
            f" made for {dict(before)}, and holds numbers of that size; free fewer sizes, or export"
            " it with sizes that are free"
        ) from error


def _prove_batch(
    model: onnx.ModelProto,
    feed: Mapping[str, np.ndarray],
    before: Mapping[str, tuple[int | str, ...]],
    together: list[np.ndarray],
) -> None:
    """Check that of two batches at once each gives what it gives alone."""
    halves = [
        _run(model, {n: np.split(x, 2)[i] for n, x in feed.items()}, before) for i in range(2)
    ]
    names = [value.name for value in model.graph.output]
    for name, y, *parts in zip(names, together, *halves, strict=True):
        if y.dtype.kind != "f":
            continue
        axes = [
            axis
            for axis, (size, part) in enumerate(zip(y.shape, parts[0].shape, strict=False))
            if size == 2 * part
        ]
        joined = [np.concatenate(parts, axis) for axis in axes if y.ndim == parts[0].ndim]
        if not any(_near(part, y) for part in joined):
            raise ConversionError(
                f"input_shapes: output {name!r} mixes the samples of a batch when axis 0 is free;"
                " keep that size, or export the model with a free batch"
            )
