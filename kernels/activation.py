"""Activation functions that a kernel computes from the unrounded result, before it rounds once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit

from logshift.kernels.functions import ROUND

PIECES = 16
# What kernels are told: the position here, and one more; 0 is no function.
ACTIVATIONS = ("PRelu", "HardSwish", "Piecewise")
PRELU, HARD_SWISH, PIECEWISE = range(1, 4)


@dataclass(frozen=True, eq=False)
class Activation:
    """A fused activation function, `docs/quantization.md` section 4.

    Attributes
    ----------
    op : str
        One of `ACTIVATIONS`.
    origin, unit : float
        v = (x - origin) / unit is what the function is computed of. PRelu has an origin of 0, and
        the output's scale is its unit, whatever is said here.
    coefficients : float32 array
        PRelu: slopes below zero, of shape (1,), or (O,) if output channels differ. HardSwish: of
        shape (0,). Piecewise: c0, c1 and c2 of each piece, (3, 16), in output codes.
    """

    op: str
    origin: float
    unit: float
    coefficients: np.ndarray


@dataclass(frozen=True, eq=False)
class Target:
    """What a result x is before it is rounded: v = x / unit + zero, and what becomes of that.

    Attributes
    ----------
    unit, zero : float
    kind : int
        0, or which of `ACTIVATIONS` is computed of v.
    coefficients : float32 array
        What kernels compute it from: PRelu z_y; HardSwish u / s_y, origin / s_y and z_y;
        Piecewise as stored.
    slopes : float32 array, (1,) or (O,), optional
        Of PRelu.
    """

    unit: float
    zero: float
    kind: int = 0
    coefficients: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    slopes: np.ndarray | None = None


def target(activation: Activation | None, scale: float, zero_point: int) -> Target:
    """Return what a result is to be that becomes codes of a scale and a zero point.

    Without a function v is the output itself, in codes.
    """
    if activation is None:
        return Target(scale, zero_point)
    kind, origin, unit = ACTIVATIONS.index(activation.op) + 1, activation.origin, activation.unit
    coefficients, slopes = activation.coefficients, None
    if kind == PRELU:
        origin, unit, slopes = 0.0, scale, coefficients
        coefficients = np.array([zero_point])
    elif kind == HARD_SWISH:
        coefficients = np.array([unit / scale, origin / scale, zero_point])
    values = np.ascontiguousarray(coefficients, np.float32)
    return Target(unit, -origin / unit, kind, values, slopes)


@njit(inline="always", error_model="numpy")
def activated(v, kind, slope, c):
    """Return the function of v that `Target` describes; without branches, for loops of vectors."""
    if kind == PRELU:
        v = (max(v, np.float32(0)) + min(v, np.float32(0)) * slope) + c[0]
    elif kind == HARD_SWISH:
        v = (v * c[0] + c[1]) * min(max(v, np.float32(0)), np.float32(1)) + c[2]
    elif kind == PIECEWISE:
        nearest = min(max(v, np.float32(0)), np.float32(PIECES - 1)) + ROUND
        i = np.uintp(np.float32(nearest).view(np.uint32) & np.uint32(PIECES - 1))
        f = v - (nearest - ROUND)
        v = (c[np.uintp(2 * PIECES) + i] * f + c[np.uintp(PIECES) + i]) * f + c[i]
    return v
