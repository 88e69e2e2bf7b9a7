"""Encoding against obvious twins, and the bounds that kernels and the format rely on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.tiles import tile_numbers, tilings

from logshift.converter import encode
from logshift.kernels.errors import InputError
from logshift.kernels.stlq import codec

BITS = st.integers(codec.MIN_BITS, codec.MAX_BITS)
SCALES = np.float32([1, 1e-10, 1e-20, 2.0**-97, encode.NEGLIGIBLE / 50, 2.0**-126, 2.0**-140])
WEIGHTS = st.builds(
    np.multiply,
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=6),
        elements=st.floats(-100, 100, width=32),
    ),
    st.just(np.float32(1)) | st.sampled_from(SCALES),
)

VECTORS = Path(__file__).parents[1] / "vectors/stlq.json"


def case_name(case):
    return "{bits}-{clip}-{residual_shift}-{alpha:.2f}".format(**case)


def levels(bits):
    """All values of a word, in units of its grid: 0 and ±2^(e-1)."""
    positive = [2.0 ** (e - 1) for e in range(1, codec.exponent_levels(bits) + 1)]
    return np.array([0.0, *positive, *(-p for p in positive)])


def nearest(r, bits):
    """Brute-force twin of `nearest_codes`: the closest level, of two equally close the smaller."""
    table = levels(bits)
    distance = np.abs(float(r) - table)
    best = np.flatnonzero(distance == distance.min())
    return table[best[np.argmin(np.abs(table[best]))]]


def numbers_of(shape, tile):
    """Number of the block of every weight, flattened."""
    if isinstance(tile, tuple):
        return tile_numbers(shape, tile, 1).ravel()
    return np.arange(np.prod(shape)) // tile


@st.composite
def encoded(draw):
    """Weights, and what `encode` made of them under any settings."""
    w = draw(WEIGHTS)
    ratio = draw(st.sampled_from([0.0, 0.15, 0.5, 1.0]) | st.floats(0, 1))
    granularity = draw(st.sampled_from(encode.GRANULARITIES))
    tile = draw(st.integers(1, codec.MAX_TILE))
    if granularity == "tile" and draw(st.booleans()):
        tile = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    code = encode.encode(
        w, draw(BITS), ratio, granularity=granularity, tile=tile,
        residual_shift=draw(st.integers(0, codec.MAX_RESIDUAL_SHIFT)),
        clip=draw(st.sampled_from([None, 1, 2])),
    )  # fmt: skip
    return w, code, ratio, granularity, tile


def test_levels_are_those_of_the_specification():
    assert [codec.exponent_levels(b) for b in (2, 3, 4, 5)] == [1, 3, 7, 15]
    assert [encode.default_clip(b) for b in (2, 3, 4, 5)] == [2, 2, 1, 1]
    for bits in range(2, 6):
        codes = np.array([c for c in range(2**bits) if c != 1 << (bits - 1)], np.uint8)
        assert sorted(codec.decode_codes(codes, bits)) == sorted(levels(bits))


@given(r=st.floats(-(2.0**17), 2.0**17, width=32), bits=BITS)
def test_nearest_level(r, bits):
    code = encode.nearest_codes(np.array([r]), bits)
    assert codec.decode_codes(code, bits)[0] == nearest(np.float32(r), bits)


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text()), ids=case_name)
def test_vectors_shared_with_the_trainer(case):
    w = np.array(case["w"], np.float32).reshape(1, 1, 1, -1)
    alpha = np.array([case["alpha"]], np.float32)
    words = encode.encode(
        w,
        case["bits"],
        1.0,
        residual_shift=case["residual_shift"],
        clip=case["clip"],
        alpha=alpha,
    )
    first = codec.decode_codes(words.first, case["bits"]).ravel()
    second = codec.decode_codes(words.second, case["bits"]).ravel()
    np.testing.assert_array_equal(first, case["q0"])
    np.testing.assert_array_equal(second, case["q1"])


@given(bits=BITS, data=st.data())
def test_ties_go_toward_zero(bits, data):
    table = np.unique(np.abs(levels(bits)))
    i = data.draw(st.integers(0, len(table) - 2))
    sign = data.draw(st.sampled_from([-1, 1]))
    middle = np.float32(sign * (table[i] + table[i + 1]) / 2)
    above = np.nextafter(middle, np.float32(sign * np.inf))
    codes = encode.nearest_codes(np.array([middle, above]), bits)
    assert list(codec.decode_codes(codes, bits)) == [sign * table[i], sign * table[i + 1]]


@given(encoded())
def test_codes_and_integers_stay_in_their_bounds(case):
    w, code, *_ = case
    assert code.first.shape == code.second.shape == w.shape and code.alpha.shape == w.shape[:1]
    assert code.first.dtype == code.second.dtype == np.uint8 and code.alpha.dtype == np.float32
    negative_zero = 1 << (code.bits - 1)
    for words in (code.first, code.second):
        assert words.max() < 2**code.bits and not (words == negative_zero).any()
    assert np.abs(code.integers()).max() <= code.limit
    assert np.isfinite(code.alpha).all() and (code.alpha > 0).all()
    if code.bits <= 4 and code.residual_shift == 0 and code.clip == encode.default_clip(code.bits):
        assert np.abs(code.integers()).max() <= 64  # what an int8 kernel lives on


@given(encoded())
def test_words_are_the_nearest_levels_of_section_2(case):
    w, code, *_ = case
    top = np.float32(2.0 ** (codec.exponent_levels(code.bits) - 1))
    r0 = w / code.alpha[:, None, None, None] * top
    r0 = np.clip(r0, -code.clip * top, code.clip * top)
    q0 = codec.decode_codes(code.first, code.bits)
    q1 = codec.decode_codes(code.second, code.bits)
    r1 = (r0 - q0.astype(np.float32)) * np.float32(2.0**code.residual_shift)
    for index in np.ndindex(w.shape):
        assert q0[index] == nearest(r0[index], code.bits)
        assert q1[index] in (0, nearest(r1[index], code.bits))


@given(encoded())
def test_second_words_keep_to_ratio_and_granularity(case):
    w, code, ratio, granularity, tile = case
    flat = code.second.reshape(-1)
    rows = code.second.reshape(w.shape[0], -1)
    if granularity == "element":
        assert np.count_nonzero(flat) <= ratio * flat.size + 1e-6
    elif granularity == "tile":
        numbers = numbers_of(w.shape, tile)
        used = set(numbers[flat != 0])
        assert len(used) <= ratio * (numbers.max() + 1) + 1e-6
    else:
        assert np.count_nonzero(rows.any(axis=1)) <= ratio * len(rows) + 1e-6
    if ratio == 0:
        assert code.nzr == 0


@given(encoded())
def test_selected_blocks_are_complete(case):
    """In a chosen tile or filter every weight that profits from a second word has one."""
    w, code, _, granularity, tile = case
    full = encode.encode(
        w, code.bits, 1.0, residual_shift=code.residual_shift, clip=code.clip, alpha=code.alpha
    )
    assert np.array_equal(full.first, code.first)
    if granularity == "element":
        return
    numbers = numbers_of(w.shape, tile if granularity == "tile" else w[0].size)
    for number in range(numbers.max() + 1):
        part = code.second.reshape(-1)[numbers == number]
        if part.any():
            assert np.array_equal(part, full.second.reshape(-1)[numbers == number])


@given(
    case=tilings(), ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]) | st.floats(0, 1),
    ties=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_tiles_of_an_array_are_chosen_by_what_is_gained_inside(case, ratio, ties, seed):
    """Tile by tile: the best come first, of equal ones those of the least number."""
    shape, tile, group = case
    rng = np.random.default_rng(seed)
    gain = rng.integers(0, 2, shape).astype(float) if ties else rng.random(shape)
    numbers = tile_numbers(*case)
    sums = [gain[numbers == number].sum() for number in range(numbers.max() + 1)]
    if not ties and len(sums) > 1:  # sums in another order must not decide
        assume(np.diff(np.sort(sums)).min() > 1e-9)
    best = sorted(range(len(sums)), key=lambda number: -sums[number])
    chosen = best[: int(np.floor(ratio * len(sums) + 1e-9))]
    expected = np.isin(numbers, chosen)
    found = encode.eligible(gain, ratio, "tile", tile, group)
    assert np.array_equal(found, expected)
    assert np.array_equal(encode.select(gain, ratio, "tile", tile, group), expected & (gain > 0))


def test_the_tile_of_an_array_is_the_default():
    w = np.random.default_rng(0).standard_normal((20, 3, 3, 18)).astype(np.float32)
    code = encode.encode(w, 4, 0.3, granularity="tile")
    assert code.tile == (16, 16)
    assert np.array_equal(
        code.second, encode.encode(w, 4, 0.3, granularity="tile", tile=(16, 16)).second
    )
    runs = encode.encode(w, 4, 0.3, granularity="tile", tile=256)
    assert runs.tile is None and not np.array_equal(code.second, runs.second)
    assert encode.encode(w, 4, 0.3).tile is None


@given(w=WEIGHTS, bits=BITS, ratio=st.sampled_from([0.1, 0.3, 0.7]))
def test_elements_are_selected_by_the_squared_error_they_remove(w, bits, ratio):
    alpha = np.abs(w).max(axis=(1, 2, 3))
    alpha[alpha == 0] = 1
    none = encode.encode(w, bits, 0.0, alpha=alpha)
    full = encode.encode(w, bits, 1.0, alpha=alpha)
    some = encode.encode(w, bits, ratio, alpha=alpha)
    target = np.clip(w, *(np.array([-1, 1])[:, None, None, None, None] * none.clip
                          * alpha[:, None, None, None]))  # fmt: skip
    target = target.astype(np.float64)
    unit = none.unit()[:, None, None, None]
    gain = (none.integers() * unit - target) ** 2 - (full.integers() * unit - target) ** 2
    chosen, left = some.second != 0, (some.second == 0) & (full.second != 0)
    if chosen.any() and left.any():
        assert gain[chosen].min() >= gain[left].max() - 1e-4 * gain.max()


@given(w=WEIGHTS, bits=BITS, shift=st.integers(0, 4), clip=st.integers(1, 2), data=st.data())
def test_errors_of_the_search_are_those_of_the_words(w, bits, shift, clip, data):
    w = w.reshape(len(w), -1)
    size = st.floats(0.25, 1, width=32)
    largest = np.maximum(np.abs(w).max(axis=1), np.float32(1e-3))
    alpha = largest * np.array([data.draw(size) for _ in w], np.float32)
    one, gain = np.empty_like(w), np.empty_like(w)
    encode._errors(w, alpha, codec.exponent_levels(bits), shift, clip, one, gain)
    code = encode.encode(
        w[:, :, None, None], bits, 1.0, residual_shift=shift, clip=clip, alpha=alpha
    )
    unit = alpha[:, None].astype(np.float64) / 2.0 ** (codec.exponent_levels(bits) - 1)
    first = codec.decode_codes(code.first, bits)[:, :, 0, 0]
    both = first + codec.decode_codes(code.second, bits)[:, :, 0, 0] / 2.0**shift
    lost, left = np.abs(first - w / unit), np.abs(both - w / unit)
    # Errors are squared in float32, where less than the square of 2^-63 of a unit is no number.
    rounding = 1e-6 * np.abs(w / unit).max() + 2.0**-63
    np.testing.assert_allclose(np.sqrt(one), lost, rtol=1e-5, atol=rounding)
    gained = np.maximum(lost**2 - left**2, 0)
    np.testing.assert_allclose(gain, gained, rtol=1e-5, atol=4 * rounding * (lost.max() + rounding))


@given(w=WEIGHTS, bits=BITS, ratio=st.sampled_from([0.0, 0.15, 1.0]), shift=st.integers(0, 2))
def test_searched_alpha_is_no_worse_than_the_maximum(w, bits, ratio, shift):
    largest = np.abs(w).max(axis=(1, 2, 3))
    negligible = largest < encode.NEGLIGIBLE
    largest[negligible] = 1
    alpha = encode.search_alpha(w, bits, residual_ratio=ratio, residual_shift=shift)
    assert (alpha <= largest).all() and (alpha[negligible] == 1).all()
    assert (alpha >= np.float32(encode.NEGLIGIBLE / 2**1.75)).all()
    # The search spends the ratio channel by channel; compare on the same terms.
    for o in range(len(w)):
        channel = w[o : o + 1]
        chosen = int(ratio * channel.size) / channel.size
        error = [
            np.square(
                encode.encode(channel, bits, chosen, residual_shift=shift, alpha=a).values()
                - channel.astype(np.float64)
            ).sum()
            for a in (alpha[o : o + 1], largest[o : o + 1])
        ]
        assert error[0] <= error[1] * (1 + 1e-4) + 1e-12 * float(largest[o]) ** 2


@given(
    w=WEIGHTS, bits=BITS, ratio=st.sampled_from([0.05, 0.15, 0.5, 1.0]), shift=st.integers(0, 2),
    blocks=st.sampled_from([("tile", (16, 16)), ("tile", (2, 3)), ("tile", 16), ("filter", None)]),
)  # fmt: skip
def test_second_words_of_blocks_lose_nothing(w, bits, ratio, shift, blocks):
    """A channel's alpha does not count on second words that other channels' blocks have."""
    granularity, tile = blocks

    def error(ratio):
        code = encode.encode(
            w, bits, ratio, granularity=granularity, tile=tile, residual_shift=shift
        )
        return np.square(code.values() - w.astype(np.float64)).sum()

    assert error(ratio) <= error(0.0) * (1 + 1e-4) + 1e-12 * float(np.abs(w).max()) ** 2


@given(encoded())
def test_decoding_follows_the_formula(case):
    _, code, *_ = case
    q0, q1 = (codec.decode_codes(c, code.bits) for c in (code.first, code.second))
    assert np.array_equal(code.integers(), q0 * 2**code.residual_shift + q1)
    unit = code.alpha.astype(np.float64) / 2.0 ** (
        codec.exponent_levels(code.bits) - 1 + code.residual_shift
    )
    expected = code.integers() * unit[:, None, None, None]
    assert np.array_equal(code.values(), expected.astype(np.float32))


@given(encoded())
def test_encoding_representable_weights_is_exact(case):
    _, code, *_ = case
    again = encode.encode(
        code.values(), code.bits, 1.0, residual_shift=code.residual_shift, clip=code.clip,
        alpha=code.alpha,
    )  # fmt: skip
    np.testing.assert_allclose(again.values(), code.values(), rtol=1e-6)


@given(encoded())
def test_encoding_is_deterministic(case):
    w, code, ratio, granularity, tile = case
    again = encode.encode(
        w, code.bits, ratio, granularity=granularity, tile=tile,
        residual_shift=code.residual_shift, clip=code.clip,
    )  # fmt: skip
    assert np.array_equal(again.first, code.first) and np.array_equal(again.second, code.second)
    assert np.array_equal(again.alpha, code.alpha)


def test_zeros_stay_zeros():
    code = encode.encode(np.zeros((3, 1, 1, 2)), 4, 1.0)
    assert not code.integers().any() and (code.alpha == 1).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_negligible_channels_are_zeros_and_no_weight_is_denormal(bits):
    """Section 1: channels below 2^-100; the least that remain give normal numbers only."""
    least, tiny = np.float32(encode.NEGLIGIBLE), np.finfo(np.float32).tiny
    below = np.nextafter(least, np.float32(0))
    w = np.array([[below, -below], [1.2e-38, 0], [tiny, -tiny / 2], [1e-45, 0], [least, -least / 2],
                  [least, tiny]], np.float32)  # fmt: skip
    code = encode.encode(w[:, None, None, :], bits, 1.0, residual_shift=codec.MAX_RESIDUAL_SHIFT)
    assert (code.alpha[:4] == 1).all() and not code.integers()[:4].any()
    assert code.integers()[4:, ..., 0].all() and code.integers()[5, 0, 0, 1] == 0
    assert code.unit()[4:].min() >= 2.0**-119.75
    assert (np.abs(code.values()[code.integers() != 0]) >= tiny).all()
    np.testing.assert_allclose(code.values()[4:, 0, 0, 0], least, rtol=0.35)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-93])
def test_small_weights_are_quantized_as_large_ones(scale):
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 8)).astype(np.float32)
    for bits in (2, 3, 4, 5):
        code, small = encode.encode(w, bits), encode.encode(w * np.float32(scale), bits)
        assert np.array_equal(code.first, small.first)
        assert np.array_equal(code.second, small.second)
        assert np.array_equal(code.alpha * np.float32(scale), small.alpha)


def test_five_bits_on_normal_weights_are_about_as_good_as_four():
    w = np.random.default_rng(0).standard_normal((8, 3, 3, 16)).astype(np.float32)
    error = {
        (bits, ratio): np.square(encode.encode(w, bits, ratio).values() - w).mean()
        for bits in (3, 4, 5)
        for ratio in (0.0, 0.15, 1.0)
    }
    for bits in (3, 4, 5):
        assert error[bits, 0.0] > error[bits, 0.15] > error[bits, 1.0]
    assert error[5, 0.15] == pytest.approx(error[4, 0.15], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "weight_bits"),
        ({"bits": 6}, "weight_bits"),
        ({"residual_ratio": 1.5}, "residual_ratio"),
        ({"residual_ratio": -0.1}, "residual_ratio"),
        ({"granularity": "row"}, "granularity"),
        ({"tile": 0}, "tile"),
        ({"tile": 257}, "tile"),
        ({"tile": True}, "tile"),
        ({"granularity": "tile", "tile": (16, 0)}, "tile is .16, 0."),
        ({"granularity": "tile", "tile": (257, 16)}, "tile is .257, 16."),
        ({"granularity": "tile", "tile": (4, 4, 4)}, "tile is .4, 4, 4."),
        ({"granularity": "tile", "tile": (4,)}, "tile is .4,."),
        ({"granularity": "tile", "tile": ()}, "tile is .."),
        ({"granularity": "tile", "tile": (4.0, 4)}, "tile is .4.0, 4."),
        ({"granularity": "tile", "tile": "16x16"}, "tile is '16x16'"),
        ({"tile": (16, 16)}, "needs granularity 'tile', not 'element'"),
        ({"granularity": "filter", "tile": (16, 16)}, "not 'filter'"),
        ({"granularity": "tile", "group": 2}, "2 groups do not divide 1 output"),
        ({"residual_shift": 5}, "residual_shift"),
        ({"clip": 3}, "clip"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        encode.encode(np.ones((1, 1, 1, 1)), **settings)


@pytest.mark.parametrize(
    "w", [np.ones((2, 2)), np.ones((0, 1, 1, 1)), np.full((1, 1, 1, 1), np.nan),
          np.full((1, 1, 1, 1), np.inf)],
)  # fmt: skip
def test_weights_that_cannot_be_encoded(w):
    with pytest.raises(InputError, match="weights"):
        encode.encode(w)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, np.inf]), min_size=1, max_size=30), st.data())
def test_largest(score, data):
    count = data.draw(st.integers(0, len(score)))
    expected = np.zeros(len(score), bool)
    expected[np.argsort(-np.array(score), kind="stable")[:count]] = True
    np.testing.assert_array_equal(encode.largest(np.array(score), count), expected)
