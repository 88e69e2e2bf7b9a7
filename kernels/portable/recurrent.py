"""Recurrent networks: rows of a batch go together, each direction by itself.

Every gate has `padded` columns, whole vectors, so that no loop has a rest: what is beyond a state
is computed of zeros, and nobody reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from logshift.kernels import functions
from logshift.kernels.functions import fma, onnx_clip
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import share
from logshift.kernels.reference.onnx_ops import values
from logshift.kernels.reference.recurrent import (
    MAX_ROWS,
    ONNX_RECURRENT,
    length_of,
    scratch,
    time_of,
)
from logshift.kernels.registry import register

_NO_BOUND = np.float32(np.inf)


@njit(error_model="numpy")
def _products(z, z_row, h, h_row, w, w_row, y, y_row, rows, count, columns):
    """Add the products of states and weights to z, column by column; takes addresses and bytes."""
    for row in range(rows):
        first = carray(as_pointer(np.uintp(z + row * z_row)), columns, np.float32)
        state = carray(as_pointer(np.uintp(h + row * h_row)), count, np.float32)
        acc = carray(as_pointer(np.uintp(y + row * y_row)), columns, np.float32)
        for j in range(np.uintp(columns)):
            acc[j] = first[j]
        for k in range(count):
            weights = carray(as_pointer(np.uintp(w + k * w_row)), columns, np.float32)
            value = state[k]
            for j in range(np.uintp(columns)):
                acc[j] = fma(value, weights[j], acc[j])


@njit(error_model="numpy")
def _apply(function, s, first, step, rows, count, alpha, beta, bound):
    first, count = np.uintp(first), np.uintp(count)
    for _ in range(rows):
        for j in range(count):
            s[first + j] = function(onnx_clip(s[first + j], -bound, bound), alpha, beta)
        first += np.uintp(step)


_apply_by_number = functions.by_number(functions.RECURRENT_FUNCTIONS, _apply)


# What follows is done to `count` numbers of each of some rows, that lie `step` apart in s.


@njit(error_model="numpy")
def _activate(a, d, index, s, first, step, rows, count, bound):
    """Apply an activation function of a direction."""
    place = np.uintp(3 * d + index)
    number = carray(as_pointer(a.functions), 3 * a.n, np.int64)[place]
    parameters = carray(as_pointer(a.parameters), (3 * a.n, 2), np.float32)
    alpha, beta = parameters[place, 0], parameters[place, 1]
    _apply_by_number(number, s, first, step, rows, count, alpha, beta, bound)


@njit(error_model="numpy")
def _add(s, first, step, rows, b, begin, count):
    """Add what is the same for all rows."""
    first, begin = np.uintp(first), np.uintp(begin)
    for _ in range(rows):
        for j in range(np.uintp(count)):
            s[first + j] += b[begin + j]
        first += np.uintp(step)


@njit(error_model="numpy")
def _add_product(s, first, step, rows, w, begin, w_step, factor, factor_step, count):
    """Add products of what begins at `begin` of w and at `factor` of s."""
    first, begin, factor = np.uintp(first), np.uintp(begin), np.uintp(factor)
    for _ in range(rows):
        for j in range(np.uintp(count)):
            s[first + j] += w[begin + j] * s[factor + j]
        first, begin = first + np.uintp(step), begin + np.uintp(w_step)
        factor += np.uintp(factor_step)


@njit(error_model="numpy")
def _multiply(s, x, x_step, r, r_step, y, y_step, rows, count):
    x, r, y = np.uintp(x), np.uintp(r), np.uintp(y)
    for _ in range(rows):
        for j in range(np.uintp(count)):
            s[y + j] = s[x + j] * s[r + j]
        x, r, y = x + np.uintp(x_step), r + np.uintp(r_step), y + np.uintp(y_step)


@njit(error_model="numpy")
def _complement(s, x, y, step, rows, count):
    x, y, one = np.uintp(x), np.uintp(y), np.float32(1)
    for _ in range(rows):
        for j in range(np.uintp(count)):
            s[y + j] = one - s[x + j]
        x, y = x + np.uintp(step), y + np.uintp(step)


@njit(error_model="numpy")
def _blend(s, g, h, rows, size):
    """Blend the old state, and the new one that the third gate holds, by the first."""
    update, new, h, one = np.uintp(g), np.uintp(g + 2 * size), np.uintp(h), np.float32(1)
    for _ in range(rows):
        for j in range(np.uintp(size)):
            s[h + j] = (one - s[update + j]) * s[new + j] + s[update + j] * s[h + j]
        update, new = update + np.uintp(4 * size), new + np.uintp(4 * size)
        h += np.uintp(size)


@njit(error_model="numpy")
def _renew(s, g, c, rows, size):
    """Renew a cell, and write it over the first gate, which then is done with."""
    of_i, of_f, new = np.uintp(g), np.uintp(g + 2 * size), np.uintp(g + 3 * size)
    c, step = np.uintp(c), np.uintp(4 * size)
    for _ in range(rows):
        for j in range(np.uintp(size)):
            v = s[of_f + j] * s[c + j] + s[of_i + j] * s[new + j]
            s[c + j] = v
            s[of_i + j] = v
        of_i, of_f, new, c = of_i + step, of_f + step, new + step, c + np.uintp(size)


@njit(error_model="numpy")
def _lstm_states(a, d, s, g, h, c, rows, size):
    """Make states and cells from gates, of which a row has four."""
    step, weights, first = 4 * size, values(a.peepholes), 3 * size * d
    has_peepholes, coupled = a.peepholes.data != 0, a.input_forget != 0
    _add(s, g, step, rows, values(a.b), first + size * d, step)
    if not has_peepholes and not coupled:
        _activate(a, d, 0, s, g, step, rows, 3 * size, a.clip)
    else:
        of_f = g + 2 * size
        if has_peepholes:
            _add_product(s, g, step, rows, weights, first, 0, c, size, size)
            _add_product(s, of_f, step, rows, weights, first + 2 * size, 0, c, size, size)
        _activate(a, d, 0, s, g, step, rows, size, a.clip)
        if coupled:
            _complement(s, g, of_f, step, rows, size)
        else:
            _activate(a, d, 0, s, of_f, step, rows, size, a.clip)
    _activate(a, d, 1, s, g + 3 * size, step, rows, size, a.clip)
    _renew(s, g, c, rows, size)
    of_o = g + size
    if has_peepholes:
        _add_product(s, of_o, step, rows, weights, first + size, 0, c, size, size)
    if has_peepholes or coupled:
        _activate(a, d, 0, s, of_o, step, rows, size, a.clip)
    _activate(a, d, 2, s, g, step, rows, size, _NO_BOUND)
    _multiply(s, of_o, step, g, step, h, size, rows, size)


@njit(error_model="numpy")
def values_at(address):
    """Return the float32 that begin at an address."""
    return carray(as_pointer(address), 2**40, np.float32)


@njit(error_model="numpy")
def _begin(a, d, row, rows, s, h, c):
    """Set the states of some rows; zeros where nothing else is said."""
    size = a.padded
    s[h : h + rows * size] = 0
    s[c : c + rows * size] = 0
    for i in range(rows):
        state = d * a.state_direction + (row + i) * a.state_row
        if a.initial_h.data != 0:
            _copy(values(a.initial_h), state, s, h + i * size, a.channels)
        if a.initial_c.data != 0:
            _copy(values(a.initial_c), state, s, c + i * size, a.channels)


@njit(error_model="numpy")
def _end(a, d, row, rows, s, h, c):
    for i in range(rows):
        state = d * a.state_direction + (row + i) * a.state_row
        if a.y_h.data != 0:
            _copy(s, h + i * a.padded, values(a.y_h), state, a.channels)
        if a.y_c.data != 0:
            _copy(s, c + i * a.padded, values(a.y_c), state, a.channels)


@njit(error_model="numpy")
def _copy(x, p, y, q, count):
    p, q = np.uintp(p), np.uintp(q)
    for j in range(np.uintp(count)):
        y[q + j] = x[p + j]


@njit(error_model="numpy")
def _clear(y, q, count):
    q = np.uintp(q)
    for j in range(np.uintp(count)):
        y[q + j] = 0


def kernels(products: Any) -> dict[str, Any]:
    """Return the kernels of all operators, by these, with what computes products."""

    @njit(error_model="numpy")
    def of_rnn(a, d, z, s, g, h, c, zeros, rows):
        at, size = np.int64(s.ctypes.data), a.padded
        w = np.int64(a.weights.data) + 4 * d * a.channels * size
        products(
            z, 4 * a.x_row, at + 4 * h, 4 * size, w, 4 * size, at + 4 * g, 4 * size, rows,
            a.channels, size,
        )  # fmt: skip
        _add(s, g, size, rows, values(a.b), d * size, size)
        _activate(a, d, 0, s, g, size, rows, size, a.clip)
        _copy(s, g, s, h, rows * size)

    @njit(error_model="numpy")
    def of_gru(a, d, z, s, g, h, c, zeros, rows):
        at, size = np.int64(s.ctypes.data), a.padded
        w, w_row = np.int64(a.weights.data) + 12 * d * a.channels * size, 12 * size
        step, reset, new, inner = 4 * size, g + size, g + 2 * size, g + 3 * size
        b, first = values(a.b), 4 * size * d
        products(
            z, 4 * a.x_row, at + 4 * h, 4 * size, w, w_row, at + 4 * g, 4 * step, rows,
            a.channels, 2 * size,
        )  # fmt: skip
        _add(s, g, step, rows, b, first, 2 * size)
        _activate(a, d, 0, s, g, step, rows, 2 * size, a.clip)
        if a.linear_before_reset:
            products(
                at + 4 * zeros, 0, at + 4 * h, 4 * size, w + 8 * size, w_row, at + 4 * inner,
                4 * step, rows, a.channels, size,
            )  # fmt: skip
            _add(s, inner, step, rows, b, first + 3 * size, size)
            for i in range(rows):
                x = values_at(np.uintp(z + 4 * a.x_row * i))
                _copy(x, 2 * size, s, new + step * i, size)
            _add(s, new, step, rows, b, first + 2 * size, size)
            _add_product(s, new, step, rows, s, reset, step, inner, step, size)
        else:
            _multiply(s, reset, step, h, size, c, size, rows, size)
            products(
                z + 8 * size, 4 * a.x_row, at + 4 * c, 4 * size, w + 8 * size, w_row,
                at + 4 * new, 4 * step, rows, a.channels, size,
            )  # fmt: skip
            _add(s, new, step, rows, b, first + 2 * size, size)
        _activate(a, d, 1, s, new, step, rows, size, a.clip)
        _blend(s, g, h, rows, size)

    @njit(error_model="numpy")
    def of_lstm(a, d, z, s, g, h, c, zeros, rows):
        at, size = np.int64(s.ctypes.data), a.padded
        w = np.int64(a.weights.data) + 16 * d * a.channels * size
        products(
            z, 4 * a.x_row, at + 4 * h, 4 * size, w, 16 * size, at + 4 * g, 16 * size, rows,
            a.channels, 4 * size,
        )  # fmt: skip
        _lstm_states(a, d, s, g, h, c, rows, size)

    steps = {"onnx_rnn": of_rnn, "onnx_gru": of_gru, "onnx_lstm": of_lstm}
    return {op: _kernel(step) for op, step in steps.items()}


def _kernel(step: Any) -> Any:
    """Return the kernel that takes such steps."""

    def kernel(arguments, first_part, end_part, parts, slot):
        a = carray(arguments, 1)[0]
        y, size = values(a.y), a.padded
        s = values_at(a.scratch + np.uintp(slot * a.scratch_size))
        h, c = 4 * MAX_ROWS * size, 5 * MAX_ROWS * size
        zeros = 8 * MAX_ROWS * size
        s[zeros : zeros + size] = 0
        # Rows that are not equally long have nothing in common.
        most = MAX_ROWS if a.lengths.data == 0 else 1
        blocks = (a.width + most - 1) // most
        begin, end = share(a.n * blocks, first_part, end_part, parts)
        for item in range(begin, end):
            d, row = item // blocks, item % blocks * most
            rows, length = min(most, a.width - row), length_of(a, row)
            _begin(a, d, row, rows, s, h, c)
            of_x = np.int64(a.x.data) + 4 * (row * a.x_row + d * a.x_direction)
            q = row * a.y_row + d * a.y_direction
            if a.y.data != 0:
                for time in range(length, a.height):
                    _clear(y, q + time * a.y_time, a.channels)
            for number in range(length):
                time = time_of(a, d, number, length)
                step(a, d, of_x + 4 * time * a.x_time, s, 0, h, c, zeros, rows)
                if a.y.data != 0:
                    for i in range(rows):
                        _copy(s, h + i * size, y, q + time * a.y_time + i * a.y_row, a.channels)
            _end(a, d, row, rows, s, h, c)

    return kernel


def pieces(record):
    """How many blocks of rows there are."""
    return int(record["n"]) * -(-int(record["width"]) // MAX_ROWS)


for _op, _function in kernels(_products).items():
    register(_op, "portable", ONNX_RECURRENT, scratch=scratch, pieces=pieces)(_function)
