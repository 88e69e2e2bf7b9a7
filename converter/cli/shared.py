"""What the commands share: types of their arguments, and how files are read and results shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from logshift.converter.progress import bar
from logshift.kernels.errors import InputError
from logshift.kernels.registry import FAMILIES

if TYPE_CHECKING:
    from logshift.runtime import Session, Warmed


def choice(name: str, values: Sequence[str]) -> type[Enum]:
    """Return the type of an option that takes one of some values."""
    return Enum(name, [(value, value) for value in values], type=str)  # type: ignore[return-value]


Kernels: Any = choice("Kernels", ("auto", *FAMILIES))
AUTO = Kernels("auto")

Packed = Annotated[Path, typer.Argument(metavar="FILE.stlq", help="A packed network.")]
Onnx = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A float32 ONNX model.")]
Inputs = Annotated[
    list[Path],
    typer.Argument(help="Pictures, folders of pictures, or .npy files as the model takes them."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads per run.", show_default="all cores of this process"),
]
KernelFamily = Annotated[
    Kernels, typer.Option(help="Kernel family; the results are the same, bit for bit.")
]


def load(path: Path, **options: Any) -> Session:
    """Return a session; kernels that are yet to be compiled are compiled visibly."""
    from logshift import runtime
    from logshift.runtime.warm import is_warm

    session = runtime.load(path, **options)
    if not is_warm(session.kernels):
        warm_up(session.kernels)  # what takes long on the first run, visibly
    return session


def warm_up(kernels: str, into: Path | None = None, cpus: Sequence[str] = ()) -> Sequence[Warmed]:
    """Compile kernels, with a bar on the error stream."""
    from logshift import runtime

    with bar("compiling kernels") as show:
        return runtime.warmup(show, kernels=kernels, into=into, cpus=cpus)


def expanded(paths: Sequence[Path]) -> list[Path]:
    """All files, folders replaced by the pictures in them."""
    from logshift.runtime.picture import picture_files

    return [file for path in paths for file in (picture_files(path) if path.is_dir() else [path])]


def picture(path: Path) -> np.ndarray:
    """Return a picture's pixels, (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}") from None


def load_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy file of numbers ({error})") from None


def show(record: Any, text: str, as_json: bool) -> None:
    """Print a result, warnings in colour."""
    if as_json:
        print(json.dumps(record, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for line in text.splitlines():
        if line.startswith("warning: "):
            console.print(line, style="bold yellow")
        else:
            print(line)
