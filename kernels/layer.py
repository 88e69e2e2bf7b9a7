"""A convolution layer as kernels see it: its weights and what decides which kernel can serve it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from logshift.kernels.codec import LogWeights


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of shape (O, kh, kw, C / group), the group count, and the bits of the input codes."""

    weights: LogWeights
    group: int
    activation_bits: int

    @cached_property
    def integers(self) -> np.ndarray:
        """W, int32, (O, kh, kw, C / group)."""
        return self.weights.integers()

    @cached_property
    def accumulator_bound(self) -> int:
        """Largest |acc| that any input codes can lead to, for any channel."""
        sums = np.abs(self.integers).sum(axis=(1, 2, 3), dtype=np.int64)
        return int(sums.max(initial=0)) * (2**self.activation_bits - 1)

    @property
    def is_depthwise(self) -> bool:
        """Every output channel reads exactly the input channel of its own number."""
        return self.integers.shape[3] == 1 and self.group == self.integers.shape[0]
