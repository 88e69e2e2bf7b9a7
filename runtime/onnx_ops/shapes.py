"""What decides about the shapes of ONNX operators' results: values of inputs, and easy rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from logshift.runtime.graph import Inference, Node, Shape

# Operators that read nothing of their input but its shape.
OF_SHAPE = frozenset({"Shape", "Size"})

# Inputs of ONNX operators whose values decide about the output's shape.
VALUES: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1, 2),
    "DFT": (1,), "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1), "OneHot": (1,), "Pad": (1, 3), "Range": (0, 1, 2), "Reshape": (1,),
    "Resize": (1, 2, 3), "STFT": (1, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **dict.fromkeys(
        (f"Reduce{kind}" for kind in (
            "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"
        )), (1,),
    ),
}  # fmt: skip


def _same(node: Node, shapes: list, found: Inference) -> Shape:
    return shapes[0]


def _broadcast(node: Node, shapes: list, found: Inference) -> Shape:
    return np.broadcast_shapes(*shapes)


def _matmul(node: Node, shapes: list, found: Inference) -> Shape | None:
    a, b = shapes
    if min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        return None
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _axes(node: Node, rank: int, found: Inference) -> set[int] | None:
    """Axes that an attribute or a known input names; None for the operator's own choice."""
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] in found.values:
        axes = found.values[node.inputs[1]].ravel().tolist()
    if not isinstance(axes, list) or not axes or not all(-rank <= a < rank for a in axes):
        return None
    return {a % rank for a in axes}


def _reduce(node: Node, shapes: list, found: Inference) -> Shape | None:
    axes, keep = _axes(node, len(shapes[0]), found), node.attributes.get("keepdims", 1)
    if axes is None:
        return None
    return tuple(1 if i in axes else d for i, d in enumerate(shapes[0]) if keep or i not in axes)


def _squeeze(node: Node, shapes: list, found: Inference) -> Shape | None:
    axes = _axes(node, len(shapes[0]), found)
    if axes is None or any(shapes[0][axis] != 1 for axis in axes):
        return None
    return tuple(d for i, d in enumerate(shapes[0]) if i not in axes)


def _unsqueeze(node: Node, shapes: list, found: Inference) -> Shape | None:
    given = node.attributes.get("axes")
    count = len(given) if isinstance(given, list) else math.prod(shapes[-1])
    axes = _axes(node, len(shapes[0]) + count, found)
    if axes is None or len(axes) != count:
        return None
    rest = iter(shapes[0])
    return tuple(1 if i in axes else next(rest) for i in range(len(shapes[0]) + count))


def _transpose(node: Node, shapes: list, found: Inference) -> Shape | None:
    order = node.attributes.get("perm")
    if not isinstance(order, list) or sorted(order) != list(range(len(shapes[0]))):
        return None
    return tuple(shapes[0][i] for i in order)


def _recurrent(node: Node, shapes: list, found: Inference) -> list[Shape]:
    """Shapes of all states, of the last one, and of the last cell."""
    (length, batch, _), (directions, _, hidden) = shapes[0], shapes[2]
    if node.attributes.get("layout", 0):
        length, batch = batch, length
        return [(batch, length, directions, hidden), *[(batch, directions, hidden)] * 2]
    return [(length, directions, batch, hidden), *[(directions, batch, hidden)] * 2]


# Operators that are common, and costly to run on zeros; a list of shapes is of several outputs.
RULES: dict[str, Callable[[Node, list, Inference], Shape | list[Shape] | None]] = {
    **dict.fromkeys(
        ("Abs", "Ceil", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
         "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish",
         "Neg", "Reciprocal", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Tanh"),
        _same,
    ),
    **dict.fromkeys(
        ("Add", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "PRelu", "Pow", "Sub",
         "Where"), _broadcast,
    ),
    **dict.fromkeys(
        (f"Reduce{kind}" for kind in ("L2", "Max", "Mean", "Min", "Sum", "SumSquare")),
        _reduce,
    ),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "MatMul": _matmul, "Squeeze": _squeeze, "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
