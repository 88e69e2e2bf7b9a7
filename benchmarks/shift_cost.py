"""Time of additions and shifts against what they add: second words, and zeros.

    python -m benchmarks.shift_cost --plot shift-cost.svg

A 3x3 convolution of 128 channels on 28x28 codes, one thread. Its weights are random; first, more
and more of them have a second word (NZR from 0 to 1), then more and more are zero. The `shift`
kernel runs on all of them in turns, and besides the kernel that "auto" takes. Times are printed as
multiples of that of single words without zeros, with the straight line through them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.bench_kernels import graph_of
from benchmarks.machine import describe
from logshift.kernels.stlq.codec import LogWeights, exponent_levels
from logshift.runtime import executor
from logshift.runtime.graph import Graph, Node
from logshift.runtime.plan.planner import Planner
from logshift.runtime.plan.prepare import prepare
from logshift.runtime.table import text_table

CHANNELS, SIZE = 128, 28
SHARES = np.linspace(0, 1, 11)


def weights(bits: int, nzr: float, zeros: float) -> LogWeights:
    """Words of random exponents and signs: a share of zeros, and a share of second words."""
    rng = np.random.default_rng(3)
    shape, levels = (CHANNELS, 3, 3, CHANNELS), exponent_levels(bits)
    first, second = (
        (rng.integers(1, levels + 1, shape) + rng.integers(0, 2, shape) * 2 ** (bits - 1))
        for _ in range(2)
    )
    first[rng.random(shape) < zeros] = 0
    second[rng.random(shape) >= nzr] = 0
    alpha = np.ones(CHANNELS, np.float32)
    return LogWeights(first.astype(np.uint8), second.astype(np.uint8), alpha, bits, clip=2)


def convolution(words: LogWeights, activation_bits: int) -> Graph:
    """Return a graph with the convolution in it."""
    pads = {"pads": [1, 1, 1, 1]}
    node = Node("Conv", "conv", ["x"], ["y"], pads, words, np.zeros(CHANNELS, np.float32))
    return graph_of(node, CHANNELS, (CHANNELS, SIZE, SIZE), SIZE, activation_bits)


def caller(graph: Graph, family: str) -> Callable[[], None]:
    """Return what runs the convolution's kernel once, on one thread."""
    plan = Planner(graph, prepare(graph, family), family, 1).plan(graph.nominal_inputs())
    rng = np.random.default_rng(4)
    held = {i.name: rng.standard_normal(i.nominal).astype(np.float32) for i in graph.inputs}
    outputs = plan.bind(held)
    team = executor.team(1)
    team.run(plan.program)
    (place,) = [i for i, step in enumerate(plan.steps) if step.kernel.op == "conv"]

    def run(keep: object = (held, outputs)) -> None:
        team.run(plan.program[place : place + 1])

    return run


def measure(bits: int, activation_bits: int, rounds: int) -> dict[str, np.ndarray]:
    """Return median times in seconds: by NZR, by share of zeros, and of "auto"."""
    cases = {("nzr", share): weights(bits, share, 0) for share in SHARES}
    cases |= {("zeros", share): weights(bits, 0, share) for share in SHARES}
    runs = {
        key: caller(convolution(words, activation_bits), "shift") for key, words in cases.items()
    }
    runs["auto", 0] = caller(convolution(weights(bits, 0, 0), activation_bits), "auto")
    times: dict[tuple[str, float], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    median = {key: float(np.median(t)) for key, t in times.items()}
    result = {
        kind: np.array([median[kind, share] for share in SHARES]) for kind in ("nzr", "zeros")
    }
    return result | {"auto": np.array([median["auto", 0]])}


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept, and coefficient of determination of the straight line through points."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    return float(slope), float(intercept), float(1 - rest.var() / y.var())


def plot(results: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Write a plot of times relative to single words without zeros, with their lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    labels = {"nzr": "non-zero ratio of second words", "zeros": "share of zeros"}
    for axis, (kind, label) in zip(axes, labels.items(), strict=True):
        for name, result in results.items():
            y = result[kind] / result["nzr"][0]
            slope, intercept, _ = line(SHARES, y)
            (points,) = axis.plot(SHARES, y, "o", label=name)
            axis.plot(SHARES, slope * SHARES + intercept, color=points.get_color(), linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[0].set_ylabel("time / time of single words without zeros")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--plot", type=Path, help="svg, png or pdf")
    arguments = parser.parse_args()
    print(describe())
    results = {}
    for bits, activation_bits in ((3, 5), (4, 5), (4, 8)):
        name = f"W{bits}A{activation_bits}"
        result = results[name] = measure(bits, activation_bits, arguments.rounds)
        unit = result["nzr"][0]
        rows = [("share", "of second words", "of zeros")]
        rows += [
            (f"{share:.1f}", f"{nzr / unit:.3f}", f"{zeros / unit:.3f}")
            for share, nzr, zeros in zip(SHARES, result["nzr"], result["zeros"], strict=True)
        ]
        print(f"\n{name}: {unit * 1e3:.3f} ms; auto {result['auto'][0] / unit:.3f}")
        print(text_table(rows, left=0))
        for kind in ("nzr", "zeros"):
            slope, intercept, fit = line(SHARES, result[kind] / unit)
            print(f"{kind}: {intercept:.3f} + {slope:.3f} x, R^2 {fit:.4f}")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
