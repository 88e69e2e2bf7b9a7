"""What a data set is, and what those that read files example by example have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Batch = tuple[Tensor, Tensor]


class DataError(ValueError):
    """A data set that is not there, or not as expected."""


class DataSet(ABC):
    """Inputs and targets for training and testing.

    Attributes
    ----------
    labels : tuple of str
        Class names; empty if there are no classes.
    shape : tuple of int
        (C, H, W) of an input; H and W are typical where sizes vary.
    preprocessing : dict or None
        How a picture becomes an input, in the terms of the packed file.
    size : int
        Training examples.
    """

    labels: tuple[str, ...] = ()
    shape: tuple[int, int, int]
    preprocessing: dict[str, Any] | None = None
    size: int

    def steps(self, batch: int) -> int:
        """Return the batches of an epoch; what does not fill one is left out."""
        return self.size // batch

    @abstractmethod
    def train(
        self, epoch: int, batch: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Order and augmentation follow from `seed` and `epoch` alone.

        Parameters
        ----------
        epoch, batch, seed : int
            `batch` counts the examples of all ranks together.
        rank, ranks : int
            Of each batch this rank gets examples `rank`, `rank + ranks` and so on.
        start : int
            Batches to leave out, for runs that go on.

        Yields
        ------
        x, target : Tensor
        """

    @abstractmethod
    def test(self, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield the test set, or this rank's part of it, in batches of at most `batch`."""

    @abstractmethod
    def calibration(self, count: int) -> Tensor:
        """Return `count` training inputs, or all if there are fewer, not augmented."""

    def class_shares(self) -> Tensor:
        """Return the share of each class in the training targets, float64, summing to 1."""
        raise DataError(f"{type(self).__name__} cannot tell the shares of its classes")


def order(size: int, epoch: int, seed: int) -> Tensor:
    """Return a permutation that follows from epoch and seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def layout_error(root: Path, missing: str, layout: str) -> DataError:
    """Return the error for a data set that is not as expected.

    Parameters
    ----------
    root : Path
        Where it was looked for.
    missing : str
        What was not found.
    layout : str
        The layout that is expected.
    """
    return DataError(f"{root}: {missing}; expected\n{layout}")


class _Examples(Dataset):
    def __init__(self, data: FileDataSet, items: Sequence[Any], seed: tuple[int, int] | None):
        self.data, self.items, self.seed = data, items, seed

    def __getitem__(self, index: int) -> Batch | DataError:
        # A worker process, another rank or a run that goes on draws the same for an example.
        random = None if self.seed is None else np.random.default_rng([*self.seed, index])
        try:
            return self.data.example(self.items[index], random)
        except DataError as error:  # which a worker process would dress up if it were raised there
            return DataError(f"example {index}: {error}")


def _batch(examples: list[Any]) -> Any:
    error = next((e for e in examples if isinstance(e, DataError)), None)
    return error or default_collate(examples)


class FileDataSet(DataSet):
    """A data set whose examples are read one by one.

    Parameters
    ----------
    train, test : sequence
        What `example` is given for each example.
    workers : int
        Processes that read; 0 reads in this one.
    """

    test_batch: int | None = None  # at most; 1 where pictures differ in size
    calibration_size: int | None = None  # the middle is taken; where they differ or are large

    def __init__(self, train: Sequence[Any], test: Sequence[Any], workers: int) -> None:
        self.train_items, self.test_items, self.workers = train, test, workers
        self.size = len(train)

    @abstractmethod
    def example(self, item: Any, random: np.random.Generator | None) -> Batch:
        """Return input and target of an example, augmented if there is a generator."""

    def train(
        self, epoch: int, batch: int, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch; see `DataSet.train`."""
        indices = order(self.size, epoch, seed).tolist()
        batches = [
            indices[step * batch : (step + 1) * batch][rank::ranks]
            for step in range(start, self.steps(batch))
        ]
        examples = _Examples(self, self.train_items, (seed, epoch))
        yield from self._load(examples, batches)

    def test(self, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield the test set; see `DataSet.test`."""
        indices = list(range(rank, len(self.test_items), ranks))
        batch = min(batch, self.test_batch or batch)
        batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        yield from self._load(_Examples(self, self.test_items, None), batches)

    def _load(self, examples: _Examples, batches: list[list[int]]) -> Iterator[Batch]:
        # With a generator of its own it draws nothing from the one that networks draw from.
        loader = DataLoader(
            examples,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_batch,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def calibration(self, count: int) -> Tensor:
        """Return training inputs that are not augmented; see `DataSet.calibration`."""
        step = max(1, self.size // count)
        items = self.train_items[::step][:count]
        inputs = [self.example(item, None)[0] for item in items]
        if self.calibration_size:
            inputs = [middle(x, self.calibration_size) for x in inputs]
        return torch.stack(inputs)


def middle(x: Tensor, size: int) -> Tensor:
    """Return the middle of (C, H, W), (C, size, size), with zeros around what is smaller."""
    _, height, width = x.shape
    left, top = (width - size) // 2, (height - size) // 2  # negative: so many zeros
    edges = (-left, size - width + left, -top, size - height + top)
    return F.pad(x, edges).contiguous()
