"""What CIFAR-10 and CIFAR-100 have in common: 32x32 pictures, all of them in memory."""

from __future__ import annotations

import io
import pickle
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logshift.trainer.data import pictures
from logshift.trainer.data.base import Batch, DataError, DataSet, layout_error, order
from logshift.trainer.data.tables import columns

Examples = tuple[Tensor, Tensor]  # pictures, uint8 (N, 3, 32, 32), and their classes

_PAD = 4  # crops are taken from pictures mirrored outwards by so many pixels
_PIXELS = 3 * 32 * 32


class Cifar(DataSet):
    """CIFAR-10 or CIFAR-100.

    Parameters
    ----------
    root : Path
        Folder with the Parquet files, or with the folder of the original ones.

    Attributes
    ----------
    name : str
    layout : str
        What is expected there.

    Raises
    ------
    DataError
        If it is not there.
    """

    name: str
    layout: str
    shape = (3, 32, 32)
    preprocessing = pictures.preprocessing(32, [32, 32])

    def __init__(self, root: Path) -> None:
        stem = self.name.replace("-", "").lower()
        tables = [root / f"{stem}-{split}.parquet" for split in ("train", "test")]
        if tables[0].is_file():
            train, test = (self._parquet(table) for table in tables)
        else:
            train, test = self._originals(root, tables[0].name)
        self.images, self.targets = train
        self.test_images, self.test_targets = test
        self.size = len(self.targets)
        # Every crop is a view: crops[i, :, y, x] is picture i moved by (y, x).
        pad = ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD))
        padded = np.pad(self.images.numpy(), pad, mode="reflect")
        self.crops = torch.from_numpy(padded).unfold(2, 32, 1).unfold(3, 32, 1)

    @abstractmethod
    def _originals(self, root: Path, table: str) -> tuple[Examples, Examples]:
        """Return both sets from the original files; `table` is what was looked for before."""

    def train(
        self, epoch: int, batch: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """Yield batches of pictures moved by up to 4 pixels and mirrored; see `DataSet.train`."""
        indices = order(self.size, epoch, seed)
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch + 500_000)
        dy, dx = torch.randint(0, 2 * _PAD + 1, (2, self.size), generator=random)
        mirror = torch.rand(self.size, generator=random) < 0.5
        for step in range(start, self.steps(batch)):
            pick = indices[step * batch : (step + 1) * batch][rank::ranks]
            x = self.crops[pick, :, dy[pick], dx[pick]]
            x = torch.where(mirror[pick, None, None, None], x.flip(3), x)
            yield _input(x), self.targets[pick]

    def test(self, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield the test pictures; see `DataSet.test`."""
        images, targets = self.test_images[rank::ranks], self.test_targets[rank::ranks]
        for x, target in zip(images.split(batch), targets.split(batch), strict=True):
            yield _input(x), target

    def calibration(self, count: int) -> Tensor:
        """Return training pictures; see `DataSet.calibration`."""
        return _input(self.images[:: max(1, self.size // count)][:count])

    def _parquet(self, path: Path) -> Examples:
        images, labels = columns(path, "image", "label", layout=self.layout)
        pixels = []
        for row, image in enumerate(images):
            try:
                pixels.append(pictures.to_tensor(pictures.read(image)))
            except DataError as error:
                raise DataError(f"{path}, row {row}: {error}") from error
        if not pixels or any(p.shape != (3, 32, 32) for p in pixels):
            raise DataError(f"{path}: there are pictures that are not 32x32, or none at all")
        return torch.stack(pixels), self._targets(path, labels, len(pixels))

    def _pickled(self, path: Path, key: bytes) -> Examples:
        """Read an original file for Python, with the classes under `key`."""
        content = self._bytes(path)
        try:
            found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
            pixels = np.asarray(found[b"data"], np.uint8).reshape(-1, 3, 32, 32)
            targets = self._targets(path, found[key], len(pixels))
            return torch.from_numpy(pixels.copy()), targets
        except DataError:
            raise
        except Exception as error:  # damaged pickles raise many kinds
            raise DataError(f"{path}: not a batch of {self.name}: {error}") from error

    def _binary(self, path: Path, labels: int) -> Examples:
        """Read an original file of records: `labels` bytes, the last the class, and pixels."""
        content = self._bytes(path)
        record = labels + _PIXELS
        if not content or len(content) % record:
            raise DataError(
                f"{path}: not a batch of {self.name}: {len(content)} bytes are not records of "
                f"{record}"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        pixels = records[:, labels:].reshape(-1, 3, 32, 32)
        targets = self._targets(path, records[:, labels - 1].tolist(), len(records))
        return torch.from_numpy(pixels.copy()), targets

    def _bytes(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise layout_error(path.parent.parent, f"no {path.name}", self.layout) from None

    def _targets(self, path: Path, labels: list[int], count: int) -> Tensor:
        last = len(self.labels) - 1
        if len(labels) != count or not all(label in range(last + 1) for label in labels):
            raise DataError(f"{path}: labels are not {count} integers from 0 to {last}")
        return torch.tensor(labels, dtype=torch.int64)


def _input(pixels: Tensor) -> Tensor:
    return pictures.normalise(pixels).contiguous(memory_format=torch.channels_last)


class _Unpickler(pickle.Unpickler):
    """Reads what the original files hold and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of CIFAR")
