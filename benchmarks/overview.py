"""The first picture of README.md: speed and size beside other engines, from figures in docs/.

    python -m benchmarks.overview

Nothing is measured here. Ratios are those of one thread in the tables of docs/results.md, which
`benchmarks.compare` prints; sizes and accuracies are rows of docs/accuracy.csv, which
`benchmarks.accuracy_plot` writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks import accuracy_plot  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = ("ResNet-18", "ResNet-50", "MobileNetV2", "EfficientNet-Lite0", "DeepLabV3+")
# Machine -> the engines whose columns a table of docs/results.md has first, after the threads.
SPEED = {
    "AVX2 (Zen 3)": ("onnxruntime fp32", "onnxruntime int8", "OpenVINO int8", "PyTorch fp32"),
    "AVX-512 (Zen 4)": ("onnxruntime int8", "OpenVINO int8", "OpenVINO default"),
}
_COLORS = {
    "PyTorch fp32": "#c9a0a0",
    "onnxruntime fp32": "#b0b0b0",
    "OpenVINO default": "#808080",
    "onnxruntime int8": "#e69f00",
    "OpenVINO int8": "#56b4e9",
    "logshift": "#0b6e4f",
}
# What the table of accuracies calls it, what the picture does, and a color.
SIZES = {
    ("float32", ""): ("float32", "#b0b0b0"),
    ("uniform 8", ""): ("int8", "#d8c080"),
    ("STLQ 4", "0.3"): ("logshift, 4 bits + 30 %", _COLORS["logshift"]),
    ("STLQ 4", "0.15"): ("logshift, 4 bits + 15 %", _COLORS["logshift"]),
}


def ratios(text: str, engines: tuple[str, ...]) -> dict[str, list[float]]:
    """Return the ratios of one thread and batch 1, by network, from a page's table.

    Parameters
    ----------
    text : str
        The page.
    engines : tuple of str
        The table is the first one whose columns are the network, the threads and these.
    """
    heading = "| " + " | ".join(("network", "threads", *engines)) + " |"
    table = text[text.index(heading) :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {
        name: [float(cell) for cell in cells[: len(engines)]]
        for name, threads, *cells in rows
        if name in NETWORKS and threads == "1"
    }


def draw_speed(axis: Axes, found: dict[str, list[float]], engines: tuple[str, ...]) -> None:
    """Bars of other engines' times over logshift's."""
    thickness = 0.84 / len(engines)
    order = sorted(range(len(engines)), key=lambda i: list(_COLORS).index(engines[i]))
    for place, engine in enumerate(order):
        for row, name in enumerate(NETWORKS):
            y = row + (place - (len(engines) - 1) / 2) * thickness
            ratio = found[name][engine]
            axis.barh(y, ratio, 0.9 * thickness, color=_COLORS[engines[engine]])
            axis.text(ratio + 0.03, y, f"{ratio:.2f}", va="center", fontsize=6.5)
    axis.axvline(1, color=_COLORS["logshift"], linewidth=1.6)
    axis.set_yticks(range(len(NETWORKS)), NETWORKS)
    axis.invert_yaxis()
    axis.set_xlim(0, 3.2)
    axis.set_xlabel("time / logshift's time")


def draw_size(axis: Axes, rows: list[accuracy_plot.Row]) -> None:
    """Bars of bits per weight, with the accuracy that goes with them."""
    found = {(r["network"], r["weights"], r["residual_ratio"]): r for r in rows}
    names, y = [], 0.0
    for network in dict.fromkeys(row["network"] for row in rows):
        axis.text(0, y - 0.75, network, fontsize=8, weight="bold", va="center")
        for key, (label, color) in SIZES.items():
            row = found[(network, *key)]
            bits = float(row["bits_per_weight"])
            axis.barh(y, bits, 0.75, color=color)
            text = f"{bits:.2f} bits, top-1 {row['top1']} %"
            inside = bits > 16
            axis.text(
                bits - 0.5 if inside else bits + 0.5, y, text, va="center", fontsize=7,
                ha="right" if inside else "left",
            )  # fmt: skip
            names.append((y, label))
            y += 1
        y += 1.2
    axis.set_yticks([place for place, _ in names], [label for _, label in names], fontsize=7.5)
    axis.set_ylim(y - 1.4, -1.4)
    axis.set_xlabel("bits per weight in the file")


def draw(page: str, rows: list[accuracy_plot.Row], path: Path) -> None:
    """Draw the picture; the ending of the path says which format.

    Parameters
    ----------
    page : str
        docs/results.md.
    rows : list of dict
        Of docs/accuracy.csv.
    path : Path
        The picture.
    """
    # Text stays text, so that it can be searched and read aloud, and the file says the same twice.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "overview", "font.size": 8}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(
            1, 3, figsize=(10, 4.3), layout="constrained", width_ratios=(1.15, 1, 1.15)
        )
        for axis, (machine, engines) in zip(axes, SPEED.items(), strict=False):
            draw_speed(axis, ratios(page, engines), engines)
            axis.set_title(f"{machine}, one thread", fontsize=9)
        axes[1].set_yticklabels([])
        draw_size(axes[2], rows)
        axes[2].set_title("size of weights", fontsize=9)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        patches = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
        figure.legend(
            patches, list(_COLORS), loc="outside lower center", ncols=len(_COLORS), frameon=False
        )
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw the picture again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=DOCS / "overview.svg")
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    draw(page, accuracy_plot.read(DOCS / "accuracy.csv"), parser.parse_args().plot)


if __name__ == "__main__":
    main()
