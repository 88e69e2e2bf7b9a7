"""The definition of every kernel on float32, in plain loops, as `codes` has it for codes.

Sums are made in the order of these loops, each step rounded once: what is faster gives the same
bits.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import functions, records
from logshift.kernels.functions import clamp, fma, greatest
from logshift.kernels.layer import FloatLayer, Packed
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import FLOAT, INT, OUTPUT, TENSOR, WINDOW, floats, record
from logshift.kernels.reference.codes import COPY, DEPTH_TO_SPACE, RESIZE, rearrange
from logshift.kernels.registry import register


def _pack_conv(layer: FloatLayer) -> Packed:
    return Packed({"weights": np.ascontiguousarray(layer.weights), "b": layer.bias})


@register(
    "float_conv", "reference", records.FLOAT_CONV, supports=lambda layer: True, pack=_pack_conv
)
def _conv(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, r = floats(a.x), floats(a.y), floats(a.r)
    in_group, out_group = a.x.c // a.group, a.channels // a.group
    shape = (a.channels, a.kernel_h, a.kernel_w, in_group)
    w = carray(as_pointer(a.weights), shape, np.float32)
    b = carray(as_pointer(a.b), a.channels, np.float32)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for o in range(a.channels):
                    acc = np.float32(0)
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            for c in range(in_group):
                                value = x[n, row, column, o // out_group * in_group + c]
                                acc = fma(value, w[o, ky, kx, c], acc)
                    v = acc + b[o]
                    row, column = i * a.step_h, j * a.step_w
                    if a.has_residual:
                        v = v + r[n, a.r.top + row, a.r.left + column, o]
                    y[n, a.y.top + row, a.y.left + column, o] = clamp(v, a.lo, a.hi)


# AveragePool: positions in [count_low, count_high) count, those not in the picture are worth 0.
FLOAT_POOL = record(
    **OUTPUT,
    **WINDOW, low_h=INT, high_h=INT, low_w=INT, high_w=INT,
    count_low_h=INT, count_high_h=INT, count_low_w=INT, count_high_w=INT,
    lo=FLOAT, hi=FLOAT,
)  # fmt: skip


@register("float_pool_max", "reference", FLOAT_POOL)
def _pool_max(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = floats(a.x), floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    best = np.float32(-np.inf)
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            if a.low_h <= row < a.high_h and a.low_w <= column < a.high_w:
                                best = greatest(x[n, row, column, c], best)
                    y[n, a.y.top + i, a.y.left + j, c] = clamp(best, a.lo, a.hi)


@register("float_pool_average", "reference", FLOAT_POOL)
def _pool_average(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = floats(a.x), floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    total, count = np.float32(0), 0
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            if a.low_h <= row < a.high_h and a.low_w <= column < a.high_w:
                                total = total + x[n, row, column, c]
                            if (
                                a.count_low_h <= row < a.count_high_h
                                and a.count_low_w <= column < a.count_high_w
                            ):
                                count += 1
                    v = total / np.float32(max(count, 1))
                    y[n, a.y.top + i, a.y.left + j, c] = clamp(v, a.lo, a.hi)


@njit
def _binary(arguments, operation, first_part):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, r, y = floats(a.x), floats(a.r), floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    left = x[
                        n * a.x_step_n,
                        a.x.top + i * a.x_step_h,
                        a.x.left + j * a.x_step_w,
                        c * a.x_step_c,
                    ]
                    right = r[
                        n * a.r_step_n,
                        a.r.top + i * a.r_step_h,
                        a.r.left + j * a.r_step_w,
                        c * a.r_step_c,
                    ]
                    v = clamp(operation(left, right), a.lo, a.hi)
                    y[n, a.y.top + i, a.y.left + j, c] = v


# y[n, i, j, c] of x[n * x_step_n, i * x_step_h, ...] and r alike: a step is 1, or 0 along an axis
# that is broadcast.
FLOAT_BINARY = record(
    **OUTPUT, r=TENSOR,
    x_step_n=INT, x_step_h=INT, x_step_w=INT, x_step_c=INT,
    r_step_n=INT, r_step_h=INT, r_step_w=INT, r_step_c=INT,
    lo=FLOAT, hi=FLOAT,
)  # fmt: skip


@register("float_add", "reference", FLOAT_BINARY)
def _add(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.add, first_part)


@register("float_sub", "reference", FLOAT_BINARY)
def _sub(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.sub, first_part)


@register("float_mul", "reference", FLOAT_BINARY)
def _mul(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.mul, first_part)


@register("float_copy", "reference", COPY)
def _copy(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = floats(a.x), floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    y[n, a.row0_y + i, a.column0_y + j, a.channel0_y + c] = x[
                        n,
                        a.row0 + i * a.stride_h,
                        a.column0 + j * a.stride_w,
                        a.channel0_x + c * a.stride_c,
                    ]


FLOAT_FILL = record(y=TENSOR, n=INT, height=INT, width=INT, channels=INT, value=FLOAT)


@register("float_fill", "reference", FLOAT_FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    y = floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    y[n, a.y.top + i, a.y.left + j, c] = a.value


# Weights are float32, and parts of 1.
@register("float_resize", "reference", RESIZE)
def _resize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = floats(a.x), floats(a.y)
    row0 = carray(as_pointer(a.row_index0), a.height, np.int64)
    row1 = carray(as_pointer(a.row_index1), a.height, np.int64)
    row_weight = carray(as_pointer(a.row_weight), a.height, np.float32)
    column0 = carray(as_pointer(a.column_index0), a.width, np.int64)
    column1 = carray(as_pointer(a.column_index1), a.width, np.int64)
    column_weight = carray(as_pointer(a.column_weight), a.width, np.float32)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    top, bottom = a.x.top + row0[i], a.x.top + row1[i]
                    left, right = a.x.left + column0[j], a.x.left + column1[j]
                    v = x[n, top, left, c]
                    if a.linear:
                        v1, u1 = row_weight[i], column_weight[j]
                        v0, u0 = np.float32(1) - v1, np.float32(1) - u1
                        above = u0 * v + u1 * x[n, top, right, c]
                        below = u0 * x[n, bottom, left, c] + u1 * x[n, bottom, right, c]
                        v = v0 * above + v1 * below
                    y[n, a.y.top + i, a.y.left + j, c] = v


@register("float_depth_to_space", "reference", DEPTH_TO_SPACE)
def _depth_to_space(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part == 0:
        rearrange(a, floats(a.x), floats(a.y))


# What `function` is to be: its place in `functions.UNARY_FUNCTIONS`; its parameters, 0
# where it has fewer.
FLOAT_UNARY = record(**OUTPUT, function=INT, alpha=FLOAT, beta=FLOAT)


_unary_by_number = functions.by_number(functions.UNARY_FUNCTIONS)


@register("float_unary", "reference", FLOAT_UNARY)
def _unary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = floats(a.x), floats(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    v = x[n, a.x.top + i, a.x.left + j, c]
                    v = _unary_by_number(a.function, v, a.alpha, a.beta)
                    y[n, a.y.top + i, a.y.left + j, c] = v


# float32 (N, C, H, W) without a border to (N, H, W, C).
TO_CHANNELS_LAST = record(**OUTPUT)


@register("to_channels_last", "reference", TO_CHANNELS_LAST)
def _to_channels_last(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x = carray(as_pointer(a.x.data), (a.n, a.channels, a.height, a.width), np.float32)
    y = floats(a.y)
    for n in range(a.n):
        for c in range(a.channels):
            for i in range(a.height):
                for j in range(a.width):
                    y[n, a.y.top + i, a.y.left + j, c] = x[n, c, i, j]
