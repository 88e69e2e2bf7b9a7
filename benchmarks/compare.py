"""Compare logshift with other engines: the same input, in turns, on 1 and on 2 threads.

    python -m benchmarks.compare --models resnet18 --threads 1 2

Every engine has a process of its own and runs only when it is its turn (A B C A B C ...), so that
what else happens on the machine happens to all. Ratios are taken within a round; the median and the
spread (10th to 90th percentile) of the rounds are printed, and written with --json. Models and
their conversions are kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.engines import ENGINES, Engine
from benchmarks.machine import describe
from benchmarks.models import SUITE
from logshift import converter
from logshift.runtime.table import text_table

_CALIBRATION = 16
# Threads of some engines go on spinning for a while after a run; the next one must not suffer.
_PAUSE = 0.03


@dataclass(frozen=True)
class Files:
    """One network in the forms that the engines take."""

    float: Path
    qdq: Path
    packed: Path


def prepare(name: str, cache: Path, weight_bits: int, activation_bits: int) -> Files:
    """Build and convert a network of the suite, unless that was done before."""
    files = Files(
        cache / f"{name}.onnx",
        cache / f"{name}-qdq.onnx",
        cache / f"{name}-w{weight_bits}a{activation_bits}.stlq",
    )
    cache.mkdir(parents=True, exist_ok=True)
    model = SUITE[name]
    rng = np.random.default_rng(1)
    calibration = rng.standard_normal((_CALIBRATION, *model.shape)).astype(np.float32)
    if not files.float.exists():
        onnx.save(model.build(), files.float)
    if not files.qdq.exists():
        _quantize(files.float, files.qdq, calibration)
    if not files.packed.exists():
        converter.convert(
            files.float, files.packed, calibration=calibration,
            weight_bits=weight_bits, activation_bits=activation_bits,
        )  # fmt: skip
    return files


def _quantize(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Quantize as onnxruntime does it: QDQ, static, uint8 activations, int8 weights per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"input": x[None]} for x in calibration])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()


def compare(
    files: Files, x: np.ndarray, threads: int, names: list[str], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Run all engines in turns; returns what was measured, by engine."""
    engines = {name: Engine(name, getattr(files, ENGINES[name][1]), threads, x) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name].append(engine.turn(seconds))
            time.sleep(_PAUSE)
    result: dict[str, dict[str, Any]] = {}
    for name, engine in engines.items():
        ratio = np.array(times[name]) / np.array(times["logshift"])
        low, middle, high = np.percentile(ratio, [10, 50, 90])
        result[name] = {
            "milliseconds": 1e3 * float(np.median(times[name])),
            "ratio": float(middle), "ratio_low": float(low), "ratio_high": float(high),
            **engine.start, "peak_memory": engine.close(),
            "bytes": getattr(files, ENGINES[name][1]).stat().st_size,
        }  # fmt: skip
    return result


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SUITE, default=list(SUITE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    names = ["logshift", *(name for name in a.engines if name != "logshift")]
    print(describe())
    rows = []
    for model in a.models:
        files = prepare(model, a.cache, a.weight_bits, a.activation_bits)
        x = np.random.default_rng(2).standard_normal((a.batch, *SUITE[model].shape))
        for threads in a.threads:
            result = compare(files, x.astype(np.float32), threads, names, a.rounds, a.seconds)
            case = f"{model}, W{a.weight_bits}A{a.activation_bits}, batch {a.batch}"
            print(f"\n{case}, {threads} thread{'s' if threads > 1 else ''}")
            print(_table(result))
            rows.append({
                "model": model, "threads": threads, "batch": a.batch, "engines": result,
                "weight_bits": a.weight_bits, "activation_bits": a.activation_bits,
            })  # fmt: skip
    if a.json:
        a.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1))


def _table(result: dict[str, dict[str, Any]]) -> str:
    rows = [("engine", "ms", "x logshift's time", "10-90 %", "load s", "first s", "peak MB", "MB")]
    for name, r in result.items():
        rows.append((
            name, f"{r['milliseconds']:.2f}", f"{r['ratio']:.2f}",
            f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}", f"{r['load']:.2f}",
            f"{r['first_run']:.2f}", f"{r['peak_memory'] / 1e6:.0f}", f"{r['bytes'] / 1e6:.1f}",
        ))  # fmt: skip
    return text_table(rows, left=1)


if __name__ == "__main__":
    main()
