"""Fast kernels in plain Numba, for any machine: LLVM vectorises the innermost loops.

Convolutions multiply in floating point, and exactly: a code times a weight is an integer, and as
long as no partial sum can reach 2^24 (2^53), float32 (float64) represents all of them, in any order
of summation and with or without fused multiply-add. `Layer.accumulator_bound` decides.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from logshift.kernels import records
from logshift.kernels.activation import HARD_SWISH, PIECEWISE, PRELU, activated
from logshift.kernels.functions import ROUND
from logshift.kernels.layer import Layer, Packed
from logshift.kernels.machine.emit import Emitter, i8, i32
from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.lanes import (
    LANES,
    interleave_three,
    transpose_bytes,
    transpose_rows,
)
from logshift.kernels.portable.moves import move_pixels
from logshift.kernels.records import codes, floats, share
from logshift.kernels.reference.codes import (
    BINARY,
    CHANNEL_LOOKUP,
    COPY,
    DEPTH_TO_SPACE,
    DEQUANTIZE,
    FILL,
    GATHER,
    POOL,
    QUANTIZE,
    RESIZE,
    TO_CHANNELS_FIRST,
)
from logshift.kernels.registry import register, register_part
from logshift.kernels.stlq import codec
from logshift.kernels.walk import (
    first_input,
    pixel_at,
    position,
    stretch,
    stretches,
    taps_within,
)

_PIXELS = 4  # output pixels that share one pass over the weights


@njit(inline="always")
def _to_code(v, lo, hi):
    v = min(max(v, lo), hi)
    return np.uint8(np.float32(v + ROUND).view(np.uint32))


# --- convolution --------------------------------------------------------------------------------


def _block(channels: int) -> int:
    """Output channels computed together: what keeps accumulators in registers on most machines."""
    return 16 if channels <= 16 else 32


def _pack_blocks(layer: Layer, dtype: type) -> Packed:
    """W as (group, blocks, K, block), zeros in channels beyond the last; the rest as (O,)."""
    w = layer.integers
    group_size = w.shape[0] // layer.group
    block = _block(group_size)
    blocks = -(-group_size // block)
    k = w.shape[1] * w.shape[2] * w.shape[3]
    packed = aligned((layer.group, blocks, k, block), dtype)
    packed[:] = 0
    for g in range(layer.group):
        matrix = w[g * group_size : (g + 1) * group_size].reshape(group_size, k)
        for i in range(blocks):
            rows = matrix[i * block : (i + 1) * block]
            packed[g, i, :, : len(rows)] = rows.T
    return _packed(layer, packed, block, dtype)


def _packed(layer: Layer, weights: np.ndarray, block: int, accumulator: type) -> Packed:
    # Sums begin at minus the offset: no partial sum then exceeds the bound either.
    start: np.ndarray = (-layer.offset).astype(accumulator)
    return Packed({"weights": weights, "block": block, "offset": start, **layer.outputs})


@njit(fastmath={"contract"}, error_model="numpy")
def _four_pixels(x, p0, p1, p2, p3, run, w, wk, block, acc):
    """Add `run` products per channel for four pixels whose inputs begin at p0 ... p3 of x."""
    # Unsigned indices: the test for negative ones that Numba makes otherwise stops vectorisation.
    p0, p1, p2, p3 = np.uintp(p0), np.uintp(p1), np.uintp(p2), np.uintp(p3)
    wk, block = np.uintp(wk), np.uintp(block)
    one, two, three = np.uintp(1), np.uintp(2), np.uintp(3)
    number = acc.dtype.type
    for k in range(np.uintp(0), np.uintp(run - 1), two):
        a0, a1 = number(x[p0 + k]), number(x[p0 + k + one])
        b0, b1 = number(x[p1 + k]), number(x[p1 + k + one])
        c0, c1 = number(x[p2 + k]), number(x[p2 + k + one])
        d0, d1 = number(x[p3 + k]), number(x[p3 + k + one])
        first = wk + k * block
        second = first + block
        for j in range(block):
            w0, w1 = w[first + j], w[second + j]
            acc[j] = acc[j] + a0 * w0 + a1 * w1
            acc[block + j] = acc[block + j] + b0 * w0 + b1 * w1
            acc[two * block + j] = acc[two * block + j] + c0 * w0 + c1 * w1
            acc[three * block + j] = acc[three * block + j] + d0 * w0 + d1 * w1
    if run % 2:
        k = np.uintp(run - 1)
        a0, b0, c0, d0 = number(x[p0 + k]), number(x[p1 + k]), number(x[p2 + k]), number(x[p3 + k])
        first = wk + k * block
        for j in range(block):
            w0 = w[first + j]
            acc[j] += a0 * w0
            acc[block + j] += b0 * w0
            acc[two * block + j] += c0 * w0
            acc[three * block + j] += d0 * w0


@njit(fastmath={"contract"}, error_model="numpy")
def _one_pixel(x, p0, run, w, wk, block, acc):
    """Do the same for one pixel."""
    p0, wk, block = np.uintp(p0), np.uintp(wk), np.uintp(block)
    one, two, three, four = np.uintp(1), np.uintp(2), np.uintp(3), np.uintp(4)
    number = acc.dtype.type
    whole = np.uintp(run - run % 4)
    for k in range(np.uintp(0), whole, four):
        a0, a1 = number(x[p0 + k]), number(x[p0 + k + one])
        a2, a3 = number(x[p0 + k + two]), number(x[p0 + k + three])
        first = wk + k * block
        for j in range(block):
            row = first + j
            acc[j] = (
                acc[j] + a0 * w[row] + a1 * w[row + block]
                + a2 * w[row + two * block] + a3 * w[row + three * block]
            )  # fmt: skip
    for k in range(whole, np.uintp(run)):
        a0 = number(x[p0 + k])
        first = wk + k * block
        for j in range(block):
            acc[j] += a0 * w[first + j]


@njit(error_model="numpy")
def _accumulate(x, p0, p1, p2, p3, valid, run, w, wk, block, acc):
    # A block size known to the compiler is worth a quarter of the time.
    if valid > 1:
        if block == 32:
            _four_pixels(x, p0, p1, p2, p3, run, w, wk, 32, acc)
        else:
            _four_pixels(x, p0, p1, p2, p3, run, w, wk, 16, acc)
    elif block == 32:
        _one_pixel(x, p0, run, w, wk, 32, acc)
    else:
        _one_pixel(x, p0, run, w, wk, 16, acc)


@njit(inline="always")
def _write_channels(is_activated, a, acc, acc0, m, b, o0, count, y, y_float, y0, r, r0):
    acc0, o0, y0, r0 = np.uintp(acc0), np.uintp(o0), np.uintp(y0), np.uintp(r0)
    # Read once: for all the compiler knows, a store to y may change the record.
    lo, hi, z_r, m_r = a.lo, a.hi, np.float32(a.z_r), a.m_r
    has_residual, float_output = a.has_residual != 0, a.float_output != 0
    kind, coefficients = a.activation, a.coefficients
    # Anything but what is multiplied by no slope may lie there.
    slopes = carray(as_pointer(a.slopes if kind == PRELU else a.b), a.channels, np.float32)
    for j in range(np.uintp(count)):
        v = np.float32(acc[acc0 + j]) * m[o0 + j]
        v = v + b[o0 + j]
        if has_residual:
            v = v + (np.float32(r[r0 + j]) - z_r) * m_r
        if is_activated:
            v = activated(v, kind, slopes[o0 + j], coefficients)
        if float_output:
            y_float[y0 + j] = min(max(v, lo), hi)
        else:
            y[y0 + j] = _to_code(v, lo, hi)


@njit(error_model="numpy")
def _write(a, acc, acc0, m, b, o0, count, y, y_float, y0, r, r0):
    """Requantize `count` channels of one pixel, from `o0` on, and store them at y0."""
    # A loop for each: with a function it is no loop of vectors.
    if a.activation:
        _write_channels(True, a, acc, acc0, m, b, o0, count, y, y_float, y0, r, r0)
    else:
        _write_channels(False, a, acc, acc0, m, b, o0, count, y, y_float, y0, r, r0)


@njit(error_model="numpy")
def _conv_blocks(a, w, acc, start, first_part, end_part, parts):
    """Convolve as `records.CONV` says, weights packed by `_pack_blocks`, in the type of `acc`."""
    block = a.block
    x, r = codes(a.x).ravel(), codes(a.r).ravel()
    y, y_float = codes(a.y).ravel(), floats(a.y).ravel()
    m = carray(as_pointer(a.m), a.channels, np.float32)
    b = carray(as_pointer(a.b), a.channels, np.float32)
    in_group, out_group = a.x.c // a.group, a.channels // a.group
    blocks = (out_group + block - 1) // block
    k = a.kernel_h * a.kernel_w * in_group
    pixels = a.n * a.height * a.width
    strips = (pixels + _PIXELS - 1) // _PIXELS
    # A row of taps is one run of bytes where nothing lies between them.
    joined = a.dilation_w == 1 and a.group == 1
    runs = 1 if joined else a.kernel_w
    run = a.kernel_w * in_group if joined else in_group
    begin, end = share(a.group * blocks * strips, first_part, end_part, parts)
    for item in range(begin, end):
        strip = item % strips
        index = item // strips
        g, i_block = index // blocks, index % blocks
        first = strip * _PIXELS
        valid = min(_PIXELS, pixels - first)
        p0 = first_input(a, first)
        p1 = first_input(a, first + 1) if valid > 1 else p0
        p2 = first_input(a, first + 2) if valid > 2 else p0
        p3 = first_input(a, first + 3) if valid > 3 else p0
        count = min(block, out_group - i_block * block)
        o0 = g * out_group + i_block * block
        for q in range(_PIXELS if valid > 1 else 1):
            for c in range(block):
                acc[q * block + c] = start[o0 + c] if c < count else 0
        wk = index * k * block
        for ky in range(a.kernel_h):
            row = ky * a.dilation_h * a.x.w * a.x.c + g * in_group
            for kx in range(runs):
                tap = row + kx * a.dilation_w * a.x.c
                _accumulate(
                    x, p0 + tap, p1 + tap, p2 + tap, p3 + tap, valid, run, w, wk, block, acc
                )
                wk += run * block
        for q in range(valid):
            n, i, j = position(a, first + q)
            i, j = i * a.step_h, j * a.step_w
            y0 = pixel_at(a.y, n, a.y.top + i, a.y.left + j) + np.uintp(o0)
            r0 = pixel_at(a.r, n, a.r.top + i, a.r.left + j) + np.uintp(o0)
            _write(a, acc, q * block, m, b, o0, count, y, y_float, y0, r, r0)


def _fits_depthwise(layer: Layer) -> bool:
    return layer.is_depthwise and layer.accumulator_bound < 2**31


def _pack_depthwise(layer: Layer, dtype: type) -> Packed:
    """W as (kh * kw, C); the rest as (C,)."""
    w = layer.integers
    packed = aligned((w.shape[1] * w.shape[2], w.shape[0]), dtype)
    packed[:] = w.reshape(packed.shape[::-1]).T
    return _packed(layer, packed, w.shape[0], np.int32)


@njit(error_model="numpy")
def _add_taps(x, p, step, w, q, taps, channels, acc):
    """Add to all channels a row of taps whose inputs lie `step` apart, from p on.

    The sum of two products is taken in the type of w, which vectors of int16 make worth it.
    """
    number = w.dtype.type
    p, step, q, channels = np.uintp(p), np.uintp(step), np.uintp(q), np.uintp(channels)
    if taps == 3:
        p1, p2, q1, q2 = p + step, p + step + step, q + channels, q + channels + channels
        for c in range(channels):
            two = number(number(x[p + c]) * w[q + c] + number(x[p1 + c]) * w[q1 + c])
            acc[c] += np.int32(two) + np.int32(number(number(x[p2 + c]) * w[q2 + c]))
        return
    for _ in range(taps // 2):
        p1, q1 = p + step, q + channels
        for c in range(channels):
            acc[c] += np.int32(number(number(x[p + c]) * w[q + c] + number(x[p1 + c]) * w[q1 + c]))
        p, q = p1 + step, q1 + channels
    if taps % 2:
        for c in range(channels):
            acc[c] += np.int32(number(number(x[p + c]) * w[q + c]))


@njit(error_model="numpy")
def _depthwise(a, w, first_part, end_part, parts, slot):
    x, r = codes(a.x).ravel(), codes(a.r).ravel()
    y, y_float = codes(a.y).ravel(), floats(a.y).ravel()
    start = carray(as_pointer(a.offset), a.channels, np.int32)
    m = carray(as_pointer(a.m), a.channels, np.float32)
    b = carray(as_pointer(a.b), a.channels, np.float32)
    acc = carray(as_pointer(a.scratch + np.uintp(slot * a.scratch_size)), a.channels, np.int32)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        for j in range(a.width):
            p = first_input(a, item * a.width + j)
            for c in range(np.uintp(a.channels)):
                acc[c] = start[c]
            for ky in range(a.kernel_h):
                row = p + ky * a.dilation_h * a.x.w * a.channels
                step, q = a.dilation_w * a.channels, ky * a.kernel_w * a.channels
                _add_taps(x, row, step, w, q, a.kernel_w, a.channels, acc)
            row, column = i * a.step_h, j * a.step_w
            y0 = pixel_at(a.y, n, a.y.top + row, a.y.left + column)
            r0 = pixel_at(a.r, n, a.r.top + row, a.r.left + column)
            _write(a, acc, 0, m, b, 0, a.channels, y, y_float, y0, r, r0)


@register(
    "conv", "portable", records.CONV, "depthwise",
    # Two products of 255 and 64 fit an int16.
    supports=lambda layer: _fits_depthwise(layer) and layer.largest <= 64,
    pack=lambda layer: _pack_depthwise(layer, np.int16),
    scratch=lambda record: 4 * record["channels"],
)  # fmt: skip
def _conv_depthwise(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    w = carray(as_pointer(a.weights), a.kernel_h * a.kernel_w * a.channels, np.int16)
    _depthwise(a, w, first_part, end_part, parts, slot)


@register(
    "conv", "portable", records.CONV, "depthwise_wide",
    supports=_fits_depthwise,
    pack=lambda layer: _pack_depthwise(layer, np.int32),
    scratch=lambda record: 4 * record["channels"],
)  # fmt: skip
def _conv_depthwise_wide(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    w = carray(as_pointer(a.weights), a.kernel_h * a.kernel_w * a.channels, np.int32)
    _depthwise(a, w, first_part, end_part, parts, slot)


@register(
    "conv", "portable", records.CONV, "float32",
    supports=lambda layer: layer.accumulator_bound < 2**24,
    pack=lambda layer: _pack_blocks(layer, np.float32),
    scratch=lambda record: 4 * _PIXELS * 32,
)  # fmt: skip
def _conv_float32(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    k = a.kernel_h * a.kernel_w * (a.x.c // a.group)
    blocks = (a.channels // a.group + a.block - 1) // a.block
    w = carray(as_pointer(a.weights), a.group * blocks * k * a.block, np.float32)
    acc = carray(as_pointer(a.scratch + np.uintp(slot * a.scratch_size)), _PIXELS * 32, np.float32)
    start = carray(as_pointer(a.offset), a.channels, np.float32)
    _conv_blocks(a, w, acc, start, first_part, end_part, parts)


@register(
    "conv", "portable", records.CONV, "float64",
    supports=lambda layer: True,
    pack=lambda layer: _pack_blocks(layer, np.float64),
    scratch=lambda record: 8 * _PIXELS * 32,
)  # fmt: skip
def _conv_float64(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    k = a.kernel_h * a.kernel_w * (a.x.c // a.group)
    blocks = (a.channels // a.group + a.block - 1) // a.block
    w = carray(as_pointer(a.weights), a.group * blocks * k * a.block, np.float64)
    acc = carray(as_pointer(a.scratch + np.uintp(slot * a.scratch_size)), _PIXELS * 32, np.float64)
    start = carray(as_pointer(a.offset), a.channels, np.float64)
    _conv_blocks(a, w, acc, start, first_part, end_part, parts)


# --- everything else ----------------------------------------------------------------------------


@njit(error_model="numpy")
def _raise_to_taps(y, q, x, p, step, taps, channels):
    """Raise all channels of a pixel to those of `taps` pixels that lie `step` apart, from p on."""
    p, step, q, channels = np.uintp(p), np.uintp(step), np.uintp(q), np.uintp(channels)
    if taps == 3:
        p1, p2 = p + step, p + step + step
        for c in range(channels):
            y[q + c] = max(y[q + c], max(x[p + c], max(x[p1 + c], x[p2 + c])))
    elif taps == 2:
        p1 = p + step
        for c in range(channels):
            y[q + c] = max(y[q + c], max(x[p + c], x[p1 + c]))
    else:
        for _ in range(taps):
            for c in range(channels):
                y[q + c] = max(y[q + c], x[p + c])
            p += step


_WIDE, _NARROW = 64, 16  # channels whose largest codes are found together


def _write_largest(lanes):
    """Return what writes the largest codes of so many channels of some pixels to an address."""

    @intrinsic
    def write(typingctx, x, row_step, rows, column_step, columns, target):
        def codegen(context, builder, signature, args):
            x, row_step, rows, column_step, columns, target = args
            e, kind = Emitter(builder), ir.VectorType(i8, lanes)
            largest = cgutils.alloca_once_value(builder, e.constant(0, kind))
            with cgutils.for_range(builder, rows) as row:
                begin = builder.add(x, builder.mul(row.index, row_step))
                with cgutils.for_range(builder, columns) as column:
                    place = builder.add(begin, builder.mul(column.index, column_step))
                    codes, held = e.load(place, kind, 1), builder.load(largest)
                    higher = builder.icmp_unsigned(">", codes, held)
                    builder.store(builder.select(higher, codes, held), largest)
            e.store(builder.load(largest), target, 1)
            return context.get_dummy_value()

        return types.void(x, row_step, rows, column_step, columns, target), codegen

    return write


_write_largest_wide, _write_largest_narrow = _write_largest(_WIDE), _write_largest(_NARROW)


@register("pool_max", "portable", POOL)
def _pool_max(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    channels, wide, narrow = np.uintp(a.channels), np.uintp(_WIDE), np.uintp(_NARROW)
    row_step, column_step = a.dilation_h * a.x.w * a.x.c, a.dilation_w * a.x.c
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        row0 = a.row0 + i * a.stride_h
        ky0, ky1 = taps_within(a.low_h, a.high_h, row0, a.dilation_h, a.kernel_h)
        for j in range(a.width):
            column0 = a.column0 + j * a.stride_w
            kx0, kx1 = taps_within(a.low_w, a.high_w, column0, a.dilation_w, a.kernel_w)
            q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
            column = column0 + kx0 * a.dilation_w
            if channels >= narrow:
                p = a.x.data + pixel_at(a.x, n, row0 + ky0 * a.dilation_h, column)
                lanes = wide if channels >= wide else narrow
                for first in range(np.uintp(0), channels, lanes):
                    c = min(first, channels - lanes)  # the last ones overlap others
                    if lanes == wide:
                        _write_largest_wide(
                            p + c, row_step, ky1 - ky0, column_step, kx1 - kx0, a.y.data + q + c
                        )
                    else:
                        _write_largest_narrow(
                            p + c, row_step, ky1 - ky0, column_step, kx1 - kx0, a.y.data + q + c
                        )
                continue
            for c in range(channels):
                y[q + c] = 0
            for ky in range(ky0, ky1):
                p = pixel_at(a.x, n, row0 + ky * a.dilation_h, column)
                _raise_to_taps(y, q, x, p, a.dilation_w * a.x.c, kx1 - kx0, channels)


@register("pool_average", "portable", POOL, scratch=lambda record: 4 * record["channels"])
def _pool_average(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    m = carray(as_pointer(a.m), a.kernel_h * a.kernel_w + 1, np.float32)
    acc = carray(as_pointer(a.scratch + np.uintp(slot * a.scratch_size)), a.channels, np.int32)
    channels = np.uintp(a.channels)
    b, lo, hi = a.b, a.lo, a.hi
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
            start = np.int32(-a.z_x * (ky1 - ky0) * (kx1 - kx0))
            for c in range(channels):
                acc[c] = start
            for ky in range(ky0, ky1):
                for kx in range(kx0, kx1):
                    p = pixel_at(a.x, n, row0 + ky * a.dilation_h, column0 + kx * a.dilation_w)
                    for c in range(channels):
                        acc[c] += np.int32(x[p + c])
            scale = m[(cy1 - cy0) * (cx1 - cx0)]
            q = pixel_at(a.y, n, a.y.top + i, a.y.left + j)
            for c in range(channels):
                v = np.float32(acc[c]) * scale
                v = v + b
                y[q + c] = _to_code(v, lo, hi)


@njit(inline="always")
def _start(tensor, height, n, i):
    """Flat index where row i of picture n begins, or the one row, or picture, that is repeated."""
    return pixel_at(
        tensor, n if tensor.n > 1 else 0, tensor.top + (i if height > 1 else 0), tensor.left
    )


@njit(error_model="numpy")
def _repeat(source, p, step, own, pixels, channels, row):
    """Write out `pixels` pixels that lie `step` apart, from p on; of one channel if `own` is 1."""
    p, q, step, channels = np.uintp(p), np.uintp(0), np.uintp(step), np.uintp(channels)
    for _ in range(pixels):
        if own == 1:
            value = source[p]
            for c in range(channels):
                row[q + c] = value
        else:
            for c in range(channels):
                row[q + c] = source[p + c]
        p += step
        q += channels


def _of_two(value):
    """Return what computes a run of codes from two, of which `value` makes one before rounding."""
    before = njit(inline="always")(value)

    @njit(inline="always")
    def loop(kind, slope, a, x, p, r, s, y, q, count):
        p, q, s = np.uintp(p), np.uintp(q), np.uintp(s)
        z_x, z_r, m, m_r, b = np.float32(a.z_x), np.float32(a.z_r), a.m, a.m_r, a.b
        lo, hi, coefficients = a.lo, a.hi, a.coefficients
        for k in range(np.uintp(count)):
            v = before(x[p + k], r[s + k], z_x, z_r, m, m_r, b)
            y[q + k] = _to_code(activated(v, kind, slope, coefficients), lo, hi)

    @njit(error_model="numpy")
    def run(a, x, p, r, s, y, q, count):
        # A loop for each kind of function: tests inside would keep the compiler from vectors.
        slope = np.float32(0)
        if a.activation == 0:
            loop(0, slope, a, x, p, r, s, y, q, count)
        elif a.activation == PRELU:
            slope = carray(as_pointer(a.slopes), 1, np.float32)[0]
            loop(PRELU, slope, a, x, p, r, s, y, q, count)
        elif a.activation == HARD_SWISH:
            loop(HARD_SWISH, slope, a, x, p, r, s, y, q, count)
        else:
            loop(PIECEWISE, slope, a, x, p, r, s, y, q, count)

    return run


@_of_two
def _add_run(x, r, z_x, z_r, m, m_r, b):
    v = (np.float32(x) - z_x) * m
    v = v + b
    return v + (np.float32(r) - z_r) * m_r


@_of_two
def _multiply_run(x, r, z_x, z_r, m, m_r, b):
    v = (np.float32(x) - z_x) * (np.float32(r) - z_r)
    v = v * m
    return v + b


@njit(error_model="numpy")
def _binary(a, multiply, first_part, end_part, parts, slot):
    """Add or multiply all rows, or parts of rows where what is repeated must be written out."""
    x, y, r = codes(a.x).ravel(), codes(a.y).ravel(), codes(a.r).ravel()
    channels = a.channels
    x_step = a.x.c if a.x_width > 1 else 0
    r_step = a.r.c if a.r_width > 1 else 0
    x_whole = a.x.c == channels and a.x_width == a.width
    r_whole = a.r.c == channels and a.r_width == a.width
    pixels = a.width if x_whole and r_whole else a.pixels
    part = a.scratch + np.uintp(slot * a.scratch_size)
    x_row = carray(as_pointer(part), pixels * channels, np.uint8)
    r_row = carray(as_pointer(part + np.uintp(pixels * channels)), pixels * channels, np.uint8)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p, s = _start(a.x, a.x_height, n, i), _start(a.r, a.r_height, n, i)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        # What all rows and parts of a picture have in common is written once.
        fresh = item == begin or i == 0
        for j in range(0, a.width, pixels):
            count = min(pixels, a.width - j)
            x_here, p_here = x, np.int64(p) + j * x_step
            if not x_whole:
                if x_step > 0 or (j == 0 and (fresh or a.x_height > 1)):
                    _repeat(x, p_here, x_step, a.x.c, count, channels, x_row)
                x_here, p_here = x_row, 0
            r_here, s_here = r, np.int64(s) + j * r_step
            if not r_whole:
                if r_step > 0 or (j == 0 and (fresh or a.r_height > 1)):
                    _repeat(r, s_here, r_step, a.r.c, count, channels, r_row)
                r_here, s_here = r_row, 0
            q_here = np.int64(q) + j * channels
            if multiply:
                _multiply_run(a, x_here, p_here, r_here, s_here, y, q_here, count * channels)
            else:
                _add_run(a, x_here, p_here, r_here, s_here, y, q_here, count * channels)


def _binary_scratch(record):
    return 2 * record["pixels"] * record["channels"]


@register("add", "portable", BINARY, scratch=_binary_scratch)
def _add(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _binary(a, False, first_part, end_part, parts, slot)


@register("multiply", "portable", BINARY, scratch=_binary_scratch)
def _multiply(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _binary(a, True, first_part, end_part, parts, slot)


@register("copy", "portable", COPY)
def _copy(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    table = carray(as_pointer(a.table), 256, np.uint8)
    # A row whose pixels follow each other in both tensors is copied like one pixel.
    joined = a.stride_w == a.stride_c == 1 and a.channels == a.x.c and a.channels == a.y.c
    pixels = 1 if joined else a.width
    channels, step = np.uintp(a.width * a.channels // pixels), np.uintp(a.stride_c)
    x_step, y_step = a.stride_w * a.x.c, a.y.c
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.row0 + i * a.stride_h, a.column0) + np.uintp(a.channel0_x)
        q = pixel_at(a.y, n, a.row0_y + i, a.column0_y) + np.uintp(a.channel0_y)
        if a.stride_c == 1:
            move_pixels(a.x.data + p, a.y.data + q, pixels, x_step, y_step, channels, a.table)
            continue
        for _ in range(pixels):
            for c in range(channels):
                code = x[p + c * step]
                y[q + c] = table[code] if a.has_table else code
            p += np.uintp(x_step)
            q += np.uintp(y_step)


@register("gather", "portable", GATHER)
def _gather(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    indices = carray(as_pointer(a.indices), a.channels, np.int32)
    channels, step = np.uintp(a.channels), np.uintp(a.x.c)
    one, two = np.uintp(1), np.uintp(2)
    pairs = channels // two if a.interleaved else np.uintp(0)
    first, second = np.uintp(indices[0]), np.uintp(indices[min(1, a.channels - 1)])
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.x.top + i, a.x.left)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        for _ in range(a.width):
            for c in range(pairs):
                y[q + two * c] = x[p + first + c]
                y[q + two * c + one] = x[p + second + c]
            for c in range(two * pairs, channels):
                y[q + c] = x[p + np.uintp(indices[c])]
            p += step
            q += np.uintp(a.y.c)


_TABLES = 64  # that stay in the first-level cache together: 16 KB


@register("lookup_channels", "portable", CHANNEL_LOOKUP)
def _lookup_channels(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    tables = carray(as_pointer(a.tables), a.channels * 256, np.uint8)
    channels, tables_held = np.uintp(a.channels), np.uintp(_TABLES)
    rows = a.n * a.height
    blocks = (a.channels + _TABLES - 1) // _TABLES
    begin, end = share(rows * blocks, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item % rows // a.height, item % rows % a.height
        first = np.uintp(item // rows * _TABLES)
        count = min(tables_held, channels - first)
        t = first * np.uintp(256)
        p = pixel_at(a.x, n, a.x.top + i, a.x.left) + first
        q = pixel_at(a.y, n, a.y.top + i, a.y.left) + first
        for _ in range(a.width):
            for c in range(count):
                y[q + c] = tables[t + c * np.uintp(256) + np.uintp(x[p + c])]
            p += channels
            q += np.uintp(a.y.c)


@register("fill", "portable", FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    y = codes(a.y).ravel()
    value = np.uint8(a.value)
    count = np.uintp(a.width * a.channels)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        q = pixel_at(a.y, item // a.height, a.y.top + item % a.height, a.y.left)
        for j in range(count):
            y[q + j] = value


_LANES = 16  # channels that are interpolated together


@njit(error_model="numpy")
def _between_rows(x, p0, p1, v0, v1, count, row):
    """Interpolate between contiguous elements of two rows, from p0 and p1 on."""
    p0, p1 = np.uintp(p0), np.uintp(p1)
    for k in range(np.uintp(count)):
        row[k] = np.int32(v0 * np.int32(x[p0 + k])) + np.int32(v1 * np.int32(x[p1 + k]))


@njit(inline="always")
def _between(left, right, u0, u1):
    """Interpolate between two sums that `_between_rows` made."""
    return np.uint8(np.int32(u0 * left + u1 * right + 2**21) >> np.int32(22))


@intrinsic
def _vector_between(typingctx, left, right, u0, u1, target):
    """Do so with `_LANES` sums from two addresses on, and write them to a third."""

    def codegen(context, builder, signature, args):
        left, right, u0, u1, target = args
        e, kind = Emitter(builder), ir.VectorType(i32, _LANES)
        parts = [
            builder.mul(e.load(address, kind, 4), e.splat(weight, kind))
            for address, weight in ((left, u0), (right, u1))
        ]
        acc = builder.add(builder.add(*parts), e.constant(2**21, kind))
        codes = builder.trunc(builder.ashr(acc, e.constant(22, kind)), ir.VectorType(i8, _LANES))
        e.store(codes, target, 1)
        return context.get_dummy_value()

    return types.void(left, right, u0, u1, target), codegen


def _resize_scratch(record):
    """Bytes of a row of sums; the products by rows and by columns are exact in any order."""
    return 4 * record["x"]["w"] * record["channels"] if record["linear"] else 0


@register("resize", "portable", RESIZE, scratch=_resize_scratch)
def _resize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = codes(a.x).ravel(), codes(a.y).ravel()
    row0 = carray(as_pointer(a.row_index0), a.height, np.int64)
    row1 = carray(as_pointer(a.row_index1), a.height, np.int64)
    row_weight = carray(as_pointer(a.row_weight), a.height, np.int64)
    column0 = carray(as_pointer(a.column_index0), a.width, np.int64)
    column1 = carray(as_pointer(a.column_index1), a.width, np.int64)
    column_weight = carray(as_pointer(a.column_weight), a.width, np.int64)
    channels, lanes = np.uintp(a.channels), np.uintp(_LANES)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    row = carray(as_pointer(scratch), a.scratch_size // 4, np.int32)
    used = column1[a.width - 1] + 1  # columns of x
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.x.top + row0[i], a.x.left)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        if not a.linear:
            for j in range(a.width):
                p_j = p + np.uintp(column0[j]) * channels
                for c in range(channels):
                    y[q + c] = x[p_j + c]
                q += np.uintp(a.y.c)
            continue
        v0, v1 = np.int32(2048 - row_weight[i]), np.int32(row_weight[i])
        p1 = pixel_at(a.x, n, a.x.top + row1[i], a.x.left)
        _between_rows(x, p, p1, v0, v1, used * a.channels, row)
        for j in range(a.width):
            u0, u1 = np.int32(2048 - column_weight[j]), np.int32(column_weight[j])
            left, right = np.uintp(column0[j]) * channels, np.uintp(column1[j]) * channels
            for c in range(channels if channels < lanes else np.uintp(0)):
                y[q + c] = _between(row[left + c], row[right + c], u0, u1)
            for first in range(np.uintp(0), channels if channels >= lanes else np.uintp(0), lanes):
                c = min(first, channels - lanes)  # the last ones overlap others
                _vector_between(
                    scratch + (left + c) * np.uintp(4), scratch + (right + c) * np.uintp(4),
                    u0, u1, a.y.data + q + c,
                )  # fmt: skip
            q += np.uintp(a.y.c)


@njit(error_model="numpy")
def rearrange(a, x, y, first_part, end_part, parts):
    """Do what DepthToSpace does with tensors of any type."""
    size, block_first = a.blocksize, a.block_first != 0
    channels, blocks = np.uintp(a.channels), np.uintp(size * size)
    run = np.uintp(size) * channels
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for item in range(begin, end):
        n, i = item // a.height, item % a.height
        p = pixel_at(a.x, n, a.x.top + i // size, a.x.left)
        q = pixel_at(a.y, n, a.y.top + i, a.y.left)
        first = np.uintp(i % size * size)  # block of the row's first pixel
        for _ in range(a.width // size):
            if block_first:  # what one input pixel gives to a row lies side by side
                for k in range(run):
                    y[q + k] = x[p + first * channels + k]
            else:
                for j in range(np.uintp(size)):
                    for c in range(channels):
                        y[q + j * channels + c] = x[p + first + j + c * blocks]
            p += np.uintp(a.x.c)
            q += run


@register("depth_to_space", "portable", DEPTH_TO_SPACE)
def _depth_to_space(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    rearrange(a, codes(a.x).ravel(), codes(a.y).ravel(), first_part, end_part, parts)


@njit(inline="always", error_model="numpy")
def _quantized(v, scale, zero_point, top):
    v = v / scale
    if not v > -zero_point:  # also NaN
        v = -zero_point
    # Clamping before rounding gives the same code and keeps ROUND's trick in range.
    v = (min(v, top - zero_point) + ROUND) - ROUND
    return np.uint8(np.int32(v + zero_point))


_ROW_PART = 64  # pixels that are quantized channel by channel before their codes are interleaved


@njit(error_model="numpy")
def _interleave(part, part_size, y, q, step, count, channels):
    """Write rows of channels' codes, which lie `part_size` apart, pixel by pixel from q on."""
    lanes, done = np.uintp(LANES), np.uintp(0)
    x, at, x_row = np.int64(part.ctypes.data), np.int64(y.ctypes.data), np.int64(part_size)
    if channels == 3 and step == channels:  # pictures
        while done + lanes <= count:
            interleave_three(x + np.int64(done), x_row, at + np.int64(q + done * step))
            done += lanes
    elif channels >= lanes and count >= lanes:
        for j in range(np.uintp(0), count, lanes):
            pixel = min(j, count - lanes)  # the last ones overlap others
            for k in range(np.uintp(0), channels, lanes):
                c = min(k, channels - lanes)
                first, to = c * part_size + pixel, q + pixel * step + c
                transpose_bytes(x + np.int64(first), x_row, at + np.int64(to), np.int64(step))
        return
    q += done * step
    for k in range(done, count):
        for c in range(channels):
            y[q + c] = part[c * part_size + k]
        q += step


@register("quantize", "portable", QUANTIZE, scratch=lambda record: _ROW_PART * record["channels"])
def _quantize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x = carray(as_pointer(a.x.data), a.n * a.channels * a.height * a.width, np.float32)
    y = codes(a.y).ravel()
    size, part_size = a.scratch_size, np.uintp(_ROW_PART)
    part = carray(as_pointer(a.scratch + np.uintp(slot * size)), size, np.uint8)
    plane, channels = np.uintp(a.height * a.width), np.uintp(a.channels)
    step = np.uintp(a.y.c)
    scale, zero_point, top = a.scale, np.float32(a.zero_point), np.float32(a.top)
    # Pixels of a column that nothing lies beside follow each other as those of a row do.
    column = a.width == 1 and a.y.w == 1
    across = _ROW_PART if column else a.width
    down = (a.height + across - 1) // across if column else a.height
    begin, end = share(a.n * down, first_part, end_part, parts)
    if plane == 1:  # a vector of channels lies alike in both layouts
        for n in range(begin, end):
            p, q = np.uintp(n) * channels, pixel_at(a.y, n, a.y.top, a.y.left)
            for c in range(channels):
                y[q + c] = _quantized(x[p + c], scale, zero_point, top)
        return
    for item in range(begin, end):
        n, i = item // down, item % down
        p = np.uintp(n) * channels * plane + np.uintp(i * across)
        q = pixel_at(a.y, n, a.y.top + (i * across if column else i), a.y.left)
        width = np.uintp(min(across, a.height - i * across) if column else a.width)
        for j in range(np.uintp(0), width, part_size):
            count = min(part_size, width - j)
            for c in range(channels):
                for k in range(count):
                    v = x[p + c * plane + j + k]
                    part[c * part_size + k] = _quantized(v, scale, zero_point, top)
            _interleave(part, part_size, y, q, step, count, channels)
            q += count * step


@njit(error_model="numpy")
def _separate(x, p, step, part, part_size, count, channels):
    """Do the opposite of `_interleave`: rows of channels' codes of pixels from p on."""
    lanes = np.uintp(LANES)
    if channels >= lanes and count >= lanes:
        at, to = np.int64(x.ctypes.data), np.int64(part.ctypes.data)
        for j in range(np.uintp(0), count, lanes):
            pixel = min(j, count - lanes)  # the last ones overlap others
            for k in range(np.uintp(0), channels, lanes):
                c = min(k, channels - lanes)
                transpose_bytes(
                    at + np.int64(p + pixel * step + c), np.int64(step),
                    to + np.int64(c * part_size + pixel), np.int64(part_size),
                )  # fmt: skip
        return
    for k in range(count):
        for c in range(channels):
            part[c * part_size + k] = x[p + k * step + c]


@register(
    "dequantize", "portable", DEQUANTIZE, scratch=lambda record: _ROW_PART * record["channels"]
)
def _dequantize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x = codes(a.x).ravel()
    y = carray(as_pointer(a.y.data), a.n * a.channels * a.height * a.width, np.float32)
    size, part_size = a.scratch_size, np.uintp(_ROW_PART)
    part = carray(as_pointer(a.scratch + np.uintp(slot * size)), size, np.uint8)
    plane, channels = np.uintp(a.height * a.width), np.uintp(a.channels)
    step = np.uintp(a.x.c)
    scale, zero_point = a.scale, np.int32(a.zero_point)
    across, down = stretches(a, a.x)
    begin, end = share(a.n * down, first_part, end_part, parts)
    if plane == 1:
        for n in range(begin, end):
            p, q = pixel_at(a.x, n, a.x.top, a.x.left), np.uintp(n) * channels
            for c in range(channels):
                y[q + c] = np.float32(np.int32(x[p + c]) - zero_point) * scale
        return
    for item in range(begin, end):
        n, i, j, width = stretch(a, across, down, item)
        p = pixel_at(a.x, n, a.x.top + i, a.x.left + j)
        q = np.uintp(n) * channels * plane + np.uintp(i * a.width + j)
        for done in range(np.uintp(0), np.uintp(width), part_size):
            count = min(part_size, np.uintp(width) - done)
            _separate(x, p, step, part, part_size, count, channels)
            for c in range(channels):
                for k in range(count):
                    code = np.int32(part[c * part_size + k]) - zero_point
                    y[q + c * plane + done + k] = np.float32(code) * scale
            p += count * step


@register("to_channels_first", "portable", TO_CHANNELS_FIRST)
def _to_channels_first(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    plane, (across, down) = a.height * a.width, stretches(a, a.x)
    begin, end = share(a.n * down, first_part, end_part, parts)
    for item in range(begin, end):
        n, i, j, width = stretch(a, across, down, item)
        p = pixel_at(a.x, n, a.x.top + i, a.x.left + j)
        q = np.uintp(n * a.channels * plane + i * a.width + j)
        x, y = a.x.data + np.uintp(4) * p, a.y.data + np.uintp(4) * q
        transpose_rows(x, a.x.c, y, plane, width, a.channels)


# --- decoding of weights, which all families need ------------------------------------------------

_STREAM = types.uint8[::1]
for _integer in (types.int8, types.int16, types.int32):
    _signature = (_STREAM, _STREAM, _STREAM, types.int64, types.int64, _integer[::1])
    register_part("portable", "words", partial(codec.join_words.compile, _signature), lambda: True)
    register_part(
        "portable", "sums", partial(codec.channel_sums.compile, (_integer[:, ::1],)), lambda: True
    )
