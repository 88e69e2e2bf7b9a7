"""float16 and float32: kernels give what NumPy gives, of every number."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from logshift.kernels.reference import half


@njit
def widen(x, y):
    for i in range(len(x)):
        y[i] = half.widened(x[i])


@njit
def narrow(x, y):
    for i in range(len(x)):
        y[i] = half.narrowed(x[i])


def test_every_float16_becomes_what_it_is():
    x, y = np.arange(2**16, dtype=np.uint16), np.empty(2**16, np.uint32)
    widen(x, y)
    np.testing.assert_array_equal(y.view(np.float32), x.view(np.float16).astype(np.float32))


def between():
    """Float32 numbers at, just below and just above the middle of every two of float16."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    all_of_them = np.sort(halves[np.isfinite(halves)].astype(np.float64))
    middles = ((all_of_them[1:] + all_of_them[:-1]) / 2).astype(np.float32)
    ends = [65504, 65519.996, 65520, 65536, 1e30, np.inf, 0, 1e-30, 2.0**-25, 2.0**-149]
    ends = np.array(ends, np.float32)
    return np.concatenate([
        all_of_them.astype(np.float32), middles, np.nextafter(middles, np.float32(np.inf)),
        np.nextafter(middles, np.float32(-np.inf)), ends, -ends,
    ])  # fmt: skip


def test_numbers_are_rounded_to_the_nearest_and_to_even():
    x = between()
    y = np.empty(len(x), np.uint16)
    narrow(x.view(np.uint32), y)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, x.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC01234])
def test_what_is_no_number_stays_none(bits):
    y = np.empty(1, np.uint16)
    narrow(np.array([bits], np.uint32), y)
    assert np.isnan(y.view(np.float16))[0] and y[0] >> 15 == bits >> 31
