"""Operators on volumes (N, C, D, H, W), as ones on the pictures (N * D, C, H, W) these consist of.

A convolution reads the pictures within its reach as so many times as many channels: they are put
side by side before it, on float32, and it is one of pictures then. What is done element by element
is done to pictures as well. A tensor is made a volume again where somebody wants that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from logshift.converter.operators.context import Context, Volume
from logshift.converter.operators.registry import LOWERINGS, Unsupported
from logshift.runtime import geometry

_ELEMENTWISE = {
    "Abs", "BatchNormalization", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
}  # fmt: skip
_OF_TWO = {"Add", "Max", "Min", "Mul", "Sub", "Sum"}


def convolved(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
    """Run a Conv on volumes as one on pictures; False if it is on something else."""
    shape = ctx.onnx_shapes.get(node.input[0], ())
    if len(shape) != 5:
        return False
    weight = ctx.constant(node.input[1])
    depth = _Axis(ctx, a, 0, shape[2], weight.shape[2])
    rest = _without_depth(ctx, a, shape, weight.shape)
    x, y, group = node.input[0], node.output[0], a.get("group", 1)
    if weight.shape[3:] == (1, 1) and _is_plain(rest):
        _along_depth(ctx, node, weight, depth, group)
        return True
    pictures = _side_by_side(ctx, x, y, depth, group)
    o, _, _, *kernel = weight.shape
    flat = _renamed(node, pictures, f"{y}/pictures")
    flat.input[1] = f"{node.input[1]}/pictures"
    ctx.constants[flat.input[1]] = weight.swapaxes(1, 2).reshape(o, -1, *kernel)
    sizes = ctx.onnx_shapes[y]
    ctx.volume(y, Volume(flat.output[0], sizes[2]), sizes)
    LOWERINGS["Conv"](ctx, flat, rest | {"group": group, "kernel_shape": kernel})
    return True


def pooled(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
    """Run a MaxPool on volumes, of pictures and then along their depth; False on something else."""
    x, y = node.input[0], node.output[0]
    shape = ctx.onnx_shapes.get(x, ())
    if len(shape) != 5:
        return False
    if node.op_type != "MaxPool" or a.get("ceil_mode", 0):
        raise Unsupported("of a volume only MaxPool without ceil_mode is supported")
    kernel = a["kernel_shape"]
    depth = _Axis(ctx, a, 0, shape[2], kernel[0])
    if any(depth.pads):
        raise Unsupported("pads the depth of a volume")
    rest = _without_depth(ctx, a, shape, (0, 0, *kernel)) | {"kernel_shape": list(kernel[1:])}
    sizes, within = ctx.onnx_shapes[y], f"{y}/of pictures"
    volume = ctx.volume_of(x)
    count, channels = ctx.shapes[volume.pictures][:2]
    ctx.shapes[within] = ctx.onnx_shapes[within] = (count, channels, *sizes[3:])
    LOWERINGS["MaxPool"](ctx, _renamed(node, volume.pictures, within), rest)
    layers = ctx.layers(within, shape[2])
    parts = [
        ctx.cut(layers, f"{y}/{k}", 1, k * depth.dilation, depth.stride, depth.count)
        for k in range(depth.kernel)
    ]
    for k, part in enumerate(parts[1:], 1):
        larger = f"{y}/largest of {k + 1}"
        ctx.add_onnx("Max", larger, [parts[0], part], [larger])
        ctx.onnx_shapes[larger] = ctx.onnx_shapes[part]
        parts[0] = larger
    ctx.volume(y, Volume(ctx.pictures(parts[0], f"{y}/pictures"), sizes[2]), sizes)
    return True


def on_pictures(ctx: Context, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return a node that does to pictures what one does to volumes element by element, if any."""
    data = [name for name in node.input if name not in ctx.constants]
    if node.op_type not in _ELEMENTWISE | _OF_TWO or any(n not in ctx.volumes for n in data):
        return None
    others = [ctx.constants[n] for n in node.input if n in ctx.constants]
    if not data or (node.op_type in _OF_TWO and any(v.size != 1 for v in others)):
        return None
    shapes = {ctx.onnx_shapes[name] for name in (*data, node.output[0])}
    if len(shapes) > 1:
        return None
    y, volumes = node.output[0], [ctx.volumes[name] for name in data]
    flat = _renamed(node, node.input[0], f"{y}/pictures")
    for index, name in enumerate(node.input):
        if name in ctx.volumes:
            flat.input[index] = ctx.volumes[name].pictures
    ctx.volume(y, Volume(flat.output[0], volumes[0].depth), shapes.pop())
    return flat


class _Axis:
    """Windows along one axis."""

    def __init__(self, ctx: Context, a: dict[str, Any], axis: int, size: int, kernel: int) -> None:
        self.kernel = kernel
        self.stride, self.dilation = (
            a[name][axis] if name in a else 1 for name in ("strides", "dilations")
        )
        given, mode = a.get("pads", [0] * 6), a.get("auto_pad", "NOTSET")
        extent = geometry.extent(kernel, self.dilation)
        self.pads = given[axis], given[axis + 3]
        if mode.startswith("SAME"):
            ctx.fixed_size |= self.stride != 1
            self.pads = geometry.same_pads(size, extent, self.stride, mode)
        elif mode == "VALID":
            self.pads = 0, 0
        self.count = geometry.windows(size, extent, self.stride, sum(self.pads))


def _without_depth(
    ctx: Context, a: dict[str, Any], shape: Sequence[int], kernel: Sequence[int]
) -> dict[str, Any]:
    """Return attributes of windows along height and width."""
    rows, columns = (_Axis(ctx, a, axis, shape[2 + axis], kernel[2 + axis]) for axis in (1, 2))
    return {
        "strides": [rows.stride, columns.stride], "dilations": [rows.dilation, columns.dilation],
        "pads": [rows.pads[0], columns.pads[0], rows.pads[1], columns.pads[1]],
    }  # fmt: skip


def _is_plain(rest: dict[str, Any]) -> bool:
    return rest["strides"] == [1, 1] and not any(rest["pads"])


def _renamed(node: onnx.NodeProto, x: str, y: str) -> onnx.NodeProto:
    flat = onnx.NodeProto()
    flat.CopyFrom(node)
    flat.input[0], flat.output[0] = x, y
    return flat


def _side_by_side(ctx: Context, x: str, y: str, depth: _Axis, group: int) -> str:
    """Return pictures that consist of all that a window reads along the depth.

    The channels of a group stay together, and in it those of a depth: a tile of an array then has
    weights of one kernel position.
    """
    volume = ctx.volume_of(x)
    if depth.kernel == depth.stride == 1 and not any(depth.pads):
        return volume.pictures
    layers = ctx.layers(volume.pictures, volume.depth)
    if any(depth.pads):
        layers = ctx.padded(layers, f"{y}/padded", 1, depth.pads)
    if group > 1:
        n, d, c, h, w = ctx.onnx_shapes[layers]
        ctx.reshape(layers, f"{y}/groups", (n, d, group, c // group, h, w))
        layers = f"{y}/groups"
    parts = [
        ctx.cut(layers, f"{y}/{k}", 1, k * depth.dilation, depth.stride, depth.count)
        for k in range(depth.kernel)
    ]
    joined, sizes = f"{y}/side by side", list(ctx.onnx_shapes[parts[0]])
    axis = len(sizes) - 3  # channels, or those of each group
    ctx.add_onnx("Concat", joined, parts, [joined], {"axis": axis})
    sizes[axis] *= depth.kernel
    ctx.onnx_shapes[joined] = tuple(sizes)
    return ctx.pictures(joined, f"{y}/read")


def _along_depth(
    ctx: Context, node: onnx.NodeProto, weight: np.ndarray, depth: _Axis, group: int
) -> None:
    """Run a convolution along the depth alone: height and width are the columns of pictures."""
    x, y = ctx.plain(node.input[0]), node.output[0]
    n, c, d, h, w = ctx.onnx_shapes[node.input[0]]
    flat = _renamed(node, f"{y}/columns", f"{y}/results")
    ctx.reshape(x, flat.input[0], (n, c, d, h * w))
    ctx.shapes[flat.input[0]] = (n, c, d, h * w)
    flat.input[1] = f"{node.input[1]}/columns"
    ctx.constants[flat.input[1]] = weight[..., 0]
    sizes = ctx.onnx_shapes[y]
    ctx.shapes[flat.output[0]] = (*sizes[:3], h * w)
    ctx.onnx_shapes[flat.output[0]] = ctx.shapes[flat.output[0]]
    attributes = {
        "strides": [depth.stride, 1], "dilations": [depth.dilation, 1], "group": group,
        "pads": [depth.pads[0], 0, depth.pads[1], 0], "kernel_shape": [depth.kernel, 1],
    }  # fmt: skip
    LOWERINGS["Conv"](ctx, flat, attributes)
    ctx.reshape(flat.output[0], y, sizes)
    ctx.plain_names[y] = y
