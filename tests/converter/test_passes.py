"""Passes over the calibration pictures: what they find, whatever the number of cores."""

import numpy as np
import pytest

from logshift.converter import passes
from logshift.converter.evaluate import Evaluator, snr_db
from logshift.converter.float_graph import FloatNode
from logshift.runtime.graph import Quantization


def values(*shape):
    return (4 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 17, 9)])
def test_bounds(shape, sign):
    x = values(*shape)
    x = x if sign == 0 else sign * np.abs(x)
    assert passes.bounds(x) == (x.min(), x.max())
    assert passes.bounds(np.zeros(shape, np.float32)) == (0, 0)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_bounds_show_what_is_not_finite(value, place):
    x = values(100)
    x[place] = value
    assert not np.isfinite(passes.bounds(x)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_squares(dtype):
    x = values(7, 33).astype(dtype)
    y = x + values(7, 33).astype(dtype) / 8
    expected = np.square(x, dtype=np.float64).sum(), np.square(x.astype(float) - y).sum()
    assert passes.squares(x, y) == pytest.approx(expected, rel=1e-12)
    assert snr_db(x, y) == pytest.approx(10 * np.log10(expected[0] / expected[1]))
    assert snr_db(x, x) == np.inf
    assert np.isnan(snr_db(0 * x, y)) and np.isnan(snr_db(x * np.inf, y))


@pytest.mark.parametrize("bits", [2, 7, 8])
def test_codes_are_those_of_float32_one_by_one(bits):
    q = Quantization(0.0371, 3, bits)
    ties = (np.arange(-50, 300) + np.float32(0.5)) * np.float32(q.scale)
    x = np.concatenate([values(4000), ties, [np.inf, -np.inf]]).astype(np.float32)
    codes = np.rint(x / np.float32(q.scale)) + np.float32(q.zero_point)
    codes = codes.clip(0, q.top).astype(np.uint8)
    np.testing.assert_array_equal(q.quantize(x), codes)
    back = (codes.astype(np.float32) - np.float32(q.zero_point)) * np.float32(q.scale)
    np.testing.assert_array_equal(q.dequantize(codes), back)
    assert q.quantize(np.float32(np.nan)) == 0 and q.quantize(np.float32(0)).shape == ()
    matrix = x[:4000].reshape(50, 80)
    np.testing.assert_array_equal(q.quantize(matrix.T), codes[:4000].reshape(50, 80).T)


@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize("size", [1, 20])
def test_a_sweep_is_the_same_on_any_number_of_cores(size, count, monkeypatch):
    attributes = {"group": 1, "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    node = FloatNode(
        "Conv", "conv", ["x"], "y", attributes, weight=values(8, 1, 1, 3), bias=values(8)
    )
    x = values(count, 3, size, size)
    whole = Evaluator(node)([x])
    monkeypatch.setattr("logshift.converter.evaluate.PART", 3 * 3 * size * size)
    for threads in (1, 2, 3):
        monkeypatch.setattr(passes, "default_threads", lambda threads=threads: threads)
        evaluator = Evaluator(node, passes.threads_of_part(count))
        parts = evaluator.sweep(lambda part: [x[part]], count, lambda part, y: (part, y))
        assert [part.start for part, _ in parts] == sorted(part.start for part, _ in parts)
        assert sum(len(y) for _, y in parts) == count
        np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), whole)
        out = np.full(whole.shape, np.nan, np.float32)
        parts = evaluator.sweep(lambda part: [x[part]], count, lambda part, y: y, out=out)
        np.testing.assert_array_equal(out, whole)
        assert all(np.shares_memory(y, out) for y in parts)


def test_what_is_only_handed_on_is_not_changed():
    node = FloatNode("Clip", "clip", ["x"], "y", {}, clamp=(0.0, 1.0))
    evaluator, x = Evaluator(node), values(4, 3, 5, 5)
    before = x.copy()

    def cleared(part, y):
        y[...] = 0

    evaluator.sweep(lambda part: [x[part]], 4, cleared)
    np.testing.assert_array_equal(x, before)
