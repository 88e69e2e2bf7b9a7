"""Error feedback: the covariance of inputs, and what rounding with it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.onnx_nets import Net
from support.tiles import tile_numbers, tilings

from logshift.converter import budget, convert, feedback
from logshift.converter.encode import GRANULARITIES, encode
from logshift.converter.evaluate import Evaluator
from logshift.converter.float_graph import FloatNode
from logshift.converter.settings import Settings
from logshift.kernels.stlq.codec import decode_codes
from logshift.runtime.file import format as packed_format

CONVOLUTIONS = {
    "3x3": (3, 5, 1, {"pads": [1, 1, 1, 1]}),
    "strided": (3, 4, 1, {"strides": [2, 1], "pads": [0, 1, 2, 1]}),
    "dilated": (2, 3, 1, {"dilations": [2, 3]}),
    "grouped": (3, 6, 2, {"pads": [1, 1, 1, 1]}),
    "depthwise": (3, 4, 4, {"pads": [1, 1, 1, 1]}),
    "1x1": (1, 8, 1, {}),
}


def convolution(kernel, channels, group, attributes, out=None):
    """A Conv that has the inputs of its weights as outputs, if `out` is not given."""
    in_group = channels // group
    size = kernel * kernel * in_group
    defaults = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0], "group": group}
    weight = np.tile(np.eye(size, dtype=np.float32), (group, 1))
    if out is not None:
        weight = np.random.default_rng(1).laplace(0, 0.1, (out, size)).astype(np.float32)
    weight = weight.reshape(-1, kernel, kernel, in_group)
    bias = np.zeros(len(weight), np.float32)
    return FloatNode("Conv", "conv", ["x"], "y", defaults | attributes, weight, bias)


def covariance(node, x, center, exact=None):
    """Those of inputs x, all of which are looked at, in both networks if `exact` is not given."""
    of_exact = None if exact is None else feedback.Inputs(exact)
    found = feedback.covariance(node, feedback.Inputs(x), of_exact, center)
    return found.moments, found.lost


def inputs(channels, count=6, size=9):
    """Pictures whose neighbouring pixels and channels go together."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((count, channels, size, size))
    x += rng.standard_normal((count, 1, size, size))
    for axis in (2, 3):
        x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis) + np.roll(x, 3, axis)
    return (x + 1).astype(np.float32)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("center", [True, False])
def test_covariance_is_that_of_what_weights_see(kind, center):
    node = convolution(*CONVOLUTIONS[kind])
    x, group = inputs(CONVOLUTIONS[kind][1]), CONVOLUTIONS[kind][2]
    columns = Evaluator(node)([x]).transpose(1, 0, 2, 3)
    columns = columns.reshape(group, len(columns) // group, -1).astype(np.float64)
    if center:
        columns -= columns.mean(axis=2, keepdims=True)
    expected = columns @ columns.transpose(0, 2, 1) / columns.shape[2]
    found, _ = covariance(node, x, center)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_taps_of_a_transposed_convolution_count_as_independent():
    node = convolution(2, 4, 2, {"strides": [2, 2]})
    node.op = "ConvTranspose"
    x = inputs(4)
    found, lost = covariance(node, x, True, 2 * x)
    assert found.shape == lost.shape == (2, 8, 8)
    np.testing.assert_allclose(lost, found, atol=1e-4)  # the weights being ones on the diagonal
    tap = np.cov(x.transpose(1, 0, 2, 3).reshape(4, -1), bias=True)
    blocks = found.reshape(2, 4, 2, 4, 2)
    for g in range(2):
        for i in range(4):
            for j in range(4):
                expected = tap[2 * g : 2 * g + 2, 2 * g : 2 * g + 2] if i == j else 0.0
                np.testing.assert_allclose(blocks[g, i, :, j], expected, atol=1e-4)


def output_error(weight, words, moments):
    """Mean squared error of outputs."""
    group = len(moments)
    difference = (words.values() - weight).reshape(group, len(weight) // group, -1)
    return float(np.einsum("gok,gkl,gol->", difference, moments, difference))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("granularity", "tile"), [*((g, 4) for g in GRANULARITIES), ("tile", (2, 3))]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_keeps_outputs_better_for_as_many_words(kind, granularity, tile, bits):
    kernel, channels, group, attributes = CONVOLUTIONS[kind]
    node = convolution(kernel, channels, group, attributes, out=8 * group)
    x = inputs(channels)
    moments, lost = covariance(node, x, True)
    settings = Settings(bits, granularity=granularity, tile=tile)
    words = feedback.encode_with_feedback(node.weight, moments, lost, settings, 0.25, group)
    plain = encode(node.weight, bits, 0.25, granularity=granularity, tile=tile, group=group)
    errors = [output_error(node.weight, w, moments) for w in (words, plain)]
    assert errors[0] < errors[1]
    chosen = (words.second & (2 ** (bits - 1) - 1)) != 0
    if granularity == "element":
        assert chosen.mean() <= 0.25
    elif tile == (2, 3):
        assert words.tile == tile
        numbers = tile_numbers(chosen.shape, tile, group)
        assert 0 < len(set(numbers[chosen])) <= 0.25 * (numbers.max() + 1)
    else:
        block = 4 if granularity == "tile" else chosen[0].size
        blocks = chosen.reshape(-1)[: chosen.size // block * block].reshape(-1, block)
        assert blocks.any(axis=1).sum() <= 0.25 * chosen.size / block + 1
    assert np.abs(words.integers()).max() <= words.limit


@pytest.mark.parametrize("ratio", [0.0, 0.15, 1.0])
def test_of_inputs_that_are_independent_words_are_the_nearest(ratio):
    """To within alpha, which is searched further than that of weights alone."""
    weight = np.random.default_rng(0).laplace(0, 0.1, (12, 3, 3, 7)).astype(np.float32)
    words = feedback.encode_with_feedback(
        weight, np.eye(63)[None], np.zeros((1, 12, 63)), Settings(4), ratio
    )
    nearest = encode(weight, 4, ratio, alpha=words.alpha)
    assert (words.integers() != nearest.integers()).mean() < 0.01  # ties among gains
    errors = [np.square(w.values() - weight).sum() for w in (words, encode(weight, 4, ratio))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_no_weight_alone_could_be_rounded_better(kind, bits, ratio):
    """Coordinate descent ends where it cannot go on, hardly any weight excepted."""
    kernel, channels, group, attributes = CONVOLUTIONS[kind]
    node = convolution(kernel, channels, group, attributes, out=8 * group)
    moments, lost = covariance(node, inputs(channels), True)
    words = feedback.encode_with_feedback(node.weight, moments, lost, Settings(bits), ratio)
    w = words.values().reshape(group, 8, -1).astype(np.float64)
    damped = feedback._damped(moments, feedback._DAMPING)
    slope = (w - node.weight.reshape(w.shape)) @ damped
    best = w - slope / np.diagonal(damped, axis1=1, axis2=2)[:, None]
    unit = words.unit().reshape(group, 8, 1)
    levels = np.unique(decode_codes(np.arange(2**bits, dtype=np.uint8), bits)).astype(float)
    second = words.second.reshape(w.shape) != 0
    one = np.abs(best[..., None] / unit[..., None] - levels).argmin(axis=-1)
    better = levels[one] * unit
    gained = np.abs(w - best) - np.abs(better - best) > 1e-6 * unit
    assert (gained & ~second).mean() < 0.02


def test_inputs_that_never_vary():
    weight = np.random.default_rng(0).laplace(0, 0.1, (8, 1, 1, 10)).astype(np.float32)
    moments = np.zeros((1, 10, 10))
    for last in (0.0, 1.0):
        moments[0, -1, -1] = last
        words = feedback.encode_with_feedback(
            weight, moments, np.zeros((1, 8, 10)), Settings(4), 0.15
        )
        assert np.isfinite(words.values()).all()


def test_variances_that_rounding_has_made_negative_count_as_none():
    weight = np.random.default_rng(0).laplace(0, 0.1, (8, 1, 1, 10)).astype(np.float32)
    lost, words = np.zeros((1, 8, 10)), []
    for least in (0.0, -4e-9):
        moments = np.diag([1e-9] * 9 + [least])[None].astype(np.float32)
        words.append(feedback.encode_with_feedback(weight, moments, lost, Settings(4), 0.0))
    errors = [np.abs(each.values() - weight)[..., -1].max() for each in words]
    assert errors[1] <= errors[0] * 1.01


@pytest.mark.filterwarnings("error")
def test_inputs_whose_squares_are_beyond_float32():
    node = convolution(3, 6, 1, {"pads": [1, 1, 1, 1]}, out=8)
    x = feedback.Inputs(1e25 * inputs(6))
    words = feedback.encode_layer(node, x, feedback.Inputs(x.values * 2), Settings(4), 0.15)
    assert np.array_equal(
        words.values(), feedback.encode_alone(node.weight, Settings(4), 0.15).values()
    )


def test_fit_makes_up_for_what_inputs_have_lost():
    node = convolution(3, 6, 1, {"pads": [1, 1, 1, 1]}, out=8)
    exact = inputs(6)
    x = 0.8 * exact  # as if quantization had shrunk them
    moments, lost = covariance(node, x, True, exact)
    expected = 0.25 * node.weight.reshape(1, 8, -1) @ moments
    np.testing.assert_allclose(lost, expected, atol=1e-3 * np.abs(expected).max())
    words = feedback.encode_with_feedback(node.weight, moments, lost, Settings(4), 1.0)
    larger = np.vdot(words.values(), node.weight) / np.vdot(node.weight, node.weight)
    assert 1.05 < larger < 1.3


@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_updates_are_factors_of_the_inverse(size):
    columns = np.random.default_rng(size).standard_normal((2, 4 * size, size)) + 1
    moments = (columns.transpose(0, 2, 1) @ columns).astype(np.float32)
    order, update = feedback._updates(moments)
    for g in range(2):
        assert (np.diff(np.diag(moments[g])[order[g]]) <= 0).all()
        assert np.array_equal(update[g], np.triu(update[g]))
        ordered = moments[g][np.ix_(order[g], order[g])].astype(np.float64)
        ordered += feedback._DAMPING * np.diag(ordered).mean() * np.eye(size)
        np.testing.assert_allclose(update[g].T @ update[g] @ ordered, np.eye(size), atol=1e-6)


def test_moments_that_rounding_has_made_impossible_get_more_damping():
    moments = np.array([[[1, 2], [2, 1]], [[4, 1], [1, 2]]], np.float32)
    _, update = feedback._updates(moments)
    assert np.isfinite(update).all() and (np.diagonal(update, axis1=1, axis2=2) > 0).all()
    _, alone = feedback._updates(moments[1:])
    assert np.array_equal(update[1], alone[0])


def test_groups_are_quantized_some_at_a_time(monkeypatch):
    """As if each were a layer by itself, where no second words are shared."""
    node = convolution(3, 6, 6, {"pads": [1, 1, 1, 1]}, out=12)
    x = feedback.Inputs(inputs(6))
    for ratio, together in ((0.0, True), (1.0, True), (0.25, False)):
        whole = feedback.encode_layer(node, x, x, Settings(4), ratio)
        monkeypatch.setattr(feedback, "_TOGETHER", 2 * 9**2)
        parts = feedback.encode_layer(node, x, x, Settings(4), ratio)
        monkeypatch.undo()
        assert parts.shape == whole.shape
        same = np.array_equal(parts.alpha, whole.alpha)
        same &= np.array_equal(parts.integers(), whole.integers())
        assert same if together else np.count_nonzero(parts.second) <= 0.25 * node.weight.size


@pytest.mark.parametrize(("most", "parts"), [(5, [8] * 3), (3, [4] * 6), (1, [])])
def test_tiles_are_whole_where_groups_are_quantized_some_at_a_time(most, parts, monkeypatch):
    """Of a depthwise layer a tile has outputs of several groups."""
    node = convolution(3, 12, 12, {"pads": [1, 1, 1, 1]}, out=24)
    x, settings = feedback.Inputs(inputs(12)), Settings(4, granularity="tile", tile=(16, 4))
    numbers = tile_numbers(node.weight.shape, (16, 4), 12)
    monkeypatch.setattr(feedback, "_TOGETHER", most * 9**2)
    seen, rounded = [], feedback.encode_with_feedback
    monkeypatch.setattr(
        feedback, "encode_with_feedback",
        lambda weight, *rest: seen.append(len(weight)) or rounded(weight, *rest),
    )  # fmt: skip
    words = feedback.encode_layer(node, x, x, settings, 0.25)
    assert seen == parts  # two groups have the four outputs of a tile
    assert words.shape == node.weight.shape and words.tile == (16, 4)
    assert 0 < len(set(numbers[words.second != 0])) <= 0.25 * (numbers.max() + 1)
    if not parts:  # each weight by itself
        alone = feedback.encode_alone(node.weight, settings, 0.25, 12)
        assert np.array_equal(words.integers(), alone.integers())


def test_budget_goes_where_outputs_gain(tmp_path):
    net = Net(shape=("batch", 4, 8, 8))
    kept = net.conv("x", 4, 16)
    lost = net.node("Mul", net.conv("x", 4, 16), net.constant(1e-3))
    model = net.model(net.conv(net.node("Add", kept, lost), 16, 4))
    x = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    report = convert(model, tmp_path / "net.stlq", calibration=x, residual_ratio=0.2)
    ratios = [layer.nzr for layer in report.layers if layer.nzr is not None]
    assert len(ratios) == 3
    assert min(ratios) < 0.01 and max(ratios) > 0.2
    assert 0.19 < report.nzr <= 0.2


@pytest.mark.parametrize(
    ("granularity", "tile"), [("tile", 8), ("filter", 8), ("tile", (3, 8)), ("tile", None)]
)
def test_budget_is_kept_by_blocks(granularity, tile, tmp_path):
    net = Net(shape=("batch", 4, 8, 8))
    model = net.model(net.conv(net.node("Relu", net.conv("x", 4, 32)), 32, 12))
    x = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    settings = {"granularity": granularity, "tile": tile, "residual_ratio": 0.3}
    report = convert(model, tmp_path / "net.stlq", calibration=x, **settings)
    assert 0.05 < report.nzr <= 0.3


def test_layers_of_too_many_inputs_are_rounded_as_they_are(tmp_path, monkeypatch):
    net = Net(shape=("batch", 4, 8, 8))
    model = net.model(net.conv(net.conv("x", 4, 6), 6, 4))
    x = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)

    def words(**settings):
        convert(model, tmp_path / "net.stlq", calibration=x, residual_ratio=1.0, **settings)
        nodes = packed_format.read(tmp_path / "net.stlq").nodes
        return [node.weights.values() for node in nodes if node.weights]

    plain, full = words(error_feedback=False), words()
    monkeypatch.setattr(feedback, "MOST_INPUTS", 4 * 9)
    first, second = words()
    np.testing.assert_array_equal(first, full[0])
    np.testing.assert_array_equal(second, plain[1])
    assert (second != full[1]).any()


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1), min_size=1, max_size=5),
    st.floats(0, 1),
    st.data(),
)
def test_what_the_budget_buys(worth, share, data):
    worth = [np.array(part, np.float32) for part in worth]
    size = st.integers(1, 4)
    kind = data.draw(st.sampled_from(["same", "of layers", "of blocks"]))
    sizes = [data.draw(size)] * len(worth)
    if kind == "of layers":
        sizes = [data.draw(size) for _ in worth]
    elif kind == "of blocks":  # of some layers
        sizes = [
            np.array([data.draw(size) for _ in part]) if data.draw(st.booleans()) else each
            for part, each in zip(worth, sizes, strict=True)
        ]
    parts = zip(worth, sizes, strict=True)
    costs = np.concatenate([np.full(len(part), size) for part, size in parts])
    left = share * costs.sum()
    found = np.concatenate(budget._bought(worth, sizes, left))
    everything = np.concatenate(worth)
    expected = np.zeros(len(everything), bool)
    for index in sorted(range(len(everything)), key=lambda i: -everything[i]):
        left -= costs[index]
        if left < 0:
            break
        expected[index] = True
    np.testing.assert_array_equal(found, expected)


@given(case=tilings(30))
def test_tiles_of_some_rows_are_tiles_of_the_weight(case):
    """Whole ones, so that their second words are worth as much; all of them, if rows are few."""
    shape, tile, group = case
    settings = Settings(granularity="tile", tile=tile)
    rows, groups = budget._some_rows(shape, group, settings)
    assert len(set(rows)) == len(rows) < budget._ROWS + min(tile[1], shape[0])
    numbers = tile_numbers(shape, tile, group)[rows]
    own = tile_numbers((len(rows), *shape[1:]), tile, groups)
    pairs = set(zip(numbers.ravel(), own.ravel(), strict=True))
    assert len(pairs) == len(set(numbers.ravel())) == own.max() + 1
    most = shape[0] if shape[3] == 1 else shape[0] // group
    if shape[0] <= budget._ROWS and most % min(tile[1], most) == 0:
        assert len(rows) == shape[0]
