"""Running a program of kernels on a team of threads.

A program is an int64 array (steps, 3): the address of a kernel, that of its argument record, and
how many threads the step is worth. All threads walk through it together, in native code without the
interpreter's lock, and meet at a barrier around every step that is shared; Python is entered once
per run, not once per layer.

Workers wait for the next program in native code for a moment, then go to sleep: run after run finds
them awake, and an idle process burns no core.

Numba's own threading layers are not used: one is not safe to call from several threads, another
not after `fork`, and the one that is both is not installed everywhere.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue

import numpy as np
from numba import carray, types

from logshift.kernels.jit import njit
from logshift.kernels.memory import aligned
from logshift.kernels.native import (
    as_pointer,
    atomic_add,
    atomic_load,
    call_kernel,
    yield_thread,
)

_SPINS = 2000  # loads of a word before a waiting thread offers its core to others
_YIELDS = 200  # how often a worker without a program does so before it goes to sleep

# What a team shares, each int64 in a cache line of its own: how many have arrived at the barrier,
# which meeting it is; which program it is, where it lies and how many steps need the workers;
# whether a program is about to come; how many workers sleep, or are about to.
_ARRIVED, _MEETING, _JOB, _PROGRAM, _STEPS, _EXPECTED, _ASLEEP = range(0, 7 * 64, 64)

_PROGRAM_TYPE = types.int64[:, ::1]


@njit(inline="always")
def _set(address, value):
    carray(as_pointer(address), 1, np.int64)[0] = value


@njit(error_model="numpy")
def _walk(program, thread, threads, words):
    steps = program.shape[0]
    for step in range(steps):
        parts = min(program[step, 2], threads)
        if thread < parts:
            call_kernel(program[step, 0], program[step, 1], thread, parts)
        # One thread's steps in a row need no meeting.
        if parts == 1 and (step + 1 == steps or min(program[step + 1, 2], threads) == 1):
            continue
        meeting = atomic_load(words + _MEETING)
        if atomic_add(words + _ARRIVED, 1) == threads - 1:
            atomic_add(words + _ARRIVED, -threads)
            atomic_add(words + _MEETING, 1)
            continue
        spins = 0
        while atomic_load(words + _MEETING) == meeting:
            spins += 1
            if spins > _SPINS:
                yield_thread()


@njit(error_model="numpy")
def _steps_shared(program):
    """Count the steps up to the last one that is worth more than one thread."""
    steps = program.shape[0]
    while steps > 0 and program[steps - 1, 2] == 1:
        steps -= 1
    return steps


@njit(
    types.intp(_PROGRAM_TYPE, types.uintp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _announce(program, words):
    """Keep workers from falling asleep; returns how many do, or -1 if they are not needed."""
    if _steps_shared(program) == 0:
        return -1
    atomic_add(words + _EXPECTED, 1)
    return atomic_add(words + _ASLEEP, 0)


@njit(
    types.void(_PROGRAM_TYPE, types.intp, types.uintp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _execute(program, threads, words):
    if threads > 1:
        _set(words + _PROGRAM, program.ctypes.data)
        _set(words + _STEPS, _steps_shared(program))
        atomic_add(words + _JOB, 1)
        _set(words + _EXPECTED, 0)
    _walk(program, 0, threads, words)


@njit(
    types.int64(types.intp, types.intp, types.int64, types.uintp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _serve(thread, threads, served, words):
    """Execute programs as they come; returns the last one's number when none did for a while.

    The caller must then wait for a call, and enter the time it does in _ASLEEP.
    """
    spins = 0
    while True:
        job = atomic_load(words + _JOB)
        if job != served:
            # Steps behind the last shared one are not looked at: the program may be gone by then.
            shape = (atomic_load(words + _STEPS), 3)
            program = carray(as_pointer(np.uintp(atomic_load(words + _PROGRAM))), shape, np.int64)
            _walk(program, thread, threads, words)
            served = job
            spins = 0
        spins += 1
        if spins > _SPINS:
            yield_thread()
        if spins > _SPINS + _YIELDS:
            atomic_add(words + _ASLEEP, 1)
            # Whoever announces a program from here on sees a sleeper, and calls.
            if atomic_add(words + _EXPECTED, 0) == 0 and atomic_add(words + _JOB, 0) == served:
                return served
            atomic_add(words + _ASLEEP, -1)
            spins = 0


@njit(types.void(types.uintp), cache=True)
def _wake(words):
    atomic_add(words + _ASLEEP, -1)


class Team:
    """A caller and `threads - 1` workers; one program at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._busy = threading.Lock()
        self._words = aligned((7 * 8,), np.int64)
        self._words[:] = 0
        self._address = self._words.ctypes.data
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._workers = 0

    def _hire(self) -> None:
        while self._workers < self.threads - 1:
            thread = self._workers + 1
            threading.Thread(
                target=_work, args=(self._calls, thread, self.threads, self._words),
                name=f"logshift-{thread}", daemon=True,
            ).start()  # fmt: skip
            self._workers = thread

    def run(self, program: np.ndarray) -> None:
        """Execute a program; returns when every step is done.

        If the team is busy with another caller's program, this one runs on its caller's thread
        alone: the result is the same, and nobody waits for anybody.
        """
        if os.getpid() != self._pid:  # workers do not survive a fork
            self._start()
        if self.threads == 1 or not self._busy.acquire(blocking=False):
            _execute(program, 1, 0)
            return
        busy = self._busy
        try:
            asleep = _announce(program, self._address)
            if asleep < 0:
                _execute(program, 1, 0)
                return
            self._hire()
            for _ in range(asleep):
                self._calls.put(None)
            _execute(program, self.threads, self._address)
        except BaseException:  # an interrupt before the native code: nothing comes any more
            self._words[_EXPECTED // 8] = 0
            raise
        finally:
            busy.release()


def _work(calls: SimpleQueue[None], thread: int, threads: int, words: np.ndarray) -> None:
    address, served = words.ctypes.data, 0
    while True:
        served = _serve(thread, threads, served, address)
        calls.get()
        _wake(address)


@cache
def team(threads: int) -> Team:
    """Return the process's team of a size; sessions share it."""
    return Team(threads)


def default_threads() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
