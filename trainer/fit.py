"""A training run from settings to an ONNX file, through Lightning Fabric."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from logshift.trainer import quantize
from logshift.trainer.data import DataSet
from logshift.trainer.export import export_onnx, report
from logshift.trainer.log import Log
from logshift.trainer.models import MODELS, load_weights
from logshift.trainer.settings import Settings, Training
from logshift.trainer.tasks import TASKS, Task

CHECKPOINT = "checkpoint.pt"


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
    if training.batch % (training.accumulate * training.devices * training.nodes):
        raise RunError(
            f"training.batch is {training.batch}; it must be a multiple of accumulate * devices * "
            f"nodes, {training.accumulate * training.devices * training.nodes}"
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
    first = fabric.global_rank == 0
    console = Console(quiet=not first, stderr=True)
    checkpoint = out / CHECKPOINT
    going_on = fabric.broadcast(checkpoint.exists())  # all processes see one folder, at one time
    if going_on and not resume:
        raise RunError(f"{out} holds a run: go on with --resume, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(training.seed)
    weights = None
    if training.balance_classes:
        weights = (1 / torch.log(1.02 + data.class_shares())).float().to(fabric.device)
    task = TASKS[settings.task](len(data.labels), training.label_smoothing, weights)
    network = build(settings, data)
    quantization = settings.quantization
    state: dict[str, Any] = {"iteration": 0, "epoch": 0, "seconds": 0.0, "measured": {}}
    codes = quantization is not None and quantization.activation_bits != 32
    if codes and not going_on:
        inputs = data.calibration(training.calibration)
        quantize.calibrate(network, inputs.split(min(training.batch, 64)))
    network = network.to(fabric.device)
    optimiser = make_optimiser(network, training)
    if going_on:
        try:
            saved = torch.load(checkpoint, map_location=fabric.device, weights_only=True)
        except Exception as error:  # of many kinds
            raise RunError(f"{checkpoint} cannot be read: {error}; remove it") from error
        if saved["settings"] != _comparable(settings):
            raise RunError(
                f"{checkpoint} is of a run with other settings; choose another folder, or the "
                f"settings in {out / 'settings.json'}"
            )
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        fabric.strategy.precision.load_state_dict(saved["precision"])
        state = saved["state"]
        console.print(f"going on from step {state['iteration']}")
    elif first:
        (out / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n")
    model, optimiser = fabric.setup(network, optimiser)
    log = Log(out, state["iteration"], state["epoch"]) if first else None

    def save() -> None:
        if first:
            partial = checkpoint.with_suffix(".partial")
            torch.save(
                {
                    "settings": _comparable(settings),
                    "network": network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "precision": fabric.strategy.precision.state_dict(),
                    "state": state,
                },
                partial,
            )
            partial.replace(checkpoint)

    steps = data.steps(training.batch)
    if not steps:
        raise RunError(f"training.batch is {training.batch}; there are {data.size} examples")
    parts = training.accumulate
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=training.epochs * steps)
        progress.update(bar, completed=state["iteration"])
        while state["epoch"] < training.epochs:
            set_training(model, training)
            begin = state["iteration"] - state["epoch"] * steps
            batches = data.train(
                state["epoch"],
                training.batch // parts,
                training.seed,
                fabric.global_rank,
                fabric.world_size,
                begin * parts,
            )
            for _ in range(begin, steps):
                started = time.perf_counter()
                iteration = state["iteration"]
                # Random numbers inside the network are those of an uninterrupted run.
                torch.manual_seed(training.seed * 1_000_003 + iteration * 101 + fabric.global_rank)
                lr = learning_rate(iteration / (training.epochs * steps), training)
                for group in optimiser.param_groups:
                    group["lr"] = lr
                if quantization is not None and iteration % quantization.refresh == 0:
                    quantize.refresh(network)
                values = _step(fabric, model, network, optimiser, batches, task, settings)
                state["iteration"] += 1
                state["seconds"] += time.perf_counter() - started
                if not math.isfinite(values["loss"]):
                    raise RunError(
                        f"the loss is {values['loss']} at step {iteration + 1}: lower training.lr"
                    )
                if log:
                    log.add("iteration", iteration + 1, values | {"lr": lr}, iteration + 1)
                progress.update(
                    bar,
                    advance=1,
                    description=f"{task.learning} {values[task.learning]:.3f}",
                    refresh=False,
                )
                if state["iteration"] % training.checkpoint_every == 0:
                    save()
            state["epoch"] += 1
            if state["epoch"] % training.measure_every == 0 or state["epoch"] == training.epochs:
                if fabric.world_size > 1:  # batch norms have seen other examples on each
                    cpu = {name: value.cpu() for name, value in network.state_dict().items()}
                    network.load_state_dict(fabric.broadcast(cpu))
                measured = evaluate(fabric, network, data, task, training.batch)
                state["measured"] = measured
                if log:
                    values = measured | {"seconds": state["seconds"]}
                    log.add("epoch", state["epoch"], values, state["iteration"])
                shown = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
                console.print(f"epoch {state['epoch']}/{training.epochs}  {shown}")
            save()
    if log:
        log.close()
    summary = {
        **state["measured"],
        "epochs": training.epochs,
        "iterations": state["iteration"],
        "training_seconds": round(state["seconds"]),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {fabric.device.type}",
        **report(network),
    }
    if first:
        network.cpu().eval()
        export_onnx(
            network,
            out / "model.onnx",
            torch.zeros(1, *data.shape),
            labels=data.labels,
            preprocessing=data.preprocessing,
        )
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _step(
    fabric: Fabric,
    model: Any,
    network: nn.Module,
    optimiser: Any,
    batches: Any,
    task: Task,
    settings: Settings,
) -> dict[str, float]:
    """Make one step of the optimiser; returns what is logged of it, means over all devices."""
    parts = settings.training.accumulate
    total = {"loss": 0.0, task.learning: 0.0}
    if settings.quantization is not None:
        total |= {"regulariser": 0.0, "nzr": 0.0}
    optimiser.zero_grad()
    for part in range(parts):
        x, target = (fabric.to_device(t) for t in next(batches))
        with fabric.no_backward_sync(model, enabled=part < parts - 1):
            output = model(x)
            loss = task.loss(output, target)
            total["loss"] += float(loss.detach()) / parts
            total[task.learning] += float(task.measure(output.detach(), target)) / parts
            if settings.quantization is not None:
                pull = quantize.regulariser(network)
                loss = loss + settings.quantization.regularisation * pull
                total["regulariser"] += float(pull.detach()) / parts
                total["nzr"] += quantize.non_zero_ratio(network) / parts
            fabric.backward(loss / parts)
    optimiser.step()
    if fabric.world_size > 1:
        means: Any = fabric.all_reduce(torch.tensor(list(total.values())), reduce_op="mean")
        total = dict(zip(total, means.tolist(), strict=True))
    return total


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


def make_optimiser(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser; weights decay, everything else does not."""
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in network.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith(".alpha")
        (weights if decays else others).append(parameter)
    groups = [
        {"params": weights, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimiser == "adam":
        return torch.optim.Adam(groups, lr=training.lr)
    return torch.optim.SGD(
        groups, lr=training.lr, momentum=training.momentum, nesterov=training.momentum > 0
    )


def learning_rate(done: float, training: Training) -> float:
    """Return the rate after a part `done` of the run: a line up, then half a cosine to zero."""
    if done < training.warmup:
        return training.lr * (done / training.warmup * 0.99 + 0.01)
    return (
        training.lr
        * 0.5
        * (1 + math.cos(math.pi * (done - training.warmup) / (1 - training.warmup)))
    )


def _comparable(settings: Settings) -> str:
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
    return settings.model_dump_json(exclude={"weights": True, "training": training})
