"""ImageNet, ILSVRC 2012: a folder for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from logshift.trainer.data import pictures
from logshift.trainer.data.base import Batch, FileDataSet, layout_error

LAYOUT = """\
train/<class>/*.JPEG   one folder for each class, such as n01440764
val/<class>/*.JPEG     the same folders"""


class ImageNet(FileDataSet):
    """ImageNet; classes are numbered in the order of their folders' names.

    Parameters
    ----------
    root : Path
    workers : int
        Processes that read; 0 reads in this one.
    size : int
        Height and width of inputs.

    Raises
    ------
    DataError
        If it is not there.
    """

    def __init__(self, root: Path, workers: int = 8, size: int = 224) -> None:
        folders = [root / "train", root / "val"]
        for folder in folders:
            if not folder.is_dir():
                raise layout_error(root, f"no folder {folder.name}", LAYOUT)
        self.labels = tuple(sorted(p.name for p in folders[0].iterdir() if p.is_dir()))
        train, test = (self._files(root, folder) for folder in folders)
        super().__init__(train, test, workers)
        self.crop = size
        self.shape = (3, size, size)
        self.resize = round(size * 256 / 224)
        self.preprocessing = pictures.preprocessing(self.resize, [size, size])

    def _files(self, root: Path, folder: Path) -> list[tuple[Path, int]]:
        suffixes = {".jpeg", ".jpg", ".png"}
        found = []
        for number, label in enumerate(self.labels):
            if not (folder / label).is_dir():
                raise layout_error(root, f"no folder {folder.name}/{label}", LAYOUT)
            files = sorted(p for p in (folder / label).iterdir() if p.suffix.lower() in suffixes)
            found += [(path, number) for path in files]
        if not found:
            raise layout_error(root, f"no pictures in {folder.name}", LAYOUT)
        return found

    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return a picture and its class."""
        path, number = item
        picture = pictures.read(path)
        if random is None:
            picture = pictures.shorter_side(picture, self.resize)
            pixels = pictures.to_tensor(pictures.centre_crop(picture, self.crop))
        else:
            picture = pictures.random_resized_crop(picture, self.crop, random)
            pixels = pictures.to_tensor(picture)
            if random.random() < 0.5:
                pixels = pixels.flip(-1)
        return pictures.normalise(pixels), torch.tensor(number)
