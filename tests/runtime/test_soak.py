"""Long runs: many threads, many sizes, neighbours, forks in the middle of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.packed_nets import pictures, small_network

from logshift.runtime import Session

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_and_bits_over_many_runs_beside_busy_processes():
    done = subprocess.run(
        [sys.executable, "-m", "support.soak"], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == 0
    assert found["end"] <= 1.05 * found["early"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_while_other_threads_run():
    session = Session(small_network(), threads=3)
    x = pictures(3, 40, 40)
    expected, ended, wrong = session.run(x), threading.Event(), []

    def work():
        while not ended.is_set():
            if not np.array_equal(session.run(x), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(100):
            child = os.fork()
            if child == 0:
                same = all(np.array_equal(session.run(x), expected) for _ in range(3))
                os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        for worker in workers:
            worker.join()
    assert not wrong
