"""How long a new process takes to the first result of a packed network.

    python -m benchmarks.startup model.stlq

Measured with an empty compile cache (cold) and after that (warm), each in new processes, the
interpreter's own start included; and how long `logshift warmup` takes with an empty cache.
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

from benchmarks.engines import Engine
from benchmarks.machine import describe
from logshift.runtime import format


def first_result(path: Path, shape: tuple[int, ...], cache_directory: str) -> float:
    """Seconds from the start of a new process to its first result, on one thread."""
    engine = Engine("logshift", path, 1, shape, cache_directory)
    engine.close()
    return engine.start["start"]


def warmup(cache_directory: str) -> float:
    """Seconds that a new process takes to compile all kernels."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from logshift import runtime; runtime.warmup()"],
        env=os.environ | {"LOGSHIFT_CACHE_DIR": cache_directory}, check=True,
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Print the three times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = format.read(arguments.model).inputs[0].nominal
    with tempfile.TemporaryDirectory() as cache:
        cold = first_result(arguments.model, shape, cache)
        warm = [first_result(arguments.model, shape, cache) for _ in range(arguments.repeat)]
    with tempfile.TemporaryDirectory() as cache:
        everything = warmup(cache)
    result = {
        "machine": describe(), "cold": cold, "warm_median": statistics.median(warm),
        "warm_max": max(warm), "warmup": everything,
    }  # fmt: skip
    print(result["machine"])
    print(f"cold (everything the model needs is compiled): {cold:.1f} s")
    print(f"warm: median {result['warm_median']:.2f} s, slowest {result['warm_max']:.2f} s")
    print(f"warmup of every kernel, cold: {everything:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
