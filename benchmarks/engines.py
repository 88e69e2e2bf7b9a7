"""The engines that `benchmarks.compare` runs, each in a process of its own.

    python -m benchmarks.engines "onnxruntime fp32" model.onnx --threads 1 --shape 1 3 224 224

is such a process: it answers every line of its standard input, see `serve`. It imports nothing but
its engine, so that its start and its memory are those of the engine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], Any]


def _logshift(path: Path, threads: int, kernels: str) -> Run:
    from logshift import runtime

    return runtime.load(path, threads=threads, kernels=kernels).run


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _openvino(path: Path, threads: int, precision: str | None = "f32") -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
    }  # fmt: skip
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    model = core.read_model(path)

    def compile_for(shape: tuple[int, ...]) -> Run:
        model.reshape(list(shape))  # static shapes are what it optimises for
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda x: request.infer([x], share_inputs=True, share_outputs=True)

    return _by_shape(compile_for)


def _pytorch(path: Path, threads: int, how: str) -> Run:
    import onnx
    import torch

    from benchmarks import torch_model

    torch.set_num_threads(threads)
    network = torch_model.Network(onnx.load(path)).eval()

    def compile_for(shape: tuple[int, ...]) -> Run:
        with torch.inference_mode():
            program = getattr(torch_model, how)(network, torch.zeros(shape))

        def run(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return program(torch.from_numpy(x)).numpy()

        run(np.zeros(shape, np.float32))  # frozen programs are optimised at their first run
        return run

    return _by_shape(compile_for)


def _by_shape(compile_for: Callable[[tuple[int, ...]], Run]) -> Run:
    compiled: dict[tuple[int, ...], Run] = {}

    def run(x: np.ndarray) -> Any:
        if x.shape not in compiled:
            compiled[x.shape] = compile_for(x.shape)
        return compiled[x.shape](x)

    return run


@dataclass(frozen=True)
class Kind:
    """What an engine is: how it loads, which file of `compare.Files`, what must be installed."""

    load: Callable[[Path, int], Run]
    file: str
    module: str
    program: str | None = None

    @property
    def missing(self) -> str | None:
        """Name of what is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return self.module
        return self.program if self.program and shutil.which(self.program) is None else None


ENGINES = {
    "logshift": Kind(lambda *a: _logshift(*a, "auto"), "packed", "logshift"),
    "logshift shift": Kind(lambda *a: _logshift(*a, "shift"), "packed", "logshift"),
    "onnxruntime fp32": Kind(_onnxruntime, "float", "onnxruntime"),
    "onnxruntime int8": Kind(_onnxruntime, "qdq", "onnxruntime"),
    "openvino fp32": Kind(_openvino, "float", "openvino"),
    "openvino int8": Kind(_openvino, "qdq", "openvino"),
    # float32, or bfloat16 where the machine multiplies that
    "openvino default": Kind(lambda *a: _openvino(*a, None), "float", "openvino"),
    "pytorch frozen fp32": Kind(lambda *a: _pytorch(*a, "frozen"), "float", "torch"),
    "pytorch compiled fp32": Kind(lambda *a: _pytorch(*a, "compiled"), "float", "torch", "g++"),
}


class Engine:
    """An engine in a process of its own, which sleeps unless it is its turn.

    Attributes
    ----------
    start : dict
        Seconds from the start of the process to its first result ("start"), and of those what
        loading the file ("load") and the first run ("first_run") took.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        threads: int,
        shape: tuple[int, ...],
        cache_directory: str | None = None,
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.engines", name, str(path.resolve())]
        command += ["--threads", str(threads), "--shape", *map(str, shape)]
        environment = dict(os.environ)
        if cache_directory:
            environment["LOGSHIFT_CACHE_DIR"] = cache_directory
        repository = Path(__file__).resolve().parent.parent
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=environment, cwd=repository, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        inside = self.answer()
        self.start: dict[str, float] = {"start": time.perf_counter() - begin, **inside}

    def ask(self, question: str) -> None:
        """Send a question, see `serve`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")

    def answer(self) -> Any:
        """Wait for the answer to a question."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("an engine's process ended; its message is above")
        return json.loads(line)

    def turn(self, seconds: float) -> list[float]:
        """Run for about this long; return the time of each run, in seconds."""
        self.ask(str(seconds))
        return self.answer()

    def close(self) -> int:
        """End the process; return its peak resident memory in bytes."""
        self.ask("end")
        peak = self.answer()
        self._process.communicate()
        return peak


def serve(name: str, path: Path, threads: int, shape: list[int]) -> None:
    """Load, run once, then answer: a number of seconds with times of runs, "end" with memory."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints goes elsewhere

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")

    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    begin = time.perf_counter()
    run = ENGINES[name].load(path, threads)
    loaded = time.perf_counter()
    run(x)
    answer({"load": loaded - begin, "first_run": time.perf_counter() - loaded})
    for line in sys.stdin:
        if line.strip() == "end":
            answer(_peak_memory())
            break
        run(x)  # brings caches and clock back
        times: list[float] = []
        end = time.perf_counter() + float(line)
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)
        answer(times)


def _peak_memory() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure includes that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Be an engine's process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    serve(arguments.engine, arguments.model, arguments.threads, arguments.shape)


if __name__ == "__main__":
    main()
