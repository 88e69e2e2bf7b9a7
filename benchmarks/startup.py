"""How long a new process takes from `import logshift.runtime` to its first result.

    python -m benchmarks.startup model.stlq

Measured with an empty compile cache (cold), after `logshift warmup`'s work (warm), each in new
processes, the interpreter's own start included.
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

from benchmarks.machine import describe

FIRST_RESULT = """
import sys
import numpy as np
from logshift import runtime
session = runtime.load(sys.argv[1])
shapes = {info.name: np.zeros(info.nominal, np.float32) for info in session.inputs}
session.run(shapes)
"""


def seconds(program: str, arguments: list[str], cache: str) -> float:
    """Wall time of one new process."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"NUMBA_CACHE_DIR": cache}, check=True,
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Print the three times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = [str(arguments.model.resolve())]
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds(FIRST_RESULT, model, cache)
        warm = [seconds(FIRST_RESULT, model, cache) for _ in range(arguments.repeat)]
    with tempfile.TemporaryDirectory() as cache:
        everything = seconds("from logshift import runtime; runtime.warmup()", [], cache)
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
