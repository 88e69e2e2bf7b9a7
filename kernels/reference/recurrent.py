"""The definition of recurrent networks, in plain loops."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels import functions
from logshift.kernels.functions import fma, onnx_clip
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import ADDRESS, FLOAT, INT, OUTPUT, SCRATCH, TENSOR, record
from logshift.kernels.reference.onnx_ops import values
from logshift.kernels.registry import register

MAX_ROWS = 8  # of a batch that go through the network together

# n directions, height steps in time, width rows of a batch, channels numbers of a state. x are the
# products of inputs and weights, a gate every `padded` columns; of the others only addresses count,
# 0 where a tensor is not there. Lengths are int32, one for each row. Steps are in elements.
ONNX_RECURRENT = record(
    **OUTPUT, y_h=TENSOR, y_c=TENSOR, initial_h=TENSOR, initial_c=TENSOR, lengths=TENSOR,
    padded=INT, x_time=INT, x_row=INT, x_direction=INT, y_time=INT, y_row=INT, y_direction=INT,
    state_row=INT, state_direction=INT,
    # (n, channels, gates * padded); (n, gates * padded), of a GRU one more; (n, 3 * padded)
    weights=TENSOR, b=TENSOR, peepholes=TENSOR,
    # int64 (n, 3), places in `functions.RECURRENT_FUNCTIONS`; float32 (n, 3, 2), alpha and beta
    functions=ADDRESS, parameters=ADDRESS,
    clip=FLOAT, input_forget=INT, linear_before_reset=INT, reverse=INT,
    **SCRATCH,
)  # fmt: skip

_number = functions.by_number(functions.RECURRENT_FUNCTIONS)


def scratch(record):
    """Bytes for gates, states, and zeros, of the rows that go together."""
    return 4 * record["padded"] * (8 * MAX_ROWS + 1)


@njit
def length_of(a, row):
    """How many steps a row of the batch has."""
    if a.lengths.data == 0:
        return a.height
    length = np.int64(carray(as_pointer(a.lengths.data), a.width, np.int32)[row])
    return min(max(length, 0), a.height)


@njit
def time_of(a, d, step, length):
    """Where in time the next step of a direction is."""
    return length - 1 - step if d == 1 or a.reverse else step


@njit
def _activated(a, d, index, v, bound):
    chosen = carray(as_pointer(a.functions), (a.n, 3), np.int64)
    parameters = carray(as_pointer(a.parameters), (a.n, 3, 2), np.float32)
    alpha, beta = parameters[d, index, 0], parameters[d, index, 1]
    return _number(chosen[d, index], onnx_clip(v, -bound, bound), alpha, beta)


@njit
def _chain(a, d, gates, gate, i, first, h):
    """Add the products of a state, with the weights of one column, to what is there."""
    w = carray(as_pointer(a.weights.data), (a.n, a.channels, gates * a.padded), np.float32)
    total = first
    for k in range(a.channels):
        total = fma(h[k], w[d, k, gate * a.padded + i], total)
    return total


@njit
def _bias(a, d, gates, gate, i):
    return carray(as_pointer(a.b.data), (a.n, gates, a.padded), np.float32)[d, gate, i]


@njit
def _rnn(a, d, x, p, h, c, new):
    for i in range(a.channels):
        v = _chain(a, d, 1, 0, i, x[p + i], h) + _bias(a, d, 1, 0, i)
        new[i] = _activated(a, d, 0, v, a.clip)


@njit
def _gru(a, d, x, p, h, c, new):
    reset = new[a.padded :]
    size = a.padded
    for i in range(a.channels):
        v = _chain(a, d, 3, 1, i, x[p + size + i], h) + _bias(a, d, 4, 1, i)
        reset[i] = _activated(a, d, 0, v, a.clip)
        if not a.linear_before_reset:
            reset[i] = reset[i] * h[i]
    for i in range(a.channels):
        update = _chain(a, d, 3, 0, i, x[p + i], h) + _bias(a, d, 4, 0, i)
        update = _activated(a, d, 0, update, a.clip)
        of_x = x[p + 2 * size + i]
        if a.linear_before_reset:
            v = _chain(a, d, 3, 2, i, np.float32(0), h) + _bias(a, d, 4, 3, i)
            v = (of_x + _bias(a, d, 4, 2, i)) + reset[i] * v
        else:
            v = _chain(a, d, 3, 2, i, of_x, reset) + _bias(a, d, 4, 2, i)
        v = _activated(a, d, 1, v, a.clip)
        new[i] = (np.float32(1) - update) * v + update * h[i]


@njit
def _lstm(a, d, x, p, h, c, new):
    peepholes = carray(as_pointer(a.peepholes.data), (a.n, 3, a.padded), np.float32)
    has_peepholes = a.peepholes.data != 0
    for i in range(a.channels):
        of_i = _chain(a, d, 4, 0, i, x[p + i], h) + _bias(a, d, 4, 0, i)
        of_o = _chain(a, d, 4, 1, i, x[p + a.padded + i], h) + _bias(a, d, 4, 1, i)
        of_f = _chain(a, d, 4, 2, i, x[p + 2 * a.padded + i], h) + _bias(a, d, 4, 2, i)
        of_c = _chain(a, d, 4, 3, i, x[p + 3 * a.padded + i], h) + _bias(a, d, 4, 3, i)
        if has_peepholes:
            of_i = of_i + peepholes[d, 0, i] * c[i]
            of_f = of_f + peepholes[d, 2, i] * c[i]
        of_i = _activated(a, d, 0, of_i, a.clip)
        if a.input_forget:
            of_f = np.float32(1) - of_i
        else:
            of_f = _activated(a, d, 0, of_f, a.clip)
        c[i] = of_f * c[i] + of_i * _activated(a, d, 1, of_c, a.clip)
        if has_peepholes:
            of_o = of_o + peepholes[d, 1, i] * c[i]
        of_o = _activated(a, d, 0, of_o, a.clip)
        new[i] = of_o * _activated(a, d, 2, c[i], np.float32(np.inf))


def _kernel(step):
    """Return the kernel that takes such steps, row by row."""

    def kernel(arguments, first_part, end_part, parts, slot):
        a = carray(arguments, 1)[0]
        if first_part != 0:
            return
        x, y = values(a.x), values(a.y)
        s = carray(as_pointer(a.scratch), 4 * a.padded, np.float32)
        h, c, new = s[: a.padded], s[a.padded : 2 * a.padded], s[2 * a.padded :]
        for d in range(a.n):
            for row in range(a.width):
                state = d * a.state_direction + row * a.state_row
                length = length_of(a, row)
                for i in range(a.channels):
                    h[i] = values(a.initial_h)[state + i] if a.initial_h.data != 0 else 0
                    c[i] = values(a.initial_c)[state + i] if a.initial_c.data != 0 else 0
                for time in range(length if a.y.data != 0 else a.height, a.height):
                    for i in range(a.channels):
                        y[time * a.y_time + row * a.y_row + d * a.y_direction + i] = 0
                for number in range(length):
                    time = time_of(a, d, number, length)
                    step(a, d, x, _products(a, d, time, row), h, c, new)
                    for i in range(a.channels):
                        h[i] = new[i]
                        if a.y.data != 0:
                            y[time * a.y_time + row * a.y_row + d * a.y_direction + i] = h[i]
                for i in range(a.channels):
                    if a.y_h.data != 0:
                        values(a.y_h)[state + i] = h[i]
                    if a.y_c.data != 0:
                        values(a.y_c)[state + i] = c[i]

    return kernel


@njit
def _products(a, d, time, row):
    return time * a.x_time + row * a.x_row + d * a.x_direction


for _op, _step in (("onnx_rnn", _rnn), ("onnx_gru", _gru), ("onnx_lstm", _lstm)):
    register(_op, "reference", ONNX_RECURRENT, scratch=scratch)(_kernel(_step))
