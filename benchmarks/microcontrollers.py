"""Instructions of exported C for one inference, by emulation: shifts and adds against products.

    python -m benchmarks.microcontrollers
    python -m benchmarks.microcontrollers --targets rv32i cortex-m0 --json
    python -m benchmarks.microcontrollers --onnx2c PROGRAM --tflite-micro DIRECTORY

The networks are the demo's ResNet-20 and one of the size of a keyword spotter (a DS-CNN: 49 x 10
features, a 10 x 4 convolution, four blocks of depthwise and pointwise ones of 64 channels, 12
words) with random weights. Instructions between the call of `net_run` and its end are counted by a
plugin of QEMU's; every run's outputs are compared with the runtime's. Codes go in, so nothing is
counted of what turns float32 into them. `benchmarks.exporters` has what else they can be compared
with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import exporters
from benchmarks.counting import Counts, plugin
from benchmarks.machine import describe
from benchmarks.targets import TARGETS, build, compiled, count, linked
from logshift.converter.encode import encode
from logshift.runtime import Session
from logshift.runtime.c_source import export_c
from logshift.runtime.file import format
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.table import text_table
from logshift.runtime.validate import validate

_DEMO = Path(__file__).parents[1] / "converter" / "demo" / "resnet20-cifar10-w4.stlq"
WAYS: dict[str, dict[str, Any]] = {
    "shifts, fast": {},
    "shifts, small": {"layout": "small"},
    "products": {"multiply": True},
}


def keyword_spotter(blocks: int = 4, channels: int = 64) -> Graph:
    """Return a DS-CNN with random weights of 4 bits, 15 % of them with second words."""
    rng = np.random.default_rng(24)
    quantization = {"x": Quantization(1 / 32, 128, 8)}
    nodes = [Node("QuantizeLinear", "quantize", ["features"], ["x"])]

    def convolve(
        name: str, outputs: int, kernel: tuple[int, int], inputs: int, **attributes: Any
    ) -> None:
        w = rng.standard_normal((outputs, *kernel, inputs)).astype(np.float32)
        words = encode(w, 4, 0.15)
        x = nodes[-1].outputs[0]
        scale = float(words.unit().mean() * 8 * np.sqrt(w[0].size)) * quantization[x].scale * 2
        quantization[name] = Quantization(scale, 0, 8)
        node = Node("Conv", name, [x], [name], {"clamp": [0, None], **attributes}, words)
        node.bias = (rng.standard_normal(outputs) * scale * 20).astype(np.float32)
        nodes.append(node)

    convolve("first", channels, (10, 4), 1, strides=[2, 2], pads=[5, 1, 4, 1])
    for i in range(blocks):
        convolve(f"depthwise{i}", channels, (3, 3), 1, group=channels, pads=[1, 1, 1, 1])
        convolve(f"pointwise{i}", channels, (1, 1), channels)
    quantization["mean"] = quantization[nodes[-1].outputs[0]]
    nodes.append(Node("GlobalAveragePool", "mean", [nodes[-1].outputs[0]], ["mean"]))
    words = encode(rng.standard_normal((12, 1, 1, channels)).astype(np.float32), 4, 0.15)
    nodes.append(Node("Conv", "scores", ["mean"], ["pixels"], {}, words, np.zeros(12, np.float32)))
    nodes.append(Node("Flatten", "flatten", ["pixels"], ["scores"]))
    graph = Graph(
        [ValueInfo("features", (1, 1, 49, 10), (1, 1, 49, 10))],
        [ValueInfo("scores", (1, 12), (1, 12))], quantization, nodes,
    )  # fmt: skip
    validate(graph)
    return graph


@dataclass(frozen=True)
class Others:
    """Where other ways to a microcontroller are, those that there are."""

    onnx2c: Path | None
    tflite_micro: Path | None
    objects: Path


def measure(graph: Graph, targets: list[str], others: Others) -> list[dict[str, Any]]:
    """Return a record for each target and way of writing the network."""
    shape = (1, *graph.inputs[0].nominal[1:])
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = Session(graph, threads=1).run(x)
    given = graph.quantization[graph.nodes[0].outputs[0]].quantize(x).tobytes()
    records = []

    def record(way: str, target: str, counts: Counts, flash: int, ram: int) -> None:
        records.append(
            {"target": target, "way": way, "instructions": counts.instructions,
             "products": counts.products, "flash": flash, "ram": ram}
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        counter = plugin(directory)
        for way, options in WAYS.items():
            export_c(graph, directory, name="net", codes=True, **options)
            for target in targets:
                built = build(TARGETS[target], directory, ("uint8_t", "float"))
                found, counts = count(built, given, counter)
                if found != wanted.tobytes():
                    raise SystemExit(f"{way} on {target}: not the runtime's bits")
                record(way, target, counts, built.flash, built.ram)
        if others.onnx2c is not None:
            exporters.onnx2c(others.onnx2c, graph, directory)
            for target in targets:
                code = compiled(TARGETS[target], directory / "net.c", ("-O2", "-w"))
                built = linked(TARGETS[target], directory, ("float", "float"), [code])
                _, counts = count(built, x.tobytes(), counter)
                record("onnx2c, int8", target, counts, built.flash, built.ram)
        if others.tflite_micro is not None:
            micro = exporters.TfliteMicro(others.tflite_micro, others.objects)
            micro.write(exporters.tflite(graph), (x.size, wanted.size), directory)
            codes = np.random.default_rng(0).integers(-128, 128, x.size, np.int8).tobytes()
            for target in filter(lambda target: target.startswith("cortex"), targets):
                for way in exporters.KERNELS if target == "cortex-m4" else exporters.KERNELS[:1]:
                    objects = micro.compiled(TARGETS[target], way, directory)
                    built = linked(
                        TARGETS[target], directory, ("int8_t", "int8_t"), objects, is_whole=True
                    )
                    found, counts = count(built, codes, counter)
                    ram = (
                        built.ram - exporters.ARENA + int.from_bytes(found[wanted.size :], "little")
                    )
                    record(f"TFLite Micro, {way}", target, counts, built.flash, ram)
    return records


def _text(name: str, records: list[dict[str, Any]]) -> str:
    rows = [(name, "", "M instructions", "products are", "flash", "RAM")]
    by = {(r["target"], r["way"]): r for r in records}
    for record in records:
        least = by[record["target"], "products"]["instructions"]
        rows.append((
            record["target"], record["way"], f"{record['instructions'] / 1e6:.2f}",
            f"{least / record['instructions']:.2f} x", f"{record['flash']:,}", f"{record['ram']:,}",
        ))  # fmt: skip
        if record["target"] == "cortex-m0":  # of which some have a multiplier of 32 cycles
            slow = record["instructions"] + 31 * record["products"]
            of = by["cortex-m0", "products"]
            share = (of["instructions"] + 31 * of["products"]) / slow
            rows.append(("  32 a product", "", f"{slow / 1e6:.2f}", f"{share:.2f} x", "", ""))
    return text_table(rows, left=2)


def main() -> None:
    """Print the figures of both networks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--onnx2c", type=Path, metavar="PROGRAM", help="compare with onnx2c")
    parser.add_argument(
        "--tflite-micro", type=Path, metavar="DIRECTORY",
        help="compare with TensorFlow Lite Micro: a checkout with its downloads",
    )  # fmt: skip
    parser.add_argument(
        "--objects", type=Path, metavar="DIRECTORY", default=Path("build/tflite-micro"),
        help="what is compiled of it is kept there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    others = Others(arguments.onnx2c, arguments.tflite_micro, arguments.objects)
    networks = {"ResNet-20": format.read(_DEMO), "keyword spotter": keyword_spotter()}
    result = {name: measure(graph, arguments.targets, others) for name, graph in networks.items()}
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(describe())
    for name, records in result.items():
        print(_text(name, records))


if __name__ == "__main__":
    main()
