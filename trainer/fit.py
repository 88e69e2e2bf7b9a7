"""A training run from settings to an ONNX file, through Lightning Fabric."""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from logshift.trainer import quantize
from logshift.trainer.config import Config
from logshift.trainer.data import DataSet
from logshift.trainer.export import export_onnx, report
from logshift.trainer.log import Log
from logshift.trainer.models import MODELS, load_weights
from logshift.trainer.settings import Settings, Training
from logshift.trainer.tasks import TASKS, Task
from logshift.trainer.weights import FadingQuantizer

CHECKPOINT = "checkpoint.pt"
FADED = 0.6  # the part of a run in which second words fade, so that weights have the rest to settle


class RunError(ValueError):
    """A run that cannot be started or gone on with as it was asked for."""


def build(settings: Settings, data: DataSet) -> nn.Module:
    """Return the network of a run before training, not calibrated.

    Parameters
    ----------
    settings : Settings
    data : DataSet

    Raises
    ------
    RunError
        If there is no such model, or it does not take these options.
    ModelError
        If weights do not fit it.
    PrepareError
        If it cannot be quantized as asked.
    """
    if settings.model not in MODELS:
        raise RunError(f"model {settings.model!r} is none of {', '.join(MODELS)}")
    options = dict(settings.model_options)
    if data.labels:
        options["classes"] = len(data.labels)
    try:
        model = MODELS[settings.model](**options)
    except (TypeError, ValueError) as error:
        raise RunError(f"model_options of {settings.model}: {error}") from error
    if settings.weights is not None:
        load_weights(model, settings.weights, part=settings.weights_part)
    if settings.quantization is not None:
        model = quantize.prepare(model, settings.quantization)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit(settings: Settings, data: DataSet, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train, write checkpoints and logs, and export the network.

    Parameters
    ----------
    settings : Settings
    data : DataSet
    out : Path
        Folder for `settings.json`, logs, `checkpoint.pt`, `model.onnx` and `summary.json`.
    resume : bool
        Go on from the checkpoint there, if there is one.

    Returns
    -------
    dict
        What `summary.json` holds.

    Raises
    ------
    RunError
        If `out` holds a run and `resume` is false, or one with other settings or a checkpoint that
        cannot be read; if batches cannot be made; if the loss is no number.
    """
    training = settings.training
    fabric = _launch(training)
    going_on = fabric.broadcast((out / CHECKPOINT).exists())  # all see one folder, at one time
    if going_on and not resume:
        raise RunError(f"{out} holds a run: go on with --resume, or choose another folder")
    steps = data.steps(training.batch)
    if not steps:
        raise RunError(f"training.batch is {training.batch}; there are {data.size} examples")
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(settings, data, out, fabric, going_on)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=run.console) as progress:
        bar = progress.add_task("training", total=training.epochs * steps)
        progress.update(bar, completed=run.state["iteration"])
        while run.state["epoch"] < training.epochs:
            for values in run.epoch(steps):
                learnt = f"{run.task.learning} {values[run.task.learning]:.3f}"
                progress.update(bar, advance=1, description=learnt, refresh=False)
                if run.state["iteration"] % training.checkpoint_every == 0:
                    run.save()
            done = run.state["epoch"]
            if done % training.measure_every == 0 or done == training.epochs:
                run.measure()
            run.save()
    return run.finish()


def _launch(training: Training) -> Fabric:
    """Start the processes of a run, if it has more than this one."""
    parts = training.accumulate * training.devices * training.nodes
    if training.batch % parts:
        raise RunError(
            f"training.batch is {training.batch}; it must be a multiple of accumulate * devices * "
            f"nodes, {parts}"
        )
    try:
        fabric = Fabric(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.nodes,
            precision=training.precision,
        )
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"training.accelerator {training.accelerator!r} with {training.devices} devices and "
            f"precision {training.precision}: {error}"
        ) from error
    if training.threads:
        torch.set_num_threads(training.threads)
    return fabric


class _Run:
    """A run in one process: the network, what trains it, and how far it is."""

    def __init__(
        self, settings: Settings, data: DataSet, out: Path, fabric: Fabric, going_on: bool
    ) -> None:
        training = settings.training
        self.settings, self.data, self.out, self.fabric = settings, data, out, fabric
        self.writes = fabric.global_rank == 0  # one process for all
        self.console = Console(quiet=not self.writes, stderr=True)
        self.state: dict[str, Any] = {"iteration": 0, "epoch": 0, "seconds": 0.0, "measured": {}}
        torch.manual_seed(training.seed)
        weights = None
        if training.balance_classes:
            weights = (1 / torch.log(1.02 + data.class_shares())).float().to(fabric.device)
        self.task = TASKS[settings.task](len(data.labels), training.label_smoothing, weights)
        self.network = build(settings, data)
        quantization = settings.quantization
        if quantization is not None and not going_on:
            if settings.weights is None:
                warnings.warn(
                    f"{settings.model} is quantized before it was trained: what has second words "
                    "is chosen by random weights. Give those of a float network as weights.",
                    stacklevel=3,
                )
            if quantization.activation_bits != 32:
                inputs = data.calibration(training.calibration)
                quantize.calibrate(self.network, inputs.split(min(training.batch, 64)))
        self.network = self.network.to(fabric.device)
        steps = training.epochs * data.steps(training.batch)
        optimisers = make_optimisers(self.network, training, quantization, steps)
        self.highest = [optimiser.defaults["lr"] for optimiser in optimisers]
        if going_on:
            self._load(optimisers)
        elif self.writes:
            (out / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n")
        self.model: Any
        self.optimisers: list[Any]
        self.model, *self.optimisers = fabric.setup(self.network, *optimisers)
        reached = self.state["iteration"], self.state["epoch"]
        self.log = Log(out, *reached) if self.writes else None

    def _load(self, optimisers: list[torch.optim.Optimizer]) -> None:
        """Go on from the checkpoint of a run with the same settings."""
        checkpoint = self.out / CHECKPOINT
        try:
            saved = torch.load(checkpoint, map_location=self.fabric.device, weights_only=True)
        except Exception as error:  # of many kinds
            raise RunError(f"{checkpoint} cannot be read: {error}; remove it") from error
        try:
            known = Settings.model_validate_json(saved["settings"])  # an older one lacks some
        except ValidationError as error:
            raise RunError(
                f"{checkpoint} is of another version of logshift-trainer, with other settings: "
                "remove it"
            ) from error
        if others := _differences(_comparable(known), _comparable(self.settings)):
            raise RunError(
                f"{checkpoint} is of a run with other settings ({', '.join(others)}); choose "
                f"another folder, or the settings in {self.out / 'settings.json'}"
            )
        try:
            self.network.load_state_dict(saved["network"])
        except RuntimeError as error:
            raise RunError(
                f"{checkpoint} is of another version of logshift-trainer, with other networks:"
                " remove it"
            ) from error
        states = saved["optimisers"] if "optimisers" in saved else [saved["optimiser"]]  # of 0.1
        for optimiser, state in zip(optimisers, states, strict=True):
            optimiser.load_state_dict(state)
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        self.state = saved["state"]
        self.console.print(f"going on from step {self.state['iteration']}")

    def save(self) -> None:
        """Write the checkpoint that `_load` reads."""
        if not self.writes:
            return
        checkpoint = self.out / CHECKPOINT
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "settings": self.settings.model_dump_json(exclude={"weights"}),
                "network": self.network.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "precision": self.fabric.strategy.precision.state_dict(),
                "state": self.state,
            },
            partial,
        )
        partial.replace(checkpoint)

    def epoch(self, steps: int) -> Iterator[dict[str, float]]:
        """Make the steps that are left of an epoch; yields what is logged of each."""
        training, state, fabric = self.settings.training, self.state, self.fabric
        quantization = self.settings.quantization
        set_training(self.model, training)
        begin = state["iteration"] - state["epoch"] * steps
        batches = self.data.train(
            state["epoch"],
            training.batch // training.accumulate,
            training.seed,
            fabric.global_rank,
            fabric.world_size,
            begin * training.accumulate,
        )
        for _ in range(begin, steps):
            started = time.perf_counter()
            iteration = state["iteration"]
            # Random numbers inside the network are those of an uninterrupted run.
            torch.manual_seed(training.seed * 1_000_003 + iteration * 101 + fabric.global_rank)
            lr = learning_rate(iteration / (training.epochs * steps), training)
            for optimiser, highest in zip(self.optimisers, self.highest, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = lr * highest / training.lr
            if quantization is not None and iteration % quantization.refresh == 0:
                quantize.refresh(self.network)
            values = self._step(batches)
            state["iteration"] += 1
            state["seconds"] += time.perf_counter() - started
            if not math.isfinite(values["loss"]):
                raise RunError(
                    f"the loss is {values['loss']} at step {iteration + 1}: lower training.lr"
                )
            if self.log:
                self.log.add("iteration", iteration + 1, values | {"lr": lr}, iteration + 1)
            yield values
        state["epoch"] += 1
        if state["epoch"] == training.epochs:
            quantize.cut(self.network)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Make one step of the optimiser; returns what is logged of it, means over all devices."""
        fabric, task, quantization = self.fabric, self.task, self.settings.quantization
        parts = self.settings.training.accumulate
        total = {"loss": 0.0, task.learning: 0.0}
        if quantization is not None:
            total |= {"regulariser": 0.0, "nzr": 0.0}
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        for part in range(parts):
            x, target = (fabric.to_device(t) for t in next(batches))
            with fabric.no_backward_sync(self.model, enabled=part < parts - 1):
                output = self.model(x)
                loss = task.loss(output, target)
                total["loss"] += float(loss.detach()) / parts
                total[task.learning] += float(task.measure(output.detach(), target)) / parts
                if quantization is not None:
                    pull = quantize.regulariser(self.network)
                    loss = loss + quantization.regularisation * pull
                    total["regulariser"] += float(pull.detach()) / parts
                    total["nzr"] += quantize.non_zero_ratio(self.network) / parts
                fabric.backward(loss / parts)
        step_all(self.optimisers, getattr(fabric.strategy.precision, "scaler", None))
        if quantization is not None:
            quantize.fade(self.network)
        if fabric.world_size > 1:
            means: Any = fabric.all_reduce(torch.tensor(list(total.values())), reduce_op="mean")
            total = dict(zip(total, means.tolist(), strict=True))
        return total | _distribution(quantize.fading(self.network))

    def measure(self) -> None:
        """Measure the network after an epoch, and say so."""
        state, training = self.state, self.settings.training
        if self.fabric.world_size > 1:  # batch norms have seen other examples on each
            cpu = {name: value.cpu() for name, value in self.network.state_dict().items()}
            self.network.load_state_dict(self.fabric.broadcast(cpu))
        measured = evaluate(self.fabric, self.network, self.data, self.task, training.batch)
        state["measured"] = measured
        if self.log:
            values = measured | {"seconds": state["seconds"]}
            self.log.add("epoch", state["epoch"], values, state["iteration"])
        shown = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.console.print(f"epoch {state['epoch']}/{training.epochs}  {shown}")

    def finish(self) -> dict[str, Any]:
        """Export the network; returns the summary of the run, which is written too."""
        if self.log:
            self.log.close()
        device = self.fabric.device.type
        summary = {
            **self.state["measured"],
            "epochs": self.settings.training.epochs,
            "iterations": self.state["iteration"],
            "training_seconds": round(self.state["seconds"]),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
            **report(self.network),
        }
        if self.writes:
            self.network.cpu().eval()
            export_onnx(
                self.network,
                self.out / "model.onnx",
                torch.zeros(1, *self.data.shape),
                labels=self.data.labels,
                preprocessing=self.data.preprocessing,
            )
            (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


@torch.no_grad()
def evaluate(
    fabric: Fabric, network: nn.Module, data: DataSet, task: Task, batch: int
) -> dict[str, float]:
    """Measure a network on the test set, in float32 whatever precision it is trained in.

    Parameters
    ----------
    fabric : Fabric
    network : nn.Module
        Not the one that Fabric has set up, which rounds as in training.
    data : DataSet
    task : Task
    batch : int
        Examples at a time, at most.

    Returns
    -------
    dict of float
        Measures by name.
    """
    network.eval()
    metrics = task.metrics().to(fabric.device)
    for x, target in data.test(batch, fabric.global_rank, fabric.world_size):
        metrics.update(network(fabric.to_device(x)), fabric.to_device(target))
    return {name: float(value) for name, value in metrics.compute().items()}


def set_training(model: nn.Module, training: Training) -> None:
    """Put a network into training mode, but for batch norms that are frozen."""
    model.train()
    if training.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def parameter_groups(
    network: nn.Module, weight_decay: float = 0.0
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Return what an optimiser is made of, and v apart.

    Parameters
    ----------
    network : nn.Module
        From `prepare`, or a float one.
    weight_decay : float
        Of weights; alpha, scales, biases and normalisation do not decay.

    Returns
    -------
    groups : list of dict
        All parameters but v, for an optimiser.
    v : list of Parameter
        For plain SGD without momentum, see `fading_rate`; empty but for method "stlq".
    """
    weights: list[Tensor] = []
    others: list[Tensor] = []
    v = [m.v for m in network.modules() if isinstance(m, FadingQuantizer)]
    apart = {id(parameter) for parameter in v}
    for name, parameter in network.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(".alpha")
        if id(parameter) not in apart:
            (weights if decays else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return groups, v


def fading_rate(strength: float, factors: Sequence[float]) -> float:
    """Return the highest learning rate of v with which it fades by itself in 60 % of a run.

    Steps of SGD take 2 lambda lr of v, so that it falls exponentially: from 1 to epsilon when these
    sum up to ln(1 / epsilon). The rate of the weights would not do: recipes have from 1e-5 to 0.05,
    and runs from a thousand steps to a million.

    Parameters
    ----------
    strength : float
        lambda, positive.
    factors : sequence of float
        The learning rate of each step of the run over the highest one.

    Returns
    -------
    float

    Raises
    ------
    RunError
        If lambda or the sum of the factors is not positive.
    """
    ahead = sum(factors[: math.ceil(FADED * len(factors))])
    if not (strength > 0 and ahead > 0):
        raise RunError(f"lambda is {strength} and {len(factors)} steps: nothing would fade in them")
    return -math.log(FadingQuantizer.EPSILON) / (2 * strength * ahead)


def make_optimisers(
    network: nn.Module, training: Training, quantization: Config | None, steps: int
) -> list[torch.optim.Optimizer]:
    """Return the optimiser for a run, and that of v if there is one.

    Parameters
    ----------
    network : nn.Module
    training : Training
    quantization : Config, optional
    steps : int
        Of the whole run.

    Returns
    -------
    list of Optimizer
    """
    groups, v = parameter_groups(network, training.weight_decay)
    optimisers: list[torch.optim.Optimizer] = []
    if training.optimiser == "adam":
        optimisers.append(torch.optim.Adam(groups, lr=training.lr))
    else:
        nesterov = training.nesterov and training.momentum > 0
        optimisers.append(
            torch.optim.SGD(groups, training.lr, training.momentum, nesterov=nesterov)
        )
    if v:
        assert quantization is not None
        factors = [learning_rate(step / steps, training) / training.lr for step in range(steps)]
        strength = quantization.regularisation
        if quantization.method == "without_select":
            strength = Config().regularisation  # at a rate that followed it lambda would do nothing
        optimisers.append(torch.optim.SGD(v, quantization.v_lr or fading_rate(strength, factors)))
    return optimisers


def step_all(optimisers: list[Any], scaler: torch.amp.GradScaler | None) -> None:
    """Make a step of all optimisers, by gradients of one scale.

    Fabric would let each of them change the scale before the next one has been served.

    Parameters
    ----------
    optimisers : list
        As Fabric has set them up.
    scaler : GradScaler, optional
        Of training in float16.
    """
    for optimiser in optimisers:
        if scaler is None:
            optimiser.step()
        else:
            scaler.step(optimiser.optimizer)
    if scaler is not None:
        scaler.update()


def _distribution(v: Tensor) -> dict[str, float]:
    """Return what is logged of v, of 4,096 elements at most: mean and quantiles."""
    if not len(v):
        return {}
    v = v[:: -(-len(v) // 4096)]
    percents = [5, 25, 50, 75, 95]
    quantiles = v.quantile(torch.tensor(percents, device=v.device) / 100).tolist()
    names = [f"v_{percent}" for percent in percents]
    return {"v_mean": float(v.mean())} | dict(zip(names, quantiles, strict=True))


def learning_rate(done: float, training: Training) -> float:
    """Return the rate after a part `done` of the run: a line up, then down by the schedule."""
    if done < training.warmup:
        return training.lr * (done / training.warmup * 0.99 + 0.01)
    falling = (done - training.warmup) / (1 - training.warmup)
    if training.schedule == "poly":
        return training.lr * (1 - falling) ** 0.9
    return training.lr * 0.5 * (1 + math.cos(math.pi * falling))


def _comparable(settings: Settings) -> dict[str, Any]:
    """Return what must be the same for a run to go on: not threads, not where the weights were."""
    training = {
        "threads",
        "checkpoint_every",
        "measure_every",
        "accelerator",
        "devices",
        "nodes",
        "accumulate",
    }
    values = settings.model_dump(exclude={"weights": True, "training": training})
    quantization = settings.quantization
    if quantization is not None and quantization.granularity != "tile":
        del values["quantization"]["tile"]  # whose default was another one
    return values


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the names of settings that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    keys = dict.fromkeys([*one, *other])
    parts = (_differences(one.get(k), other.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
    return [found for part in parts for found in part]
