"""Models that not all of onnxslim, onnxruntime and packed operators can take."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_nets import Net, convert, reference, samples

from logshift import converter, runtime
from logshift.converter import ConversionError, onnx_model, simplify
from logshift.runtime.onnx_ops import numpy_ops


def single(nodes, inputs, outputs, constants=None, opset=18):
    """A model of a few nodes; inputs are arrays, outputs names or ValueInfoProtos."""
    graph = helper.make_graph(
        nodes, "net",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for k, x in inputs.items()
        ],
        [onnx.ValueInfoProto(name=y) if isinstance(y, str) else y for y in outputs],
        [numpy_helper.from_array(x, name) for name, x in (constants or {}).items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", opset)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def in_float(model, inputs, path):
    """Outputs by name, after a conversion without quantization."""
    finite = {name: np.nan_to_num(x) for name, x in inputs.items()}
    converter.convert(model, path, calibration=[finite], keep_float=["*"])
    session = runtime.load(path, threads=1)
    found = session.run(inputs)
    return found if isinstance(found, dict) else {session.outputs[0].name: found}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert found[name].shape == y.shape and found[name].dtype == y.dtype
        np.testing.assert_allclose(found[name], y, rtol=1e-4, atol=1e-6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


# --- what onnxslim and onnxruntime fail at --------------------------------------------------------


def fails(model, **options):
    raise KeyError("a bug")


def breaks(model, **options):
    del model.graph.node[0]
    return model


@pytest.mark.parametrize("slim", [fails, breaks])
def test_model_that_cannot_be_simplified(slim, path, monkeypatch):
    net = Net()
    half = net.node("Constant", value=numpy_helper.from_array(np.float32(0.5)))
    model = net.model(net.conv(net.node("Mul", net.conv("x"), half)))
    inputs = {"x": samples(model)["x"][:2]}
    monkeypatch.setattr(simplify.onnxslim, "slim", slim)
    graph = convert(model, path)
    assert [node.op for node in graph.nodes if node.op == "Conv"] == ["Conv", "Conv"]
    same(in_float(model, inputs, path), reference(model, inputs))


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 24, reason="needs the operator Swish")
def test_operator_that_onnxruntime_does_not_know(path):
    (x,) = arrays((2, 3, 4))
    model = single([helper.make_node("Swish", ["x"], ["y"], alpha=2.0)], {"x": x}, ["y"], opset=24)
    same(in_float(model, {"x": x}, path), {"y": x / (1 + np.exp(-2 * x))})


def test_onnxruntime_that_departs_from_the_specification(path, monkeypatch):
    (x,) = arrays((2, 3, 4))
    model = single([helper.make_node("Erf", ["x"], ["y"])], {"x": x}, ["y"])
    run = onnx_model.run
    monkeypatch.setattr(
        onnx_model, "run", lambda *a, **k: [y if k else y + 1 for y in run(*a, **k)]
    )
    assert np.abs(in_float(model, {"x": x}, path)["y"]).max() < 1
    monkeypatch.setattr(onnx_model, "run_reference", lambda *a: None)
    with pytest.raises(ConversionError, match="differs from the ONNX model"):
        in_float(model, {"x": x}, path)


# --- tensors of all kinds -------------------------------------------------------------------------


def test_output_without_dimensions(path):
    (x,) = arrays((4, 3, 5))
    model = single([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], {"x": x}, ["y"])
    found = in_float(model, {"x": x}, path)
    assert found["y"].shape == ()
    same(found, reference(model, {"x": x}))


def test_statistics_of_the_whole_batch(path):
    (x,) = arrays((3, 4))
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"]),
        helper.make_node("Sqrt", ["mean"], ["y"]),
    ]
    constants = {"axes": np.array([0, 1])}
    model = single(nodes, {"x": abs(x)}, ["y"], constants)
    same(in_float(model, {"x": abs(x)}, path), reference(model, {"x": abs(x)}))


def test_first_output_is_not_asked_for(path):
    x, w, r = arrays((5, 2, 3), (1, 4, 3), (1, 4, 4))
    node = helper.make_node("RNN", ["x", "w", "r"], ["", "y"], hidden_size=4)
    model = single([node], {"x": x}, ["y"], {"w": w, "r": r})
    same(in_float(model, {"x": x}, path), reference(model, {"x": x}))


def test_infinite_mask(path):
    x, w = arrays((2, 3, 4, 4), (3, 3, 1, 1))
    mask = np.triu(np.full((1, 1, 4, 4), -np.inf, np.float32), 1)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Add", ["conv", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"], axis=3),
    ]
    model = single(nodes, {"x": x}, ["masked", "y"], {"w": w, "mask": mask})
    same(in_float(model, {"x": x}, path), reference(model, {"x": x}))


def test_infinite_input(path):
    x = np.array([1, np.inf, -np.inf, np.nan], np.float32)
    model = single([helper.make_node("IsInf", ["x"], ["y"])], {"x": x}, ["y"])
    assert in_float(model, {"x": x}, path)["y"].tolist() == [False, True, True, False]


def test_empty_tensor(path):
    x = np.zeros((2, 0, 4), np.float32)
    model = single(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"])], {"x": x}, ["y"],
        {"axes": np.array([1])},
    )  # fmt: skip
    same(in_float(model, {"x": x}, path), {"y": np.zeros((2, 1, 4), np.float32)})


@pytest.mark.parametrize("first", [0, 1])
def test_logits_and_probabilities(first, path):
    net = Net()
    logits = net.node("Gemm", net.node("Flatten", net.conv("x")), net.random(256, 5))
    outputs = [logits, net.node("Softmax", logits)]
    model = net.model(outputs[first], outputs[1 - first])
    inputs = {"x": samples(model)["x"][:2]}
    same(in_float(model, inputs, path), reference(model, inputs))
    found = runtime.Session(convert(model, path)).run(inputs)
    for name, y in reference(model, inputs).items():
        assert found[name].shape == y.shape
        np.testing.assert_allclose(found[name], y, atol=0.1 * np.abs(y).max())


@pytest.mark.parametrize("value", [None, 3])
def test_constant_of_a_computed_shape(value, path):
    x = np.array([2, 3], np.int64)
    given = {} if value is None else {"value": helper.make_tensor("v", TensorProto.INT32, [1], [3])}
    model = single([helper.make_node("ConstantOfShape", ["x"], ["y"], **given)], {"x": x}, ["y"])
    same(in_float(model, {"x": x}, path), reference(model, {"x": x}))


def test_bounds_that_cross(path):
    net = Net()
    low, high = net.constant(0.5), net.constant(-0.25)
    model = net.model(net.conv(net.node("Clip", net.conv("x"), low, high)))
    inputs = {"x": samples(model)["x"][:2]}
    same(in_float(model, inputs, path), reference(model, inputs))
    graph = convert(model, path)
    (y,) = reference(model, inputs).values()
    np.testing.assert_allclose(runtime.Session(graph).run(inputs), y, atol=0.05 * np.abs(y).max())


def test_sequences_are_refused(path):
    (x,) = arrays((4, 3))
    output = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    model = single([helper.make_node("SplitToSequence", ["x"], ["y"])], {"x": x}, [output])
    with pytest.raises(
        ConversionError, match="SplitToSequence 'y': the model gives a sequence back"
    ):
        in_float(model, {"x": x}, path)


def test_integer_division():
    big = 2**62 + 1
    x = np.array([7, -7, 7, -7, 6, big, -big, 5], np.int64)
    y = np.array([2, 2, -2, -2, 3, 1, 1, 0], np.int64)
    (found,) = numpy_ops.compute("Div", {}, 14, [x, y], 1)
    assert found.dtype == np.int64
    assert found.tolist() == [3, -3, -3, 3, 2, big, -big, 0]
    (found,) = numpy_ops.compute("Div", {}, 14, [np.uint8([200, 7]), np.uint8([7, 200])], 1)
    assert found.tolist() == [28, 0] and found.dtype == np.uint8
