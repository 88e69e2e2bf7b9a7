"""Programs that count which of their parts a team does, and when."""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, types

from logshift.kernels.machine.native import (
    as_pointer,
    atomic_add,
    atomic_load,
    pause,
)

SIGNATURE = types.void(types.CPointer(types.int64), *[types.intp] * 4)


NONE, ALL = -1, -2  # of the slots
SIGNATURE = types.void(types.CPointer(types.int64), *[types.intp] * 4)


@cfunc(SIGNATURE)
def count(arguments, first_part, end_part, parts, slot):
    """Count each part, and parts that come before all of the step before are done.

    arguments: address of the counts of parts, of the step's sum and of that of the step before,
    how many parts that has, address of the mistakes, of who did each part; a slot, or ALL, and
    what it waits for: an address of a word that is no longer 0, or 0 for all other parts.
    """
    a = carray(arguments, 8)
    patience = 10**9
    while a[6] in (slot, ALL) and patience > 0:
        others = parts - (end_part - first_part)
        if atomic_load(np.uintp(a[7])) != 0 if a[7] else atomic_load(np.uintp(a[1])) >= others:
            break
        pause()
        patience -= 1
    if a[3] > 0 and atomic_load(np.uintp(a[2])) != a[3]:
        atomic_add(np.uintp(a[4]), 1)
    who = carray(as_pointer(np.uintp(a[5])), parts, np.int64)
    for part in range(first_part, end_part):
        who[part] = slot
        atomic_add(np.uintp(a[0] + 8 * part), 1)
    atomic_add(np.uintp(a[1]), end_part - first_part)


class Steps:
    """A program of `count`, and what it finds."""

    def __init__(self, shapes, waits=(NONE, 0)):
        self.counts = [np.zeros(homes * parts, np.int64) for homes, parts in shapes]
        self.who = [np.full(homes * parts, -1, np.int64) for homes, parts in shapes]
        self.sums, self.mistakes = np.zeros(len(shapes), np.int64), np.zeros(1, np.int64)
        # A step for one thread is called with one part, whatever it could be cut into.
        self.counts, self.who = (
            [a[:1] if homes == 1 else a for a, (homes, _) in zip(arrays, shapes, strict=True)]
            for arrays in (self.counts, self.who)
        )
        address, before = self.sums.ctypes.data, [0, *map(len, self.counts)]
        self.arguments = np.array([
            (c.ctypes.data, address + 8 * i, address + 8 * (i - 1), before[i],
             self.mistakes.ctypes.data, w.ctypes.data, *waits)
            for i, (c, w) in enumerate(zip(self.counts, self.who, strict=True))
        ], np.int64)  # fmt: skip
        rows = [
            (count.address, row.ctypes.data, homes, parts)
            for row, (homes, parts) in zip(self.arguments, shapes, strict=True)
        ]
        self.program = np.array(rows, np.int64).reshape(-1, 4)

    def run(self, team):
        for array in (*self.counts, self.sums):
            array[:] = 0
        team.run(self.program)
        assert self.mistakes[0] == 0
        for counts in self.counts:
            assert (counts == 1).all()
