"""Conv and ConvTranspose, on codes or on float32, to whose result a second input may be added."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import geometry
from logshift.runtime.graph import MAX_ATTRIBUTE, Graph, Node, Shape
from logshift.runtime.operators.base import (
    NO_CLAMP,
    Attributes,
    NodeError,
    Operator,
    Site,
    bounds,
    check_activation,
    check_clamp,
    clamp,
    integer,
    integers,
    rank4,
    target_of,
)
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.convolution import Convolution, Phase

_LANES = 16  # channels that fill a vector of the widest machines

# --- shapes -------------------------------------------------------------------------------------


def weight_uses(node: Node, shapes: Mapping[str, Shape]) -> int:
    """How often each weight is used: once per output position, or input one if transposed."""
    used = node.inputs[0] if node.op == "ConvTranspose" else node.outputs[0]
    n, _, height, width = shapes[used]
    return n * height * width


def _extents(node: Node) -> tuple[int, int]:
    """Return how many rows and columns of the input a window reaches over."""
    assert node.weight_shape is not None
    _, kh, kw, _ = node.weight_shape
    rows, columns = node.attributes["dilations"]
    return geometry.extent(kh, rows), geometry.extent(kw, columns)


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    _, _, h, w = rank4(inputs[0])
    top, left, bottom, right = node.attributes["pads"]
    stride_h, stride_w = node.attributes["strides"]
    rows, columns = _extents(node)
    height = geometry.windows(h, rows, stride_h, top + bottom)
    width = geometry.windows(w, columns, stride_w, left + right)
    return _whole_shape(node, inputs, height, width)


def _transposed_shape(node: Node, inputs: list[Shape]) -> Shape:
    _, _, h, w = rank4(inputs[0])
    top, left, bottom, right = node.attributes["pads"]
    stride_h, stride_w = node.attributes["strides"]
    more_h, more_w = node.attributes["output_padding"]
    rows, columns = _extents(node)
    height = stride_h * (h - 1) + more_h + rows - top - bottom
    width = stride_w * (w - 1) + more_w + columns - left - right
    return _whole_shape(node, inputs, height, width)


def _whole_shape(node: Node, inputs: list[Shape], height: int, width: int) -> Shape:
    """Return the shape of an output of this height and width, if the inputs go with it."""
    assert node.weight_shape is not None
    n, c, _, _ = inputs[0]
    o, _, _, per_group = node.weight_shape
    channels = per_group * node.attributes["group"]
    if c != channels:
        raise NodeError(f"takes {channels} channels, its input has {c}")
    out = (n, o, height, width)
    if len(inputs) == 2 and inputs[1] != out:
        raise NodeError(f"adds a tensor of shape {inputs[1]} to its result of shape {out}")
    return out


# --- checks -------------------------------------------------------------------------------------


def pads_fit(pads: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]) -> bool:
    """Tell whether pads are allowed: less than the extent of the kernel, but always 1."""
    extents = list(map(geometry.extent, kernel, dilations))
    return all(0 <= pad < max(extents[side % 2], 2) for side, pad in enumerate(pads))


def _check(graph: Graph, node: Node) -> None:
    check_clamp(graph, node)
    check_activation(graph, node, node.weight_shape[0] if node.weight_shape else 1)
    shape, bias, a = node.weight_shape, node.bias, node.attributes
    if shape is None or bias is None:
        raise NodeError("weights are missing")
    o, kh, kw, _ = shape
    if min(shape) < 1 or max(kh, kw) > 4096:
        raise NodeError(f"weight shape {shape} is not allowed")
    if o % a["group"]:
        raise NodeError(f"{o} output channels do not divide into {a['group']} groups")
    if not pads_fit(a["pads"], (kh, kw), a["dilations"]):
        extents = list(_extents(node))
        raise NodeError(f"pads {a['pads']} reach beyond the kernel's extent {extents}")
    if not np.isfinite(bias).all():
        raise NodeError("bias must be finite")
    if node.float_weights is None:
        _check_words(graph, node, bias)
    elif graph.is_code(node.inputs[0]):
        raise NodeError("weights of a convolution of codes must be words")
    elif not np.isfinite(node.float_weights).all():
        raise NodeError("weights must be finite")


def check_grid(weights: LogWeights) -> None:
    """Refuse words that reach beyond their grid, or whose grid is none."""
    if not (np.isfinite(weights.alpha).all() and (weights.alpha > 0).all()):
        raise NodeError("alpha must be finite and positive")
    largest = weights.largest
    if largest > weights.limit:
        raise NodeError(f"|W| reaches {largest}, beyond clip * 2^(L-1+s) = {weights.limit}")


def _check_words(graph: Graph, node: Node, bias: np.ndarray) -> None:
    weights = node.weights
    assert weights is not None
    check_grid(weights)
    q_x = graph.quantization.get(node.inputs[0])
    scale_x = q_x.scale if q_x else 1.0
    q = graph.quantization.get(node.outputs[0])
    scale_y = min(q.scale if q else 1.0, target_of(graph, node).unit)
    # Keeps |t * M + B| far from float32 infinity for any codes.
    if (
        float(weights.unit().max()) * scale_x / scale_y > 1e15
        or float(np.abs(bias).max()) / scale_y > 1e30
    ):
        raise NodeError("alpha or bias is absurdly large against the output scale")


def _check_transposed(graph: Graph, node: Node) -> None:
    _check(graph, node)
    a = node.attributes
    for extra, stride, dilation in zip(
        a["output_padding"], a["strides"], a["dilations"], strict=True
    ):
        if extra >= max(stride, dilation):
            raise NodeError("output_padding must be below stride or dilation")


# --- kernel calls -------------------------------------------------------------------------------


def phases(node: Node) -> Iterator[tuple[Any, Phase]]:
    """Yield the convolutions that compute a node's output: indices of their weights, and where.

    A ConvTranspose is one ordinary convolution for each output phase. Phases side by side that read
    the same inputs may be one, whose channels are those of all their pixels.
    """
    a, shape = node.attributes, node.weight_shape
    assert shape is not None
    if node.op == "Conv":
        first = (-a["pads"][0], -a["pads"][1])
        yield ..., Phase(first, tuple(a["strides"]), tuple(a["dilations"]))
        return
    rows, columns = (
        list(_phases(shape[1 + i], a["strides"][i], a["dilations"][i], a["pads"][i]))
        for i in (0, 1)
    )
    for p, (taps_h, first_h, dilation_h) in enumerate(rows):
        for q, end in _joined(node, columns):
            _, first_w, dilation_w = columns[q]
            _, ky, _, c = np.ix_([0], taps_h, [0], range(shape[3]))
            o = np.tile(np.arange(shape[0]), end - q).reshape(-1, 1, 1, 1)
            taps_w = np.array([taps for taps, *_ in columns[q:end]], np.int64)
            kx = np.repeat(taps_w, shape[0], axis=0)[:, None, :, None]
            yield (o, ky, kx, c), Phase(
                (first_h, first_w), (1, 1), (dilation_h, dilation_w), (p, q), tuple(a["strides"]),
                end - q,
            )  # fmt: skip


def _joined(node: Node, columns: Sequence[tuple[list[int], int, int]]) -> Iterator[tuple[int, int]]:
    """Yield runs of phases of columns, first and end, that are computed as one.

    They read the same inputs, there are as many outputs of each, and their channels together fill
    vectors better than they do alone.
    """
    a, shape = node.attributes, node.weight_shape
    assert shape is not None
    alone = a["group"] > 1 or shape[0] % _LANES == 0
    padded = a["output_padding"][1] - a["pads"][1] - a["pads"][3]
    longer = (_extents(node)[1] + padded) % a["strides"][1]  # so many have an output more
    keys = [
        (len(taps), *others, q < longer, alone and q) for q, (taps, *others) in enumerate(columns)
    ]
    begin = 0
    for _, run in itertools.groupby(keys):
        end = begin + len(list(run))
        yield begin, end
        begin = end


def _phases(
    kernel_size: int, stride: int, dilation: int, pad: int
) -> Iterator[tuple[list[int], int, int]]:
    """Split one axis of a ConvTranspose into ordinary convolutions, one per output phase.

    Output position `stride * i + p` receives input position `i + (p + pad - k * dilation) / stride`
    through every tap k for which that is an integer. Yields, per phase p: the taps in the order of
    ascending input positions, the first of those positions relative to i, and their distance.
    """
    for p in range(stride):
        taps = [k for k in range(kernel_size) if (p + pad - k * dilation) % stride == 0][::-1]
        first = (p + pad - taps[0] * dilation) // stride if taps else 0
        yield taps, first, dilation // math.gcd(stride, dilation)


def constants(
    graph: Graph, node: Node, conv: Convolution, table: np.ndarray | None
) -> dict[str, Any]:
    """Return the argument record of a convolution, as far as no size changes it.

    `table` is what output codes go through at the end, if they do.
    """
    out, quantization, phase = node.outputs[0], graph.quantization, conv.phase
    q_y = quantization.get(out)
    residual = len(node.inputs) > 1
    fields = conv.packed.constants | bounds(node, q_y) | {
        "stride_h": phase.strides[0], "stride_w": phase.strides[1],
        "step_h": phase.steps[0], "step_w": phase.steps[1],
        "group": conv.layer.group, "has_residual": residual,
    }  # fmt: skip
    if graph.on_codes(node):
        assert node.weights is not None
        fields |= {
            "bits": node.weights.bits, "residual_shift": node.weights.residual_shift,
            "float_output": q_y is None,
            "activation": conv.target.kind,
            "coefficients": conv.target.coefficients.ctypes.data,
        }  # fmt: skip
        if residual:
            q_r = quantization[node.inputs[1]]
            m_r = np.float32(q_r.scale / conv.target.unit)
            fields |= {"z_r": q_r.zero_point, "m_r": m_r}
        if table is not None:
            fields["table"] = table.ctypes.data
    return fields


def _build(site: Site) -> Iterator[Call]:
    x, y = site.inputs[0], site.output
    tensors = {"x": x.name, "y": y.name}
    if len(site.inputs) > 1:
        tensors["r"] = site.inputs[1].name
    n, _, h, w = y.shape
    for conv in site.convolutions:
        phase = conv.phase
        height, width = phase.count(0, h), phase.count(1, w)
        if height <= 0 or width <= 0:
            continue
        channels, kernel_h, kernel_w, _ = conv.layer.weights.shape
        fields = {
            "n": n, "height": height, "width": width, "channels": channels,
            "row0": x.top + phase.first[0], "column0": x.left + phase.first[1],
            "dilation_h": phase.dilations[0], "dilation_w": phase.dilations[1],
            "kernel_h": kernel_h, "kernel_w": kernel_w,
        }  # fmt: skip
        # A phase writes into the picture from its own first row and column on.
        moved = {"y": phase.begin, "r": phase.begin} if phase.begin != (0, 0) else None
        yield Call(conv.kernel.op, tensors, fields, conv.work, moved, conv)


_ATTRIBUTES: Attributes = {
    "strides": ([1, 1], integers(2, 1)),
    "pads": ([0, 0, 0, 0], integers(4, 0)),
    "dilations": ([1, 1], integers(2, 1)),
    "group": (1, integer(1, MAX_ATTRIBUTE)),
    "clamp": (NO_CLAMP, clamp),
}

OPERATORS = [
    Operator(
        "Conv", "c? ff", _shape, _build, _ATTRIBUTES, (1, 2), check=_check, activates=True,
        stores="weights", writes_parts=True,
    ),
    Operator(
        "ConvTranspose", "c? ff", _transposed_shape, _build,
        # There are strides[0] * strides[1] phases.
        {**_ATTRIBUTES, "strides": ([1, 1], integers(2, 1, 32)),
         "output_padding": ([0, 0], integers(2, 0))},
        (1, 2), check=_check_transposed, activates=True, stores="weights", writes_parts=True,
    ),
]  # fmt: skip
