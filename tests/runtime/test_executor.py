"""The team of threads: every part of every step is done once, in order, whoever is late."""

from __future__ import annotations

import gc
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from support.steps import ALL, Steps

from logshift.kernels.machine.native import (
    ask_for_short_turns,
    current_core,
    leave_core,
)
from logshift.runtime import executor

IS_EMULATED = platform.machine() == "aarch64" and "LOGSHIFT_EMULATION" in os.environ
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or IS_EMULATED,
    reason="there is no fork, or QEMU does not survive that of a process with threads",
)


def programs(threads):
    alone = st.just((1, 1))
    shared = st.tuples(st.integers(2, max(2, threads)), st.sampled_from([1, 2, 3, 16, 255]))
    return st.lists(st.one_of(alone, shared) if threads > 1 else alone, max_size=12)


@settings(max_examples=60)
@given(st.data())
def test_every_part_is_done_once_and_in_order(data):
    threads = data.draw(st.sampled_from([1, 2, 3, 8]))
    steps = Steps(data.draw(programs(threads)))
    for seconds in (0, 0, 0.0005, 0):  # workers that spin, and that sleep
        time.sleep(seconds)
        steps.run(executor.team(threads))


def test_many_runs_on_more_threads_than_cores():
    threads = 2 * (os.cpu_count() or 1) + 1
    steps = Steps([(threads, 2), (1, 1), (2, 7), (threads, 16), (1, 1), (1, 1), (threads, 1)])
    for _ in range(300):
        steps.run(executor.team(threads))


def test_a_late_thread_holds_only_what_it_is_doing():
    """The worker does not go on before the caller has done all the rest: its home as well."""
    steps = Steps([(2, 16)], waits=(1, 0))
    for _ in range(5):
        steps.run(executor.team(2))
        assert (steps.who[0] == 1).sum() <= 12


def test_a_late_caller_holds_only_what_it_is_doing():
    """Workers do the caller's home, and the steps behind that are for one thread."""
    steps = Steps([(3, 16), (1, 1), (3, 3), (1, 1)], waits=(0, 0))
    for _ in range(5):
        steps.run(executor.team(3))


@pytest.mark.parametrize("threads", [2, 5])
def test_a_team_without_workers_does_everything(threads, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    team = executor.Team(threads)
    steps = Steps([(threads, 16), (1, 1), (threads, 3)])
    steps.run(team)
    assert all((who == 0).all() for who in steps.who)


def test_callers_of_one_team_do_not_wait_for_each_other():
    """One is held up in the middle until another one's program is done."""
    team, other = executor.team(2), Steps([(2, 4), (1, 1)])
    held = Steps([(2, 4)], waits=(ALL, other.sums[1:].ctypes.data))
    caller = threading.Thread(target=team.run, args=(held.program,))
    caller.start()
    time.sleep(0.02)
    team.run(other.program)
    assert other.sums.tolist() == [1, 1]  # whole steps: alone
    caller.join(60)
    assert not caller.is_alive()


@needs_fork
def test_a_team_works_after_a_fork():
    steps, team = Steps([(3, 4), (1, 1), (3, 2)]), executor.team(3)
    steps.run(team)
    child = os.fork()
    if child == 0:
        try:
            steps.run(team)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    steps.run(team)


def test_waiting_threads_burn_no_core():
    team = executor.team(4)
    steps = Steps([(4, 4)] * 3)
    steps.run(team)
    time.sleep(0.05)  # until they sleep
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1


_INTERRUPTED = """
    import _thread, sys, threading, time
    import numpy as np
    sys.path.insert(0, {tests!r})
    from support.steps import Steps
    from logshift.runtime import executor

    team, interrupts = executor.team(2), 0
    steps = Steps([(2, 8), (1, 1), (2, 8)] * 200)
    steps.run(team)
    print("ready", flush=True)
    while interrupts < 20:
        try:
            while True:
                steps.run(team)
        except KeyboardInterrupt:
            interrupts += 1
            print("again", flush=True)
    steps.run(team)
    busy = team._words[executor._BUSY // 8]
    assert busy == 0, busy
    print("done", flush=True)
"""


def test_interrupts_leave_the_team_in_order():
    if os.name == "nt":
        pytest.skip("signals cannot be sent to one process there")
    code = textwrap.dedent(_INTERRUPTED).format(tests=os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "again\n"
        output, errors = process.communicate(timeout=60)
        assert output == "done\n", errors
    finally:
        process.kill()


def test_callers_that_come_first_together_share_one_team():
    start, found = threading.Barrier(4), []

    def ask(threads):
        start.wait()
        found.append((threads, executor.team(threads)))

    for threads in range(150, 190):
        start.reset()
        askers = [threading.Thread(target=ask, args=(threads,)) for _ in range(4)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    for threads in range(150, 190):
        assert len({id(team) for number, team in found if number == threads}) == 1


def test_workers_keep_the_memory_that_they_look_at():
    team = executor.Team(3)
    Steps([(3, 4)]).run(team)
    words = weakref.ref(team._words.base)
    del team
    gc.collect()
    assert words() is not None
    for _ in range(50):  # would be put where the words were
        np.full(executor._CLAIMS // 8 + 48, -1, np.int64)
    time.sleep(0.01)


@needs_fork
def test_threads_of_a_fork_make_one_team():
    team = executor.Team(3)
    Steps([(3, 4)]).run(team)
    child = os.fork()
    if child == 0:
        try:
            sys.setswitchinterval(1e-6)
            failures = []

            def work():
                try:
                    steps = Steps([(3, 4)])
                    team.run(steps.program)
                except BaseException as error:
                    failures.append(error)

            callers = [threading.Thread(target=work) for _ in range(4)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            workers = [t for t in threading.enumerate() if t.name.startswith("logshift-")]
            os._exit(0 if not failures and len(workers) == 2 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_spread_keeps_order_and_raises_the_first_error(threads):
    assert executor.spread(lambda x: x * x, range(20), threads) == [x * x for x in range(20)]
    assert executor.spread(str, [], threads) == []
    with pytest.raises(ZeroDivisionError):
        executor.spread(lambda x: 1 // x, [1, 0, 2, 3], threads)


def test_spread_without_more_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert executor.spread(str, range(5), 4) == ["0", "1", "2", "3", "4"]


@njit
def _moved():
    before = current_core()
    leave_core(before)
    return before, current_core()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell cores")
def test_a_thread_leaves_its_core_and_may_come_back():
    allowed = os.sched_getaffinity(0)
    moves = [_moved() for _ in range(20)]
    assert {core for move in moves for core in move} <= allowed == os.sched_getaffinity(0)
    # A busy system may bring it back at once.
    assert len(allowed) == 1 or sum(before != after for before, after in moves) >= 10
    alone = min(allowed)
    try:
        os.sched_setaffinity(0, {alone})
        assert _moved() == (alone, alone) and os.sched_getaffinity(0) == {alone}
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no such scheduling here")
def test_asking_for_short_turns_changes_neither_policy_nor_priority():
    found = []

    def ask():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        for policy in (os.SCHED_OTHER, os.SCHED_IDLE):
            os.sched_setscheduler(threading.get_native_id(), policy, os.sched_param(0))
            ask_for_short_turns(2e-4)
            found.append(
                (os.sched_getscheduler(threading.get_native_id()),
                 os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            )  # fmt: skip

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(os.SCHED_OTHER, 5), (os.SCHED_IDLE, 5)]
