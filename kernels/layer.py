"""A convolution layer as kernels see it: its weights and what decides which kernel can serve it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from logshift.kernels.codec import LogWeights


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class _Geometry:
    """What follows from the shape of the weights, (O, kh, kw, C / group), and the grouping."""

    weights: _Shaped
    group: int
    dilations: tuple[int, int]

    @property
    def run_taps(self) -> int:
        """Taps of a kernel row whose inputs lie side by side in memory: all of them, or one."""
        return self.weights.shape[2] if self.dilations[1] == 1 and self.group == 1 else 1

    @property
    def is_depthwise(self) -> bool:
        """Every output channel reads exactly the input channel of its own number."""
        return self.weights.shape[3] == 1 and self.group == self.weights.shape[0]


@dataclass(frozen=True, eq=False)
class Layer(_Geometry):
    """One convolution on codes.

    Attributes
    ----------
    weights : LogWeights of shape (O, kh, kw, C / group)
    group : int
    strides, dilations : (int, int)
        Of rows and columns of the input.
    activation_bits : int
        A of the input codes.
    z_x : int
        Zero point of the input.
    m, b : float32 arrays of shape (O,)
        M and B of `docs/quantization.md` section 4.
    pixels : int
        Output pixels at the nominal input size: a hint for the choice of a kernel.
    """

    weights: LogWeights
    group: int
    strides: tuple[int, int]
    dilations: tuple[int, int]
    activation_bits: int
    z_x: int
    m: np.ndarray
    b: np.ndarray
    pixels: int

    @cached_property
    def integers(self) -> np.ndarray:
        """W, int32, (O, kh, kw, C / group)."""
        return self.weights.integers()

    @cached_property
    def largest(self) -> int:
        """Largest |W|; 0 of no weights."""
        return self.weights.largest

    @cached_property
    def sums(self) -> np.ndarray:
        """Sums of W and of |W| of every output channel, int64 (O, 2)."""
        return self.weights.sums()

    @property
    def accumulator_bound(self) -> int:
        """Largest |acc| that any input codes can lead to, for any channel."""
        return int(self.sums[:, 1].max(initial=0)) * (2**self.activation_bits - 1)

    @property
    def offset(self) -> np.ndarray:
        """z_x times the sum of W, int64 (O,)."""
        return self.z_x * self.sums[:, 0]


@dataclass(frozen=True, eq=False)
class FloatLayer(_Geometry):
    """One convolution on float32.

    Attributes
    ----------
    weights : float32 array of shape (O, kh, kw, C / group)
    group : int
    strides, dilations : (int, int)
        Of rows and columns of the input.
    bias : float32 array of shape (O,)
    pixels : int
        Output pixels at the nominal input size: a hint for the choice of a kernel.
    """

    weights: np.ndarray
    group: int
    strides: tuple[int, int]
    dilations: tuple[int, int]
    bias: np.ndarray
    pixels: int


def reading_offsets(arguments: np.void, places: np.ndarray) -> np.ndarray:
    """Channels from an output pixel's first input to what is read, for a convolution's record.

    places : int64 (..., 3), kernel row, kernel column and channel, which may be of later columns.
    """
    pixel = int(arguments["x"]["c"])
    row = int(arguments["dilation_h"]) * int(arguments["x"]["w"]) * pixel
    return places @ np.array([row, int(arguments["dilation_w"]) * pixel, 1])


@dataclass(frozen=True, eq=False)
class Packed:
    """A layer as one kernel wants it: values for its argument record, arrays by their address."""

    fields: dict[str, Any]

    def place(self, arguments: np.ndarray) -> list[np.ndarray]:
        """Fill in an argument record whose geometry is known; returns arrays to keep alive."""
        for key, value in self.fields.items():
            arguments[key] = value.ctypes.data if isinstance(value, np.ndarray) else value
        return [value for value in self.fields.values() if isinstance(value, np.ndarray)]
