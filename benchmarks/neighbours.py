"""How engines behave where several things share a machine.

    python -m benchmarks.neighbours --json neighbours.json

Five cases, on two threads:

- beside 0, 1, 2 and 4 busy processes of one thread each: median and 90th percentile of a run, every
  engine a process of its own, in turns;
- in one process, run after run in turns with an ONNX Runtime session of default options, whose
  threads go on spinning after a run;
- one thread against two, on a quiet machine;
- two processes that run without pause: what they do together, over what one does alone;
- a network that is nothing but twenty steps, through `Session.run`.

`docs/benchmarks.md` says more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import CACHE, Files, prepare
from benchmarks.engines import ENGINES, Engine
from benchmarks.machine import describe
from benchmarks.models import SUITE
from logshift.kernels import registry
from logshift.runtime import Session, executor, load
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.table import text_table
from logshift.runtime.validate import validate

_NAMES = ("logshift", "openvino int8", "onnxruntime int8")
_THREADS = 2
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100000))"
_STEPS = 20


def busy_process() -> subprocess.Popen[bytes]:
    """Start a process that keeps one core busy, until it is ended or this process ends."""
    return subprocess.Popen([sys.executable, "-c", _BUSY])


def beside_busy_processes(
    files: Files, shape: tuple[int, ...], names: list[str], counts: list[int], rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time engines in turns beside each number of busy processes.

    Returns
    -------
    list of dict
        "busy", "engine", "median" and "p90" in seconds, of all runs of all turns; "ratio" and
        "ratio_p90" are those of the other engine over logshift's.
    """
    engines = {
        name: Engine(name, getattr(files, ENGINES[name].file), _THREADS, shape) for name in names
    }
    rows = []
    for count in counts:
        times: dict[str, list[float]] = {name: [] for name in names}
        with ExitStack() as stack:
            for _ in range(count):
                process = busy_process()
                stack.callback(process.wait)
                stack.callback(process.kill)
            for _ in range(rounds):
                for name, engine in engines.items():
                    times[name] += engine.turn(seconds)
        figures = {name: np.percentile(times[name], [50, 90]).tolist() for name in names}
        for name, (median, p90) in figures.items():
            own, own_p90 = figures["logshift"]
            rows.append({
                "busy": count, "engine": name, "median": median, "p90": p90,
                "ratio": median / own, "ratio_p90": p90 / own_p90,
            })  # fmt: skip
    for engine in engines.values():
        engine.close()
    return rows


def scaling(path: Path, shape: tuple[int, ...], rounds: int, seconds: float) -> dict[str, float]:
    """Compare one thread with two on a quiet machine, in turns.

    Returns
    -------
    dict
        Median seconds with one and with two threads, "ratio" of these: median of rounds.
    """
    engines = [Engine("logshift", path, threads, shape) for threads in (1, 2)]
    times = np.array([[np.median(e.turn(seconds)) for e in engines] for _ in range(rounds)])
    for engine in engines:
        engine.close()
    one, two = np.median(times, axis=0).tolist()
    return {"one": one, "two": two, "ratio": float(np.median(times[:, 0] / times[:, 1]))}


def in_one_process(files: Files, shape: tuple[int, ...], runs: int) -> dict[str, float]:
    """Time logshift and ONNX Runtime with default options in turns, run after run.

    Returns
    -------
    dict
        Median seconds of either; "ratio": median of ONNX Runtime's time over ours, pair by pair.
    """
    import onnxruntime

    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    session = load(files.packed, threads=_THREADS)
    other = onnxruntime.InferenceSession(files.qdq, providers=["CPUExecutionProvider"])
    name = other.get_inputs()[0].name
    engines: list[Callable[[], Any]] = [
        lambda: session.run(x), lambda: other.run(None, {name: x})
    ]  # fmt: skip
    times = np.empty((runs, 2))
    for run in range(-5, runs):
        for index, engine in enumerate(engines):
            start = time.perf_counter()
            engine()
            times[run, index] = time.perf_counter() - start
    ours, theirs = np.median(times, axis=0).tolist()
    ratio = float(np.median(times[:, 1] / times[:, 0]))
    return {"logshift": ours, "onnxruntime int8": theirs, "ratio": ratio}


def two_processes(
    path: Path, shape: tuple[int, ...], rounds: int, seconds: float
) -> dict[str, float]:
    """Count the runs of one process alone, and of two at the same time.

    Returns
    -------
    dict
        Runs per second of one process alone and of both together, "ratio" of these: medians of
        rounds.
    """
    engines = [Engine("logshift", path, _THREADS, shape) for _ in range(2)]
    alone, together = [], []
    for _ in range(rounds):
        alone.append(len(engines[0].turn(seconds)) / seconds)
        for engine in engines:
            engine.ask(str(seconds))
        together.append(sum(len(engine.answer()) for engine in engines) / seconds)
    for engine in engines:
        engine.close()
    ratios = np.array(together) / np.array(alone)
    return {
        "alone": float(np.median(alone)), "together": float(np.median(together)),
        "ratio": float(np.median(ratios)),
    }  # fmt: skip


def empty_session() -> Session:
    """Make a session of twenty steps that have next to nothing to do."""
    q = Quantization(1.0, 0, 8)
    nodes = [Node("QuantizeLinear", "in", ["x"], ["t0"])]
    for step in range(_STEPS - 2):
        attributes = {"kernel_shape": [1, 1]}
        nodes.append(Node("MaxPool", f"p{step}", [f"t{step}"], [f"t{step + 1}"], attributes))
    nodes.append(Node("DequantizeLinear", "out", [f"t{_STEPS - 2}"], ["y"]))
    shape = (1, 1, 1, 1)
    graph = Graph(
        [ValueInfo("x", shape, shape)], [ValueInfo("y", shape, shape)],
        {f"t{step}": q for step in range(_STEPS - 1)}, nodes,
    )  # fmt: skip
    validate(graph)
    return Session(graph, threads=_THREADS)


def empty_program(runs: int) -> dict[str, float]:
    """Time twenty empty steps, median seconds: through a session, and shared by both threads."""
    session, x = empty_session(), np.zeros((1, 1, 1, 1), np.float32)
    fill = registry.kernel("fill", "portable")
    arguments = np.zeros(1, fill.record)  # of a picture without rows
    row = [fill.address, arguments.ctypes.data, _THREADS, 1]
    program = np.array([row] * _STEPS, np.int64)
    team = executor.team(_THREADS)
    return {
        "Session.run, 20 small steps": _median(lambda: session.run(x), runs),
        "20 steps shared by both threads": _median(lambda: team.run(program), runs),
    }


def _median(call: Callable[[], Any], runs: int) -> float:
    times = np.empty(runs)
    for run in range(-20, runs):
        start = time.perf_counter()
        call()
        times[run] = time.perf_counter() - start
    return float(np.median(times))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SUITE, default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    print(describe())
    if (os.cpu_count() or 1) > _THREADS:
        print(f"{os.cpu_count()} cores: the busy processes find idle ones; pin all with taskset")
    names = [name for name in _NAMES if not ENGINES[name].missing]
    result: dict[str, Any] = {"machine": describe(), "models": {}}
    for model in a.models:
        files = prepare(model, a.cache)
        shape = (1, *SUITE[model].shape)
        rows = beside_busy_processes(files, shape, names, a.busy, a.rounds, a.seconds)
        found = result["models"][model] = {"busy": rows}
        lines = [("busy", "engine", "median ms", "90 % ms", "x logshift's", "90 %")]
        lines += [
            (
                str(r["busy"]), r["engine"], f"{1e3 * r['median']:.2f}", f"{1e3 * r['p90']:.2f}",
                f"{r['ratio']:.2f}", f"{r['ratio_p90']:.2f}",
            )
            for r in rows
        ]  # fmt: skip
        print(f"\n{model}, {_THREADS} threads\n{text_table(lines, left=2)}", flush=True)
        found["scaling"] = r = scaling(files.packed, shape, a.rounds, a.seconds)
        print(f"two threads are {r['ratio']:.2f} times as fast as one")
        if "onnxruntime int8" in names:
            found["in_one_process"] = r = in_one_process(files, shape, 30 * a.rounds)
            print(
                f"in one process, in turns: logshift {1e3 * r['logshift']:.2f} ms, ONNX Runtime"
                f" {1e3 * r['onnxruntime int8']:.2f} ms, ratio {r['ratio']:.2f}"
            )
        found["two_processes"] = r = two_processes(files.packed, shape, a.rounds, a.seconds)
        print(f"two processes together: {r['ratio']:.3f} of the throughput of one", flush=True)
        if a.json:
            a.json.write_text(json.dumps(result, indent=1))
    result["empty"] = empty_program(100 * a.rounds)
    for case, seconds in result["empty"].items():
        print(f"{case}: {1e6 * seconds:.1f} us")
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
