"""What becomes of all elements along axes: sums, extremes, running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import (
    Array,
    Call,
    Implementation,
    largest,
    least,
    mean_of,
)


def _cumulative(c: Call) -> Array:
    axis = int(c.input(1).item())
    x = np.flip(c.x, axis) if c.get("reverse", 0) else c.x
    function = np.add if c.op == "CumSum" else np.multiply
    y = function.accumulate(x, axis, dtype=x.dtype)
    if c.get("exclusive", 0) and y.size:
        first = np.full_like(np.take(y, [0], axis), function.identity)
        y = np.concatenate([first, np.delete(y, -1, axis)], axis)
    return np.flip(y, axis) if c.get("reverse", 0) else y


def _log_sum_exp(x: Array, **k: Any) -> Array:
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    top = np.max(x, axis=k["axis"], keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    sums = np.log(np.sum(np.exp(x - top), axis=k["axis"], keepdims=True)) + top
    return sums if k["keepdims"] else np.squeeze(sums, k["axis"])


_REDUCE: dict[str, Callable[..., Array]] = {
    "L1": lambda x, **k: np.sum(np.abs(x), **k),
    "L2": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "LogSum": lambda x, **k: np.log(np.sum(x, **k)),
    "LogSumExp": _log_sum_exp,
    "Max": lambda x, **k: np.max(x, initial=least(x.dtype), **k),
    "Mean": lambda x, axis, keepdims: mean_of(x, axis, keepdims),
    "Min": lambda x, **k: np.min(x, initial=largest(x.dtype), **k),
    "Prod": np.prod,
    "Sum": np.sum,
    "SumSquare": lambda x, **k: np.sum(x * x, **k),
}  # fmt: skip


def _reduce(c: Call) -> Array:
    axes = c.integers(1, "axes")
    if not axes and c.get("noop_with_empty_axes", 0):
        # Of single elements.
        axes = []
    elif not axes:
        axes = list(range(c.x.ndim))
    if any(not -c.x.ndim <= axis < c.x.ndim for axis in axes):
        raise InputError(f"axes {axes} are beyond rank {c.x.ndim}")
    keep = bool(c.get("keepdims", 1))
    y = _REDUCE[c.op.removeprefix("Reduce")](c.x, axis=tuple(axes), keepdims=keep)
    return np.asarray(y).astype(c.x.dtype, copy=False)


def _arg_extreme(c: Call) -> Array:
    axis = c.axis(0)
    find = np.argmax if c.op == "ArgMax" else np.argmin
    if c.get("select_last_index", 0):
        y = c.x.shape[axis] - 1 - find(np.flip(c.x, axis), axis)
    else:
        y = find(c.x, axis)
    y = np.asarray(y, np.int64)
    return np.expand_dims(y, axis) if c.get("keepdims", 1) else y


OPERATORS: dict[str, Implementation] = {
    **{f"Reduce{kind}": _reduce for kind in _REDUCE},
    "ArgMax": _arg_extreme, "ArgMin": _arg_extreme, "CumProd": _cumulative, "CumSum": _cumulative,
}  # fmt: skip
