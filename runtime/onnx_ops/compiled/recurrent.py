"""Recurrent networks: products of all inputs at once, then step by step what depends on states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from logshift.kernels import functions
from logshift.runtime.graph import Shape
from logshift.runtime.onnx_ops.compiled.products import product
from logshift.runtime.onnx_ops.compiled.site import Builder, Site
from logshift.runtime.onnx_ops.recurrent import DEFAULTS, GATES, activations
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import FUNCTION, PRODUCT

_WHOLE = 16  # columns of a gate are a multiple: whole vectors of the widest machines
_FUNCTIONS = [*functions.RECURRENT_FUNCTIONS]


def _parts(n: Site, x: np.ndarray) -> np.ndarray:
    """Return what is kept by direction and gate, each of as many numbers as columns are computed.

    Parameters
    ----------
    x : array (directions, parts * hidden, ...)

    Returns
    -------
    float32 array (directions, parts, padded, ...)
    """
    hidden = n.shape(n.name(2))[-1]
    parts = x.reshape(x.shape[0], -1, hidden, *x.shape[2:])
    more = [(0, 0)] * parts.ndim
    more[2] = (0, -hidden % _WHOLE)
    return np.pad(parts, more)


def _weights(n: Site, index: int) -> np.ndarray:
    """Return weights with gates last, (directions, inputs, gates, padded)."""
    parts = _parts(n, n.found.values[n.name(index)])
    return np.ascontiguousarray(parts.transpose(0, 3, 1, 2))


def _of_inputs(n: Site) -> np.ndarray:
    """Return the weights of inputs, columns of all directions side by side."""
    return np.ascontiguousarray(_weights(n, 1).transpose(1, 0, 2, 3)).reshape(_inputs(n), -1)


def _inputs(n: Site) -> int:
    return n.shape(n.name(1))[-1]


def _bias(n: Site) -> np.ndarray:
    """Return what is added to gates; of a GRU one more, that of its state for the new one."""
    gates, (directions, _, hidden) = GATES[n.node.op], n.shape(n.name(2))
    both = np.zeros((directions, 2 * gates * hidden), np.float32)
    if n.given(3):
        both = n.found.values[n.name(3)]
    of_x, of_h = np.split(_parts(n, both), 2, axis=1)
    if n.node.op != "GRU":
        return of_x + of_h
    total = of_x + of_h
    if n.get("linear_before_reset", 0):
        total[:, 2] = of_x[:, 2]
    return np.concatenate([total, of_h[:, 2:]], axis=1)


def _is_known(n: Site) -> bool:
    """Whether parameters are constants, and everything has the shape that it must have."""
    directions, gates = 2 if n.get("direction", "") == "bidirectional" else 1, GATES[n.node.op]
    hidden, inputs = n.shape(n.name(2))[-1], n.shape(n.x)[2]
    shapes: dict[int, Shape] = {
        1: (directions, gates * hidden, inputs), 2: (directions, gates * hidden, hidden),
        3: (directions, 2 * gates * hidden), 7: (directions, 3 * hidden),
    }  # fmt: skip
    for index, shape in shapes.items():
        values = n.found.values.get(n.name(index))
        if n.given(index) and (
            values is None or values.dtype != np.float32 or values.shape != shape
        ):
            return False
    states = [n.name(index) for index in (5, 6) if n.given(index)]
    if n.given(4) and n.found.dtypes.get(n.name(4)) != np.dtype(np.int32):
        return False
    return all(n.is_float(name) for name in states)


def _recurrent(n: Site) -> list[Call] | None:
    if not _is_known(n):
        return None
    directions, _, hidden = n.shape(n.name(2))
    chosen = activations(n.node.op, n.node.attributes, directions)
    if chosen is None or any(name not in _FUNCTIONS for name, *_ in chosen):
        return None
    gates, padded, last = GATES[n.node.op], hidden + -hidden % _WHOLE, n.get("layout", 0)
    length, batch = n.shape(n.x)[:2][:: -1 if last else 1]
    rows, columns = length * batch, directions * gates * padded
    products = n.between("products", (rows, columns))
    count = len(DEFAULTS[n.node.op])
    numbers = np.zeros((directions, 3), np.int64)
    parameters = np.zeros((directions, 3, 2), np.float32)
    for place, (name, alpha, beta) in enumerate(chosen):
        d, index = divmod(place, count)
        numbers[d, index], parameters[d, index] = _FUNCTIONS.index(name), (alpha, beta)
    fields: dict[str, Any] = {
        "n": directions, "height": length, "width": batch, "channels": hidden, "padded": padded,
        **_steps(directions, length, batch, hidden, last), "x_direction": gates * padded,
        "x_time": columns if last else batch * columns,
        "x_row": length * columns if last else columns,
        "functions": numbers, "parameters": parameters, "clip": n.get("clip", 0.0) or math.inf,
        "input_forget": n.get("input_forget", 0), "reverse": n.get("direction", "") == "reverse",
        "linear_before_reset": n.get("linear_before_reset", 0),
    }  # fmt: skip
    tensors = {
        "x": products,
        "weights": n.constant("state weights", lambda: _weights(n, 2)),
        "b": n.constant("bias", lambda: _bias(n)),
    }
    if n.given(7):
        peepholes = n.constant("peepholes", lambda: _parts(n, n.found.values[n.name(7)]))
        tensors["peepholes"] = peepholes
    given = {"lengths": n.name(4), "initial_h": n.name(5), "initial_c": n.name(6)}
    wanted = {"y": n.output(0), "y_h": n.output(1), "y_c": n.output(2)}
    tensors |= {key: name for key, name in (given | wanted).items() if name}
    weights = n.constant("input weights", lambda: _of_inputs(n))
    work = gates * (PRODUCT * hidden + FUNCTION)
    return [
        product(n.x, weights, products, rows, _inputs(n), columns),
        Call(f"onnx_{n.node.op.lower()}", tensors, fields, work),
    ]


def _steps(directions: int, length: int, batch: int, hidden: int, last: int) -> dict[str, int]:
    """Return how far apart the elements of outputs and states lie."""
    if last:  # (batch, length, directions, hidden) and (batch, directions, hidden)
        of_all = directions * hidden
        return {
            "y_time": of_all, "y_row": length * of_all, "y_direction": hidden,
            "state_row": of_all, "state_direction": hidden,
        }  # fmt: skip
    return {
        "y_time": directions * batch * hidden, "y_row": hidden, "y_direction": batch * hidden,
        "state_row": hidden, "state_direction": batch * hidden,
    }  # fmt: skip


OPERATORS: dict[str, Builder] = dict.fromkeys(GATES, _recurrent)
