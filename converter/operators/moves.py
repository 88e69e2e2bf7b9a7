"""Operators that only move values: parts of tensors, channels, pads, views."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from logshift.converter.float_graph import FloatNode
from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context, name_of
from logshift.converter.operators.lookup import piece_of, read_coefficients, read_table
from logshift.converter.operators.registry import Unsupported, lowers, write_same, writes


@lowers("Gather")
def _gather(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if table := ctx.table(node):
        read_table(ctx, node, *table)
        return
    if piece := piece_of(node, ctx.producers, ctx.constants):
        read_coefficients(ctx, node, piece)
        return
    x, indices = ctx.tensor(node.input[0]), ctx.constants.get(node.input[1])
    channels = ctx.shapes[x][1]
    if indices is None or indices.ndim != 1 or a.get("axis", 0) % 4 != 1 or not indices.size:
        raise Unsupported("does not select channels by constants")
    indices = np.where(indices < 0, indices + channels, indices)
    ctx.add("Gather", node, [x], attributes={"axis": 1, "indices": [int(i) for i in indices]})


@lowers("Concat", variadic=True)
def _concat(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    rank = len(ctx.onnx_shapes[node.output[0]])
    axis = a["axis"] % rank
    if axis == 0:
        raise Unsupported("joins pictures of a batch")
    ctx.add("Concat", node, [ctx.tensor(n) for n in node.input], attributes={"axis": axis})


@lowers("Slice")
def _slice(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    starts = a.get("starts") or ctx.integers(node, 1) or []
    ends = a.get("ends") or ctx.integers(node, 2) or []
    axes = a.get("axes") or ctx.integers(node, 3) or range(len(starts))
    steps = ctx.integers(node, 4) or [1] * len(starts)
    rank = len(ctx.onnx_shapes[node.input[0]])
    attributes: dict[str, list[int]] = {"axes": [], "starts": [], "ends": [], "steps": []}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise Unsupported(f"step {step}; only positive steps are supported")
        if axis % rank == 0:
            raise Unsupported("takes pictures out of a batch")
        # The largest int64 is a usual way to say "to the end"; the format wants |end| < 2^63.
        values = (axis % rank, start, min(end, 2**31 - 1), step)
        for key, value in zip(attributes, values, strict=True):
            attributes[key].append(int(value))
    ctx.add("Slice", node, [x], attributes=attributes)


@lowers("Split")
def _split(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    axis = a.get("axis", 0) % len(ctx.onnx_shapes[node.input[0]])
    if axis == 0:
        raise Unsupported("takes pictures out of a batch")
    start = 0
    for name in node.output:
        end = start + ctx.shapes[name][axis]
        attributes = {"axes": [axis], "starts": [start], "ends": [end], "steps": [1]}
        ctx.nodes.append(FloatNode("Slice", f"{name_of(node)}/{name}", [x], name, attributes))
        start = end
    if axis > 1:
        ctx.fix_size()


@lowers("Pad")
def _pad(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    if (mode := a.get("mode", "constant")) != "constant":
        raise Unsupported(f"mode {mode!r}; only constant zero is supported")
    value = a.get("value", 0.0)
    if len(node.input) > 2 and node.input[2]:
        value = float(ctx.constant(node.input[2]).item())
    if value != 0.0:
        raise Unsupported(f"pads with {value}; only zero is supported")
    given = a.get("pads") or ctx.integers(node, 1) or []
    axes = ctx.integers(node, 3) or list(range(len(ctx.onnx_shapes[node.input[0]])))
    pads = [0] * 8
    for i, axis in enumerate(axes):
        pads[axis % 4], pads[axis % 4 + 4] = given[i], given[i + len(axes)]
    if min(pads) < 0 or pads[0] or pads[4]:
        raise Unsupported(f"pads {list(given)}; only adding to C, H and W is supported")
    ctx.add("Pad", node, [x], attributes={"pads": pads})


@lowers("DepthToSpace")
def _depth_to_space(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    attributes = {"blocksize": a["blocksize"], "mode": a.get("mode", "DCR")}
    ctx.add("DepthToSpace", node, [ctx.tensor(node.input[0])], attributes=attributes)


@lowers("SpaceToDepth")
def _space_to_depth(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x, y, k = ctx.tensor(node.input[0]), node.output[0], a["blocksize"]
    (n, c, _, _), (_, _, h, w) = ctx.shapes[x], ctx.shapes[y]
    parts = []
    for i, j in np.ndindex(k, k):
        parts.append(f"{y}/{i},{j}")
        ctx.shapes[parts[-1]] = (n, c, h, w)
        attributes = {"axes": [2, 3], "starts": [i, j], "ends": [2**31 - 1] * 2, "steps": [k, k]}
        ctx.nodes.append(FloatNode("Slice", parts[-1], [x], parts[-1], attributes))
    if a.get("mode", "DCR") == "DCR":
        ctx.add("Concat", node, parts, attributes={"axis": 1})
        return
    blocks = f"{y}/blocks"
    ctx.shapes[blocks] = ctx.shapes[y]
    ctx.nodes.append(FloatNode("Concat", blocks, parts, blocks, {"axis": 1}))
    indices = np.arange(c * k * k).reshape(k * k, c).T.ravel().tolist()
    ctx.add("Gather", node, [blocks], attributes={"axis": 1, "indices": indices})


@lowers("Identity", "Dropout", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
def view(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Give a tensor a second name, as long as its pictures stay apart and in order."""
    x = ctx.source(node.input[0])
    if node.op_type == "Cast" and a["to"] != onnx.TensorProto.FLOAT:
        raise Unsupported("casts to a type other than float32")
    n, c, h, w = ctx.shapes[x]
    shape = ctx.onnx_shapes[node.output[0]]
    if shape not in ((n, c, h, w), (n, c * h * w)):
        raise Unsupported(f"makes shape {shape} of {(n, c, h, w)}; only flattening is supported")
    ctx.alias[node.output[0]] = x
    ctx.shapes.pop(node.output[0], None)


# --- back to ONNX -------------------------------------------------------------------------------

writes("Concat", "DepthToSpace")(write_same)


@writes("Slice")
def _write_slice(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    inputs = [
        to.constant(f"{node.outputs[0]}/{key}", node.attributes[key], np.int64)
        for key in ("starts", "ends", "axes", "steps")
    ]
    return [("Slice", x + inputs, {})]


@writes("Gather")
def _write_gather(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    indices = to.constant(f"{node.outputs[0]}/indices", node.attributes["indices"], np.int64)
    return [("Gather", [*x, indices], {"axis": 1})]


@writes("Pad")
def _write_pad(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    pads = to.constant(f"{node.outputs[0]}/pads", node.attributes["pads"], np.int64)
    return [("Pad", [*x, pads], {})]
