"""A convolution of a plan: its kernel, its weights as that wants them, and where it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from logshift.kernels.activation import Target
from logshift.kernels.layer import FloatLayer, Layer, Packed
from logshift.kernels.registry import Kernel
from logshift.runtime.plan.work import DEPTHWISE


@dataclass(frozen=True)
class Phase:
    """Which outputs a convolution computes, and from where; of pairs, rows and columns.

    Output `begin + i * step` is computed from a window that begins at input `first + i * stride`.
    A Conv is one phase of all outputs; a ConvTranspose has several, of a stride of 1. Of several
    that are joined an output is some pixels side by side.
    """

    first: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    begin: tuple[int, int] = (0, 0)
    steps: tuple[int, int] = (1, 1)
    pixels: int = 1

    def count(self, axis: int, size: int) -> int:
        """Return how many of `size` outputs along an axis (0 rows, 1 columns) it computes."""
        return -(-(size - self.begin[axis]) // self.steps[axis])


@dataclass(frozen=True, eq=False)
class Convolution:
    """What a phase of a Conv or ConvTranspose needs at every run, whatever the input size."""

    kernel: Kernel
    layer: Layer | FloatLayer
    packed: Packed
    phase: Phase
    target: Target  # what results are before they are rounded

    @cached_property
    def work(self) -> int:
        """Work of one output."""
        products = math.prod(self.layer.weights.shape[1:])
        return products * (DEPTHWISE if self.layer.is_depthwise else 1)
