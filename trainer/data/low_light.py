"""Low light, simulated from photographs: what a sensor would have seen in the dark.

A photograph is taken back to linear light behind a Bayer filter (as by Brooks et al., "Unprocessing
images for learned raw denoising", 2019, with fixed colours), darkened 100 to 300 times, given shot
noise and read noise, and rounded to 14 bits. The input is that, amplified again; the target is the
photograph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from logshift.trainer.data import bayer, pictures
from logshift.trainer.data.base import Batch, DataError, FileDataSet, layout_error
from logshift.trainer.data.tables import columns

LAYOUT = """\
a Parquet file with the column image (JPEG or PNG bytes),
or a folder of pictures, *.jpg, *.jpeg or *.png"""

_RATIO = (100.0, 300.0)
# Camera RGB from linear sRGB, a usual sensor's mixing; rows sum to 1, so grey stays grey.
_CAMERA = np.array([[0.66, 0.28, 0.06], [0.15, 0.71, 0.14], [0.03, 0.23, 0.74]], np.float32)
_WHITE_BALANCE = np.array([2.0, 1.0, 1.6], np.float32)
_FULL_WELL = 12_000.0  # electrons at white
_READ_NOISE = 3.0  # electrons
_TOP = 2**14 - 1 - 512  # codes above black


class LowLight(FileDataSet):
    """Photographs and what they would be in the dark; every fifth is for testing.

    Parameters
    ----------
    root : Path
        Parquet file or folder.
    workers : int
        Processes that read; 0 reads in this one.
    crop : int
        Height and width of training crops in the photograph, even.
    test_crop : int
        The same for testing; the middle is taken.
    repeat : int
        Crops of each photograph in an epoch.

    Raises
    ------
    DataError
        If it is not there, or crops are odd.
    """

    def __init__(
        self, root: Path, workers: int = 0, crop: int = 128, test_crop: int = 224, repeat: int = 1
    ) -> None:
        if crop % 2 or test_crop % 2:
            raise DataError(f"crops of {crop} and {test_crop}: both must be even")
        sources: list[Any]
        if root.is_file():
            (sources,) = columns(root, "image", layout=LAYOUT)
        else:
            suffixes = {".jpg", ".jpeg", ".png"}
            sources = sorted(p for p in root.glob("*") if p.suffix.lower() in suffixes)
        if len(sources) < 5:
            raise layout_error(root, f"{len(sources)} pictures, fewer than 5", LAYOUT)
        items = list(enumerate(sources))
        test = items[::5]
        train = [item for item in items if item[0] % 5]
        super().__init__(train * repeat, test, workers)
        self.crop, self.test_crop = crop, test_crop
        self.shape = (4, test_crop // 2, test_crop // 2)

    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return a dark picture (4, H / 2, W / 2), amplified, and the photograph (3, H, W)."""
        number, source = item
        picture = pictures.read(source)
        size = self.test_crop if random is None else self.crop
        if min(picture.size) < size:
            picture = pictures.shorter_side(picture, size)
        if random is None:
            random, picture = np.random.default_rng(number), pictures.centre_crop(picture, size)
        else:
            left = int(random.integers(0, picture.width - size + 1))
            top = int(random.integers(0, picture.height - size + 1))
            picture = picture.crop((left, top, left + size, top + size))
            if random.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(picture, np.float32) / 255
        raw = darkened(pixels, random)
        return torch.from_numpy(raw), torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def darkened(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return what a sensor sees in the dark, amplified to the photograph's brightness.

    Parameters
    ----------
    pixels : float32 array of shape (H, W, 3)
        sRGB in 0 to 1; H and W even.
    random : Generator
        Draws the darkness and the noise.

    Returns
    -------
    float32 array of shape (4, H / 2, W / 2), in 0 to 1.
    """
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    camera = linear @ _CAMERA.T / _WHITE_BALANCE
    mosaic = camera[..., 1].copy()
    mosaic[0::2, 0::2] = camera[0::2, 0::2, 0]
    mosaic[1::2, 1::2] = camera[1::2, 1::2, 2]
    ratio = np.exp(random.uniform(*np.log(_RATIO)))
    electrons = random.poisson(mosaic / ratio * _FULL_WELL)
    electrons = electrons + random.normal(0, _READ_NOISE, mosaic.shape)
    codes = np.rint(electrons / _FULL_WELL * _TOP)  # read noise goes below black, as in raw files
    raw = bayer.pack(codes / _TOP * ratio)
    return np.clip(raw, 0, 1).astype(np.float32)
