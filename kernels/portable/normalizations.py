"""Normalizations, along stretches of elements that are contiguous or not."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.lanes import LANES, join_lanes, sum_lanes
from logshift.kernels.records import share
from logshift.kernels.reference.normalizations import (
    ONNX_NORMALIZE,
    statistics,
)
from logshift.kernels.reference.onnx_ops import values
from logshift.kernels.registry import register


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
