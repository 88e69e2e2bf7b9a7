"""PASCAL VOC 2012, semantic segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logshift.trainer.data import pictures
from logshift.trainer.data.base import Batch, FileDataSet, layout_error

LAYOUT = """\
VOCdevkit/VOC2012/JPEGImages/*.jpg
VOCdevkit/VOC2012/SegmentationClass/*.png
VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt, val.txt
and for the larger training set:
VOCdevkit/VOC2012/SegmentationClassAug/*.png
VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"""


class Voc(FileDataSet):
    """PASCAL VOC 2012.

    Parameters
    ----------
    root : Path
        The folder of `VOCdevkit`.
    workers : int
        Processes that read; 0 reads in this one.
    crop : int
        Height and width of training crops.

    Raises
    ------
    DataError
        If it is not there.
    """

    labels = tuple(
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
        "motorbike person pottedplant sheep sofa train tvmonitor".split()
    )
    test_batch = 1

    def __init__(self, root: Path, workers: int = 8, crop: int = 513) -> None:
        self.folder = root / "VOCdevkit" / "VOC2012"
        lists = self.folder / "ImageSets" / "Segmentation"
        augmented = (lists / "trainaug.txt").is_file()
        labels = "SegmentationClassAug" if augmented else "SegmentationClass"
        train = self._items(root, lists / ("trainaug.txt" if augmented else "train.txt"), labels)
        test = self._items(root, lists / "val.txt", "SegmentationClass")
        super().__init__(train, test, workers)
        self.crop = crop
        self.shape = (3, crop, crop)
        self.calibration_size = crop
        self.preprocessing = pictures.preprocessing(None, [crop, crop])

    def _items(self, root: Path, names: Path, labels: str) -> list[tuple[Path, Path]]:
        if not names.is_file():
            raise layout_error(root, f"no {names.relative_to(root)}", LAYOUT)
        items = []
        for name in names.read_text().split():
            picture = self.folder / "JPEGImages" / f"{name}.jpg"
            label = self.folder / labels / f"{name}.png"
            for path in (picture, label):
                if not path.is_file():
                    raise layout_error(root, f"no {path.relative_to(root)}", LAYOUT)
            items.append((picture, label))
        if not items:
            raise layout_error(root, f"{names.relative_to(root)} is empty", LAYOUT)
        return items

    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return a picture and the classes of its pixels, 255 for those that do not count."""
        return pictures.segmented(item, (0.5, 2.0), (self.crop, self.crop), random)

    def class_shares(self) -> Tensor:
        """Return the shares of pixels; see `DataSet.class_shares`."""
        return pictures.class_shares(self.train_items, len(self.labels))
