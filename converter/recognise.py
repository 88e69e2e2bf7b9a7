"""Weights that lie on an STLQ grid already, as trained models bring them: their words, exactly.

Nothing is rounded here. Values are alpha * W / 2^(L-1+s) of `docs/quantization.md` section 2, to
within the rounding of float32, or they are not recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from logshift.converter.encode import NEGLIGIBLE, nearest_codes
from logshift.converter.metadata import WeightRecord
from logshift.kernels.stlq import codec
from logshift.kernels.stlq.codec import LogWeights

# alpha and the value may each be rounded to float32 once.
_ROUNDING = 2.0**-22
_FEW = 64
_NEIGHBOURS = 4  # as many float32 numbers on each side of what a rounded value says alpha is


def recognise(weight: np.ndarray, hint: WeightRecord | None = None) -> LogWeights | None:
    """Return the words of weights on a grid, None if they are on none.

    Parameters
    ----------
    weight : float32 array of shape (O, kh, kw, C / group)
    hint : WeightRecord, optional
        The grid, if it is known. A grid that does not fit is searched for like any other.

    Returns
    -------
    LogWeights or None
        Found without a hint, it has the smallest bits and then the smallest residual shift and clip
        that hold every channel, and in each channel the largest W.
    """
    matrix = weight.reshape(len(weight), -1).astype(np.float64)
    if hint is not None and len(hint.alpha) == len(matrix):
        grid = (hint.bits, hint.residual_shift, hint.clip)
        alpha = np.array(hint.alpha, np.float32)
        if (words := _words(weight, alpha, *grid)) is not None:
            return replace(words, tile=hint.array_tile)
    # Very few values refuse float weights.
    channels = np.abs(matrix)
    few = channels[channels.any(axis=1)][:1, :_FEW]
    grids = [grid for grid in _grids() if len(_units(few, _magnitudes(*grid)))]
    # Values are what float32 makes of them; but they may have been multiplied after that.
    for exact in (True, False):
        for grid in grids:
            if (found := _search(matrix, *grid, exact)) is not None:
                return _words(weight, found, *grid)
    return None


def scaled(words: LogWeights, factor: np.ndarray) -> LogWeights:
    """Multiply output channels, as batch normalization does: only alpha and signs change.

    Channels whose alpha becomes negligible become zeros (section 1).

    Parameters
    ----------
    words : LogWeights
    factor : float64 array of shape (O,)
    """
    alpha = words.alpha * np.abs(factor)
    kept = alpha >= NEGLIGIBLE
    sign = np.where(kept, np.sign(factor), 0).astype(np.int64)
    w = words.integers().astype(np.int64) * sign.reshape(-1, 1, 1, 1)
    alpha = np.where(kept, alpha, 1).astype(np.float32)
    codes = _codes(w, words.bits, words.residual_shift)
    assert codes is not None  # those of -W are those of W with other signs
    return replace(words, first=codes[0], second=codes[1], alpha=alpha)


def _grids() -> Iterator[tuple[int, int, int]]:
    for bits in range(codec.MIN_BITS, codec.MAX_BITS + 1):
        for shift in range(codec.MAX_RESIDUAL_SHIFT + 1):
            for clip in (1, 2):
                yield bits, shift, clip


@cache
def _magnitudes(bits: int, shift: int, clip: int) -> np.ndarray:
    """All |W| but 0 of a grid, ascending."""
    levels = codec.exponent_levels(bits)
    words = np.concatenate([[0], 1 << np.arange(levels)])
    sums = (words[:, None] << shift) + np.concatenate([-words, words])
    sums = np.unique(sums[(sums > 0) & (sums <= clip << (levels - 1 + shift))])
    return np.array([w for w in sums if _codes(np.array([w]), bits, shift) is not None])


def _codes(w: np.ndarray, bits: int, shift: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the codes of both words of integers W, None if there is one that has none."""
    first = nearest_codes(w / 2.0**shift, bits)
    rest = w - (codec.decode_codes(first, bits) << shift)
    second = nearest_codes(rest, bits)
    if (codec.decode_codes(second, bits) != rest).any():
        return None
    return first, second


def _words(
    weight: np.ndarray, alpha: np.ndarray, bits: int, shift: int, clip: int
) -> LogWeights | None:
    """Return the words of weights on the grid of this alpha, None if one is not."""
    top = 2.0 ** (codec.exponent_levels(bits) - 1 + shift)
    unit = (alpha.astype(np.float64) / top).reshape(-1, 1, 1, 1)
    w = np.rint(weight / unit)
    if (np.abs(w) > clip * top).any():
        return None
    if (np.abs(w * unit - weight) > _ROUNDING * np.abs(weight)).any():
        return None
    codes = _codes(w.astype(np.int64), bits, shift)
    return None if codes is None else LogWeights(*codes, alpha, bits, shift, clip)


def _search(matrix: np.ndarray, bits: int, shift: int, clip: int, exact: bool) -> np.ndarray | None:
    """Find alpha of every channel (rows), None if there is a channel that fits none."""
    alpha = np.ones(len(matrix), np.float32)
    top = 2.0 ** (codec.exponent_levels(bits) - 1 + shift)
    magnitudes = _magnitudes(bits, shift, clip)
    for o, row in enumerate(np.abs(matrix)):
        if not row.any():
            continue
        if not len(_units(row[:_FEW], magnitudes)):
            return None
        values = np.unique(row[row > 0])
        choices = [_nearest_alpha(values, unit, top) for unit in _units(row, magnitudes)]
        choices = [(equal, a) for equal, a in choices if equal or not exact]
        if not choices:
            return None
        alpha[o] = max(choices, key=lambda choice: choice[0])[1]
    return alpha if np.isfinite(alpha).all() and (alpha > 0).all() else None


def _units(row: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Return the real values of W = 1 of which all values are multiples on the grid, ascending."""
    values = np.unique(row[row > 0])
    if not values.size:
        return np.ones(1)
    if len(values) > len(magnitudes) or values[-1] / values[0] > magnitudes[-1] * (1 + _ROUNDING):
        return np.empty(0)
    units = values[-1] / magnitudes[::-1]
    for value in values[::-1]:
        if not units.size:
            break
        w = np.rint(value / units)
        place = np.minimum(np.searchsorted(magnitudes, w), len(magnitudes) - 1)
        fits = (magnitudes[place] == w) & (np.abs(w * units - value) <= 2 * _ROUNDING * value)
        units = units[fits]
    return units


def _nearest_alpha(values: np.ndarray, unit: float, top: float) -> tuple[bool, np.float32]:
    """Return the alpha near unit * top that gives most values exactly, and whether it is all."""
    w, alpha = np.rint(values / unit), np.float32(unit * top)
    steps = sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs)
    candidates = alpha + np.array(steps, np.float32) * np.spacing(alpha)
    found = (w[:, None] * (candidates.astype(np.float64) / top)).astype(np.float32)
    equal = (found == values.astype(np.float32)[:, None]).sum(axis=0)
    best = int(equal.argmax())
    return equal[best] == len(values), candidates[best]
