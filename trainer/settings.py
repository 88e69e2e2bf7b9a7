"""Settings of a run: a TOML file, checked; every packaged file in `recipes/` is an example.

Such a file may also say what it is expected to reach, in a text `expected`, which is no setting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logshift.trainer.config import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"


class SettingsError(ValueError):
    """Settings that cannot be read or make no sense."""


class Training(BaseModel):
    """How a network is trained.

    Attributes
    ----------
    epochs : int
    batch : int
        Examples of one step of the optimiser, on all devices together.
    accumulate : int
        Parts that a batch is cut into, one after the other, to save memory.
    optimiser : {"sgd", "adam"}
    lr : float
        The highest learning rate; it rises in a straight line and falls to zero.
    schedule : {"cosine", "poly"}
        How it falls: as half a cosine, or as the part of the run that is left to the power of 0.9
        (DeepLab; Chen et al., 2018).
    warmup : float
        Part of the run in which it rises.
    momentum, weight_decay : float
        Decay holds for weights alone, not for alpha, scales, biases and normalisation.
    nesterov : bool
        Whether momentum is Nesterov's.
    label_smoothing : float
    balance_classes : bool
        Weigh classes in the loss by 1 / log(1.02 + share of pixels), as ENet does (Paszke et al.,
        2016); for segmentation.
    freeze_batch_norm : bool
        Keep the statistics of the float network.
    calibration : int
        Training examples that initial activation ranges come from.
    precision : str
        As Lightning Fabric names it: "32-true", "16-mixed", "bf16-mixed".
    accelerator : str
    devices, nodes : int
        Devices on each machine, machines.
    threads : int, optional
        Threads of each process on a CPU; PyTorch's own choice if left out.
    seed : int
    checkpoint_every : int
        Steps between checkpoints; there is also one after every epoch.
    measure_every : int
        Epochs between measurements on the test set; there is always one at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimiser: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    schedule: Literal["cosine", "poly"] = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=1e-4, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    balance_classes: bool = False
    freeze_batch_norm: bool = False
    calibration: int = Field(default=512, ge=1)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    accelerator: str = "auto"
    devices: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=1, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)
    measure_every: int = Field(default=1, ge=1)


class Settings(BaseModel):
    """A run.

    Attributes
    ----------
    task : {"classification", "segmentation", "enhancement"}
    model, model_options
        A name in `logshift.trainer.models` and what its constructor is given.
    data, data_options
        A name in `logshift.trainer.data`, likewise.
    weights : Path, optional
        Float weights to begin with, .pth or .safetensors; a network starts untrained without.
    weights_part : str
        Submodule that they are of, such as "backbone"; the whole network if empty.
    training : Training
    quantization : Config, optional
        Without it the network is trained in float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: Literal["classification", "segmentation", "enhancement"]
    model: str
    model_options: dict[str, Any] = {}
    data: str
    data_options: dict[str, Any] = {}
    weights: Path | None = None
    weights_part: str = ""
    training: Training = Training()
    quantization: Config | None = None


def recipes() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read(recipe: str, changes: Iterable[str] = ()) -> Settings:
    """Read settings.

    Parameters
    ----------
    recipe : str
        A TOML file, or the name of a packaged recipe.
    changes : iterable of str
        `key=value`, such as `quantization.weight_bits=3`; both as in TOML, or values plain strings.

    Returns
    -------
    Settings

    Raises
    ------
    SettingsError
        If the file is not there or not TOML, or a setting is unknown or out of range.
    """
    values = _load(recipe)
    values.pop("expected", None)
    for change in changes:
        _apply(values, change)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})"
            for e in error.errors()
        ]
        raise SettingsError(f"{recipe}:\n" + "\n".join(lines)) from error


def expected(recipe: str) -> str:
    """Return what a recipe is expected to reach, and whose figure that is; empty if unsaid.

    Parameters
    ----------
    recipe : str
        As for `read`.

    Raises
    ------
    SettingsError
        If the file is not there or not TOML, or this is no text.
    """
    text = _load(recipe).get("expected", "")
    if not isinstance(text, str):
        raise SettingsError(f"{recipe}: expected is {text!r}; it must be a text")
    return text


def _load(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if not path.suffix:
        path = RECIPES / f"{recipe}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{recipe}: no such file; the packaged recipes are {', '.join(recipes())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: {error}") from error


def _apply(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    if not equals:
        raise SettingsError(f"{change!r} is not of the form key=value")
    try:
        new = tomllib.loads(f"{name} = {text}")
    except tomllib.TOMLDecodeError:
        try:
            new = tomllib.loads(f"{name} = {json.dumps(text)}")
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{change!r}: {name} is no key: {error}") from error
    _merge(values, new, change)


def _merge(values: dict[str, Any], new: dict[str, Any], change: str) -> None:
    for key, value in new.items():
        if isinstance(value, dict):
            below = values.setdefault(key, {})
            if not isinstance(below, dict):
                raise SettingsError(f"{change!r}: {key} is a value, not a group of settings")
            _merge(below, value, change)
        else:
            values[key] = value
