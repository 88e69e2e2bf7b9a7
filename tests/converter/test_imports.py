"""Models as people have them: whatever the form, the packed network is that of the float model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_nets import Net, convert, reference, samples

from logshift import converter, runtime
from logshift.converter import ConversionError
from logshift.converter.imports import brought_in, put_in_order
from logshift.kernels.errors import InputError
from logshift.runtime.file import format as packed_format


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def picture_net(**options):
    """Convolutions, a Concat, and what is around them."""
    net = Net(**options)
    x = net.node("Relu", net.conv("x"))
    y = net.node("Sigmoid", net.conv(x))
    z = net.node("Concat", x, y, axis=1)
    return net.model(net.node("MaxPool", net.conv(z, 8, 6), kernel_shape=[2, 2], strides=[2, 2]))


def close(found, expected, error=0.08, step=0.0):
    """Compare outputs, in the mean; they may be some codes apart whose steps are so large."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    expected = expected.astype(np.float64)
    difference = np.sqrt(np.mean((found - expected) ** 2))
    assert difference <= max(error * np.sqrt(np.mean(expected**2)), 2 * step)


def check(model, path, float_model, step=0.0, feed=None):
    """Convert, and compare with the float model; returns the packed graph."""
    feed = samples(float_model) if feed is None else feed
    graph = convert_on(model, path, feed)
    found = runtime.Session(graph, threads=1).run(feed)
    found = found if isinstance(found, dict) else {graph.outputs[0].name: found}
    for name, y in reference(float_model, feed).items():
        close(found[name], y, step=step)
    return graph


def convert_on(model, path, feed, **settings):
    settings = {"weight_bits": 5, "residual_ratio": 1.0, "activation_bits": 8} | settings
    converter.convert(model, path, calibration=[feed], **settings)
    return packed_format.read(path)


def operators(graph):
    """All that runs in NumPy."""
    found = runtime.Session(graph, threads=1).summary()
    return sorted({layer.op for layer in found.layers if "numpy" in layer.kernel})


# --- order and declarations -----------------------------------------------------------------------


def shuffled(model, seed=0):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = [*model.graph.node]
    order = np.random.default_rng(seed).permutation(len(nodes))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes[i] for i in order)
    return copy


def test_nodes_out_of_order(path):
    model = picture_net()
    expected = convert(model, path)
    for seed in range(3):
        graph = convert(shuffled(model, seed), path)
        assert {n.name for n in graph.nodes} == {n.name for n in expected.nodes}
    mixed = shuffled(model)
    before = mixed.SerializeToString()
    convert(mixed, path)
    assert mixed.SerializeToString() == before


def subgraph(name, *nodes, inputs=(), outputs=None):
    """A subgraph whose output is what the last of its nodes makes."""
    return helper.make_graph(
        nodes, name,
        [helper.make_tensor_value_info(x, kind, None) for x, kind in inputs],
        [
            helper.make_tensor_value_info(y, kind, None)
            for y, kind in outputs or [(nodes[-1].output[0], TensorProto.FLOAT)]
        ],
    )  # fmt: skip


def test_nodes_of_subgraphs_are_put_in_order_too():
    net = Net()
    flag = net.constant(True, np.bool_)
    nodes = [helper.make_node("Relu", ["x"], ["b"]), helper.make_node("Neg", ["b"], ["a"])]
    then = subgraph("then", *nodes)
    model = net.model(net.node("If", flag, then_branch=then, else_branch=then))
    branch = model.graph.node[0].attribute[0].g
    del branch.node[:]
    branch.node.extend(nodes[::-1])
    put_in_order(model)
    assert [node.op_type for node in branch.node] == ["Relu", "Neg"]


def test_order_that_there_is_none(path):
    net = Net()
    y = net.conv("x")
    model = net.model(y)
    model.graph.node[0].input[0] = "lost"
    with pytest.raises(ConversionError, match="Conv 'n_Conv0' reads 'lost', which no node makes"):
        convert(model, path)
    net = Net()
    net.node("Add", "Relu1", "x")
    model = net.model(net.node("Relu", "Add0"))
    with pytest.raises(ConversionError, match="circle: Add 'n_Add0', Relu 'n_Relu1'"):
        convert(model, path)
    assert not path.exists()


@pytest.mark.parametrize("declared", [[1, "n"], [3, 9, 9, 9], [], None])
def test_declared_shapes_are_not_believed(path, declared):
    model = picture_net()
    name = model.graph.output[0].name
    expected = reference(model, samples(model))[name]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, declared))
    del model.graph.value_info[:]
    for node in model.graph.node[:-1]:
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [1, 77])
        model.graph.value_info.append(value)
    graph = convert(model, path)
    assert graph.outputs[0].nominal[1:] == expected.shape[1:]
    close(runtime.Session(graph).run(samples(model)), expected)


def test_declared_type_of_an_output_is_not_believed(path):
    model = picture_net()
    right = reference(model, samples(model))[model.graph.output[0].name]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    close(runtime.Session(convert(model, path)).run(samples(model)), right)


def test_functions_of_the_model_are_taken_apart(path):
    nodes = [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("own", "NegRelu", ["a"], ["c"], nodes, opsets)
    net = Net()
    model = net.model(net.conv(net.node("Relu", net.conv("x"))))
    model.graph.node[1].domain, model.graph.node[1].op_type = "own", "NegRelu"
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert not operators(check(model, path, model))


# --- working types --------------------------------------------------------------------------------


def as_type(model, kind, edges=True):
    """The model in another type; with float32 at its edges, or not."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(helper.make_tensor(
                tensor.name, kind, array.shape, array.tobytes(), raw=True
            ))  # fmt: skip
    del copy.graph.value_info[:]
    nodes = [*copy.graph.node]
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = kind if edges else TensorProto.FLOAT
    if not edges:
        (x,), (y,) = copy.graph.input, copy.graph.output
        for node in nodes:
            node.input[:] = [f"{n}_half" if n == x.name else n for n in node.input]
            node.output[:] = [f"{n}_half" if n == y.name else n for n in node.output]
        nodes.append(helper.make_node("Cast", [x.name], [f"{x.name}_half"], "in", to=kind))
        back = helper.make_node("Cast", [f"{y.name}_half"], [y.name], "out", to=TensorProto.FLOAT)
        nodes.append(back)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(copies)
    return copy


@pytest.mark.parametrize("given", [np.float16, np.float32])
def test_half_precision(path, given):
    model = picture_net()
    half, feed = as_type(model, TensorProto.FLOAT16), samples(model)
    graph = convert_on(half, path, {"x": feed["x"].astype(given)})
    session = runtime.Session(graph, threads=1)
    assert session.inputs[0].dtype == session.outputs[0].dtype == "float16"
    (expected,) = reference(model, feed).values()
    found = [session.run(feed["x"].astype(dtype)) for dtype in (np.float16, np.float32)]
    for y in found:
        close(y, expected.astype(np.float16))
    np.testing.assert_array_equal(*found)
    assert not operators(graph)
    for kernels in ("reference", "portable"):
        for threads in (1, 3):
            other = runtime.Session(graph, threads=threads, kernels=kernels)
            np.testing.assert_array_equal(other.run(feed["x"]), found[0])
    with pytest.raises(InputError, match="takes float16"):
        session.run(np.zeros(feed["x"].shape, np.int64))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_casts_inside_vanish(path, kind):
    model = picture_net()
    other = as_type(model, kind, edges=False)
    graph = check(shuffled(other), path, model)
    assert graph.inputs[0].dtype == "float32"
    assert "Cast" not in {node.op for node in graph.nodes}
    assert len(graph.nodes) == len(convert(model, path).nodes)


def test_double_is_kept_at_the_edges(path):
    model = picture_net()
    graph = convert_on(as_type(model, TensorProto.DOUBLE), path, samples(model))
    assert graph.inputs[0].dtype == graph.outputs[0].dtype == "float64"
    (expected,) = reference(model, samples(model)).values()
    found = runtime.Session(graph).run(samples(model)["x"].astype(np.float64))
    close(found, expected.astype(np.float64))


def test_bfloat16_becomes_float32_at_the_edges(path):
    model = picture_net()
    graph = check(as_type(model, TensorProto.BFLOAT16), path, model)
    assert graph.inputs[0].dtype == graph.outputs[0].dtype == "float32"


def test_double_beside_the_work_stays(path):
    net = Net()
    wide = net.node("Cast", net.conv("x"), to=TensorProto.DOUBLE)
    precise = net.constant(1 + 2.0**-40, np.float64)
    net.node("Mul", wide, precise)
    model = net.model(net.node("Mul", wide, precise))
    assert brought_in(model).retyped is False


def test_pictures_for_half_precision(path):
    net = Net(shape=("n", 3, 8, 8))
    model = as_type(net.model(net.conv("x", 3)), TensorProto.FLOAT16)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    converter.convert(model, path, calibration=pictures)
    session = runtime.load(path)
    assert session.run(pictures).dtype == np.float16
    assert np.isfinite(session.run(pictures)).all()


def test_calibration_beyond_float16(path):
    model = as_type(picture_net(), TensorProto.FLOAT16)
    feed = {"x": np.full((2, 4, 8, 8), 1e6, np.float32)}
    with pytest.raises(InputError, match="NaN or infinity"):
        convert_on(model, path, feed)


# --- integers -------------------------------------------------------------------------------------


class QNet(Net):
    """A Net of operators on integer codes."""

    def __init__(self, kind=np.int8, **options):
        super().__init__(**options)
        self.kind = np.dtype(kind)
        self.q = {}  # scale and zero point of codes, by name

    def scales(self, low, high):
        ends = np.iinfo(self.kind)
        scale = (high - low) / 255
        zero = np.clip(np.rint(ends.min - low / scale), ends.min, ends.max)
        return self.constant(scale), self.constant(zero, self.kind)

    def quantized(self, x, low=-3.0, high=3.0):
        scale, zero = self.scales(low, high)
        y = self.node("QuantizeLinear", x, scale, zero)
        self.q[y] = (scale, zero)
        return y

    def real(self, x):
        return self.node("DequantizeLinear", x, *self.q[x])

    def weight(self, *shape, per_channel=True):
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        scale = self.rng.uniform(0.1, 0.3, shape[0] if per_channel else ()) / 127
        zeros = np.zeros(scale.shape if per_channel else (), np.int8)
        return (
            self.constant(codes, np.int8), self.constant(scale), self.constant(zeros, np.int8)
        )  # fmt: skip

    def linear(self, op, *parts, low=-8.0, high=8.0, first=False, bias=(), **attributes):
        """A QLinear operator of codes; its result's parameters come last, or first."""
        scale, zero = self.scales(low, high)
        given = [name for part in parts for name in (part, *self.q[part])]
        given = [scale, zero, *given] if first else [*given, scale, zero]
        y = self.node(op, *given, *bias, domain="com.microsoft", **attributes)
        self.q[y] = (scale, zero)
        return y

    def qconv(self, x, channels, out, low=-8.0, high=8.0, **attributes):
        scale, zero = self.scales(low, high)
        bias = self.constant(self.rng.integers(-500, 500, out), np.int32)
        weight = self.weight(out, channels // attributes.get("group", 1), 3, 3)
        y = self.node(
            "QLinearConv", x, *self.q[x], *weight, scale, zero, bias, pads=[1] * 4, **attributes
        )
        self.q[y] = (scale, zero)
        return y

    def model(self, *outputs):
        graph = helper.make_graph(
            self.nodes, "net",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in self.inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("opset", [11, 17])
def test_integer_convolutions(path, kind, opset):
    net = QNet(kind, opset=opset)
    x = net.quantized("x", -4, 4)
    y = net.qconv(net.qconv(x, 4, 8, 0.0, 6.0), 8, 8, -12.0, 11.0, group=2)
    model = net.model(net.real(y))
    graph = check(model, path, model, 23 / 255)
    assert not operators(graph)
    # Ranges and zero points are the model's: 6 / 255, and zero is the first code.
    first = next(node for node in graph.nodes if node.op == "Conv")
    q = graph.quantization[first.outputs[0]]
    assert q.zero_point == 0 and q.scale == pytest.approx(6 / 255)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_operators_on_codes(path, kind):
    net = QNet(kind)
    a, b = net.quantized("x"), net.quantized(net.node("Neg", "x"), -2, 4)
    total = net.linear("QLinearAdd", a, b)
    product = net.linear("QLinearMul", a, b, low=-12.0, high=2.0)
    gate = net.linear("QLinearSigmoid", total, low=0.0, high=1.0)
    leaky = net.linear("QLinearLeakyRelu", product, low=-2.0, high=9.0, alpha=0.2)
    joined = net.linear("QLinearConcat", gate, leaky, first=True, axis=1)
    pooled = net.linear("QLinearAveragePool", joined, kernel_shape=[2, 2], strides=[2, 2])
    mean = net.linear("QLinearGlobalAveragePool", pooled, low=-4.0, high=4.0)
    model = net.model(net.real(mean))
    assert not operators(check(model, path, model, 8 / 255))


def test_codes_that_are_moved(path):
    net = QNet(np.uint8)
    x = net.qconv(net.quantized("x"), 4, 4)
    y = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    zero = net.constant(128, np.uint8)
    y = net.node("Pad", y, net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), zero)
    y = net.node("Transpose", y, perm=[0, 1, 3, 2])
    net.q[y] = net.q[x]
    joined = net.node("Concat", y, y, axis=1)
    net.q[joined] = net.q[x]
    model = net.model(net.real(net.qconv(joined, 8, 4)))
    check(model, path, model, 16 / 255)


@pytest.mark.parametrize("transposed", [0, 1])
def test_integer_matrices(path, transposed):
    net = QNet(np.uint8, shape=("n", 12))
    x = net.quantized("x")
    codes, scale, zero = net.weight(*((6, 12) if transposed else (12, 6)), per_channel=False)
    bias = net.constant(net.rng.integers(-500, 500, 6), np.int32)
    to = net.scales(-6, 6)
    y = net.node(
        "QGemm", x, *net.q[x], codes, scale, zero, bias, *to, domain="com.microsoft",
        transB=transposed, alpha=0.5,
    )  # fmt: skip
    net.q[y] = to
    weight, after = net.weight(6, 5, per_channel=False), net.scales(-9, 9)
    z = net.node("QLinearMatMul", y, *to, *weight, *after)
    net.q[z] = after
    model = net.model(
        net.real(net.linear("QLinearSoftmax", z, low=0.0, high=1.0, axis=1, opset=18))
    )
    check(model, path, model, 1 / 255)


def test_inputs_and_outputs_that_are_codes(path):
    net = QNet(np.uint8)
    net.q["x"] = net.scales(-3, 3)
    y = net.qconv("x", 4, 4)
    model = net.model(y)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.UINT8
    codes = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 8)).astype(np.uint8)
    graph = convert_on(model, path, {"x": codes})
    found = runtime.Session(graph).run({"x": codes})
    (expected,) = reference(model, {"x": codes}).values()
    assert found.dtype == np.uint8
    apart = np.abs(found.astype(int) - expected)
    assert apart.max() <= 12 and apart.mean() < 3


def dynamic(net, x, op, weight, scale, zero, **attributes):
    """What quantize_dynamic makes of a Conv or MatMul."""
    codes, step, least = net.node("DynamicQuantizeLinear", x, outputs=3)
    factor = net.node("Mul", step, scale)
    sums = net.node(op, codes, weight, least, zero, **attributes)
    return net.node("Mul", net.node("Cast", sums, to=TensorProto.FLOAT), factor)


def test_dynamic_quantization_of_convolutions(path):
    net = QNet()
    codes, scale, zero = net.weight(8, 4, 3, 3, per_channel=False)
    y = dynamic(net, "x", "ConvInteger", codes, scale, zero, pads=[1] * 4)
    y = net.node("Relu", net.node("Add", y, net.constant(np.ones((1, 8, 1, 1)))))
    codes, scale, zero = net.weight(4, 8, 1, 1, per_channel=False)
    model = net.model(dynamic(net, y, "ConvInteger", codes, scale, zero))
    graph = check(model, path, model)
    assert not operators(graph)
    assert [node.op for node in graph.nodes if node.op == "Conv"] == ["Conv", "Conv"]


@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_quantization_of_matrices(path, per_column):
    net = QNet(shape=("n", 12))
    codes, *_ = net.weight(12, 6)
    shape = 6 if per_column else ()
    scale, zero = net.constant(np.full(shape, 0.01)), net.constant(np.full(shape, 3), np.int8)
    y = dynamic(net, "x", "MatMulInteger", codes, scale, zero)
    codes = net.weight(6, 5, per_channel=False)
    model = net.model(net.node("DynamicQuantizeMatMul", y, *codes, domain="com.microsoft"))
    assert not operators(check(model, path, model, feed=samples(model, 64)))


@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_bias_that_is_rounded_to_the_steps_of_sums(path, op):
    """What older versions of quantize_dynamic make."""
    conv = op == "ConvInteger"
    net = QNet(shape=("n", 4, 8, 8) if conv else ("n", 12))
    codes, scale, zero = net.weight(*((6, 4, 3, 3) if conv else (12, 6)), per_channel=False)
    quantized, step, least = net.node("DynamicQuantizeLinear", "x", outputs=3)
    factor = net.node("Mul", step, scale)
    steps = net.node("Floor", net.node("Div", net.random(6), factor))
    bias = net.node("Cast", steps, to=TensorProto.INT32)
    if conv:
        bias = net.node("Reshape", bias, net.constant([1, -1, 1, 1], np.int64))
    sums = net.node("Add", net.node(op, quantized, codes, least, zero), bias)
    model = net.model(net.node("Mul", net.node("Cast", sums, to=TensorProto.FLOAT), factor))
    assert not operators(check(model, path, model))
    assert op not in {node.op_type for node in brought_in(model).model.graph.node}


def test_dynamic_quantization_that_is_used_otherwise_stays():
    net = QNet(shape=("n", 12))
    codes, scale, zero = net.weight(12, 6, per_channel=False)
    quantized, step, least = net.node("DynamicQuantizeLinear", "x", outputs=3)
    sums = net.node("MatMulInteger", quantized, codes, least, zero)
    model = net.model(net.node("Cast", sums, to=TensorProto.FLOAT))
    imported = brought_in(model)
    assert "MatMulInteger" in {node.op_type for node in imported.model.graph.node}


@pytest.mark.parametrize("per_gate", [False, True])
def test_dynamic_lstm_becomes_an_lstm(per_gate):
    net = QNet(shape=(5, 2, 3))
    scales, zeros = [], []
    for _ in range(2):
        shape = (2, 16) if per_gate else (2,)
        scales.append(net.constant(net.rng.uniform(0.005, 0.01, shape)))
        zeros.append(net.constant(np.zeros(shape), np.int8))
    w, r = (net.constant(net.rng.integers(-127, 128, (2, n, 16)), np.int8) for n in (3, 4))
    y = net.node(
        "DynamicQuantizeLSTM", "x", w, r, net.random(2, 32), "", "", "", "", scales[0], zeros[0],
        scales[1], zeros[1], domain="com.microsoft", hidden_size=4, direction="bidirectional",
    )  # fmt: skip
    model = net.model(y)
    feed = {"x": np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)}
    (expected,) = reference(model, feed).values()
    imported = brought_in(model)
    assert [node.op_type for node in imported.model.graph.node] == ["LSTM"]
    (found,) = reference(imported.model, feed).values()
    close(found, expected, 0.02)
