"""How near every convolution of a packed file comes to the machine's peak of byte dot products.

    python -m benchmarks.layers model.stlq

One thread. Every round runs the peak loop (`benchmarks/peak.py`), the network layer by layer and
the loop again; a layer's share of the peak is taken within the round, and the median is printed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import peak
from benchmarks.machine import describe
from logshift import runtime
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
    loop = peak.peak_loop(name)
    session = runtime.load(path, threads=1)
    shape = session.inputs[0].nominal
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    layers = {layer.name: layer for layer in session.summary().layers if layer.macs}
    loop(seconds)  # finds out how many rounds that is
    peaks, rates = [], []
    for _ in range(rounds):
        before = loop(seconds)
        times = {layer.name: layer.seconds for layer in session.profile(x, repeat=1)}
        peaks.append((before + loop(seconds)) / 2)
        rates.append([layer.macs / times[name] for name, layer in layers.items()])
    shares = np.array(rates) / np.array(peaks)[:, None]
    low, middle, high = np.percentile(shares, [10, 50, 90], axis=0)
    columns = zip(layers.values(), np.median(rates, axis=0), middle, low, high, strict=True)
    return [Measured(layer, *map(float, rest)) for layer, *rest in columns], float(np.median(peaks))


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
    parser.add_argument("--seconds", type=float, default=0.02, help="length of a peak loop")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured, rate = measure(arguments.model, arguments.rounds, arguments.seconds)
    print(describe())
    print(f"peak ({peak.best()}): {rate / 1e9:.0f} GMAC/s\n{table(measured)}")
    wide = [100 * m.of_peak for m in measured if m.is_wide_3x3]
    if wide:
        print(
            f"3x3 of 64 channels and more: {np.median(wide):.0f} % of the peak at the median,"
            f" {min(wide):.0f} to {max(wide):.0f} %"
        )
    if arguments.json:
        rows = [asdict(m) for m in measured]
        result = {"machine": describe(), "peak": rate, "layers": rows}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
