"""Activation functions that a kernel computes from the unrounded result, before it rounds once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PIECES = 16
# What kernels are told: the position of its name here, and one more; 0 is no function.
ACTIVATIONS = ("PRelu", "HardSwish", "Piecewise")


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
