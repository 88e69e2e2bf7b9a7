"""Running programs on a team of threads, none of which waits for one that is not running.

A program is an int64 array (steps, 4): the address of a kernel, that of its argument record, how
many threads the step is worth, and how many parts each of these should find. It is executed in
native code without the interpreter's lock; Python is entered once per run, not once per layer.

The parts of a step that is shared lie in as many *homes* as threads are meant to do it. A thread
claims parts of its own home, most of them at once, and when there are none left, parts of others'
homes, from the other end. So on idle cores every thread does its home, as if the work had been
dealt out, while a thread that has been put to sleep, or has not woken up yet, holds nothing but
what it is in the middle of. Whoever does the last part of a step goes on with the steps behind
it, up to the next one that is shared: steps too small to share stay on that thread.

A thread that finds nothing to do spins for a moment, and then sleeps in the kernel until a step
is published. Everything is in one native call, so that an interrupt or an exception in the
interpreter never leaves a team behind that is half in use.

Numba's own threading layers are not used: one is not safe to call from several threads, another
not after `fork`, and the one that is both is not installed everywhere.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numba import carray, types

from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.native import (
    as_pointer,
    ask_for_short_turns,
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    atomic_store,
    call_kernel,
    clock,
    current_core,
    give_way,
    leave_core,
    pause,
    thread_clock,
    wait_at,
    wake_at,
)

MAX_THREADS = 256

_T = TypeVar("_T")
_R = TypeVar("_R")

# Columns of a program.
KERNEL, ARGUMENTS, HOMES, PARTS = range(4)
MAX_PARTS = 255  # of a home

_SPIN = 100e-6  # seconds that a thread without work spins before it sleeps
_SLICE = 200e-6  # seconds that a worker asks to be scheduled for

# In nanoseconds: what a thread seldom waits for others in a program unless these have been
# put to sleep; for how long the machine then counts as shared, and a thread that lost its core
# as one that has to share it; how long a thread may have a core that it shares until it offers it
# to others, at first and at the least; how often it looks.
_LATE, _PERIOD, _RECENTLY = 500_000, 200_000_000, 20_000_000
_TURN, _SHORTEST_TURN, _LOOK = 2_000_000, 300_000, 250_000

# What a team shares, each int64 in a cache line of its own, by their offsets.
#
# _PUBLISHED: number of the step that is being done << 18, its homes << 8, parts of each; no homes
#   between programs. Its lower half is what workers sleep on.
# _STEP: kernel and arguments of that step. Written before it is published, and not again before
#   all of its parts are done: who reads them and then claims a part has read the right ones.
# _DONE: how many of its parts are done.
# _PROGRAM: address, number of steps, and next step of the program: they belong to whoever did the
#   last part of a step, or to the caller before the first.
# _BUSY: whether a caller has the team. _ASLEEP: how many workers sleep, or are about to.
# _CALLER_ASLEEP: whether the caller sleeps, which it does on this word.
# _SHARED: which time it is that the machine counts as shared, or 0 while it does not; until when,
#   by the clock; how often it has been.
# _CALLER_CORE: on which core the caller began its program.
# _CLAIMS: one for each home: number of the step << 16, first part unclaimed << 8, end of those.
#   If that is an older step, all of the home's parts are unclaimed.
# Behind these, for each slot, what only its thread writes, its turn: when it began, 0 if it must
#   begin anew, and what time the thread had had by then; when it last looked, and last lost its
#   core; how long turns are, and which _SHARED that is for.
(
    _PUBLISHED, _STEP, _DONE, _PROGRAM, _BUSY, _ASLEEP, _CALLER_ASLEEP, _SHARED, _CALLER_CORE,
    _CLAIMS,
) = range(0, 10 * 64, 64)  # fmt: skip
_BEGAN, _HAD, _LOOKED, _LOST, _LENGTH, _OF = range(6)
_ALONE = 0  # in place of a team's address

_PROGRAM_TYPE = types.int64[:, ::1]


@njit(error_model="numpy")
def _claim(claims, number, parts, own):
    """Claim unclaimed parts of a home; returns the first << 8 and how many, 0 if there are none.

    Acquire when the claim is read, so that nothing of the step is read before; the exchange
    orders all of it before whatever is claimed later.
    """
    while True:
        claim = atomic_load(claims)
        step, first, end = claim >> 16, (claim >> 8) & 255, claim & 255
        if step < number:
            first, end = 0, parts
        elif step > number or first == end:
            return 0
        # Of its own a thread takes three quarters at first: few claims when nobody is late, and
        # something left for the others when it is.
        count = (3 * (end - first) + 3) // 4 if own else (end - first + 1) // 2
        left = (first + count) << 8 | end if own else first << 8 | (end - count)
        if atomic_replace(claims, claim, number << 16 | left):
            return (first if own else end - count) << 8 | count


@njit(error_model="numpy")
def _turn(team, threads, slot):
    address = team + np.uintp(_CLAIMS + 64 * (threads + slot))
    return carray(as_pointer(address), 6, np.int64)


@njit(error_model="numpy")
def _count_as_shared(team, now):
    shared = carray(as_pointer(team + np.uintp(_SHARED)), 3, np.int64)
    shared[1] = now + _PERIOD
    if shared[0] == 0:
        shared[2] += 1
        atomic_store(team + np.uintp(_SHARED), shared[2])


@njit(error_model="numpy")
def _begin_turn(turn):
    turn[_BEGAN], turn[_HAD] = clock(), thread_clock()
    turn[_LOOKED] = turn[_BEGAN]


@njit(error_model="numpy")
def _holds_up_others(team, threads, slot, now):
    """Whether there are threads that need not share their cores, and so lose by waiting."""
    for other in range(threads):
        if other != slot and now - _turn(team, threads, other)[_LOST] > _RECENTLY:
            return True
    return False


@njit(error_model="numpy")
def _offer_core(team, threads, slot, shared):
    """At the end of a turn, offer the core to others, before it is taken away.

    A thread that is put to sleep between parts holds up nobody, but what it loses by that it does
    not get back, while a thread that waits for others does.
    """
    turn, now = _turn(team, threads, slot), clock()
    if now > carray(as_pointer(team + np.uintp(_SHARED)), 2, np.int64)[1]:
        atomic_store(team + np.uintp(_SHARED), 0)
    elif turn[_OF] != shared:
        turn[_OF], turn[_LENGTH] = shared, _TURN
        _begin_turn(turn)
    elif turn[_BEGAN] == 0:
        _begin_turn(turn)
    elif now - turn[_LOOKED] > _LOOK:
        turn[_LOOKED] = now
        had = thread_clock() - turn[_HAD]
        lost = now - turn[_BEGAN] - had > _LOOK
        if lost:  # the turn was too long
            turn[_LENGTH] = max(_SHORTEST_TURN, min(turn[_LENGTH], had) * 3 // 4)
        elif had < turn[_LENGTH]:
            return
        elif _holds_up_others(team, threads, slot, now):
            give_way()
        _begin_turn(turn)
        if lost or turn[_BEGAN] - now > _LOOK:
            turn[_LOST] = turn[_BEGAN]
            _count_as_shared(team, turn[_BEGAN])


@njit(error_model="numpy")
def _work(team, published, threads, slot):
    """Do what can be claimed of a published step; returns whether that was the last of it."""
    homes, parts, number = (published >> 8) & 1023, published & 255, published >> 18
    done = 0
    shared = atomic_load(team + np.uintp(_SHARED))
    for i in range(homes):
        home = (slot + i) % homes
        claims = team + np.uintp(_CLAIMS + 64 * home)
        while True:
            if shared != 0:
                # Others need not wait for what is done.
                if done > 0 and atomic_add(team + np.uintp(_DONE), done) + done == homes * parts:
                    return True
                done = 0
                _offer_core(team, threads, slot, shared)
            # Before the claim, which proves that they are this step's.
            kernel = atomic_load(team + np.uintp(_STEP))
            arguments = atomic_load(team + np.uintp(_STEP + 8))
            claim = _claim(claims, number, parts, i == 0 and slot < homes)
            if claim == 0:
                break
            first, count = home * parts + (claim >> 8), claim & 255
            call_kernel(kernel, arguments, first, first + count, homes * parts, slot)
            done += count
    # Sequentially consistent: whoever adds up to all has seen what the others computed.
    return done > 0 and atomic_add(team + np.uintp(_DONE), done) + done == homes * parts


@njit(error_model="numpy")
def _go_on(team, slot, caller):
    """Do steps up to the next one that is shared, and publish that, or that there is none."""
    own = carray(as_pointer(team + np.uintp(_PROGRAM)), 3, np.int64)
    program = carray(as_pointer(np.uintp(own[0])), (own[1], 4), np.int64)
    step = own[2]
    while step < own[1] and program[step, HOMES] == 1:
        call_kernel(program[step, KERNEL], program[step, ARGUMENTS], 0, 1, 1, slot)
        step += 1
    number = (atomic_load(team + np.uintp(_PUBLISHED)) >> 18) + 1
    homes = parts = 0
    if step < own[1]:
        own[2] = step + 1
        homes, parts = program[step, HOMES], program[step, PARTS]
        atomic_store(team + np.uintp(_DONE), 0)
        atomic_store(team + np.uintp(_STEP), program[step, KERNEL])
        atomic_store(team + np.uintp(_STEP + 8), program[step, ARGUMENTS])
    # Sequentially consistent, as is what sleepers do: either they see this step, or are seen.
    atomic_exchange(team + np.uintp(_PUBLISHED), number << 18 | homes << 8 | parts)
    if not caller and atomic_load(team + np.uintp(_CALLER_ASLEEP)) != 0:
        if atomic_exchange(team + np.uintp(_CALLER_ASLEEP), 0) != 0:
            wake_at(team + np.uintp(_CALLER_ASLEEP), 1)
    if homes > 1:
        asleep = atomic_load(team + np.uintp(_ASLEEP))
        if asleep > 0:
            wake_at(team + np.uintp(_PUBLISHED), min(asleep, homes - 1))


@njit(error_model="numpy")
def _changed(team, published, spins):
    """Spin until something else is published; returns whether it was."""
    for _ in range(spins):
        if atomic_load(team + np.uintp(_PUBLISHED)) != published:
            return True
        pause()
    return False


@njit(error_model="numpy")
def _was_late(team, start):
    now = clock()
    if now - start > _LATE:
        _count_as_shared(team, now)


@njit(
    types.void(_PROGRAM_TYPE, types.uintp, types.intp, types.intp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _execute(program, team, threads, spins):
    """Execute a program as its caller; alone, if there is no team or somebody else has it."""
    if team == _ALONE or not atomic_replace(team + np.uintp(_BUSY), 0, 1):
        for step in range(program.shape[0]):
            call_kernel(program[step, KERNEL], program[step, ARGUMENTS], 0, 1, 1, 0)
        return
    turn = _turn(team, threads, 0)
    turn[_BEGAN] = 0
    atomic_store(team + np.uintp(_CALLER_CORE), current_core())
    own = carray(as_pointer(team + np.uintp(_PROGRAM)), 3, np.int64)
    own[0], own[1], own[2] = program.ctypes.data, program.shape[0], 0
    _go_on(team, 0, True)
    while True:
        published = atomic_load(team + np.uintp(_PUBLISHED))
        if (published >> 8) & 1023 == 0:
            break
        if _work(team, published, threads, 0):
            _go_on(team, 0, True)
        elif not _changed(team, published, spins):
            start = clock()
            atomic_exchange(team + np.uintp(_CALLER_ASLEEP), 1)
            if atomic_load(team + np.uintp(_PUBLISHED)) == published:
                wait_at(team + np.uintp(_CALLER_ASLEEP), 1)
            atomic_exchange(team + np.uintp(_CALLER_ASLEEP), 0)
            _was_late(team, start)
            turn[_BEGAN] = 0
    atomic_store(team + np.uintp(_BUSY), 0)


@njit(
    types.void(types.uintp, types.intp, types.intp, types.intp),
    nogil=True, cache=True, error_model="numpy",
)  # fmt: skip
def _serve(team, threads, slot, spins):
    """Take part in programs as they come, for ever."""
    turn = _turn(team, threads, slot)
    while True:
        published = atomic_load(team + np.uintp(_PUBLISHED))
        if _work(team, published, threads, slot):
            _go_on(team, slot, False)
        elif not _changed(team, published, spins):
            start = clock()
            atomic_add(team + np.uintp(_ASLEEP), 1)
            # Said before the last look, see `_go_on`; what a system compares by itself may be read
            # earlier.
            if atomic_load(team + np.uintp(_PUBLISHED)) == published:
                wait_at(team + np.uintp(_PUBLISHED), published)
            atomic_add(team + np.uintp(_ASLEEP), -1)
            if (published >> 8) & 1023 != 0:
                _was_late(team, start)
            turn[_BEGAN] = 0
            # Where all cores are taken, systems like to wake a thread on that of its waker, for
            # which alone it then has to wait.
            core = current_core()
            if core >= 0 and core == atomic_load(team + np.uintp(_CALLER_CORE)):
                leave_core(core)


@njit(types.void(types.uintp, types.intp), nogil=True, cache=True, error_model="numpy")
def _look(team, count):
    _changed(team, 0, count)


@cache
def _spins() -> int:
    """Return how many looks at a word take _SPIN seconds."""
    count, best, nothing = 1000, float("inf"), aligned((_CLAIMS // 8,), np.int64)
    nothing[:] = 0
    for _ in range(5):  # the shortest: the others may have been interrupted
        start = time.perf_counter()
        _look(nothing.ctypes.data, count)
        best = min(best, time.perf_counter() - start)
    return max(1, int(count * _SPIN / best))


class Team:
    """A caller and `threads - 1` workers; one program at a time.

    Workers are started when the first program comes that they are of use for, and again after a
    fork, which none survives.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._renew()
        renew_in_forks(self)

    def _renew(self) -> None:
        """Begin without workers: those of the parent do not survive a fork."""
        self._hiring = threading.Lock()  # another thread may have held it
        self._hired, self._slot = self.threads == 1, 1
        self._words = aligned((_CLAIMS // 8 + 16 * self.threads,), np.int64)
        self._words[:] = 0
        self._address = _ALONE if self.threads == 1 else self._words.ctypes.data

    def _hire(self) -> None:
        with self._hiring:
            if self._hired:
                return
            while self._slot < self.threads:
                worker = threading.Thread(
                    target=_work_for, args=(self._words, self.threads, self._slot, _spins()),
                    name=f"logshift-{self._slot}", daemon=True,
                )  # fmt: skip
                self._slot += 1  # before an interrupt may come: no two workers may have the same
                try:
                    worker.start()
                except RuntimeError:  # no more threads are to be had: the others do the work
                    break
            self._hired = True

    def run(self, program: np.ndarray) -> None:
        """Execute a program; returns when every step is done.

        If the team is busy with another caller's program, this one runs on its caller's thread
        alone: the result is the same, and nobody waits for anybody.

        Parameters
        ----------
        program : int64 array of shape (steps, 4)
            See the module; no step is worth more threads than there are.
        """
        if not self._hired:
            self._hire()
        _execute(program, self._address, self.threads, _spins())


def _work_for(words: np.ndarray, threads: int, slot: int, spins: int) -> None:
    """Be a worker; keeps the team's memory, which it looks at for ever."""
    ask_for_short_turns(_SLICE)
    _serve(words.ctypes.data, threads, slot, spins)


_teams: dict[int, Team] = {}


def team(threads: int) -> Team:
    """Return the process's team of a size; sessions share it."""
    found = _teams.get(threads)
    # Of several callers at once the first one's counts; a team without workers costs nothing.
    return _teams.setdefault(threads, Team(threads)) if found is None else found


_renewed: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_in_forks(thing: Any) -> None:
    """Have `thing._renew()` called in the child of every fork, while that has but one thread."""
    _renewed.add(thing)


def _renew_all() -> None:
    for thing in list(_renewed):
        thing._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


def spread(function: Callable[[_T], _R], items: Sequence[_T], threads: int) -> list[_R]:
    """Call a function with each item, on several threads, of which the caller's is one.

    For Python that leaves the interpreter for long. Where no more threads are to be had, fewer do.

    Parameters
    ----------
    function : callable(item)
    items : sequence
        Begun in this order.
    threads : int

    Returns
    -------
    list
        What the function returned for each; an error of the first item that had one is raised.
    """
    results: list[Any] = [None] * len(items)
    errors: dict[int, BaseException] = {}
    numbers = itertools.count()

    def work() -> None:
        while not errors and (number := next(numbers)) < len(items):
            try:
                results[number] = function(items[number])
            except BaseException as error:
                errors[number] = error

    helpers = [threading.Thread(target=work) for _ in range(min(threads, len(items)) - 1)]
    for index, helper in enumerate(helpers):
        try:
            helper.start()
        except RuntimeError:
            del helpers[index:]
            break
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[min(errors)]
    return results
