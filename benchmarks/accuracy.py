"""Post-training accuracy: convert with several settings, run all test pictures.

    python -m benchmarks.accuracy --model resnet20-cifar10.onnx --data DIRECTORY
    python -m benchmarks.accuracy --model efficientnet_lite0 --data imagenet-sample-500.parquet

A directory holds cifar10-train.parquet (calibration) and cifar10-test.parquet. Of a single file
every fifth picture calibrates and the others test. Columns are `image` (encoded picture), `label`.
`--model` is an ONNX file or the name of a network of the suite.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet
from PIL import Image

from benchmarks.machine import describe
from benchmarks.models import SUITE
from logshift import converter, runtime
from logshift.runtime import Preprocessing

BATCH = 20
DEFAULT_SETTINGS = ["4:0.15", "3:0.15", "4:1.0", "4:0.0"]


@dataclass(frozen=True)
class Data:
    """Pictures and labels, and how pictures become inputs."""

    preprocessing: Preprocessing
    calibration: np.ndarray  # float32 (N, C, H, W), like `inputs`
    inputs: np.ndarray
    labels: np.ndarray


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


def main() -> None:
    """Print and, with --json, write one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--settings", nargs="+", default=DEFAULT_SETTINGS, help="weight_bits:residual_ratio ..."
    )
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=512, help="training pictures used")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = load(arguments.data, arguments.calibration)
    labels, batches = data.labels, range(0, len(data.labels), BATCH)

    if arguments.model in SUITE:
        model = SUITE[arguments.model].build(SUITE[arguments.model].size)
    else:
        model = onnx.load(arguments.model)
    print(describe())
    float_bytes = model.ByteSize()
    peer = onnxruntime.InferenceSession(model.SerializeToString())
    name = peer.get_inputs()[0].name
    logits = [peer.run(None, {name: data.inputs[i : i + BATCH]})[0] for i in batches]
    rows = [{"case": "float32", "top1": _top1(logits, labels), "bytes": float_bytes, "ratio": 1.0}]
    print(f"float32: top-1 {rows[0]['top1']:.2f}, {float_bytes} bytes")
    with tempfile.TemporaryDirectory() as folder:
        for setting in arguments.settings:
            bits, residual_ratio = setting.split(":")
            start = time.perf_counter()
            report = converter.convert(
                model, Path(folder) / "net.stlq", calibration=data.calibration,
                weight_bits=int(bits), residual_ratio=float(residual_ratio),
                activation_bits=arguments.activation_bits, preprocessing=data.preprocessing,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            session = runtime.load(Path(folder) / "net.stlq")
            logits = [session.run(data.inputs[i : i + BATCH]) for i in batches]
            size = (Path(folder) / "net.stlq").stat().st_size
            row = {
                "case": f"{bits} bits + {100 * float(residual_ratio):g} %",
                "top1": _top1(logits, labels), "bytes": size, "ratio": float_bytes / size,
                "seconds": seconds,
                **{k: v for k, v in report.to_dict().items() if isinstance(v, float)},
            }  # fmt: skip
            rows.append(row)
            print(
                f"{row['case']}, {arguments.activation_bits}-bit activations: top-1"
                f" {row['top1']:.2f}, {size} bytes, 1/{row['ratio']:.2f} of the ONNX file,"
                f" {row['bits_per_weight']:.2f} bits per weight, converted in {seconds:.0f} s"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1))


def _top1(logits: list[np.ndarray], labels: np.ndarray) -> float:
    return 100.0 * float((np.concatenate(logits).argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main()
