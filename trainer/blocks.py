"""What second words are chosen for together: weights, tiles or filters.

A layer's weights are a matrix (O, K), K in the order kh, kw, C / group. A *tile* is what an
accelerator with an array of Tn inputs by Tm outputs (DianNao's 16 by 16) works on at once: Tn input
channels by Tm output channels at one kernel position. Tiles at the edges are smaller, and none has
outputs of two groups, which read other inputs; but one of a depthwise layer is Tm consecutive
channels at one position, each with its one input.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Granularity = Literal["element", "tile", "filter"]
MAX_TILE = 256


class Blocks:
    """The blocks of a layer's weights.

    Parameters
    ----------
    outputs, positions, inputs : int
        O, kh * kw, C / group.
    groups : int
    granularity : {"element", "tile", "filter"}
        Whether a block is a weight, a tile, or an output channel.
    tile : int or (int, int)
        Tn and Tm, inputs by outputs; or the length of a run of consecutive weights of the flattened
        matrix, which no array works on at once.

    Attributes
    ----------
    shape : tuple of int
        Of a tensor with one element for each block: (O, K) for elements, (O, 1) for filters, (n, 1)
        for runs, and (ceil(O / Tm), kh * kw * ceil(C / Tn)) for tiles, those of all groups one
        below the other.
    """

    def __init__(
        self,
        outputs: int,
        positions: int,
        inputs: int,
        groups: int = 1,
        granularity: Granularity = "element",
        tile: int | tuple[int, int] = (16, 16),
    ) -> None:
        self.rows = outputs, positions * inputs
        # (group, output, position, input), of which `_side` outputs and inputs make a block.
        self._grid = groups, outputs // groups, positions, inputs
        if inputs == 1:
            self._grid = 1, outputs, positions, 1
        if granularity == "element":
            self._grid, self._side = (1, outputs, 1, self.rows[1]), (1, 1)
        elif granularity == "filter":
            self._grid, self._side = (1, outputs, 1, self.rows[1]), (1, self.rows[1])
        elif isinstance(tile, int):
            self._grid, self._side = (1, 1, 1, outputs * self.rows[1]), (1, tile)
        else:
            self._side = tile[1], tile[0]
        groups, outputs, positions, inputs = self._grid
        self._count = -(-outputs // self._side[0]), -(-inputs // self._side[1])
        self.shape = groups * self._count[0], positions * self._count[1]
        if granularity == "tile" and isinstance(tile, int):
            self.shape = self._count[1], 1

    def sum(self, x: Tensor) -> Tensor:
        """Add up what the weights of each block have.

        Parameters
        ----------
        x : Tensor of shape (O, K)

        Returns
        -------
        Tensor of `shape`
        """
        if self._side == (1, 1):
            return x.reshape(self.shape)
        groups, outputs, positions, inputs = self._grid
        (high, wide), (down, across) = self._side, self._count
        x = x.reshape(self._grid)
        x = pad(x, (0, across * wide - inputs, 0, 0, 0, down * high - outputs))
        x = x.reshape(groups, down, high, positions, across, wide)
        return x.sum((2, 5)).reshape(self.shape)

    def spread(self, x: Tensor) -> Tensor:
        """Give each weight the value of its block.

        Parameters
        ----------
        x : Tensor of `shape`

        Returns
        -------
        Tensor of shape (O, K)
        """
        if self._side == (1, 1):
            return x.reshape(self.rows)
        groups, outputs, positions, inputs = self._grid
        (high, wide), (down, across) = self._side, self._count
        x = x.reshape(groups, down, 1, positions, across, 1)
        x = x.expand(-1, -1, high, -1, -1, wide)
        x = x.reshape(groups, down * high, positions, across * wide)
        return x[:, :outputs, :, :inputs].reshape(self.rows)

    def chosen(self, ratio: float) -> int:
        """Return how many blocks a share of them is, rounded down."""
        return math.floor(ratio * math.prod(self.shape) + 1e-9)

    def select(self, error: Tensor, ratio: float) -> Tensor:
        """Choose the blocks with the largest errors; of equal ones the first.

        Parameters
        ----------
        error : float32 Tensor of shape (O, K)
            alpha * r1.
        ratio : float
            `residual_ratio`, the share of blocks that are chosen.

        Returns
        -------
        bool Tensor of `shape`
            The selection tensor C.
        """
        score = self.sum(error.double().square()).flatten()
        count = self.chosen(ratio)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[score.argsort(descending=True, stable=True)[:count]] = True
        return chosen.reshape(self.shape)
