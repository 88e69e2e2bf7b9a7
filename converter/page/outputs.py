"""Inputs and outputs as one looks at them: pictures, top classes, masks, and what differs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from logshift.converter.compare import OutputError
from logshift.runtime.graph import Graph
from logshift.runtime.picture import Preprocessing

_TOP = 5
_SLACK = 0.1  # of a range, by which pictures may miss it
_SIDE = 480  # of a picture on the page, at most
_LEAST_SIDE = 8  # of what is shown as a picture
_POINTS = 1500  # of an output, that are drawn one against the other
_QUALITY = 88
_DIFFERENT = np.array([[235, 235, 235], [214, 39, 40]], np.uint8)  # by whether a place is
_VISIBLE = 99.0  # per cent of a difference that are not to be cut off
_MASK = 0.55  # of a mask on the picture that it is of


@dataclass(frozen=True)
class Picture:
    """Pixels with what they show.

    Attributes
    ----------
    title : str
    pixels : uint8 array (H, W, 3)
    note : str
        What else is to be known of them, or "".
    """

    title: str
    pixels: np.ndarray
    note: str = ""

    @property
    def uri(self) -> str:
        """The picture in an address, as pages hold them."""
        image = Image.fromarray(self.pixels)
        if max(image.size) > _SIDE:
            image.thumbnail((_SIDE, _SIDE))
        elif 4 * max(image.size) <= _SIDE:  # its pixels are to be seen
            factor = _SIDE // max(image.size) // 2
            size = (image.width * factor, image.height * factor)
            image = image.resize(size, Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class ClassScore:
    """A class as both networks see it."""

    label: str
    expected: float
    found: float


@dataclass(frozen=True)
class Output:
    """One output of both networks.

    Attributes
    ----------
    name : str
    classes : list of ClassScore
        The top ones of either network.
    pictures : list of Picture
    points : dict of str to float array (2, values)
        Values of the float network, and of the packed one, by groups of channels.
    """

    name: str
    classes: list[ClassScore] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    points: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What goes into both networks, and what comes out."""

    inputs: list[Picture]
    outputs: list[Output]


def show_input(x: np.ndarray, packed: Graph) -> Picture | None:
    """Return an input (1, C, H, W) or (1, H, W, C) as a picture, None if it is none."""
    if x.ndim != 4 or x.dtype.kind not in "fu" or not x.size:
        return None
    pixels = x[0]
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] not in (1, 3) or min(pixels.shape[:2]) < _LEAST_SIDE:
        return None
    if x.dtype == np.uint8:
        return Picture("input", _gray_or_color(pixels))
    record = packed.preprocessing
    known = None if record is None else Preprocessing.from_manifest(record)
    if known is None or len(known.mean) != pixels.shape[2]:
        low, high, note = _range(pixels)
        return Picture("input", _to_bytes((pixels - low) / (high - low)), note)
    pixels = pixels * np.array(known.std, np.float32) + np.array(known.mean, np.float32)
    return Picture(
        "input", _to_bytes(pixels[..., ::-1] if known.channel_order == "BGR" else pixels)
    )


def show_output(
    error: OutputError,
    expected: np.ndarray,
    found: np.ndarray,
    inputs: Sequence[Picture],
    packed: Graph,
) -> Output:
    """Return the first sample of an output as one looks at it.

    Parameters
    ----------
    error : OutputError
        Which says whether it holds scores of classes.
    expected, found : array (N, ...)
        Of the float network and of the packed one.
    inputs : list of Picture
        That a mask can lie on.
    packed : Graph
    """
    if expected.shape != found.shape or expected.ndim < 2 or not expected.size:
        return Output(error.name)
    x, y = expected[:1], found[:1]
    if error.agreement is not None and error.groups:
        axis = error.groups[0].axis
        if x.size == x.shape[axis]:
            return Output(error.name, _top(x.ravel(), y.ravel(), packed.labels))
        if x.ndim == 4 and axis == 1:
            masks = (x[0].argmax(0), y[0].argmax(0))
            return Output(error.name, pictures=_masks(*masks, x.shape[1], inputs))
    if x.dtype.kind in "iub":
        if (picture := _plane(x)) is None:
            return Output(error.name)
        other = y.reshape(picture.shape)
        count = int(max(picture.max(), other.max())) + 1
        return Output(error.name, pictures=_masks(picture, other, count, inputs))
    if x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= _LEAST_SIDE:
        return Output(error.name, pictures=_side_by_side(x[0], y[0]))
    points = {}
    for group in error.groups:
        chosen = group.indices(x.shape[group.axis])
        name = f"{error.name}, {group}" if group.channels else error.name
        points[name] = _points(x.take(chosen, group.axis), y.take(chosen, group.axis))
    return Output(error.name, points=points)


def _top(x: np.ndarray, y: np.ndarray, labels: Sequence[str] | None) -> list[ClassScore]:
    chosen = dict.fromkeys([*np.argsort(-x)[:_TOP].tolist(), *np.argsort(-y)[:_TOP].tolist()])
    named = list(labels) if labels is not None and len(labels) == len(x) else None
    return [
        ClassScore(named[i] if named else f"class {i}", float(x[i]), float(y[i])) for i in chosen
    ]


def _plane(x: np.ndarray) -> np.ndarray | None:
    """Return (H, W) of an array that is a picture of numbers, None if it is none."""
    shape = [n for n in x.shape if n > 1]
    return x.reshape(shape) if len(shape) == 2 and min(shape) >= _LEAST_SIDE else None


def _masks(x: np.ndarray, y: np.ndarray, classes: int, inputs: Sequence[Picture]) -> list[Picture]:
    """Return masks of both networks, on the picture that they are of, and where they differ."""
    palette = _palette(classes)
    ground = next((_fitted(p.pixels, x.shape) for p in inputs), None)
    shown = []
    for title, mask in (("float", x), ("packed", y)):
        pixels = palette[np.clip(mask.astype(np.int64), 0, classes - 1)]
        if ground is not None:
            pixels = _to_bytes((_MASK * pixels + (1 - _MASK) * ground) / 255)
        shown.append(Picture(title, pixels))
    differs = x != y
    pixels = _DIFFERENT[differs.astype(np.int64)]
    note = f"{100 * differs.mean():.2f} % of the places"
    return [*shown, Picture("different", pixels, note)]


def _palette(classes: int) -> np.ndarray:
    """Return colours (classes, 3) that are far from those before them."""
    hues = (0.11 + 0.618034 * np.arange(classes)) % 1.0
    value = np.where(np.arange(classes) % 2, 0.75, 0.95)
    turns = (hues[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = value[:, None] * (1 - 0.75 * np.clip(np.minimum(turns, 4 - turns), 0, 1))
    return np.rint(255 * rgb).astype(np.uint8)


def _fitted(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    image = Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32)


def _side_by_side(x: np.ndarray, y: np.ndarray) -> list[Picture]:
    """Return pictures (C, H, W) of both networks, and their difference, enlarged as it needs."""
    x, y = x.transpose(1, 2, 0).astype(np.float32), y.transpose(1, 2, 0).astype(np.float32)
    low, high, note = _range(x)
    shown = [
        Picture(title, _to_bytes((z - low) / (high - low)), note)
        for title, z in (("float", x), ("packed", y))
    ]
    difference = np.abs(np.nan_to_num(x - y)) / (high - low)
    most = max(float(np.percentile(difference, _VISIBLE)), 1e-6)
    factor = 2 ** int(np.clip(np.floor(-np.log2(most)), 0, 10))
    mean = float(np.sqrt(np.square(difference).mean()))
    note = f"{factor} times enlarged; root mean square {100 * mean:.2f} % of the range"
    return [*shown, Picture("difference", _to_bytes(factor * difference), note)]


def _range(x: np.ndarray) -> tuple[float, float, str]:
    """Return what is black, what is white, and a note where nothing says what should be."""
    finite = x[np.isfinite(x)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    for a, b in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        slack = _SLACK * (b - a)
        if a - slack <= low and a + slack <= high <= b + slack:
            return a, b, ""
    return low, max(high, low + 1e-6), "from its least to its largest value"


def _points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    flat = np.stack([x.ravel(), y.ravel()]).astype(np.float64)
    flat = flat[:, np.isfinite(flat).all(axis=0)]
    if flat.shape[1] <= _POINTS:
        return flat
    # The largest, of which there may be few, and some of all.
    largest = np.argsort(-np.abs(flat).max(axis=0), kind="stable")[: _POINTS // 2]
    spread = np.linspace(0, flat.shape[1] - 1, _POINTS - len(largest)).astype(int)
    return flat[:, np.unique([*largest, *spread])]


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Return pixels from 0 to 1 as bytes (H, W, 3)."""
    return _gray_or_color(np.rint(255 * np.clip(np.nan_to_num(pixels), 0, 1)).astype(np.uint8))


def _gray_or_color(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
