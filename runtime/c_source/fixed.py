"""Requantization in integers without a product, and when it is as right as in float32.

The definition (docs/quantization.md section 4) is y = (t * M + B) + r, each product and sum rounded
to float32, and code = clamp(rhe(y), lo, hi). Here u = y * 2^f, f fraction bits, is computed as

    u = bias + sum of +-((acc << g) >> s_i)

with a few signed powers of two 2^-s_i for M * 2^(f - g) (its canonical signed digits, cut). How far
u can be from the definition's y * 2^f is the sum of

- |M - what the digits stand for| * |acc| * 2^f, for all acc that lead to codes between the bounds;
- one for each digit, since >> rounds down; half of them is in the bias, so half a unit each;
- half a unit each for the bias and for a residual's table;
- the definition's own rounding: 2^-24 of each product and of each sum, times 2^f.

Where u is nearer than that to the middle between two codes, one output in some hundreds or
thousands, C code computes the definition, in float32. Everywhere else both round to the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DIGITS = 10  # of a factor, at most
_FRACTION = 14  # bits at most: more digits would cost more than fewer doubts save
_BOUND = 2**28  # of |u|: nothing that is added up wraps
_SCALED = 2**30  # of |acc << g|
_LEAST = 5  # fraction bits, below which everything is in doubt


@dataclass(frozen=True)
class Row:
    """Requantization of one output channel; `plus` and `minus` are the s_i."""

    offset: int  # z_x * sum of W
    m: float  # float32 M and B
    b: float
    bias: int = 0
    plus: tuple[int, ...] = ()
    minus: tuple[int, ...] = ()
    factor: int = 0  # M * 2^(f + 31 - g), for cores with products


@dataclass(frozen=True)
class Fixed:
    """Requantization of a layer.

    Attributes
    ----------
    rows : tuple of Row
    grow : int
        g
    fraction : int
        f; 0 if everything is in doubt.
    doubt : int
        Bound of the error, in units of u.
    lo, hi : int
        Bounds of codes.
    residual : int32 array (256,), optional
        What a residual's code adds to u.
    """

    rows: tuple[Row, ...]
    grow: int
    fraction: int
    doubt: int
    lo: int
    hi: int
    residual: np.ndarray | None = None

    @property
    def low(self) -> int:
        """Below this u the code is `lo`."""
        return ((self.lo + 1) << self.fraction) - self.doubt

    @property
    def high(self) -> int:
        """From this u on the code is `hi`."""
        return (self.hi << self.fraction) + self.doubt


def fixed(
    m: np.ndarray, b: np.ndarray, offset: np.ndarray, least: np.ndarray, most: np.ndarray,
    lo: int, hi: int, residual: np.ndarray | None = None, products: bool = False,
) -> Fixed:  # fmt: skip
    """Return the integer form of y = float32(acc - offset) * m + b [+ residual].

    Parameters
    ----------
    m, b : float32 arrays (O,)
    offset, least, most : int64 arrays (O,)
        Zero point times the sum of weights, and bounds of acc, which 32 bits hold.
    lo, hi : int
        Clamp of codes.
    residual : float64 array (256,), optional
        What is added for each code of a second input.
    products : bool
        u is made with one product, of `factor`, instead of digits.
    """
    more = 0.0 if residual is None else float(np.abs(residual).max())
    ends = [(acc - offset) * m.astype(np.float64) + b for acc in (least, most)]
    reach = (
        float(np.abs(ends).max()) + more + float(np.abs(offset * m.astype(np.float64)).max()) + 1
    )
    largest = max(1, int(np.abs([least, most]).max()))
    grow = max(0, int(math.log2(_SCALED)) - largest.bit_length())
    fraction = min(_FRACTION, math.floor(math.log2(_BOUND / reach)))
    if m.max() > 0:  # no factor exceeds 1 / 2
        fraction = min(fraction, grow - 1 + math.floor(-math.log2(float(m.max()))))
    plain = tuple(
        Row(int(z), float(factor), float(added))
        for z, factor, added in zip(offset, m, b, strict=True)
    )
    if fraction < _LEAST:
        return Fixed(plain, 0, 0, 0, lo, hi, None if residual is None else np.zeros(256, np.int32))
    one = 1 << fraction
    rows, doubt = [], 0.0
    for row, low, high in zip(plain, least, most, strict=True):
        constant = row.b - row.offset * row.m
        # The largest |acc| from which on all codes are bounds.
        size = float(max(abs(int(low)), abs(int(high))))
        if row.m > 0:
            size = min(size, (max(abs(lo), abs(hi)) + 1 + abs(constant) + more) / row.m)
        plus, minus, error = _digits(math.ldexp(row.m, fraction - grow), size * 2.0**grow)
        count = len(plus) + len(minus)
        centre = 0.5 if products else (len(plus) - len(minus)) / 2
        bias = round(constant * one + one / 2 + centre)
        factor = round(math.ldexp(row.m, fraction + 31 - grow))
        rows.append(Row(row.offset, row.m, row.b, bias, plus, minus, factor))
        value = max(abs(lo), abs(hi)) + 2 + abs(row.b) + more
        rounding = 4 * 2.0**-24 * (2 * value) * one
        doubt = max(doubt, error + count / 2 + 1.5 + rounding)
    if 2 * math.ceil(doubt) + 2 >= one:
        return Fixed(plain, 0, 0, 0, lo, hi, None if residual is None else np.zeros(256, np.int32))
    table = None if residual is None else np.rint(residual * one).astype(np.int32)
    return Fixed(tuple(rows), grow, fraction, math.ceil(doubt) + 1, lo, hi, table)


def _digits(factor: float, largest: float) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Return signed powers of two for a factor up to 1 / 2, and their error times `largest`.

    Those of the remainder's nearest power of two, one after the other: canonical signed digits.
    """
    plus: list[int] = []
    minus: list[int] = []
    rest = factor
    while abs(rest) * largest > 1 and len(plus) + len(minus) < DIGITS:
        mantissa, exponent = math.frexp(abs(rest))  # in [1/2, 1)
        shift = -exponent if mantissa > 0.75 else 1 - exponent
        if shift > 30:
            break
        (plus if rest > 0 else minus).append(shift)
        rest -= math.copysign(2.0**-shift, rest)
    return tuple(plus), tuple(minus), abs(rest) * largest
