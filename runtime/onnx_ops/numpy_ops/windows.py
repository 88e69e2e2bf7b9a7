"""Pooling: windows of a picture of any rank, or all of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime import geometry
from logshift.runtime.onnx_ops.numpy_ops.call import (
    Array,
    Call,
    Implementation,
    least,
    limited,
    mean_of,
    widened,
)


def _global_pool(c: Call) -> Array:
    picture = tuple(range(2, c.x.ndim))
    if c.op == "GlobalAveragePool":
        return mean_of(c.x, picture)
    return np.max(c.x, axis=picture, keepdims=True, initial=least(c.x.dtype))


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a pooling operator lie on the axes after the second."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    more: list[int]  # what windows beyond the padding need, with ceil_mode
    counts: list[int]

    def padded(self, x: Array, value: Any, more: Any) -> Array:
        """Return an array inside its padding, and what is beyond that."""
        sizes = x.shape[x.ndim - len(self.pads) :]
        rest = [(0, 0)] * (x.ndim - len(sizes))
        ends = zip(sizes, self.pads, self.more, strict=True)
        limited([*x.shape[: len(rest)], *(n + sum(pads) + end for n, pads, end in ends)])
        x = np.pad(x, [*rest, *self.pads], constant_values=value)
        return np.pad(x, [*rest, *((0, n) for n in self.more)], constant_values=more)

    def taps(self, x: Array) -> Iterator[Array]:
        """Yield for each position in a window what all windows have there."""
        steps = list(zip(self.strides, self.dilations, self.counts, strict=True))
        for position in itertools.product(*map(range, self.kernel)):
            index: list[Any] = [...]
            for k, (s, d, n) in zip(position, steps, strict=True):
                index.append(slice(k * d, k * d + (n - 1) * s + 1, s))
            yield x[tuple(index)]


def _windows(c: Call) -> _Windows:
    sizes = c.x.shape[2:]
    rank = len(sizes)
    kernel, ones = c.get("kernel_shape", []), [1] * rank
    strides, dilations = c.get("strides", ones), c.get("dilations", ones)
    given, mode = c.get("pads", [0] * (2 * rank)), c.get("auto_pad", "NOTSET")
    if rank < 1 or min(kernel + strides + dilations) < 1 or min(given) < 0:
        raise InputError("has no windows of such sizes")
    found = _Windows(kernel, strides, dilations, [], [], [])
    for axis, (size, k, stride, dilation) in enumerate(
        zip(sizes, kernel, strides, dilations, strict=True)
    ):
        extent, (before, after) = geometry.extent(k, dilation), (given[axis], given[axis + rank])
        if mode == "VALID":
            before = after = 0
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            before, after = geometry.same_pads(size, extent, stride, mode)
        count = geometry.pool_windows(size, extent, stride, before, after, c.get("ceil_mode", 0))
        if count < 1:
            raise InputError(f"has windows of {extent} on a size of {size}")
        found.pads.append((before, after))
        found.counts.append(count)
        found.more.append(max((count - 1) * stride + extent - size - before - after, 0))
    return found


def _max_pool(c: Call) -> list[Array]:
    windows, lowest = _windows(c), least(c.x.dtype)
    taps = windows.taps(windows.padded(c.x, lowest, lowest))
    if c.outputs < 2:
        return [reduce(np.maximum, taps)]
    sizes = c.x.shape[2:]
    places: Array = np.arange(math.prod(sizes), dtype=np.int64)
    if c.get("storage_order", 0):
        places = places.reshape(sizes[::-1]).T
    places = places.reshape(sizes)
    # Of equal values the first comes first.
    first, *rest = zip(taps, windows.taps(windows.padded(places, -1, -1)), strict=True)
    y = first[0].copy()
    index = np.broadcast_to(first[1], y.shape).copy()
    for tap, place in rest:
        better = (tap > y) | ((index < 0) & (place >= 0))
        np.copyto(y, tap, where=better)
        np.copyto(index, place, where=better)
    planes = np.arange(math.prod(c.x.shape[:2])).reshape(*c.x.shape[:2], *(1,) * len(sizes))
    return [y, index + planes * places.size]


def _average_pool(c: Call) -> Array:
    windows, x = _windows(c), widened(c.x)
    total = reduce(np.add, windows.taps(windows.padded(x, 0, 0)))
    ones = np.ones(x.shape[2:], x.dtype)
    counted = windows.padded(ones, 1 if c.get("count_include_pad", 0) else 0, 0)
    return (total / reduce(np.add, windows.taps(counted))).astype(c.x.dtype, copy=False)


def _lp_pool(c: Call) -> Array:
    windows, p = _windows(c), c.get("p", 2)
    taps = windows.taps(windows.padded(np.abs(widened(c.x)) ** p, 0, 0))
    return (reduce(np.add, taps) ** (1 / p)).astype(c.x.dtype, copy=False)


OPERATORS: dict[str, Implementation] = {
    "AveragePool": _average_pool, "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool, "LpPool": _lp_pool, "MaxPool": _max_pool,
}  # fmt: skip
