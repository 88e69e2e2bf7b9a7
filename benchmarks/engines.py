"""The engines that `benchmarks.compare` runs, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], Any]


def _logshift(path: Path, threads: int) -> Run:
    from logshift import runtime

    return runtime.load(path, threads=threads).run


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _openvino(path: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1,
    }  # fmt: skip
    compiled: dict[tuple[int, ...], Any] = {}

    def run(x: np.ndarray) -> Any:
        if x.shape not in compiled:  # static shapes are what it optimises for
            model = core.read_model(path)
            model.reshape(list(x.shape))
            compiled[x.shape] = core.compile_model(model, "CPU", settings).create_infer_request()
        return compiled[x.shape].infer([x], share_inputs=True)

    return run


# engine -> (loader, which file of `compare.Files` it runs)
ENGINES: dict[str, tuple[Callable[[Path, int], Run], str]] = {
    "logshift": (_logshift, "packed"),
    "onnxruntime fp32": (_onnxruntime, "float"),
    "onnxruntime int8": (_onnxruntime, "qdq"),
    "openvino fp32": (_openvino, "float"),
    "openvino int8": (_openvino, "qdq"),
}


class Engine:
    """An engine in a process of its own, which sleeps unless it is its turn."""

    def __init__(self, name: str, path: Path, threads: int, x: np.ndarray) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, name, path, threads, x), daemon=True
        )
        self._process.start()
        far.close()
        self.start: dict[str, float] = self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("an engine's process ended; its message is above") from None

    def turn(self, seconds: float) -> float:
        """Run for about this long; return the median time of one run, in seconds."""
        self._pipe.send(seconds)
        return self._receive()

    def close(self) -> float:
        """End the process; return its peak resident memory in bytes."""
        self._pipe.send(None)
        peak = self._receive()
        self._process.join()
        return peak


def _serve(pipe: Connection, name: str, path: Path, threads: int, x: np.ndarray) -> None:
    begin = time.perf_counter()
    run = ENGINES[name][0](path, threads)
    loaded = time.perf_counter()
    run(x)
    first = time.perf_counter()
    pipe.send({"load": loaded - begin, "first_run": first - loaded})
    while (seconds := pipe.recv()) is not None:
        run(x)  # brings caches and clock back
        times = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
        pipe.send(float(np.median(times)))
    pipe.send(_peak_memory())


def _peak_memory() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure includes that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
