"""Activation functions that a kernel computes from the unrounded result, before it rounds once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import carray, njit

from logshift.kernels.functions import ROUND
from logshift.kernels.machine.native import as_pointer

PIECES = 16
MOST = 2**14 - 1  # of |c1| and |c2|
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
    coefficients : array
        PRelu: slopes below zero, float32 of shape (1,), or (O,) if output channels differ.
        HardSwish: of shape (0,). Piecewise: c0, c1 and c2 of each piece, int16 (3, 16), in units of
        2^-7 of an output code.
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
    coefficients : array
        What kernels compute it from: PRelu z_y; HardSwish u / s_y, origin / s_y and z_y; Piecewise,
        int16, what is stored, but with the pieces from the middle on first.
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
    if kind == PRELU:
        z_y = np.array([zero_point], np.float32)
        return Target(scale, 0.0, kind, z_y, np.ascontiguousarray(activation.coefficients))
    if kind == HARD_SWISH:
        coefficients = np.array([unit / scale, origin / scale, zero_point], np.float32)
    else:
        # In the order of its axes, whatever that of the memory is: kernels get the address.
        coefficients = np.ascontiguousarray(np.roll(activation.coefficients, PIECES // 2, axis=1))
    return Target(unit, -origin / unit, kind, coefficients)


@njit(inline="always", error_model="numpy")
def activated(v, kind, slope, address):
    """Return the function of v that a `Target` describes, in codes but not clamped."""
    if kind == PRELU:
        c = carray(as_pointer(address), 1, np.float32)
        return (max(v, np.float32(0)) + min(v, np.float32(0)) * slope) + c[0]
    if kind == HARD_SWISH:
        c = carray(as_pointer(address), 3, np.float32)
        return (v * c[0] + c[1]) * min(max(v, np.float32(0)), np.float32(1)) + c[2]
    if kind == PIECEWISE:
        c = carray(as_pointer(address), 3 * PIECES, np.int16)
        k = np.int32((min(max(v, np.float32(-32768)), np.float32(32767)) + ROUND) - ROUND)
        i = np.uintp(k >> np.int32(12) & np.int32(15))
        f = ((k & np.int32(4095)) << np.int32(4)) - np.int32(32768)
        p = np.int32(c[np.uintp(2 * PIECES) + i]) * f + np.int32(16384)
        p = np.int32(c[np.uintp(PIECES) + i]) + (p >> np.int32(15))
        y = np.int32(c[i]) + ((p * f + np.int32(16384)) >> np.int32(15))
        y = min(max(y, np.int32(-32768)), np.int32(32767))
        return np.float32((y + np.int32(64)) >> np.int32(7))
    return v
