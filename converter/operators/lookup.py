"""Tables of 256 codes, and models that read tables at codes themselves."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from logshift.converter.onnx_writer import BEFORE, AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import Unsupported, writes
from logshift.converter.qdq import table_function
from logshift.runtime.graph import Node, Quantization


def read_table(
    ctx: Context, node: onnx.NodeProto, quantize: onnx.NodeProto, q: Quantization
) -> None:
    """Lower a Gather that reads a table at the codes that `quantize` makes."""
    x, y = ctx.source(quantize.input[0]), node.output[0]
    if ctx.quantization.setdefault(x, q) != q:
        raise Unsupported("reads codes of another quantization than others")
    zero_point = int(ctx.constants[quantize.input[2]].item()) if len(quantize.input) > 2 else 0
    values = ctx.constants[node.input[0]]
    ctx.shapes[y] = ctx.shapes[x]
    function = table_function(x, y, values, zero_point, q.scale, ctx.model.opset)
    ctx.add("Elementwise", node, [x], function=function)


@writes("Lookup")
def _write(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    """Write a table of real values, read at the integer codes: exact in any engine."""
    assert isinstance(node, Node) and node.table is not None
    out = node.outputs[0]
    table = to.quantization(out).dequantize(node.table)
    steps: list[Step] = [("Cast", [to.codes(node.inputs[0])], {"to": TensorProto.INT32})]
    if table.ndim == 2:
        begin = (table.shape[1] * np.arange(len(table))).reshape(1, -1, 1, 1)
        steps.append(("Add", [BEFORE, to.constant(f"{out}/begin", begin, np.int32)], {}))
    flat = to.constant(f"{out}/table", table.ravel())
    return [*steps, ("Gather", [flat, BEFORE], {"axis": 0})]
