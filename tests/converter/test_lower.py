"""Lowering and fusion: every ONNX operator, against onnxruntime, through the packed file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import oracle
from support.onnx_nets import SHAPE, Net, check, convert, reference, samples

from logshift import converter, runtime
from logshift.converter import ConversionError
from logshift.converter.export import export
from logshift.runtime.file import format as packed_format

# --- operators: name -> (function of a Net that returns outputs, packed operators) ---------------


def _reshape_sizes(net, x, *sizes):
    return net.node("Reshape", x, net.constant(sizes, np.int64))


def _batch_norm(net, x, channels=4):
    scale, shift, mean = net.random(channels), net.random(channels), net.random(channels)
    variance = net.constant(net.rng.uniform(0.5, 2.0, channels))
    return net.node("BatchNormalization", x, scale, shift, mean, variance)


def _hard_swish(net, x):
    """HardSwish as old exporters write it."""
    shifted = net.node("Add", x, net.constant(3.0))
    clipped = net.node("Clip", shifted, net.constant(0.0), net.constant(6.0))
    return net.node("Div", net.node("Mul", x, clipped), net.constant(6.0))


def _resized(net, x, how, **attributes):
    empty = ""
    scales = net.constant([1, 1, *how]) if "." in str(how) else empty
    sizes = empty if scales else net.constant([SHAPE[0], SHAPE[1], *how], np.int64)
    return net.node("Resize", x, empty, scales, sizes, **attributes)


def _depthwise(net, x, **attributes):
    return net.conv(x, group=4, **attributes)


def _transpose(net, x, group=1, **attributes):
    weight = net.random(4, 6 // group, 3, 3)
    return net.node("ConvTranspose", x, weight, net.random(6), group=group, **attributes)


OPERATORS = {
    "conv": (lambda n: n.conv("x"), ["Conv"]),
    "conv without bias": (lambda n: n.node("Conv", "x", n.random(3, 4, 1, 1)), ["Conv"]),
    "conv, strides, dilations, uneven pads": (
        lambda n: n.conv("x", strides=[2, 1], dilations=[1, 2], pads=[1, 2, 0, 1]), ["Conv"]),
    "conv, groups": (lambda n: n.conv("x", out=6, group=2), ["Conv"]),
    "conv, depthwise": (lambda n: _depthwise(n, "x"), ["Conv"]),
    "conv, SAME_UPPER": (
        lambda n: n.conv("x", kernel=4, strides=[2, 2], pads=None, auto_pad="SAME_UPPER"),
        ["Conv"]),
    "conv, SAME_LOWER": (
        lambda n: n.conv("x", kernel=4, pads=None, auto_pad="SAME_LOWER"), ["Conv"]),
    "conv, VALID": (lambda n: n.conv("x", pads=None, auto_pad="VALID"), ["Conv"]),
    "conv and output used twice": (
        lambda n: (n.conv("x"), n.conv(n.nodes[-1].output[0])), ["Conv", "Conv"]),
    "transposed conv": (
        lambda n: _transpose(n, "x", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        ["ConvTranspose"]),
    "transposed conv, groups": (
        lambda n: _transpose(n, "x", group=2, strides=[2, 1], dilations=[1, 2]),
        ["ConvTranspose"]),
    "transposed conv, SAME_UPPER": (
        lambda n: _transpose(n, "x", strides=[2, 2], auto_pad="SAME_UPPER"), ["ConvTranspose"]),
    "transposed conv, output_shape": (
        lambda n: _transpose(n, "x", strides=[2, 2], output_shape=[16, 15]), ["ConvTranspose"]),
    "gemm after flatten": (
        lambda n: n.node("Gemm", n.node("Flatten", "x"), n.random(5, 256), n.random(5), transB=1),
        ["Conv"]),
    "gemm, alpha and beta": (
        lambda n: n.node("Gemm", n.node("Flatten", "x"), n.random(256, 5), n.random(1, 5),
                         alpha=0.5, beta=2.0), ["Conv"]),
    "matmul and add": (
        lambda n: n.node("Add", n.node("MatMul", _reshape_sizes(n, "x", -1, 256),
                                       n.random(256, 5)), n.random(5)), ["Conv"]),
    "two gemms with relu": (
        lambda n: n.node("Gemm", n.node("Relu", n.node("Gemm", n.node("Flatten", "x"),
                         n.random(256, 7))), n.random(7, 3)), ["Conv", "Conv"]),
    "batch norm after conv": (lambda n: _batch_norm(n, n.conv("x")), ["Conv"]),
    "batch norm after transposed conv": (
        lambda n: _batch_norm(n, _transpose(n, "x"), 6), ["ConvTranspose"]),
    "batch norm alone": (lambda n: n.node("Relu", _batch_norm(n, "x")), ["Conv"]),
    "scale per channel": (lambda n: n.node("Mul", "x", n.random(4, 1, 1)), ["Lookup"]),
    "subtraction from channels": (
        lambda n: n.node("Sub", n.random(1, 4, 1, 1), "x"), ["Lookup"]),
    "slope per channel": (lambda n: n.node("PRelu", "x", n.random(4, 1, 1)), ["Lookup"]),
    "product": (lambda n: n.node("Mul", n.conv("x"), n.conv("x")), ["Conv", "Conv", "Mul"]),
    "difference": (lambda n: n.node("Sub", n.conv("x"), n.conv("x")), ["Conv", "Conv", "Sub"]),
    "squeeze and excitation": (
        lambda n: n.node("Mul", "x", n.node("Sigmoid", n.conv(n.node("GlobalAveragePool", "x"),
                                                              kernel=1))),
        ["GlobalAveragePool", "Conv", "Lookup", "Mul"]),
    "sum with one value per picture": (
        lambda n: n.node("Add", "x", n.conv("x", out=1)), ["Conv", "Add"]),
    "swish": (
        lambda n: n.node("Mul", n.conv("x"), n.node("Sigmoid", "Conv0")), ["Conv", "Lookup"]),
    "division after conv": (
        lambda n: n.node("Div", n.conv("x"), n.constant(3.0)), ["Conv"]),
    "relu after conv": (lambda n: n.node("Relu", n.conv("x")), ["Conv"]),
    "clip after conv": (
        lambda n: n.node("Clip", n.conv("x"), n.constant(0.0), n.constant(6.0)), ["Conv"]),
    "relu then min": (
        lambda n: n.node("Min", n.node("Relu", n.conv("x")), n.constant(2.0)), ["Conv"]),
    "add": (lambda n: n.node("Add", n.node("Relu", "x"), n.node("MaxPool", "x",
            kernel_shape=[1, 1])), ["Lookup", "MaxPool", "Add"]),
    "sum and relu": (
        lambda n: n.node("Relu", n.node("Sum", "x", n.node("MaxPool", "x", kernel_shape=[1, 1]))),
        ["MaxPool", "Add"]),
    "residual": (
        lambda n: n.node("Relu", n.node("Add", n.conv("x"), "x")), ["Conv"]),
    "residual of two convs": (
        lambda n: n.node("Add", n.conv("x"), n.conv("x", kernel=1)), ["Conv", "Conv"]),
    "max pool": (
        lambda n: n.node("MaxPool", n.node("Relu", n.conv("x")), kernel_shape=[3, 3],
                         strides=[2, 2], pads=[1, 1, 1, 1]), ["Conv", "MaxPool"]),
    "max pool, ceil_mode": (
        lambda n: n.node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        ["MaxPool"]),
    "average pool": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 2], strides=[2, 2],
                         pads=[1, 0, 1, 1]), ["AveragePool"]),
    "average pool, count_include_pad": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                         count_include_pad=1), ["AveragePool"]),
    "average pool, SAME_UPPER": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2],
                         auto_pad="SAME_UPPER"), ["AveragePool"]),
    "global average pool and flatten": (
        lambda n: n.node("Flatten", n.node("GlobalAveragePool", "x")), ["GlobalAveragePool"]),
    "global max pool": (lambda n: n.node("GlobalMaxPool", "x"), ["GlobalMaxPool"]),
    "reduce mean": (
        lambda n: n.node("ReduceMean", "x", n.constant([-1, -2], np.int64), keepdims=0),
        ["GlobalAveragePool"]),
    "squeeze": (
        lambda n: n.node("Squeeze", n.conv(n.node("GlobalAveragePool", "x"), kernel=1),
                         n.constant([2, 3], np.int64)), ["GlobalAveragePool", "Conv"]),
    "classifier": (
        lambda n: n.node("Gemm", _reshape_sizes(n, n.node("GlobalAveragePool", n.node(
            "Relu", n.conv("x"))), 0, -1), n.random(4, 3), n.random(3)),
        ["Conv", "GlobalAveragePool", "Conv"]),
    "identity, dropout, cast": (
        lambda n: n.conv(n.node("Dropout", n.node("Cast", n.node("Identity", "x"), to=1))),
        ["Conv"]),
    "concat": (
        lambda n: n.node("Concat", "x", n.conv("x"), n.node("Sigmoid", "x"), axis=1),
        ["Conv", "Lookup", "Concat"]),
    "concat of flat tensors": (
        lambda n: n.node("Concat", *(n.node("Flatten", n.node("GlobalAveragePool", t))
                                     for t in ("x", n.conv("x"))), axis=-1),
        ["Conv", "GlobalAveragePool", "GlobalAveragePool", "Concat"]),
    "slice": (
        lambda n: n.node("Slice", "x", *(n.constant(v, np.int64) for v in (
            [0, -7], [2**63 - 1, 8], [3, -2], [2, 3]))), ["Slice"]),
    "split": (
        lambda n: n.node("Concat", *reversed(n.node("Split", "x", n.constant([1, 3], np.int64),
                         outputs=2, axis=1)), axis=1), ["Slice", "Slice", "Concat"]),
    "pad": (
        lambda n: n.node("Pad", "x", n.constant([0, 1, 0, 2, 0, 0, 1, 0], np.int64)), ["Pad"]),
    "pad before conv": (
        lambda n: n.conv(n.node("Pad", "x", n.constant([0, 0, 1, 0, 0, 0, 1, 1], np.int64)),
                         pads=[0, 1, 0, 0]), ["Conv"]),
    "wide pad before conv": (
        lambda n: n.conv(n.node("Pad", "x", n.constant([0, 0, 3, 3, 0, 0, 3, 3], np.int64))),
        ["Pad", "Conv"]),
    "resize, nearest": (
        lambda n: _resized(n, "x", [2.0, 1.5], mode="nearest", nearest_mode="floor",
                           coordinate_transformation_mode="asymmetric"), ["Resize"]),
    "resize, linear": (
        lambda n: _resized(n, "x", [2.0, 2.0], mode="linear"), ["Resize"]),
    "resize, linear, align_corners": (
        lambda n: _resized(n, "x", [2.0, 2.0], mode="linear",
                           coordinate_transformation_mode="align_corners"), ["Resize"]),
    "depth to space, DCR": (lambda n: n.node("DepthToSpace", "x", blocksize=2), ["DepthToSpace"]),
    "depth to space, CRD": (
        lambda n: n.node("DepthToSpace", "x", blocksize=2, mode="CRD"), ["DepthToSpace"]),
    "leaky relu": (lambda n: n.node("LeakyRelu", n.conv("x"), alpha=0.1), ["Conv", "Lookup"]),
    "sigmoid of tanh": (lambda n: n.node("Sigmoid", n.node("Tanh", "x")), ["Lookup"]),
    "hard sigmoid": (lambda n: n.node("HardSigmoid", "x"), ["Lookup"]),
    "hard swish": (lambda n: n.node("HardSwish", "x"), ["Lookup"]),
    "hard swish in parts": (lambda n: _hard_swish(n, n.conv("x")), ["Conv", "Lookup"]),
    "silu in parts": (
        lambda n: n.node("Mul", n.conv("x"), n.node("Sigmoid", n.nodes[-1].output[0])),
        ["Conv", "Lookup"]),
    "elu": (lambda n: n.node("Elu", "x", alpha=0.7), ["Lookup"]),
    "selu": (lambda n: n.node("Selu", "x"), ["Lookup"]),
    "softplus": (lambda n: n.node("Softplus", "x"), ["Lookup"]),
    "mish": (lambda n: n.node("Mish", "x"), ["Lookup"]),
    "prelu, one slope": (lambda n: n.node("PRelu", "x", n.constant([[[0.2]]])), ["Lookup"]),
    "power": (lambda n: n.node("Pow", "x", n.constant(2.0)), ["Lookup"]),
    "clip": (lambda n: n.node("Clip", "x", n.constant(-0.5), n.constant(1.0)), ["Lookup"]),
    "arithmetic with scalars": (
        lambda n: n.node("Sub", n.constant(1.0), n.node("Mul", "x", n.constant(0.3))), ["Lookup"]),
    "lookup of a flattened tensor": (
        lambda n: n.node("Gemm", n.node("Relu", n.node("Flatten", "x")), n.random(256, 3)),
        ["Lookup", "Conv"]),
}  # fmt: skip


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
    model = net.model(_resized(net, "x", [13, 5], **attributes))
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
    model = net.model(net.node("Add", _batch_norm(net, x), net.node("Relu", x)))
    check(model, tmp_path / "net.stlq", ["Conv", "Lookup", "Conv"])


def test_names_are_those_of_onnx_after_fusion(tmp_path):
    net = Net()
    x = net.node("Relu", _batch_norm(net, net.conv("x")))
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

KEPT = {
    "softmax": (lambda n: n.node("Softmax", "x"), ["Softmax"]),
    "batch": (lambda n: n.node("Concat", "x", n.conv("x"), axis=0), ["Conv", "Concat"]),
    "transpose": (
        lambda n: n.conv(n.node("Transpose", "x", perm=[0, 2, 3, 1]), 8), ["Transpose", "Conv"]),
    "computed weight": (
        lambda n: n.node("Conv", "x", n.node("Slice", n.conv("x"), *(n.constant([v], np.int64)
                         for v in (0, 1, 0)))), ["Conv", "Slice", "Conv"]),
    "pad mode": (
        lambda n: n.conv(n.node("Pad", n.conv("x"), n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
                         mode="reflect")), ["Conv", "Pad", "Conv"]),
    "pad value": (
        lambda n: n.node("Pad", "x", n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
                         n.constant(1.0)), ["Pad"]),
    "cubic": (lambda n: _resized(n, "x", [2.0, 2.0], mode="cubic"), ["Resize"]),
    "reverse": (
        lambda n: n.node("Slice", "x", *(n.constant([v], np.int64) for v in (-1, -9, 3, -1))),
        ["Slice"]),
    "mean over channels": (
        lambda n: n.node("ReduceMean", n.conv("x"), n.constant([1], np.int64)),
        ["Conv", "ReduceMean"]),
    "reshape": (
        lambda n: n.conv(_reshape_sizes(n, n.conv("x"), -1, 8, 4, 8), 8),
        ["Conv", "Reshape", "Conv"]),
    "pool indices": (
        lambda n: n.node("MaxUnpool", *n.node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2],
                         outputs=2), kernel_shape=[2, 2], strides=[2, 2]),
        ["MaxPool", "MaxUnpool"]),
    "picture constant": (lambda n: n.node("Add", "x", n.random(1, 4, 8, 8)), ["Add"]),
    "flattened output": (lambda n: n.node("Flatten", n.conv("x")), ["Conv"]),
    "division": (
        lambda n: n.node("Div", n.conv("x"), n.node("Exp", n.node("Tanh", n.conv("x")))),
        ["Conv", "Conv", "Tanh", "Exp", "Div"]),
    "one dimension": (
        lambda n: n.node("Reshape", n.node("MaxPool", n.node("Conv", _reshape_sizes(n, "x", 2, 4,
                         64), n.random(4, 4, 3), pads=[1, 1]), kernel_shape=[3], pads=[1, 1]),
                         n.constant(SHAPE, np.int64)),
        ["Reshape", "Unsqueeze", "Conv", "Squeeze", "Unsqueeze", "MaxPool", "Squeeze", "Reshape"]),
    "rank 2 between": (
        lambda n: n.node("Gemm", n.node("Softmax", n.node("Gemm", n.node("Flatten", "x"),
                         n.random(256, 6))), n.random(6, 5)),
        ["Conv", "Softmax", "Unsqueeze", "Conv"]),
    "sequence of features": (
        lambda n: n.node("Softmax", n.node("Add", n.node("MatMul", n.node("Transpose",
                         _reshape_sizes(n, n.conv("x"), 2, 32, 8), perm=[0, 2, 1]),
                         n.random(32, 5)), n.random(5)), axis=-1),
        ["Conv", "Reshape", "Transpose", "Reshape", "Unsqueeze", "Conv", "Reshape", "Softmax"]),
    "matrix of rank 3": (
        lambda n: n.node("MatMul", _reshape_sizes(n, n.conv("x"), 2, 8, 32), n.random(32, 5)),
        ["Conv", "Reshape", "Transpose", "Unsqueeze", "Conv", "Squeeze", "Transpose"]),
    "constant": (lambda n: n.node("Shape", n.conv("x")), ["Conv", "Shape"]),
    "several outputs": (
        lambda n: n.node("TopK", n.conv("x"), n.constant([2], np.int64), outputs=2, axis=1)[0],
        ["Conv", "TopK"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_kept_operator(name, tmp_path):
    build, expected = KEPT[name]
    net = Net(shape=SHAPE)
    outputs = build(net)
    check(net.model(*(outputs if isinstance(outputs, tuple) else (outputs,))),
          tmp_path / "net.stlq", expected)  # fmt: skip


# --- what cannot be converted ---------------------------------------------------------------------


def test_all_problems_are_listed_at_once(tmp_path):
    net = Net(shape=SHAPE)
    parts = net.node("SplitToSequence", net.conv("x"), axis=1)
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
    custom = net.node("QuickGelu", "x", domain="com.microsoft")
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
    with pytest.raises(ConversionError, match="QuickGelu.*domain 'com.microsoft'"):
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
