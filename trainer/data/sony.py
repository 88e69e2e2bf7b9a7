"""See-in-the-Dark, the Sony set: short exposures as raw files, and long ones of the same scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rawpy
import torch

from logshift.trainer.data import bayer
from logshift.trainer.data.base import Batch, DataError, FileDataSet, layout_error

LAYOUT = """\
Sony/short/*.ARW
Sony/long/*.ARW
Sony_train_list.txt, Sony_test_list.txt   lines as
    ./Sony/short/00001_00_0.1s.ARW ./Sony/long/00001_00_10s.ARW ISO200 F8"""

_BLACK, _WHITE = 512, 16383
_MOST = 300.0  # times that an exposure is amplified


def read_short(path: Path) -> np.ndarray:
    """Return a short exposure's mosaic less the black level, float32 (H, W), white is 1."""
    try:
        with rawpy.imread(str(path)) as raw:
            mosaic = raw.raw_image_visible.astype(np.float32)
    except rawpy.LibRawError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return np.maximum(mosaic - _BLACK, 0) / (_WHITE - _BLACK)


def read_long(path: Path) -> np.ndarray:
    """Return a long exposure developed by LibRaw, float32 (H, W, 3) in 0 to 1."""
    try:
        with rawpy.imread(str(path)) as raw:
            developed = raw.postprocess(
                use_camera_wb=True, half_size=False, no_auto_bright=True, output_bps=16
            )
    except rawpy.LibRawError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return developed.astype(np.float32) / 65535


class Sony(FileDataSet):
    """The Sony set of See-in-the-Dark.

    Parameters
    ----------
    root : Path
        Folder of `Sony/` and the lists.
    workers : int
        Processes that read; 0 reads in this one.
    crop : int
        Height and width of training crops in the packed planes.
    kept : int
        Long exposures that each process keeps in memory, each about 150 MB; several short ones
        belong to each.
    short, long : callable
        How files are read.

    Raises
    ------
    DataError
        If it is not there.
    """

    shape = (4, 1424, 2128)
    test_batch = 1

    def __init__(
        self,
        root: Path,
        workers: int = 4,
        crop: int = 512,
        kept: int = 8,
        short: Callable[[Path], np.ndarray] = read_short,
        long: Callable[[Path], np.ndarray] = read_long,
    ) -> None:
        train, test = (self._items(root, split) for split in ("train", "test"))
        super().__init__(train, test, workers)
        self.crop, self.short, self.long, self.kept = crop, short, long, kept
        self.calibration_size = crop
        self._pictures: dict[Path, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process is sent: not the pictures that this one keeps."""
        return self.__dict__ | {"_pictures": {}}

    @staticmethod
    def _items(root: Path, split: str) -> list[tuple[Path, Path, float]]:
        names = root / f"Sony_{split}_list.txt"
        if not names.is_file():
            raise layout_error(root, f"no {names.name}", LAYOUT)
        items = []
        for line in names.read_text().splitlines():
            if not line.strip():
                continue
            fields = line.split()
            if len(fields) < 2:
                raise layout_error(root, f"{names.name} has the line {line!r}", LAYOUT)
            short, long = (root / field for field in fields[:2])
            for path in (short, long):
                if not path.is_file():
                    raise layout_error(root, f"no {path.relative_to(root)}", LAYOUT)
            try:
                ratio = min(_exposure(long) / _exposure(short), _MOST)
            except (ValueError, ZeroDivisionError):
                fault = f"{names.name} has the line {line!r} without exposure times"
                raise layout_error(root, fault, LAYOUT) from None
            items.append((short, long, ratio))
        if not items:
            raise layout_error(root, f"{names.name} is empty", LAYOUT)
        return items

    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return an amplified short exposure (4, H / 2, W / 2) and the long one (3, H, W)."""
        short, long, ratio = item
        raw = np.minimum(bayer.pack(self.short(short)) * np.float32(ratio), 1)
        picture = self._picture(long).transpose(2, 0, 1)
        if random is not None:
            raw, picture = bayer.augment(raw, picture, self.crop, random)
        return torch.from_numpy(raw), torch.from_numpy(np.ascontiguousarray(picture))

    def _picture(self, path: Path) -> np.ndarray:
        """Return a long exposure; the last ones that were used are kept."""
        picture = self._pictures.pop(path, None)
        self._pictures[path] = self.long(path) if picture is None else picture
        picture = self._pictures[path]
        while len(self._pictures) > self.kept:
            del self._pictures[next(iter(self._pictures))]
        return picture


def _exposure(path: Path) -> float:
    """Return the exposure time in seconds that a name such as 00001_00_0.1s.ARW ends with."""
    return float(path.stem.rpartition("_")[2].rstrip("s"))
