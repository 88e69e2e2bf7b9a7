"""Resize, by scales, to sizes and to the size of another tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import Unsupported, lowers, writes


@lowers("Resize", "Upsample")
def _resize(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    modern = node.op_type == "Resize" and ctx.model.opset >= 11
    mode = a.get("mode", "nearest")
    coordinates = a.get("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    nearest = a.get("nearest_mode", "round_prefer_floor") if modern else "floor"
    if mode not in ("nearest", "linear"):
        raise Unsupported(f"mode {mode!r}; only nearest and linear are supported")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise Unsupported(f"coordinate_transformation_mode {coordinates!r} is not supported")
    if a.get("antialias", 0) or a.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("antialias and keep_aspect_ratio_policy are not supported")
    before, after = ctx.shapes[x], ctx.onnx_shapes[node.output[0]]
    if before[:2] != after[:2]:
        raise Unsupported("resizes batch or channels")
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        attributes["nearest_mode"] = nearest
    scales, inputs = _scales(ctx, node, a, modern), [x]
    if scales is not None:
        attributes["scales"] = scales
    elif (other := _sized_like(ctx, node)) is not None:
        inputs.append(other)
    else:
        ctx.integers(node, 3)  # sizes computed from the input's size hold for that size only
        attributes["sizes"] = list(after[2:])
    ctx.add("Resize", node, inputs, attributes=attributes)


# What passes sizes on without computing with them.
_PASSING = {"Cast", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze"}


def _sized_like(ctx: Context, node: onnx.NodeProto) -> str | None:
    """Return the stored tensor whose height and width a Resize is to make, if there is one."""
    after = ctx.onnx_shapes[node.output[0]][2:]
    for name in ctx.joined.get(node.output[0], ()):
        other = ctx.alias.get(name, name)
        if other in ctx.shapes and ctx.shapes[other][2:] == after:
            return other
    if len(node.input) < 4 or not node.input[3]:
        return None
    found = set()
    for name in _last_two(ctx, node.input[3]):
        producer = ctx.producers.get(name)
        while producer is not None and producer.op_type in _PASSING:
            producer = ctx.producers.get(producer.input[0])
        if producer is None or producer.op_type != "Shape":
            return None
        found.add(ctx.alias.get(producer.input[0], producer.input[0]))
    sized = [t for t in found if t in ctx.shapes and ctx.shapes[t][2:] == after]
    return sized[0] if len(sized) == len(found) == 1 else None


def _last_two(ctx: Context, name: str) -> list[str]:
    """Return the tensors that make up the last two of some sizes."""
    producer = ctx.producers.get(name)
    if producer is None or producer.op_type != "Concat":
        return [name]
    parts: list[str] = []
    count = 0
    for part in reversed(producer.input):
        if count < 2:
            parts.append(part)
            count += ctx.onnx_shapes[part][0]
    return parts


def _scales(
    ctx: Context, node: onnx.NodeProto, a: dict[str, Any], modern: bool
) -> list[float] | None:
    """Scales of height and width; None if a Resize gives sizes instead."""
    if "scales" in a:  # Upsample before opset 9
        return [float(v) for v in a["scales"][-2:]]
    index = 2 if modern else 1
    name = node.input[index] if index < len(node.input) else ""
    if not name or (name in ctx.constants and ctx.constants[name].size == 0):
        return None
    if name not in ctx.constants:
        raise Unsupported("its scales must be constants")
    values = [1.0] * 4
    given = ctx.constants[name].ravel()
    axes = a.get("axes") or list(range(4 - len(given), 4))
    for axis, value in zip(axes, given, strict=True):
        values[axis % 4] = float(value)
    return values[2:]


# --- back to ONNX -------------------------------------------------------------------------------


@writes("Resize")
def _write(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    a = dict(node.attributes)
    scales, sizes, out = a.pop("scales", None), a.pop("sizes", None), node.outputs[0]
    # Before version 13 an input that is not given is an empty one.
    roi = "" if to.opset >= 13 else to.constant(f"{out}/roi", [])
    if scales is not None:
        inputs = [x[0], roi, to.constant(f"{out}/scales", [1.0, 1.0, *scales])]
        return [("Resize", inputs, a)]
    wanted = (
        to.constant(f"{out}/last", sizes, np.int64)
        if sizes is not None
        else _dimensions(to, node, x[1], [2, 3])
    )
    none = ""
    if to.opset >= 18:
        a["axes"] = [2, 3]
    else:
        # Without axes, sizes of batch and channels are wanted too.
        none = "" if to.opset >= 13 else to.constant(f"{out}/none", [])
        first, last = _dimensions(to, node, x[0], [0, 1]), wanted
        wanted = to.fresh(f"{out}/sizes")
        to.node("Concat", f"{node.name}/Concat", [first, last], wanted, axis=0)
    return [("Resize", [x[0], roi, none, wanted], a)]


def _dimensions(to: OnnxWriter, node: AnyNode, x: str, axes: list[int]) -> str:
    """Return the sizes of a tensor along some axes."""
    shape, found = to.fresh(f"{x}/shape"), to.fresh(f"{x}/dimensions")
    to.node("Shape", f"{node.name}/Shape", [x], shape)
    indices = to.constant(f"{found}/axes", axes, np.int64)
    to.node("Gather", f"{node.name}/Gather", [shape, indices], found)
    return found
