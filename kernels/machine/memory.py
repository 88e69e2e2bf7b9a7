"""Buffers that kernels may load and store with vector instructions, and read a little beyond.

Those of one program share an arena: buffers that are never in use at once may lie in one place.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import types

from logshift.kernels.machine.jit import njit

ALIGNMENT = 64
_MAPPED = 2**20  # bytes from which on an arena has pages of its own
_PAGE = 2**21  # bytes of a large page of most machines: one that is not all mapped would be small
_SHELF = 2 * _PAGE - ALIGNMENT  # bytes of a shelf's arenas, but for larger arrays


def aligned(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Return an uninitialised array at a multiple of 64 bytes, 64 readable bytes behind it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 2 * ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def placed(values: np.ndarray, dtype: type) -> np.ndarray:
    """Return a copy of an array where vector instructions may load it."""
    out = aligned(values.shape, dtype)
    out[...] = values
    return out


def arena(size: int) -> np.ndarray:
    """Return uninitialised bytes, as `aligned` does, that go back to the system when let go.

    What an allocator hands out may stay with the process: arenas of one size after another would
    leave gaps that no other fits into.

    Raises
    ------
    MemoryError
    """
    if size < _MAPPED:
        return aligned((size,), np.uint8)
    # Private, as all memory is after a fork; the system's default is shared.
    flags = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    try:
        pages = -(-(size + ALIGNMENT) // _PAGE)
        region = mmap.mmap(-1, (pages + 1) * _PAGE, **flags)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(str(error)) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as NumPy does for large arrays
        with contextlib.suppress(OSError):  # a kernel without them
            region.madvise(mmap.MADV_HUGEPAGE)
    mapped = np.frombuffer(region, np.uint8)
    begin = -mapped.ctypes.data % _PAGE
    return mapped[begin : begin + size]


def trim() -> None:
    """Give memory that is free back to the system, where the allocator has a word for that."""
    if os.name != "nt" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


class Shelf:
    """Arrays that are kept side by side in arenas, for what lies in few large pages is read faster.

    May be used by several threads. An arena goes when the last array in it does.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # the rest of each arena
        self._lock = threading.Lock()

    def keep(self, values: np.ndarray) -> np.ndarray:
        """Return a copy of an array, placed as `aligned` ones are."""
        out = self._take(values.nbytes).view(values.dtype).reshape(values.shape)
        out[...] = values
        return out

    def _take(self, nbytes: int) -> np.ndarray:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            found = next((i for i, free in enumerate(self._free) if free.size >= size), None)
            if found is None:
                found = len(self._free)
                self._free.append(arena(max(size, _SHELF)))
            free = self._free[found]
            self._free[found] = free[size:]
        return free[:nbytes]


@dataclass
class Block:
    """Part of an arena, in use from the step `first` to the step `last`, both included.

    `size` is in bytes, a multiple of ALIGNMENT. `arrange` sets `offset`, and whether the block has
    bytes in common with any other, which is not in use at the same time then.
    """

    size: int
    first: int
    last: int
    offset: int = 0
    shared: bool = False


def arrange(blocks: Sequence[Block]) -> int:
    """Give every block a place that it shares with none that is in use at the same time.

    The largest come first, each into the smallest gap that takes it. Returns the arena's size.
    """
    order = sorted(blocks, key=lambda b: b.size, reverse=True)
    table = np.array([(b.size, b.first, b.last, 0, 0) for b in order], np.int64).reshape(-1, 5)
    size = _arrange(table)
    for block, (_, _, _, offset, shared) in zip(order, table.tolist(), strict=True):
        block.offset, block.shared = offset, shared != 0
    return size


@njit(types.int64(types.int64[:, ::1]), cache=True, nogil=True, error_model="numpy")
def _arrange(table):
    """Arrange rows of size, first, last, offset, shared; sets the latter two."""
    by_offset = np.empty(len(table), np.int64)  # rows placed, in the order of their offsets
    whole = 0
    for row in range(len(table)):
        size, first, last = table[row, 0], table[row, 1], table[row, 2]
        end, best, smallest = 0, -1, np.int64(2**62)
        for i in range(row):
            other = by_offset[i]
            if table[other, 1] > last or first > table[other, 2]:
                continue
            gap = table[other, 3] - end
            if size <= gap and gap < smallest:
                best, smallest = end, gap
            end = max(end, table[other, 3] + table[other, 0])
        offset = end if best < 0 else best
        table[row, 3] = offset
        whole = max(whole, offset + size)
        place = row
        while place > 0 and table[by_offset[place - 1], 3] > offset:
            by_offset[place] = by_offset[place - 1]
            place -= 1
        by_offset[place] = row
        for other in range(row):
            begin = table[other, 3]
            if begin < offset + size and offset < begin + table[other, 0]:
                table[row, 4] = table[other, 4] = 1
    return whole
