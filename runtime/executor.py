"""Running a program of kernels on a team of threads.

A program is an int64 array (steps, 2): the address of a kernel and of its argument record. All
threads walk through it together, in native code without the interpreter's lock, and meet at a
barrier after every step; Python is entered once per run, not once per layer.

Numba's own threading layers are not used: one is not safe to call from several threads, another
not after `fork`, and the one that is both is not installed everywhere.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue

import numpy as np
from numba import njit, types

from logshift.kernels.native import atomic_add, atomic_load, call_kernel, yield_thread

_SPINS = 2000  # loads of the barrier before a waiting thread offers its core to others

# Words of the barrier: how many have arrived, which meeting it is, whether to give up.
_ARRIVED, _MEETING, _ABORT = 0, 8, 16


@njit(
    types.void(types.int64[:, ::1], types.intp, types.intp, types.uintp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _execute(program, thread, threads, barrier):
    for step in range(program.shape[0]):
        call_kernel(program[step, 0], program[step, 1], thread, threads)
        if threads == 1:
            continue
        meeting = atomic_load(barrier + _MEETING)
        if atomic_add(barrier + _ARRIVED, 1) == threads - 1:
            atomic_add(barrier + _ARRIVED, -threads)
            atomic_add(barrier + _MEETING, 1)
            continue
        spins = 0
        while atomic_load(barrier + _MEETING) == meeting:
            if atomic_load(barrier + _ABORT) != 0:
                return
            spins += 1
            if spins > _SPINS:
                yield_thread()


class Team:
    """A caller and `threads - 1` sleeping workers; one program at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._busy = threading.Lock()
        self._barrier = np.zeros(3, np.int64)
        self._queues: list[SimpleQueue[np.ndarray]] = []

    def _hire(self) -> None:
        for thread in range(1, self.threads):
            queue: SimpleQueue[np.ndarray] = SimpleQueue()
            work = (queue, thread, self.threads, self._barrier)
            threading.Thread(
                target=_worker, args=work, name=f"logshift-{thread}", daemon=True
            ).start()
            self._queues.append(queue)

    def run(self, program: np.ndarray) -> None:
        """Execute a program; returns when every step is done.

        If the team is busy with another caller's program, this one runs on its caller's thread
        alone: the result is the same, and nobody waits for anybody.
        """
        if os.getpid() != self._pid:  # workers do not survive a fork
            self._start()
        if self.threads == 1 or not self._busy.acquire(blocking=False):
            _execute(program, 0, 1, 0)
            return
        busy, barrier = self._busy, self._barrier
        try:
            if not self._queues:
                self._hire()
            for queue in self._queues:
                queue.put(program)
            _execute(program, 0, self.threads, barrier.ctypes.data)
        except BaseException:  # an interrupt before the native code: nobody may wait for us
            barrier[_ABORT // 8] = 1
            self._start()
            raise
        finally:
            busy.release()


def _worker(queue: SimpleQueue[np.ndarray], thread: int, threads: int, barrier: np.ndarray) -> None:
    while True:
        _execute(queue.get(), thread, threads, barrier.ctypes.data)
        if barrier[_ABORT // 8]:
            return


@cache
def team(threads: int) -> Team:
    """Return the process's team of a size; sessions share it."""
    return Team(threads)


def default_threads() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
