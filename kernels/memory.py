"""Buffers that kernels may load and store with vector instructions, and read a little beyond.

Those of one program share an arena: buffers that are never in use at once may lie in one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Return an uninitialised array at a multiple of 64 bytes, 64 readable bytes behind it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 2 * ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


@dataclass
class Block:
    """Part of an arena, in use from the step `first` to the step `last`, both included.

    `size` is in bytes, a multiple of ALIGNMENT; `offset` is set by `arrange`.
    """

    size: int
    first: int
    last: int
    offset: int = 0

    def overlaps(self, other: Block) -> bool:
        """Whether they have bytes in common."""
        return self.offset < other.offset + other.size and other.offset < self.offset + self.size


def arrange(blocks: Sequence[Block]) -> int:
    """Give every block a place that it shares with none that is in use at the same time.

    The largest come first, each into the smallest gap that takes it. Returns the arena's size.
    """
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda b: b.size, reverse=True):
        others = [o for o in placed if o.first <= block.last and block.first <= o.last]
        end, best, smallest = 0, None, math.inf
        for other in sorted(others, key=lambda b: b.offset):
            if block.size <= other.offset - end < smallest:
                best, smallest = end, other.offset - end
            end = max(end, other.offset + other.size)
        block.offset = end if best is None else best
        placed.append(block)
    return max((b.offset + b.size for b in blocks), default=0)
