"""What `docs/batch.md` shows runs as it stands, on every row, whatever happens to some."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from support.onnx_nets import network
from support.pages import blocks

from logshift import converter
from logshift.runtime import load

pytest.importorskip("pyarrow", reason="rows are in Parquet files")
if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'ray[data]'", allow_module_level=True)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

JOB, LOOK = blocks("docs/batch.md", "python")
RAY = "import ray\nray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**28)\n"
DEMO = Path(converter.__file__).parent / "demo"
ROWS = 100_000
SIDE = 8  # of generated pictures


@pytest.fixture
def job(tmp_path):
    """The page's code as a program beside its files, which is started by calling this."""
    (tmp_path / "job.py").write_text(RAY + JOB + LOOK)
    started = []

    def start():
        started.append(
            subprocess.Popen(
                [sys.executable, "job.py"], cwd=tmp_path, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
                env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
            )
        )  # fmt: skip
        return started[0]

    yield start
    for process in started:
        process.terminate()  # Ray ends its own processes then
        process.wait(30)


def finish(process):
    """Wait for the job and return what it printed."""
    printed, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    return printed


def predictions(directory):
    """Return the rows of the job's result by name."""
    rows = pq.read_table(directory / "predictions").to_pylist()
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows), "a row was written twice"
    return found


def small_network(directory):
    """Convert a network for generated pictures, with preprocessing; return its session."""
    onnx.save(network(("batch", 3, SIDE, SIDE)), directory / "small.onnx")
    converter.convert(
        directory / "small.onnx", directory / "model.stlq",
        calibration=np.random.default_rng(3).standard_normal((32, 3, SIDE, SIDE), np.float32),
        preprocessing=converter.Preprocessing(),
    )  # fmt: skip
    return load(directory / "model.stlq")


def generated(number):
    """Return picture `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(pixels)


def png(picture):
    """Return a picture as a file."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_photographs(shared, tmp_path, job):
    table = pq.read_table(shared / "data" / "imagenet-sample-500.parquet")
    names = [f"{number}" for number in range(len(table))]
    table = table.drop_columns("name").append_column("name", pa.array(names))
    pq.write_table(table, tmp_path / "photos.parquet")
    (tmp_path / "model.stlq").symlink_to(DEMO / "resnet20-cifar10-w4.stlq")
    assert finish(job()) == ""
    session, found = load(tmp_path / "model.stlq"), predictions(tmp_path)
    assert sorted(found) == sorted(names)
    for name, file in zip(names, table["image"].to_pylist(), strict=True):
        scores = session.run(Image.open(io.BytesIO(file)))
        assert found[name] == {"name": name, "label": scores.argmax(), "error": ""}


def test_many_rows_some_bad_while_a_worker_dies(tmp_path, job):
    session = small_network(tmp_path)
    distinct = [generated(number) for number in range(500)]
    labels = session.run(distinct).argmax(1)
    assert len(set(labels.tolist())) > 1
    files = [png(picture) for picture in distinct]
    bad = {number: b"no picture" for number in (0, 31, 32, 70_001, ROWS - 1)}
    images = [bad.get(number) or files[number % 500] for number in range(ROWS)]
    rows = pa.table({"name": [f"{number}" for number in range(ROWS)], "image": images})
    pq.write_table(rows, tmp_path / "photos.parquet")

    process = job()
    kill_a_worker(process.pid, tmp_path)
    printed = finish(process)

    found = predictions(tmp_path)
    assert len(found) == ROWS
    for number in range(ROWS):
        row = found[f"{number}"]
        if number in bad:
            assert row["label"] == -1 and "UnidentifiedImageError" in row["error"]
        else:
            assert (row["label"], row["error"]) == (labels[number % 500], "")
    reported = re.findall(r"^(\d+) .*UnidentifiedImageError", printed, re.MULTILINE)
    assert sorted(map(int, reported)) == sorted(bad)


def kill_a_worker(job, directory):
    """End one of the processes that predict, once first predictions are written."""
    for _ in range(3000):
        workers = [pid for pid in below(job) if b"Predict" in read(pid, "cmdline")]
        if workers and any(directory.glob("predictions/*.parquet")):
            os.kill(workers[0], signal.SIGKILL)
            return
        time.sleep(0.1)
    raise AssertionError("no worker was seen")


def below(pid):
    """Return the processes below one."""
    found = read(pid, f"task/{pid}/children").split()
    return [int(child) for child in found] + [p for child in found for p in below(int(child))]


def read(pid, name):
    """Return what Linux says of a process, nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
