"""Kernels on float32 in plain Numba, for any machine, as `codes` has them for codes.

Convolutions sum in the order that `reference` defines, with a fused multiply-add per step;
lanes are output channels.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit

from logshift.kernels import functions, records
from logshift.kernels.functions import clamp, fma, greatest, least
from logshift.kernels.layer import FloatLayer, Packed
from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.codes import rearrange
from logshift.kernels.portable.lanes import transpose_rows
from logshift.kernels.portable.moves import move_pixels
from logshift.kernels.records import floats, share
from logshift.kernels.reference.codes import (
    COPY,
    DEPTH_TO_SPACE,
    RESIZE,
)
from logshift.kernels.reference.floats import (
    FLOAT_BINARY,
    FLOAT_FILL,
    FLOAT_POOL,
    FLOAT_UNARY,
    TO_CHANNELS_LAST,
)
from logshift.kernels.registry import register
from logshift.kernels.walk import (
    first_input,
    pixel_at,
    position,
    stretch,
    stretches,
    taps_within,
)

_PIXELS = 4  # output pixels that share one pass over the weights
_BLOCK = 16  # output channels computed together


# --- convolution --------------------------------------------------------------------------------


def _pack_blocks(layer: FloatLayer) -> Packed:
    """Weights as (group, blocks, K, block), zeros in channels beyond the last."""
    size = layer.weights.shape[0] // layer.group
    blocks = -(-size // _BLOCK)
    k = math.prod(layer.weights.shape[1:])
    matrices = layer.weights.reshape(layer.group, size, k)
    packed = aligned((layer.group, blocks, k, _BLOCK), np.float32)
    packed[:] = 0
    for i in range(blocks):
        rows = matrices[:, i * _BLOCK : (i + 1) * _BLOCK]
        packed[:, i, :, : rows.shape[1]] = rows.transpose(0, 2, 1)
    return Packed({"weights": packed, "b": layer.bias})


@njit(error_model="numpy")
def _add_products(x, p0, p1, p2, p3, run, w, wk, acc):
    """Add `run` products per channel for four pixels whose inputs begin at p0 ... p3 of x."""
    p0, p1, p2, p3, wk = np.uintp(p0), np.uintp(p1), np.uintp(p2), np.uintp(p3), np.uintp(wk)
    block = np.uintp(_BLOCK)
    for k in range(np.uintp(run)):
        a0, a1, a2, a3 = x[p0 + k], x[p1 + k], x[p2 + k], x[p3 + k]
        for j in range(block):
            v = w[wk + j]
            acc[j] = fma(a0, v, acc[j])
            acc[block + j] = fma(a1, v, acc[block + j])
            acc[block + block + j] = fma(a2, v, acc[block + block + j])
            acc[block + block + block + j] = fma(a3, v, acc[block + block + block + j])
        wk += block


@njit(error_model="numpy")
def _write(a, acc, acc0, b, o0, count, y, y0, r, r0):
    """Finish `count` channels of one pixel, from `o0` on, and store them at y0."""
    acc0, o0, y0, r0 = np.uintp(acc0), np.uintp(o0), np.uintp(y0), np.uintp(r0)
    lo, hi = a.lo, a.hi
    if a.has_residual:
        for j in range(np.uintp(count)):
            y[y0 + j] = clamp((acc[acc0 + j] + b[o0 + j]) + r[r0 + j], lo, hi)
    else:
        for j in range(np.uintp(count)):
            y[y0 + j] = clamp(acc[acc0 + j] + b[o0 + j], lo, hi)


@njit(inline="always", error_model="numpy")
def _targets(a, number):
    """Flat indices of an output pixel, counted over all pictures, and of its residual."""
    n, i, j = position(a, number)
    i, j = i * a.step_h, j * a.step_w
    y0 = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
    return y0, pixel_at(a.r, n, a.r.top + i, a.r.left + j)


@register(
    "float_conv", "portable", records.FLOAT_CONV,
    supports=lambda layer: not layer.is_depthwise,
    pack=_pack_blocks,
    scratch=lambda record: 4 * _PIXELS * _BLOCK,
)  # fmt: skip
def _conv(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y, r = floats(a.x).ravel(), floats(a.y).ravel(), floats(a.r).ravel()
    b = carray(as_pointer(a.b), a.channels, np.float32)
    in_group, out_group = a.x.c // a.group, a.channels // a.group
    blocks = (out_group + _BLOCK - 1) // _BLOCK
    size = a.kernel_h * a.kernel_w * in_group * _BLOCK
    w = carray(as_pointer(a.weights), a.group * blocks * size, np.float32)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    acc = carray(as_pointer(scratch), _PIXELS * _BLOCK, np.float32)
    pixels = a.n * a.height * a.width
    strips = (pixels + _PIXELS - 1) // _PIXELS
    begin, end = share(a.group * blocks * strips, first_part, end_part, parts)
    for item in range(begin, end):
        first, index = item % strips * _PIXELS, item // strips
        g, o0 = index // blocks, index % blocks * _BLOCK
        count = min(_BLOCK, out_group - o0)
        o0 += g * out_group
        last = pixels - 1
        p0, p1 = first_input(a, first), first_input(a, min(first + 1, last))
        p2, p3 = first_input(a, min(first + 2, last)), first_input(a, min(first + 3, last))
        acc[:] = 0
        wk = index * size
        for ky in range(a.kernel_h):
            for kx in range(a.kernel_w):
                tap = (ky * a.dilation_h * a.x.w + kx * a.dilation_w) * a.x.c + g * in_group
                _add_products(x, p0 + tap, p1 + tap, p2 + tap, p3 + tap, in_group, w, wk, acc)
                wk += in_group * _BLOCK
        for q in range(min(_PIXELS, pixels - first)):
            y0, r0 = _targets(a, first + q)
            o = np.uintp(o0)
            _write(a, acc, q * _BLOCK, b, o0, count, y, y0 + o, r, r0 + o)


def _pack_depthwise(layer: FloatLayer) -> Packed:
    """Weights as (kh * kw, C)."""
    channels, kernel_h, kernel_w, _ = layer.weights.shape
    weights = layer.weights.reshape(channels, kernel_h * kernel_w).T
    return Packed({"weights": np.ascontiguousarray(weights), "b": layer.bias})


@register(
    "float_conv", "portable", records.FLOAT_CONV, "depthwise",
    supports=lambda layer: layer.is_depthwise,
    pack=_pack_depthwise,
    scratch=lambda record: 4 * record["channels"],
)  # fmt: skip
def _conv_depthwise(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y, r = floats(a.x).ravel(), floats(a.y).ravel(), floats(a.r).ravel()
    b = carray(as_pointer(a.b), a.channels, np.float32)
    channels = np.uintp(a.channels)
    w = carray(as_pointer(a.weights), a.kernel_h * a.kernel_w * a.channels, np.float32)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    acc = carray(as_pointer(scratch), a.channels, np.float32)
    begin, end = share(a.n * a.height * a.width, first_part, end_part, parts)
    for item in range(begin, end):
        first = first_input(a, item)
        for c in range(channels):
            acc[c] = 0
        q = np.uintp(0)
        for ky in range(a.kernel_h):
            for kx in range(a.kernel_w):
                p = np.uintp(first + (ky * a.dilation_h * a.x.w + kx * a.dilation_w) * a.x.c)
                for c in range(channels):
                    acc[c] = fma(x[p + c], w[q + c], acc[c])
                q += channels
        y0, r0 = _targets(a, item)
        _write(a, acc, 0, b, 0, a.channels, y, y0, r, r0)


# --- everything else ----------------------------------------------------------------------------


@njit(error_model="numpy")
def _raise_to_taps(y, q, x, p, step, taps, channels, hi):
    """Raise all channels of a pixel to those of `taps` pixels that lie `step` apart, from p on.

    No further than to `hi`, without which the compiler would store under a condition: that is slow.
    """
    p, step, q = np.uintp(p), np.uintp(step), np.uintp(q)
    if taps == 3:
        p1, p2 = p + step, p + step + step
        for c in range(channels):
            best = greatest(x[p1 + c], greatest(x[p + c], y[q + c]))
            y[q + c] = least(greatest(x[p2 + c], best), hi)
        return
    for _ in range(taps):
        for c in range(channels):
            y[q + c] = least(greatest(x[p + c], y[q + c]), hi)
        p += step


@register("float_pool_max", "portable", FLOAT_POOL)
def _pool_max(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    channels, lo, hi = np.uintp(a.channels), a.lo, a.hi
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        row0 = a.row0 + i * a.stride_h
        ky0, ky1 = taps_within(a.low_h, a.high_h, row0, a.dilation_h, a.kernel_h)
        for j in range(a.width):
            column0 = a.column0 + j * a.stride_w
            kx0, kx1 = taps_within(a.low_w, a.high_w, column0, a.dilation_w, a.kernel_w)
            q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
            for c in range(channels):
                y[q + c] = -np.inf
            column = column0 + kx0 * a.dilation_w
            for ky in range(ky0, ky1):
                p = pixel_at(a.x, n, row0 + ky * a.dilation_h, column)
                _raise_to_taps(y, q, x, p, a.dilation_w * a.x.c, kx1 - kx0, channels, hi)
            for c in range(channels):
                y[q + c] = clamp(y[q + c], lo, hi)


@register("float_pool_average", "portable", FLOAT_POOL)
def _pool_average(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    channels, lo, hi = np.uintp(a.channels), a.lo, a.hi
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        row0 = a.row0 + i * a.stride_h
        ky0, ky1 = taps_within(a.low_h, a.high_h, row0, a.dilation_h, a.kernel_h)
        cy0, cy1 = taps_within(a.count_low_h, a.count_high_h, row0, a.dilation_h, a.kernel_h)
        for j in range(a.width):
            column0 = a.column0 + j * a.stride_w
            kx0, kx1 = taps_within(a.low_w, a.high_w, column0, a.dilation_w, a.kernel_w)
            cx0, cx1 = taps_within(a.count_low_w, a.count_high_w, column0, a.dilation_w, a.kernel_w)
            q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
            for c in range(channels):
                y[q + c] = 0
            for ky in range(ky0, ky1):
                for kx in range(kx0, kx1):
                    p = pixel_at(a.x, n, row0 + ky * a.dilation_h, column0 + kx * a.dilation_w)
                    for c in range(channels):
                        y[q + c] += x[p + c]
            count = np.float32(max((cy1 - cy0) * (cx1 - cx0), 1))
            for c in range(channels):
                y[q + c] = clamp(y[q + c] / count, lo, hi)


@njit(error_model="numpy")
def _binary(arguments, operation, first_part, end_part, parts):
    a = carray(arguments, 1)[0]
    x, r, y = floats(a.x).ravel(), floats(a.r).ravel(), floats(a.y).ravel()
    lo, hi = a.lo, a.hi
    # Rows, or else pixels, are taken whole.
    whole = a.x_step_w * a.x_step_c * a.r_step_w * a.r_step_c == 1
    stretches = 1 if whole else a.width
    count = np.uintp(a.width * a.channels if whole else a.channels)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n * a.x_step_n, a.x.top + i * a.x_step_h, a.x.left)
        s = pixel_at(a.r, n * a.r_step_n, a.r.top + i * a.r_step_h, a.r.left)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        for _ in range(stretches):
            if a.x_step_c == 1 and a.r_step_c == 1:
                for c in range(count):
                    y[q + c] = clamp(operation(x[p + c], r[s + c]), lo, hi)
            elif a.x_step_c == 1:
                value = r[s]
                for c in range(count):
                    y[q + c] = clamp(operation(x[p + c], value), lo, hi)
            elif a.r_step_c == 1:
                value = x[p]
                for c in range(count):
                    y[q + c] = clamp(operation(value, r[s + c]), lo, hi)
            else:
                value = clamp(operation(x[p], r[s]), lo, hi)
                for c in range(count):
                    y[q + c] = value
            p += np.uintp(a.x_step_w * a.x.c)
            s += np.uintp(a.r_step_w * a.r.c)
            q += np.uintp(a.y.c)


@register("float_add", "portable", FLOAT_BINARY)
def _add(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.add, first_part, end_part, parts)


@register("float_sub", "portable", FLOAT_BINARY)
def _sub(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.sub, first_part, end_part, parts)


@register("float_mul", "portable", FLOAT_BINARY)
def _mul(arguments, first_part, end_part, parts, slot):
    _binary(arguments, functions.mul, first_part, end_part, parts)


@register("float_copy", "portable", COPY)
def _copy(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    channels, step = np.uintp(a.channels), np.uintp(a.stride_c)
    x_step, y_step = a.stride_w * a.x.c, a.y.c
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.row0 + i * a.stride_h, a.column0) + np.uintp(a.channel0_x)
        q = pixel_at(a.y, n, a.row0_y + i, a.column0_y) + np.uintp(a.channel0_y)
        if a.stride_c == 1:
            x_at, y_at = a.x.data + np.uintp(4) * p, a.y.data + np.uintp(4) * q
            move_pixels(x_at, y_at, a.width, 4 * x_step, 4 * y_step, 4 * a.channels, np.uintp(0))
            continue
        for _ in range(a.width):
            for c in range(channels):
                y[q + c] = x[p + c * step]
            p += np.uintp(x_step)
            q += np.uintp(y_step)


@register("float_fill", "portable", FLOAT_FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    y = floats(a.y).ravel()
    value, count = a.value, np.uintp(a.width * a.channels)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        q = pixel_at(a.y, item // a.height, a.y.top + item % a.height, a.y.left)
        for j in range(count):
            y[q + j] = value


@register("float_resize", "portable", RESIZE)
def _resize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    row0 = carray(as_pointer(a.row_index0), a.height, np.int64)
    row1 = carray(as_pointer(a.row_index1), a.height, np.int64)
    row_weight = carray(as_pointer(a.row_weight), a.height, np.float32)
    column0 = carray(as_pointer(a.column_index0), a.width, np.int64)
    column1 = carray(as_pointer(a.column_index1), a.width, np.int64)
    column_weight = carray(as_pointer(a.column_weight), a.width, np.float32)
    channels, one = np.uintp(a.channels), np.float32(1)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        v1 = row_weight[i]
        v0 = one - v1
        for j in range(a.width):
            u1 = column_weight[j]
            u0 = one - u1
            p00 = pixel_at(a.x, n, a.x.top + row0[i], a.x.left + column0[j])
            q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
            if not a.linear:
                for c in range(channels):
                    y[q + c] = x[p00 + c]
                continue
            p01 = pixel_at(a.x, n, a.x.top + row0[i], a.x.left + column1[j])
            p10 = pixel_at(a.x, n, a.x.top + row1[i], a.x.left + column0[j])
            p11 = pixel_at(a.x, n, a.x.top + row1[i], a.x.left + column1[j])
            for c in range(channels):
                above = u0 * x[p00 + c] + u1 * x[p01 + c]
                below = u0 * x[p10 + c] + u1 * x[p11 + c]
                y[q + c] = v0 * above + v1 * below


@register("float_depth_to_space", "portable", DEPTH_TO_SPACE)
def _depth_to_space(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    rearrange(a, floats(a.x).ravel(), floats(a.y).ravel(), first_part, end_part, parts)


@njit(error_model="numpy")
def _apply(function, a, first_part, end_part, parts):
    x, y = floats(a.x).ravel(), floats(a.y).ravel()
    alpha, beta, count = a.alpha, a.beta, np.uintp(a.width * a.channels)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.x.top + i, a.x.left)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        for j in range(count):
            y[q + j] = function(x[p + j], alpha, beta)


_apply_by_number = functions.by_number(functions.UNARY_FUNCTIONS, _apply)


@register("float_unary", "portable", FLOAT_UNARY)
def _unary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _apply_by_number(a.function, a, first_part, end_part, parts)


@register("to_channels_last", "portable", TO_CHANNELS_LAST)
def _to_channels_last(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    plane, (across, down) = a.height * a.width, stretches(a, a.y)
    begin, end = share(a.n * down, first_part, end_part, parts)
    for item in range(begin, end):
        n, i, j, width = stretch(a, across, down, item)
        p = np.uintp(n * a.channels * plane + i * a.width + j)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
        x, y = a.x.data + np.uintp(4) * p, a.y.data + np.uintp(4) * q
        transpose_rows(x, plane, y, a.y.c, a.channels, width)
