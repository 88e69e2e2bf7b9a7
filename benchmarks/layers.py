"""How near every convolution of a packed file comes to the machine's peak of byte dot products.

    python -m benchmarks.layers model.stlq

One thread. A short peak loop (`benchmarks/peak.py`) runs before and after every layer of a run; the
layer's share of the peak is taken from these two, and the median of the runs is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import peak
from benchmarks.machine import describe
from logshift import runtime
from logshift.runtime import executor
from logshift.runtime.plan.planner import Planner
from logshift.runtime.plan.prepare import prepare
from logshift.runtime.session import LayerSummary
from logshift.runtime.table import text_table


@dataclass(frozen=True)
class Measured:
    """One convolution: multiplications per second, and as shares of the peak."""

    layer: LayerSummary
    rate: float
    of_peak: float
    of_peak_low: float  # 10th percentile of the rounds
    of_peak_high: float  # 90th percentile

    @property
    def is_wide_3x3(self) -> bool:
        """3x3, not grouped, and of at least 64 channels on both sides."""
        out, height, width, channels = self.layer.weight_shape or (0, 0, 0, 0)
        return (height, width) == (3, 3) and min(out, channels) >= 64


def measure(path: Path, rounds: int, seconds: float) -> tuple[list[Measured], float]:
    """Return the convolutions of a packed file, and the median peak in MAC/s."""
    name = peak.best()
    if name is None:
        raise SystemExit("this machine has no byte dot product to compare with")
    loop, team = peak.peak_loop(name), executor.team(1)
    session = runtime.load(path, threads=1)
    layers = {layer.name: layer for layer in session.summary().layers if layer.macs}
    graph = session.graph
    plan = Planner(graph, prepare(graph, "auto"), "auto", 1).plan(graph.nominal_inputs())
    rng = np.random.default_rng(2)
    inputs = {i.name: rng.standard_normal(i.nominal).astype(np.float32) for i in graph.inputs}
    outputs = plan.bind(inputs)  # held: the program writes into them
    peaks: list[float] = []
    # Of every round and layer: seconds, and multiplications that the peak loop does in them.
    times = [dict.fromkeys(layers, 0.0) for _ in range(rounds)]
    possible = [dict.fromkeys(layers, 0.0) for _ in range(rounds)]
    loop(seconds)  # finds out how long it has to be
    for time_of, possible_of in zip(times, possible, strict=True):
        team.run(plan.program)
        before = loop(seconds)
        for index, step in enumerate(plan.steps):
            start = time.perf_counter()
            team.run(plan.program[index : index + 1])
            spent = time.perf_counter() - start
            if step.node.name in layers:
                after = loop(seconds)
                time_of[step.node.name] += spent
                possible_of[step.node.name] += spent * (before + after) / 2
                peaks.append(before)
                before = after
    del outputs
    measured = []
    for layer in layers.values():
        shares = [layer.macs / own[layer.name] for own in possible]
        low, middle, high = map(float, np.percentile(shares, [10, 50, 90]))
        rate = layer.macs / float(np.median([own[layer.name] for own in times]))
        measured.append(Measured(layer, rate, middle, low, high))
    return measured, float(np.median(peaks))


def table(measured: list[Measured]) -> str:
    """One row per convolution."""
    rows = [("node", "weights", "output", "kernel", "MMAC", "GMAC/s", "% of peak", "10-90 %")]
    for m in measured:
        rows.append((
            m.layer.name, "x".join(map(str, m.layer.weight_shape or ())),
            "x".join(map(str, m.layer.output_shape)), m.layer.kernel,
            f"{m.layer.macs / 1e6:.1f}", f"{m.rate / 1e9:.1f}", f"{100 * m.of_peak:.0f}",
            f"{100 * m.of_peak_low:.0f}-{100 * m.of_peak_high:.0f}",
        ))  # fmt: skip
    return text_table(rows, left=4)


def main() -> None:
    """Print the table, and how the wide 3x3 convolutions do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.002, help="length of a peak loop")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured, rate = measure(arguments.model, arguments.rounds, arguments.seconds)
    print(describe())
    print(f"peak ({peak.best()}): {rate / 1e9:.0f} GMAC/s\n{table(measured)}")
    if wide := [m for m in measured if m.is_wide_3x3]:
        middle, high = [m.of_peak for m in wide], [m.of_peak_high for m in wide]
        print(
            f"3x3 of 64 channels and more: {min(middle):.0%} to {max(middle):.0%} of the peak;"
            f" in the best tenth of the runs {min(high):.0%} to {max(high):.0%}"
        )
    if arguments.json:
        rows = [asdict(m) for m in measured]
        result = {"machine": describe(), "peak": rate, "layers": rows}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
