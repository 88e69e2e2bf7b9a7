"""Kernels of ONNX operators in ONNX's form: float32 tensors of any rank, without a border.

Sums are made in float64, in ONNX's order of elements, and rounded once; everything else is one
operation per element, or one of `functions`.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import functions
from logshift.kernels.functions import fma, maximum, onnx_exp
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.lanes import LANES, divide, largest_of, transpose_rows
from logshift.kernels.records import share
from logshift.kernels.reference.onnx_ops import (
    ONNX_BINARY,
    ONNX_FILL,
    ONNX_MATMUL,
    ONNX_MOVE,
    ONNX_REDUCE,
    ONNX_SOFTMAX,
    ONNX_UNARY,
    axes_of,
    place,
    row_of,
    values,
)
from logshift.kernels.registry import register

_TILE = 16  # rows that are moved together where x is contiguous across them
_COLUMNS = 64  # outputs next to each other whose sums are made at the same time
_APART = 8  # as many where what they read is not contiguous
_ROW = 1024  # elements of a row whose softmax is computed in a copy
_SIZE, _Y, _X, _R = range(4)  # columns of `axes`


@njit(inline="always", error_model="numpy")
def _rows(axes):
    count = 1
    for axis in range(len(axes) - 1):
        count *= axes[axis, 0]
    return count


# --- moves ---------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _move_rows(x, p, x_row, x_step, y, q, y_row, y_step, rows, count):
    p, x_row, x_step = np.uintp(p), np.uintp(x_row), np.uintp(x_step)  # they may be negative
    q, y_row, y_step = np.uintp(q), np.uintp(y_row), np.uintp(y_step)
    rows, count = np.uintp(rows), np.uintp(count)
    if x_step == 1 and y_step == 1:
        for _ in range(rows):
            for j in range(count):
                y[q + j] = x[p + j]
            p += x_row
            q += y_row
    elif x_row == 1 and y_step == 1 and rows >= LANES and count >= LANES:
        x_at, y_at = x.ctypes.data + np.uintp(4) * p, y.ctypes.data + np.uintp(4) * q
        transpose_rows(x_at, x_step, y_at, y_row, count, rows)
    elif x_row == 1 and rows > 1:
        # Whole lines of the cache are read: of some rows all columns, one after another.
        for first in range(np.uintp(0), rows, np.uintp(_TILE)):
            tile = min(np.uintp(_TILE), rows - first)
            for j in range(count):
                p0, q0 = p + first + j * x_step, q + first * y_row + j * y_step
                for k in range(tile):
                    y[q0 + k * y_row] = x[p0 + k]
    else:
        for _ in range(rows):
            for j in range(count):
                y[q + j * y_step] = x[p + j * x_step]
            p += x_row
            q += y_row


@register("onnx_move", "portable", ONNX_MOVE)
def _move(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    middle, inner = axes[-2], axes[-1]
    row, end = share(_rows(axes), first_part, end_part, parts)
    while row < end:
        rows = min(middle[_SIZE] - row % middle[_SIZE], end - row)
        p, q = a.start_x + row_of(axes, row, _X), a.start_y + row_of(axes, row, _Y)
        _move_rows(x, p, middle[_X], inner[_X], y, q, middle[_Y], inner[_Y], rows, inner[_SIZE])
        row += rows


@register("onnx_fill", "portable", ONNX_FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    y, value = values(a.y), a.value
    begin, end = share(a.n, first_part, end_part, parts)
    for j in range(np.uintp(begin), np.uintp(end)):
        y[j] = value


# --- element by element ---------------------------------------------------------------------------


@njit(error_model="numpy")
def _binary_rows(operation, a, first_part, end_part, parts):
    x, r, y, axes = values(a.x), values(a.r), values(a.y), axes_of(a, 4)
    middle, inner = axes[-2], axes[-1]
    count = np.uintp(inner[_SIZE])
    row, end = share(_rows(axes), first_part, end_part, parts)
    while row < end:
        rows = min(middle[_SIZE] - row % middle[_SIZE], end - row)
        p, s, q = row_of(axes, row, _X), row_of(axes, row, _R), row_of(axes, row, _Y)
        row += rows
        for _ in range(rows):
            p0, s0, q0 = np.uintp(p), np.uintp(s), np.uintp(q)
            if inner[_R] == 0:
                value = r[s0]
                for j in range(count):
                    y[q0 + j] = operation(x[p0 + j], value)
            elif inner[_X] == 0:
                value = x[p0]
                for j in range(count):
                    y[q0 + j] = operation(value, r[s0 + j])
            else:
                for j in range(count):
                    y[q0 + j] = operation(x[p0 + j], r[s0 + j])
            p += middle[_X]
            s += middle[_R]
            q += middle[_Y]


_binary_by_number = functions.by_number(functions.ONNX_BINARY_FUNCTIONS, _binary_rows)


@register("onnx_binary", "portable", ONNX_BINARY)
def _binary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _binary_by_number(a.function, a, first_part, end_part, parts)


@njit(error_model="numpy")
def _apply(function, a, first_part, end_part, parts):
    x, y = values(a.x), values(a.y)
    alpha, beta = a.alpha, a.beta
    begin, end = share(a.n, first_part, end_part, parts)
    for j in range(np.uintp(begin), np.uintp(end)):
        y[j] = function(x[j], alpha, beta)


_apply_by_number = functions.by_number(functions.ONNX_UNARY_FUNCTIONS, _apply)


@register("onnx_unary", "portable", ONNX_UNARY)
def _unary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _apply_by_number(a.function, a, first_part, end_part, parts)


# --- along axes -----------------------------------------------------------------------------------


@njit(error_model="numpy")
def _reduce_columns(x, p, apart, columns, count, step, acc, operation):
    """Add `count` elements, that lie `step` apart, to each of some columns."""
    p, step, apart, columns = np.uintp(p), np.uintp(step), np.uintp(apart), np.uintp(columns)
    for _ in range(count):
        if apart == 1:
            for j in range(columns):
                acc[j] = operation(np.float64(x[p + j]), acc[j])
        else:
            for j in range(columns):
                acc[j] = operation(np.float64(x[p + j * apart]), acc[j])
        p += step


@njit(error_model="numpy")
def _reduce_rows(operation, a, first_part, end_part, parts, slot):
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    initial = functions.FIRST_TOTALS[a.function]
    reduced = carray(as_pointer(a.reduced), (a.reduced_rank, 2), np.int64)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    acc = carray(as_pointer(scratch), _COLUMNS, np.float64)
    inner, innermost, divisor = axes[-1], reduced[-1], np.float64(a.divisor)
    most = _COLUMNS if inner[_X] == 1 else _APART
    blocks = (inner[_SIZE] + most - 1) // most
    begin, end = share(_rows(axes) * blocks, first_part, end_part, parts)
    for item in range(begin, end):
        row, first = item // blocks, item % blocks * most
        columns = min(most, inner[_SIZE] - first)
        p = row_of(axes, row, _X) + first * inner[_X]
        q, y_step = np.uintp(row_of(axes, row, _Y) + first * inner[_Y]), np.uintp(inner[_Y])
        if columns == 1:
            total, step = initial, np.uintp(innermost[1])
            for i in range(_rows(reduced)):
                p0 = np.uintp(p + row_of(reduced, i, 1))
                for _ in range(innermost[_SIZE]):
                    total = operation(np.float64(x[p0]), total)
                    p0 += step
            total = total / divisor
            y[q] = np.float32(np.sqrt(total) if a.root else total)
            continue
        acc[:columns] = initial
        for i in range(_rows(reduced)):
            p0 = p + row_of(reduced, i, 1)
            _reduce_columns(
                x, p0, inner[_X], columns, innermost[_SIZE], innermost[1], acc, operation
            )
        for j in range(np.uintp(columns)):
            total = acc[j] / divisor
            y[q + j * y_step] = np.float32(np.sqrt(total) if a.root else total)


_reduce_by_number = functions.by_number(functions.ONNX_REDUCTIONS, _reduce_rows)


@register("onnx_reduce", "portable", ONNX_REDUCE, scratch=lambda record: 8 * _COLUMNS)
def _reduce(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    _reduce_by_number(a.function, a, first_part, end_part, parts, slot)


@njit(error_model="numpy")
def _raise_columns(x, p, columns, count, step, top):
    """Raise each of some columns to the largest of `count` elements, that lie `step` apart."""
    p, step, columns = np.uintp(p), np.uintp(step), np.uintp(columns)
    for _ in range(count):
        for j in range(columns):
            top[j] = maximum(x[p + j], top[j])
        p += step


@njit(error_model="numpy")
def _largest(x, p, count):
    """Return the largest of contiguous elements; they may be looked at in any order."""
    if count >= LANES:
        return largest_of(np.int64(x.ctypes.data) + 4 * p, count)
    largest, p = np.float32(-np.inf), np.uintp(p)
    for i in range(np.uintp(count)):
        largest = maximum(x[p + i], largest)
    return largest


@njit(error_model="numpy")
def _raise_row(x, p, count, largest, row):
    """Write e to the power of contiguous elements, less the largest of them."""
    lanes, zero = np.uintp(LANES), np.float32(0)
    if count < LANES:
        for i in range(np.uintp(count)):
            row[i] = onnx_exp(x[np.uintp(p) + i] - largest, zero, zero)
    for begin in range(0, count if count >= LANES else 0, LANES):
        q = np.uintp(min(begin, count - LANES))
        first = np.uintp(p) + q
        for j in range(lanes):  # one vector
            row[q + j] = onnx_exp(x[first + j] - largest, zero, zero)


@njit(error_model="numpy")
def _softmax_rows(x, y, p, rows, count, part):
    """Softmax of up to four rows of contiguous elements, from p on; `part` has as many rows."""
    for row in range(rows):
        at = p + row * count
        _raise_row(x, at, count, _largest(x, at, count), part[row])
    # A sum's additions wait for each other, those of other rows need not wait for them.
    total0 = total1 = total2 = total3 = 0.0
    first, second, third, fourth = part[0], part[1], part[2], part[3]
    for i in range(np.uintp(count)):
        total0 += np.float64(first[i])
        total1 += np.float64(second[i])
        total2 += np.float64(third[i])
        total3 += np.float64(fourth[i])
    totals = (total0, total1, total2, total3)
    for row in range(rows):
        powers, divisor, q = part[row], np.float32(totals[row]), p + row * count
        if count >= LANES:
            divide(powers.ctypes.data, divisor, np.int64(y.ctypes.data) + 4 * q, count)
        else:
            for i in range(np.uintp(count)):
                y[np.uintp(q) + i] = powers[i] / divisor


@njit(error_model="numpy")
def _softmax_long_row(x, y, p, count):
    """Softmax of more elements than are worth a copy."""
    largest, total = _largest(x, p, count), 0.0
    p, zero = np.uintp(p), np.float32(0)
    for i in range(np.uintp(count)):
        y[p + i] = onnx_exp(x[p + i] - largest, zero, zero)
    for i in range(np.uintp(count)):
        total += np.float64(y[p + i])
    divisor = np.float32(total)
    for i in range(np.uintp(count)):
        y[p + i] /= divisor


@njit(error_model="numpy")
def _softmax_columns(x, y, p, columns, count, step, top, total):
    """Softmax of some columns; their elements lie `step` apart, from p on."""
    top[:columns], total[:columns] = -np.inf, 0
    _raise_columns(x, p, columns, count, step, top)
    columns, step, zero = np.uintp(columns), np.uintp(step), np.float32(0)
    p0 = np.uintp(p)
    for _ in range(count):
        for j in range(columns):
            y[p0 + j] = onnx_exp(x[p0 + j] - top[j], zero, zero)
        for j in range(columns):
            total[j] += np.float64(y[p0 + j])
        p0 += step
    for j in range(columns):
        top[j] = np.float32(total[j])
    p0 = np.uintp(p)
    for _ in range(count):
        for j in range(columns):
            y[p0 + j] /= top[j]
        p0 += step


@register(
    "onnx_softmax", "portable", ONNX_SOFTMAX, scratch=lambda record: 12 * _COLUMNS + 16 * _ROW
)
def _softmax(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = values(a.x), values(a.y)
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    total = carray(as_pointer(scratch), _COLUMNS, np.float64)
    top = carray(as_pointer(scratch + np.uintp(8 * _COLUMNS)), _COLUMNS, np.float32)
    blocks = (a.width + _COLUMNS - 1) // _COLUMNS
    begin, end = share(a.n * blocks, first_part, end_part, parts)
    if a.width == 1 and a.height <= _ROW:
        part = carray(as_pointer(scratch + np.uintp(12 * _COLUMNS)), (4, _ROW), np.float32)
        for n in range(begin, end, 4):
            _softmax_rows(x, y, n * a.height, min(4, end - n), a.height, part)
        return
    if a.width == 1:
        for n in range(begin, end):
            _softmax_long_row(x, y, n * a.height, a.height)
        return
    for item in range(begin, end):
        n, first = item // blocks, item % blocks * _COLUMNS
        p, columns = n * a.height * a.width + first, min(_COLUMNS, a.width - first)
        _softmax_columns(x, y, p, columns, a.height, a.width, top, total)


# --- products ------------------------------------------------------------------------------------


@register("onnx_matmul", "portable", ONNX_MATMUL)
def _matmul(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, r, y, axes = values(a.x), values(a.r), values(a.y), axes_of(a, 4)
    columns, one = np.uintp(a.width), np.uintp(1)
    begin, end = share(a.n * a.height, first_part, end_part, parts)
    for row in range(begin, end):
        matrix, i = row // a.height, row % a.height
        q = np.uintp(place(axes, matrix, 1) + i * a.width)
        p = np.uintp(place(axes, matrix, 2) + i * a.count)
        s = np.uintp(place(axes, matrix, 3))
        for j in range(columns):
            y[q + j] = 0
        for _ in range(a.count):
            value = x[p]
            for j in range(columns):
                y[q + j] = fma(value, r[s + j], y[q + j])
            p += one
            s += columns
