"""Weights as C code reads them: what is to be added to what, and shifted how far.

With the layout "fast" a row, which is an output channel, is a program of 16-bit numbers (32-bit
ones where a patch is too large), a list of offsets for each exponent and sign. Sums of two pixels'
codes lie side by side in one 32-bit word: by Horner's rule the sums of an exponent are doubled as
those of the next one are added to them, until they might not fit 16 bits with a sign any more. What
they are at most is known here, so here it is decided where they are moved to sums of 32 bits
("flushed").

    segment: additions | subtractions << 8, operation, offsets to add, offsets to subtract
    operation: below 16 a shift of the sums to the left; FLUSH + d: total = (total << d) + sums,
    which begin anew; END + d: the same, and the row ends

With "small" a row is its codes as in the file, b bits each, whose sums go to buckets by code, and a
list of second words: two bytes of count, then for each the gap to its place and its bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logshift.kernels.stlq import bitpack
from logshift.kernels.stlq.codec import LogWeights

FLUSH, END = 32, 64
CHUNK = 128  # weights between two looks at the buckets of the layout "small": these hold 16 bits
_LANE = 2**15 - 1  # largest sum of one pixel
_MOST = 255  # entries of a list


@dataclass(frozen=True)
class Words:
    """All words of a convolution that are not zero, in the order (O, C / group, kh, kw).

    Attributes
    ----------
    row, place : int64 arrays
        Output channel, and position in its K weights.
    exponent : int64 array
        The word is 2^exponent, or
    negative : bool array
        the opposite of that.
    """

    row: np.ndarray
    place: np.ndarray
    exponent: np.ndarray
    negative: np.ndarray

    @staticmethod
    def of(weights: LogWeights) -> Words:
        """Return the words of weights (O, kh, kw, C / group)."""
        sign, found = 1 << (weights.bits - 1), []
        for codes, shift in ((weights.first, weights.residual_shift), (weights.second, 0)):
            codes = channels_first(codes).astype(np.int64)
            row, place = np.nonzero(codes)
            code = codes[row, place]
            found.append((row, place, (code & (sign - 1)) - 1 + shift, code >= sign))
        return Words(*map(np.concatenate, zip(*found, strict=True)))


def channels_first(values: np.ndarray) -> np.ndarray:
    """Return the matrix (O, K) of weights (O, kh, kw, C / group), K over (C / group, kh, kw)."""
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)).reshape(len(values), -1)


def programs(words: Words, rows: int, top: int, unit: int) -> Iterator[list[int]]:
    """Yield the program of each row.

    Parameters
    ----------
    words : Words
    rows : int
    top : int
        Largest code there is.
    unit : int
        Distance of two places in a patch.
    """
    order = np.lexsort((words.place, words.negative, -words.exponent, words.row))
    row, place, exponent, negative = (
        values[order] for values in (words.row, words.place, words.exponent, words.negative)
    )
    bounds = np.searchsorted(row, np.arange(rows + 1))
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        own, offsets, minus = exponent[begin:end], place[begin:end] * unit, negative[begin:end]
        lists = [
            (int(e), offsets[(own == e) & ~minus].tolist(), offsets[(own == e) & minus].tolist())
            for e in np.unique(own)[::-1]
        ]
        yield _program(lists, top)


def _program(lists: list[tuple[int, list[int], list[int]]], top: int) -> list[int]:
    segments: list[tuple[list[int], list[int], int]] = []
    flushed = current = lists[0][0] if lists else 0
    low = high = 0  # bounds of a pixel's sum
    adds: list[int] = []
    subtracts: list[int] = []
    for exponent, plus, minus in lists:
        shift = current - exponent
        if adds or subtracts:
            more = max((high << shift) + top * len(plus), (low << shift) + top * len(minus))
            if more <= _LANE:
                segments.append((adds, subtracts, shift))
                low, high = low << shift, high << shift
            else:
                segments.append((adds, subtracts, FLUSH + flushed - current))
                flushed, low, high = current, 0, 0
        current, adds, subtracts = exponent, [], []
        while plus or minus:
            count, opposite = (
                min(len(found), (_LANE - bound) // top, _MOST)
                for found, bound in ((plus, high), (minus, low))
            )
            adds, plus = plus[:count], plus[count:]
            subtracts, minus = minus[:opposite], minus[opposite:]
            high, low = high + top * count, low + top * opposite
            if plus or minus:
                segments.append((adds, subtracts, FLUSH + flushed - current))
                flushed, low, high = current, 0, 0
    if current:
        segments += [(adds, subtracts, FLUSH + flushed - current), ([], [], END + current)]
    else:
        segments.append((adds, subtracts, END + flushed))
    return [
        number
        for plus, minus, operation in segments
        for number in (len(plus) | len(minus) << 8, operation, *plus, *minus)
    ]


def taps(words: Words, rows: int, offsets: np.ndarray) -> Iterator[list[int]]:
    """Yield each row of a depthwise convolution: counts, then offsets of pixels and shifts.

    `offsets` are those of the kernel's positions in a plane.
    """
    for row in range(rows):
        own = words.row == row
        line: list[int] = []
        for minus in (False, True):
            chosen = own & (words.negative == minus)
            line += [int(chosen.sum())]
            for place, exponent in zip(words.place[chosen], words.exponent[chosen], strict=True):
                line += [int(offsets[place]), int(exponent)]
        yield line


def packed(weights: LogWeights) -> Iterator[bytes]:
    """Yield each row of the layout "small": codes, then second words."""
    own = 1 << weights.bits  # buckets of first words; second ones have others
    for first, second in zip(
        channels_first(weights.first), channels_first(weights.second), strict=True
    ):
        places = np.nonzero(second)[0]
        line = [bitpack.pack(first, weights.bits).tobytes(), len(places).to_bytes(2, "little")]
        last = 0
        entries = bytearray()
        count = len(places)
        for place in places:
            gap = int(place) - last
            while gap > 255:  # bucket 0 is of words that are zero
                entries += bytes((255, 0))
                gap, count = gap - 255, count + 1
            entries += bytes((gap, own + int(second[place])))
            last = int(place)
        line[1] = count.to_bytes(2, "little")
        yield b"".join((*line, entries))
