"""Lowering and fusion: every ONNX operator, against onnxruntime, through the packed file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import oracle
from support.onnx_nets import SHAPE, Net, check, convert, reference, samples
from support.operator_nets import KEPT, OPERATORS, batch_norm, resized

from logshift import converter, runtime
from logshift.converter import ConversionError
from logshift.converter.export import export
from logshift.runtime.file import format as packed_format


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name, tmp_path):
    build, expected = OPERATORS[name]
    net = Net(shape=SHAPE) if "Resize" in expected else Net()
    outputs = build(net)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    check(net.model(*outputs), tmp_path / "net.stlq", expected)


@pytest.mark.parametrize("how", ["weights alone", "nothing"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_on_float32(name, how, tmp_path):
    build, expected = OPERATORS[name]
    net = Net(shape=SHAPE) if "Resize" in expected else Net()
    outputs = build(net)
    model = net.model(*(outputs if isinstance(outputs, tuple) else (outputs,)))
    quantized = {"weights alone": {"activation_bits": 32}, "nothing": {"keep_float": ["*"]}}
    graph = convert(model, tmp_path / "net.stlq", **quantized[how])
    assert not graph.quantization
    inputs = {name: x[:2] for name, x in samples(model).items()}
    first, second, plain = (
        runtime.Session(graph, kernels=kernels, threads=threads).trace(inputs)
        for kernels, threads in (("auto", 1), ("auto", 2), ("reference", 1))
    )
    for output, y in reference(model, inputs).items():
        assert np.array_equal(first[output], second[output])
        assert np.array_equal(first[output], plain[output])
        assert first[output].shape == y.shape
        if how == "nothing":
            np.testing.assert_allclose(first[output], y, rtol=1e-4, atol=1e-5)
        else:
            assert np.square(first[output] - y).sum() < 10**-2.6 * np.square(y).sum()


@pytest.mark.parametrize(
    "settings", [{"activation_bits": {"n_Conv2": 32}}, {"keep_float": ["*Conv2"]}]
)
def test_one_layer_on_float32(settings, tmp_path):
    net = Net()
    x = net.node("Relu", net.conv("x"))
    y = net.node("Add", net.node("Relu", net.conv(x)), x)
    model = net.model(net.conv(y))
    graph = convert(model, tmp_path / "net.stlq", **settings)
    assert [n.op for n in graph.nodes] == [
        "QuantizeLinear", "Conv", "DequantizeLinear", "Conv", "QuantizeLinear", "Add", "Conv"
    ]  # fmt: skip
    middle = graph.nodes[3]
    assert not graph.on_codes(middle) and not graph.is_code(middle.outputs[0])
    assert (middle.weights is None) == ("keep_float" in settings)
    if middle.float_weights is not None:
        given = next(n for n in model.graph.node if n.name == "n_Conv2").input[1]
        weight = next(t for t in model.graph.initializer if t.name == given)
        expected = onnx.numpy_helper.to_array(weight).transpose(0, 2, 3, 1)
        assert np.array_equal(middle.float_weights, expected)
    inputs = {name: x[:3] for name, x in samples(model).items()}
    first, second = (runtime.Session(graph, threads=n).run(inputs["x"]) for n in (1, 2))
    (y,) = reference(model, inputs).values()
    assert np.array_equal(first, second)
    assert np.square(first - y).sum() < 10**-2.6 * np.square(y).sum()


def test_activation_bits_by_pattern(tmp_path):
    net = Net()
    model = net.model(net.conv(net.conv(net.conv("x"))))
    graph = convert(model, tmp_path / "net.stlq", activation_bits={"n_Conv0": 4, "n_*": 5})
    bits = {node.name: graph.quantization[node.outputs[0]].bits for node in graph.nodes[1:3]}
    assert bits == {"n_Conv0": 4, "n_Conv1": 5}


@pytest.mark.parametrize(
    ("mode", "coordinates"),
    [("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "align_corners")],
)
def test_resize_to_sizes(mode, coordinates, tmp_path):
    net = Net(shape=SHAPE)
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        attributes["nearest_mode"] = "floor"
    model = net.model(resized(net, "x", [13, 5], **attributes))
    graph = check(model, tmp_path / "net.stlq", ["Resize"])
    assert graph.nodes[1].attributes["sizes"] == [13, 5]


def test_upsample_of_old_models(tmp_path):
    net = Net(opset=9)
    scales = net.constant([1.0, 1.0, 2.0, 2.0])
    check(net.model(net.node("Upsample", "x", scales)), tmp_path / "net.stlq", ["Resize"])


def test_attributes_of_old_models(tmp_path):
    net = Net(opset=9)
    x = net.node("Slice", "x", axes=[2, 3], starts=[1, -6], ends=[7, 9223372036854775807])
    x = net.node("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1])
    x = net.node("Clip", net.conv(x, pads=[0] * 4), min=0.0, max=6.0)
    x = net.node("Squeeze", net.node("ReduceMean", x, axes=[2, 3]), axes=[2, 3])
    expected = ["Slice", "Conv", "GlobalAveragePool"]
    check(net.model(x), tmp_path / "net.stlq", expected)


# --- fusion: when it must not happen, names, edges ------------------------------------------------


def test_output_used_twice_is_not_clamped(tmp_path):
    net = Net()
    x = net.conv("x")
    model = net.model(net.node("Concat", x, net.node("Relu", x), axis=1))
    check(model, tmp_path / "net.stlq", ["Conv", "Lookup", "Concat"])


def test_activation_before_addition_keeps_the_addition(tmp_path):
    net = Net()
    model = net.model(net.node("Add", net.node("Relu", net.conv("x")), "x"))
    graph = check(model, tmp_path / "net.stlq", ["Conv", "Add"])
    assert graph.nodes[1].attributes["clamp"][0] == 0


def test_conv_read_elsewhere_takes_no_residual(tmp_path):
    net = Net()
    x = net.conv("x")
    model = net.model(net.node("Add", x, "x"), net.node("GlobalAveragePool", x))
    check(model, tmp_path / "net.stlq", ["Conv", "Add", "GlobalAveragePool"])


def test_graph_output_inside_a_chain_is_kept(tmp_path):
    net = Net()
    x = net.conv("x")
    model = net.model(x, net.node("Relu", x))
    graph = check(model, tmp_path / "net.stlq", ["Conv", "Lookup"])
    assert graph.is_code(f"{x}/codes") and [i.name for i in graph.outputs] == [x, "Relu1"]


def test_batch_norm_of_shared_conv_is_not_folded(tmp_path):
    net = Net()
    x = net.conv("x")
    model = net.model(net.node("Add", batch_norm(net, x), net.node("Relu", x)))
    check(model, tmp_path / "net.stlq", ["Conv", "Lookup", "Conv"])


def test_names_are_those_of_onnx_after_fusion(tmp_path):
    net = Net()
    x = net.node("Relu", batch_norm(net, net.conv("x")))
    model = net.model(net.node("Flatten", net.node("GlobalAveragePool", x)))
    graph = check(model, tmp_path / "net.stlq", ["Conv", "GlobalAveragePool"])
    assert graph.nodes[1].outputs == ["Relu2"] and graph.nodes[1].name.endswith("Conv0")
    assert graph.outputs[0].name == "Flatten4"


def test_classifier_makes_float32_itself(tmp_path):
    net = Net()
    x = net.node("GlobalAveragePool", "x")
    model = net.model(net.node("Gemm", net.node("Flatten", x), net.random(4, 3)))
    graph = check(model, tmp_path / "net.stlq", ["GlobalAveragePool", "Conv"])
    assert [n.op for n in graph.nodes][-2:] == ["Conv", "Flatten"]


def test_input_as_output(tmp_path):
    net = Net()
    model = net.model(net.node("Identity", "x"), net.conv("x"))
    graph = convert(model, tmp_path / "net.stlq")
    assert [n.op for n in graph.nodes] == ["QuantizeLinear", "Conv", "Identity"]
    x = samples(model)["x"]
    assert np.array_equal(runtime.Session(graph).run(x)[graph.outputs[0].name], x)


def test_several_inputs(tmp_path):
    net = Net()
    net.inputs["other"] = net.inputs["x"]
    model = net.model(net.node("Add", net.conv("x"), "other"))
    check(model, tmp_path / "net.stlq", ["Conv"])


def test_option_a_shortcut(tmp_path):
    net = Net()
    x = net.node("Relu", net.conv("x"))
    ranges = [net.constant(v, np.int64) for v in ([0, 0], [99, 99], [2, 3], [2, 2])]
    pads = net.constant([0, 2, 0, 0, 0, 2, 0, 0], np.int64)
    short = net.node("Pad", net.node("Slice", x, *ranges), pads)
    main = net.conv(net.node("Relu", net.conv(x, 4, 8, strides=[2, 2])), 8, 8)
    model = net.model(net.node("Relu", net.node("Add", main, short)))
    check(model, tmp_path / "net.stlq", ["Conv", "Slice", "Conv", "Pad", "Conv"], snr=23)


# --- sizes ----------------------------------------------------------------------------------------


def test_batch_and_size_stay_dynamic(tmp_path):
    net = Net(shape=("batch", 4, "height", "width"))
    x = net.node("MaxPool", net.conv("x"), kernel_shape=[2, 2], strides=[2, 2])
    model = net.model(net.conv(x))
    graph = convert(model, tmp_path / "net.stlq")
    assert graph.inputs[0].shape == ("batch", 4, "height", "width")
    assert graph.inputs[0].nominal == (1, 4, 8, 8)
    batch, channels, height, width = graph.outputs[0].shape
    assert (batch, channels) == ("batch", 4)
    assert len({height, width, "height", "width"}) == 4
    x = np.random.default_rng(0).standard_normal((3, 4, 10, 14)).astype(np.float32)
    found = oracle.evaluate(graph, {"x": x})[graph.outputs[0].name]
    assert found.shape == reference(model, {"x": x})[graph.outputs[0].name].shape


def test_fixed_batch_stays_fixed(tmp_path):
    net = Net(shape=SHAPE)
    graph = convert(net.model(net.conv("x")), tmp_path / "net.stlq")
    assert graph.inputs[0].shape == graph.inputs[0].nominal == SHAPE
    assert graph.outputs[0].shape == SHAPE


@pytest.mark.parametrize("settings", [{}, {"keep_float": ["*"]}])
def test_resize_to_the_size_of_another_tensor_stays_dynamic(settings, tmp_path):
    net = Net(shape=("batch", 4, "height", "width"))
    x = net.node("Relu", net.conv("x"))
    pooled = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    begin, end, axes = (net.constant(v, np.int64) for v in ([2], [4], [0]))
    target = net.node("Slice", net.node("Shape", x), begin, end, axes)
    batch = net.node("Slice", net.node("Shape", pooled), net.constant([0], np.int64), begin, axes)
    size = net.node("Concat", batch, target, axis=0)
    model = net.model(net.node("Add", net.node("Resize", pooled, "", "", size, mode="linear"), x))
    graph = convert(model, tmp_path / "net.stlq", **settings)
    assert graph.inputs[0].shape == ("batch", 4, "height", "width")
    rng = np.random.default_rng(0)
    for shape in ((2, 4, 8, 8), (1, 4, 11, 6)):
        inputs = {"x": rng.standard_normal(shape).astype(np.float32)}
        found = runtime.Session(graph).run(inputs["x"])
        (y,) = reference(model, inputs).values()
        assert found.shape == y.shape
        assert np.square(found - y).sum() < 10**-2.6 * np.square(y).sum()
        export(graph, tmp_path / "net.onnx")
        (same,) = reference(onnx.load(tmp_path / "net.onnx"), inputs).values()
        assert np.square(same - found).sum() < 1e-4 * np.square(found).sum()
        if not settings:
            assert np.array_equal(found, oracle.evaluate(graph, inputs)[graph.outputs[0].name])


@pytest.mark.parametrize("how", ["sizes", "gemm"])
def test_size_that_the_network_computes_with_becomes_fixed(how, tmp_path):
    net = Net(shape=("batch", 4, "height", "width"))
    if how == "sizes":
        pooled = net.node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2])
        size = net.node("Mul", net.node("Shape", "x"), net.constant([1, 1, 2, 2], np.int64))
        result = net.node("Resize", pooled, "", "", size, mode="nearest")
    else:
        result = net.node("Gemm", net.node("Flatten", "x"), net.random(256, 3))
    path = tmp_path / "net.stlq"
    model = net.model(result)
    report = converter.convert(model, path, calibration=[samples(model)])
    graph = packed_format.read(path)
    assert graph.inputs[0].shape == ("batch", 4, 8, 8)
    assert any("fixed to (4, 8, 8) in all axes" in note for note in report.notes)


# --- what stays an ONNX operator ------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_kept_operator(name, tmp_path):
    build, expected = KEPT[name]
    net = Net(shape=SHAPE)
    outputs = build(net)
    check(net.model(*(outputs if isinstance(outputs, tuple) else (outputs,))),
          tmp_path / "net.stlq", expected)  # fmt: skip


# --- what cannot be converted ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Pow"])
def test_constant_that_repeats_what_it_is_combined_with(tmp_path, op):
    net = Net(shape=("n", 4, 8, 1))
    y = net.node(op, net.conv("x"), net.constant(np.full((4, 8, 6), 2.0)))
    model = net.model(net.conv(y))
    graph = convert(model, tmp_path / "net.stlq")
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 4, 8, 1)).astype(np.float32)}
    (expected,) = reference(model, inputs).values()
    found = runtime.Session(graph).run(inputs)
    assert found.shape == expected.shape == (3, 4, 8, 6)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_all_problems_are_listed_at_once(tmp_path):
    net = Net(shape=SHAPE)
    sizes = net.node("Cast", net.node("ReduceSum", "x", keepdims=0), to=TensorProto.INT64)
    parts = net.node("SplitToSequence", net.conv("x"), sizes, axis=1)
    first = net.node("ConcatFromSequence", parts, axis=1)
    model = net.model(first, net.node("RandomNormalLike", "x"))
    with pytest.raises(ConversionError) as error:
        convert(model, tmp_path / "net.stlq")
    assert str(error.value).startswith("3 nodes")
    for op in ("SplitToSequence", "ConcatFromSequence", "RandomNormalLike"):
        assert f"- {op} 'n_{op}" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_operator_of_another_domain(tmp_path):
    net = Net()
    custom = net.node("Inverse", "x", domain="com.microsoft")
    net.nodes.append(helper.make_node("Conv", [custom, net.random(2, 4, 1, 1)], ["y"], name="c"))
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 2, 8, 8))],
        net.initializers,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    with pytest.raises(ConversionError, match="Inverse.*domain 'com.microsoft'"):
        convert(model, tmp_path / "net.stlq")


def test_function_that_is_not_finite(tmp_path):
    net = Net()
    model = net.model(net.node("Log", net.node("Abs", "x")))
    with pytest.raises(ConversionError, match="not finite at x = 0"):
        convert(model, tmp_path / "net.stlq")


def test_wrong_lowering_is_noticed(tmp_path, monkeypatch):
    from logshift.converter import fuse

    monkeypatch.setattr(fuse, "clamp_twice", lambda first, second: (None, None))
    net = Net()
    model = net.model(net.node("Relu", net.conv("x")))
    with pytest.raises(ConversionError, match="differs from the ONNX model"):
        convert(model, tmp_path / "net.stlq")
