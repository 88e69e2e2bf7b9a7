"""Post-training accuracy on CIFAR-10: convert with several settings, run all test pictures.

    python -m benchmarks.accuracy --model resnet20-cifar10.onnx --data DIRECTORY

`--data` holds cifar10-train.parquet (calibration) and cifar10-test.parquet, with columns `image`
(encoded picture) and `label`.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet
from PIL import Image

from benchmarks.machine import describe
from logshift import converter, runtime
from logshift.runtime import Preprocessing

BATCH = 500
DEFAULT_SETTINGS = ["4:0.15", "3:0.15", "4:1.0", "4:0.0"]


def load(path: Path, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 32, 32, 3) uint8 and labels of a parquet file."""
    table = pyarrow.parquet.read_table(path).slice(0, count)
    pictures = [Image.open(io.BytesIO(b)).convert("RGB") for b in table["image"].to_pylist()]
    return np.stack([np.asarray(p) for p in pictures]), table["label"].to_numpy()


def main() -> None:
    """Print and, with --json, write one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--settings", nargs="+", default=DEFAULT_SETTINGS, help="weight_bits:residual_ratio ..."
    )
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=512, help="training pictures used")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    calibration, _ = load(arguments.data / "cifar10-train.parquet", arguments.calibration)
    pictures, labels = load(arguments.data / "cifar10-test.parquet")
    prepared = np.stack([Preprocessing().apply(p, (32, 32)) for p in pictures])

    print(describe())
    float_bytes = arguments.model.stat().st_size
    peer = onnxruntime.InferenceSession(arguments.model)
    name = peer.get_inputs()[0].name
    batches = range(0, len(prepared), BATCH)
    logits = [peer.run(None, {name: prepared[i : i + BATCH]})[0] for i in batches]
    rows = [{"case": "float32", "top1": _top1(logits, labels), "bytes": float_bytes, "ratio": 1.0}]
    print(f"float32: top-1 {rows[0]['top1']:.2f}, {float_bytes} bytes")
    with tempfile.TemporaryDirectory() as folder:
        for setting in arguments.settings:
            bits, residual_ratio = setting.split(":")
            report = converter.convert(
                arguments.model, Path(folder) / "net.stlq", calibration=calibration,
                weight_bits=int(bits), residual_ratio=float(residual_ratio),
                activation_bits=arguments.activation_bits, preprocessing=Preprocessing(),
            )  # fmt: skip
            session = runtime.load(Path(folder) / "net.stlq")
            logits = [session.run(prepared[i : i + BATCH]) for i in batches]
            size = (Path(folder) / "net.stlq").stat().st_size
            row = {
                "case": f"{bits} bits + {100 * float(residual_ratio):g} %",
                "top1": _top1(logits, labels), "bytes": size, "ratio": float_bytes / size,
                **{k: v for k, v in report.to_dict().items() if isinstance(v, float)},
            }  # fmt: skip
            rows.append(row)
            print(
                f"{row['case']}, {arguments.activation_bits}-bit activations: top-1"
                f" {row['top1']:.2f}, {size} bytes, 1/{row['ratio']:.2f} of the ONNX file"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1))


def _top1(logits: list[np.ndarray], labels: np.ndarray) -> float:
    return 100.0 * float((np.concatenate(logits).argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main()
