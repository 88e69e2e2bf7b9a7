"""What convolutions and pools have in common: pads, and windows that move along one line."""

from __future__ import annotations

from typing import Any

import onnx

from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import LOWERINGS
from logshift.runtime import geometry
from logshift.runtime.graph import Shape

# Attributes with a value per axis, and what they are for an axis of length 1.
_LEAST = {
    "strides": 1, "dilations": 1, "kernel_shape": 1, "output_padding": 0, "output_shape": 1
}  # fmt: skip


def on_a_line(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
    """Run an operator on (N, C, L) as one on (N, C, 1, L); False if it is on something else."""
    x, y = node.input[0], node.output[0]
    if len(ctx.onnx_shapes.get(x, ())) != 3 or (len(node.output) > 1 and node.output[1]):
        return False
    flat = onnx.NodeProto()
    flat.CopyFrom(node)
    flat.input[0], flat.output[0] = f"{y}/NC1L", f"{y}/NC1M"
    (n, c, length), (_, d, result) = ctx.onnx_shapes[x], ctx.onnx_shapes[y]
    ctx.shapes[flat.input[0]] = ctx.onnx_shapes[flat.input[0]] = (n, c, 1, length)
    ctx.shapes[flat.output[0]] = ctx.onnx_shapes[flat.output[0]] = (n, d, 1, result)
    if len(node.input) > 1:
        weight = f"{node.input[1]}/OI1K"
        ctx.constants[weight] = ctx.constant(node.input[1])[:, :, None]
        flat.input[1] = weight
    wide = dict(a)
    for key, least in _LEAST.items():
        if key in a:
            wide[key] = [least, *a[key]]
    if "pads" in a:
        begin, end = a["pads"]
        wide["pads"] = [0, begin, 0, end]
    ctx.unsqueeze(ctx.plain(x), flat.input[0], [2])
    LOWERINGS[node.op_type](ctx, flat, wide)
    ctx.unsqueeze(flat.output[0], y, [2], "Squeeze")
    ctx.plain_names[y] = y
    return True


def window_attributes(
    ctx: Context, a: dict[str, Any], shape: Shape, kernel: tuple[int, ...]
) -> dict[str, Any]:
    """Strides, dilations and explicit pads of a convolution or pooling."""
    strides = list(a.get("strides", [1, 1]))
    dilations = list(a.get("dilations", [1, 1]))
    mode = a.get("auto_pad", "NOTSET")
    pads = list(a.get("pads", [0, 0, 0, 0])) if mode == "NOTSET" else [0, 0, 0, 0]
    if mode.startswith("SAME"):
        if strides != [1, 1]:
            ctx.fix_size()
        for i in range(2):
            extent = geometry.extent(kernel[i], dilations[i])
            pads[i], pads[i + 2] = geometry.same_pads(shape[2 + i], extent, strides[i], mode)
    return {"strides": strides, "pads": pads, "dilations": dilations}


def transposed_pads(
    ctx: Context,
    node: onnx.NodeProto,
    a: dict[str, Any],
    attributes: dict[str, Any],
    shape: Shape,
    kernel: tuple[int, ...],
) -> list[int]:
    """Return explicit pads of a ConvTranspose; its output's size is known from the trace."""
    mode = a.get("auto_pad", "NOTSET")
    if mode == "NOTSET" and "output_shape" not in a:
        return list(a.get("pads", [0, 0, 0, 0]))
    pads = [0, 0, 0, 0]
    if mode == "VALID":
        return pads
    if "output_shape" in a:
        ctx.fix_size()
    out = ctx.onnx_shapes[node.output[0]]
    for i in range(2):
        extent = geometry.extent(kernel[i], attributes["dilations"][i])
        full = attributes["strides"][i] * (shape[2 + i] - 1) + extent
        total = full + attributes["output_padding"][i] - out[2 + i]
        pads[i], pads[i + 2] = geometry.split_pads(total, mode)
    return pads
