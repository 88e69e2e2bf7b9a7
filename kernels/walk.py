"""Walks over output pixels: what each reads, where it is written, and what runs at an edge."""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter
from logshift.kernels.machine.native import as_pointer, call_tile


@njit(inline="always", error_model="numpy")
def position(a, number):
    """Picture, row and column of an output pixel, counted over all pictures."""
    j = number % a.width
    i = number // a.width % a.height
    return number // (a.width * a.height), i, j


@njit(inline="always")
def pixel_at(tensor, n, row, column):
    """Flat index of the first channel of a pixel; row and column are those of the buffer."""
    return np.uintp(((n * tensor.h + row) * tensor.w + column) * tensor.c)


_STRETCH = 256  # pixels


@njit(inline="always", error_model="numpy")
def stretches(a, tensor):
    """Pixels that are taken at once, and how many times in a picture.

    They are those of a row, or of several if nothing of the tensor lies between these.
    """
    if tensor.w != a.width:
        return a.width, a.height
    return _STRETCH, (a.height * a.width + _STRETCH - 1) // _STRETCH


@njit(inline="always", error_model="numpy")
def stretch(a, across, down, item):
    """Picture, row and column where some of these begin, and how many pixels they are."""
    n, first = item // down, item % down * across
    count = min(across, a.height * a.width - first)
    return n, first // a.width, first % a.width, count


@njit(inline="always", error_model="numpy")
def first_input(a, number):
    """Flat index of the first input of an output pixel, counted over all pictures."""
    n, i, j = position(a, number)
    row, column = a.row0 + i * a.stride_h, a.column0 + j * a.stride_w
    return ((n * a.x.h + row) * a.x.w + column) * a.x.c


@njit(inline="always", error_model="numpy")
def address_of(tensor, n, row, column, channel, size):
    """Address of a channel of a pixel of a TENSOR record; `size` bytes a channel."""
    pixel = (n * tensor.h + row) * tensor.w + column
    return np.int64(tensor.data) + size * (pixel * tensor.c + channel)


@njit(inline="always", error_model="numpy")
def places_of(a, n, i, j, x0, o0, size, y_size):
    """Addresses of an output pixel's first input, of its output and of its residual.

    Channels are counted from x0 and o0 on; inputs and residuals have `size` bytes, outputs y_size.
    """
    row, column = a.row0 + i * a.stride_h, a.column0 + j * a.stride_w
    x = address_of(a.x, n, row, column, x0, size)
    row, column = i * a.step_h, j * a.step_w
    y = address_of(a.y, n, a.y.top + row, a.y.left + column, o0, y_size)
    r = address_of(a.r, n, a.r.top + row, a.r.left + column, o0, size)
    return x, y, r


@njit(inline="always")
def taps_within(low, high, first, stride, count):
    """First and end of the taps `first + k * stride`, k < count, that lie in [low, high)."""
    begin = 0 if first >= low else (low - first + stride - 1) // stride
    end = count if first + (count - 1) * stride < high else (high - first + stride - 1) // stride
    return begin, max(begin, end)


@njit(error_model="numpy")
def single_pixels(a, t, valid, scratch):
    """Run the microkernel of one pixel for each of the few that are left."""
    x, y, r = t.x, t.y, t.r
    for _ in range(valid):
        call_tile(a.single, scratch)
        t.x, t.y, t.r = t.x + np.uintp(8), t.y + np.uintp(8), t.r + np.uintp(8)
    t.x, t.y, t.r = x, y, r


@njit(error_model="numpy")
def copy_bytes(source, target, count):
    """Copy what lies at an address, such as the channels that exist of a block, to another one."""
    source = carray(as_pointer(np.uintp(source)), count, np.uint8)
    target = carray(as_pointer(np.uintp(target)), count, np.uint8)
    for byte in range(np.uintp(count)):
        target[byte] = source[byte]


@intrinsic
def _copy_number(typingctx, source, target, number):
    """Copy a number of the type of `number` from an address to another, wherever they are."""

    def codegen(context, builder, signature, args):
        source, target, number = args
        e = Emitter(builder)
        e.store(e.load(source, number.type, 1), target, 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, number), codegen


@njit(error_model="numpy")
def scatter_bytes(source, step, targets, count, size):
    """Copy `size` bytes each to the addresses in a table, from addresses that lie `step` apart."""
    y = carray(as_pointer(targets), count, np.uintp)
    for q in range(count):
        # Of a few channels each pixel is one number.
        if size == 1:
            _copy_number(source, y[q], np.uint8(0))
        elif size == 2:
            _copy_number(source, y[q], np.uint16(0))
        elif size == 4:
            _copy_number(source, y[q], np.uint32(0))
        else:
            copy_bytes(source, y[q], size)
        source += np.uintp(step)
