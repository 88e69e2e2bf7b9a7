"""Normalizations: of stretches, contiguous or not, and of channels of pictures."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.lanes import LANES, join_lanes, sum_lanes
from logshift.kernels.records import floats, share
from logshift.kernels.reference.normalizations import (
    FLOAT_NORMALIZE,
    ONNX_NORMALIZE,
    statistics,
)
from logshift.kernels.reference.onnx_ops import values
from logshift.kernels.registry import register
from logshift.kernels.walk import pixel_at

_BLOCK = 64  # channels whose sums are made at the same time


@njit(error_model="numpy")
def _sum_stretch(x, p, step, count, sums, squares):
    """Sum elements, and their squares, up by lanes."""
    whole = count - count % LANES
    if step != 1:
        whole = 0
    first = np.int64(x.ctypes.data) + 4 * p
    sum_lanes(first, whole, sums.ctypes.data, squares.ctypes.data)
    p, step = np.uintp(p), np.uintp(step)
    for i in range(np.uintp(whole), np.uintp(count)):
        v, lane = np.float64(x[p + i * step]), i % np.uintp(LANES)
        sums[lane] += v
        squares[lane] += v * v


@njit(error_model="numpy")
def _write_stretch(x, p, x_step, y, q, y_step, count, mean, inverse, scale, bias, first, step):
    """Write a stretch; `step` is that of scale and bias, and 0 if these are the same for all."""
    p, x_step, q, y_step = np.uintp(p), np.uintp(x_step), np.uintp(q), np.uintp(y_step)
    first, step, count = np.uintp(first), np.uintp(step), np.uintp(count)
    if x_step != 1 or y_step != 1:
        for i in range(count):
            v = (x[p + i * x_step] - mean) * inverse
            y[q + i * y_step] = v * scale[first + i * step] + bias[first + i * step]
    elif step == 0:
        factor, shift = scale[first], bias[first]
        for i in range(count):
            y[q + i] = ((x[p + i] - mean) * inverse) * factor + shift
    else:
        for i in range(count):
            y[q + i] = ((x[p + i] - mean) * inverse) * scale[first + i] + bias[first + i]


@register("onnx_normalize", "portable", ONNX_NORMALIZE, scratch=lambda record: 16 * LANES)
def _normalize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y, scale, bias = values(a.x), values(a.y), values(a.scale), values(a.bias)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    sums = carray(as_pointer(scratch), LANES, np.float64)
    squares = carray(as_pointer(scratch + np.uintp(8 * LANES)), LANES, np.float64)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, g = item // a.height, item % a.height
        p, q = n * a.x_set + g * a.x_group, n * a.y_set + g * a.y_group
        total = total_of_squares = 0.0
        for o in range(a.outer):
            _sum_stretch(x, p + o * a.x_outer, a.x_inner, a.inner, sums, squares)
            total += join_lanes(sums.ctypes.data)
            total_of_squares += join_lanes(squares.ctypes.data)
        count = a.outer * a.inner
        mean, inverse = statistics(total, total_of_squares, count, a.kind, a.epsilon)
        if a.y_mean.data != 0:
            values(a.y_mean)[item] = mean
        if a.y_inverse.data != 0:
            values(a.y_inverse)[item] = inverse
        for o in range(a.outer):
            _write_stretch(
                x, p + o * a.x_outer, a.x_inner, y, q + o * a.y_outer, a.y_inner, a.inner, mean,
                inverse, scale, bias, g * a.scale_group + o * a.scale_outer, a.scale_inner,
            )  # fmt: skip


# --- channels of pictures -------------------------------------------------------------------------


@njit(error_model="numpy")
def _sum_channels(a, x, n, first, count, sums, squares):
    """Add all pixels of some channels to their sums, (lanes, block)."""
    pixel = 0
    for i in range(a.height):
        p = pixel_at(a.x, n, a.x.top + i, a.x.left) + np.uintp(first)
        for _ in range(a.width):
            at = np.uintp(pixel % LANES * _BLOCK)
            for c in range(np.uintp(count)):
                v = np.float64(x[p + c])
                sums[at + c] += v
                squares[at + c] += v * v
            p += np.uintp(a.x.c)
            pixel += 1


@njit(error_model="numpy")
def _join_channels(sums, count):
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            at, other = np.uintp(lane * _BLOCK), np.uintp((lane + half) * _BLOCK)
            for c in range(np.uintp(count)):
                sums[at + c] += sums[other + c]
        half //= 2


@njit(error_model="numpy")
def _write_channels(a, x, y, n, first, count, mean, inverse, scale, bias):
    for i in range(a.height):
        p = pixel_at(a.x, n, a.x.top + i, a.x.left) + np.uintp(first)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left) + np.uintp(first)
        f = np.uintp(first)
        for _ in range(a.width):
            for c in range(np.uintp(count)):
                y[q + c] = ((x[p + c] - mean[c]) * inverse[c]) * scale[f + c] + bias[f + c]
            p += np.uintp(a.x.c)
            q += np.uintp(a.y.c)


_SUMS = 8 * LANES * _BLOCK  # bytes


def _pieces(record):
    """How many pictures, and blocks of channels in each, there are."""
    whole = max(1, _BLOCK // int(record["group"])) * int(record["group"])
    return int(record["n"]) * -(-int(record["channels"]) // whole)


@register(
    "float_normalize", "portable", FLOAT_NORMALIZE, pieces=_pieces,
    scratch=lambda record: 2 * _SUMS + 8 * max(int(record["group"]), _BLOCK),
)  # fmt: skip
def _normalize_channels(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    scale, bias = values(a.scale), values(a.bias)
    group = a.group
    whole = max(1, _BLOCK // group) * group  # channels that go together: at least a group
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    sums = carray(as_pointer(scratch), LANES * _BLOCK, np.float64)
    squares = carray(as_pointer(scratch + np.uintp(_SUMS)), LANES * _BLOCK, np.float64)
    mean = carray(as_pointer(scratch + np.uintp(2 * _SUMS)), whole, np.float32)
    inverse = carray(as_pointer(scratch + np.uintp(2 * _SUMS + 4 * whole)), whole, np.float32)
    blocks = (a.channels + whole - 1) // whole
    begin, end = share(a.n * blocks, first_part, end_part, parts)
    for item in range(begin, end):
        n, first = item // blocks, item % blocks * whole
        channels = min(whole, a.channels - first)
        total = total_of_squares = 0.0
        for block in range(0, channels, _BLOCK):
            count = min(_BLOCK, channels - block)
            sums[:] = 0
            squares[:] = 0
            _sum_channels(a, x, n, first + block, count, sums, squares)
            _join_channels(sums, count)
            _join_channels(squares, count)
            for c in range(count):
                total += sums[c]
                total_of_squares += squares[c]
                if (block + c + 1) % group == 0:  # of a group the last one
                    begins, ends = block + c + 1 - group, block + c + 1
                    size = group * a.height * a.width
                    of_all = statistics(total, total_of_squares, size, a.kind, a.epsilon)
                    mean[begins:ends], inverse[begins:ends] = of_all
                    total = total_of_squares = 0.0
        _write_channels(a, x, y, n, first, channels, mean, inverse, scale, bias)
