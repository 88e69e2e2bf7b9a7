"""Pools over windows, and over height and width."""

from __future__ import annotations

from typing import Any

import onnx

from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step
from logshift.converter.operators import volumes
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import Unsupported, lowers, write_same, writes
from logshift.converter.operators.windows import on_a_line, window_attributes
from logshift.runtime.operators.pool import pads_fit


@lowers("MaxPool", "AveragePool")
def _pool(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if len(node.output) > 1 and node.output[1]:
        raise Unsupported("its indices are used")
    if on_a_line(ctx, node, a) or volumes.pooled(ctx, node, a):
        return
    x = ctx.tensor(node.input[0])
    kernel = list(a["kernel_shape"])
    if len(kernel) != 2:
        raise Unsupported(f"is {len(kernel)}-dimensional; up to 3-D is supported")
    attributes = window_attributes(ctx, a, ctx.shapes[x], tuple(kernel))
    attributes |= {"kernel_shape": kernel, "ceil_mode": a.get("ceil_mode", 0)}
    if node.op_type == "AveragePool":
        attributes["count_include_pad"] = a.get("count_include_pad", 0)
    if not pads_fit(attributes["pads"], kernel):
        raise Unsupported(f"pads {attributes['pads']} must be below the kernel's size {kernel}")
    ctx.add(node.op_type, node, [x], attributes=attributes)


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    ctx.add(node.op_type, node, [ctx.tensor(node.input[0])])


@lowers("ReduceMean")
def _reduce_mean(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    axes = a.get("axes") or ctx.integers(node, 1) or []
    x = ctx.tensor(node.input[0])
    if len(ctx.onnx_shapes[node.input[0]]) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise Unsupported(f"axes {list(axes)}; only the mean over height and width is supported")
    ctx.add("GlobalAveragePool", node, [x])


writes("MaxPool", "GlobalAveragePool", "GlobalMaxPool")(write_same)


@writes("AveragePool")
def _write(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    # onnxruntime's quantized pool does not know the attribute, whatever its value.
    attributes = {k: v for k, v in node.attributes.items() if (k, v) != ("dilations", [1, 1])}
    return [(node.op, x, attributes)]
