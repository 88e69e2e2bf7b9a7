"""Load the server with requests, with logshift in it and with ONNX Runtime, in turns.

    python -m benchmarks.serving --models resnet18 mobilenet_v2 --clients 1 8

Both are behind the same server (`logshift.runtime.serving`) and answer the same requests, one
picture each, by gRPC or REST. A turn starts the server, asks from so many clients at once (each
waits for its answer before it asks again) and ends the server. Clients take part of the machine,
the same part of it from either.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import httpx
import numpy as np
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from rich.console import Console
from rich.progress import track

from benchmarks import machine
from benchmarks.compare import CACHE, prepare
from benchmarks.models import SUITE

console = Console()
ENGINES = ("logshift", "onnxruntime fp32", "onnxruntime int8")


class _OnnxRuntime:
    """ONNX Runtime with a session's face."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        from logshift.runtime.graph import ValueInfo

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options)

        def described(values: Any) -> list[ValueInfo]:
            sizes = [tuple(dim if type(dim) is int else 1 for dim in v.shape) for v in values]
            return [
                ValueInfo(v.name, tuple(v.shape), size)
                for v, size in zip(values, sizes, strict=True)
            ]

        self.inputs = described(self._session.get_inputs())
        self.outputs = described(self._session.get_outputs())

    def run(self, x: Any) -> np.ndarray:
        """Run the network on an array, or on a mapping of one."""
        if not isinstance(x, dict):
            x = {self.inputs[0].name: x}
        return self._session.run(None, x)[0]


def serve(engine: str, path: Path, port: int, grpc_port: int, threads: int) -> None:
    """Be the server."""
    from logshift.runtime import cores, serving

    class Network(serving.Network):
        def open(self) -> Any:
            return super().open() if engine == "logshift" else _OnnxRuntime(path, threads)

    with ThreadPoolExecutor(cores.default_threads() // threads) as pool:
        network = Network("network", path, threads, pool)
        serving.start([network], port=port, grpc_port=grpc_port)


class Server:
    """A server in a process of its own."""

    def __init__(self, engine: str, path: Path, threads: int) -> None:
        self.port, self.grpc_port = _free(), _free()
        command = [sys.executable, "-m", "benchmarks.serving", "--serve", engine, str(path)]
        command += [str(self.port), str(self.grpc_port), str(threads)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/v2/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                if self.process.poll() is not None:
                    raise
                time.sleep(0.2)

    def stop(self) -> None:
        """End it, as an operator does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    @property
    def megabytes(self) -> float:
        """Most memory that it has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1000


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


async def load_by_grpc(server: Server, x: np.ndarray, clients: int, seconds: float) -> list[float]:
    """Return the seconds that each request took."""
    request = pb.ModelInferRequest(
        model_name="network",
        inputs=[{"name": "input", "shape": x.shape, "datatype": "FP32"}],
        raw_input_contents=[x.tobytes()],
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        return await _load(lambda: stub.ModelInfer(request), clients, seconds)


async def load_by_rest(server: Server, x: np.ndarray, clients: int, seconds: float) -> list[float]:
    """Return the seconds that each request took."""
    tensor = {"name": "input", "shape": x.shape, "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    head = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    coded = json.dumps(head).encode()
    headers = {"Content-Type": "application/octet-stream"}
    headers["Inference-Header-Content-Length"] = str(len(coded))
    url = f"http://127.0.0.1:{server.port}/v2/models/network/infer"

    async def ask() -> None:
        answer = await client.post(url, content=coded + x.tobytes(), headers=headers)
        answer.raise_for_status()

    async with httpx.AsyncClient(timeout=60) as client:
        return await _load(ask, clients, seconds)


async def _load(ask: Any, clients: int, seconds: float) -> list[float]:
    took: list[float] = []

    async def client(until: float, kept: list[float]) -> None:
        while (begin := time.perf_counter()) < until:
            await ask()
            kept.append(time.perf_counter() - begin)

    for kept, length in (([], 1.0), (took, seconds)):  # once to warm up
        until = time.perf_counter() + length
        await asyncio.gather(*(client(until, kept) for _ in range(clients)))
    return took


LOADS = {"gRPC": load_by_grpc, "REST": load_by_rest}


def main() -> None:
    """Measure, and print a table."""
    if sys.argv[1:2] == ["--serve"]:
        engine, path, port, grpc_port, threads = sys.argv[2:]
        serve(engine, Path(path), int(port), int(grpc_port), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SUITE, default=["resnet18"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--protocols", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    console.print(machine.describe())
    console.print("| network | protocol | clients | engine | requests / s | p50 ms | p99 ms | MB |")
    console.print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        files = prepare(name, options.cache)
        paths = dict(zip(ENGINES, (files.packed, files.float, files.qdq), strict=True))
        x = np.random.default_rng(2).standard_normal((1, *SUITE[name].shape)).astype(np.float32)
        found: dict[tuple[str, int, str], list[tuple[float, float, float, float]]] = {}
        turns = [engine for _ in range(options.rounds) for engine in options.engines]
        for engine in track(turns, f"{name}", console=Console(stderr=True)):
            for protocol in options.protocols:
                for clients in options.clients:
                    server = Server(engine, paths[engine], options.threads)
                    took = asyncio.run(LOADS[protocol](server, x, clients, options.seconds))
                    memory = server.megabytes
                    server.stop()
                    p50, p99 = 1e3 * np.percentile(took, [50, 99])
                    row = (len(took) / options.seconds, p50, p99, memory)
                    found.setdefault((protocol, clients, engine), []).append(row)
        for (protocol, clients, engine), rows in sorted(found.items(), key=str):
            rate, p50, p99, memory = (median(column) for column in zip(*rows, strict=True))
            cells = [name, protocol, clients, engine, f"{rate:.0f}", f"{p50:.1f}", f"{p99:.1f}"]
            console.print(f"| {' | '.join(map(str, cells))} | {memory:.0f} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
