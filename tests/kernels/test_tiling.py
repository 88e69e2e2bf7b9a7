"""Tiles of an array against their twin, which takes weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiles import tile_numbers, tilings

from logshift.kernels.errors import InputError
from logshift.kernels.stlq.tiling import Tiling


@given(case=tilings(), seed=st.integers(0, 2**32 - 1))
def test_tiles_are_those_of_the_twin(case, seed):
    shape, _, _ = case
    tiling, numbers = Tiling(*case), tile_numbers(*case)
    rng = np.random.default_rng(seed)
    assert tiling.count == numbers.max() + 1
    assert np.array_equal(tiling.sizes(), np.bincount(numbers.ravel()))
    values = rng.integers(0, 100, shape)
    sums = np.bincount(numbers.ravel(), values.ravel())
    assert tiling.sums(values).dtype == np.float64 and np.array_equal(tiling.sums(values), sums)
    mask = rng.random(shape) < 0.1
    assert np.array_equal(tiling.any(mask), np.bincount(numbers.ravel(), mask.ravel()) > 0)
    chosen = rng.random(tiling.count) < 0.5
    assert np.array_equal(tiling.spread(chosen), chosen[numbers])


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((64, 3, 3, 3), 1, (4, 3, 3, 1)),  # three inputs: smaller tiles
        ((40, 1, 1, 20), 1, (3, 1, 1, 2)),
        ((40, 1, 1, 20), 2, (4, 1, 1, 2)),  # 20 outputs in a group: tiles of 16 and of 4
        ((40, 3, 3, 1), 40, (3, 3, 3, 1)),  # depthwise: outputs of 16 groups
        ((40, 3, 3, 1), 20, (3, 3, 3, 1)),
        ((40, 3, 3, 1), 1, (3, 3, 3, 1)),
    ],
)
def test_numbers_of_tiles(shape, group, expected):
    assert Tiling(shape, (16, 16), group).shape == expected


@pytest.mark.parametrize("group", [-1, 0, 3, 17])
def test_groups_must_divide_the_outputs(group):
    with pytest.raises(InputError, match=f"{group} groups do not divide 16"):
        Tiling((16, 1, 1, 4), (16, 16), group)
