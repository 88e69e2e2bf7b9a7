"""What became of trained networks in the runtime: accuracy, agreement with PyTorch, speed.

    python -m benchmarks.training_runtime --data DIRECTORY --runs runs

Every finished run of `benchmarks.training_runs` whose weights a packed file can hold gets
`model.stlq` and `runtime.json`, unless it has them already: the test set goes through PyTorch's
quantized network and through the runtime, the first part of it also through
`logshift.trainer.reference`. Runs for segmentation and low light also get the pictures of a few
test examples, float ones through PyTorch. Then those of the first seed are timed, which wants a
machine that does nothing else: the runtime against the float network in PyTorch, frozen and
optimised, in turns, batch 1.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.utils import parametrize

from benchmarks import training_panels
from benchmarks.machine import describe
from benchmarks.training_runs import SEEDS, data_of
from logshift import converter, runtime
from logshift.runtime.cost import cost
from logshift.trainer.activations import ActivationQuantizer
from logshift.trainer.data import DataSet, open_data
from logshift.trainer.fit import build
from logshift.trainer.reference import reference
from logshift.trainer.settings import Settings
from logshift.trainer.tasks import TASKS

CALIBRATION = 64
CODES = {"classification": 200, "segmentation": 16, "enhancement": 16}  # examples compared so
EXACT = {"classification": 2000, "segmentation": 16, "enhancement": 16}  # float64 takes long
SHOWN = {"camvid": (30, 110, 200), "low_light": (2, 41, 77)}  # test examples, chosen blindly
UNPACKABLE = ("apot", "uniform")
ROUNDS, SECONDS = 15, 0.1

console = Console()


def opened(folder: Path, root: Path) -> tuple[Settings, DataSet]:
    """Return settings and data set of a run."""
    settings = Settings.model_validate_json((folder / "settings.json").read_text())
    data = opened_data(settings.data, root, json.dumps(settings.data_options))
    return settings.model_copy(update={"weights": None}), data


@lru_cache(maxsize=1)  # runs of one data set follow each other, and pictures take long to read
def opened_data(name: str, root: Path, options: str) -> DataSet:
    """Return a data set, its options being JSON."""
    return open_data(name, data_of(name, root), json.loads(options))


def trained(folder: Path, settings: Settings, data: DataSet) -> torch.nn.Module:
    """Return the network that a run has trained."""
    network = build(settings, data)
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    network.load_state_dict(state["network"])
    return network.eval()


def measure(folder: Path, root: Path) -> dict[str, Any]:
    """Convert the network of a run and compare; returns what `runtime.json` holds at first."""
    settings, data = opened(folder, root)
    packed = folder / "model.stlq"
    report = converter.convert(
        folder / "model.onnx", packed, calibration=data.calibration(CALIBRATION).numpy()
    )
    session = runtime.load(packed)
    result = {
        "bytes": report.file_bytes,
        "bits_per_weight": report.bits_per_weight,
        "cycle_ratio": cost(session.graph).to_dict()["cycle_ratio"],  # tiles of 16x16
        **compare(
            trained(folder, settings, data),
            in_float64(trained(folder, settings, data)),
            session,
            data,
            settings,
        ),
    }
    if settings.data in SHOWN:
        training_panels.save(folder, data, SHOWN[settings.data], session.run)
    return result


def in_float64(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network with what lies between its quantizers in float64, for float64 inputs."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
        elif isinstance(module, ActivationQuantizer):
            module.register_forward_hook(lambda module, x, y: y.double())
    return network.double()


def speeds(folder: Path, root: Path) -> dict[str, Any]:
    """Time the packed network of a run on 1 and 2 threads; returns what is added to the result."""
    settings, data = opened(folder, root)
    plain = build(settings.model_copy(update={"quantization": None}), data).eval()
    return {f"speed_{n}": speed(plain, folder / "model.stlq", data.shape, n) for n in (1, 2)}


def show_float(folder: Path, root: Path) -> None:
    """Keep what a float run makes of the examples that are shown."""
    settings, data = opened(folder, root)
    network = trained(folder, settings, data)

    @torch.no_grad()
    def predict(x: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(x)).numpy()

    training_panels.save(folder, data, SHOWN[settings.data], predict)


@torch.no_grad()
def compare(
    network: torch.nn.Module,
    doubled: torch.nn.Module,
    session: runtime.Session,
    data: DataSet,
    settings: Settings,
) -> dict[str, Any]:
    """Run the test set through PyTorch and runtime; returns measures and how far they agree."""
    task = TASKS[settings.task](len(data.labels))
    here, there = task.metrics(), task.metrics()
    other = other_than_reference = total = 0
    furthest = 0.0
    within = within_float64 = total_codes = examples = exactly = 0
    batch = min(settings.training.batch, 50)
    exact = reference(network)
    for x, target in track(list(data.test(batch)), "test set", transient=True):
        ours = network(x)
        theirs = torch.from_numpy(session.run(x.contiguous().numpy()))
        here.update(ours, target)
        there.update(theirs, target)
        other += int((ours.argmax(1) != theirs.argmax(1)).sum())
        total += target.numel()
        if examples < EXACT[settings.task]:
            expected = exact(x.double()).float()
            furthest = max(furthest, float((expected - theirs).abs().max()))
            other_than_reference += int((expected.argmax(1) != theirs.argmax(1)).sum())
            exactly += target.numel()
        if examples < CODES[settings.task]:
            found = codes(network, x)
            within += near(found, packed_codes(session, x))
            within_float64 += near(found, codes(doubled, x.double()))
            total_codes += sum(code.size for _, code in found)
        examples += len(x)
    result: dict[str, Any] = {
        "pytorch": {name: float(value) for name, value in here.compute().items()},
        "runtime": {name: float(value) for name, value in there.compute().items()},
        "codes_within_one": within / total_codes,
        "codes_within_one_of_float64": within_float64 / total_codes,
        "furthest_from_reference": furthest,
    }
    if data.labels:
        result |= {
            "other_class": other,
            "other_class_than_reference": other_than_reference,
            "classes_compared": total,
            "classes_compared_with_reference": exactly,
        }
    return result


Codes = list[tuple[tuple[float, tuple[int, ...]], np.ndarray]]  # with scale and shape as keys


@torch.no_grad()
def codes(network: torch.nn.Module, x: torch.Tensor) -> Codes:
    """Return the codes of all activations that a network in PyTorch quantizes."""
    found: Codes = []

    def look(module: Any, _: Any, y: torch.Tensor) -> None:
        code = torch.round(y / module.scale) + module.zero_point
        found.append(((float(module.scale), tuple(code.shape)), code.numpy()))

    quantizers = [m for m in network.modules() if isinstance(m, ActivationQuantizer)]
    hooks = [m.register_forward_hook(look) for m in quantizers]
    network(x)
    for hook in hooks:
        hook.remove()
    return found


def packed_codes(session: runtime.Session, x: torch.Tensor) -> Codes:
    """Return the codes of all tensors in the runtime."""
    traced = session.trace_codes(x.contiguous().numpy())
    scales = {tensor: q.scale for tensor, q in session.graph.quantization.items()}
    return [((scales[t], a.shape), a) for t, a in traced.items() if t in scales]


def near(found: Codes, others: Codes) -> int:
    """Return how many codes are at most one apart, of those tensors with equal keys agree best."""

    def best(key: Any, code: np.ndarray) -> int:
        return max(int((abs(code - other) <= 1).sum()) for k, other in others if k == key)

    return sum(best(key, code) for key, code in found)


def speed(
    plain: torch.nn.Module, packed: Path, shape: tuple[int, ...], threads: int
) -> dict[str, float]:
    """Return PyTorch's time over the runtime's, in turns: median and 10th to 90th percentile."""
    torch.set_num_threads(threads)
    x = torch.randn(1, *shape)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(plain.to(memory_format=torch.contiguous_format), x)
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        session, array = runtime.load(packed, threads=threads), x.numpy()
        engines: list[Callable[[], Any]] = [lambda: frozen(x), lambda: session.run(array)]
        for engine in engines:
            turn(engine)
        times = np.array([[turn(engine) for engine in engines] for _ in range(ROUNDS)])
    low, middle, high = np.percentile(times[:, 0] / times[:, 1], [10, 50, 90])
    return {
        "ratio": float(middle),
        "ratio_low": float(low),
        "ratio_high": float(high),
        "milliseconds": float(np.median(times[:, 1]) * 1e3),
    }


def turn(engine: Callable[[], Any]) -> float:
    """Run an engine for a while; returns the median time of a run in seconds."""
    # The other engine's threads may still be spinning.
    time.sleep(0.03)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        engine()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write `runtime.json`."""
    (folder / "runtime.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure all runs that are finished and were not measured before."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    options = parser.parse_args()
    console.print(describe())
    timed = []
    for summary in sorted(options.runs.rglob("summary.json")):
        folder = summary.parent
        settings = Settings.model_validate_json((folder / "settings.json").read_text())
        if settings.quantization is None:
            if settings.data in SHOWN and not (folder / training_panels.PANELS).exists():
                show_float(folder, options.data)
        elif settings.quantization.method not in UNPACKABLE:
            if not (folder / "runtime.json").exists():
                result = measure(folder, options.data) | {"machine": describe()}
                write(folder, result)
                name = folder.relative_to(options.runs)
                console.print(name, result["pytorch"], result["runtime"])
            if settings.training.seed == SEEDS[0]:  # others have the same speed
                timed.append(folder)
    for folder in track(timed, "timing", console=console):
        result = json.loads((folder / "runtime.json").read_text())
        if "speed_1" not in result:
            write(folder, result | speeds(folder, options.data))


if __name__ == "__main__":
    main()
