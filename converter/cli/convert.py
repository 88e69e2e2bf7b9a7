"""The command `logshift convert`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from logshift import converter
from logshift.converter.cli.shared import Json, Onnx, choice, load_array, show
from logshift.converter.settings import AUTO, Declaration, Settings, Target, declared
from logshift.kernels.errors import AccuracyWarning, InputError
from logshift.runtime.picture import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESAMPLING,
    Preprocessing,
)

_Number = TypeVar("_Number", int, float)
Interpolation: Any = choice("Interpolation", RESAMPLING)
BILINEAR = Interpolation("bilinear")
Resampling = Annotated[Interpolation, typer.Option(help="How pictures are resized.")]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take every setting of `convert`, in its order, for `**settings`.

    The options follow what must be given.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    given = sum(parameter.default is inspect.Parameter.empty for parameter in own)
    declarations = declared(Settings) | declared(Target)
    hints = get_type_hints(Settings) | get_type_hints(Target)
    options = [
        _option(parameter, declarations[name], hints[name])
        for name, parameter in inspect.signature(converter.convert).parameters.items()
        if name in declarations
    ]
    signature = inspect.Signature([*own[:given], *options, *own[given:]])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def _option(setting: inspect.Parameter, about: Declaration, kind: Any) -> inspect.Parameter:
    default = setting.default
    if about.choices is not None:
        kind = choice(setting.name, about.choices)
        default = None if default is None else kind(default)
        kind = kind if default is not None else kind | None
    elif about.kind is str:
        kind = str if default is not None else str | None
        default = None if default is None else str(default)
    elif about.kind is not None:  # of settings that may be given several times
        kind, default = about.kind, [str(default)] if default else None
    option = typer.Option(
        *about.flags, help=about.help, metavar=about.metavar, show_default=about.shown_default
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default,
        annotation=Annotated[kind, option],
    )  # fmt: skip


@_with_settings
def convert(
    model: Onnx,
    out: Annotated[Path, typer.Argument(metavar="FILE.stlq", help="The packed file to write.")],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Typical inputs: a folder of pictures, or a .npy file with a float32 array"
            " (N, C, H, W) as the model takes it or uint8 pictures (N, H, W, C)."
        ),
    ],
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME:]N,C,H,W",
            help="Sizes of an input, '?' or a name where any will do: 'x:?,3,?,?' frees what the"
            " export has fixed. May be given several times; the name is needed of several inputs.",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Per channel, in units of pixel / 255.", show_default="ImageNet's"),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="Per channel, in units of pixel / 255.", show_default="ImageNet's"),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Length of the shorter side before the crop, or exact size.",
            show_default="what the crop needs",
        ),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="HxW", help="Centre crop.", show_default="input size")
    ] = None,
    bgr: Annotated[bool, typer.Option("--bgr", help="Channels in the order BGR.")] = False,
    interpolation: Resampling = BILINEAR,
    labels: Annotated[
        Path | None, typer.Option(help="Text file of class names, one a line.")
    ] = None,
    validate: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE",
            help="Pictures that --max-drop is measured on: a folder with a folder for each class,"
            " called by label or index or in the order of the classes; or a file whose lines have"
            " a picture and its class, apart by a comma.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Write nothing, and fail, if the outputs are too far from the float model's.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html",
            help="Write a page about what each layer adds, ranges, times and pictures.",
        ),
    ] = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Convert an ONNX model to a packed file.

    Preprocessing (mean, std, resize, crop ...) is stored in the file, so that it takes pictures.

    **Examples**

    - `logshift convert resnet18.onnx resnet18.stlq --calibration photos/ --resize 256`

    - `logshift convert net.onnx net.stlq --calibration inputs.npy --bits 3 --residual-ratio 0.3`

    - `logshift convert net.onnx net.stlq --calibration photos/ --max-bytes 2000000`

    - `logshift convert net.onnx net.stlq --calibration photos/ --validate labelled/ --max-drop 0.5`

    - `logshift convert net.onnx net.stlq --calibration photos/ --granularity tile --tile 16x16`

    - `logshift convert net.onnx net.stlq --calibration photos/ --report net.html`
    """
    pictures = calibration.suffix != ".npy"
    data: Any = calibration if pictures else load_array(calibration)
    given = mean or std or resize or crop or bgr or interpolation is not BILINEAR
    settings = {name: v.value if isinstance(v, Enum) else v for name, v in settings.items()}
    if (bits := settings["weight_bits"]) is not None:
        settings["weight_bits"] = _number(f"--bits {bits!r}", bits, int)
    settings["activation_bits"] = _activation_bits(settings["activation_bits"])
    ratio = settings["residual_ratio"]
    settings["residual_ratio"] = _number(f"--residual-ratio {ratio!r}", ratio, float)
    settings["keep_float"] = settings["keep_float"] or ()
    if (tile := settings["tile"]) is not None:
        settings["tile"] = _tile(tile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # the report has it
        made = converter.convert(
            model,
            out,
            calibration=data,
            input_shapes=_input_shapes(input_shape or []),
            **settings,
            preprocessing=_preprocessing(mean, std, resize, crop, bgr, interpolation.value)
            if given
            else None,
            labels=None if labels is None else _lines(labels),
            validate=validate,
            strict=strict,
            report=report,
        )
    show(made.to_dict(), str(made), as_json)


def _input_shapes(texts: list[str]) -> dict[str, tuple[int | str | None, ...]] | None:
    shapes: dict[str, tuple[int | str | None, ...]] = {}
    for text in texts:
        # Names may have colons of their own.
        name, _, sizes = text.rpartition(":")
        parts = [part.strip() for part in sizes.split(",")]
        if not all(parts):
            raise InputError(
                f"--input-shape {text!r}: give sizes like 'x:?,3,?,?' or '1,3,224,224'"
            )
        dims = (int(p) if p.isdecimal() else None if p in ("?", "-1") else p for p in parts)
        shapes[name] = tuple(dims)
    return shapes or None


def _number(given: str, number: str, kind: type[_Number]) -> _Number | str:
    """Return the number that an option gives, or "auto"."""
    try:
        return number if number == AUTO else kind(number)
    except ValueError:
        raise InputError(f"{given}: give a number, or {AUTO}") from None


def _tile(text: str) -> int | tuple[int, ...]:
    """Return the weights of a tile, or its sides."""
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(
            f"--tile {text!r}: give input and output channels like 16x16, or a number of weights"
        ) from None
    return sides[0] if len(sides) == 1 else sides


def _activation_bits(given: list[str]) -> int | str | dict[str, int | str]:
    """Return one number for all nodes, or numbers by patterns: what names none is for the rest."""
    bits: dict[str, int | str] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        bits[name or "*"] = _number(f"--activation-bits {text!r}", number, int)
    rest = bits.pop("*", AUTO)
    return bits | {"*": rest} if bits else rest


def _preprocessing(
    mean: str | None, std: str | None, resize: str | None, crop: str | None, bgr: bool,
    interpolation: str,
) -> Preprocessing:  # fmt: skip
    return Preprocessing(
        resize=None if resize is None else int(resize) if resize.isdecimal() else _size(resize),
        crop=None if crop is None else _size(crop),
        mean=IMAGENET_MEAN if mean is None else _numbers("mean", mean),
        std=IMAGENET_STD if std is None else _numbers("std", std),
        channel_order="BGR" if bgr else "RGB",
        interpolation=interpolation,
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} {text!r}: give numbers like 0.485,0.456,0.406") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"size {text!r}: give height and width like 224x224")
    return int(height), int(width)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
