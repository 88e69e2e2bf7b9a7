"""What shapes, types and values follow from the shapes of a graph's inputs, before any run.

Packed operators tell the shape of their output. ONNX operators are run on zeros that take no
memory, or on values where these are known; for common ones a rule tells the shape, once it has
proved right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.graph import MAX_ELEMENTS, MAX_RANK, Graph, Inference, Node, Shape
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.onnx_ops.shapes import OF_SHAPE, RULES, VALUES
from logshift.runtime.operators import OPERATORS
from logshift.runtime.operators.base import NodeError

# Values up to this size are computed from shapes before a run, and kept.
_KEPT_ELEMENTS = 2**20
_CODES, _FLOATS = np.dtype(np.uint8), np.dtype(np.float32)


def infer(
    graph: Graph, inputs: Mapping[str, Shape], seen: dict[int, np.dtype | None] | None = None
) -> Inference:
    """Infer what can be known of all tensors from input shapes alone.

    Parameters
    ----------
    graph : Graph, validated
    inputs : dict of input name to Shape
    seen : dict, optional
        What was learnt of ONNX operators of this graph, for the next time; empty at first.

    Raises
    ------
    InputError
        If the inputs do not fit the graph's declared shapes or a node cannot take them.
    """
    found = Inference({}, {}, dict(graph.constants))
    for name, array in graph.constants.items():
        found.shapes[name], found.dtypes[name] = array.shape, array.dtype
    bound: dict[str, int] = {}
    for info in graph.inputs:
        shape = tuple(int(d) for d in inputs[info.name])
        declared = "(" + ", ".join(str(d) for d in info.shape) + ")"
        if len(shape) != len(info.shape):
            raise InputError(f"input {info.name!r} has shape {shape}, expected {declared}")
        for size, dim in zip(shape, info.shape, strict=True):
            expected = bound.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected or size < (dim != 0):
                freed = "; what an export has fixed is freed by convert(..., input_shapes=...)"
                raise InputError(
                    f"input {info.name!r} has shape {shape}, expected {declared}"
                    f"{freed * isinstance(dim, int)}"
                )
        found.shapes[info.name], found.dtypes[info.name] = shape, np.dtype(info.dtype)
    for index, node in enumerate(graph.nodes):
        try:
            if node.is_onnx:
                if seen is None or not _infer_quickly(index, node, found, seen):
                    _infer_onnx(graph, node, found)
                    _learn(index, node, found, seen)
            else:
                _infer_packed(graph, node, found)
        except (NodeError, InputError) as error:
            raise InputError(f"node {node.name!r} ({node.op}): {error}") from None
    return found


def infer_nominal(graph: Graph) -> Inference:
    """Infer at the nominal input size."""
    return infer(graph, graph.nominal_inputs())


def nominal_shapes(graph: Graph) -> dict[str, Shape]:
    """Return the shapes of all tensors at the nominal input size."""
    return infer_nominal(graph).shapes


def _infer_packed(graph: Graph, node: Node, found: Inference) -> None:
    out = node.outputs[0]
    for name in node.inputs:
        if name not in found.shapes:
            raise NodeError(f"the shape of its input {name!r} depends on values")
        expected = _CODES if graph.is_code(name) else _FLOATS
        if found.dtypes[name] != expected:
            raise NodeError(f"its input {name!r} is {found.dtypes[name]}, not {expected}")
    shape = OPERATORS[node.op].shape(node, [found.shapes[name] for name in node.inputs])
    if min(shape, default=0) < 1 or math.prod(shape) > MAX_ELEMENTS:
        raise NodeError(
            f"would produce shape {shape}; the input is too small or too large for this network"
        )
    found.shapes[out] = shape
    found.dtypes[out] = _CODES if graph.is_code(out) else _FLOATS


def _infer_onnx(graph: Graph, node: Node, found: Inference) -> None:
    """Run an ONNX operator: on what is known, else on zeros, whose result has the right shape."""
    names = [name for name in node.inputs if name]
    if any(name not in found.shapes for name in names):
        return
    if node.op in OF_SHAPE:
        known = True
        arguments = [_zeros(found, name) for name in node.inputs]
    else:
        known = all(name in found.values for name in names)
        if not known and node.op in numpy_ops.DATA_DEPENDENT:
            return
        for index in VALUES.get(node.op, ()):
            name = node.inputs[index] if index < len(node.inputs) else ""
            if name and name not in found.values:
                return
        arguments = [
            found.values[name] if name in found.values else _zeros(found, name)
            for name in node.inputs
        ]
    results = numpy_ops.compute(node.op, node.attributes, graph.opset, arguments, len(node.outputs))
    for name, y in zip(node.outputs, results, strict=True):
        if not name:
            continue
        if y.size > MAX_ELEMENTS or y.ndim > MAX_RANK:
            raise NodeError(f"would produce shape {y.shape}; the input is too large")
        found.shapes[name], found.dtypes[name] = y.shape, y.dtype
        if known and y.size <= _KEPT_ELEMENTS:
            found.values[name] = y


def _infer_quickly(
    index: int, node: Node, found: Inference, seen: dict[int, np.dtype | None]
) -> bool:
    """Infer by a rule, if one has proved right before; says whether it did."""
    dtype = seen.get(index)
    if dtype is None or all(name in found.values for name in node.inputs if name):
        return False
    shapes = _rule(node, found)
    if any(math.prod(shape) > MAX_ELEMENTS or len(shape) > MAX_RANK for shape in shapes):
        return False
    for name, shape in zip(node.outputs, shapes, strict=False):
        if name:
            found.shapes[name], found.dtypes[name] = shape, dtype
    return bool(shapes)


def _learn(
    index: int, node: Node, found: Inference, seen: dict[int, np.dtype | None] | None
) -> None:
    """Note the type of an operator's outputs, or that no rule tells their shapes."""
    outputs = [name for name in node.outputs if name]
    if seen is None or index in seen or not found.values.keys().isdisjoint(outputs):
        return
    told = dict(zip(node.outputs, _rule(node, found), strict=False))
    dtypes = {found.dtypes.get(name) for name in outputs}
    right = len(dtypes) == 1 and all(told.get(n) == found.shapes.get(n, told) for n in outputs)
    seen[index] = dtypes.pop() if right else None


def _rule(node: Node, found: Inference) -> Sequence[Shape]:
    """Shapes of the outputs of an ONNX operator, where these are easily told; else none."""
    rule = RULES.get(node.op)
    shapes = [found.shapes.get(name) for name in node.inputs if name]
    if rule is None or not shapes or None in shapes:
        return ()
    try:
        told = rule(node, shapes, found)
    except (ValueError, IndexError):  # what does not fit, computing on zeros will name
        return ()
    return told if isinstance(told, list) else () if told is None else (told,)


def _zeros(found: Inference, name: str) -> np.ndarray | None:
    """Return zeros that take no memory; None for an input that is not given."""
    if not name:
        return None
    return np.broadcast_to(np.zeros((), found.dtypes[name]), found.shapes[name])
