"""Nodes that run together do what they do one by one."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_nets import Net, noise

pytest.importorskip("onnxruntime")

from logshift import converter, runtime  # noqa: E402
from logshift.converter.evaluate import Evaluator, Network, results, rows  # noqa: E402
from logshift.converter.onnx_model import load  # noqa: E402
from logshift.converter.pipeline import lowered, placed  # noqa: E402
from logshift.converter.samples import open_samples  # noqa: E402
from logshift.converter.settings import Settings  # noqa: E402

SIZE = (3, 16, 16)


def heads():
    """Clamps, functions, a sum, pools, a size that is computed, two heads; returns a model."""
    net = Net(shape=("batch", *SIZE))
    x = net.node("Relu", net.conv("x", 3, 8))
    y = net.conv(x, 8, 8)
    y = net.node("Add", x, net.node("Mul", y, net.node("Sigmoid", y)))
    y = net.node("Clip", y, net.constant(-1.0), net.constant(2.0))
    pooled = net.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    first = net.node("Tanh", net.conv(pooled, 8, 5))
    second = net.node("LeakyRelu", net.conv(net.node("GlobalAveragePool", y), 8, 5), alpha=0.1)
    ends = [net.constant([n], np.int64) for n in (0, 2)]
    size = net.node("Slice", net.node("Shape", first), *ends)
    shape = net.node("Concat", size, net.constant([-1], np.int64), axis=0)
    first, second = (net.node("Reshape", y, shape) for y in (first, second))
    return net.model(net.node("Concat", first, second, axis=2))


def float_graph(model, x):
    loaded, settings = load(model), Settings()
    network = lowered(loaded, open_samples(x, loaded.inputs, None), settings)
    return placed(network, loaded, settings, ())


def one_by_one(graph, values):
    """Evaluate nodes one by one, from those tensors on that are in `values` already."""
    values = {**values, **graph.constants}
    for node in graph.nodes:
        found = results(node, Evaluator(node), values, graph.constants, batches=1)
        values.update({name: y for name, y in found.items() if name not in values})
    return values


def close(y, z):
    return np.allclose(rows(y), rows(z), rtol=1e-4, atol=1e-5)


def test_a_network_does_what_its_nodes_do():
    x = noise(3, SIZE)
    graph = float_graph(heads(), x)
    network = Network(graph, {"x": x}, 1)
    assert any(len(stretch.nodes) > 2 for stretch in network.stretches)
    expected = one_by_one(graph, {"x": x})
    assert expected.keys() == network.values.keys()
    for name, y in expected.items():
        assert close(y, network.values[name]), name


def test_any_tensor_can_become_another_one():
    x = noise(3, SIZE)
    graph = float_graph(heads(), x)
    network = Network(graph, {"x": x}, 1)
    for node in graph.nodes:
        if node.is_onnx:
            continue
        other = rows(network.values[node.output]) + np.float32(0.25)
        changed = network.rerun({node.output: lambda _, y=other: y})
        expected = one_by_one(graph, {"x": x, node.output: other})
        for info in graph.outputs:
            found = changed.get(info.name, network.values[info.name])
            assert close(expected[info.name], found), (node.name, info.name)
        # Nothing else is touched.
        assert all(not close(y, network.values[name]) for name, y in changed.items())


def test_heads_are_apart():
    """What does not depend on a tensor is not computed again when that changes."""
    x = noise(2, SIZE)
    graph = float_graph(heads(), x)
    network = Network(graph, {"x": x}, 1)
    for stretch in network.stretches:
        made = {node.output for node in stretch.nodes}
        assert all(made.intersection(node.inputs) for node in stretch.nodes[1:])
    tanh = next(n for n in graph.nodes if n.is_conv and n.weight.shape[0] == 5)
    changed = network.rerun({tanh.output: lambda values: rows(values[tanh.output]) * 2})
    assert not any(n.output in changed for n in graph.nodes if n.op == "GlobalAveragePool")


def test_one_node_may_be_several():
    """Of a node that is fused into one reader, and by itself for others, both have its name."""
    net = Net(shape=("batch", *SIZE))
    x = net.conv("x", 3, 8)
    y = net.node("Mul", x, net.node("Sigmoid", x))
    relu = net.node("Relu", x)
    model = net.model(x, y, relu, net.node("Add", relu, relu))
    x = noise(2, SIZE)
    graph = float_graph(model, x)
    network, expected = Network(graph, {"x": x}, 1), one_by_one(graph, {"x": x})
    assert all(close(y, network.values[name]) for name, y in expected.items())


def test_batches_in_which_more_is_found_than_in_others():
    net = Net(shape=(1, *SIZE))
    x = net.node("Relu", net.conv("x", 3, 4))
    found = net.node("NonZero", net.node("Greater", x, net.constant(1.0)))
    picked = net.node("GatherND", x, net.node("Transpose", found, perm=[1, 0]))
    x = noise(3, SIZE)
    graph = float_graph(net.model(picked), x)
    network = Network(graph, {"x": x}, 3)
    first = next(node for node in graph.nodes if node.is_conv)
    assert len({y.shape for y in network.values[found]}) > 1
    for factor, is_other in ((1, False), (2, True)):
        other = network.values[first.output] * np.float32(factor)
        assert (found in network.rerun({first.output: lambda _, y=other: y})) == is_other


@pytest.mark.parametrize("axis", [0, 1])
def test_outputs_whose_sizes_the_data_decide(axis, tmp_path):
    """As those of a detector that picks its boxes itself: more in one batch than in another."""
    net = Net(shape=(1, *SIZE))
    scores = net.node("Relu", net.conv("x", 3, 4))
    found = net.node("NonZero", net.node("Greater", scores, net.constant(2.5)))
    picked = net.node("GatherND", scores, net.node("Transpose", found, perm=[1, 0]))
    picked = net.node("Unsqueeze", picked, net.constant([1 - axis], np.int64))
    model, x = net.model(picked, scores), noise(6, SIZE)
    report = converter.convert(model, tmp_path / "net.stlq", calibration=x)
    session = runtime.load(tmp_path / "net.stlq")
    for one in x:
        y = session.run({"x": one[None]})
        assert (y[picked].size, y[picked].ndim) == ((y[scores] > 2.5).sum(), 2)
    assert report.verdict.samples > 0
