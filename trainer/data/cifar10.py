"""CIFAR-10: 32x32 pictures of ten classes."""

from __future__ import annotations

from pathlib import Path

import torch

from logshift.trainer.data.base import layout_error
from logshift.trainer.data.cifar import Cifar, Examples

LAYOUT = """\
cifar10-train.parquet   columns image (JPEG or PNG bytes) and label (0 to 9)
cifar10-test.parquet
or the original files:
cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch"""


class Cifar10(Cifar):
    """CIFAR-10; see `Cifar`."""

    name = "CIFAR-10"
    layout = LAYOUT
    labels = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

    def _originals(self, root: Path, table: str) -> tuple[Examples, Examples]:
        batches = root / "cifar-10-batches-py"
        if not batches.is_dir():
            raise layout_error(root, f"no {table} and no {batches.name}", LAYOUT)
        parts = [self._pickled(batches / f"data_batch_{i}", b"labels") for i in range(1, 6)]
        images, targets = zip(*parts, strict=True)
        test = self._pickled(batches / "test_batch", b"labels")
        return (torch.cat(images), torch.cat(targets)), test
