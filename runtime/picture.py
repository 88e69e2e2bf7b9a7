"""From a picture to the tensor that a network takes: resize, crop, normalise."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logshift.kernels.errors import FormatError, InputError

if TYPE_CHECKING:  # at run time it is imported once there is a picture
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = ("nearest", "bilinear", "bicubic")
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files in a folder and its subfolders, sorted.

    Raises
    ------
    InputError
        If there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"folder {os.fspath(folder)!r} does not exist")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(
            f"folder {os.fspath(folder)!r} holds no pictures ({', '.join(sorted(_SUFFIXES))})"
        )
    return files


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input tensor: x = (pixel / 255 - mean) / std after resize and crop.

    Attributes
    ----------
    resize : int or (height, width), optional
        An integer is the new length of the shorter side. By default the shorter side becomes as
        long as the crop needs.
    crop : (height, width), optional
        Centre crop; by default the network's own input size.
    mean, std : one float per channel, in units of pixel / 255
    channel_order : {"RGB", "BGR"}
    interpolation : {"nearest", "bilinear", "bicubic"}
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = "RGB"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse settings that no picture could be prepared with."""
        numbers = (*self.mean, *self.std)
        if (
            len(self.mean) != len(self.std)
            or len(self.mean) not in (1, 3)
            or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
            or not all(v > 0 for v in self.std)
        ):
            raise InputError("preprocessing: mean and std need 1 or 3 finite values, std positive")
        if self.channel_order not in ("RGB", "BGR"):
            raise InputError(f"preprocessing: channel_order {self.channel_order!r}: RGB or BGR")
        if self.interpolation not in RESAMPLING:
            raise InputError(
                f"preprocessing: interpolation {self.interpolation!r}: one of"
                f" {', '.join(RESAMPLING)}"
            )
        sizes = [self.crop or (1, 1)]
        sizes.append(self.resize if isinstance(self.resize, tuple) else (self.resize or 1, 1))
        for size in sizes:
            if len(size) != 2 or not all(type(v) is int and 1 <= v <= 2**14 for v in size):
                raise InputError(f"preprocessing: size {size} must be integers from 1 to 16384")

    def to_manifest(self) -> dict[str, Any]:
        """Return the JSON object stored in a packed file."""
        return asdict(self)

    @classmethod
    def from_manifest(cls, record: dict[str, Any]) -> Preprocessing:
        """Read the JSON object of a packed file; `FormatError` if it is not one."""
        try:
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in record.items()
            }
            return cls(**fields)
        except (TypeError, InputError) as error:
            raise FormatError(f"preprocessing: {error}") from None

    def apply(self, picture: Any, size: tuple[int, int]) -> np.ndarray:
        """Prepare one picture.

        Parameters
        ----------
        picture : PIL image, or uint8 array of shape (H, W, C) or (H, W)
        size : (height, width)
            The network's nominal input size, used where `crop` is not given.

        Returns
        -------
        float32 array of shape (C, height, width).
        """
        channels = len(self.mean)
        image = _as_image(picture).convert("RGB" if channels == 3 else "L")
        height, width = self.crop or size
        image = self._resized(image, height, width)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        pixels = pixels.reshape(height, width, channels)
        if self.channel_order == "BGR":
            pixels = pixels[:, :, ::-1]
        scaled = pixels.astype(np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        x = (scaled - mean) / std
        return np.ascontiguousarray(x.transpose(2, 0, 1), np.float32)

    def channels_last(self, shape: Sequence[int | str]) -> bool:
        """Tell whether an input of this shape, dimensions possibly named, is (N, H, W, C)."""
        return shape[1] != len(self.mean) == shape[3]

    def prepare(self, picture: Any, size: tuple[int, int], channels_last: bool) -> np.ndarray:
        """Prepare one picture as `apply` does; (height, width, C) if channels come last."""
        x = self.apply(picture, size)
        return np.ascontiguousarray(x.transpose(1, 2, 0)) if channels_last else x

    def _resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        if isinstance(self.resize, tuple):
            target = (self.resize[1], self.resize[0])
        else:
            # The default is the smallest size that covers the crop.
            factor = (
                self.resize / min(image.size)
                if self.resize
                else max(height / image.height, width / image.width)
            )
            target = (
                max(1, round(image.width * factor)),
                max(1, round(image.height * factor)),
            )
        if target == image.size:
            return image
        from PIL import Image

        return image.resize(target, Image.Resampling[self.interpolation.upper()])


def is_image(x: Any) -> bool:
    """Whether `x` is a PIL image; there is none while nobody has imported PIL."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(x, module.Image)


def _as_image(picture: Any) -> Image.Image:
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise InputError(
            f"a picture is a PIL image or a uint8 array (H, W, C), got {pixels.dtype} of shape"
            f" {pixels.shape}"
        )
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"a picture has 1, 3 or 4 channels last, got shape {pixels.shape}")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
