"""Weights to words: the search of alpha, rounding, and the selection of second words.

Sections and symbols (`alpha`, `L`, `q0`, `q1`, `r0`, `r1`, `S`, `W`) are those of
`docs/quantization.md`; what words mean is in `kernels/stlq/codec.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.machine.jit import njit
from logshift.kernels.stlq.codec import (
    MAX_RESIDUAL_SHIFT,
    MAX_TILE,
    LogWeights,
    exponent_levels,
)
from logshift.kernels.stlq.tiling import ARRAY_TILE, Tiling

GRANULARITIES = ("element", "tile", "filter")

# Consecutive weights of the flattened matrix, or inputs and outputs of an array's tile.
Tile = int | tuple[int, int]

# A channel whose largest weight is less counts as zeros. What W = 1 stands for is then never less
# than 2^-120, so every quantized weight is a normal float32 number.
NEGLIGIBLE = 2.0**-100

# alpha candidates are max|w| * 2^-g: one octave moves every level onto the next, the rest of the
# range only trades clipping of the largest weights against resolution of the smallest.
_ALPHA_OCTAVES = np.linspace(0.0, 1.75, 57)

_COLUMNS = 64  # that are rounded before all others are brought up to date

_SEARCHED = 2**17  # weights that are tried with one alpha after the other: they stay in the cache


def default_clip(bits: int) -> int:
    """Return how far two words may reach, in units of alpha: 2 below 4 bits, else 1 (section 2)."""
    return 2 if bits < 4 else 1


@njit(cache=True, nogil=True, inline="always")
def _nearest_code(r, levels):
    """Code of the level nearest to float32 r in the linear domain, ties toward zero.

    Without branches and in int32, so that loops over it become vector instructions.
    """
    magnitude = np.float32(abs(r))
    # Mantissas above 1.5 carry into the exponent.
    e = ((magnitude.view(np.int32) + np.int32(0x3FFFFF)) >> np.int32(23)) - np.int32(126)
    e = min(max(e, np.int32(1)), levels)
    code = e + (levels + np.int32(1) if r < np.float32(0) else np.int32(0))
    return code if magnitude > np.float32(0.5) else np.int32(0)


@njit(cache=True, nogil=True, inline="always")
def _level(code, levels):
    negative = code > levels
    e = code - (levels + np.int32(1) if negative else np.int32(0))
    shifted = np.int32(1) << max(e - np.int32(1), np.int32(0))
    magnitude = np.float32(shifted if e > np.int32(0) else np.int32(0))
    return -magnitude if negative else magnitude


@njit(cache=True, nogil=True, inline="always")
def _grid(levels, residual_shift, clip):
    """L, the largest level, the bound of two words, and how much finer the second one is."""
    levels = np.int32(levels)
    top = np.float32(1 << (levels - 1))
    return levels, top, top * np.float32(clip), np.float32(1 << residual_shift)


@njit(cache=True, nogil=True, error_model="numpy")
def _two_words(w, alpha, levels, residual_shift, clip, first, second, r1, r2):
    """Section 2 for rows of w [O, K]: both codes, the residual r1 and what is left after q1."""
    levels, top, bound, fine = _grid(levels, residual_shift, clip)
    for o in range(w.shape[0]):
        unit = alpha[o]
        for i in range(np.uintp(w.shape[1])):
            r0 = min(max(w[o, i] / unit * top, -bound), bound)
            code0 = _nearest_code(r0, levels)
            residual = (r0 - _level(code0, levels)) * fine
            code1 = _nearest_code(residual, levels)
            first[o, i] = code0
            second[o, i] = code1
            r1[o, i] = residual
            r2[o, i] = residual - _level(code1, levels)


def nearest_codes(r: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of the levels nearest to `r` (section 1: linear domain, ties toward zero).

    Parameters
    ----------
    r : float array, any shape, in units of the grid
    bits : int

    Returns
    -------
    uint8 array of the same shape.
    """
    levels = exponent_levels(bits)
    flat = np.ascontiguousarray(r, np.float32).reshape(1, -1)
    first, second = np.empty(flat.shape, np.uint8), np.empty(flat.shape, np.uint8)
    scratch = np.empty_like(flat)
    top = np.float32(2.0 ** (levels - 1))
    # alpha = 2^(L-1) makes one unit of w one unit of the grid, exactly.
    _two_words(flat, np.array([top]), levels, 0, 2**20, first, second, scratch, scratch)
    return first.reshape(np.shape(r))


def tile_of(granularity: str, tile: Tile | None) -> Tile:
    """Return the tile that is meant: `tile` if it is given, else what `granularity` has.

    Raises
    ------
    InputError
        If a size is out of range, or sides are given where no tiles are chosen.
    """
    if tile is None:
        return ARRAY_TILE if granularity == "tile" else MAX_TILE
    pair = isinstance(tile, (tuple, list))
    sides: Any = tile if pair else (tile,)
    if len(sides) != 1 + pair or not all(type(n) is int and 1 <= n <= MAX_TILE for n in sides):
        raise InputError(
            f"tile is {tile!r}; it must be an integer from 1 to {MAX_TILE}, or two of them, input"
            " by output channels like (16, 16)"
        )
    if not pair:
        return int(sides[0])
    if granularity != "tile":
        raise InputError(
            f"tile is {tile!r}, input by output channels: that needs granularity 'tile', not"
            f" {granularity!r}"
        )
    return sides[0], sides[1]


def select(
    gain: np.ndarray,
    ratio: float,
    granularity: str = "element",
    tile: Tile | None = None,
    group: int = 1,
) -> np.ndarray:
    """Choose which weights get a second word: the select tensor S.

    Parameters
    ----------
    gain : float array of shape (O, kh, kw, C / group)
        What a second word is worth at each weight; 0 where the second word would be zero.
    ratio : float
        `residual_ratio`, the share of weights that may have a second word.
    granularity : {"element", "tile", "filter"}
        Whether weights, tiles, or output channels are chosen.
    tile : int or (Tn, Tm), optional
        Consecutive weights of the flattened matrix, at most 256; or input by output channels at
        one kernel position, see `tiling.Tiling`. By default (16, 16).
    group : int
        Groups of the convolution.

    Returns
    -------
    bool array of the same shape.
    """
    return eligible(gain, ratio, granularity, tile, group) & (gain > 0)


def eligible(
    gain: np.ndarray,
    ratio: float,
    granularity: str = "element",
    tile: Tile | None = None,
    group: int = 1,
) -> np.ndarray:
    """Choose as `select` does; weights that gain nothing are chosen as well."""
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity {granularity!r} is not one of {', '.join(GRANULARITIES)}")
    if not 0.0 <= ratio <= 1.0:
        raise InputError(f"residual_ratio is {ratio}; it must be from 0 to 1")
    blocks = Blocks(gain.shape, granularity, tile_of(granularity, tile), group)
    score = blocks.sums(gain)
    return blocks.spread(largest(score, int(math.floor(ratio * len(score) + 1e-9))))


def largest(score: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` largest of a vector, of equal ones the first; returns a bool array."""
    if count == 0:
        return np.zeros(score.shape, bool)
    least = np.partition(score, len(score) - count)[len(score) - count]
    picked = score > least
    picked[np.flatnonzero(score == least)[: count - np.count_nonzero(picked)]] = True
    return picked


class Blocks:
    """The weights of a layer as what is chosen together: weights, tiles or filters.

    Parameters
    ----------
    shape : (O, kh, kw, C / group)
    granularity, tile, group : as of `select`
    """

    def __init__(self, shape: tuple[int, ...], granularity: str, tile: Tile, group: int) -> None:
        self._shape, self._run = shape, 1
        self._tiling: Tiling | None = None
        if isinstance(tile, tuple):
            outputs, kh, kw, inputs = shape
            self._tiling = Tiling((outputs, kh, kw, inputs), tile, group)
        elif granularity != "element":
            self._run = tile if granularity == "tile" else math.prod(shape[1:])

    @property
    def size(self) -> int | np.ndarray:
        """Weights of a block, or of each, int64 (blocks,), if that is not the same for all.

        A run of consecutive weights that the end cuts short counts as whole.
        """
        return self._run if self._tiling is None else self._tiling.sizes()

    def sums(self, gain: np.ndarray) -> np.ndarray:
        """Add up the gains of each block, float64 (blocks,)."""
        if self._tiling is not None:
            return self._tiling.sums(gain)
        padded = np.zeros(-(-gain.size // self._run) * self._run, np.float64)
        padded[: gain.size] = gain.ravel()
        return padded.reshape(-1, self._run).sum(axis=1)

    def spread(self, chosen: np.ndarray) -> np.ndarray:
        """Mark all weights of the chosen blocks."""
        if self._tiling is not None:
            return self._tiling.spread(chosen)
        count = math.prod(self._shape)
        return np.repeat(chosen, self._run)[:count].reshape(self._shape)


def gains(
    w: np.ndarray, alpha: np.ndarray, bits: int, residual_shift: int, clip: int
) -> np.ndarray:
    """Return the squared error that each weight's second word removes, float64 (O, K) (section 2).

    Parameters
    ----------
    w : float32 array of shape (O, ...)
    alpha : float32 array of shape (O,)
    bits, residual_shift, clip : int
    """
    return _words(w, alpha, bits, residual_shift, clip)[2]


def _words(
    w: np.ndarray, alpha: np.ndarray, bits: int, residual_shift: int, clip: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both codes of every weight, (O, K), and the gains of the second."""
    matrix = np.ascontiguousarray(w, np.float32).reshape(w.shape[0], -1)
    first, second = np.empty(matrix.shape, np.uint8), np.empty(matrix.shape, np.uint8)
    r1, r2 = np.empty_like(matrix), np.empty_like(matrix)
    _two_words(matrix, alpha, exponent_levels(bits), residual_shift, clip, first, second, r1, r2)
    # The squared error that a second word removes, in real units of the layer.
    gain = (r1.astype(np.float64) ** 2 - r2.astype(np.float64) ** 2) * (
        alpha.astype(np.float64)[:, None] ** 2
    )
    gain[second == 0] = 0
    return first, second, gain


@njit(cache=True, nogil=True, inline="always")
def _nearest_level(r, top):
    """Level of `_nearest_code`; `top` is the largest."""
    magnitude = np.float32(abs(r))
    bits = np.int32((magnitude.view(np.int32) + np.int32(0x3FFFFF)) & np.int32(0x7F800000))
    level = min(max(bits.view(np.float32), np.float32(1)), top)
    level = level if magnitude > np.float32(0.5) else np.float32(0)
    return -level if r < np.float32(0) else level


@njit(cache=True, nogil=True, error_model="numpy")
def _errors(w, alpha, levels, residual_shift, clip, one, gain):
    """Squared error of each weight of rows [O, K] in one word, and what a second takes from it."""
    _, top, bound, fine = _grid(levels, residual_shift, clip)
    coarse, zero = np.float32(1) / fine, np.float32(0)  # exact, as all powers of two
    for o in range(w.shape[0]):
        unit = alpha[o]
        for i in range(np.uintp(w.shape[1])):
            relative = w[o, i] / unit
            r0 = min(max(relative * top, -bound), bound)
            r1 = (r0 - _nearest_level(r0, top)) * fine
            r2 = r1 - _nearest_level(r1, top)
            # What clipping cuts off stays an error whatever the words are.
            beyond = max(np.float32(abs(relative)) * top - bound, zero)
            lost = -beyond if relative < zero else beyond
            first, both = r1 * coarse + lost, r2 * coarse + lost
            one[o, i] = first * first
            gain[o, i] = max(first * first - both * both, zero)


def _channel_error(matrix, alpha, levels, residual_shift, clip, ratio, second, one, gain):
    """Squared error per channel if every channel spends `ratio` on its own best second words.

    If `second` says which weights have them, it is these.
    """
    _errors(matrix, alpha, levels, residual_shift, clip, one, gain)
    chosen = int(ratio * matrix.shape[1])
    total = one.sum(axis=1, dtype=np.float64)
    if second is not None:
        total -= gain.sum(axis=1, dtype=np.float64, where=second)
    elif chosen:
        best = np.partition(gain, matrix.shape[1] - chosen, axis=1)[:, matrix.shape[1] - chosen :]
        total -= best.sum(axis=1, dtype=np.float64)
    return total * (alpha.astype(np.float64) / 2.0 ** (levels - 1)) ** 2


def search_alpha(
    w: np.ndarray,
    bits: int,
    *,
    residual_ratio: float = 0.0,
    residual_shift: int = 0,
    clip: int | None = None,
    second: np.ndarray | None = None,
) -> np.ndarray:
    """Find alpha per output channel by minimising squared error; max |w| is the upper end.

    Parameters
    ----------
    w : float32 array of shape (O, ...)
    bits, residual_shift, clip : int
    residual_ratio : float
        Second words taken into account in the error: those of each channel that gain most.
    second : bool array of the shape of `w`, optional
        Instead, the weights that have one.

    Returns
    -------
    float32 array of shape (O,), positive; 1, which makes every word zero, for a channel of zeros
    or of weights below `NEGLIGIBLE`.
    """
    levels = exponent_levels(bits)
    clip = default_clip(bits) if clip is None else clip
    matrix = np.ascontiguousarray(w, np.float32).reshape(w.shape[0], -1)
    top = np.abs(matrix).max(axis=1)
    top[top < NEGLIGIBLE] = 1
    alpha = top.copy()
    together = max(1, _SEARCHED // matrix.shape[1])
    for begin in range(0, len(matrix), together):
        rows = slice(begin, begin + together)
        part, best = matrix[rows], np.full(len(matrix[rows]), np.inf)
        own = None if second is None else second.reshape(matrix.shape)[rows]
        one, gain = np.empty_like(part), np.empty_like(part)
        for octave in _ALPHA_OCTAVES:
            candidate = (top[rows] * 2.0**-octave).astype(np.float32)
            error = _channel_error(
                part, candidate, levels, residual_shift, clip, residual_ratio, own, one, gain
            )
            better = error < best
            best[better] = error[better]
            alpha[rows][better] = candidate[better]
    return alpha


def encode(
    w: np.ndarray,
    bits: int = 4,
    residual_ratio: float = 0.15,
    *,
    granularity: str = "element",
    tile: Tile | None = None,
    residual_shift: int = 0,
    clip: int | None = None,
    alpha: np.ndarray | None = None,
    group: int = 1,
) -> LogWeights:
    """Quantize the float weights of one layer to STLQ codes (sections 1 and 2).

    Parameters
    ----------
    w : float array of shape (O, kh, kw, C / group)
        Finite.
    bits : int
        Width of a word, 2 to 5.
    residual_ratio : float
        NZR asked for, 0 to 1.
    granularity : {"element", "tile", "filter"}
    tile : int or (Tn, Tm), optional
        See `select`.
    residual_shift : int
        s, 0 to 4.
    clip : int, optional
        1 or 2; by default 2 below 4 bits, else 1.
    alpha : float32 array of shape (O,), optional
        Given, it is used as it is; otherwise it is searched.
    group : int
        Groups of the convolution; tiles of an array are cut by them.

    Returns
    -------
    LogWeights

    Raises
    ------
    InputError
        If a setting is out of range or `w` is not a finite four-dimensional array.
    """
    clip = default_clip(bits) if clip is None else clip
    if clip not in (1, 2):
        raise InputError(f"clip is {clip}; it must be 1 or 2")
    if not 0 <= residual_shift <= MAX_RESIDUAL_SHIFT:
        raise InputError(
            f"residual_shift is {residual_shift}; it must be from 0 to {MAX_RESIDUAL_SHIFT}"
        )
    w = np.ascontiguousarray(w, np.float32)
    if w.ndim != 4 or w.size == 0:
        raise InputError(f"weights have shape {w.shape}; expected (O, kh, kw, C / group)")
    if not np.isfinite(w).all():
        raise InputError("weights hold NaN or infinity")
    tile = tile_of(granularity, tile)
    search = partial(search_alpha, w, bits, residual_shift=residual_shift, clip=clip)
    if alpha is None and granularity == "element":
        alpha = search(residual_ratio=residual_ratio)
    elif alpha is None:
        # Few channels have the second words of their own worst weights, those of blocks: alpha is
        # that of first words, and of both where blocks are chosen with it.
        gain = gains(w, search(), bits, residual_shift, clip).reshape(w.shape)
        alpha = search(second=select(gain, residual_ratio, granularity, tile, group))
    alpha = np.ascontiguousarray(alpha, np.float32)
    first, second, gain = (
        values.reshape(w.shape) for values in _words(w, alpha, bits, residual_shift, clip)
    )
    second[~select(gain, residual_ratio, granularity, tile, group)] = 0
    sides = tile if isinstance(tile, tuple) else None
    return LogWeights(first, second, alpha, bits, residual_shift, clip, sides)


@njit(cache=True, nogil=True, inline="always")
def _both(w, unit, fine, bound, levels):
    """Codes of a weight and what these stand for with one word and with two, in real units."""
    r0 = min(max(np.float32(w / unit), -bound), bound)
    code0 = _nearest_code(r0, levels)
    one = _level(code0, levels)
    code1 = _nearest_code((r0 - one) * fine, levels)
    return code0, code1, one * unit, (one + _level(code1, levels) / fine) * unit


@njit(cache=True, nogil=True)
def _round_columns(
    w, update, alpha, levels, residual_shift, clip, eligible, least, first, second, gain
):
    """Round the columns of w one by one; leaves in w their errors, over the update's diagonal."""
    levels, top, bound, fine = _grid(levels, residual_shift, clip)
    for g in range(w.shape[0]):
        for o in range(w.shape[1]):
            unit = alpha[g, o] / top
            for j in range(w.shape[2]):
                code0, code1, one, two = _both(w[g, o, j], unit, fine, bound, levels)
                one_error = (w[g, o, j] - one) / update[g, j, j]
                two_error = (w[g, o, j] - two) / update[g, j, j]
                gain[g, o, j] = one_error * one_error - two_error * two_error if code1 else 0.0
                chosen = eligible[g, o, j] and gain[g, o, j] > least
                first[g, o, j] = code0
                second[g, o, j] = code1 if chosen else 0
                error = two_error if chosen else one_error
                w[g, o, j] = error
                for k in range(j + 1, w.shape[2]):
                    w[g, o, k] -= error * update[g, j, k]


def round_in_turn(
    w: np.ndarray, update: np.ndarray, alpha: np.ndarray, bits: int, residual_shift: int,
    clip: int, eligible: np.ndarray, least: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Choose codes column by column, each error spread over the columns that follow.

    Parameters
    ----------
    w : float64 array of shape (group, O, K)
        Columns in the order in which they are rounded.
    update : float64 array of shape (group, K, K)
        Upper triangular; column k gets w[:, k] -= error[:, j] * update[j, k] / update[j, j].
    alpha : float32 array of shape (group, O)
    bits, residual_shift, clip : int
    eligible : bool array of shape (group, O, K)
        Which weights may have second words.
    least : float
        What a second word must gain more than.

    Returns
    -------
    first, second : uint8 arrays of shape (group, O, K)
    gain : float64 array of shape (group, O, K)
        What a second word takes, or would take, from the squared error, over update[j, j]^2.
    lost : float64 array of shape (group, O)
        The squared error of every output.

    Notes
    -----
    An error counts over update[j, j]: what later columns cannot make up for.
    """
    w, levels = w.copy(), exponent_levels(bits)
    first, second, gain = (np.empty(w.shape, t) for t in (np.uint8, np.uint8, np.float64))
    lost = np.zeros(w.shape[:2])
    for begin in range(0, w.shape[2], _COLUMNS):
        part = slice(begin, end := begin + _COLUMNS)
        results = [np.empty(w[..., part].shape, x.dtype) for x in (first, second, gain)]
        errors = w[..., part].copy()
        _round_columns(
            errors, update[:, part, part].copy(), alpha, levels, residual_shift, clip,
            eligible[..., part].copy(), least, *results,
        )  # fmt: skip
        for target, result in zip((first, second, gain), results, strict=True):
            target[..., part] = result
        lost += np.square(errors).sum(axis=2)
        w[..., end:] -= errors @ update[:, part, end:]
    return first, second, gain, lost


@njit(cache=True, nogil=True)
def round_again(
    w, slope, moments, alpha, levels, residual_shift, clip, eligible, least, first, second, gain
):
    """Round each weight anew for what all others of its output lose: coordinate descent, in place.

    Parameters
    ----------
    w : float64 array of shape (group, O, K)
        What the codes stand for.
    slope : float64 array of shape (group, O, K)
        What these lose, times `moments`.
    moments : float64 array of shape (group, K, K)
        Symmetric.
    alpha : float32 array of shape (group, O)
    levels, residual_shift, clip : int
    eligible : bool array of shape (group, O, K)
        Which weights may have second words.
    least : float
        What a second word must gain more than.
    first, second : uint8 arrays of shape (group, O, K)
    gain : float64 array of shape (group, O, K)
        Is set to what a second word takes, or would take, from the squared error of the output.
    """
    levels, top, bound, fine = _grid(levels, residual_shift, clip)
    for g in range(w.shape[0]):
        for j in range(w.shape[2]):  # one row of moments serves all outputs
            power = moments[g, j, j]
            for o in range(w.shape[1]):
                best = w[g, o, j] - slope[g, o, j] / power
                code0, code1, one, two = _both(best, alpha[g, o] / top, fine, bound, levels)
                taken = power * ((best - one) ** 2 - (best - two) ** 2) if code1 else 0.0
                gain[g, o, j] = taken
                chosen = eligible[g, o, j] and taken > least
                first[g, o, j] = code0
                second[g, o, j] = code1 if chosen else 0
                moved = (two if chosen else one) - w[g, o, j]
                if moved != 0.0:
                    w[g, o, j] += moved
                    for k in range(w.shape[2]):
                        slope[g, o, k] += moved * moments[g, j, k]
