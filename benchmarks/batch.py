"""Rows per second of the job in `docs/batch.md`, beside the same sessions without Ray, in turns.

    python -m benchmarks.batch --photos photos.parquet --models resnet18

Without Ray, two processes with a session each take batches of the same file from a queue. The clock
runs from the first row that is read to the last prediction that is written, and so includes the
sessions' start; it does not include the start of Ray, which a cluster has behind it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import machine
from benchmarks.compare import CACHE, prepare
from benchmarks.models import SUITE
from logshift.converter import Preprocessing
from logshift.runtime import Session, load
from logshift.runtime.file import format as packed_format

PAGE = Path(__file__).parent.parent / "docs" / "batch.md"
PREDICTIONS = "predictions"
_BATCH = 32  # rows, as on the page
_WORKERS = 2  # the same

_session: Session


def with_ray() -> float:
    """Run the page's code here; return its seconds."""
    import ray

    job = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    ray.init(num_cpus=_WORKERS, include_dashboard=False, logging_level="error")
    begin = time.perf_counter()
    exec(job, {"__name__": "__main__"})
    return time.perf_counter() - begin


def without_ray() -> float:
    """Do the same in a pool of processes; return its seconds."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(_WORKERS, get_context("spawn"), _load) as pool:
        file = pq.ParquetFile("photos.parquet")
        batches = [
            rows.to_pydict() for rows in file.iter_batches(_BATCH, columns=["name", "image"])
        ]
        labels = pool.map(_predict, [rows["image"] for rows in batches])
        rows = {"name": [name for rows in batches for name in rows["name"]]}
        rows["label"] = np.concatenate(list(labels))
    Path(PREDICTIONS).mkdir()
    pq.write_table(pa.table(rows), f"{PREDICTIONS}/all.parquet")
    return time.perf_counter() - begin


def _load() -> None:
    global _session
    _session = load("model.stlq", threads=1)


def _predict(files: list[bytes]) -> np.ndarray:
    return _session.run([Image.open(io.BytesIO(file)) for file in files]).argmax(1)


WAYS = {"Ray Data": with_ray, "without": without_ray}


def main() -> None:
    """Measure, and print a table."""
    if sys.argv[1:2] == ["--way"]:
        print(WAYS[sys.argv[2]]())
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="Parquet with column image")
    parser.add_argument("--models", nargs="+", choices=SUITE, default=["resnet18"])
    parser.add_argument("--rows", type=int, default=10_000, help="photographs are repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    images = pq.read_table(options.photos, columns=["image"])["image"].to_pylist()
    repeated = [images[number % len(images)] for number in range(options.rows)]
    table = pa.table({"name": [f"{n}" for n in range(options.rows)], "image": repeated})
    print(machine.describe())
    print(f"| network | {' | '.join(f'{way}, rows / s' for way in WAYS)} | ratio |")
    print(f"| --- |{' --- |' * (len(WAYS) + 1)}")
    for name in options.models:
        with tempfile.TemporaryDirectory() as directory:
            packed = prepare(name, options.cache).packed
            graph = packed_format.read(packed)
            graph.preprocessing = Preprocessing().to_manifest()
            packed_format.write(graph, Path(directory) / "model.stlq")
            pq.write_table(table, Path(directory) / "photos.parquet", row_group_size=256)
            took: dict[str, list[float]] = {way: [] for way in WAYS}
            for way in list(WAYS) * options.rounds:
                took[way].append(_timed(way, Path(directory), options.rows))
        rates = [options.rows / median(seconds) for seconds in took.values()]
        cells = [f"{rate:.1f}" for rate in rates] + [f"{rates[0] / rates[1]:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def _timed(way: str, directory: Path, rows: int) -> float:
    """Run one way in a process of its own, and count what it has written."""
    # Ray's workers would be of lower priority than others otherwise.
    environment = os.environ | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    paths = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.batch", "--way", way], cwd=directory, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    found = pq.read_table(directory / PREDICTIONS)
    assert sorted(found["name"].to_pylist()) == sorted(map(str, range(rows)))
    shutil.rmtree(directory / PREDICTIONS)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
