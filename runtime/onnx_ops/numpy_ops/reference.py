"""What no ordinary network needs, through `onnx.reference`: slowly, if `onnx` is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.geometry import extent
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, limited

# Operators that `onnx.reference` runs.
SLOW = frozenset(
    {
        "AffineGrid", "Attention", "BlackmanWindow", "CenterCropPad", "Col2Im", "Conv",
        "ConvInteger", "ConvTranspose", "DFT", "DeformConv", "DequantizeLinear", "Det",
        "DynamicQuantizeLinear", "EyeLike", "GlobalLpPool", "GridSample", "HammingWindow",
        "HannWindow", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
        "NegativeLogLikelihoodLoss", "NonMaxSuppression", "QLinearConv", "QLinearMatMul",
        "QuantizeLinear", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding",
        "STFT", "SoftmaxCrossEntropyLoss", "TensorScatter", "Unique", "Upsample",
    }
)  # fmt: skip


def _convolved(c: Call, x: Array, weights: Array) -> list[int]:
    """Return the padded size of a convolution, or, if that is more, the transposed one's result."""
    rank = x.ndim - 2
    ones = [1] * rank
    pads, strides = c.get("pads", [0] * (2 * rank)), c.get("strides", ones)
    dilations = c.get("dilations", ones)
    extents = [extent(k, d) for k, d in zip(weights.shape[2:], dilations, strict=True)]
    limited([*weights.shape[:2], *extents])
    before = [n + max(pads[i], 0) + max(pads[i + rank], 0) for i, n in enumerate(x.shape[2:])]
    if c.op != "ConvTranspose":
        return [*x.shape[:2], *before]
    more = c.get("output_padding", [0] * rank)
    made = [n * s + e + m for n, s, e, m in zip(before, strides, extents, more, strict=True)]
    wanted = c.get("output_shape", made)
    return [x.shape[0], weights.shape[1] * c.get("group", 1), *map(max, made, wanted)]


def _resized(c: Call) -> list[int]:
    sizes = list(c.x.shape)
    axes = [axis % c.x.ndim for axis in c.get("axes", list(range(c.x.ndim)))]
    wanted = c.integers(3, "")
    if wanted:
        scales = [w / max(c.x.shape[i], 1) for i, w in zip(axes, wanted, strict=True)]
    else:
        scales = c.input(2).tolist()
    if c.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        scales = [max(scales, default=1)] * len(axes)
    for axis, scale in zip(axes, scales, strict=True):
        sizes[axis] = math.ceil(sizes[axis] * scale)
    return sizes


def _transformed(c: Call) -> list[int]:
    axis = c.get("axis", 1) if c.opset < 20 else (c.integers(2, "") or [-2])[0]
    size = c.x.shape[axis]
    return [2, c.x.size // max(size, 1), *(c.integers(1, "") or [size])]


def _framed(c: Call) -> list[int]:
    window = c.optional(2)
    (size,) = c.integers(3, "") or [0 if window is None else window.size]
    frames = (c.x.shape[1] - size) // (c.integers(1, "") or [1])[0] + 1
    return [2, c.x.shape[0], max(frames, 0), size]


def _attended(c: Call) -> list[int]:
    keys, past = c.input(1), c.optional(4)
    heads = c.x.shape[1] if c.x.ndim == 4 else c.get("q_num_heads", 1)
    count = keys.shape[-2] + (0 if past is None else past.shape[-2])
    return [c.x.shape[0], heads, c.x.shape[-2], count]


def _cropped(c: Call) -> list[int]:
    sizes = list(c.x.shape)
    axes = c.get("axes", list(range(c.x.ndim)))
    for axis, size in zip(axes, c.integers(1, "") or [], strict=True):
        sizes[axis] = size
    return sizes


def _unpooled(c: Call) -> list[int]:
    rank = c.x.ndim - 2
    strides, kernel = c.get("strides", [1] * rank), c.get("kernel_shape", [1] * rank)
    made = [n * s + k for n, s, k in zip(c.x.shape[2:], strides, kernel, strict=True)]
    return c.integers(2, "") or [*c.x.shape[:2], *made]


def _product_of(c: Call, a: int, b: int) -> list[int]:
    x, y = c.input(a).shape, c.input(b).shape
    return [*np.broadcast_shapes(x[:-2], y[:-2]), *x[:-1][-1:], *y[1:][-1:]]


def _aligned(c: Call) -> list[int]:
    sizes = [c.get("output_height", 1), c.get("output_width", 1)]
    samples = max(c.get("sampling_ratio", 0), 1)
    limited([64, *sizes, samples, samples])  # each is a Python object
    return [len(c.input(1)), c.x.shape[1], *sizes]


def _length(c: Call) -> list[int]:
    return c.integers(0, "") or []


# How large operators' results are, or what they are made from, of those whose inputs are not: the
# rest are as large as these.
_SIZES: dict[str, Callable[[Call], Sequence[int]]] = {
    "AffineGrid": lambda c: [3, *(c.integers(1, "") or [])],
    "Attention": _attended,
    "BlackmanWindow": _length,
    "CenterCropPad": _cropped,
    "Col2Im": lambda c: [
        *c.x.shape[:2], *(n + 2 * max(c.get("pads", [0])) for n in c.integers(1, "") or [])
    ],
    "Conv": lambda c: _convolved(c, c.x, c.input(1)),
    "ConvInteger": lambda c: _convolved(c, c.x, c.input(1)),
    "ConvTranspose": lambda c: _convolved(c, c.x, c.input(1)),
    "DFT": _transformed,
    "DeformConv": lambda c: _convolved(c, c.x, c.input(1)),
    "EyeLike": lambda c: [c.x.shape[0], c.x.shape[-1]],
    "GridSample": lambda c: [*c.x.shape[:2], *c.input(1).shape[1:]],
    "HammingWindow": _length,
    "HannWindow": _length,
    "MatMulInteger": lambda c: _product_of(c, 0, 1),
    "MaxRoiPool": lambda c: [len(c.input(1)), c.x.shape[1], *c.get("pooled_shape", [])],
    "MaxUnpool": _unpooled,
    "MelWeightMatrix": lambda c: [*(c.integers(0, "") or []), *(c.integers(1, "") or [])],
    "QLinearConv": lambda c: _convolved(c, c.x, c.input(3)),
    "QLinearMatMul": lambda c: _product_of(c, 0, 3),
    "Resize": _resized,
    "RoiAlign": _aligned,
    "STFT": _framed,
}  # fmt: skip


def _through_reference(c: Call) -> list[Array]:
    c.input(0)  # no operator does without
    if c.op == "Resize" and c.opset < 11:
        return _resize_as_before(c, c.attributes, c.input(1))
    if c.op in _SIZES:
        limited(_SIZES[c.op](c))
    given = tuple("" if x is None else x.dtype.name for x in c.inputs)
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in c.attributes.items()
    }
    evaluator = _evaluator(c.op, tuple(sorted(values.items())), c.opset, given, c.outputs)
    return evaluator.run(None, {f"x{i}": x for i, x in enumerate(c.inputs) if x is not None})


@cache
def _evaluator(
    op: str, attributes: tuple[tuple[str, Any], ...], opset: int, given: tuple[str, ...],
    outputs: int,
) -> Any:  # fmt: skip
    try:
        from onnx import helper
        from onnx.reference import ReferenceEvaluator
    except ModuleNotFoundError:
        raise InputError("needs the package onnx: pip install onnx") from None
    inputs = {f"x{i}": dtype for i, dtype in enumerate(given) if dtype}
    names = [f"x{i}" if dtype else "" for i, dtype in enumerate(given)]
    results = [f"y{i}" for i in range(outputs)]
    values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in attributes}
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        for name, dtype in inputs.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **values)], "node", infos,
        [helper.make_tensor_value_info(name, 0, None) for name in results],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ReferenceEvaluator(model)


def _upsample(c: Call) -> list[Array]:
    """Run what became Resize, as that."""
    scales = c.optional(1)
    if scales is None:
        scales = np.array(c.get("scales"), np.float32)
    return _resize_as_before(c, {"mode": c.get("mode", "nearest")}, scales)


def _resize_as_before(c: Call, attributes: Mapping[str, Any], scales: Array) -> list[Array]:
    """Run a Resize that means what it did before version 11."""
    rules = {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return _through_reference(Call("Resize", {**attributes, **rules}, 13, [c.x, None, scales], 1))


OPERATORS: dict[str, Implementation] = {
    **dict.fromkeys(SLOW, _through_reference),
    "Upsample": _upsample,
}
