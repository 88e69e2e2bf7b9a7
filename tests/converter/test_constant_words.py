"""Weights of operators in ONNX's own form: which constants become words, and which do not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from support.onnx_nets import Net, reference, samples

from logshift import converter, runtime
from logshift.converter import constant_words
from logshift.converter.export import export
from logshift.converter.float_graph import FloatNode
from logshift.converter.settings import Settings
from logshift.runtime.file import format as packed_format
from logshift.runtime.file.describe import describe


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def weight(net, *shape):
    return net.constant(net.rng.laplace(0, 0.1, shape))


def sequence(net, features=32):
    """The input (batch, 4, 8, 8) as (4 steps, batch, features)."""
    x = net.node("Reshape", "x", net.constant([0, 4, -1], np.int64))
    x = net.node("Transpose", x, perm=[1, 0, 2])
    return net.node("Slice", x, *(net.constant([v], np.int64) for v in (0, features, 2)))


def indices(net):
    x = net.node("ReduceMean", "x", net.constant([1, 2], np.int64), keepdims=0)
    return net.node("Cast", net.node("Abs", net.node("Mul", x, net.constant(3.0))), to=7)


def recurrent(op, gates):
    def build(net):
        w, r = weight(net, 2, gates * 24, 32), weight(net, 2, gates * 24, 24)
        bias = net.random(2, 2 * gates * 24)
        outputs = net.node(
            op, sequence(net), w, r, bias, hidden_size=24, direction="bidirectional", outputs=2
        )
        return outputs[0], {w: (0, 1), r: (0, 1)}

    return build


def matrix_on_the_left(net):
    w = weight(net, 48, 64)
    return net.node("MatMul", w, net.node("Reshape", "x", net.constant([0, 4, 64, 1], np.int64))), {
        w: (0,)
    }


def matrices(net):
    """One for each channel."""
    w = weight(net, 4, 32, 24)
    x = net.node("Reshape", "x", net.constant([0, 4, 2, 32], np.int64))
    return net.node("MatMul", x, w), {w: (0, 2)}


def matrix(net):
    w = weight(net, 32, 40)
    x = net.node("Reshape", "x", net.constant([0, 2, 2, 2, 32], np.int64))
    return net.node("MatMul", x, w), {w: (1,)}


def gemm(net):
    """Of a transposed matrix, so that pictures are mixed."""
    w = weight(net, 40, 32)
    x = net.node("Transpose", net.node("Reshape", "x", net.constant([-1, 32], np.int64)))
    return net.node("Gemm", x, w, transA=1, transB=1), {w: (0,)}


def volume_transposed(net):
    w = weight(net, 4, 8, 3, 4, 4)
    x = net.node("Reshape", "x", net.constant([0, 4, 4, 4, 4], np.int64))
    return net.node("ConvTranspose", x, w), {w: (1,)}


def table(net):
    w = weight(net, 40, 32)
    return net.node("Gather", w, indices(net)), {w: (0,)}


def sum_of_products(net):
    w = weight(net, 4, 32, 12)
    x = net.node("Reshape", "x", net.constant([0, 4, 2, 32], np.int64))
    return net.node("Einsum", x, w, equation="bcij,cjk->bcik"), {w: (0, 2)}


KINDS = {
    "LSTM": recurrent("LSTM", 4), "GRU": recurrent("GRU", 3), "RNN": recurrent("RNN", 1),
    "MatMul": matrix, "matrices": matrices, "left": matrix_on_the_left, "Gemm": gemm,
    "ConvTranspose": volume_transposed, "Gather": table, "Einsum": sum_of_products,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_become_words(kind, path):
    net = Net(shape=("batch", 4, 8, 8))
    y, expected = KINDS[kind](net)
    model = net.model(y)
    converter.convert(model, path, calibration=[samples(model)])
    graph = packed_format.read(path)
    assert {name: words.axes for name, words in graph.constant_words.items()} == expected
    given = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, array in graph.constants.items():
        if name not in expected:
            assert name not in given or np.array_equal(array, given[name])
            continue
        assert array.shape == given[name].shape
        error = np.linalg.norm(array - given[name]) / np.linalg.norm(given[name])
        assert 0.01 < error < 0.25
    x = samples(model)
    found, exact = runtime.load(path).run(x), reference(model, x)[y]
    assert np.vdot(found, exact) > 0.98 * np.linalg.norm(found) * np.linalg.norm(exact)
    assert sum(node["bytes"] for node in describe(path)["nodes"]) > 0


def test_what_is_no_weight_stays_what_it_is(path):
    net = Net(shape=("batch", 4, 8, 8))
    x = net.node("Reshape", "x", net.constant([0, 1, 8, 32], np.int64))
    steps = net.node("Gather", net.node("Shape", x), net.constant(2, np.int64))
    numbers = net.node("Range", net.constant(0, np.int64), steps, net.constant(1, np.int64))
    positions = net.node("Gather", weight(net, 64, 32), numbers)
    x = net.node("Mul", net.node("Add", x, positions), weight(net, 8, 32))
    both = weight(net, 32, 40)
    results = [
        net.node("MatMul", x, weight(net, 32, 31)),  # of less than 1024
        net.node("MatMul", x, both),
        net.node("Add", net.node("MatMul", x, weight(net, 32, 4)), weight(net, 300, 1, 8, 1)),
        net.node("Gather", weight(net, 400, 4), indices(net)),  # like anchors
        net.node("Add", both, net.node("ReduceMean", x)),
    ]
    model = net.model(*results)
    converter.convert(model, path, calibration=[samples(model)])
    graph = packed_format.read(path)
    assert graph.constants and not graph.constant_words


@pytest.mark.parametrize("kind", ["LSTM", "matrices", "Gather"])
def test_weights_of_nodes_that_are_kept_stay_float(kind, path, tmp_path):
    net = Net(shape=("batch", 4, 8, 8))
    y, weights = KINDS[kind](net)
    model = net.model(y)
    name = next(node.name for node in model.graph.node if node.output[0] == y)
    converter.convert(model, path, calibration=[samples(model)], keep_float=[name])
    graph = packed_format.read(path)
    given = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert not graph.constant_words
    assert all(np.array_equal(graph.constants[name], given[name]) for name in weights)
    # And after an export, which says so.
    export(graph, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    converter.convert(again, path, calibration=[samples(again)])
    assert not packed_format.read(path).constant_words


@pytest.mark.parametrize("kind", ["LSTM", "matrices", "ConvTranspose", "Gather"])
def test_words_come_back_from_an_export(kind, path, tmp_path):
    net = Net(shape=("batch", 4, 8, 8))
    model = net.model(KINDS[kind](net)[0])
    converter.convert(model, path, calibration=[samples(model)])
    graph = packed_format.read(path)
    export(graph, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    converter.convert(again, path, calibration=[samples(again)], weight_bits=2)
    back = packed_format.read(path)
    assert graph.constant_words.keys() == back.constant_words.keys() != set()
    for name, words in graph.constant_words.items():
        found = back.constant_words[name]
        assert np.array_equal(found.weights.integers(), words.weights.integers())
        assert np.array_equal(back.constants[name], graph.constants[name])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "MatMul"])
def test_rounding_makes_up_for_errors_where_inputs_are_known(kind, tmp_path):
    net = Net(shape=("batch", 4, 8, 8))
    y, _ = KINDS[kind](net)
    model = net.model(y)
    x = samples(model)["x"]
    x += 2 * np.random.default_rng(1).standard_normal((*x.shape[:2], 1, 1))
    x = np.cumsum(x, axis=3, dtype=np.float32)
    exact, errors = reference(model, {"x": x})[y], []
    for feedback in (False, True):
        path = tmp_path / f"{feedback}.stlq"
        converter.convert(
            model, path, calibration=[{"x": x}], error_feedback=feedback, weight_bits=3
        )
        errors.append(np.linalg.norm(runtime.load(path).run(x) - exact))
    assert errors[1] < 0.8 * errors[0]


def test_rows_that_are_read_are_not_too_many():
    net = Net(shape=("batch", 4, 8, 8))
    y, weights = matrix(net)
    (name,) = weights
    array = np.random.default_rng(0).standard_normal((32, 40)).astype(np.float32)
    node = FloatNode("MatMul", "m", ["x", name], y, opset=18)
    x = np.arange(10**6, dtype=np.float64).reshape(-1, 2, 32)
    rows = constant_words.rows_read(node, 1, [x, array], [])
    assert rows.shape == (1, 4096, 32) and rows.dtype == np.float32
    assert np.array_equal(rows, constant_words.rows_read(node, 1, [x, array], []))
    words = constant_words.encode_constant(array, (1,), rows, rows, Settings(4), 0.2)
    assert words.weights.shape == (40, 1, 1, 32) and words.shape == (32, 40)
    x[0] = np.inf
    assert constant_words.rows_read(node, 1, [x, array], []) is None


def test_a_network_of_matrices_packs_to_a_quarter(path):
    """Which are in a recurrent network, a table and matrices of several axes."""
    net = Net(shape=("batch", 4, 8, 8))
    x = net.node("Gather", weight(net, 400, 64), indices(net))
    x = net.node("Unsqueeze", x, net.constant([1], np.int64))
    x = net.node("Transpose", x, perm=[2, 1, 0, 3])
    x = net.node("Squeeze", x, net.constant([1], np.int64))
    w, r = weight(net, 1, 512, 64), weight(net, 1, 512, 128)
    x = net.node("LSTM", x, w, r, hidden_size=128, outputs=2)[0]
    model = net.model(net.node("MatMul", x, weight(net, 128, 96)))
    converter.convert(model, path, calibration=[samples(model)])
    assert path.stat().st_size < 0.25 * model.ByteSize()
