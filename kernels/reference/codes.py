"""The definition of every kernel, in plain loops: readable, obviously right, never fast.

A quantized convolution here is what the method says it is: codes shifted and added, no product
with a weight anywhere. Whoever has the first part does all the work.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import records
from logshift.kernels.activation import HARD_SWISH, PIECES, PIECEWISE, PRELU
from logshift.kernels.layer import Layer, Packed
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import (
    ACTIVATION,
    ADDRESS,
    FLOAT,
    INT,
    OUTPUT,
    SCRATCH,
    TENSOR,
    WINDOW,
    codes,
    floats,
    record,
)
from logshift.kernels.registry import register


@njit
def _clamp_round(y, lo, hi):
    return min(max(np.rint(y), lo), hi)


@njit
def _activated(v, a, o):
    """Return the function of output channel o that a record tells, of v: section 4."""
    zero, one = np.float32(0), np.float32(1)
    c = carray(as_pointer(a.coefficients), 3, np.float32)
    if a.activation == PRELU:
        slope = carray(as_pointer(a.slopes), o + 1, np.float32)[o]
        return (max(v, zero) + min(v, zero) * slope) + c[0]
    if a.activation == HARD_SWISH:
        return (v * c[0] + c[1]) * min(max(v, zero), one) + c[2]
    if a.activation == PIECEWISE:
        pieces = carray(as_pointer(a.coefficients), (3, PIECES), np.int16)
        k = np.int64(_clamp_round(v, -32768, 32767))
        c0, c1, c2 = pieces[:, k // 4096 % PIECES]
        f = 16 * (k % 4096) - 32768
        p = c1 + (c2 * f + 2**14) // 2**15
        y = min(max(c0 + (p * f + 2**14) // 2**15, -32768), 32767)
        return np.float32((y + 64) // 128)
    return v


@njit
def _shift_add(acc, code, word, bits, shift):
    """Acc + code * word, as `docs/quantization.md` section 1 has it: ±(code << (e - 1))."""
    sign = np.int64(1) << (bits - 1)
    e = word & (sign - 1)
    if e == 0:
        return acc
    shifted = code << (e - 1 + shift)
    return acc - shifted if word & sign else acc + shifted


def _pack_conv(layer: Layer) -> Packed:
    """First and second words as codes, (2, O, K); offset int64, M and B float32, (O,)."""
    words = np.stack([layer.weights.first, layer.weights.second])
    return Packed({"weights": words, "offset": layer.offset, **layer.outputs})


@register("conv", "reference", records.CONV, supports=lambda layer: True, pack=_pack_conv)
def _conv(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, y_float, r = codes(a.x), codes(a.y), floats(a.y), codes(a.r)
    in_group = a.x.c // a.group
    out_group = a.channels // a.group
    k = a.kernel_h * a.kernel_w * in_group
    words = carray(as_pointer(a.weights), (2, a.channels, k), np.uint8)
    offset = carray(as_pointer(a.offset), a.channels, np.int64)
    m = carray(as_pointer(a.m), a.channels, np.float32)
    b = carray(as_pointer(a.b), a.channels, np.float32)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for o in range(a.channels):
                    acc = np.int64(0)
                    p = 0
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            for c in range(in_group):
                                code = np.int64(x[n, row, column, o // out_group * in_group + c])
                                first, second = np.int64(words[0, o, p]), np.int64(words[1, o, p])
                                acc = _shift_add(acc, code, first, a.bits, a.residual_shift)
                                acc = _shift_add(acc, code, second, a.bits, 0)
                                p += 1
                    t = np.float32(acc - offset[o])
                    v = t * m[o]
                    v = v + b[o]
                    row, column = i * a.step_h, j * a.step_w
                    if a.has_residual:
                        code = np.int64(r[n, a.r.top + row, a.r.left + column, o])
                        v = v + np.float32(code - a.z_r) * a.m_r
                    v = _activated(v, a, o)
                    if a.float_output:
                        v = min(max(v, a.lo), a.hi)
                        y_float[n, a.y.top + row, a.y.left + column, o] = v
                    else:
                        code = np.uint8(_clamp_round(v, a.lo, a.hi))
                        y[n, a.y.top + row, a.y.left + column, o] = code


# Rows below `low` and from `high` on hold no picture (padding).
POOL = record(
    **OUTPUT,
    **WINDOW, low_h=INT, high_h=INT, low_w=INT, high_w=INT,
    # AveragePool: positions in [count_low, count_high) count, each worth z_x if not in the picture
    count_low_h=INT, count_high_h=INT, count_low_w=INT, count_high_w=INT,
    z_x=INT, m=ADDRESS, b=FLOAT, lo=FLOAT, hi=FLOAT,  # m: float32, indexed by the count
    **SCRATCH,
)  # fmt: skip


@register("pool_max", "reference", POOL)
def _pool_max(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    best = np.uint8(0)
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            if a.low_h <= row < a.high_h and a.low_w <= column < a.high_w:
                                best = max(best, x[n, row, column, c])
                    y[n, a.y.top + i, a.y.left + j, c] = best


@register("pool_average", "reference", POOL)
def _pool_average(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    m = carray(as_pointer(a.m), a.kernel_h * a.kernel_w + 1, np.float32)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    acc, count = np.int64(0), 0
                    for ky in range(a.kernel_h):
                        row = a.row0 + i * a.stride_h + ky * a.dilation_h
                        for kx in range(a.kernel_w):
                            column = a.column0 + j * a.stride_w + kx * a.dilation_w
                            if a.low_h <= row < a.high_h and a.low_w <= column < a.high_w:
                                acc += np.int64(x[n, row, column, c]) - a.z_x
                            if (
                                a.count_low_h <= row < a.count_high_h
                                and a.count_low_w <= column < a.count_high_w
                            ):
                                count += 1
                    v = np.float32(acc) * m[count]
                    v = v + a.b
                    y[n, a.y.top + i, a.y.left + j, c] = np.uint8(_clamp_round(v, a.lo, a.hi))


@njit
def _repeated(tensor, picture, height, width, n, i, j, c):
    """Code at (n, i, j, c) of a broadcast picture, whose axes of size 1 have one position."""
    n = n if tensor.n > 1 else 0
    i = i if height > 1 else 0
    j = j if width > 1 else 0
    c = c if tensor.c > 1 else 0
    return np.int64(picture[n, tensor.top + i, tensor.left + j, c])


# Operations on two tensors of codes. The pictures of x and r have these sizes; an axis of which a
# tensor has one position, where y has more, is repeated.
BINARY = record(
    **OUTPUT, r=TENSOR, x_height=INT, x_width=INT, r_height=INT, r_width=INT,
    z_x=INT, m=FLOAT, b=FLOAT, z_r=INT, m_r=FLOAT, lo=FLOAT, hi=FLOAT, **ACTIVATION,
    pixels=INT,  # that are computed together where a tensor is repeated along a row
    **SCRATCH,
)  # fmt: skip


@register("add", "reference", BINARY)
def _add(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, r = codes(a.x), codes(a.y), codes(a.r)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    left = _repeated(a.x, x, a.x_height, a.x_width, n, i, j, c) - a.z_x
                    right = _repeated(a.r, r, a.r_height, a.r_width, n, i, j, c) - a.z_r
                    v = np.float32(left) * a.m
                    v = v + a.b
                    v = v + np.float32(right) * a.m_r
                    v = _activated(v, a, 0)
                    y[n, a.y.top + i, a.y.left + j, c] = np.uint8(_clamp_round(v, a.lo, a.hi))


@register("multiply", "reference", BINARY)
def _multiply(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, r = codes(a.x), codes(a.y), codes(a.r)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    left = _repeated(a.x, x, a.x_height, a.x_width, n, i, j, c) - a.z_x
                    right = _repeated(a.r, r, a.r_height, a.r_width, n, i, j, c) - a.z_r
                    v = np.float32(left * right) * a.m
                    v = v + a.b
                    v = _activated(v, a, 0)
                    y[n, a.y.top + i, a.y.left + j, c] = np.uint8(_clamp_round(v, a.lo, a.hi))


# y[i, j, channel0_y + k] = table[x[row0 + i * stride_h, ..., channel0_x + k * stride_c]]
COPY = record(
    **OUTPUT,
    row0=INT, column0=INT, channel0_x=INT, stride_h=INT, stride_w=INT, stride_c=INT,
    row0_y=INT, column0_y=INT, channel0_y=INT,
    table=ADDRESS, has_table=INT,
)  # fmt: skip


@register("copy", "reference", COPY)
def _copy(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    table = carray(as_pointer(a.table), 256, np.uint8)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    code = x[
                        n,
                        a.row0 + i * a.stride_h,
                        a.column0 + j * a.stride_w,
                        a.channel0_x + c * a.stride_c,
                    ]
                    if a.has_table:
                        code = table[code]
                    y[n, a.row0_y + i, a.column0_y + j, a.channel0_y + c] = code


# y[..., k] = x[..., indices[k]], int32; interleaved: indices[k + 2] is indices[k] + 1
GATHER = record(**OUTPUT, indices=ADDRESS, interleaved=INT)


@register("gather", "reference", GATHER)
def _gather(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    indices = carray(as_pointer(a.indices), a.channels, np.int32)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    code = x[n, a.x.top + i, a.x.left + j, indices[c]]
                    y[n, a.y.top + i, a.y.left + j, c] = code


# y[..., k] = tables[k][x[..., k]], uint8 (C, 256)
CHANNEL_LOOKUP = record(**OUTPUT, tables=ADDRESS)


@register("lookup_channels", "reference", CHANNEL_LOOKUP)
def _lookup_channels(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    tables = carray(as_pointer(a.tables), (a.channels, 256), np.uint8)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    code = tables[c, x[n, a.x.top + i, a.x.left + j, c]]
                    y[n, a.y.top + i, a.y.left + j, c] = code


FILL = record(y=TENSOR, n=INT, height=INT, width=INT, channels=INT, value=INT)


@register("fill", "reference", FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    y = codes(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    y[n, a.y.top + i, a.y.left + j, c] = np.uint8(a.value)


# index0/index1 (int64) and weight1 (int64, of 2048) per output row, then per output column
RESIZE = record(
    **OUTPUT, linear=INT, row_index0=ADDRESS, row_index1=ADDRESS, row_weight=ADDRESS,
    column_index0=ADDRESS, column_index1=ADDRESS, column_weight=ADDRESS, **SCRATCH,
)  # fmt: skip


@register("resize", "reference", RESIZE)
def _resize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = codes(a.x), codes(a.y)
    row0 = carray(as_pointer(a.row_index0), a.height, np.int64)
    row1 = carray(as_pointer(a.row_index1), a.height, np.int64)
    row_weight = carray(as_pointer(a.row_weight), a.height, np.int64)
    column0 = carray(as_pointer(a.column_index0), a.width, np.int64)
    column1 = carray(as_pointer(a.column_index1), a.width, np.int64)
    column_weight = carray(as_pointer(a.column_weight), a.width, np.int64)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    v1, u1 = row_weight[i], column_weight[j]
                    v0, u0 = 2048 - v1, 2048 - u1
                    acc = v0 * u0 * x[n, a.x.top + row0[i], a.x.left + column0[j], c]
                    acc += v0 * u1 * x[n, a.x.top + row0[i], a.x.left + column1[j], c]
                    acc += v1 * u0 * x[n, a.x.top + row1[i], a.x.left + column0[j], c]
                    acc += v1 * u1 * x[n, a.x.top + row1[i], a.x.left + column1[j], c]
                    y[n, a.y.top + i, a.y.left + j, c] = np.uint8((acc + 2**21) >> 22)


@njit
def rearrange(a, x, y):
    """Do what DepthToSpace does with tensors of any type."""
    size = a.blocksize
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    block = i % size * size + j % size
                    depth = block * a.channels + c if a.block_first else c * size * size + block
                    value = x[n, a.x.top + i // size, a.x.left + j // size, depth]
                    y[n, a.y.top + i, a.y.left + j, c] = value


DEPTH_TO_SPACE = record(**OUTPUT, blocksize=INT, block_first=INT)  # block_first: mode DCR


@register("depth_to_space", "reference", DEPTH_TO_SPACE)
def _depth_to_space(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part == 0:
        rearrange(a, codes(a.x), codes(a.y))


# float32 (N, C, H, W) to codes.
QUANTIZE = record(**OUTPUT, scale=FLOAT, zero_point=INT, top=INT, **SCRATCH)


@register("quantize", "reference", QUANTIZE)
def _quantize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x = carray(as_pointer(a.x.data), (a.n, a.channels, a.height, a.width), np.float32)
    y = codes(a.y)
    for n in range(a.n):
        for i in range(a.height):
            for j in range(a.width):
                for c in range(a.channels):
                    v = np.rint(x[n, c, i, j] / a.scale) + np.float32(a.zero_point)
                    if v > 0:  # false for NaN, which becomes code 0
                        code = np.uint8(min(v, np.float32(a.top)))
                    else:
                        code = np.uint8(0)
                    y[n, a.y.top + i, a.y.left + j, c] = code


# Codes to float32 (N, C, H, W).
DEQUANTIZE = record(**OUTPUT, scale=FLOAT, zero_point=INT, **SCRATCH)


@register("dequantize", "reference", DEQUANTIZE)
def _dequantize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x = codes(a.x)
    y = carray(as_pointer(a.y.data), (a.n, a.channels, a.height, a.width), np.float32)
    for n in range(a.n):
        for c in range(a.channels):
            for i in range(a.height):
                for j in range(a.width):
                    code = np.int64(x[n, a.x.top + i, a.x.left + j, c]) - a.zero_point
                    y[n, c, i, j] = np.float32(code) * a.scale


# float32 (N, H, W, C) to (N, C, H, W) without a border.
TO_CHANNELS_FIRST = record(**OUTPUT)


@register("to_channels_first", "reference", TO_CHANNELS_FIRST)
def _to_channels_first(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x = floats(a.x)
    y = carray(as_pointer(a.y.data), (a.n, a.channels, a.height, a.width), np.float32)
    for n in range(a.n):
        for c in range(a.channels):
            for i in range(a.height):
                for j in range(a.width):
                    y[n, c, i, j] = x[n, a.x.top + i, a.x.left + j, c]
