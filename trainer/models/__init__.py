"""Network definitions and their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from logshift.trainer.models.deeplab import (
    deeplab_drn,
    deeplab_mobilenet_v2,
    deeplab_resnet50,
    deeplab_resnet101,
)
from logshift.trainer.models.drn import drn_d_54
from logshift.trainer.models.mobilenet_v2 import mobilenet_v2
from logshift.trainer.models.resnet import resnet18, resnet34, resnet50, resnet101
from logshift.trainer.models.resnet_cifar import resnet20, resnet56, resneta, resnetb, resnetc
from logshift.trainer.models.shufflenet_v2 import shufflenet_v2
from logshift.trainer.models.sid import sid_unet

__all__ = ["MODELS", "ModelError", "load_weights"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20_cifar": resnet20,
    "resnet56_cifar": resnet56,
    "resneta": resneta,
    "resnetb": resnetb,
    "resnetc": resnetc,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
    "drn_d_54": drn_d_54,
    "deeplab_mobilenet_v2": deeplab_mobilenet_v2,
    "deeplab_resnet50": deeplab_resnet50,
    "deeplab_resnet101": deeplab_resnet101,
    "deeplab_drn": deeplab_drn,
    "sid_unet": sid_unet,
}

# Names that other trainers' files use, and torchvision's.
_RENAMED = {"module.": "", "linear.": "fc."}


class ModelError(ValueError):
    """Weights that cannot be read or do not fit."""


def load_weights(model: nn.Module, path: Path | str, *, part: str = "") -> None:
    """Load weights into a network.

    Parameters
    ----------
    model : nn.Module
    path : Path or str
        `.safetensors`, or a file of `torch.save` that holds nothing but tensors; a run's
        `checkpoint.pt` is one. State dictionaries may be in a field `state_dict`, `model` or
        `network`.
    part : str
        Name of the submodule that the file is of, such as "backbone"; tensors of the file that it
        does not have, a classifier's, are left out then.

    Raises
    ------
    ModelError
        If the file cannot be read, or tensors are missing, unexpected or of another shape.
    """
    path = Path(path)
    try:
        state: Any
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds
        raise ModelError(f"{path}: cannot be read: {error}") from error
    for field in ("state_dict", "model", "network"):
        if isinstance(state, dict):
            state = state.get(field, state)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelError(f"{path}: cannot be read: it holds no state dictionary")
    found = {_torchvision(name): tensor for name, tensor in state.items()}
    try:
        target = model.get_submodule(part)
    except AttributeError:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ModelError(
            f"weights_part {part!r} is no part of the model, such as {parts}"
        ) from None
    expected = target.state_dict()
    if part:
        found = {name: tensor for name, tensor in found.items() if name in expected}
    faults = _faults(found, expected)
    if faults:
        raise ModelError(f"{path} does not fit {type(target).__name__}: {'; '.join(faults)}")
    target.load_state_dict(found, strict=False)


def _torchvision(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _faults(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    # Old files lack this counter.
    missing = [n for n in expected if n not in found and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in found if n not in expected]
    reshaped = [
        f"{n} {tuple(found[n].shape)} instead of {tuple(t.shape)}"
        for n, t in expected.items()
        if n in found and found[n].shape != t.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "shape": reshaped}
    return [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
