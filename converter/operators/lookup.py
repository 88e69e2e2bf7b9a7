"""Tables of 256 codes, and models that read tables at codes themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from logshift.converter.function import Function
from logshift.converter.onnx_writer import BEFORE, AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import Unsupported, writes
from logshift.converter.qdq import table_function
from logshift.kernels.activation import PIECES
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
    # Not "Elementwise", of which functions before it would become a part: codes are what it reads.
    ctx.add("Lookup", node, [x], function=function)


def piece_of(
    gather: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], known: Mapping[str, np.ndarray]
) -> str | None:
    """Return the numbers of pieces, of float32, whose coefficients a Gather reads.

    That is how `export` writes them. None if the node is anything else.
    """
    if gather.op_type != "Gather" or getattr(known.get(gather.input[0]), "shape", ()) != (PIECES,):
        return None
    cast = producers.get(gather.input[1])
    piece = producers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
    return piece.output[0] if piece is not None and piece.op_type == "Add" else None


def read_coefficients(ctx: Context, node: onnx.NodeProto, piece: str) -> None:
    """Lower a Gather that reads the coefficients of pieces."""
    x, y, table = ctx.source(piece), node.output[0], node.input[0]
    ctx.shapes[y] = ctx.shapes[x]
    place = f"{y}/place"
    nodes = [
        helper.make_node("Cast", [x], [place], to=TensorProto.INT64),
        helper.make_node("Gather", [table, place], [y]),
    ]
    function = Function(x, y, nodes, {table: ctx.constants[table]}, ctx.model.opset)
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
