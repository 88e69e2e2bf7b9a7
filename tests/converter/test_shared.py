"""Weights that several nodes have: quantized once, stored once, for what all of these read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from support.onnx_nets import Net, samples

from logshift import converter, runtime
from logshift.converter import feedback, shared
from logshift.converter.export import export
from logshift.runtime.file import format as packed_format


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def convert(model, path, **settings):
    converter.convert(model, path, calibration=[samples(model)], **settings)
    return packed_format.read(path)


def convolutions(graph):
    return [node for node in graph.nodes if node.weights is not None]


def several(copies=False, kernel=3):
    """Three convolutions with one weight, or with equal ones; a fourth with another."""
    net = Net(shape=("batch", 8, 8, 8))
    values = net.rng.standard_normal((8, 8, kernel, kernel)) / 10
    weight, x = net.constant(values), "x"
    for number in range(3):
        own = net.constant(values) if copies and number else weight
        bias = net.random(8)
        x = net.node("Relu", net.node("Conv", x, own, bias, pads=[kernel // 2] * 4))
    return net.model(net.conv(x, 8, 8))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("settings", [{}, {"error_feedback": False}, {"weight_bits": 3}])
def test_words_are_chosen_once(copies, settings, path):
    model = several(copies)
    graph = convert(model, path, **settings)
    *same, other = convolutions(graph)
    assert all(node.weights is same[0].weights for node in same)
    assert other.weights is not same[0].weights
    assert len({node.bias.tobytes() for node in same}) == 3
    x = samples(model)["x"]
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    found = runtime.load(path).run(x)
    assert np.vdot(found, expected[0]) > 0.98 * np.linalg.norm(found) * np.linalg.norm(expected[0])


def test_what_stays_float_shares_with_nobody(path):
    model = several()
    graph = convert(model, path, keep_float=[model.graph.node[2].name])
    first, third, _ = convolutions(graph)
    assert first.weights is third.weights
    kept = next(node for node in graph.nodes if node.float_weights is not None)
    weight = [t for t in model.graph.initializer if t.dims == [8, 8, 3, 3]][0]
    values = np.frombuffer(weight.raw_data, np.float32).reshape(8, 8, 3, 3)
    assert np.array_equal(kept.float_weights, values.transpose(0, 2, 3, 1))


def test_the_export_shares_them_too_and_comes_back_the_same(path, tmp_path):
    graph = convert(several(), path)
    export(graph, tmp_path / "again.onnx")
    model = onnx.load(tmp_path / "again.onnx")
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len({node.input[1] for node in convs}) == 2
    converter.convert(model, tmp_path / "again.stlq", calibration=[samples(model)])
    back = packed_format.read(tmp_path / "again.stlq")
    for before, after in zip(convolutions(graph), convolutions(back), strict=True):
        assert np.array_equal(before.weights.integers(), after.weights.integers())
        assert np.array_equal(before.bias, after.bias)
    assert len({id(node.weights) for node in convolutions(back)}) == 2


def unrolled(steps):
    """One matrix and bias, step after step, as of a recurrent network that was unrolled."""
    net = Net(shape=("batch", 64, 1, 1))
    weight, bias = net.constant(net.rng.standard_normal((64, 64)) / 8), net.random(64)
    x = net.node("Flatten", "x")
    for _ in range(steps):
        x = net.node("Tanh", net.node("Gemm", x, weight, bias, transB=1))
    return net.model(x)


def test_an_unrolled_loop_holds_its_weight_and_its_bias_once(path):
    """The biases would else outweigh the words."""
    graph = convert(unrolled(20), path)
    nodes = convolutions(graph)
    assert len(nodes) == 20 and len({id(node.weights) for node in nodes}) == 1
    places = packed_format.read_layout(path).places
    for name in ("first", "alpha", "bias"):
        assert len({place for key, place in places.items() if key.endswith(f".{name}")}) == 1
    assert path.stat().st_size < 2 * 64 * 64


def test_one_bias_makes_up_for_the_mean_error_of_all_steps(path):
    graph = convert(unrolled(12), path, weight_bits=3, residual_ratio=0.0)
    shared_bias = convolutions(graph)[0].bias
    plain = convert(unrolled(12), path, weight_bits=3, residual_ratio=0.0, bias_correction=False)
    assert not np.array_equal(shared_bias, convolutions(plain)[0].bias)


def test_ahead_is_what_the_float_network_says():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 1, 1, 6)).astype(np.float32)
    values = weight + rng.standard_normal(weight.shape).astype(np.float32) / 8
    mean = rng.standard_normal((1, 6))
    ahead = shared.Ahead(np.zeros((1, 6, 6), np.float32), mean, True)
    x = rng.standard_normal((10**5, 6)) * 0.1 + mean
    lost = (x @ (weight - values).reshape(4, 6).T).mean(axis=0)
    np.testing.assert_allclose(ahead.shift(weight, values), lost, atol=1e-2)


def test_covariances_of_all_nodes_are_summed(path, monkeypatch):
    """The second node reads three times as much as the first."""
    seen = []
    encode = feedback.encode_with_feedback

    def spy(weight, moments, *rest):
        seen.append(moments)
        return encode(weight, moments, *rest)

    monkeypatch.setattr(feedback, "encode_with_feedback", spy)
    for factors in ((1.0,), (1.0, 3.0)):
        net = Net(shape=("batch", 4, 8, 8))
        weight = net.random(4, 4, 1, 1)
        inputs = [net.node("Mul", "x", net.constant(factor)) for factor in factors]
        results = [net.node("Conv", x, weight) for x in inputs]
        convert(net.model(net.node("Sum", *results, *results)), path)
    alone, together = seen
    np.testing.assert_allclose(together, 10 * alone, rtol=0.02, atol=0.1)


def test_shares_are_the_same_for_all(path):
    """Second words are bought once for a weight, whoever has it."""
    graph = convert(several(), path, residual_ratio=0.2)
    *same, other = convolutions(graph)
    words = np.count_nonzero(same[0].weights.second) + np.count_nonzero(other.weights.second)
    assert words <= 0.2 * (same[0].weights.first.size + other.weights.first.size)
