"""Tiles of an array: the weights of a layer that an accelerator works on at once.

The tile of DianNao (Chen et al., ASPLOS 2014) and of STLQ, section 4.4 (Oh, Sim, Lee, Lee,
"Automated Log-Scale Quantization for Low-Cost Deep Neural Networks", CVPR 2021): some inputs by
some outputs at one kernel position. The choice of second words, the packed file and the counts of
cycles all have it of here.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from logshift.kernels.errors import InputError

ARRAY_TILE = (16, 16)  # inputs and outputs, the paper's

Shape4 = tuple[int, int, int, int]


class Tiling:
    """The weights of a layer, cut into tiles; those at edges are smaller.

    No tile has outputs of two groups, because these read other inputs. Where every output has a
    single input, C / group = 1 as in a depthwise convolution, a tile is consecutive outputs, each
    with its own input, whatever the groups.

    Parameters
    ----------
    shape : (O, kh, kw, C / group)
    tile : (Tn, Tm)
        Inputs and outputs of a tile.
    group : int
        Groups of the convolution.

    Attributes
    ----------
    shape : (o-blocks, kh, kw, c-blocks)
        Tiles are numbered in this order, the last axis fastest.
    together : int
        Outputs among which tiles are cut: those of a group, or all.
    height : int
        Outputs of a tile that is not at an edge.

    Raises
    ------
    InputError
        If the groups do not divide the outputs.
    """

    def __init__(self, shape: Shape4, tile: tuple[int, int], group: int = 1) -> None:
        outputs, kh, kw, inputs = shape
        if group < 1 or outputs % group:
            raise InputError(f"{group} groups do not divide {outputs} output channels")
        self.together = outputs if inputs == 1 else outputs // group
        self.height, self._width = min(tile[1], self.together), min(tile[0], inputs)
        self._channels = outputs, inputs
        columns, rows = -(-inputs // self._width), -(-self.together // self.height)
        self.shape: Shape4 = outputs // self.together * rows, kh, kw, columns

    @cached_property
    def _rows(self) -> np.ndarray:
        """First outputs of tiles."""
        begins = np.arange(0, self._channels[0], self.together)[:, None]
        return (begins + np.arange(0, self.together, self.height)).ravel()

    @cached_property
    def _columns(self) -> np.ndarray:
        """First inputs of tiles."""
        return np.arange(0, self._channels[1], self._width)

    @property
    def _heights(self) -> np.ndarray:
        return np.diff(self._rows, append=self._channels[0])

    @property
    def _widths(self) -> np.ndarray:
        return np.diff(self._columns, append=self._channels[1])

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(self.shape)

    def sizes(self) -> np.ndarray:
        """Return the number of weights of each tile, int64 (tiles,)."""
        size = self._heights[:, None, None, None] * self._widths
        return np.broadcast_to(size, self.shape).ravel()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up what the weights of each tile have, (O, kh, kw, C / group) -> float64 (tiles,)."""
        rows = np.add.reduceat(values, self._rows, axis=0, dtype=np.float64)
        return np.add.reduceat(rows, self._columns, axis=3).ravel()

    def any(self, mask: np.ndarray) -> np.ndarray:
        """Tell which tiles have a marked weight, bool (O, kh, kw, C / group) -> (tiles,)."""
        rows = np.logical_or.reduceat(mask, self._rows, axis=0)
        return np.logical_or.reduceat(rows, self._columns, axis=3).ravel()

    def spread(self, chosen: np.ndarray) -> np.ndarray:
        """Mark all weights of chosen tiles, bool (tiles,) -> (O, kh, kw, C / group)."""
        columns = np.repeat(chosen.reshape(self.shape), self._widths, axis=3)
        return np.repeat(columns, self._heights, axis=0)
