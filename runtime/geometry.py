"""Rules of ONNX along one axis of a tensor: where windows and slices lie."""

from __future__ import annotations


def extent(kernel: int, dilation: int) -> int:
    """Return how many positions a window reaches over."""
    return dilation * (kernel - 1) + 1


def windows(size: int, extent: int, stride: int, pads: int) -> int:
    """Return how many windows lie on an axis, pads at both ends included."""
    return (size + pads - extent) // stride + 1


def pool_windows(
    size: int, extent: int, stride: int, before: int, after: int, ceil_mode: int
) -> int:
    """Return how many windows a pooling operator has, with pads before and after the axis."""
    count = windows(size, extent, stride, before + after)
    if ceil_mode:
        count = -(-(size + before + after - extent) // stride) + 1
    # No window begins in the padding at the end.
    return count - ((count - 1) * stride >= size + before)


def same_pads(size: int, extent: int, stride: int, mode: str) -> tuple[int, int]:
    """Return the pads of `auto_pad` SAME_UPPER or SAME_LOWER: as many windows as strides fit."""
    return split_pads(max((-(-size // stride) - 1) * stride + extent - size, 0), mode)


def split_pads(total: int, mode: str) -> tuple[int, int]:
    """Return pads before and after; an odd one is at the end only for SAME_UPPER."""
    small, large = total // 2, total - total // 2
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def slice_range(size: int, start: int, end: int, step: int) -> range:
    """Return the positions that Slice takes; an end of -1 is below all, if steps are negative."""
    if step >= 0:
        return range(*slice(start, end, step).indices(size))
    first = min(start + size if start < 0 else start, size - 1)
    return range(max(first, 0), max(end + size if end < 0 else end, -1), step)
