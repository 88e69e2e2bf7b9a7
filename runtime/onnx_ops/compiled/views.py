"""Tensors that are others in another order: kernels read them where those lie, if they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logshift.runtime.graph import Shape


@dataclass(frozen=True)
class View:
    """Elements of a float32 tensor that lies as ONNX has it.

    Attributes
    ----------
    name : str
        Of the tensor.
    start : int
        Which of its elements is the first one.
    shape : Shape
    steps : tuple of int
        How far apart elements are, along each axis.
    """

    name: str
    start: int
    shape: Shape
    steps: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether its elements follow each other, from the first of the tensor on."""
        pairs = zip(self.shape, self.steps, contiguous(self.shape), strict=True)
        return self.start == 0 and all(step == own for n, step, own in pairs if n != 1)

    def transposed(self, order: Sequence[int]) -> View:
        """Return it with its axes in another order."""
        shape, steps = (tuple(v[axis] for axis in order) for v in (self.shape, self.steps))
        return View(self.name, self.start, shape, steps)

    def repeated(self, shape: Shape) -> View:
        """Return it repeated to another shape."""
        steps = [0 if n == 1 else step for n, step in zip(self.shape, self.steps, strict=True)]
        more = len(shape) - len(steps)
        return View(self.name, self.start, shape, (*[0] * more, *steps))

    def reshaped(self, shape: Shape) -> View | None:
        """Return it in another shape, None if elements that shall be an axis are no even steps."""
        rows = merged(self.shape, self.steps)
        steps: list[int] = []
        size, step = rows.pop() if rows else (1, 1)
        for count in reversed(shape):
            if size == 1 and rows:
                size, step = rows.pop()
            if size % count:
                return None
            steps.append(step)
            size, step = size // count, step * count
        return View(self.name, self.start, shape, tuple(reversed(steps)))

    def parts(self, axis: int, first: int, step: int, count: int) -> View:
        """Return some of its positions along an axis."""
        shape, steps = list(self.shape), list(self.steps)
        start = self.start + first * steps[axis]
        shape[axis], steps[axis] = count, steps[axis] * step
        return View(self.name, start, tuple(shape), tuple(steps))

    def dummy(self) -> np.ndarray:
        """Return an array whose views are alike; there is no memory behind it."""
        strides = [4 * step for step in self.steps]
        return np.lib.stride_tricks.as_strided(np.empty(1, np.float32), self.shape, strides)

    def like(self, whole: np.ndarray, part: np.ndarray) -> View:
        """Return what is to it what a part is to its `dummy`."""
        start = self.start + (part.ctypes.data - whole.ctypes.data) // 4
        return View(self.name, start, part.shape, tuple(step // 4 for step in part.strides))


def plain(name: str, shape: Shape) -> View:
    """Return a tensor as it lies."""
    return View(name, 0, shape, tuple(contiguous(shape)))


def contiguous(shape: Sequence[int]) -> list[int]:
    """Return the steps of a contiguous tensor."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return steps[::-1][: len(shape)]


def merged(shape: Sequence[int], steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return sizes and steps of as few axes as there can be."""
    rows: list[tuple[int, int]] = []
    for size, step in zip(shape, steps, strict=True):
        if size == 1:
            continue
        if rows and rows[-1][1] == size * step:
            rows[-1] = rows[-1][0] * size, step
        else:
            rows.append((size, step))
    return rows
