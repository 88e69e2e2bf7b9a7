"""CamVid: street scenes of 480x360 pixels, eleven classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logshift.trainer.data import pictures
from logshift.trainer.data.base import Batch, FileDataSet, layout_error
from logshift.trainer.data.tables import columns

LAYOUT = """\
camvid-train.parquet   columns image (JPEG or PNG bytes) and annotation (PNG bytes, 11 for void)
camvid-test.parquet
or folders of PNG files:
train/, trainannot/, test/, testannot/"""

_VOID = 11


class CamVid(FileDataSet):
    """CamVid in the usual split of 367 pictures for training and 233 for testing.

    Parameters
    ----------
    root : Path
    workers : int
        Processes that read; 0 reads in this one.
    crop : list of int
        Height and width of training crops.
    scale : list of float
        Smallest and largest factor that training pictures are scaled by.

    Raises
    ------
    DataError
        If it is not there.
    """

    labels = tuple(
        "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    )
    shape = (3, 360, 480)
    preprocessing = pictures.preprocessing([360, 480], [360, 480])

    def __init__(
        self,
        root: Path,
        workers: int = 0,
        crop: Sequence[int] = (240, 320),
        scale: Sequence[float] = (0.6, 1.4),
    ) -> None:
        train, test = (self._items(root, split) for split in ("train", "test"))
        super().__init__(train, test, workers)
        self.crop, self.scale = (crop[0], crop[1]), (scale[0], scale[1])

    @staticmethod
    def _items(root: Path, split: str) -> list[tuple[Any, Any]]:
        table = root / f"camvid-{split}.parquet"
        if table.is_file():
            return list(zip(*columns(table, "image", "annotation", layout=LAYOUT), strict=True))
        images = sorted((root / split).glob("*.png"))
        if not images:
            raise layout_error(root, f"no {table.name} and no pictures in {split}/", LAYOUT)
        items = [(image, root / f"{split}annot" / image.name) for image in images]
        for _, labels in items:
            if not labels.is_file():
                raise layout_error(root, f"no {split}annot/{labels.name}", LAYOUT)
        return items

    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return a picture and the classes of its pixels, 255 for those that do not count."""
        x, classes = pictures.segmented(item, self.scale, self.crop, random)
        return x, classes.masked_fill(classes >= _VOID, pictures.VOID)

    def class_shares(self) -> Tensor:
        """Return the shares of pixels; see `DataSet.class_shares`."""
        return pictures.class_shares(self.train_items, len(self.labels))
