"""A plot of what `benchmarks.compare` measured: bars of ratios, one panel per thread count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a plot of the rows of `compare`'s JSON; the ending of the path says which format."""
    threads = sorted({row["threads"] for row in rows})
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(n for row in rows for n in row["engines"] if n != "logshift"))
    place = {case: number for number, case in enumerate(cases)}
    thickness = 0.8 / max(len(names), 1)
    figure, axes = pyplot.subplots(
        1, len(threads), sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(5 * len(threads), 1.5 + len(cases) * (0.3 + 0.14 * len(names))),
    )  # fmt: skip
    for axis, count in zip(axes[0], threads, strict=True):
        for number, name in enumerate(names):
            own = [r for r in rows if r["threads"] == count and name in r["engines"]]
            results = [row["engines"][name] for row in own]
            middle, low, high = (
                np.array([r[key] for r in results]) for key in ("ratio", "ratio_low", "ratio_high")
            )
            y = np.array([place[row["model"], row["batch"]] for row in own])
            axis.barh(
                y + (number - (len(names) - 1) / 2) * thickness, middle, thickness,
                xerr=(middle - low, high - middle), label=name, error_kw={"linewidth": 0.8},
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel("time / logshift's time")
        axis.set_title(f"{count} thread{'s' if count > 1 else ''}")
    axes[0][0].set_yticks(range(len(cases)), [f"{model}, batch {batch}" for model, batch in cases])
    axes[0][0].invert_yaxis()
    bars = axes[0][0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=2 * len(threads))
    figure.savefig(path)
    pyplot.close(figure)
