"""Types of tensors, and tensors that are made from numbers."""

from __future__ import annotations

import math

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, limited

# By ONNX's numbers.
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip


def dtype_of(number: int) -> np.dtype:
    """Return the type that ONNX gives a number."""
    if number not in _DTYPES:
        raise InputError(f"the type number {number} is not supported")
    return np.dtype(_DTYPES[number])


def _cast(c: Call) -> Array:
    dtype = c.input(1).dtype if c.op == "CastLike" else dtype_of(c.get("to"))
    return c.x.astype(dtype)


def _bit_cast(c: Call) -> Array:
    dtype = dtype_of(c.get("to"))
    if dtype.itemsize != c.x.dtype.itemsize:
        raise InputError(f"cannot take {c.x.dtype} for {dtype}")
    return c.x.view(dtype)


def _range(c: Call) -> Array:
    start, limit, delta = (c.input(i).item() for i in range(3))
    if delta == 0:
        raise InputError("delta is 0")
    count = max(math.ceil((limit - start) / delta), 0)
    limited([count])
    return (start + np.arange(count) * delta).astype(c.x.dtype)


def _one_hot(c: Call) -> Array:
    indices, depth, values = c.x, int(c.input(1).item()), c.input(2)
    axis = c.get("axis", -1)
    axis += indices.ndim + 1 if axis < 0 else 0
    limited([*indices.shape, depth])
    expanded = np.expand_dims(np.where(indices < 0, indices + depth, indices), axis)
    places = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return np.where(expanded == places, values[1], values[0])


OPERATORS: dict[str, Implementation] = {
    "BitCast": _bit_cast, "Cast": _cast, "CastLike": _cast, "OneHot": _one_hot, "Range": _range,
}  # fmt: skip
