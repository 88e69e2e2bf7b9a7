"""How long a new process takes to the first result of a packed network.

    python -m benchmarks.startup model.stlq

Measured with an empty compile cache (cold) and after that (warm), each in new processes, the
interpreter's own start included; how much of the warm start is importing and loading; how long
`logshift warmup` takes with an empty cache; and what a size costs that a session has not met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.engines import Engine
from benchmarks.machine import describe
from logshift import runtime
from logshift.runtime.file import format


def first_result(
    path: Path, shape: tuple[int, ...], cache_directory: str, threads: int
) -> dict[str, float]:
    """Seconds from the start of a new process to its first result, and what they are made of."""
    engine = Engine("logshift", path, threads, shape, cache_directory)
    engine.close()
    return engine.start


_LOAD = """
import sys, time
begin = time.perf_counter()
from logshift import runtime
imported = time.perf_counter()
runtime.load(sys.argv[1], threads=int(sys.argv[2]))
print(imported - begin, time.perf_counter() - imported)
"""


def import_and_load(path: Path, cache_directory: str, threads: int) -> tuple[float, float]:
    """Seconds that a new process takes to import the runtime, and to load a file."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path.resolve()), str(threads)],
        env=os.environ | {"LOGSHIFT_CACHE_DIR": cache_directory}, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    imported, loaded = map(float, done.stdout.split())
    return imported, loaded


def new_size(path: Path, repeat: int) -> float | None:
    """Median of the seconds that a run takes longer with a batch size not met before.

    None if the batch size of the network is fixed.
    """
    session = runtime.load(path, threads=1)
    if any(not isinstance(info.shape[0], str) for info in session.inputs if info.shape):
        return None
    spent = []
    for batch in range(1, repeat + 3):
        x = {info.name: np.zeros((batch, *info.nominal[1:]), info.dtype) for info in session.inputs}
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            session.run(x)
            times.append(time.perf_counter() - begin)
        spent.append(times[0] - min(times[1:]))
    return statistics.median(spent[2:])  # the first one loads kernels


def warmup(cache_directory: str) -> float:
    """Seconds that a new process takes to compile all kernels."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from logshift import runtime; runtime.warmup()"],
        env=os.environ | {"LOGSHIFT_CACHE_DIR": cache_directory}, check=True,
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Print all times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = format.read(arguments.model).inputs[0].nominal
    with tempfile.TemporaryDirectory() as cache:
        threads = arguments.threads
        cold = first_result(arguments.model, shape, cache, threads)["start"]
        runs = range(arguments.repeat)
        warm = [first_result(arguments.model, shape, cache, threads)["start"] for _ in runs]
        parts = [import_and_load(arguments.model, cache, threads) for _ in runs]
        imported, loaded = (statistics.median(part) for part in zip(*parts, strict=True))
    with tempfile.TemporaryDirectory() as cache:
        everything = warmup(cache)
    result = {
        "machine": describe(), "cold": cold, "warm_median": statistics.median(warm),
        "warm_max": max(warm), "warmup": everything, "import": imported, "load": loaded,
        "new_size": new_size(arguments.model, arguments.repeat), "threads": threads,
    }  # fmt: skip
    print(result["machine"])
    print(f"cold (everything the model needs is compiled): {cold:.1f} s")
    print(f"warm: median {result['warm_median']:.2f} s, slowest {result['warm_max']:.2f} s")
    print(f"of that, medians: import {imported:.2f} s, load {loaded:.2f} s ({threads} threads)")
    if result["new_size"] is not None:
        print(f"a batch size not met before: {1e3 * result['new_size']:.1f} ms more than one known")
    print(f"warmup of every kernel, cold: {everything:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
