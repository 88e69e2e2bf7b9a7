"""CIFAR-10: 32x32 pictures of ten classes, all of them in memory."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logshift.trainer.data import pictures
from logshift.trainer.data.base import Batch, DataError, DataSet, layout_error, order
from logshift.trainer.data.tables import columns

LAYOUT = """\
cifar10-train.parquet   columns image (JPEG or PNG bytes) and label (0 to 9)
cifar10-test.parquet
or the original files:
cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch"""

_PAD = 4  # crops are taken from pictures mirrored outwards by so many pixels


class Cifar10(DataSet):
    """CIFAR-10.

    Parameters
    ----------
    root : Path
        Folder with the Parquet files, or with `cifar-10-batches-py`.

    Raises
    ------
    DataError
        If it is not there.
    """

    labels = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
    shape = (3, 32, 32)
    preprocessing = pictures.preprocessing(32, [32, 32])

    def __init__(self, root: Path) -> None:
        batches = root / "cifar-10-batches-py"
        if (root / "cifar10-train.parquet").is_file():
            train = _parquet(root / "cifar10-train.parquet")
            test = _parquet(root / "cifar10-test.parquet")
        elif batches.is_dir():
            parts = [_original(batches / f"data_batch_{i}") for i in range(1, 6)]
            images, targets = zip(*parts, strict=True)
            train = torch.cat(images), torch.cat(targets)
            test = _original(batches / "test_batch")
        else:
            raise layout_error(root, "no cifar10-train.parquet and no cifar-10-batches-py", LAYOUT)
        self.images, self.targets = train
        self.test_images, self.test_targets = test
        self.size = len(self.targets)
        # Every crop is a view: crops[i, :, y, x] is picture i moved by (y, x).
        pad = ((0, 0), (0, 0), (_PAD, _PAD), (_PAD, _PAD))
        padded = np.pad(self.images.numpy(), pad, mode="reflect")
        self.crops = torch.from_numpy(padded).unfold(2, 32, 1).unfold(3, 32, 1)

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


def _input(pixels: Tensor) -> Tensor:
    return pictures.normalise(pixels).contiguous(memory_format=torch.channels_last)


def _parquet(path: Path) -> tuple[Tensor, Tensor]:
    images, labels = columns(path, "image", "label", layout=LAYOUT)
    pixels = []
    for row, image in enumerate(images):
        try:
            pixels.append(pictures.to_tensor(pictures.read(image)))
        except DataError as error:
            raise DataError(f"{path}, row {row}: {error}") from error
    if not pixels or any(p.shape != (3, 32, 32) for p in pixels):
        raise DataError(f"{path}: there are pictures that are not 32x32, or none at all")
    return torch.stack(pixels), _targets(path, labels, len(pixels))


def _targets(path: Path, labels: list[int], count: int) -> Tensor:
    if len(labels) != count or not all(label in range(10) for label in labels):
        raise DataError(f"{path}: labels are not {count} integers from 0 to 9")
    return torch.tensor(labels, dtype=torch.int64)


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
        raise pickle.UnpicklingError(f"{module}.{name} is not part of CIFAR-10")


def _original(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        targets = _targets(path, content[b"labels"], len(pixels))
        return torch.from_numpy(pixels.copy()), targets
    except FileNotFoundError:
        raise layout_error(path.parent.parent, f"no {path.name}", LAYOUT) from None
    except DataError:
        raise
    except Exception as error:  # damaged pickles raise many kinds
        raise DataError(f"{path}: not a batch of CIFAR-10: {error}") from error
