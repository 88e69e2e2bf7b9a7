"""What only changes the order, the shape or the number of elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from logshift.runtime.graph import Graph, Shape
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.onnx_ops.compiled.site import FLOAT, Builder, Site, axes, fields_of
from logshift.runtime.onnx_ops.compiled.views import View, contiguous, plain
from logshift.runtime.plan.call import Call

_HALF = np.dtype(np.float16)


def _move(x: View, y: str, y_steps: Sequence[int], y_start: int = 0) -> Call:
    """Return the call that writes what a view is."""
    fields = fields_of(axes(x.shape, y_steps, x.steps)) | {"start_x": x.start, "start_y": y_start}
    return Call("onnx_move", {"x": x.name, "y": y}, fields)


def order(n: Site) -> list[int] | None:
    """Return which axis of its input each axis of a Transpose's output is."""
    rank = len(n.shape(n.x))
    places = n.get("perm", [*range(rank)][::-1])
    return [axis % rank for axis in places] if isinstance(places, list) else None


def _reshaped(n: Site, x: View) -> list[View] | None:
    y = x.reshaped(n.shape(n.y))
    return None if y is None else [y]


def _transposed(n: Site, x: View) -> list[View] | None:
    places = order(n)
    return None if places is None else [x.transposed(places)]


def _windows(n: Site, x: View) -> list[View] | None:
    """Return parts as NumPy makes them."""
    whole = x.dummy()
    inputs = [whole, *(n.found.values.get(name) for name in n.node.inputs[1:])]
    parts = numpy_ops.compute(
        n.node.op, n.node.attributes, n.graph.opset, inputs, len(n.node.outputs)
    )
    return [x.like(whole, part) for part in parts]


def _gathered(n: Site, x: View) -> list[View] | None:
    """Return what evenly spaced indices name."""
    indices = n.found.values.get(n.name(1))
    if indices is None or not x.shape:
        return None
    axis = n.get("axis", 0) % len(x.shape)
    runs = _runs(indices.ravel() % x.shape[axis])
    y = x.parts(axis, *runs[0]).reshaped(n.shape(n.y)) if len(runs) == 1 else None
    return None if y is None else [y]


# What the outputs of operators are, of what their first input is; None if they have to be made.
VIEWS: dict[str, Callable[[Site, View], list[View] | None]] = {
    **dict.fromkeys(
        ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _reshaped
    ),
    "Expand": lambda n, x: [x.repeated(n.shape(n.y))], "Gather": _gathered, "Slice": _windows,
    "Split": _windows, "Transpose": _transposed,
}  # fmt: skip


def _view(n: Site) -> list[Call] | None:
    """Make no call where the output is the same bytes under another name."""
    views = VIEWS[n.node.op]
    same = views(n, plain(n.x, n.shape(n.x)))
    if same is None:
        return None
    if same[0].is_whole and math.prod(same[0].shape) == math.prod(n.shape(n.x)):
        return []
    found = views(n, n.view(n.x)) or same
    return [
        _move(part, name, contiguous(part.shape))
        for part, name in zip(found, n.node.outputs, strict=True)
        if name
    ]


_RUNS = 64  # of indices, above which NumPy is as fast


def _gather(n: Site) -> list[Call] | None:
    """Move what known indices name, each run of evenly spaced ones at once."""
    indices, x = n.found.values.get(n.name(1)), n.view(n.x)
    if indices is None or not x.shape:
        return None
    axis, made, y_start = n.get("axis", 0) % len(x.shape), list[Call](), 0
    runs = _runs(indices.ravel() % x.shape[axis])
    if len(runs) > _RUNS:
        return None
    steps = contiguous((*x.shape[:axis], indices.size, *x.shape[axis + 1 :]))
    for run in runs:
        part = x.parts(axis, *run)
        made.append(_move(part, n.y, steps, y_start))
        y_start += part.shape[axis] * steps[axis]
    return made


def _runs(places: np.ndarray) -> list[tuple[int, int, int]]:
    """Return first, step and count of runs of evenly spaced numbers."""
    numbers = places.tolist()
    runs, first = [], 0
    while first < len(numbers):
        end = first + 1
        step = numbers[end] - numbers[first] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        runs.append((numbers[first], step, end - first))
        first = end
    return runs


def _concat(n: Site) -> list[Call] | None:
    steps, start, made = contiguous(n.shape(n.y)), 0, list[Call]()
    axis = n.get("axis", 1) % len(steps)
    for name in n.node.inputs:
        if not n.is_float(name):
            return None
        if 0 not in n.shape(name):
            made.append(_move(n.view(name), n.y, steps, start * steps[axis]))
        start += n.shape(name)[axis]
    return made


def _cast(n: Site) -> list[Call] | None:
    """Make float32 of a float16 input, or a float16 output of float32."""
    kinds = (n.found.dtypes.get(n.x), n.found.dtypes.get(n.y))
    if kinds == (FLOAT, FLOAT):
        return _view(n)
    if kinds == (_HALF, FLOAT) and any(info.name == n.x for info in n.graph.inputs):
        op = "onnx_widen"
    elif kinds == (FLOAT, _HALF) and _is_only_an_output(n.graph, n.y):
        op = "onnx_narrow"
    else:
        return None
    count = math.prod(n.shape(n.x))
    return [Call(op, {"x": n.x, "y": n.y}, _sizes(count))] if count else None


def _is_only_an_output(graph: Graph, name: str) -> bool:
    read = any(name in node.inputs for node in graph.nodes)
    return not read and [info.name for info in graph.outputs].count(name) == 1


def _where(n: Site) -> list[Call] | None:
    """Move what a condition chooses that sizes decide."""
    if (chosen := n.value(0)) is None:
        return None
    name, whole = n.name(1 if chosen else 2), n.shape(n.y)
    if not n.is_float(name):
        return None
    return [_move(n.view(name).repeated(whole), n.y, contiguous(whole))]


def _pad(n: Site) -> list[Call] | None:
    """Fill the output with one number, and move what pads do not cut off into it."""
    shape, whole = n.shape(n.x), n.shape(n.y)
    rank = len(shape)
    pads, axes_given = n.get("pads", None), n.found.values.get(n.name(3))
    if n.given(1):
        pads = n.found.values[n.name(1)].ravel().tolist()
    value = n.value(2) if n.given(2) else n.get("value", 0.0)
    if n.get("mode", "constant") != "constant" or value is None or not isinstance(pads, list):
        return None
    if n.given(3) and axes_given is None:
        return None
    chosen = range(rank) if axes_given is None else axes_given.ravel().tolist()
    x, y_start, steps = n.view(n.x), 0, contiguous(whole)
    for place, axis in enumerate(axis % rank for axis in chosen):
        before, after = pads[place], pads[place + len(chosen)]
        first, end = max(-before, 0), shape[axis] - max(-after, 0)
        x = x.parts(axis, first, 1, end - first)
        y_start += max(before, 0) * steps[axis]
    fill = Call("onnx_fill", {"y": n.y}, _sizes(math.prod(whole)) | {"value": np.float32(value)})
    return [fill, *([_move(x, n.y, steps, y_start)] if min(x.shape, default=1) > 0 else [])]


def _sizes(count: int) -> dict[str, int]:
    return {"n": count, "height": 1, "width": 1, "channels": 1}


def _tile(n: Site) -> list[Call] | None:
    """Move repetitions, each axis with an axis of its own before it."""
    repeats = n.found.values.get(n.name(1))
    if repeats is None:
        return None
    x, shape = n.view(n.x), n.shape(n.x)
    pairs = [size for count, size in zip(repeats.ravel().tolist(), shape, strict=True)
             for size in (count, size)]  # fmt: skip
    steps = [step for own in x.steps for step in (0, own)]
    return [_move(View(x.name, x.start, tuple(pairs), tuple(steps)), n.y, contiguous(pairs))]


def _depth_to_space(n: Site) -> list[Call] | None:
    (count, c, h, w), b = n.shape(n.x), n.get("blocksize", 1)
    if n.get("mode", "DCR") == "DCR":
        split, places = (count, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, places = (count, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3)
    return _rearranged(n, split, places)


def _space_to_depth(n: Site) -> list[Call] | None:
    (count, c, h, w), b = n.shape(n.x), n.get("blocksize", 1)
    split = (count, c, h // b, b, w // b, b)
    is_first = n.get("mode", "DCR") == "DCR"
    return _rearranged(n, split, (0, 3, 5, 1, 2, 4) if is_first else (0, 1, 3, 5, 2, 4))


def _rearranged(n: Site, split: Shape, places: Sequence[int]) -> list[Call] | None:
    """Split axes, and bring what comes of that into another order."""
    x = plain(n.x, n.shape(n.x)).reshaped(split)
    if x is None:
        return None
    y = x.transposed(places)
    return [_move(y, n.y, contiguous(y.shape))]


OPERATORS: dict[str, Builder] = {
    **dict.fromkeys(VIEWS, _view), "Cast": _cast, "Concat": _concat,
    "DepthToSpace": _depth_to_space, "Gather": _gather, "Pad": _pad,
    "SpaceToDepth": _space_to_depth, "Tile": _tile, "Where": _where,
}  # fmt: skip
