"""Accuracy against bits per weight: STLQ and uniform weights, 8-bit activations.

    python -m benchmarks.accuracy_plot --network ResNet-20 resnet20-cifar10.onnx DIRECTORY
        --network EfficientNet-Lite0 efficientnet_lite0 imagenet-sample-500.parquet

Every case is a row of the table at --table as soon as it is measured; rows that are there already
are not measured again, so a run that was interrupted goes on. The plot shows the whole table. What
a model and its data may be is said in `benchmarks.accuracy`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

from benchmarks import accuracy, uniform  # noqa: E402
from benchmarks.quantizer import quantized  # noqa: E402

COLUMNS = ("network", "weights", "residual_ratio", "bits_per_weight", "top1")
STLQ_BITS = (3, 4, 5)
RATIOS = (0.0, 0.05, 0.15, 0.3, 0.6, 1.0)
_COLORS = {"STLQ 3": "C0", "STLQ 4": "C1", "STLQ 5": "C2"}

Row = dict[str, str]


def cases(model: str, data: Path) -> Iterator[tuple[str, str, Callable[[], tuple[float, float]]]]:
    """Yield weights, ratio and what measures them: returns bits per weight and accuracy."""
    network, pictures = accuracy.network(model), accuracy.load(data, uniform.CALIBRATION)
    yield "float32", "", lambda: (32.0, accuracy.onnx_top1(network, pictures))

    def stlq(bits: int, ratio: float) -> tuple[float, float]:
        row = accuracy.measure(network, pictures, weight_bits=bits, residual_ratio=ratio)
        return row["bits_per_weight"], row["top1"]

    def plain(bits: int) -> tuple[float, float]:
        _, deflated, top1 = uniform.plain(network, activations(), pictures, bits)
        return deflated, top1

    for ratio in RATIOS:
        for bits in STLQ_BITS:
            yield f"STLQ {bits}", f"{ratio:g}", partial(stlq, bits, ratio)
    activations = cache(lambda: quantized(network, pictures.calibration))
    for bits in uniform.PLAIN_BITS:
        yield f"uniform {bits}", "", partial(plain, bits)


def measure(name: str, model: str, data: Path, table: Path) -> None:
    """Append to the table what it does not have."""
    done = {(row["network"], row["weights"], row["residual_ratio"]) for row in read(table)}
    for weights, ratio, run in cases(model, data):
        if (name, weights, ratio) in done:
            continue
        bits, top1 = run()
        with open(table, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerow([name, weights, ratio, f"{bits:.3f}", f"{top1:.2f}"])
        print(f"{name}, {weights} {ratio}: {bits:.2f} bits per weight, top-1 {top1:.2f}")


def read(table: Path) -> list[Row]:
    """Return the rows of a table; none if there is no such file."""
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def plot(rows: list[Row], path: Path) -> None:
    """Draw the table, one panel per network; the ending of the path says which format."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(networks), squeeze=False, layout="constrained", figsize=(5.5 * len(networks), 4.5)
    )
    for axis, network in zip(axes[0], networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        for kind in dict.fromkeys(row["weights"] for row in own):
            points = sorted(
                (float(row["bits_per_weight"]), float(row["top1"]))
                for row in own
                if row["weights"] == kind
            )
            x, y = zip(*points, strict=True)
            if kind == "float32":
                axis.axhline(y[0], color="black", linewidth=0.8, label="float32")
            elif kind in _COLORS:
                label = f"{kind} bits, 0 to 100 % second words"
                axis.plot(x, y, "o-", color=_COLORS[kind], markersize=4, label=label)
            else:
                axis.plot(x, y, "x", label=f"{kind} bits", markersize=8, markeredgewidth=2)
        axis.set_title(network)
        axis.set_xlabel("bits per weight")
        axis.set_ylabel("top-1, %")
        # Networks that have lost their function would leave the rest one line.
        best = max(float(row["top1"]) for row in own)
        axis.set_ylim(bottom=max(best - 25, 0))
        axis.grid(linewidth=0.3)
    axes[0][0].legend(fontsize="small", loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", nargs=3, action="append", default=[], metavar=("NAME", "MODEL", "DATA")
    )
    parser.add_argument("--table", type=Path, default=Path("docs/accuracy.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/accuracy.svg"))
    arguments = parser.parse_args()
    for name, model, data in arguments.network:
        measure(name, model, Path(data), arguments.table)
    plot(read(arguments.table), arguments.plot)


if __name__ == "__main__":
    main()
