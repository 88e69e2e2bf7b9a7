"""Where windows and slices lie along an axis, against the definitions written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logshift.runtime import geometry

SMALL = st.integers(1, 9)


def windows_that_fit(size, extent, stride):
    return [begin for begin in range(0, max(size, 0), stride) if begin + extent <= size]


@given(size=SMALL, kernel=SMALL, dilation=SMALL, stride=SMALL, pads=st.integers(0, 9))
def test_windows(size, kernel, dilation, stride, pads):
    extent = geometry.extent(kernel, dilation)
    assert extent == range(0, kernel * dilation, dilation)[-1] + 1
    expected = windows_that_fit(size + pads, extent, stride)
    assert max(geometry.windows(size, extent, stride, pads), 0) == len(expected)


@given(size=SMALL, extent=SMALL, stride=SMALL, data=st.data())
def test_pools_with_ceil_mode_have_windows_until_the_picture_ends(size, extent, stride, data):
    before, after = (data.draw(st.integers(0, extent - 1)) for _ in range(2))
    padded = before + size + after
    fits = windows_that_fit(padded, extent, stride)
    assert max(geometry.pool_windows(size, extent, stride, before, after, 0), 0) == len(fits)
    if fits:
        begins = [*fits, fits[-1] + stride] if fits[-1] + extent < padded else fits
        inside = [begin for begin in begins if begin < before + size]
        assert geometry.pool_windows(size, extent, stride, before, after, 1) == len(inside)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@given(size=SMALL, extent=SMALL, stride=SMALL)
def test_same_pads_give_a_window_for_every_stride(mode, size, extent, stride):
    before, after = geometry.same_pads(size, extent, stride, mode)
    assert geometry.windows(size, extent, stride, before + after) == len(range(0, size, stride))
    assert after - before in ((0, 1) if mode == "SAME_UPPER" else (0, -1))


@given(
    size=st.integers(0, 6), start=st.integers(-9, 9), end=st.integers(-9, 9),
    step=st.sampled_from([-3, -2, -1, 1, 2, 3]),
)  # fmt: skip
def test_slices(size, start, end, step):
    start_at, end_at = (v + size if v < 0 else v for v in (start, end))
    if step > 0:
        expected = [i for i in range(size) if start_at <= i < end_at]
        expected = expected[::step]
    else:
        expected = [i for i in range(size) if end_at < i <= max(start_at, 0)][::step]
    taken = geometry.slice_range(size, start, end, step)
    assert [i for i in taken if i < size] == expected
    assert size == 0 or list(taken) == expected
