"""Convolutions on float32 against ONNX Runtime's, layer by layer.

    python -m benchmarks.float_layers --threads 1

The layers are those of ResNet-18, ResNet-50 and MobileNetV2. The engines take turns; in each, both
run twice, and the second run counts, which finds its data in the cache. ONNX Runtime is timed by
its own profile, the Conv node alone: bringing inputs and outputs into its blocked layout, which a
whole network does once, is not counted. Medians, and the best of each.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import describe
from logshift.converter.ort import session_options
from logshift.kernels import registry
from logshift.kernels.layer import FloatLayer
from logshift.kernels.machine.memory import aligned
from logshift.kernels.registry import Kernel
from logshift.runtime import executor
from logshift.runtime.table import text_table

_PARTS = 8  # of a thread's share that others may take over

# name -> output channels, kernel, input channels per group, group, stride, height and width
LAYERS = {
    "resnet stem": (64, 7, 3, 1, 2, 224),
    "resnet18 56": (64, 3, 64, 1, 1, 56),
    "resnet18 28": (128, 3, 128, 1, 1, 28),
    "resnet18 14": (256, 3, 256, 1, 1, 14),
    "resnet18 7": (512, 3, 512, 1, 1, 7),
    "resnet18 56 s2": (128, 3, 64, 1, 2, 56),
    "resnet18 14 s2": (512, 3, 256, 1, 2, 14),
    "resnet18 56 1x1 s2": (128, 1, 64, 1, 2, 56),
    "resnet50 56 up": (256, 1, 64, 1, 1, 56),
    "resnet50 56 down": (64, 1, 256, 1, 1, 56),
    "resnet50 28 up": (512, 1, 128, 1, 1, 28),
    "resnet50 28 down": (128, 1, 512, 1, 1, 28),
    "resnet50 14 up": (1024, 1, 256, 1, 1, 14),
    "resnet50 14 down": (256, 1, 1024, 1, 1, 14),
    "resnet50 7 up": (2048, 1, 512, 1, 1, 7),
    "resnet50 7 down": (512, 1, 2048, 1, 1, 7),
    "resnet18 last": (1000, 1, 512, 1, 1, 1),
    "resnet50 last": (1000, 1, 2048, 1, 1, 1),
    "mobilenet stem": (32, 3, 3, 1, 2, 224),
    "mobilenet 112 depthwise": (32, 3, 1, 32, 1, 112),
    "mobilenet 112 down": (16, 1, 32, 1, 1, 112),
    "mobilenet 112 up": (96, 1, 16, 1, 1, 112),
    "mobilenet 112 depthwise s2": (96, 3, 1, 96, 2, 112),
    "mobilenet 56 down": (24, 1, 144, 1, 1, 56),
    "mobilenet 56 up": (144, 1, 24, 1, 1, 56),
    "mobilenet 56 depthwise": (144, 3, 1, 144, 1, 56),
    "mobilenet 56 depthwise s2": (144, 3, 1, 144, 2, 56),
    "mobilenet 28 down": (32, 1, 192, 1, 1, 28),
    "mobilenet 28 up": (192, 1, 32, 1, 1, 28),
    "mobilenet 28 depthwise": (192, 3, 1, 192, 1, 28),
    "mobilenet 14 down": (64, 1, 384, 1, 1, 14),
    "mobilenet 14 up": (576, 1, 96, 1, 1, 14),
    "mobilenet 14 depthwise": (576, 3, 1, 576, 1, 14),
    "mobilenet 7 down": (160, 1, 960, 1, 1, 7),
    "mobilenet 7 up": (960, 1, 160, 1, 1, 7),
    "mobilenet 7 depthwise": (960, 3, 1, 960, 1, 7),
    "mobilenet 7 last": (1280, 1, 320, 1, 1, 7),
}


class Layer:
    """One of `LAYERS` with random weights and input, for both engines."""

    def __init__(self, name: str) -> None:
        self.shape = out, kernel, channels, group, stride, size = LAYERS[name]
        rng = np.random.default_rng(0)
        self.weights = rng.normal(0, 0.05, (out, kernel, kernel, channels)).astype(np.float32)
        self.bias = rng.standard_normal(out).astype(np.float32)
        self.x = rng.standard_normal((size, size, channels * group)).astype(np.float32)
        self.pad = kernel // 2
        self.size = (size + 2 * self.pad - kernel) // stride + 1
        self.macs = self.size**2 * math.prod(self.weights.shape)

    def program(self, threads: int) -> tuple[Kernel, np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return our kernel, its program, its output, and arrays to keep alive."""
        out, kernel, _, group, stride, size = self.shape
        layer = FloatLayer(self.weights, group, (stride, stride), (1, 1), self.bias, self.size**2)
        chosen = registry.kernel("float_conv", "auto", layer)
        padded = size + 2 * self.pad
        x = aligned((1, padded, padded, self.x.shape[2]), np.float32)
        x[:] = 0
        x[0, self.pad : self.pad + size, self.pad : self.pad + size] = self.x
        y = aligned((1, self.size, self.size, out), np.float32)
        arguments = np.zeros(1, chosen.record)
        a = arguments[0]
        for key, array in (("x", x), ("y", y)):
            a[key] = (array.ctypes.data, *array.shape, 0, 0)
        a["n"], a["height"], a["width"], a["channels"] = y.shape
        a["kernel_h"] = a["kernel_w"] = kernel
        a["stride_h"] = a["stride_w"] = stride
        a["dilation_h"] = a["dilation_w"] = a["step_h"] = a["step_w"] = 1
        a["group"], a["lo"], a["hi"] = group, 0, np.inf
        assert chosen.pack is not None
        keep = chosen.pack(layer).place(arguments)
        if chosen.scratch is not None:
            per_thread = -(-int(chosen.scratch(a)) // 64) * 64
            scratch = aligned((per_thread * threads,), np.uint8)
            a["scratch"], a["scratch_size"] = scratch.ctypes.data, per_thread
            keep.append(scratch)
        row = [[chosen.address, arguments.ctypes.data, threads, _PARTS]]  # see `executor`
        return chosen, np.array(row, np.int64), y, [*keep, x, arguments]

    def session(self, threads: int, prefix: str) -> onnxruntime.InferenceSession:
        """Return a Conv and a Relu, which become one, with profiling on."""
        out, _, channels, group, stride, size = self.shape
        nodes = [
            helper.make_node(
                "Conv", ["x", "w", "b"], ["c"],
                pads=[self.pad] * 4, strides=[stride] * 2, group=group,
            ),
            helper.make_node("Relu", ["c"], ["y"]),
        ]  # fmt: skip
        shapes = {"x": (1, channels * group, size, size), "y": (1, out, self.size, self.size)}
        infos = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(self.weights.transpose(0, 3, 1, 2)), "w"),
            numpy_helper.from_array(self.bias, "b"),
        ]
        graph = helper.make_graph(nodes, "layer", infos[:1], infos[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        options = session_options(threads)
        options.enable_profiling, options.profile_file_prefix = True, prefix
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def measure(name: str, threads: int, rounds: int) -> dict:
    """Run both engines in turns; times in seconds."""
    layer, team = Layer(name), executor.team(threads)
    chosen, program, y, keep = layer.program(threads)
    x = np.ascontiguousarray(layer.x.transpose(2, 0, 1))[None]
    ours = []
    with tempfile.TemporaryDirectory() as folder:
        session = layer.session(threads, str(Path(folder) / "profile"))
        for _ in range(rounds):
            for _ in range(2):
                (expected,) = session.run(None, {"x": x})
            for _ in range(2):
                start = time.perf_counter()
                team.run(program)
                spent = time.perf_counter() - start
            ours.append(spent)
        events = json.loads(Path(session.end_profiling()).read_text())
    theirs = [
        event["dur"] / 1e6
        for event in events
        if event.get("cat") == "Node" and event["args"].get("op_name") in ("Conv", "FusedConv")
    ][1::2]
    assert len(theirs) == rounds and np.allclose(y.transpose(0, 3, 1, 2), expected, atol=1e-3)
    del keep
    return {
        "layer": name, "kernel": chosen.name, "macs": layer.macs,
        "ours": float(np.median(ours)), "onnxruntime": float(np.median(theirs)),
        "ours_best": min(ours), "onnxruntime_best": min(theirs),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """One row per layer; the ratio is above 1 where we are faster."""
    lines = [("layer", "kernel", "GMAC/s", "ONNX Runtime", "ratio", "ratio of the best")]
    for row in rows:
        rates = (f"{row['macs'] / row[key] / 1e9:.1f}" for key in ("ours", "onnxruntime"))
        ratio, best = row["onnxruntime"] / row["ours"], row["onnxruntime_best"] / row["ours_best"]
        lines.append((row["layer"], row["kernel"], *rates, f"{ratio:.2f}", f"{best:.2f}"))
    return text_table(lines, left=2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--layer", action="append", choices=LAYERS, help="default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.layer or list(LAYERS)
    rows = [measure(name, arguments.threads, arguments.rounds) for name in names]
    print(f"{describe()}; {arguments.threads} thread(s)\n{table(rows)}")
    if arguments.json:
        result = {"machine": describe(), "threads": arguments.threads, "layers": rows}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
