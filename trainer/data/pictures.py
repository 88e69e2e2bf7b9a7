"""Pictures: reading, scaling, cropping; label maps go through the same steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor

from logshift.trainer.data.base import DataError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
VOID = 255  # label of pixels that do not count


def read(source: Path | bytes, mode: str = "RGB") -> Image.Image:
    """Read a picture from a file or its bytes.

    Parameters
    ----------
    source : Path or bytes
    mode : str
        "RGB", or "P" for label maps, whose values are not looked up in their palette.

    Raises
    ------
    DataError
        If it is no picture.
    """
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # the last for broken PNG
        name = "a picture" if isinstance(source, bytes) else source
        raise DataError(f"cannot read {name}: {error}") from error
    if mode == "P":
        return picture if picture.mode in ("P", "L") else picture.convert("L")
    return picture.convert(mode)


def read_labelled(picture: Path | bytes, labels: Path | bytes) -> tuple[Image.Image, Image.Image]:
    """Read a picture and its label map.

    Parameters
    ----------
    picture, labels : Path or bytes

    Raises
    ------
    DataError
        If one is no picture, or they differ in size.
    """
    read_picture, read_labels = read(picture), read(labels, "P")
    if read_picture.size != read_labels.size:
        name = "a label map" if isinstance(labels, bytes) else labels
        raise DataError(f"{name} is {read_labels.size}, its picture {read_picture.size} pixels")
    return read_picture, read_labels


def segmented(
    item: tuple[Path | bytes, Path | bytes],
    scale: tuple[float, float],
    size: tuple[int, int],
    random: np.random.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return the input and the classes of its pixels, augmented if there is a generator.

    Parameters
    ----------
    item : tuple
        A picture and its label map, as for `read_labelled`.
    scale, size, random
        As for `scaled_crop`.

    Returns
    -------
    x : float32 Tensor of shape (3, H, W)
    classes : int64 Tensor of shape (H, W)
    """
    picture, labels = read_labelled(*item)
    if random is None:
        pixels, classes = to_tensor(picture), to_tensor(labels)
    else:
        pixels, classes = scaled_crop(picture, labels, scale, size, random)
    return normalise(pixels), classes.long()


def class_shares(items: Sequence[tuple[Path | bytes, Path | bytes]], classes: int) -> Tensor:
    """Return the share of each class in label maps; labels from `classes` on do not count.

    Parameters
    ----------
    items : sequence of tuple
        As for `segmented`.
    classes : int

    Returns
    -------
    float64 Tensor of shape (classes,)
    """
    total = torch.zeros(classes, dtype=torch.float64)
    for _, labels in track(items, "shares of classes", transient=True):
        counts = to_tensor(read(labels, "P")).flatten().bincount(minlength=classes)
        total += counts[:classes]
    return total / total.sum()


def preprocessing(resize: int | list[int] | None, crop: list[int]) -> dict[str, Any]:
    """Return how pictures become inputs, in the terms of the packed file.

    Parameters
    ----------
    resize : int or list of int or None
        Length of the shorter side; or height and width; or what just covers the crop.
    crop : list of int
        Height and width.
    """
    return {
        "resize": resize,
        "crop": crop,
        "mean": list(MEAN),
        "std": list(STD),
        "channel_order": "RGB",
        "interpolation": "bilinear",
    }


def normalise(pixels: Tensor) -> Tensor:
    """Return (pixels / 255 - MEAN) / STD, float32.

    Parameters
    ----------
    pixels : uint8 Tensor of shape (..., 3, H, W)
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def to_tensor(picture: Image.Image) -> Tensor:
    """Return a picture as uint8 Tensor of shape (C, H, W), or (H, W) for one channel."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.movedim(-1, 0).contiguous() if pixels.ndim == 3 else pixels


def shorter_side(picture: Image.Image, size: int) -> Image.Image:
    """Scale a picture so that its shorter side has `size` pixels."""
    width, height = picture.size
    scale = size / min(width, height)
    return picture.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))),
        Image.Resampling.BILINEAR,
    )


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Cut the middle square of `size` pixels out."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def random_resized_crop(
    picture: Image.Image, size: int, random: np.random.Generator
) -> Image.Image:
    """Cut out 8 to 100 % of a picture at an aspect of 3:4 to 4:3 and scale it to a square."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            box = (left, top, left + w, top + h)
            return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return centre_crop(shorter_side(picture, size), size)


def scaled_crop(
    picture: Image.Image,
    labels: Image.Image,
    scale: tuple[float, float],
    size: tuple[int, int],
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Scale, crop and mirror a picture with its label map, as is usual for segmentation.

    Parameters
    ----------
    picture, labels : Image
    scale : tuple of float
        Smallest and largest factor.
    size : tuple of int
        Height and width of the crop; where the picture does not reach, labels are `VOID`.
    random : Generator

    Returns
    -------
    pixels : uint8 Tensor of shape (3, height, width)
    labels : uint8 Tensor of shape (height, width)
    """
    factor = random.uniform(*scale)
    new = (round(picture.width * factor), round(picture.height * factor))
    picture = picture.resize(new, Image.Resampling.BILINEAR)
    labels = labels.resize(new, Image.Resampling.NEAREST)
    height, width = size
    left = random.integers(0, max(new[0] - width, 0) + 1)
    top = random.integers(0, max(new[1] - height, 0) + 1)
    pixels, classes = to_tensor(picture), to_tensor(labels)
    pixels = pixels[:, top : top + height, left : left + width]
    classes = classes[top : top + height, left : left + width]
    right, bottom = width - classes.shape[1], height - classes.shape[0]
    grey = [round(255 * m) for m in MEAN]
    if right or bottom:
        whole = torch.tensor(grey, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
        whole[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        pixels = whole
        classes = torch.nn.functional.pad(classes, (0, right, 0, bottom), value=VOID)
    if random.random() < 0.5:
        pixels, classes = pixels.flip(-1), classes.flip(-1)
    return pixels, classes
