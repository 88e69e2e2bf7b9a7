"""Shapes and parts of tensors: what moves values and leaves them as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.geometry import slice_range
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, as_matrix, limited


def _shape(c: Call) -> Array:
    sizes = c.x.shape[c.get("start", 0) : c.get("end", None)]
    return np.array(sizes, np.int64)


def _reshape(c: Call) -> Array:
    sizes = c.integers(1, "shape") or []
    if not c.get("allowzero", 0):
        sizes = [c.x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return c.x.reshape(sizes)


def _flatten(c: Call) -> Array:
    return as_matrix(c.x, c.get("axis", 1))


def _squeeze(c: Call) -> Array:
    axes = c.integers(1, "axes")
    return np.squeeze(c.x, None if axes is None else tuple(axes))


def _unsqueeze(c: Call) -> Array:
    return np.expand_dims(c.x, tuple(c.integers(1, "axes") or ()))


def _transpose(c: Call) -> Array:
    return np.transpose(c.x, c.get("perm"))


def _expand(c: Call) -> Array:
    shape = np.broadcast_shapes(c.x.shape, tuple(c.integers(1, "shape") or ()))
    return np.broadcast_to(c.x, limited(shape))


def _tile(c: Call) -> Array:
    repeats = c.integers(1, "repeats") or []
    limited([size * count for size, count in zip(c.x.shape, repeats, strict=True)])
    return np.tile(c.x, repeats)


def _concat(c: Call) -> Array:
    arrays, axis = c.all(), c.axis(1)
    limited([sum(x.size for x in arrays)])
    return np.concatenate(arrays, axis)


def _split(c: Call) -> list[Array]:
    axis = c.axis(0)
    size = c.x.shape[axis]
    sizes = c.integers(1, "split")
    if sizes is None:
        count = c.get("num_outputs", c.outputs)
        if count != c.outputs:
            raise InputError(f"num_outputs is {count}, {c.outputs} are asked for")
        part = -(-size // count)
        sizes = [min(part, size - i * part) for i in range(count)]
    if sum(sizes) != size or min(sizes, default=0) < 0:
        raise InputError(f"splits {size} into {sizes}")
    return np.split(c.x, np.cumsum(sizes)[:-1], axis)


def _slice(c: Call) -> Array:
    starts, ends = c.integers(1, "starts") or [], c.integers(2, "ends") or []
    axes = c.integers(3, "axes")
    steps = c.integers(4, "steps")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * c.x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken = slice_range(c.x.shape[axis], start, end, step)
        # Python's -1 is the last element.
        index[axis] = slice(taken.start, None if taken.stop < 0 else taken.stop, taken.step)
    return c.x[tuple(index)]


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad(c: Call) -> Array:
    x = c.x
    pads = c.integers(1, "pads") or []
    value: Any = c.get("value", 0.0)
    if (given := c.optional(2)) is not None:
        value = given.ravel()[0] if given.size else 0
    axes = c.integers(3, "axes")
    axes = list(range(x.ndim)) if axes is None else axes
    widths, index = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        widths[axis] = max(before, 0), max(after, 0)
        # Negative pads cut off.
        end = x.shape[axis] + min(after, 0)
        if end < max(-before, 0):
            raise InputError(f"pads {before} and {after} cut off more than there is")
        index[axis] = slice(max(-before, 0), end)
    x = x[tuple(index)]
    limited([size + sum(width) for size, width in zip(x.shape, widths, strict=True)])
    mode = _PAD_MODES[c.get("mode", "constant")]
    more = {"constant_values": np.asarray(value, x.dtype)} if mode == "constant" else {}
    return np.pad(x, widths, mode, **more)  # type: ignore[call-overload]


def _depth_to_space(c: Call) -> Array:
    n, channels, h, w = c.x.shape
    b = c.get("blocksize")
    depth = channels // (b * b)
    if c.get("mode", "DCR") == "DCR":
        blocks = c.x.reshape(n, b, b, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = c.x.reshape(n, depth, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, depth, h * b, w * b)


def _space_to_depth(c: Call) -> Array:
    n, channels, h, w = c.x.shape
    b = c.get("blocksize")
    blocks = c.x.reshape(n, channels, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if c.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.transpose(order).reshape(n, channels * b * b, h // b, w // b)


def _trilu(c: Call) -> Array:
    given = c.optional(1)
    k = 0 if given is None else int(given.item())
    if c.x.ndim < 2:
        raise InputError("needs matrices")
    k = min(max(k, -c.x.shape[-2]), c.x.shape[-1])
    return (np.triu if c.get("upper", 1) else np.tril)(c.x, k)


OPERATORS: dict[str, Implementation] = {
    "Concat": _concat, "DepthToSpace": _depth_to_space, "Expand": _expand, "Flatten": _flatten,
    "Pad": _pad, "Reshape": _reshape, "Shape": _shape,
    "Size": lambda c: np.array(c.x.size, np.int64), "Slice": _slice,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Tile": _tile,
    "Transpose": _transpose, "Trilu": _trilu, "Unsqueeze": _unsqueeze,
}  # fmt: skip
