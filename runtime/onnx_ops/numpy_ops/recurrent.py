"""Recurrent networks: RNN, GRU and LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, limited, widened
from logshift.runtime.onnx_ops.recurrent import DEFAULTS, GATES, activations


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_FUNCTIONS: dict[str, Callable[[Array, Any, Any], Array]] = {
    "Affine": lambda x, a, b: a * x + b,
    "Elu": lambda x, a, b: np.where(x < 0, a * np.expm1(x), x),
    "HardSigmoid": lambda x, a, b: np.clip(a * x + b, 0, 1),
    "LeakyRelu": lambda x, a, b: np.where(x < 0, a * x, x),
    "Relu": lambda x, a, b: np.maximum(x, 0),
    "ScaledTanh": lambda x, a, b: a * np.tanh(b * x),
    "Sigmoid": lambda x, a, b: _sigmoid(x),
    "Softplus": lambda x, a, b: np.logaddexp(x, 0),
    "Softsign": lambda x, a, b: x / (1 + np.abs(x)),
    "Tanh": lambda x, a, b: np.tanh(x),
    "ThresholdedRelu": lambda x, a, b: np.where(x > a, x, 0),
}


@dataclass
class _Direction:
    """Parameters of one direction, and its state."""

    products: Array  # of weights and inputs, (sequence, batch, gates * hidden)
    weights: Array  # of the state, (hidden, gates * hidden)
    bias: Array  # (2, gates, hidden)
    functions: list[Callable[[Array], Array]]
    hidden: Array
    cell: Array
    peepholes: Array


def _rnn(c: Call, d: _Direction, x: Array, h: Array, cell: Array) -> tuple[Array, Array]:
    return d.functions[0](x + h @ d.weights + (d.bias[0, 0] + d.bias[1, 0])), cell


def _gru(c: Call, d: _Direction, x: Array, h: Array, cell: Array) -> tuple[Array, Array]:
    size = h.shape[1]
    both = 2 * size
    bias = d.bias[0] + d.bias[1]
    gates = d.functions[0](x[:, :both] + h @ d.weights[:, :both] + bias[:2].ravel())
    update, reset = gates[:, :size], gates[:, size:]
    if c.get("linear_before_reset", 0):
        inner = reset * (h @ d.weights[:, both:] + d.bias[1, 2]) + d.bias[0, 2]
    else:
        inner = (reset * h) @ d.weights[:, both:] + bias[2]
    new = d.functions[1](x[:, both:] + inner)
    return (1 - update) * new + update * h, cell


def _lstm(c: Call, d: _Direction, x: Array, h: Array, cell: Array) -> tuple[Array, Array]:
    gates = x + h @ d.weights + (d.bias[0] + d.bias[1]).ravel()
    i, o, f, new = np.split(gates, 4, axis=1)
    of_i, of_o, of_f = d.peepholes
    i = d.functions[0](i + of_i * cell)
    f = 1 - i if c.get("input_forget", 0) else d.functions[0](f + of_f * cell)
    cell = f * cell + i * d.functions[1](new)
    o = d.functions[0](o + of_o * cell)
    return o * d.functions[2](cell), cell


_STEPS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}


def _functions(c: Call, directions: int) -> list[list[Callable[[Array], Array]]]:
    """Return the activation functions of each direction."""
    chosen = activations(c.op, c.attributes, directions)
    if chosen is None:
        raise InputError(f"has activation functions {c.get('activations')!r}")
    most, count = c.get("clip", 0.0) or np.inf, len(DEFAULTS[c.op])
    found: list[Callable[[Array], Array]] = []
    for index, (name, alpha, beta) in enumerate(chosen):
        # What becomes an output is not clipped.
        bound = np.inf if index % count == 2 else most
        found.append(partial(_activate, name, bound, np.float32(alpha), np.float32(beta)))
    return [found[i * count : (i + 1) * count] for i in range(directions)]


def _activate(name: str, bound: float, alpha: Any, beta: Any, x: Array) -> Array:
    return _FUNCTIONS[name](np.clip(x, -bound, bound), alpha, beta)


def _given(x: Array | None, shape: tuple[int, ...], name: str, dtype: Any) -> Array:
    """Return an optional input in the type of computing; zeros if it is not given."""
    if x is None:
        return np.zeros(shape, dtype)
    if x.shape != shape:
        raise InputError(f"{name} has shape {x.shape}, expected {shape}")
    return x.astype(dtype, copy=False)


def _recurrent(c: Call) -> list[Array]:
    x, w, r = widened(c.x), widened(c.input(1)), widened(c.input(2))
    direction, gates = c.get("direction", "forward"), GATES[c.op]
    directions, hidden = 2 if direction == "bidirectional" else 1, r.shape[-1]
    if direction not in ("forward", "reverse", "bidirectional"):
        raise InputError(f"has direction {direction!r}")
    if x.ndim != 3 or w.shape != (directions, gates * hidden, x.shape[2]):
        raise InputError(f"has weights of shape {w.shape} for inputs of shape {x.shape}")
    if r.shape != (directions, gates * hidden, hidden):
        raise InputError(f"has weights of its state of shape {r.shape}")
    last = c.get("layout", 0)
    if last:
        x = x.swapaxes(0, 1)
    length, batch = x.shape[:2]
    limited((length, directions, batch, gates * hidden))
    states = (batch, directions, hidden) if last else (directions, batch, hidden)
    h, cell = (_given(c.optional(i), states, f"input {i}", x.dtype) for i in (5, 6))
    if last:
        h, cell = h.swapaxes(0, 1), cell.swapaxes(0, 1)
    bias = _given(c.optional(3), (directions, 2 * gates * hidden), "B", x.dtype)
    peepholes = _given(c.optional(7), (directions, 3 * hidden), "P", x.dtype)
    lengths = c.optional(4)
    if lengths is None:
        lengths = np.full(batch, length)
    elif lengths.shape != (batch,):
        raise InputError(f"sequence_lens has shape {lengths.shape}, expected {(batch,)}")
    y = np.zeros((length, directions, batch, hidden), x.dtype)
    h, cell = h.copy(), cell.copy()
    functions = _functions(c, directions)
    for i in range(directions):
        d = _Direction(
            x @ w[i].T, r[i].T, bias[i].reshape(2, gates, hidden), functions[i], h[i], cell[i],
            peepholes[i].reshape(3, hidden),
        )  # fmt: skip
        backwards = direction == "reverse" or i == 1
        _run(c, d, y[:, i], np.clip(lengths, 0, length), backwards)
    if last:
        y, h, cell = y.transpose(2, 0, 1, 3), h.swapaxes(0, 1), cell.swapaxes(0, 1)
    return [v.astype(c.x.dtype, copy=False) for v in (y, h, cell)]


def _run(c: Call, d: _Direction, y: Array, lengths: Array, backwards: bool) -> None:
    """Run one direction; each row of the batch for as long as it is."""
    for step in range(len(y)):
        rows = np.flatnonzero(lengths > step)
        times = lengths[rows] - 1 - step if backwards else np.full(len(rows), step)
        h, cell = _STEPS[c.op](c, d, d.products[times, rows], d.hidden[rows], d.cell[rows])
        d.hidden[rows], d.cell[rows], y[times, rows] = h, cell, h


OPERATORS: dict[str, Implementation] = dict.fromkeys(DEFAULTS, _recurrent)
