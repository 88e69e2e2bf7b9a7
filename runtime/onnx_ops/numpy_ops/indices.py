"""Elements by their indices: taken, replaced, sorted, found."""

from __future__ import annotations

from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, limited


def _gather(c: Call) -> Array:
    indices = c.input(1)
    axis = c.axis(0)
    limited([*c.x.shape[:axis], *indices.shape, *c.x.shape[axis + 1 :]])
    return np.take(c.x, indices, axis)


def _gather_elements(c: Call) -> Array:
    return c.x[_index_along(c)]


def _index_along(c: Call) -> tuple[Array, ...]:
    """Return the index of the elements that GatherElements and ScatterElements name."""
    indices, axis = c.input(1), c.axis(0)
    if indices.ndim != c.x.ndim:
        raise InputError(f"indices of rank {indices.ndim} are for data of that rank")
    index = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[axis] = indices
    return tuple(index)


def _gather_nd(c: Call) -> Array:
    x, indices, batch = c.x, c.input(1), c.get("batch_dims", 0)
    shape, depth = indices.shape[:-1], indices.shape[-1]
    if not 0 <= batch < min(x.ndim, indices.ndim) or x.shape[:batch] != shape[:batch]:
        raise InputError(f"batch_dims {batch} do not fit")
    limited([*shape, *x.shape[batch + depth :]])
    # The first axes index themselves.
    own = np.ogrid[tuple(slice(size) for size in shape[:batch])]
    index = [i.reshape(*i.shape, *(1,) * (len(shape) - batch)) for i in own]
    return x[tuple([*index, *np.moveaxis(indices, -1, 0)])]


_REDUCTIONS: dict[str, Any] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum
}  # fmt: skip


def _scatter(y: Array, index: Any, updates: Array, reduction: str) -> Array:
    if reduction not in ("none", *_REDUCTIONS):
        raise InputError(f"attribute reduction is {reduction!r}")
    if y[index].shape != updates.shape:
        raise InputError(f"updates {y[index].shape} elements, {updates.shape} are given")
    if reduction == "none":
        y[index] = updates
    else:
        _REDUCTIONS[reduction].at(y, index, updates)
    return y


def _scatter_elements(c: Call) -> Array:
    return _scatter(c.x.copy(), _index_along(c), c.input(2), c.get("reduction", "none"))


def _scatter_nd(c: Call) -> Array:
    index = tuple(np.moveaxis(c.input(1), -1, 0))
    return _scatter(c.x.copy(), index, c.input(2), c.get("reduction", "none"))


def _compress(c: Call) -> Array:
    axis = c.get("axis")
    return np.compress(c.input(1), c.x if axis is not None else c.x.ravel(), axis)


def _top_k(c: Call) -> list[Array]:
    axis = c.axis(-1)
    (k,) = c.integers(1, "k") or [0]
    if not 0 <= k <= c.x.shape[axis]:
        raise InputError(f"k is {k}, the axis has {c.x.shape[axis]}")
    if not c.get("largest", 1):
        order = np.argsort(c.x, axis, kind="stable")
    else:
        # Of equal values the first comes first.
        flipped = np.flip(c.x, axis)
        order = c.x.shape[axis] - 1 - np.flip(np.argsort(flipped, axis, kind="stable"), axis)
    order = np.take(order, np.arange(k), axis)
    return [np.take_along_axis(c.x, order, axis), order.astype(np.int64)]


OPERATORS: dict[str, Implementation] = {
    "Compress": _compress, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": lambda c: np.array(np.nonzero(c.x), np.int64).reshape(c.x.ndim, -1),
    "Scatter": _scatter_elements, "ScatterElements": _scatter_elements, "ScatterND": _scatter_nd,
    "TopK": _top_k,
}  # fmt: skip
