"""Volumes (N, C, D, H, W): convolved and pooled as the pictures that they consist of."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_nets import Net, convert, operations, reference, samples

from logshift import runtime
from logshift.runtime.plan.schedule import NumpyStep

SHAPE = ("batch", 4, 6, 7, 8)


def convolution(net, x, channels=4, out=4, kernel=(3, 3, 3), bias=True, **attributes):
    weight = net.random(out, channels // attributes.get("group", 1), *kernel)
    more = [net.random(out)] if bias else []
    return net.node("Conv", x, weight, *more, **attributes)


def check(net, y, path, packed):
    """Compare with onnxruntime, on float32 and on codes; everything must have a kernel."""
    model = net.model(y)
    exact = convert(model, path, keep_float=["*"])
    assert operations(exact).count("Conv") == packed and not exact.quantization
    inputs = {name: x[:2] for name, x in samples(model).items()}
    (expected,) = reference(model, inputs).values()
    for kernels, threads in (("auto", 1), ("auto", 2), ("reference", 1)):
        session = runtime.Session(exact, kernels=kernels, threads=threads)
        found = session.run(inputs)
        assert not any(isinstance(p, NumpyStep) for p in session._plan(inputs).parts)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    found = runtime.Session(convert(model, path)).run(inputs)
    assert found.shape == expected.shape
    assert np.square(found - expected).sum() < 0.02 * np.square(expected).sum()


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1] * 6},
        {"strides": [2, 2, 2], "pads": [1, 1, 1, 1, 1, 1]},
        {"strides": [1, 2, 1], "pads": [2, 0, 1, 0, 1, 2]},
        {"dilations": [2, 1, 2], "pads": [2, 1, 0, 1, 0, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 1, 2]},
        {"auto_pad": "VALID"},
        {"group": 2, "pads": [1] * 6},
        {"group": 4, "out": 8, "pads": [1] * 6},
        {"kernel": (1, 3, 3), "pads": [0, 1, 1, 0, 1, 1]},
        {"kernel": (3, 1, 1), "pads": [1, 0, 0, 1, 0, 0], "strides": [2, 1, 1]},
        {"kernel": (1, 1, 1), "out": 5, "bias": False},
        {"kernel": (1, 1, 1), "strides": [2, 2, 2]},
        {"kernel": (2, 3, 1), "pads": [1, 1, 0, 0, 1, 0]},
    ],
    ids=str,
)
def test_convolution(attributes, tmp_path):
    net = Net(shape=SHAPE)
    check(net, convolution(net, "x", **attributes), tmp_path / "net.stlq", 1)


@pytest.mark.parametrize("group", [1, 2])
def test_tiles_are_at_one_kernel_position(group, tmp_path):
    net = Net(shape=("batch", 32 * group, 4, 5, 6))
    weight = 0.01 * np.random.default_rng(0).standard_normal((32 * group, 32, 3, 1, 2))
    weight[16:32, 16:, 1, 0, 1] *= 100  # which is one tile, and has most to gain
    y = net.node("Conv", "x", net.constant(weight), group=group)
    options = {"granularity": "tile", "residual_ratio": 256 / weight.size}
    graph = convert(net.model(y), tmp_path / "net.stlq", **options)
    (node,) = (node for node in graph.nodes if node.op == "Conv")
    assert node.weights.tile == (16, 16)
    second = node.weights.second.reshape(32 * group, 1, 2, 3, 32)  # (O, kh, kw, kd, C / group)
    chosen = np.count_nonzero(second[16:32, 0, 1, 1, 16:])
    assert 128 < chosen == np.count_nonzero(second)


def test_what_is_done_element_by_element_is_done_to_pictures(tmp_path):
    net = Net(shape=SHAPE)
    x = net.node("Relu", convolution(net, "x", pads=[1] * 6))
    y = convolution(net, x, pads=[1] * 6)
    factors = [net.constant(v) for v in (np.ones(4) * 2, np.ones(4), np.zeros(4), np.ones(4) * 3)]
    y = net.node("LeakyRelu", net.node("BatchNormalization", y, *factors), alpha=0.1)
    y = convolution(net, net.node("Add", x, y), strides=[2, 2, 2])
    y = net.node("Sigmoid", net.node("Mul", y, net.constant(0.1)))  # which saturates nowhere
    path = tmp_path / "net.stlq"
    check(net, y, path, 3)
    graph = convert(net.model(y), path)
    plain = {"Pad", "Slice", "Unsqueeze", "Concat", "Reshape", "Transpose"}
    assert {n.op for n in graph.nodes if n.is_onnx} <= plain


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 3, 3), (3, 2, 1)])
def test_max_pool(kernel, tmp_path):
    net = Net(shape=SHAPE)
    x = convolution(net, "x", pads=[1] * 6)
    y = net.node("MaxPool", x, kernel_shape=list(kernel), strides=[2, 2, 1])
    check(net, convolution(net, y, kernel=(1, 2, 2)), tmp_path / "net.stlq", 2)


def test_head_of_a_classifier(tmp_path):
    net = Net(shape=SHAPE)
    x = net.node("Relu", convolution(net, "x", pads=[1] * 6))
    y = net.node("Flatten", net.node("GlobalAveragePool", x))
    check(net, net.node("Gemm", y, net.random(4, 3), net.random(3)), tmp_path / "net.stlq", 2)


def test_volumes_that_somebody_else_reads(tmp_path):
    net = Net(shape=SHAPE)
    x = net.node("Relu", convolution(net, "x", pads=[1] * 6))
    y = net.node("Concat", x, convolution(net, x, pads=[1] * 6), axis=1)
    y = net.node("Mul", y, net.random(1, 8, 1, 1, 1))
    check(net, convolution(net, y, channels=8), tmp_path / "net.stlq", 3)
