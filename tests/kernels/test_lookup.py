"""Lookups of codes, many at a time: what NumPy finds, whatever their number and place."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from logshift.kernels.portable.lookup import look_up


@given(
    count=st.integers(0, 700), offset=st.integers(0, 70), in_place=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_numpy(count, offset, in_place, seed):
    rng = np.random.default_rng(seed)
    x, table = rng.integers(0, 256, 800).astype(np.uint8), rng.integers(0, 256, 256, np.uint8)
    y = x if in_place else np.zeros_like(x)
    expected = y.copy()
    expected[offset : offset + count] = table[x[offset : offset + count]]
    places = (x.ctypes.data + offset, y.ctypes.data + offset, count, table.ctypes.data)
    look_up(*map(np.uintp, places))
    assert np.array_equal(y, expected)
