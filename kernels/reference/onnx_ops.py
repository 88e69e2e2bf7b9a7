"""The definition of every kernel of ONNX operators in ONNX's form, in plain loops."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import functions, records
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.onnx_ops import axes_of, row_of, values
from logshift.kernels.registry import register


@njit
def _place(axes, element, column):
    """Where an element is: its number counts over all axes."""
    size, step = axes[-1, 0], axes[-1, column]
    return row_of(axes, element // size, column) + element % size * step


@njit
def _count(axes):
    count = 1
    for axis in range(len(axes)):
        count *= axes[axis, 0]
    return count


@register("plain_move", "reference", records.PLAIN_MOVE)
def _move(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    for i in range(_count(axes)):
        y[a.start_y + _place(axes, i, 1)] = x[a.start_x + _place(axes, i, 2)]


@register("plain_binary", "reference", records.PLAIN_BINARY)
def _binary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, r, y, axes = values(a.x), values(a.r), values(a.y), axes_of(a, 4)
    for i in range(_count(axes)):
        left, right = x[_place(axes, i, 2)], r[_place(axes, i, 3)]
        if a.function == 0:
            v = left + right
        elif a.function == 1:
            v = left - right
        elif a.function == 2:
            v = left * right
        elif a.function == 3:
            v = functions.div(left, right)
        elif a.function == 4:
            v = functions.maximum(left, right)
        elif a.function == 5:
            v = functions.minimum(left, right)
        else:
            v = functions.prelu(left, right)
        y[_place(axes, i, 1)] = v


@register("plain_unary", "reference", records.PLAIN_UNARY)
def _unary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = values(a.x), values(a.y)
    for i in range(a.n):
        y[i] = functions.plain_unary(a.function, x[i], a.alpha, a.beta)


@register("plain_reduce", "reference", records.PLAIN_REDUCE)
def _reduce(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    reduced = carray(as_pointer(a.reduced), (a.reduced_rank, 2), np.int64)
    for i in range(_count(axes)):
        total = 0.0 if a.function == 0 else (-np.inf if a.function == 1 else np.inf)
        for k in range(_count(reduced)):
            v = np.float64(x[_place(axes, i, 2) + _place(reduced, k, 1)])
            if a.function == 0:
                total = total + v
            elif a.function == 1:
                total = functions.maximum(v, total)
            else:
                total = functions.minimum(v, total)
        y[_place(axes, i, 1)] = np.float32(total / np.float64(a.divisor))


@register("plain_softmax", "reference", records.PLAIN_SOFTMAX)
def _softmax(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    shape, zero = (a.n, a.height, a.width), np.float32(0)
    x = carray(as_pointer(a.x.data), shape, np.float32)
    y = carray(as_pointer(a.y.data), shape, np.float32)
    for n in range(a.n):
        for j in range(a.width):
            top = np.float32(-np.inf)
            for i in range(a.height):
                top = functions.maximum(x[n, i, j], top)
            total = 0.0
            for i in range(a.height):
                y[n, i, j] = functions.plain_exp(x[n, i, j] - top, zero, zero)
                total = total + np.float64(y[n, i, j])
            for i in range(a.height):
                y[n, i, j] = y[n, i, j] / np.float32(total)
