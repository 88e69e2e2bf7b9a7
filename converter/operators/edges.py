"""Where codes begin and end, and where two axes do: QuantizeLinear, DequantizeLinear, Flatten."""

from __future__ import annotations

from typing import Any

import onnx

from logshift.converter.function import identity
from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import write_same, writes


def round_to_codes(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Note the quantization of a tensor; if it has another one, it gets a table."""
    x, y = ctx.source(node.input[0]), node.output[0]
    q = ctx.model.quantization[node.name]
    if ctx.quantization.setdefault(x, q) == q:
        ctx.alias[y] = x
        ctx.shapes.pop(y, None)
    else:
        ctx.quantization[y] = q
        ctx.shapes[y] = ctx.shapes[x]
        ctx.add("Elementwise", node, [x], function=identity(x, y))


writes("Flatten")(write_same)


@writes("QuantizeLinear")
def _write_quantize(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    return []  # what is a tensor of codes gets rounded anyway


@writes("DequantizeLinear")
def _write_dequantize(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    return [("Identity", x, {})]
