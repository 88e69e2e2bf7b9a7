"""The STLQ codec: what first and second log-exponent words mean, and from them to integers.

Sections and symbols (`alpha`, `L`, `q0`, `q1`, `r0`, `r1`, `S`, `W`) are those of
`docs/quantization.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.machine.jit import njit

MIN_BITS, MAX_BITS = 2, 5
MAX_RESIDUAL_SHIFT = 4
MAX_TILE = 256

_DECODED = 2**12  # weights decoded at a time by `join_words`: they stay in the cache
_NEGATIVE_ZERO = 2**24  # what it takes the code for that stands for nothing

_PIECE = 2**16  # weights decoded at a time: NumPy turns indices into int64


def exponent_levels(bits: int) -> int:
    """Return L, the number of non-zero magnitudes of a `bits`-bit word (section 1)."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"weight_bits is {bits}; it must be from {MIN_BITS} to {MAX_BITS}")
    return 2 ** (bits - 1) - 1


def limit(bits: int, residual_shift: int, clip: int) -> int:
    """Return the largest |W| that the format allows."""
    return clip << (exponent_levels(bits) - 1 + residual_shift)


def integer_type(limit: int) -> np.dtype:
    """Return the narrowest type for W up to a limit."""
    return np.min_scalar_type(-1 - limit)


@dataclass(frozen=True)
class LogWeights:
    """Weights of one layer as log-exponent codes.

    Attributes
    ----------
    first, second : uint8 arrays of shape (O, kh, kw, C / group)
        Codes: bit `bits - 1` is the sign, the bits below it the exponent field `e`; 0 is zero.
        `second` is 0 where no second word is selected.
    alpha : float32 array of shape (O,)
        Real value of the largest first-word magnitude, per output channel.
    bits : int
        Width b of a word.
    residual_shift : int
        s: the second word lies on a grid 2^s times finer.
    clip : int
        Bound of |W| in units of alpha: 1 or 2.
    tile : (Tn, Tm), optional
        Second words were chosen by tiles of an array, so many inputs by outputs; see `tiling`.
    """

    first: np.ndarray
    second: np.ndarray
    alpha: np.ndarray
    bits: int
    residual_shift: int = 0
    clip: int = 1
    tile: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(O, kh, kw, C / group)."""
        o, kh, kw, c = self.first.shape
        return o, kh, kw, c

    @property
    def nzr(self) -> float:
        """Non-zero ratio: weights with a non-zero second word over all weights."""
        return float(np.count_nonzero(self.second)) / self.second.size

    @property
    def limit(self) -> int:
        """Largest |W| the format allows: clip * 2^(L-1+s)."""
        return limit(self.bits, self.residual_shift, self.clip)

    @property
    def largest(self) -> int:
        """Largest |W| there is, within the limit or not."""
        return max((int(np.abs(w).max()) for _, w in self._pieces()), default=0)

    def sums(self) -> np.ndarray:
        """Return the sums of W and of |W| of every output channel, int64 of shape (O, 2)."""
        return channel_sums(self.integers().reshape(self.shape[0], -1))

    def words(self) -> LogWeights:
        """Return the same weights with both codes at hand."""
        return self

    def integers(self) -> np.ndarray:
        """Return W = (q0 << s) + q1, of the shape of `first`, in the narrowest type for `limit`."""
        w = np.empty(self.shape, integer_type(self.limit))
        for place, piece in self._pieces():
            w.reshape(-1)[place] = piece
        return w

    def _pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        first, second = self.first.reshape(-1), self.second.reshape(-1)
        for begin in range(0, first.size, _PIECE):
            place = slice(begin, begin + _PIECE)
            q0 = decode_codes(first[place], self.bits) << self.residual_shift
            yield place, q0 + decode_codes(second[place], self.bits)

    def unit(self) -> np.ndarray:
        """Return the real value of W = 1 per output channel, float64 of shape (O,)."""
        shift = exponent_levels(self.bits) - 1 + self.residual_shift
        return self.alpha.astype(np.float64) / 2.0**shift

    def values(self) -> np.ndarray:
        """Return the real weights, float32, of the shape of `first`."""
        unit = self.unit().reshape(-1, 1, 1, 1)
        return (self.integers() * unit).astype(np.float32)


def decode_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Turn codes into signed magnitudes in units of the word's grid.

    Parameters
    ----------
    codes : uint8 array, any shape
    bits : int

    Returns
    -------
    int32 array of the same shape, values 0 and ±2^(e-1).
    """
    levels = exponent_levels(bits)
    table = np.zeros(2**bits, np.int32)
    table[1 : levels + 1] = 1 << np.arange(levels)
    table[levels + 1 :] = -table[: levels + 1]
    return table[codes]


@njit(cache=True, nogil=True, error_model="numpy")
def channel_sums(w):
    """Add up w and |w| of every row of integers (O, K); returns int64 (O, 2)."""
    sums = np.zeros((w.shape[0], 2), np.int64)
    for o in range(w.shape[0]):
        total, magnitude = np.int64(0), np.int64(0)
        for i in range(np.uintp(w.shape[1])):
            value = np.int64(w[o, i])
            total += value
            magnitude += abs(value)
        sums[o, 0], sums[o, 1] = total, magnitude
    return sums


@njit(inline="always", error_model="numpy")
def _eight_bytes(stream, at):
    """Bytes from `at` on, the first one lowest; the compiler makes one load of it."""
    word = np.uint64(0)
    for i in range(8):
        word |= np.uint64(stream[at + np.uintp(i)]) << np.uint64(8 * i)
    return word


@njit(cache=True, nogil=True, error_model="numpy")
def join_words(first, mask, second, bits, residual_shift, w):
    """Decode streams of words to W (section 2) and look for what no stream may hold.

    Parameters
    ----------
    first, mask, second : uint8 (bytes,)
        Bit streams of `bitpack`: a first word and a bit for every weight, a second word for every
        bit that is set. Eight more bytes must be readable behind words; an empty `mask` stands
        for zeros.
    bits, residual_shift : int
    w : integer array (weights,), which is filled in; values wrap if its type is too narrow

    Returns
    -------
    largest : int
        Largest |W|, before it wraps.
    nonzero : int
        Second words that are not 0.
    allowed : bool
        Whether no word is the negative zero.
    """
    word_bits, one = np.uint64(bits), np.uint64(1)
    field = (one << word_bits) - one
    coarse, fine = np.zeros(32, np.int32), np.zeros(32, np.int32)
    levels = 2 ** (bits - 1) - 1
    for e in range(1, levels + 1):
        fine[e], fine[levels + 1 + e] = 1 << (e - 1), -(1 << (e - 1))
    coarse[:] = fine << np.int32(residual_shift)
    # So large that no sum with it can be mistaken for a weight.
    coarse[levels + 1] = fine[levels + 1] = _NEGATIVE_ZERO
    piece = np.empty(_DECODED, np.int32)
    largest, nonzero = np.int32(0), 0
    at = np.uint64(0)  # bits of `second` read so far
    for begin in range(0, w.size, _DECODED):
        count = min(_DECODED, w.size - begin)
        for eight in range(np.uintp((count + 7) // 8)):
            row = np.uintp(begin // 8) + eight
            words = _eight_bytes(first, row * np.uintp(bits))
            if mask.size == 0:
                for i in range(8):
                    piece[np.uintp(8) * eight + np.uintp(i)] = coarse[words & field]
                    words >>= word_bits
                continue
            chosen = np.uint64(mask[row])
            seconds = _eight_bytes(second, np.uintp(at >> np.uint64(3))) >> (at & np.uint64(7))
            for i in range(8):
                bit = chosen & one
                code = seconds & field & (np.uint64(0) - bit)
                nonzero += np.int64(code != np.uint64(0))
                piece[np.uintp(8) * eight + np.uintp(i)] = coarse[words & field] + fine[code]
                words >>= word_bits
                chosen >>= one
                seconds >>= word_bits * bit
                at += word_bits * bit
        for i in range(np.uintp(count)):
            largest = max(largest, abs(piece[i]))
            w[np.uintp(begin) + i] = piece[i]
    return largest, nonzero, largest < _NEGATIVE_ZERO // 2
