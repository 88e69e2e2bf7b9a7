"""Convolutions, also transposed ones, and products with a matrix, which run as convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from logshift.converter.float_graph import FloatNode
from logshift.converter.layout import packed_weight
from logshift.converter.onnx_writer import BEFORE, AnyNode, OnnxWriter, Step
from logshift.converter.operators import volumes
from logshift.converter.operators.context import Context, name_of
from logshift.converter.operators.registry import Unsupported, lowers, writes
from logshift.converter.operators.windows import (
    on_a_line,
    transposed_pads,
    window_attributes,
)
from logshift.runtime.operators.conv import pads_fit


@lowers("Conv")
def _conv(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if on_a_line(ctx, node, a) or volumes.convolved(ctx, node, a):
        return
    weight = ctx.constant(node.input[1])
    if weight.ndim != 4:
        raise Unsupported(f"is {weight.ndim - 2}-dimensional; up to 3-D is supported")
    x = ctx.tensor(node.input[0])
    attributes = window_attributes(ctx, a, ctx.shapes[x], weight.shape[2:])
    attributes["group"] = a.get("group", 1)
    _add_conv(ctx, node, x, weight, attributes)


@lowers("ConvTranspose")
def _conv_transpose(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if on_a_line(ctx, node, a):
        return
    weight = ctx.constant(node.input[1])
    if weight.ndim != 4:
        raise Unsupported(f"is {weight.ndim - 2}-dimensional; only 2-D is supported")
    x = ctx.tensor(node.input[0])
    group = a.get("group", 1)
    attributes = {
        "strides": list(a.get("strides", [1, 1])),
        "dilations": list(a.get("dilations", [1, 1])),
        "output_padding": list(a.get("output_padding", [0, 0])),
        "group": group,
    }
    attributes["pads"] = transposed_pads(ctx, node, a, attributes, ctx.shapes[x], weight.shape[2:])
    _add_conv(ctx, node, x, weight, attributes)


# Of a convolution that only multiplies.
_POINTWISE = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}


@lowers("Gemm")
def _gemm(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if a.get("transA", 0):
        raise Unsupported("transA = 1 mixes the pictures of a batch")
    weight = ctx.constant(node.input[1])
    weight = weight if a.get("transB", 0) else weight.T
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = ctx.constant(node.input[2])
        if bias.size not in (1, weight.shape[0]):
            raise Unsupported(f"its bias has shape {bias.shape}")
        bias = np.float32(a.get("beta", 1.0)) * np.resize(bias, weight.shape[0])
    _add_matrix(ctx, node, weight * np.float32(a.get("alpha", 1.0)), bias)


@lowers("MatMul", variadic=True)
def _matmul(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    weight = ctx.constant(node.input[1])
    rank = len(ctx.onnx_shapes.get(node.input[0], ()))
    if weight.ndim != 2 or rank not in (2, 3):
        raise Unsupported("only (N, F) or (N, T, F) times a constant (F, O) is supported")
    if rank == 2:
        _add_matrix(ctx, node, weight.T, None)
        return
    # (N, T, F) is stored as (N, F, T, 1) for the time of the product.
    name, x = node.output[0], ctx.plain(node.input[0])
    n, t, f = ctx.onnx_shapes[node.input[0]]
    swap = {"perm": [0, 2, 1]}
    ctx.add_onnx("Transpose", f"{name}/NFT", [x], [f"{name}/NFT"], swap)
    ctx.unsqueeze(f"{name}/NFT", f"{name}/NFT1", [3])
    o = weight.shape[1]
    ctx.shapes.update({f"{name}/NFT1": (n, f, t, 1), f"{name}/NOT1": (n, o, t, 1)})
    ctx.onnx_shapes.update({f"{name}/NFT": (n, f, t), f"{name}/NOT": (n, o, t)})
    weight = np.ascontiguousarray(weight.T[:, None, None, :])
    ctx.nodes.append(
        FloatNode(
            "Conv", name_of(node), [f"{name}/NFT1"], f"{name}/NOT1", dict(_POINTWISE), weight,
            np.zeros(len(weight), np.float32), ctx.words(node, weight),
        )
    )  # fmt: skip
    ctx.unsqueeze(f"{name}/NOT1", f"{name}/NOT", [3], "Squeeze")
    ctx.add_onnx("Transpose", name_of(node), [f"{name}/NOT"], [name], swap)
    ctx.plain_names[name] = name


def _add_matrix(
    ctx: Context, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray | None
) -> None:
    """Add x @ weight.T, (O, F): a convolution whose kernel covers what was flattened."""
    x = ctx.source(node.input[0])
    _, c, h, w = ctx.shapes[x]
    if c * h * w != weight.shape[1]:
        raise Unsupported(f"multiplies {weight.shape[1]} features, reads shape {ctx.shapes[x]}")
    if h * w > 1:
        ctx.fix_size()
    weight = np.ascontiguousarray(weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1))
    ctx.add(
        "Conv",
        node,
        [x],
        weight=weight,
        attributes=dict(_POINTWISE),
        bias=np.zeros(len(weight), np.float32) if bias is None else bias,
        words=ctx.words(node, weight),
    )


def _add_conv(
    ctx: Context, node: onnx.NodeProto, x: str, weight: np.ndarray, attributes: dict[str, Any]
) -> None:
    weight = packed_weight(node.op_type, weight, attributes["group"])
    if len(node.input) > 2 and node.input[2]:
        bias = ctx.constant(node.input[2])
    else:
        bias = np.zeros(weight.shape[0], np.float32)
    pads = attributes["pads"]
    if min(pads) < 0:
        raise Unsupported(f"pads {pads} are negative")
    conv = FloatNode(
        node.op_type, name_of(node), [x], node.output[0], attributes, weight, bias,
        ctx.words(node, weight),
    )  # fmt: skip
    if not pads_fit(pads, weight.shape[1:3], attributes["dilations"]):
        if node.op_type == "ConvTranspose":
            raise Unsupported(f"pads {pads} reach beyond the kernel's extent")
        conv.inputs = [_add_pad(ctx, conv, pads)]
        conv.attributes["pads"] = [0, 0, 0, 0]
    ctx.nodes.append(conv)


def _add_pad(ctx: Context, conv: FloatNode, pads: list[int]) -> str:
    """Add a Pad before `conv` with all of its pads, and return the padded tensor."""
    x, padded = conv.inputs[0], f"{conv.inputs[0]}/padded for {conv.output}"
    top, left, bottom, right = pads
    n, c, h, w = ctx.shapes[x]
    ctx.shapes[padded] = (n, c, h + top + bottom, w + left + right)
    attributes = {"pads": [0, 0, top, left, 0, 0, bottom, right]}
    ctx.nodes.append(FloatNode("Pad", f"{conv.name}/Pad", [x], padded, attributes))
    return padded


@writes("Conv", "ConvTranspose")
def _write(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    assert node.weight_shape is not None
    attributes = {k: v for k, v in node.attributes.items() if k != "clamp"}
    attributes["kernel_shape"] = list(node.weight_shape[1:3])
    inputs = [x[0], *to.parameters(node)]
    residual: list[Step] = [("Add", [BEFORE, name], {}) for name in x[1:]]
    return [(node.op, inputs, attributes), *residual, *to.finish(node)]
