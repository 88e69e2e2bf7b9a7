"""ONNX operators in ONNX's form that have compiled kernels, and how these are called.

That is decided for every node and set of input shapes: by the operator, and because all of its
tensors are float32, not empty, and of known shapes. NumPy does the rest, see `numpy_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels import functions
from logshift.runtime.graph import Graph, Inference, Node, Shape
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import ELEMENT, FUNCTION, PRODUCT, SOFTMAX

_FLOAT, _HALF = np.dtype(np.float32), np.dtype(np.float16)
_CUT = 2**12  # elements of a contiguous axis above which it is cut in two, for threads to share


def calls(graph: Graph, found: Inference) -> dict[int, tuple[Call, ...]]:
    """Return how kernels are called for the nodes that have any, by their positions.

    There is no call for an operator whose output is its input under another name and shape.
    """
    result = {}
    for index, node in enumerate(graph.nodes):
        build = OPERATORS.get(node.op) if node.is_onnx else None
        if build is None or not _has_kernels(node, found):
            continue
        made = build(_Node(graph, node, found))
        if made is not None:
            result[index] = tuple(made)
    return result


def turned_back(
    graph: Graph, found: Inference, made: Mapping[int, tuple[Call, ...]]
) -> dict[int, str]:
    """Return which Transposes give the bytes of a packed operator's output, as that is stored.

    That is channels last, and what a converted MatMul is followed by.

    Returns
    -------
    dict of a node's position to the name of that operator's output
    """
    sources: dict[str, str] = {}  # of views, by their names
    result = {}
    # These may need a border around what they read.
    packed = {name for node in graph.nodes if not node.is_onnx for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        if not node.is_onnx:
            out = node.outputs[0]
            if out not in packed and not graph.is_code(out):
                sources[out] = out
            continue
        source = sources.get(node.inputs[0]) if node.inputs else None
        if source is None or index not in made:
            continue
        if not made[index]:
            sources[node.outputs[0]] = source
        elif node.op == "Transpose" and _is_channels_last(_Node(graph, node, found), source):
            result[index] = source
    return result


def _has_kernels(node: Node, found: Inference) -> bool:
    if node.op == "Cast":
        return node.outputs[0] not in found.values
    first = slice(1, 2) if node.op == "Where" else slice(1)
    for name in (*node.inputs[first], *node.outputs):
        if found.dtypes.get(name) != _FLOAT or 0 in found.shapes[name]:
            return False
    return node.outputs[0] not in found.values


class _Node:
    """A node, and what is known of its tensors."""

    def __init__(self, graph: Graph, node: Node, found: Inference) -> None:
        self.graph, self.node, self.found = graph, node, found
        self.x, self.y = node.inputs[0], node.outputs[0]

    def shape(self, name: str) -> Shape:
        return self.found.shapes[name]

    def get(self, name: str, default: Any) -> Any:
        return self.node.attributes.get(name, default)

    def value(self, index: int) -> Any:
        """Return the known number that an input is, or None."""
        name = self.node.inputs[index] if index < len(self.node.inputs) else ""
        value = self.found.values.get(name)
        return value.item() if value is not None and value.size == 1 else None

    def given(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] != ""


def axes(sizes: Sequence[int], *steps: Sequence[int]) -> np.ndarray:
    """Return what a kernel gets of axes: as few rows as there can be, but two.

    Parameters
    ----------
    sizes : of all axes
    steps : of each tensor, along each axis

    Returns
    -------
    int64 array (rank, 1 + tensors)
    """
    rows: list[list[int]] = []
    for size, *inner in zip(sizes, *steps, strict=True):
        if size == 1:
            continue
        if rows and rows[-1][1:] == [size * step for step in inner]:
            rows[-1] = [rows[-1][0] * size, *inner]
        else:
            rows.append([size, *inner])
    if len(rows) == 1 and (cut := _cut(rows[0][0])) > 1:
        size, *inner = rows[0]
        rows = [[cut, *(step * (size // cut) for step in inner)], [size // cut, *inner]]
    while len(rows) < 2:
        rows.insert(0, [1] + [0] * len(steps))
    return np.array(rows, np.int64)


def _cut(size: int) -> int:
    """Into how many parts a long axis is cut."""
    if size <= _CUT:
        return 1
    return next((count for count in range(min(64, size // 1024), 1, -1) if size % count == 0), 1)


def _contiguous(shape: Sequence[int]) -> list[int]:
    """Return the steps of a contiguous tensor."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return steps[::-1][: len(shape)]


def _repeated(shape: Shape, whole: Shape) -> list[int]:
    """Return the steps of a contiguous tensor that is repeated to another shape."""
    steps = [0 if size == 1 else step for size, step in zip(shape, _contiguous(shape), strict=True)]
    return [0] * (len(whole) - len(shape)) + steps


def _fields(table: np.ndarray) -> dict[str, Any]:
    *outer, width = table[:, 0].tolist()
    return {
        "axes": table, "rank": len(table),
        "n": math.prod(outer), "height": 1, "width": width, "channels": 1,
    }  # fmt: skip


# --- moves ----------------------------------------------------------------------------------------


def _move(
    x: str, y: str, shape: Shape, steps: Sequence[int], start: int, y_steps: Sequence[int],
    y_start: int = 0,
) -> Call:  # fmt: skip
    fields = _fields(axes(shape, y_steps, steps)) | {"start_x": start, "start_y": y_start}
    return Call("onnx_move", {"x": x, "y": y}, fields)


def _view(n: _Node) -> list[Call]:
    """Make no call: the output is the same bytes under another name."""
    return []


def _order(n: _Node) -> list[int] | None:
    """Return which axis of its input each axis of a Transpose's output is."""
    rank = len(n.shape(n.x))
    order = n.get("perm", [*range(rank)][::-1])
    return [axis % rank for axis in order] if isinstance(order, list) else None


def _transpose(n: _Node) -> list[Call] | None:
    shape, steps, order = n.shape(n.x), _contiguous(n.shape(n.x)), _order(n)
    if order is None:
        return None
    moved = [axis for axis in order if shape[axis] != 1]
    if moved == sorted(moved):
        return []
    whole = n.shape(n.y)
    return [_move(n.x, n.y, whole, [steps[axis] for axis in order], 0, _contiguous(whole))]


def _is_channels_last(n: _Node, source: str) -> bool:
    """Whether a Transpose of a view of a tensor gives the bytes of that, channels last."""
    shape, whole = n.shape(n.x), n.shape(source)
    sizes = [size for size in whole if size != 1]
    if len(whole) != 4 or sizes != [size for size in shape if size != 1]:
        return False
    last = [axis for axis in (0, 2, 3, 1) if whole[axis] != 1]
    places = iter(axis for axis, size in enumerate(whole) if size != 1)
    axis_of = {axis: next(places) for axis, size in enumerate(shape) if size != 1}
    return [axis_of[axis] for axis in _order(n) or () if axis in axis_of] == last


def _expand(n: _Node) -> list[Call]:
    whole = n.shape(n.y)
    if math.prod(n.shape(n.x)) == math.prod(whole):
        return []
    return [_move(n.x, n.y, whole, _repeated(n.shape(n.x), whole), 0, _contiguous(whole))]


def _windows(n: _Node) -> list[Call] | None:
    """Move parts of a tensor: those of the views that NumPy makes of it."""
    x = np.empty(n.shape(n.x), np.float32)
    inputs = [x, *(n.found.values.get(name) for name in n.node.inputs[1:])]
    results = numpy_ops.compute(
        n.node.op, n.node.attributes, n.graph.opset, inputs, len(n.node.outputs)
    )
    if results[0].size == x.size and results[0].flags.c_contiguous:
        return []
    made = []
    for name, y in zip(n.node.outputs, results, strict=True):
        start, steps = y.ctypes.data - x.ctypes.data, [step // 4 for step in y.strides]
        made.append(_move(n.x, name, y.shape, steps, start // 4, _contiguous(y.shape)))
    return made


def _concat(n: _Node) -> list[Call] | None:
    whole, start, made = n.shape(n.y), 0, []
    axis = n.get("axis", 1) % len(whole)
    for name in n.node.inputs:
        shape = n.shape(name)
        if n.found.dtypes[name] != _FLOAT:
            return None
        if 0 not in shape:
            steps = _contiguous(whole)
            made.append(_move(name, n.y, shape, _contiguous(shape), 0, steps, start * steps[axis]))
        start += shape[axis]
    return made


def _cast(n: _Node) -> list[Call] | None:
    """Make float32 of a float16 input, or a float16 output of float32."""
    kinds = (n.found.dtypes.get(n.x), n.found.dtypes.get(n.y))
    if kinds == (_HALF, _FLOAT) and any(info.name == n.x for info in n.graph.inputs):
        op = "onnx_widen"
    elif kinds == (_FLOAT, _HALF) and _is_only_an_output(n.graph, n.y):
        op = "onnx_narrow"
    else:
        return None
    fields = {"n": math.prod(n.shape(n.x)), "height": 1, "width": 1, "channels": 1}
    return [Call(op, {"x": n.x, "y": n.y}, fields)] if fields["n"] else None


def _is_only_an_output(graph: Graph, name: str) -> bool:
    read = any(name in node.inputs for node in graph.nodes)
    return not read and [info.name for info in graph.outputs].count(name) == 1


def _where(n: _Node) -> list[Call] | None:
    """Move what a condition chooses that sizes decide."""
    if (chosen := n.value(0)) is None:
        return None
    name = n.node.inputs[1 if chosen else 2]
    if n.found.dtypes.get(name) != _FLOAT:
        return None
    whole = n.shape(n.y)
    return [_move(name, n.y, whole, _repeated(n.shape(name), whole), 0, _contiguous(whole))]


# --- element by element ---------------------------------------------------------------------------


def _binary(function: str) -> Callable[[_Node], list[Call] | None]:
    def build(n: _Node) -> list[Call] | None:
        if len(n.node.inputs) != 2 or n.found.dtypes.get(n.node.inputs[1]) != _FLOAT:
            return None
        return [_of_two(n, n.node.inputs[1], function)]

    return build


def _of_two(n: _Node, r: str, function: str) -> Call:
    whole = n.shape(n.y)
    if n.shape(n.x) == n.shape(r):
        table = axes([math.prod(whole)], [1], [1], [1])
    else:
        steps = (_repeated(n.shape(name), whole) for name in (n.x, r))
        table = axes(whole, _contiguous(whole), *steps)
    fields = _fields(table)
    fields["function"] = [*functions.ONNX_BINARY_FUNCTIONS].index(function)
    return Call("onnx_binary", {"x": n.x, "r": r, "y": n.y}, fields)


def _power(n: _Node) -> list[Call] | None:
    return [_of_two(n, n.x, "mul")] if n.value(1) == 2 and n.shape(n.x) == n.shape(n.y) else None


def _unary(function: str, **defaults: float) -> Callable[[_Node], list[Call]]:
    """Apply a function, which has attributes of these names, to each element."""
    return lambda n: [_function(n, function, **{k: n.get(k, v) for k, v in defaults.items()})]


def _function(n: _Node, function: str, alpha: float = 0, beta: float = 0) -> Call:
    with np.errstate(over="ignore"):
        alpha, beta = float(np.float32(alpha)), float(np.float32(beta))
    fields = {
        "n": math.prod(n.shape(n.x)), "height": 1, "width": 1, "channels": 1,
        "function": [*functions.ONNX_UNARY_FUNCTIONS].index(function), "alpha": alpha, "beta": beta,
    }  # fmt: skip
    return Call("onnx_unary", {"x": n.x, "y": n.y}, fields, FUNCTION)


def _clip(n: _Node) -> list[Call] | None:
    bounds = []
    for index, name, none in ((1, "min", -math.inf), (2, "max", math.inf)):
        bound = n.value(index) if n.given(index) else n.get(name, none)
        if not isinstance(bound, int | float) or bound != bound:
            return None
        bounds.append(bound)
    return [_function(n, "clip", *bounds)]


# --- products -------------------------------------------------------------------------------------


def _matmul(n: _Node) -> list[Call] | None:
    r = n.node.inputs[1]
    if n.found.dtypes.get(r) != _FLOAT:
        return None
    first, second = n.shape(n.x), n.shape(r)
    first = (1, *first) if len(first) == 1 else first
    second = (*second, 1) if len(second) == 1 else second
    # What a matrix is of: of batches that one tensor is repeated along it may be more than it has.
    (rows, count), columns = first[-2:], second[-1]
    whole = np.broadcast_shapes(first[:-2], second[:-2])
    steps = [
        [size * step for step in of_matrices]
        for size, of_matrices in (
            (rows * columns, _contiguous(whole)),
            (rows * count, _repeated(first[:-2], whole)),
            (count * columns, _repeated(second[:-2], whole)),
        )
    ]
    if not any(steps[2]) and math.prod(whole) == math.prod(first[:-2]):
        # One matrix for all: the rows of the first ones follow each other.
        rows, whole, steps = rows * math.prod(whole), (), [[], [], []]
    table = axes(whole, *steps)
    fields = {
        "axes": table, "rank": len(table), "count": count,
        "n": math.prod(whole), "height": rows, "width": columns, "channels": 1,
    }  # fmt: skip
    return [Call("onnx_matmul", {"x": n.x, "r": r, "y": n.y}, fields, PRODUCT * count)]


# --- along axes -----------------------------------------------------------------------------------


def _reduce(function: str, mean: bool = False) -> Callable[[_Node], list[Call] | None]:
    def build(n: _Node) -> list[Call] | None:
        shape = n.shape(n.x)
        chosen = n.get("axes", None)
        chosen = [chosen] if isinstance(chosen, int) else chosen
        if n.given(1):
            chosen = n.found.values[n.node.inputs[1]].ravel().tolist()
        if not chosen:
            if n.get("noop_with_empty_axes", 0):
                return None
            chosen = range(len(shape))
        along = {axis % len(shape) for axis in chosen} if shape else set()
        steps = _contiguous(shape)
        kept = [axis for axis in range(len(shape)) if axis not in along]
        sizes = [shape[axis] for axis in kept]
        if math.prod(sizes) != math.prod(n.shape(n.y)):  # axes are given twice, and differ
            return None
        table = axes(sizes, _contiguous(sizes), [steps[axis] for axis in kept])
        reduced = [shape[axis] for axis in sorted(along)]
        fields = _fields(table) | {
            "reduced": axes(reduced, [steps[axis] for axis in sorted(along)]),
            "function": [*functions.ONNX_REDUCTIONS].index(function),
            "divisor": math.prod(reduced) if mean else 1,
        }  # fmt: skip
        fields["reduced_rank"] = len(fields["reduced"])
        return [Call("onnx_reduce", {"x": n.x, "y": n.y}, fields, ELEMENT * math.prod(reduced))]

    return build


def _softmax(n: _Node) -> list[Call] | None:
    shape = n.shape(n.x)
    if not shape:
        return None
    last = n.graph.opset >= 13
    axis = n.get("axis", -1 if last else 1)
    axis = axis if axis == len(shape) else axis % len(shape)
    after = math.prod(shape[axis + 1 :]) if last else 1
    fields = {
        "n": math.prod(shape[:axis]), "height": math.prod(shape[axis:]) // after,
        "width": after, "channels": 1,
    }  # fmt: skip
    return [Call("onnx_softmax", {"x": n.x, "y": n.y}, fields, SOFTMAX)]


# What makes the calls for a node, None where only NumPy can do it.
OPERATORS: dict[str, Callable[[_Node], Iterable[Call] | None]] = {
    **dict.fromkeys(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _view),
    "Cast": _cast, "Concat": _concat, "Expand": _expand, "Slice": _windows, "Split": _windows,
    "Transpose": _transpose, "Where": _where,
    "Add": _binary("add"), "Div": _binary("div"), "Max": _binary("maximum"),
    "Min": _binary("minimum"), "Mul": _binary("mul"), "PRelu": _binary("prelu"), "Pow": _power,
    "Sub": _binary("sub"), "Sum": _binary("add"),
    "Abs": _unary("abs"), "Clip": _clip, "Elu": _unary("elu", alpha=1), "Erf": _unary("erf"),
    "Exp": _unary("exp"), "HardSigmoid": _unary("hard_sigmoid", alpha=0.2, beta=0.5),
    "HardSwish": lambda n: [_function(n, "hard_swish", 1 / 6, 0.5)],
    "LeakyRelu": _unary("leaky_relu", alpha=0.01), "Neg": _unary("neg"),
    "Reciprocal": _unary("reciprocal"), "Relu": lambda n: [_function(n, "clip", 0, math.inf)],
    "Sigmoid": _unary("sigmoid"), "Sqrt": _unary("sqrt"), "Swish": _unary("swish", alpha=1),
    "Tanh": _unary("tanh"),
    "ReduceMax": _reduce("max"), "ReduceMean": _reduce("sum", mean=True),
    "ReduceMin": _reduce("min"), "ReduceSum": _reduce("sum"),
    "MatMul": _matmul, "Softmax": _softmax,
}  # fmt: skip
