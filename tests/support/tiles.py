"""Tiles of an array, weight by weight: the twin of `kernels.stlq.tiling`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def tile_numbers(shape, tile, group):
    """Number of the tile of every weight, in the order (o-block, ky, kx, c-block)."""
    outputs, kh, kw, inputs = shape
    blocks = {}  # of output channels, by their group and how far they are in it
    for o in range(outputs):
        g, place = divmod(o, outputs // group) if inputs > 1 else (0, o)
        blocks.setdefault((g, place // tile[1]), []).append(o)
    numbers, number = np.full(shape, -1), 0
    for rows in blocks.values():
        for ky in range(kh):
            for kx in range(kw):
                for first in range(0, inputs, tile[0]):
                    numbers[rows, ky, kx, first : first + tile[0]] = number
                    number += 1
    assert numbers.min() == 0 and numbers.max() == number - 1
    return numbers


@st.composite
def tilings(draw, largest=9):
    """Shape of a weight, sides of a tile, and groups; often with single inputs."""
    group = draw(st.integers(1, 4))
    shape = (
        group * draw(st.integers(1, largest)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
        draw(st.just(1) | st.integers(1, largest)),
    )  # fmt: skip
    side = st.integers(1, 12) | st.just(256)
    return shape, (draw(side), draw(side)), group
