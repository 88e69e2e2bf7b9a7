"""Post-training accuracy: convert with several settings, run all test pictures.

    python -m benchmarks.accuracy --model resnet20-cifar10.onnx --data DIRECTORY
    python -m benchmarks.accuracy --model efficientnet_lite0 --data imagenet-sample-500.parquet
    python -m benchmarks.accuracy --model resnet20-cifar10.onnx --data DIRECTORY
        --settings auto:max_bytes=160000 auto:max_drop=0.5 validate:max_drop=0.5

A directory holds cifar10-train.parquet (calibration) and cifar10-test.parquet. Of a single file
every fifth picture calibrates and the others test. With `validate` every other test picture is
what `convert` measures on, and what is printed is of the rest. Columns are `image` (encoded
picture), `label`.
`--model` is an ONNX file or the name of a network of the suite.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet
from PIL import Image

from benchmarks.machine import describe
from benchmarks.models import SUITE
from logshift import converter, runtime
from logshift.converter import ort
from logshift.converter.drop import expected_drop
from logshift.runtime import Preprocessing
from logshift.runtime.cost import cost

BATCH = 20
DEFAULT_SETTINGS = ["4:0.15", "3:0.15", "4:1.0", "4:0.0"]


@dataclass(frozen=True)
class Data:
    """Pictures and labels, and how pictures become inputs."""

    preprocessing: Preprocessing
    calibration: np.ndarray  # float32 (N, C, H, W), like `inputs`
    inputs: np.ndarray
    labels: np.ndarray

    def part(self, start: int) -> Data:
        """Return every other test picture."""
        return replace(self, inputs=self.inputs[start::2], labels=self.labels[start::2])


def load(path: Path, calibration: int) -> Data:
    """Read a data set; see the first lines of this file."""
    if path.is_dir():
        preprocessing, size = Preprocessing(), (32, 32)
        chosen, _ = _pictures(path / "cifar10-train.parquet", calibration)
        pictures, labels = _pictures(path / "cifar10-test.parquet")
    else:
        # As the package with EfficientNet-Lite0's weights has it.
        mean, std = (0.498,) * 3, (0.502,) * 3
        preprocessing = Preprocessing(resize=256, crop=(224, 224), mean=mean, std=std)
        size = (224, 224)
        everything, all_labels = _pictures(path)
        chosen = everything[::5]
        test = [i for i in range(len(everything)) if i % 5]
        pictures, labels = [everything[i] for i in test], all_labels[test]
    prepared = (np.stack([preprocessing.apply(p, size) for p in ps]) for ps in (chosen, pictures))
    return Data(preprocessing, *prepared, labels)


def _pictures(path: Path, count: int | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    table = pyarrow.parquet.read_table(path).slice(0, count)
    images = (Image.open(io.BytesIO(b)).convert("RGB") for b in table["image"].to_pylist())
    return [np.asarray(image) for image in images], table["label"].to_numpy()


def network(name: str) -> onnx.ModelProto:
    """Return a network of the suite, or that of an ONNX file."""
    return SUITE[name].build(SUITE[name].size) if name in SUITE else onnx.load(name)


def outputs(run: Callable[[np.ndarray], np.ndarray], data: Data) -> np.ndarray:
    """Return the first output for all test pictures."""
    batches = range(0, len(data.labels), BATCH)
    return np.concatenate([run(data.inputs[i : i + BATCH]) for i in batches])


def onnx_outputs(model: onnx.ModelProto, data: Data, exact: bool = True) -> np.ndarray:
    """Return those of an ONNX model in onnxruntime; `exact` is that of `ort.session`."""
    session = ort.session(model, exact=exact)
    name = session.get_inputs()[0].name
    return outputs(lambda x: session.run(None, {name: x})[0], data)


def top1(scores: np.ndarray, data: Data) -> float:
    """Return the share of test pictures, in percent, whose largest output is that of the label."""
    return 100.0 * float((scores.argmax(axis=1) == data.labels).mean())


def onnx_top1(model: onnx.ModelProto, data: Data, exact: bool = True) -> float:
    """Return the accuracy of an ONNX model in onnxruntime; see `onnx_outputs`."""
    return top1(onnx_outputs(model, data, exact), data)


def measure(
    model: onnx.ModelProto, data: Data, exact: np.ndarray | None = None, **settings: Any
) -> dict[str, Any]:
    """Convert with these settings, run all test pictures and say what came of it.

    With `exact`, the outputs of the float network, also what is lost, and what would be said
    without labels.
    """
    if settings.get("validate"):
        known, data = data.part(0), data.part(1)
        settings["validate"] = lambda session: top1(outputs(session.run, known), known)
        exact = None if exact is None else exact[1::2]
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "net.stlq", time.perf_counter()
        report = converter.convert(
            model, path, calibration=data.calibration, preprocessing=data.preprocessing, **settings
        )
        seconds = time.perf_counter() - start
        session = runtime.load(path)
        found = outputs(session.run, data)
    row = {
        "top1": top1(found, data), "bytes": report.file_bytes, "ratio": report.ratio,
        "bits_per_weight": report.bits_per_weight, "nzr": report.nzr, "seconds": seconds,
        "cycle_ratio": cost(session.graph).to_dict()["cycle_ratio"],
    }  # fmt: skip
    if report.search is not None:
        row["search"] = asdict(report.search)
    if exact is not None:
        row["lost"] = top1(exact, data) - row["top1"]
        row["expected_drop"] = expected_drop(exact, found)
    return row


def parsed(setting: str) -> tuple[str, dict[str, Any]]:
    """Return what a setting of the command line is called, and what `convert` takes for it."""
    bits, value, *tile = setting.split(":")
    if bits in ("auto", "validate"):
        name, limit = value.split("=")
        number = int(limit) if name == "max_bytes" else float(limit)
        how = {"weight_bits": bits} if bits == "auto" else {"validate": True}
        return f"{bits}, {name} {limit}", how | {name: number}
    if value == "auto":
        return f"{bits} bits", {"weight_bits": int(bits)}
    ratio = float(value)
    case = f"{bits} bits + {100 * ratio:g} %"
    how: dict[str, Any] = {"weight_bits": int(bits), "residual_ratio": ratio}
    if not tile:
        return case, how
    sides = [int(side) for side in tile[0].split("x")]
    how |= {"granularity": "tile", "tile": tuple(sides) if len(sides) > 1 else sides[0]}
    return f"{case} by tiles of {tile[0]}", how


def main() -> None:
    """Print and, with --json, write one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--settings", nargs="+", default=DEFAULT_SETTINGS,
        help="weight_bits:residual_ratio[:tile], auto:target=value, validate:max_drop=value ...",
    )  # fmt: skip
    parser.add_argument("--activation-bits", type=int, help="by default chosen for each tensor")
    parser.add_argument("--calibration", type=int, default=512, help="training pictures used")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data, model = load(arguments.data, arguments.calibration), network(arguments.model)
    print(describe())
    size = model.ByteSize()
    exact = onnx_outputs(model, data)
    rows = [{"case": "float32", "top1": top1(exact, data), "bytes": size, "ratio": 1.0}]
    print(f"float32: top-1 {rows[0]['top1']:.2f}, {size} bytes")
    for setting in arguments.settings:
        case, weights = parsed(setting)
        if arguments.activation_bits is not None:
            case += f", {arguments.activation_bits}-bit activations"
            weights["activation_bits"] = arguments.activation_bits
        try:
            row = measure(model, data, exact, **weights)
        except converter.ConversionError as error:
            print(f"{case}: {error}")
            continue
        rows.append({"case": case, **row})
        print(
            f"{case}: top-1 {row['top1']:.2f}, {row['lost']:.2f} lost"
            f" (expected {row['expected_drop']:.2f}), {row['bytes']} bytes,"
            f" 1/{row['ratio']:.2f} of the ONNX file,"
            f" {row['bits_per_weight']:.2f} bits per weight, NZR {100 * row['nzr']:.1f} %,"
            f" {row['cycle_ratio']:.2f} times the cycles of single words,"
            f" converted in {row['seconds']:.0f} s"
        )
        for trial in row.get("search", {"trials": ()})["trials"]:
            print(f"  tried: {trial['file_bytes']} bytes, {trial['figure']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
