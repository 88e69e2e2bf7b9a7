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
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

from benchmarks import training_panels  # noqa: E402
from benchmarks.training_runs import (  # noqa: E402
    LIGHT_RATIOS,
    LONGER,
    RATIOS,
    SEEDS,
    STRENGTHS,
)
from logshift.trainer.data.camvid import CamVid  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
LOGS = DOCS / "training"
PAGE = DOCS / "training.md"
TOGETHER = 20

METHODS = {
    "": "residual penalty, 15 %",
    "-without_select": "residual penalty, without select",
    "-flightnn": "per-filter selection (as FLightNN), 15 %",
    "-log": "plain log",
    "-apot": "APoT",
    "-uniform": "uniform (LSQ)",
}
SELECTED = {"": "select, 15 %", "-tile": "select per tile, 15 %", "-without": "without select"}
PICTURES = {"float": "-float", "W4A8 + 15 %": "/recipe"} | {
    f"W3A6 + {percent} %": f"/w3a6-{percent}" for percent in (15, 10, 5)
} | {
    f"residual penalty, W{bits}A8 + 15 %": f"/w{bits}a8" for bits in (4, 3)
}  # fmt: skip
COMPARED = {
    "stlq": "STLQ, 15 %",
    "scale": "STLQ, 15 %, one scale for a layer",
    "residual_penalty": "residual penalty, 15 %",
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
    """Return the runs of a case, such as "ratio/w3a6-5", that there may be."""
    return [f"{case}/seed{seed}" for seed in SEEDS]


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


def figure(path: Path, group: str, cases: dict[str, str]) -> None:
    """Draw a figure of one panel for 5 bits and one for 4, of those runs that are there.

    `cases` are suffixes of runs, by label.
    """
    panels = {}
    for bits in (5, 4):
        names = {label: f"{group}/w{bits}a{bits}{suffix}" for label, suffix in cases.items()}
        found = {label: n for label, n in names.items() if load(n, "summary.json")}
        if len(found) > 1:
            panels[bits] = found
    if not panels:
        return
    float_log = iterations("cifar10-float")["top1"][-20:]
    drawn, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (bits, found) in zip(axes[0], panels.items(), strict=True):
        curves(found, f"W{bits}A{bits}, ResNet-20, CIFAR-10", mean(float_log), axis)
    save(drawn, path)


def save(drawn: Any, path: Path) -> None:
    """Write a figure, the same for the same logs."""
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)


def fading(path: Path, name: str) -> None:
    """Draw the distribution of v and the non-zero ratio of a run against iterations."""
    if load(name, "summary.json") is None:
        return
    log = iterations(name)
    drawn, axis = pyplot.subplots(figsize=(6, 4))
    for low, high, alpha in (("v_5", "v_95", 0.2), ("v_25", "v_75", 0.4)):
        label = f"v, {low[2:]} to {high[2:]} % of it"
        axis.fill_between(
            log["iteration"], log[low], log[high], alpha=alpha, color="C0", label=label
        )
    axis.plot(log["iteration"], log["v_50"], color="C0", label="v, median")
    axis.plot(log["iteration"], log["nzr"], color="C1", linestyle=":", label="non-zero ratio")
    axis.set(xlabel="iteration", ylim=(0, None), title="How second words fade")
    axis.legend(fontsize="small")
    save(drawn, path)


def accuracy_against_operations(path: Path) -> None:
    """Draw accuracy against FixOPS of W3 with more and more second words, APoT and uniform."""
    drawn, axis = pyplot.subplots(figsize=(6, 4))
    lines = {
        "STLQ, W3A6, by share of second words": [f"ratio/w3a6-{percent}" for percent in RATIOS],
        "APoT, W3A6 and W4A6": ["operations/w3a6-apot", "operations/w4a6-apot"],
        "uniform, W3A6": ["operations/w3a6-uniform"],
    }
    for label, names in lines.items():
        points = []
        for name in names:
            found = [s for run in seeds(name) if (s := load(run, "summary.json")) is not None]
            if found:
                top1 = [100 * summary["top1"] for summary in found]
                deviation = stdev(top1) if len(top1) > 1 else 0.0
                points.append((operations(seeds(name)[0], found), mean(top1), deviation))
        if points:
            x, y, deviation = zip(*points, strict=True)
            axis.errorbar(x, y, deviation, marker="o", capsize=3, label=label)
    if not axis.lines:
        return
    axis.set(xlabel="FixOPS of a product, 1 being that of 8 by 8 bits", ylabel="top-1 %")
    axis.legend(fontsize="small")
    save(drawn, path)


def operations(name: str, summaries: list[dict[str, Any]]) -> float:
    """Return FixOPS of a multiplication, on average over the weights of a case.

    One is a product of 8 by 8 bits, 64 operations on bits (Li, Dong, Wang, 2020). A power of two
    times A bits is an addition of A bits; APoT with 4 bits adds two, with 3 bits it has one.
    """
    settings = load(name, "settings.json")
    assert settings is not None
    config = settings["quantization"]
    bits, activation_bits = config["weight_bits"], config["activation_bits"]
    if config["method"] == "uniform":
        return bits * activation_bits / 64
    words = 1 + mean([summary.get("nzr", 0.0) for summary in summaries])
    if config["method"] == "apot":
        words = {3: 1, 4: 2}[bits]
    return words * activation_bits / 64


def spread(values: list[float], factor: float = 100) -> str:
    """Return the mean times a factor, with the standard deviation if there are several values."""
    text = f"{factor * mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {factor * stdev(values):.2f}"


def row(label: str, names: list[str], cycles: bool = False) -> list[str] | None:
    """Return a row of a table of CIFAR-10 for those of a case's runs that are there, if any.

    `cycles`: with those of an array, which runs of the residual penalty were not measured for.
    """
    found = {name: summary for name in names if (summary := load(name, "summary.json")) is not None}
    if not found:
        return None
    names, summaries = list(found), list(found.values())
    cells = [label, spread([s["top1"] for s in summaries])]
    cells += [f"{100 * mean([s['nzr'] for s in summaries]):.2f}"]
    cells += [f"{mean([s['bits_per_weight'] for s in summaries]):.2f}"]
    packed = [p for name in names if (p := load(name, "runtime.json")) is not None]
    if len(packed) < len(names):
        return [*cells, *[""] * (6 + cycles)]

    def share(part: str, whole: str) -> str:
        return f"{sum(p[part] for p in packed):,} of {sum(p[whole] for p in packed):,}"

    cells += [
        spread([p["runtime"]["top1"] for p in packed]),
        share("other_class", "classes_compared"),
        share("other_class_than_reference", "classes_compared_with_reference"),
        f"{mean([p['bytes'] for p in packed]):,.0f}",
        *faster(packed),
    ]
    if cycles:
        cells.append(f"{mean([p['cycle_ratio'] for p in packed]):.2f}")
    return cells


def faster(packed: list[dict[str, Any]]) -> list[str]:
    """Return the cells of speed, mean ratios on 1 and 2 threads, empty for what is not timed."""
    ratios = [[p[f"speed_{n}"]["ratio"] for p in packed if f"speed_{n}" in p] for n in (1, 2)]
    return [f"{mean(values):.1f}" if values else "" for values in ratios]


HEADER = [
    "case", "top-1", "NZR %", "bits per weight", "in the runtime", "other class than PyTorch",
    "than the reference", "bytes", "times as fast as PyTorch, 1 thread", "2 threads",
]  # fmt: skip


def in_figures(group: str) -> list[tuple[str, list[str]]]:
    """Return the runs of a group that the figures show, by label."""
    return [
        (f"W{bits}A{bits}, {label}", [f"{group}/w{bits}a{bits}{suffix}"])
        for bits in (5, 4)
        for suffix, label in SELECTED.items()
    ]


def tables() -> dict[str, str]:
    """Return the tables by name."""
    wide = {"w3a6": "W3A6", "w3a3": "W3A3", "w4a8": "W4A8", "w4a4": "W4A4", "w3a5": "W3A5"}
    published = {
        "figures": [
            *in_figures("figure"),
            *((f"{case.upper()}, select, 15 %", [f"figure/{case}"]) for case in ("w4a8", "w3a3")),
        ],
        "ratio": [
            (f"{wide[case]} + {percent} %", seeds(f"ratio/{case}-{percent}"))
            for case in ("w3a6", "w3a3")
            for percent in RATIOS
        ],
        "blocks": [
            (
                f"{wide[case]} + 5 % of {kind}s",
                seeds(
                    f"ratio/{case}-5"
                    if kind == "element" and case != "w4a8"
                    else f"blocks/{case}-{kind}"
                ),
            )
            for case in ("w4a8", "w3a6", "w3a3")
            for kind in ("element", "tile", "filter")
        ],
        "compared": [
            (f"{wide[case]}, {label}", seeds(f"methods/{case}-{method}"))
            for case in ("w4a4", "w3a5")
            for method, label in COMPARED.items()
        ],
        "light": [(f"W3A6 + {percent} %", [f"light/w3a6-{percent}"]) for percent in LIGHT_RATIOS],
    }
    penalty = {
        "penalty-figures": in_figures("penalty"),
        "bits": [
            (f"W{bits}A{activation_bits} + 15 %", seeds(f"table/w{bits}a{activation_bits}"))
            for bits in (5, 4, 3)
            for activation_bits in (8, 5)
        ],
        "ratios": [
            (f"W4A8 + {ratio} %", seeds("table/w4a8" + ("" if ratio == 15 else f"-{ratio}")))
            for ratio in (0, 5, 15, 30, 100)
        ],
        "methods": [
            (f"W{bits}A5, {label}", seeds(f"table/w{bits}a5{suffix}"))
            for bits in (4, 3)
            for suffix, label in METHODS.items()
        ],
        "longer": [
            (f"{case.upper()} + 15 %, {epochs} epochs", [f"longer/{case}-{epochs}"])
            for case, epochs in LONGER
        ],
    }
    found = {}
    for group, cycles in ((published, True), (penalty, False)):
        head = [*HEADER, "cycles"] if cycles else HEADER
        for name, rows in group.items():
            found[name] = table(head, [cells for case in rows if (cells := row(*case, cycles))])
    found["lambda"] = table_of_strengths()
    found["camvid"] = table_of_pictures(
        "camvid", {"miou": ("mIoU %", 100), "pixels": ("pixels %", 100)}
    )
    found["low-light"] = table_of_pictures(
        "low-light", {"psnr": ("PSNR dB", 1), "ssim": ("SSIM %", 100)}
    )
    found["claims"] = table_of_claims()
    found["time"] = table_of_time()
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table with these rows, without columns in which all of them are empty."""
    if not rows:
        return "Not run yet.\n"
    used = [number for number in range(len(head)) if any(cells[number] for cells in rows)]
    lines = ["| " + " | ".join(cells[n] for n in used) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "| --- " * len(used) + "|", *lines[1:]]) + "\n"


def table_of_strengths() -> str:
    """Return the table of what lambda decides: with the rate of v that follows it, and without."""
    rows = []
    runs = {(factor, "follows lambda"): f"lambda/{factor}" for factor in STRENGTHS}
    runs[1, "follows lambda"] = "methods/w4a4-stlq/seed1"
    runs |= {(factor, "kept"): f"lambda/{factor}-rate-kept" for factor in STRENGTHS}
    for (factor, rate), name in sorted(runs.items(), key=lambda run: (run[0][1], run[0][0])):
        if (summary := load(name, "summary.json")) is None:
            continue
        log = iterations(name)
        cells = [f"{factor:g}", rate, f"{log['v_mean'][-1]:.3f}"]
        cells += [f"{100 * log['nzr'][-1]:.2f}", f"{100 * summary['nzr']:.2f}"]
        rows.append([*cells, f"{100 * summary['top1']:.2f}"])
    head = ["lambda over the default", "learning rate of v", "mean of v at the end", "NZR % then"]
    return table([*head, "NZR % once it is cut", "top-1"], rows)


def table_of_claims() -> str:
    """Return the table of targets and what was measured, in points of each measure."""
    select = "with select above without"
    claims: list[tuple[str, str, list[tuple[str, str]]]] = []  # with the runs that are compared
    for group, prefix in (("figure", ""), ("penalty", "residual penalty, ")):
        for bits in (5, 4):
            run, name = f"{group}/w{bits}a{bits}", f"{prefix}W{bits}A{bits}"
            tile = f"{name}, per tile below per element"
            claims.append((f"{name}, {select}", "at least 0.5", [(run, f"{run}-without")]))
            claims.append((tile, "at most 1.0", [(run, f"{run}-tile")]))
    for case, percent, target in (("w3a6", 5, "at most 0.5"), ("w3a3", 5, "-")):
        pairs = zip(seeds(f"ratio/{case}-100"), seeds(f"ratio/{case}-{percent}"), strict=True)
        claims.append((f"{case.upper()}, {percent} % below 100 %", target, list(pairs)))
    for runs in (seeds("ratio/w3a3-15"), ["figure/w3a3"]):
        pairs = [("cifar10-float", run) for run in runs]
        claims.append(("W3A3 + 15 % below float", "at most 1.5", pairs))
    for case in ("w4a4", "w3a5"):
        both = (seeds(f"methods/{case}-{method}") for method in ("stlq", "residual_penalty"))
        label = f"{case.upper()} + 15 %, published method above residual penalty"
        claims.append((label, "at least 0", list(zip(*both, strict=True))))
    for case, target in (("w4a8", "at most 0.2"), ("w4a5", "at most 0.5"), ("w3a5", "at most 1.0")):
        longer = [[f"longer/{case}-{epochs}"] for name, epochs in LONGER if name == case]
        for runs in (seeds(f"table/{case}"), *longer):
            label = f"residual penalty, {case.upper()} + 15 % below float"
            claims.append((label, target, [("cifar10-float", run) for run in runs]))
    for case in ("w4a5", "w3a5"):
        names = seeds(f"table/{case}"), seeds(f"table/{case}-without_select")
        label = f"residual penalty, {case.upper()}, {select}"
        claims.append((label, "at least 0.5", list(zip(*names, strict=True))))
    for task, unit, target in (("camvid", "mIoU", 1.0), ("low-light", "dB", 0.3)):
        for case, label in PICTURES.items():
            if case != "float":
                pair = (f"{task}-float", f"{task}{label}")
                wanted = f"at most {target}" if "A8" in case else "-"
                claims.append((f"{task}, {case} below float, {unit}", wanted, [pair]))
    rows = []
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
        epochs = str(found[0][1]["epochs"])
        rows.append([label, target, difference, epochs, str(len(found)), nzr])
    for label, runs in ratios_asked_for().items():
        summaries = [summary for run in runs if (summary := load(run, "summary.json"))]
        if not summaries:
            continue
        reached = [100 * summary["nzr"] for summary in summaries]
        furthest = f"{max(abs(nzr - 15) for nzr in reached):.2f}"
        nzr = " to ".join(sorted({f"{min(reached):.1f}", f"{max(reached):.1f}"}))
        epochs = str(summaries[0]["epochs"])
        label = f"{label} + 15 %, NZR furthest from that"
        rows.append([label, "at most 0.1", furthest, epochs, str(len(reached)), nzr])
    return table(["claim", "target", "measured", "epochs", "runs", "NZR %"], rows)


def ratios_asked_for() -> dict[str, list[str]]:
    """Return runs with 15 % of second words by label."""
    over_lambda = [f"lambda/{factor}{rate}" for factor in STRENGTHS for rate in ("", "-rate-kept")]
    return {
        "lambda 0.01 to 10 times the default, W4A4": [*over_lambda, *seeds("methods/w4a4-stlq")],
        **{case.upper(): [f"figure/{case}"] for case in ("w5a5", "w4a4", "w4a8")},
        "W3A6": seeds("ratio/w3a6-15"),
    }


def table_of_time() -> str:
    """Return the table of how long the runs took, by group."""
    seconds: dict[tuple[str, str], list[int]] = {}
    for path in sorted(LOGS.rglob("summary.json")):
        summary = json.loads(path.read_text())
        group = path.relative_to(LOGS).parts[0]
        seconds.setdefault((group, summary["machine"]), []).append(summary["training_seconds"])
    rows = [
        [f"`{group}`", str(len(values)), f"{sum(values) / 3600:.1f}", machine]
        for (group, machine), values in seconds.items()
    ]
    return table(["runs", "number", "hours of training", "each on"], rows)


def table_of_pictures(task: str, measures: dict[str, tuple[str, float]]) -> str:
    """Return the table of segmentation or low light."""
    names = [name for name, _ in measures.values()]
    head = ["case", *names, "NZR %", *(f"{name}, runtime" for name in names)]
    head += ["codes within one %", "PyTorch in float64 %", "furthest from the reference", "bytes"]
    head += ["times as fast as PyTorch, 1 thread", "2 threads"]
    rows = []
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
        rows.append(cells)
    return table(head, rows)


def main() -> None:
    """Make all figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archive", type=Path, metavar="RUNS")
    options = parser.parse_args()
    if options.archive:
        archive(options.archive)
    pyplot.rcParams["svg.hashsalt"] = "logshift"  # the same names in every run
    with_and_without = {"with select, 15 %": "", "without select": "-without"}
    figure(LOGS / "select.svg", "figure", with_and_without)
    figure(LOGS / "tile.svg", "figure", {"per element": "", "per tile of 16x16": "-tile"})
    figure(LOGS / "penalty-select.svg", "penalty", with_and_without)
    figure(LOGS / "penalty-tile.svg", "penalty", {"per element": "", "per run of 16": "-tile"})
    fading(LOGS / "fading.svg", "figure/w4a4")
    accuracy_against_operations(LOGS / "operations.svg")
    for task, labels in (("camvid", CamVid.labels), ("low-light", ())):
        folders = {label: LOGS / f"{task}{suffix}" for label, suffix in PICTURES.items()}
        there = {k: f for k, f in folders.items() if (f / training_panels.PANELS).exists()}
        if there:
            training_panels.draw(LOGS / f"{task}.jpg", there, labels)
    text = PAGE.read_text()
    for name, table in tables().items():
        if (mark := f"<!-- {name} -->\n") not in text:  # a section to come
            continue
        begin = text.index(mark) + len(mark)
        end = text.index("<!-- end -->", begin)
        text = f"{text[:begin]}\n{table}\n{text[end:]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
