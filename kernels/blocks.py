"""Blocks of output channels, which convolutions are computed and packed in.

The channels of a group need not fill blocks: the last block then overlaps the one before, or, if
there is no other one, has channels that do not exist.
"""

from __future__ import annotations

import numpy as np

from logshift.kernels.layer import FloatLayer, Layer
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import placed


def first_channels(size: int, layer: Layer | FloatLayer) -> np.ndarray:
    """First output channels of all blocks of a size, (groups, blocks).

    Those of a depthwise layer are one group.
    """
    groups = 1 if layer.is_depthwise else layer.group
    of_group = layer.weights.shape[0] // groups
    firsts = np.minimum(np.arange(0, of_group, size), max(of_group - size, 0))
    return firsts + of_group * np.arange(groups)[:, None]


def block_channels(size: int, layer: Layer | FloatLayer) -> np.ndarray:
    """Output channels of all blocks, (blocks, size); -1 for those that do not exist."""
    firsts = first_channels(size, layer)
    existing = min(size, layer.weights.shape[0] // len(firsts))
    rows = np.full((firsts.size, size), -1)
    rows[:, :existing] = firsts.reshape(-1, 1) + np.arange(existing)
    return rows


def blocked(values: np.ndarray, rows: np.ndarray, dtype: type) -> np.ndarray:
    """Return values of output channels block by block; 0 for channels that do not exist."""
    return placed(np.where(rows < 0, 0, values[rows]), dtype)


def outputs_by_block(layer: Layer, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return what requantization knows of output channels block by block, by its field's name."""
    return {key: blocked(values, rows, np.float32) for key, values in layer.outputs.items()}


@njit(cache=True, nogil=True, error_model="numpy")
def by_block(words, rows):
    """Return words (O + 1, steps) as (blocks, steps, channels); row -1 is the last one."""
    blocks, channels = rows.shape
    ordered = np.empty((blocks, words.shape[1], channels), words.dtype)
    for block in range(blocks):
        for step in range(words.shape[1]):
            for c in range(channels):
                ordered[block, step, c] = words[rows[block, c], step]
    return ordered


def runs_of_blocks(firsts: np.ndarray, size: int, most: int) -> list[list[int]]:
    """Join neighbouring blocks, `most` at most, whose channels follow each other.

    Returns the first block of each run, how many it has, their group, and the first channel.
    """
    runs: list[list[int]] = []
    for block, first in enumerate(firsts.flat):
        group, i = divmod(block, firsts.shape[1])
        in_line = first == firsts[group, 0] + i * size
        if i and in_line and runs[-1][1] < most:
            runs[-1][1] += 1
        else:
            runs.append([block, 1, group, first])
    return runs
