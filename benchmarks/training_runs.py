"""The training runs behind docs/training.md: start those that are missing, go on with others.

    python -m benchmarks.training_runs --data DIRECTORY --out runs --jobs 2
    python -m benchmarks.training_runs --data DIRECTORY --out runs --jobs 2 --only 'table/*'

The directory holds cifar10-*.parquet, camvid-*.parquet, imagenet-sample-500.parquet and
resnet20-cifar10.safetensors, weights trained on the original pictures. Each run has a folder
with its settings, logs, checkpoint, model.onnx and summary.json; one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from logshift.trainer import settings

console = Console()


@dataclass(frozen=True)
class Run:
    """One run: recipe, changed settings, and the run whose weights it begins with."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    begins: str = ""


def _cifar(
    name: str, epochs: int, seed: int = 1, precision: str = "bf16-mixed", **quantization: Any
) -> Run:
    changes = [f"training.epochs={epochs}", f"training.seed={seed}"]
    changes += [f"training.precision={precision}"]
    changes += [f"quantization.{key}={value}" for key, value in quantization.items()]
    return Run(name, "resnet20-cifar10", tuple(changes), "cifar10-float")


# lambda that is to bring the non-zero ratio down to about 0.15 when nothing is selected, by bits
# and epochs, of the residual penalty. With 3 and 4 bits the ratio falls with lambda times the sum
# of learning rates. With 5 bits, whose steps are fine, it stays above 0.7 while the learning rate
# is high, then collapses: 0.012 ends at 0.85, 0.036 at 0.47.
PENALTY_WITHOUT_SELECT = {(3, 1): 0.008, (4, 1): 0.03, (4, 10): 0.0048, (5, 10): 0.036}
LONGER = (("w4a8", 3), ("w4a8", 10), ("w4a5", 3))  # cases and epochs
SEEDS = (1, 2, 3)
EPOCHS = 1  # of the tables of the published method
# The same search for the published method, at the rate of v that runs of ten epochs have by
# default: v must end at 0.13 with 4 bits and at 0.0013, next to epsilon, with 5.
WITHOUT_SELECT = {4: 2.7e-4, 5: 8.6e-4}
V_LR = {10: 1.97, EPOCHS: 19.7}
RATIOS = (0, 5, 10, 15, 50, 100)  # percent
LIGHT_RATIOS = (15, 35, 50, 100)
# Of CamVid's weights but those of depthwise layers, which are 3.9 % and may all have second words.
REST = {5: 0.011, 10: 0.063, 15: 0.115}
STRENGTHS = (0.01, 0.1, 10)  # lambda over the default one, which "methods" have
PENALTY = {"method": "residual_penalty"}
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait spin otherwise, and take other runs' cores
    # glibc keeps memory that is freed instead of getting large tensors from the kernel each time.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


def compared() -> dict[str, dict[str, Any]]:
    """Return the cases of the tables of one epoch: what each has in its quantization."""
    found: dict[str, dict[str, Any]] = {}
    for bits in (5, 4, 3):
        for activation_bits in (8, 5):
            found[f"w{bits}a{activation_bits}"] = PENALTY | {
                "weight_bits": bits,
                "activation_bits": activation_bits,
            }
    for percent in (0, 5, 30, 100):
        found[f"w4a8-{percent}"] = PENALTY | {"residual_ratio": percent / 100}
    for bits in (4, 3):
        for method in ("without_select", "log", "flightnn", "apot", "uniform"):
            case: dict[str, Any] = {"weight_bits": bits, "activation_bits": 5, "method": method}
            if method == "without_select":
                case |= {
                    "method": "residual_penalty_without_select",
                    "regularisation": PENALTY_WITHOUT_SELECT[bits, 1],
                }
            found[f"w{bits}a5-{method}"] = case
    return found


def published() -> dict[str, dict[str, Any]]:
    """Return the cases of the tables of `EPOCHS` epochs, by group and name."""
    found: dict[str, dict[str, Any]] = {}
    for activation_bits in (6, 3):
        words = {"weight_bits": 3, "activation_bits": activation_bits}
        for percent in RATIOS:
            found[f"ratio/w3a{activation_bits}-{percent}"] = words | {
                "residual_ratio": percent / 100
            }
    for bits, activation_bits in ((4, 8), (3, 6), (3, 3)):
        words = {"weight_bits": bits, "activation_bits": activation_bits, "residual_ratio": 0.05}
        for granularity in ("element", "tile", "filter"):
            if bits == 4 or granularity != "element":  # those are among the ratios
                name = f"blocks/w{bits}a{activation_bits}-{granularity}"
                found[name] = words | {"granularity": granularity}
    for bits, activation_bits in ((4, 4), (3, 5)):
        words = {"weight_bits": bits, "activation_bits": activation_bits}
        name = f"methods/w{bits}a{activation_bits}"
        found[f"{name}-stlq"] = words
        found[f"{name}-scale"] = words | {"scale": "layer"}
        found[f"{name}-residual_penalty"] = words | PENALTY
    for bits, method in ((3, "apot"), (4, "apot"), (3, "uniform")):
        words = {"weight_bits": bits, "activation_bits": 6}
        found[f"operations/w{bits}a6-{method}"] = words | {"method": method}
    return found


def cases() -> list[Run]:
    """Return all runs, those that others begin with first."""
    found = [Run("cifar10-float", "resnet20-cifar10-float", begins="resnet20-cifar10.safetensors")]
    for bits in (5, 4):
        words = {"weight_bits": bits, "activation_bits": bits}
        name = f"figure/w{bits}a{bits}"
        found += [
            _cifar(name, 10, **words),
            _cifar(
                f"{name}-without", 10, method="without_select", v_lr=V_LR[10],
                regularisation=WITHOUT_SELECT[bits], **words,
            ),
            _cifar(f"{name}-tile", 10, granularity="tile", **words),
        ]  # fmt: skip
        name = f"penalty/w{bits}a{bits}"
        without = PENALTY | {
            "method": "residual_penalty_without_select",
            "regularisation": PENALTY_WITHOUT_SELECT[bits, 10],
        }
        found += [
            _cifar(name, 10, **PENALTY, **words),
            _cifar(f"{name}-without", 10, **without, **words),
            _cifar(f"{name}-tile", 10, **PENALTY, granularity="tile", tile=16, **words),
        ]
    found.append(_cifar("figure/w4a8", 10))  # the recipe's settings
    found.append(_cifar("figure/w3a3", 10, weight_bits=3, activation_bits=3))
    for name, case in published().items():
        found += [_cifar(f"{name}/seed{seed}", EPOCHS, seed, **case) for seed in SEEDS]
    for factor in STRENGTHS:
        words = {"weight_bits": 4, "activation_bits": 4, "regularisation": 1e-3 * factor}
        found.append(_cifar(f"lambda/{factor}", EPOCHS, **words))
        found.append(_cifar(f"lambda/{factor}-rate-kept", EPOCHS, v_lr=V_LR[EPOCHS], **words))
    found.append(Run("light-float", "mobilenetv2-cifar10-float"))
    for percent in LIGHT_RATIOS:
        change = (f"quantization.residual_ratio={percent / 100}",)
        found.append(Run(f"light/w3a6-{percent}", "mobilenetv2-cifar10", change, "light-float"))
    for recipe, name in (("deeplab-camvid", "camvid"), ("sid-low-light", "low-light")):
        found.append(Run(f"{name}-float", f"{recipe}-float"))
        found.append(Run(f"{name}/recipe", recipe, (), f"{name}-float"))
        method = "quantization.method=residual_penalty"
        for bits in (4, 3):
            change = (f"quantization.weight_bits={bits}", method)
            found.append(Run(f"{name}/w{bits}a8", recipe, change, f"{name}-float"))
        for percent in (5, 10, 15):
            ratio = REST[percent] if name == "camvid" else percent / 100
            change = (
                "training.epochs=10",
                "quantization.weight_bits=3",
                "quantization.activation_bits=6",
                f"quantization.residual_ratio={ratio}",
            )
            found.append(Run(f"{name}/w3a6-{percent}", recipe, change, f"{name}-float"))
    for name, epochs in LONGER:
        run = f"longer/{name}-{epochs}"
        found.append(_cifar(run, epochs, precision="32-true", **compared()[name]))
    for seed in SEEDS:
        found += [
            _cifar(f"table/{name}/seed{seed}", 1, seed, **case) for name, case in compared().items()
        ]
    return found


def data_of(name: str, root: Path) -> Path:
    """Return where a data set is: photographs for low light are one file."""
    return root / "imagenet-sample-500.parquet" if name == "low_light" else root


def start(run: Run, data: Path, out: Path, threads: int) -> str:
    """Run the command for a run; returns what became of it."""
    folder = out / run.name
    wanted = settings.read(run.recipe, run.changes)
    if (folder / "summary.json").exists():
        done = settings.Settings.model_validate_json((folder / "settings.json").read_text())
        training = done.training.model_copy(update={"threads": wanted.training.threads})
        same = done.model_copy(update={"weights": wanted.weights, "training": training}) == wanted
        return "done before" if same else f"done before with other settings: remove {folder}"
    name = wanted.data
    weights = data / run.begins if "." in run.begins else out / run.begins / "checkpoint.pt"
    command = [sys.executable, "-m", "logshift.trainer.cli", run.recipe, "--resume"]
    command += ["--data", str(data_of(name, data)), "--out", str(folder)]
    if run.begins:
        command += ["--weights", str(weights)]
    for change in (*run.changes, f"training.threads={threads}"):
        command += ["--set", change]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ENVIRONMENT
    with (folder / "output.txt").open("w") as output:
        code = subprocess.call(command, stdout=output, stderr=output, env=environment)
    return "done" if code == 0 else f"failed, see {folder / 'output.txt'}"


def main() -> None:
    """Start all runs that match."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--only", default="*", help="pattern of names")
    options = parser.parse_args()
    chosen = [run for run in cases() if fnmatch.fnmatch(run.name, options.only)]

    def one(run: Run, before: Future | None) -> None:
        if before is not None:  # it is ahead in the queue
            before.result()
        console.print(f"{run.name}: {start(run, options.data, options.out, options.threads)}")

    started: dict[str, Future] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for run in chosen:
            started[run.name] = pool.submit(one, run, started.get(run.begins))


if __name__ == "__main__":
    main()
