"""Moves of pixels between distances: what NumPy moves, and not a byte beside it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from logshift.kernels.portable.moves import move_pixels


@given(
    size=st.one_of(st.integers(1, 20), st.integers(1, 300)), pixels=st.integers(1, 5),
    gaps=st.tuples(st.integers(0, 40), st.integers(0, 40)), looked_up=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_numpy(size, pixels, gaps, looked_up, seed):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, 256, (pixels, size + gap), np.uint8) for gap in gaps)
    table = rng.integers(0, 256, 256, np.uint8)
    expected = y.copy()
    expected[:, :size] = table[x[:, :size]] if looked_up else x[:, :size]
    move_pixels(
        np.uintp(x.ctypes.data), np.uintp(y.ctypes.data), pixels, *x.strides[:1], *y.strides[:1],
        size, np.uintp(table.ctypes.data if looked_up else 0),
    )  # fmt: skip
    assert np.array_equal(y, expected)
