"""What implementations of ONNX operators share: the call they answer, and what results may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.graph import MAX_ELEMENTS

Array = np.ndarray

_MAX_INTEGERS = 2**16  # of an input that holds axes, sizes and the like


class Call:
    """One use of an operator: what its implementation asks for."""

    def __init__(
        self,
        op: str,
        attributes: Mapping[str, Any],
        opset: int,
        inputs: Sequence[Array | None],
        outputs: int,
    ) -> None:
        self.op, self.attributes, self.opset, self.outputs = op, attributes, opset, outputs
        self.inputs = list(inputs)

    @property
    def x(self) -> Array:
        """The first input."""
        return self.input(0)

    def input(self, index: int) -> Array:
        """Return an input that must be given."""
        x = self.optional(index)
        if x is None:
            raise InputError(f"needs its input {index}")
        return x

    def all(self) -> list[Array]:
        """Return all inputs, at least one."""
        return [self.input(i) for i in range(max(len(self.inputs), 1))]

    def optional(self, index: int) -> Array | None:
        """Return an input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, of the type of its default."""
        value = self.attributes.get(name, default)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and not isinstance(value, kinds):
            kind = type(default).__name__
            raise InputError(f"attribute {name} must be of the type {kind}, not {value!r}")
        return value

    def integers(self, index: int, name: str) -> list[int] | None:
        """Return integers that newer versions take as an input, older ones as an attribute."""
        given = self.optional(index)
        if given is not None:
            if given.size > _MAX_INTEGERS:
                raise InputError(f"its input {index} has {given.size} numbers")
            return [int(v) for v in given.ravel()]
        value = self.get(name)
        return value if value is None or isinstance(value, list) else [value]

    def axis(self, default: int) -> int:
        """Return the attribute `axis`, counted from the first."""
        axis, rank = self.get("axis", default), self.x.ndim
        if not -rank <= axis < max(rank, 1):
            raise InputError(f"axis {axis} is beyond rank {rank}")
        return axis % max(rank, 1)


def limited(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape that an array may have."""
    sizes = tuple(int(size) for size in shape)
    if math.prod(sizes) > MAX_ELEMENTS or min(sizes, default=0) < 0:
        raise InputError(f"its result would have the shape {sizes}")
    return sizes


def check_broadcast(*arrays: Array) -> None:
    """Check that arrays go together, and that the result is one that an array may have."""
    size = np.broadcast(*arrays).size
    if size > MAX_ELEMENTS:
        raise InputError(f"its result would have {size} elements")


def mean_of(x: Array, axes: tuple[int, ...], keepdims: bool = True) -> Array:
    """Return the mean, which is NaN, without a warning, if it is of nothing."""
    dtype = np.float32 if x.dtype == np.float16 else None
    total = np.sum(x, axis=axes, keepdims=keepdims, dtype=dtype)
    return np.asarray(total / math.prod(x.shape[axis] for axis in axes), x.dtype)


def least(dtype: np.dtype) -> Any:
    """Return the least value of a type."""
    if dtype.kind == "b":
        return False
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def largest(dtype: np.dtype) -> Any:
    """Return the largest value of a type."""
    if dtype.kind == "b":
        return True
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


def widened(x: Array) -> Array:
    """Return float16 as float32, in which functions of it are computed."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def as_matrix(x: Array, axis: int) -> Array:
    """Return an array of two axes: those before `axis`, and those from it on."""
    if not -x.ndim <= axis <= x.ndim:
        raise InputError(f"axis {axis} is beyond rank {x.ndim}")
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


# What answers a call; one result, or several.
Implementation = Callable[[Call], Any]
