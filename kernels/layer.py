"""A convolution layer as kernels see it: its weights and what decides which kernel can serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from logshift.kernels.stlq.codec import LogWeights


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
    slopes : float32 array of shape (O,), optional
        Of a fused PRelu.
    is_activated : bool
        Whether there is a fused activation function.
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
    slopes: np.ndarray | None = None
    is_activated: bool = False

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """What requantization knows of each output channel, by the names of the argument record."""
        known = {"m": self.m, "b": self.b}
        return known if self.slopes is None else known | {"slopes": self.slopes}

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
    def fits_int32(self) -> bool:
        """Whether every output but for the residual, before it is clamped, is within int32.

        Or what a fused function is computed of.
        """
        # Codes and their zero point are at most `top` apart.
        top = 2**self.activation_bits - 1
        largest = self.sums[:, 1] * top * np.abs(self.m, dtype=np.float64) + np.abs(self.b)
        return bool(np.all(largest < 2.0**30))  # twice as large would be: float32 rounds

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


Fields = Mapping[str, Any] | np.void  # of an argument record; what is a record in it alike


def reading_offsets(arguments: Fields, places: np.ndarray) -> np.ndarray:
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

    def sized(self, arguments: Fields) -> dict[str, np.ndarray]:
        """Return what else depends on the geometry, which `arguments` tells."""
        return {}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Values of an argument record that do not depend on the geometry, addresses of arrays."""
        return {
            key: value.ctypes.data if isinstance(value, np.ndarray) else value
            for key, value in self.fields.items()
        }

    def place(self, arguments: np.ndarray) -> list[np.ndarray]:
        """Fill in an argument record whose geometry is known; returns arrays to keep alive."""
        sized = self.sized(arguments[0])
        for key, value in self.constants.items():
            arguments[key] = value
        for key, array in sized.items():
            arguments[key] = array.ctypes.data
        arrays = [value for value in self.fields.values() if isinstance(value, np.ndarray)]
        return [*arrays, *sized.values()]


@dataclass(frozen=True, eq=False)
class PackedReads(Packed):
    """A layer whose kernel reads from a list of places that lie the further apart the wider x is.

    Attributes
    ----------
    places : int64 (reads, ..., 3)
        Kernel row, kernel column and channel of what is read.
    reads : structured array (reads,)
        What becomes of them, all but the offsets of their places.
    field : str
        Name of the argument that is the address of the reads.
    """

    places: np.ndarray
    reads: np.ndarray
    field: str

    def offset(self, reads: np.ndarray, offsets: np.ndarray) -> None:
        """Enter offsets of places, in channels."""
        reads["offset"] = offsets

    @cached_property
    def _of_one_row(self) -> bool:
        return not self.places[..., 0].any()

    def sized(self, arguments: Fields) -> dict[str, np.ndarray]:
        """Return the list, with the offsets for a geometry."""
        # Within a row the width does not matter: all geometries share one list.
        kept = vars(self).get("_kept")
        if kept is None:
            kept = self.reads.copy()
            self.offset(kept, reading_offsets(arguments, self.places))
            if self._of_one_row:
                vars(self)["_kept"] = kept
        return {self.field: kept}
