"""Compare logshift with other engines: the same input, in turns, on 1 and on 2 threads.

    python -m benchmarks.compare --models resnet18 --json results.json --plot ratios.svg

Every engine has a process of its own and runs only when it is its turn (A B C A B C ...), so that
what else happens on the machine happens to all. Ratios are taken within a round; the median and the
spread (10th to 90th percentile) of the rounds are printed. Models and their conversions are kept in
--cache. `docs/benchmarks.md` says what every figure means.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.engines import ENGINES, Engine
from benchmarks.machine import describe
from benchmarks.models import PACKAGED, SUITE, freed
from benchmarks.quantizer import quantized
from logshift import converter
from logshift.runtime.table import text_table

CACHE = Path("build/benchmarks")
NETWORKS = SUITE | PACKAGED
_CALIBRATION = 16
# Threads of some engines go on spinning for a while after a run; the next one must not suffer.
_PAUSE = 0.03


@dataclass(frozen=True)
class Files:
    """One network in the forms that the engines take."""

    float: Path
    qdq: Path
    packed: Path


def prepare(
    name: str, cache: Path, weight_bits: int = 4, activation_bits: int = 8, is_free: bool = False
) -> Files:
    """Build, or take from its package, and convert a network, unless that was done before.

    If it is to be free, it takes pictures of any size.
    """
    stem = f"{name}-free" if is_free else name
    files = Files(
        cache / f"{stem}.onnx",
        cache / f"{stem}-qdq.onnx",
        cache / f"{stem}-w{weight_bits}a{activation_bits}.stlq",
    )
    cache.mkdir(parents=True, exist_ok=True)
    model = NETWORKS[name]
    rng = np.random.default_rng(1)
    calibration = rng.standard_normal((_CALIBRATION, *model.shape)).astype(np.float32)
    if not files.float.exists():
        built = model.build(model.size)
        onnx.save(freed(built) if is_free else built, files.float)
    if not files.qdq.exists():
        onnx.save(quantized(onnx.load(files.float), calibration), files.qdq)
    if not files.packed.exists():
        converter.convert(
            files.float, files.packed, calibration=calibration,
            weight_bits=weight_bits, activation_bits=activation_bits,
        )  # fmt: skip
    return files


def compare(
    files: Files,
    shape: tuple[int, ...],
    threads: int,
    names: list[str],
    rounds: int,
    seconds: float,
    cache_directory: str,
) -> dict[str, dict[str, Any]]:
    """Run all engines in turns; returns what was measured, by engine."""
    paths = {name: getattr(files, ENGINES[name].file) for name in names}
    engines = {name: Engine(name, paths[name], threads, shape, cache_directory) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name].append(float(np.median(engine.turn(seconds))))
            time.sleep(_PAUSE)
    return {
        name: {
            **statistics(times[name], times["logshift"]), **engine.start,
            "peak_memory": engine.close(), "bytes": paths[name].stat().st_size,
        }
        for name, engine in engines.items()
    }  # fmt: skip


def statistics(seconds: list[float], logshift: list[float]) -> dict[str, float]:
    """Median time, and the ratio to logshift's time in the same round: median and spread."""
    low, middle, high = np.percentile(np.array(seconds) / np.array(logshift), [10, 50, 90])
    return {
        "milliseconds": 1e3 * float(np.median(seconds)),
        "ratio": float(middle), "ratio_low": float(low), "ratio_high": float(high),
    }  # fmt: skip


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(SUITE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, help="default: those of the suite")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="default: the network's own"
    )
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="svg, png or pdf")
    a = parser.parse_args()
    print(describe())
    names = ["logshift"]
    for name in a.engines:
        if missing := ENGINES[name].missing:
            print(f"{name} is left out: {missing} is not installed")
        elif name not in names:
            names.append(name)
    rows = []
    for model in a.models:
        try:
            files = prepare(
                model, a.cache, a.weight_bits, a.activation_bits, is_free=a.size is not None
            )
        except ModuleNotFoundError as error:
            print(f"{model} is left out: {error}")
            continue
        weights = onnx.load(files.float).doc_string or "random weights"
        batches = a.batch or NETWORKS[model].batches
        with tempfile.TemporaryDirectory() as cache_directory:
            picture = (NETWORKS[model].channels, *(a.size or NETWORKS[model].shape[1:]))
            shape = (batches[0], *picture)
            # The first start of each of our own engines compiles; those that count are warm.
            cold = {}
            for name in names:
                if ENGINES[name].module == "logshift":
                    first = Engine(name, files.packed, a.threads[0], shape, cache_directory)
                    first.close()
                    cold[name] = first.start["start"]
            for batch in batches:
                for threads in a.threads:
                    shape = (batch, *picture)
                    result = compare(
                        files, shape, threads, names, a.rounds, a.seconds, cache_directory
                    )
                    rows.append({
                        "model": model, "weights": weights, "threads": threads, "batch": batch,
                        "size": shape[2:],
                        "weight_bits": a.weight_bits, "activation_bits": a.activation_bits,
                        "cold_start": cold["logshift"], "engines": result,
                    })  # fmt: skip
                    print(f"\n{report(rows[-1])}", flush=True)
                    # Written as they come: the whole suite takes long.
                    if a.json:
                        text = json.dumps({"machine": describe(), "rows": rows}, indent=1)
                        a.json.write_text(text)
    if a.plot:
        from benchmarks.plot import plot

        plot(rows, a.plot)


def report(row: dict[str, Any]) -> str:
    """One case as a heading and a table."""
    threads = row["threads"]
    heading = (
        f"{row['model']} ({row['weights']}), W{row['weight_bits']}A{row['activation_bits']},"
        f" batch {row['batch']}, {threads} thread{'s' if threads > 1 else ''};"
        f" logshift's cold start {row['cold_start']:.1f} s"
    )
    lines = [(
        "engine", "ms", "x logshift's time", "10-90 %", "start s", "load s", "first s", "peak MB",
        "MB",
    )]  # fmt: skip
    for name, r in row["engines"].items():
        lines.append((
            name, f"{r['milliseconds']:.2f}", f"{r['ratio']:.2f}",
            f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}", f"{r['start']:.2f}",
            f"{r['load']:.2f}", f"{r['first_run']:.2f}", f"{r['peak_memory'] / 1e6:.0f}",
            f"{r['bytes'] / 1e6:.1f}",
        ))  # fmt: skip
    table = f"{heading}\n{text_table(lines, left=1)}"
    name = fastest_other(row["engines"])
    if name is None:
        return table
    return f"{table}\nfastest other engine: {name}, {row['engines'][name]['ratio']:.2f}"


def fastest_other(engines: dict[str, dict[str, Any]]) -> str | None:
    """Name of the engine that is the fastest of those that are not logshift."""
    others = {name: r["ratio"] for name, r in engines.items() if not name.startswith("logshift")}
    return min(others, key=others.__getitem__, default=None)


if __name__ == "__main__":
    main()
