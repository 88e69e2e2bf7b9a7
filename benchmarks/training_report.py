"""Figures and tables of docs/training.md from the logs of the training runs.

    python -m benchmarks.training_report --archive runs     copies logs and panels there first
    python -m benchmarks.training_report

Logs there are those of `benchmarks.training_runs` and `benchmarks.training_runtime`, but each row
of `iterations.csv` is the mean of twenty. Tables replace those in docs/training.md, each between a
comment with its name and one with `end`. Cases without a run have no row; those with several, of
other seeds, have their mean and standard deviation.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

from benchmarks import training_panels  # noqa: E402
from benchmarks.training_runs import LONGER, SEEDS  # noqa: E402
from logshift.trainer.data.camvid import CamVid  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
LOGS = DOCS / "training"
PAGE = DOCS / "training.md"
TOGETHER = 20

METHODS = {
    "": "STLQ, 15 %",
    "-without_select": "without select",
    "-flightnn": "per-filter selection (as FLightNN), 15 %",
    "-log": "plain log",
    "-apot": "APoT",
    "-uniform": "uniform (LSQ)",
}


def archive(runs: Path) -> None:
    """Copy the logs of finished runs."""
    for summary in sorted(runs.rglob("summary.json")):
        target = LOGS / summary.parent.relative_to(runs)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("settings.json", "summary.json", "epochs.csv", "runtime.json"):
            if (summary.parent / name).exists():
                shutil.copy(summary.parent / name, target / name)
        panels = summary.parent / training_panels.PANELS
        if panels.exists():
            shutil.copytree(panels, target / panels.name, dirs_exist_ok=True)
        settings = json.loads((target / "settings.json").read_text())
        settings["weights"] = None  # a path of the machine that it ran on
        (target / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        with (summary.parent / "iterations.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        with (target / "iterations.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for begin in range(0, len(rows), TOGETHER):
                part = [[float(value) for value in row] for row in rows[begin : begin + TOGETHER]]
                means = [mean(column) for column in zip(*part, strict=True)]
                writer.writerow([int(part[-1][0]), *(f"{value:.5g}" for value in means[1:])])


def seeds(case: str) -> list[str]:
    """Return the runs of a case of the compared ones."""
    return [f"table/{case}/seed{seed}" for seed in SEEDS]


def load(name: str, file: str) -> dict[str, Any] | None:
    """Return a JSON file of a run, None if there is none."""
    path = LOGS / name / file
    return json.loads(path.read_text()) if path.exists() else None


def iterations(name: str) -> dict[str, list[float]]:
    """Return the columns of a run's log."""
    with (LOGS / name / "iterations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def curves(cases: dict[str, str], title: str, float_top1: float, axes: Any) -> None:
    """Draw training accuracy and non-zero ratio of runs against iterations."""
    other = axes.twinx()
    for number, (label, name) in enumerate(cases.items()):
        log = iterations(name)
        axes.plot(log["iteration"], smooth(log["top1"]), color=f"C{number}", label=label)
        other.plot(log["iteration"], log["nzr"], color=f"C{number}", linestyle=":")
    axes.axhline(float_top1, color="grey", linewidth=0.8, label="float, training")
    axes.set(title=title, xlabel="iteration", ylabel="training accuracy (lines)")
    other.set(ylabel="non-zero ratio (dots)", ylim=(0, None))
    axes.legend(loc="lower right", fontsize="small")


def smooth(values: list[float]) -> list[float]:
    """Return running means of five values."""
    return [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def figure(path: Path, cases: Callable[[int], dict[str, str]]) -> None:
    """Draw a figure of one panel for 5 bits and one for 4, of those runs that are there."""
    panels = {}
    for bits in (5, 4):
        found = {k: n for k, n in cases(bits).items() if (LOGS / n / "summary.json").exists()}
        if len(found) > 1:
            panels[bits] = found
    if not panels:
        return
    float_log = iterations("cifar10-float")["top1"][-20:]
    drawn, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (bits, found) in zip(axes[0], panels.items(), strict=True):
        curves(found, f"W{bits}A{bits}, ResNet-20, CIFAR-10", mean(float_log), axis)
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})


def spread(values: list[float], factor: float = 100) -> str:
    """Return the mean times a factor, with the standard deviation if there are several values."""
    text = f"{factor * mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {factor * stdev(values):.2f}"


def row(label: str, names: list[str]) -> str | None:
    """Return a row of a table of CIFAR-10 for those of a case's runs that are there, if any."""
    found = {name: summary for name in names if (summary := load(name, "summary.json")) is not None}
    if not found:
        return None
    names, summaries = list(found), list(found.values())
    cells = [label, spread([s["top1"] for s in summaries])]
    cells += [f"{100 * mean([s['nzr'] for s in summaries]):.2f}"]
    cells += [f"{mean([s['bits_per_weight'] for s in summaries]):.2f}"]
    packed = [p for name in names if (p := load(name, "runtime.json")) is not None]
    if len(packed) < len(names):
        return "| " + " | ".join([*cells, "", "", "", "", "", ""]) + " |"

    def share(part: str, whole: str) -> str:
        return f"{sum(p[part] for p in packed):,} of {sum(p[whole] for p in packed):,}"

    cells += [
        spread([p["runtime"]["top1"] for p in packed]),
        share("other_class", "classes_compared"),
        share("other_class_than_reference", "classes_compared_with_reference"),
        f"{mean([p['bytes'] for p in packed]):,.0f}",
        *faster(packed),
    ]
    return "| " + " | ".join(cells) + " |"


def faster(packed: list[dict[str, Any]]) -> list[str]:
    """Return the cells of speed, mean ratios on 1 and 2 threads, empty for what is not timed."""
    ratios = [[p[f"speed_{n}"]["ratio"] for p in packed if f"speed_{n}" in p] for n in (1, 2)]
    return [f"{mean(values):.1f}" if values else "" for values in ratios]


HEADER = (
    "| case | top-1 | NZR % | bits per weight | in the runtime | other class than PyTorch"
    " | than the reference | bytes | times as fast as PyTorch, 1 thread | 2 threads |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def tables() -> dict[str, str]:
    """Return the tables by name."""
    cases = {
        "bits": [
            (f"W{bits}A{activation_bits} + 15 %", seeds(f"w{bits}a{activation_bits}"))
            for bits in (5, 4, 3)
            for activation_bits in (8, 5)
        ],
        "ratios": [
            (f"W4A8 + {ratio} %", seeds("w4a8" + ("" if ratio == 15 else f"-{ratio}")))
            for ratio in (0, 5, 15, 30, 100)
        ],
        "methods": [
            (f"W{bits}A5, {label}", seeds(f"w{bits}a5{suffix}"))
            for bits in (4, 3)
            for suffix, label in METHODS.items()
        ],
        "longer": [
            (f"{case.upper()} + 15 %, {epochs} epochs", [f"longer/{case}-{epochs}"])
            for case, epochs in LONGER
        ],
        "figures": [
            (f"W{bits}A{bits}, {label}", [f"figure/w{bits}a{bits}{suffix}"])
            for bits in (5, 4)
            for suffix, label in (
                ("", "select, 15 %"),
                ("-tile", "select per tile, 15 %"),
                ("-without", "without select"),
            )
        ],
    }
    found = {}
    for name, rows in cases.items():
        lines = [line for label, runs in rows if (line := row(label, runs)) is not None]
        found[name] = HEADER + "\n".join(lines) + "\n" if lines else "Not run yet.\n"
    found["camvid"] = table_of_pictures(
        "camvid", {"miou": ("mIoU %", 100), "pixels": ("pixels %", 100)}
    )
    found["low-light"] = table_of_pictures(
        "low-light", {"psnr": ("PSNR dB", 1), "ssim": ("SSIM %", 100)}
    )
    found["claims"] = table_of_claims()
    found["time"] = table_of_time()
    return found


def table_of_claims() -> str:
    """Return the table of targets and what was measured, in points of each measure."""
    select, w4 = "with select above without", "W4A8 + 15 % below float"
    claims: list[tuple[str, str, list[tuple[str, str]]]] = []  # with the runs that are compared
    for case, target in (("w4a8", "at most 0.2"), ("w4a5", "at most 0.5"), ("w3a5", "at most 1.0")):
        longer = [[f"longer/{case}-{epochs}"] for name, epochs in LONGER if name == case]
        for runs in (seeds(case), *longer):
            label = f"{case.upper()} + 15 % below float, top-1"
            claims.append((label, target, [("cifar10-float", run) for run in runs]))
    for bits in (5, 4):
        run, name = f"figure/w{bits}a{bits}", f"W{bits}A{bits}"
        tile = f"{name}, per tile below per element, top-1"
        claims.append((f"{name}, {select}, top-1", "at least 0.5", [(run, f"{run}-without")]))
        claims.append((tile, "at most 1.0", [(run, f"{run}-tile")]))
    for case in ("w4a5", "w3a5"):
        pairs = list(zip(seeds(case), seeds(f"{case}-without_select"), strict=True))
        claims.append((f"{case.upper()}, {select}, top-1", "at least 0.5", pairs))
    claims += [
        (f"CamVid, {w4}, mIoU", "at most 1.0", [("camvid-float", "camvid/w4a8")]),
        (f"low light, {w4}, dB", "at most 0.3", [("low-light-float", "low-light/w4a8")]),
    ]
    lines = ["| | target | measured | epochs | runs | NZR % |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for label, target, names in claims:
        loaded = [[load(name, "summary.json") for name in pair] for pair in names]
        found = [(above, below) for above, below in loaded if above and below]
        if not found:
            continue
        (measure, factor), *_ = (
            (m, by) for m, by in (("top1", 100), ("miou", 100), ("psnr", 1)) if m in found[0][0]
        )
        difference = spread([above[measure] - below[measure] for above, below in found], factor)
        sides = [side for side in zip(*found, strict=True) if "nzr" in side[0]]
        nzr = " and ".join(f"{100 * mean([s['nzr'] for s in side]):.1f}" for side in sides)
        epochs = found[0][1]["epochs"]
        lines.append(f"| {label} | {target} | {difference} | {epochs} | {len(found)} | {nzr} |")
    return "\n".join(lines) + "\n"


def table_of_time() -> str:
    """Return the table of how long the runs took, by group."""
    seconds: dict[tuple[str, str], list[int]] = {}
    for path in sorted(LOGS.rglob("summary.json")):
        summary = json.loads(path.read_text())
        group = path.relative_to(LOGS).parts[0]
        seconds.setdefault((group, summary["machine"]), []).append(summary["training_seconds"])
    lines = ["| runs | number | hours of training | each on |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{group}` | {len(values)} | {sum(values) / 3600:.1f} | {machine} |"
        for (group, machine), values in seconds.items()
    ]
    return "\n".join(lines) + "\n"


PICTURES = {"float": "-float", "W4A8 + 15 %": "/w4a8", "W3A8 + 15 %": "/w3a8"}


def table_of_pictures(task: str, measures: dict[str, tuple[str, float]]) -> str:
    """Return the table of segmentation or low light."""
    names = [name for name, _ in measures.values()]
    head = ["case", *names, "NZR %", *(f"{name}, runtime" for name in names)]
    head += ["codes within one %", "PyTorch in float64 %", "furthest from the reference", "bytes"]
    head += ["times as fast as PyTorch, 1 thread", "2 threads"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for label, suffix in PICTURES.items():
        summary, packed = load(task + suffix, "summary.json"), load(task + suffix, "runtime.json")
        if summary is None:
            continue
        cells = [label, *(spread([summary[key]], by) for key, (_, by) in measures.items())]
        cells.append(f"{100 * summary['nzr']:.2f}" if "nzr" in summary else "")
        if packed is None:
            cells += [""] * (len(head) - len(cells))
        else:
            cells += [spread([packed["runtime"][key]], by) for key, (_, by) in measures.items()]
            agreement = (packed.get(f"codes_within_one{of}") for of in ("", "_of_float64"))
            cells += ["" if share is None else f"{100 * share:.2f}" for share in agreement]
            cells += [f"{packed['furthest_from_reference']:g}", f"{packed['bytes']:,}"]
            cells += faster([packed])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "Not run yet.\n"


def main() -> None:
    """Make all figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archive", type=Path, metavar="RUNS")
    options = parser.parse_args()
    if options.archive:
        archive(options.archive)
    pyplot.rcParams["svg.hashsalt"] = "logshift"  # the same names in every run
    figure(
        LOGS / "select.svg",
        lambda bits: {
            "with select, 15 %": f"figure/w{bits}a{bits}",
            "without select": f"figure/w{bits}a{bits}-without",
        },
    )
    figure(
        LOGS / "tile.svg",
        lambda bits: {
            "per element": f"figure/w{bits}a{bits}",
            "per tile of 16": f"figure/w{bits}a{bits}-tile",
        },
    )
    for task, labels in (("camvid", CamVid.labels), ("low-light", ())):
        folders = {label: LOGS / f"{task}{suffix}" for label, suffix in PICTURES.items()}
        there = {k: f for k, f in folders.items() if (f / training_panels.PANELS).exists()}
        if there:
            training_panels.draw(LOGS / f"{task}.jpg", there, labels)
    text = PAGE.read_text()
    for name, table in tables().items():
        begin = text.index(mark := f"<!-- {name} -->\n") + len(mark)
        end = text.index("<!-- end -->", begin)
        text = f"{text[:begin]}\n{table}\n{text[end:]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
