"""Bit packing: round trips, the documented bit order, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logshift.kernels.errors import InputError
from logshift.kernels.stlq import bitpack


@given(bits=st.integers(1, 8), data=st.data())
def test_values_round_trip(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=300))
    values = np.array(values, np.uint8)
    packed = bitpack.pack(values, bits)
    assert packed.dtype == np.uint8 and packed.size == bitpack.packed_size(values.size, bits)
    assert np.array_equal(bitpack.unpack(packed, bits, values.size), values)


@given(bits=st.integers(1, 8), data=st.data())
def test_bit_order_is_little_endian(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=50))
    number = sum(v << (i * bits) for i, v in enumerate(values))
    expected = number.to_bytes(bitpack.packed_size(len(values), bits), "little")
    assert bitpack.pack(np.array(values, np.uint8), bits).tobytes() == expected


@given(
    tile=st.integers(1, 256), ratio=st.sampled_from([0.0, 0.01, 0.15, 0.5, 1.0]),
    size=st.integers(1, 1000), seed=st.integers(0, 1000),
)  # fmt: skip
def test_positions_round_trip(tile, ratio, size, seed):
    mask = np.random.default_rng(seed).random(size) < ratio
    counts, positions = bitpack.tile_positions(mask, tile)
    assert counts.dtype == np.uint16 and positions.dtype == np.uint8
    assert counts.size == -(-size // tile) and positions.size == mask.sum()
    # The twin: tile by tile, weight by weight.
    expected = [i % tile for i in range(size) if mask[i]]
    assert positions.tolist() == expected
    for t, count in enumerate(counts):
        assert count == mask[t * tile : (t + 1) * tile].sum()
    assert np.array_equal(bitpack.mask_from_positions(counts, positions, tile, size), mask)


def test_a_value_too_wide_is_refused():
    with pytest.raises(InputError, match="does not fit"):
        bitpack.pack(np.array([8], np.uint8), 3)


def test_a_stream_of_another_size_is_refused():
    with pytest.raises(InputError, match="bytes given"):
        bitpack.unpack(np.zeros(3, np.uint8), 4, 4)


def test_stray_bits_are_refused():
    with pytest.raises(InputError, match="beyond the last"):
        bitpack.unpack(np.array([0b1000_0000], np.uint8), 3, 2)


@pytest.mark.parametrize(
    ("counts", "positions", "message"),
    [
        ([1], [0], "counts for"),
        ([1, 1, 1], [0, 0], "add up"),
        ([1, 0, 1], [8, 0], "outside a tile"),
        ([0, 0, 1], [4], "beyond the last weight"),
        ([2, 0, 0], [3, 3], "do not ascend"),
        ([2, 0, 0], [3, 2], "do not ascend"),
    ],
)
def test_positions_that_break_a_rule(counts, positions, message):
    with pytest.raises(InputError, match=message):
        bitpack.mask_from_positions(
            np.array(counts, np.uint16), np.array(positions, np.uint8), tile=8, size=20
        )
