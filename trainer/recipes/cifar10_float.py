"""Train a floating-point ResNet-20 on CIFAR-10 and export it to ONNX.

Run it with::

    python -m logshift.trainer.recipes.cifar10_float --data DIR

``DIR`` holds ``cifar10-train.parquet`` and ``cifar10-test.parquet``, each with the columns
``image`` (JPEG or PNG bytes) and ``label`` (0 to 9). A checkpoint is written after every epoch; the
same command started again goes on from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from logshift.trainer.models import resnet20

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass
class Settings:
    """What a run is made of; every field is also a command-line option."""

    data: Path
    out: Path = Path("resnet20-cifar10.onnx")
    checkpoint: Path = Path("resnet20-cifar10.pt")
    epochs: int = 18
    batch: int = 128
    lr: float = 0.2  # the peak
    warmup: float = 0.15  # part of the run that the learning rate takes to reach its peak
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    pad: int = 4  # crops are taken from pictures mirrored outwards by so many pixels
    seed: int = 1
    threads: int = 2


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Read the settings from the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process if left out.

    Returns
    -------
    Settings
        The settings.
    """
    parser = argparse.ArgumentParser(
        description="Train a floating-point ResNet-20 on CIFAR-10 and export it to ONNX."
    )
    types = {"Path": Path, "int": int, "float": float}
    for field in dataclasses.fields(Settings):
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=types[str(field.type)],
            required=required,
            default=None if required else field.default,
            help="required" if required else "default: %(default)s",
        )
    return Settings(**vars(parser.parse_args(argv)))


def load_split(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode one parquet file.

    Parameters
    ----------
    path : Path
        File with the columns ``image`` and ``label``.

    Returns
    -------
    images : ndarray of uint8, shape (n, 3, 32, 32)
        RGB pictures.
    labels : ndarray of int64, shape (n,)
        Class numbers.
    """
    table = pq.read_table(path)
    images = [
        np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
        for blob in table["image"].to_pylist()
    ]
    labels = table["label"].to_numpy().astype(np.int64)
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), labels


def normalise(images: Tensor) -> Tensor:
    """Turn bytes into what the network takes.

    Parameters
    ----------
    images : Tensor of uint8, shape (n, 3, 32, 32)
        RGB pictures.

    Returns
    -------
    Tensor of float32
        ``(images / 255 - MEAN) / STD``, channel by channel.
    """
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def learning_rate(done: float, peak: float, warmup: float) -> float:
    """Return the learning rate: a straight line up, then half a cosine down to zero.

    Parameters
    ----------
    done : float
        Part of the run that is over, 0 to 1.
    peak : float
        The highest rate.
    warmup : float
        Value of `done` at which the peak is reached.

    Returns
    -------
    float
        The rate to use now.
    """
    if done < warmup:
        return peak * done / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Return the share of pictures that the PyTorch model gets right.

    Parameters
    ----------
    model : nn.Module
        The network; left in evaluation mode.
    images : Tensor of uint8
        Pictures.
    labels : Tensor of int64
        Class numbers.
    batch : int
        Pictures at a time.

    Returns
    -------
    float
        0 to 1.
    """
    model.eval()
    right = 0
    for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
        x = normalise(part).contiguous(memory_format=torch.channels_last)
        right += int((model(x).argmax(1) == truth).sum())
    return right / len(labels)


def onnx_accuracy(path: Path, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Return the share of pictures that the exported file gets right under ONNX Runtime.

    Parameters
    ----------
    path : Path
        The ONNX file.
    images : Tensor of uint8
        Pictures.
    labels : Tensor of int64
        Class numbers.
    batch : int
        Pictures at a time.

    Returns
    -------
    float
        0 to 1.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    right = 0
    for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
        (logits,) = session.run(["logits"], {"image": normalise(part).numpy()})
        right += int((logits.argmax(1) == truth.numpy()).sum())
    return right / len(labels)


def export(model: nn.Module, path: Path) -> None:
    """Write the network as one ONNX file with batch norm folded into the convolutions.

    Parameters
    ----------
    model : nn.Module
        The trained network.
    path : Path
        Where to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model.to(memory_format=torch.contiguous_format).eval(),
        (torch.zeros(1, 3, 32, 32),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the recipe.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process if left out.
    """
    settings = parse_settings(argv)
    console = Console()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)

    # Data. All of it fits in memory; the training pictures are padded once, and every possible
    # crop is a view of them: crops[i, :, y, x] is picture i moved by (y, x).
    console.print("decoding the pictures")
    train_images, train_labels = load_split(settings.data / "cifar10-train.parquet")
    test_images, test_labels = (
        torch.from_numpy(a) for a in load_split(settings.data / "cifar10-test.parquet")
    )
    pad = settings.pad
    padded = np.pad(train_images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    crops = torch.from_numpy(padded).unfold(2, 32, 1).unfold(3, 32, 1)
    labels = torch.from_numpy(train_labels)

    # Model and optimiser.
    model = resnet20(len(CLASSES)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters} parameters, {len(labels)} training pictures")

    # A checkpoint, if there is one.
    first_epoch, seconds = 0, 0.0
    if settings.checkpoint.exists():
        state = torch.load(settings.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first_epoch, seconds = state["epoch"], state["seconds"]
        console.print(f"going on from {settings.checkpoint}, {first_epoch} epochs done")

    # Training. The random numbers of an epoch depend on the seed and the epoch alone, so a run
    # that was interrupted sees the same batches as one that was not.
    steps = len(labels) // settings.batch
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=settings.epochs * steps)
        progress.update(bar, completed=first_epoch * steps)
        for epoch in range(first_epoch, settings.epochs):
            started = time.perf_counter()
            random = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            order = torch.randperm(len(labels), generator=random)
            model.train()
            total_loss = 0.0
            for step in range(steps):
                pick = order[step * settings.batch : (step + 1) * settings.batch]
                dy, dx = torch.randint(0, 2 * pad + 1, (2, len(pick)), generator=random)
                flip = torch.rand(len(pick), 1, 1, 1, generator=random) < 0.5
                x = crops[pick, :, dy, dx]
                x = normalise(torch.where(flip, x.flip(3), x))
                x = x.contiguous(memory_format=torch.channels_last)

                done = (epoch * steps + step) / (settings.epochs * steps)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(done, settings.lr, settings.warmup)
                loss = F.cross_entropy(
                    model(x), labels[pick], label_smoothing=settings.label_smoothing
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total_loss += float(loss.detach())
                progress.advance(bar)

            seconds += time.perf_counter() - started
            right = accuracy(model, test_images, test_labels)
            console.print(
                f"epoch {epoch + 1}/{settings.epochs}  loss {total_loss / steps:.4f}  "
                f"test {right:.2%}  {seconds:.0f} s"
            )
            settings.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            partial = settings.checkpoint.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "epoch": epoch + 1,
                    "seconds": seconds,
                },
                partial,
            )
            partial.replace(settings.checkpoint)

    # Export, and judge what was exported rather than what was trained.
    export(model, settings.out)
    report = {
        "test_accuracy": onnx_accuracy(settings.out, test_images, test_labels),
        "test_accuracy_pytorch": accuracy(model, test_images, test_labels),
        "test_pictures": len(test_labels),
        "parameters": parameters,
        "bytes": settings.out.stat().st_size,
        "training_seconds": round(seconds),
        "torch": torch.__version__,
        "classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        "settings": {
            key: value
            for key, value in dataclasses.asdict(settings).items()
            if not isinstance(value, Path)
        },
    }
    settings.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"{settings.out}: {report['test_accuracy']:.2%} under ONNX Runtime")


if __name__ == "__main__":
    main()
