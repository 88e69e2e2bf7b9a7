"""The definition of every kernel of ONNX operators in ONNX's form, in plain loops."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import functions
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import ADDRESS, FLOAT, INT, OUTPUT, SCRATCH, TENSOR, record
from logshift.kernels.registry import register

_MOST = 2**40  # elements that an address is given; indices were checked when the plan was made
# Tensors are float32, contiguous and of any rank: of a TENSOR record only the address counts.
# `axes`, int64 (rank, columns), has a row for each axis of the output, at least two: its size, and
# how far apart its positions lie in y, x and r; 0 where x or r is repeated.
_AXES = {"axes": ADDRESS, "rank": INT}


@njit(inline="always", error_model="numpy")
def values(tensor):
    """Return what begins at the address of a TENSOR record, as float32."""
    return carray(as_pointer(tensor.data), _MOST, np.float32)


@njit(inline="always", error_model="numpy")
def axes_of(a, columns):
    """Return sizes and steps of all axes."""
    return carray(as_pointer(a.axes), (a.rank, columns), np.int64)


@njit(inline="always", error_model="numpy")
def row_of(axes, row, column):
    """Where a row begins: its number counts over all axes but the last."""
    place, rest = 0, row
    for axis in range(len(axes) - 2, -1, -1):
        place += rest % axes[axis, 0] * axes[axis, column]
        rest //= axes[axis, 0]
    return place


@njit
def place(axes, element, column):
    """Where an element is: its number counts over all axes."""
    size, step = axes[-1, 0], axes[-1, column]
    return row_of(axes, element // size, column) + element % size * step


@njit
def _count(axes):
    count = 1
    for axis in range(len(axes)):
        count *= axes[axis, 0]
    return count


# Elements of x from `start_x` on go to where they belong in y, from `start_y` on.
ONNX_MOVE = record(**OUTPUT, **_AXES, start_x=INT, start_y=INT)


@register("onnx_move", "reference", ONNX_MOVE)
def _move(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    for i in range(_count(axes)):
        y[a.start_y + place(axes, i, 1)] = x[a.start_x + place(axes, i, 2)]


# n elements of y become one number.
ONNX_FILL = record(**OUTPUT, value=FLOAT)


@register("onnx_fill", "reference", ONNX_FILL)
def _fill(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part == 0:
        values(a.y)[: a.n] = a.value


# `function`: its place in `functions.ONNX_BINARY_FUNCTIONS`. Along the last axis x and r are
# contiguous, or one of them is repeated.
ONNX_BINARY = record(**OUTPUT, r=TENSOR, **_AXES, function=INT)
_binary_by_number = functions.by_number(functions.ONNX_BINARY_FUNCTIONS)


@register("onnx_binary", "reference", ONNX_BINARY)
def _binary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, r, y, axes = values(a.x), values(a.r), values(a.y), axes_of(a, 4)
    for i in range(_count(axes)):
        left, right = x[place(axes, i, 2)], r[place(axes, i, 3)]
        v = _binary_by_number(a.function, left, right)
        y[place(axes, i, 1)] = v


# Of n elements; `function`: its place in `functions.ONNX_UNARY_FUNCTIONS`.
ONNX_UNARY = record(**OUTPUT, function=INT, alpha=FLOAT, beta=FLOAT)
_unary_by_number = functions.by_number(functions.ONNX_UNARY_FUNCTIONS)


@register("onnx_unary", "reference", ONNX_UNARY)
def _unary(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = values(a.x), values(a.y)
    for i in range(a.n):
        y[i] = _unary_by_number(a.function, x[i], a.alpha, a.beta)


# What lies along the axes of `reduced`, int64 (reduced_rank, 2): sizes, and distances in x.
# `function`: its place in `functions.ONNX_REDUCTIONS`; the mean is the sum, divided, and a norm the
# root of one of squares.
ONNX_REDUCE = record(
    **OUTPUT, **_AXES, reduced=ADDRESS, reduced_rank=INT, function=INT, divisor=INT, root=INT,
    **SCRATCH,
)  # fmt: skip
_reduce_by_number = functions.by_number(functions.ONNX_REDUCTIONS)


@register("onnx_reduce", "reference", ONNX_REDUCE)
def _reduce(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y, axes = values(a.x), values(a.y), axes_of(a, 3)
    reduced = carray(as_pointer(a.reduced), (a.reduced_rank, 2), np.int64)
    for i in range(_count(axes)):
        total = functions.FIRST_TOTALS[a.function]
        for k in range(_count(reduced)):
            v = np.float64(x[place(axes, i, 2) + place(reduced, k, 1)])
            total = _reduce_by_number(a.function, v, total)
        total = total / np.float64(a.divisor)
        y[place(axes, i, 1)] = np.float32(np.sqrt(total) if a.root else total)


# y = x r: matrices of `height` rows and `count` columns times such of `count` and `width`. `axes`
# are those before the last two.
ONNX_MATMUL = record(**OUTPUT, r=TENSOR, **_AXES, count=INT)


@register("onnx_matmul", "reference", ONNX_MATMUL)
def _matmul(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, r, y, axes = values(a.x), values(a.r), values(a.y), axes_of(a, 4)
    for n in range(a.n):
        q, p, s = place(axes, n, 1), place(axes, n, 2), place(axes, n, 3)
        for i in range(a.height):
            for j in range(a.width):
                acc = np.float32(0)
                for k in range(a.count):
                    acc = functions.fma(x[p + i * a.count + k], r[s + k * a.width + j], acc)
                y[q + i * a.width + j] = acc


# Of (n, height, width), along `height`.
ONNX_SOFTMAX = record(**OUTPUT, **SCRATCH)


@register("onnx_softmax", "reference", ONNX_SOFTMAX)
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
                y[n, i, j] = functions.onnx_exp(x[n, i, j] - top, zero, zero)
                total = total + np.float64(y[n, i, j])
            for i in range(a.height):
                y[n, i, j] = y[n, i, j] / np.float32(total)
