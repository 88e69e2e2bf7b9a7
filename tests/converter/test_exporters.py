"""Models as exporters write them: each in the idioms that it is known for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.onnx_nets import Net, convert, reference, samples

from logshift import converter, runtime
from logshift.converter import onnx_model
from logshift.converter.rearrange import rearrange

NEWEST = min(onnx.defs.onnx_opset_version(), 23)


def compare(model, graph, inputs, snr=26.0):
    """Compare a packed network with the model by signal-to-noise ratio."""
    found = runtime.Session(graph, threads=1)._run(inputs)
    for name, y in reference(model, inputs).items():
        assert found[name].shape == y.shape
        noise = np.square(found[name] - y).sum() / np.square(y).sum()
        assert noise < 10 ** (-snr / 10), f"{-10 * np.log10(noise):.1f} dB"


def in_float(graph):
    return [node.op for node in graph.nodes if node.is_onnx]


# --- PyTorch --------------------------------------------------------------------------------------


def test_channel_shuffle_stays_on_codes(tmp_path):
    net = Net()
    x = net.conv("x", 4, 6)
    split = net.node("Reshape", x, net.constant([-1, 3, 2, 8, 8], np.int64))
    swapped = net.node("Transpose", split, perm=[0, 2, 1, 3, 4])
    joined = net.node("Reshape", swapped, net.constant([-1, 6, 8, 8], np.int64))
    model = net.model(net.conv(joined, 6, 4))
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == []
    (gather,) = [node for node in graph.nodes if node.op == "Gather"]
    assert gather.attributes["indices"] == [0, 2, 4, 1, 3, 5]
    compare(model, graph, {"x": samples(model)["x"][:3]})


def test_squeeze_and_excitation_through_a_matrix(tmp_path):
    net = Net()
    x = net.conv("x")
    mean = net.node("ReduceMean", x, net.constant([2, 3], np.int64), keepdims=0)
    gate = net.node("Sigmoid", net.node("Gemm", mean, net.random(4, 4), net.random(4)))
    gate = net.node("Unsqueeze", gate, net.constant([2, 3], np.int64))
    model = net.model(net.conv(net.node("Mul", x, gate)))
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == []
    compare(model, graph, {"x": samples(model)["x"][:3]})


@pytest.mark.parametrize("dynamic", [False, True])
def test_detection_head(dynamic, tmp_path):
    shape = ("batch", 4, "height", "width") if dynamic else ("batch", 4, 8, 8)
    net = Net(shape=shape)

    def head(x, channels):
        y = net.conv(x, channels, 2 * 5, kernel=1)
        size = net.node("Shape", y)
        rows, columns = (
            net.node("Slice", size, *(net.constant([v], np.int64) for v in (i, i + 1, 0)))
            for i in (2, 3)
        )
        parts = net.node(
            "Concat", net.constant([-1], np.int64), net.constant([2, 5], np.int64), rows, columns,
            axis=0,
        )  # fmt: skip
        y = net.node("Sigmoid", net.node("Transpose", net.node("Reshape", y, parts),
                                         perm=[0, 1, 3, 4, 2]))  # fmt: skip
        place, rest = net.node("Split", y, net.constant([2, 3], np.int64), outputs=2, axis=-1)
        place = net.node("Sub", net.node("Mul", place, net.constant(2.0)), net.constant(0.5))
        y = net.node("Concat", place, rest, axis=-1)
        sizes = net.node("Concat", *(net.constant([v], np.int64) for v in (0, -1, 5)), axis=0)
        return net.node("Reshape", y, sizes)

    fine = net.node("Relu", net.conv("x", 4, 6))
    coarse = net.node("MaxPool", fine, kernel_shape=[2, 2], strides=[2, 2])
    model = net.model(net.node("Concat", head(fine, 6), head(coarse, 6), axis=1), fine)
    graph = convert(model, tmp_path / "net.stlq")
    assert graph.inputs[0].shape == shape
    compare(model, graph, {"x": samples(model)["x"][:3]})
    if dynamic:
        x = np.random.default_rng(1).standard_normal((2, 4, 12, 6)).astype(np.float32)
        compare(model, graph, {"x": x})


def shuffle_pixels(net, x, dynamic):
    """Depth to space as a view, a permutation and a view."""
    if not dynamic:
        x = net.node("Reshape", x, net.constant([-1, 3, 2, 2, 8, 8], np.int64))
        x = net.node("Transpose", x, perm=[0, 1, 4, 2, 5, 3])
        return net.node("Reshape", x, net.constant([-1, 3, 16, 16], np.int64))
    size = net.node("Shape", x)
    n, h, w = (net.node("Gather", size, net.constant([i], np.int64)) for i in (0, 2, 3))
    three, two = net.constant([3], np.int64), net.constant([2], np.int64)
    x = net.node("Reshape", x, net.node("Concat", n, three, two, two, h, w, axis=0))
    x = net.node("Transpose", x, perm=[0, 1, 4, 2, 5, 3])
    h, w = net.node("Mul", h, two), net.node("Mul", w, two)
    return net.node("Reshape", x, net.node("Concat", n, three, h, w, axis=0))


@pytest.mark.parametrize(("dynamic", "opset"), [(False, 9), (False, 18), (True, 18)])
def test_pixel_shuffle_stays_on_codes(dynamic, opset, tmp_path):
    shape = ("batch", 4, "height", "width") if dynamic else ("batch", 4, 8, 8)
    net = Net(shape=shape, opset=opset)
    model = net.model(net.conv(shuffle_pixels(net, net.conv("x", 4, 12), dynamic), 3, 4))
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == []
    assert "DepthToSpace" in [node.op for node in graph.nodes]
    compare(model, graph, {"x": samples(model)["x"][:3]})
    if dynamic:
        x = np.random.default_rng(1).standard_normal((2, 4, 6, 10)).astype(np.float32)
        compare(model, graph, {"x": x})


def test_pixel_unshuffle_stays_on_codes(tmp_path):
    net = Net()
    x = net.node("Reshape", net.conv("x"), net.constant([-1, 4, 4, 2, 4, 2], np.int64))
    x = net.node("Transpose", x, perm=[0, 1, 3, 5, 2, 4])
    x = net.node("Reshape", x, net.constant([-1, 16, 4, 4], np.int64))
    model = net.model(net.conv(x, 16, 4))
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == []
    compare(model, graph, {"x": samples(model)["x"][:3]})


def test_other_permutations_stay_as_they_are(tmp_path):
    net = Net()
    x = net.node("Reshape", net.conv("x"), net.constant([-1, 2, 2, 8, 8], np.int64))
    x = net.node("Transpose", x, perm=[0, 1, 3, 2, 4])
    model = net.model(net.node("Reshape", x, net.constant([-1, 4, 8, 8], np.int64)))
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == ["Reshape", "Transpose", "Reshape"]
    compare(model, graph, {"x": samples(model)["x"][:3]})


def test_size_computed_from_the_input_s_stays_dynamic(tmp_path):
    """As the newer exporter writes interpolate(y, x.shape[2:]) and then cat([y, x])."""
    net = Net(shape=("batch", 4, "height", "width"))
    fine = net.node("Relu", net.conv("x", strides=[2, 2]))
    coarse = net.node("Relu", net.conv(fine, strides=[2, 2]))
    sizes = []
    for axis in (2, 3):
        size = net.node("Shape", "x", start=axis, end=axis + 1)
        half = net.node("Div", net.node("Sub", size, net.constant([1], np.int64)),
                        net.constant([2], np.int64))  # fmt: skip
        sizes.append(net.node("Add", half, net.constant([1], np.int64)))
    sizes = net.node("Concat", net.node("Shape", coarse, start=0, end=2), *sizes, axis=0)
    coarse = net.node("Resize", coarse, "", "", sizes, mode="linear")
    late = net.node("Relu", net.conv(fine, kernel=1))
    model = net.model(net.conv(net.node("Concat", coarse, late, axis=1), 8))
    graph = convert(model, tmp_path / "net.stlq")
    assert graph.inputs[0].shape == ("batch", 4, "height", "width")
    assert in_float(graph) == []
    for size in ((8, 8), (11, 14)):
        x = np.random.default_rng(1).standard_normal((2, 4, *size)).astype(np.float32)
        compare(model, graph, {"x": x}, snr=20)


def test_batch_that_is_not_in_front(tmp_path):
    """Attention of sequences (T, N, F): with one picture, N = 1 looks like a channel."""
    net = Net()
    x = net.node("Reshape", net.conv("x", 4, 6), net.constant([0, 6, -1], np.int64))
    x = net.node("Transpose", x, perm=[2, 0, 1])
    x = net.node("Reshape", x, net.constant([64, -1, 2, 3], np.int64))
    x = net.node("Reshape", x, net.constant([-1, 6], np.int64))
    x = net.node("Gemm", x, net.random(6, 5), net.random(5))
    model = net.model(net.node("Reshape", x, net.constant([64, -1, 5], np.int64)))
    graph = convert(model, tmp_path / "net.stlq")
    for count in (1, 3):
        compare(model, graph, {"x": samples(model)["x"][:count]})


def test_initial_state_of_zeros(tmp_path):
    net = Net()
    x = net.node("Transpose", net.node("ReduceMean", net.conv("x"), net.constant([2], np.int64),
                                       keepdims=0), perm=[2, 0, 1])  # fmt: skip
    batch = net.node("Gather", net.node("Shape", x), net.constant([1], np.int64))
    one, five = net.constant([1], np.int64), net.constant([5], np.int64)
    state = net.node("ConstantOfShape", net.node("Concat", one, batch, five, axis=0))
    x = net.node("GRU", x, net.random(1, 15, 4), net.random(1, 15, 5), net.random(1, 30), "", state,
                 hidden_size=5, linear_before_reset=1)  # fmt: skip
    model = net.model(x)
    graph = convert(model, tmp_path / "net.stlq")
    compare(model, graph, {"x": samples(model)["x"][:3]}, snr=19)


@pytest.mark.parametrize("form", ["Div", "Mul", "HardSigmoid"])
def test_activation_in_float_is_one_operator(form, tmp_path):
    net = Net()
    x = net.conv("x")
    if form == "HardSigmoid":
        y = net.node("Mul", x, net.node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    else:
        y = net.node("Add", x, net.constant(3.0))
        y = net.node("Mul", x, net.node("Clip", y, net.constant(0.0), net.constant(6.0)))
        y = net.node(form, y, net.constant(6.0 if form == "Div" else 1 / 6))
    model = net.model(net.conv(y))
    graph = convert(model, tmp_path / "net.stlq", keep_float=["*"])
    assert [node.op for node in graph.nodes] == ["Conv", "HardSwish", "Conv"]
    compare(model, graph, {"x": samples(model)["x"][:3]}, snr=80)


# --- TensorFlow and Keras -------------------------------------------------------------------------


def channels_last(flatten):
    net = Net(shape=("batch", 12, 10, 3))
    x = net.node("Transpose", "x", perm=[0, 3, 1, 2])
    x = net.node("Relu", net.conv(x, 3, 4, pads=[0, 0, 1, 1], strides=[2, 2]))
    x = net.node("Transpose", x, perm=[0, 2, 3, 1])
    if not flatten:
        return net.model(x)
    x = net.node("Reshape", x, net.constant([-1, 6 * 5 * 4], np.int64))
    x = net.node("Add", net.node("MatMul", x, net.random(6 * 5 * 4, 5)), net.random(5))
    return net.model(net.node("Softmax", x, axis=-1))


@pytest.mark.parametrize("flatten", [False, True])
def test_channels_last(flatten, tmp_path):
    model = channels_last(flatten)
    graph = convert(model, tmp_path / "net.stlq")
    x = samples(model)["x"][:3]
    compare(model, graph, {"x": x})


def test_transposes_cancel(tmp_path):
    """HardSwish, squeeze and excitation, a shortcut, padding and joining on channels last."""
    net = Net(shape=("batch", 12, 10, 3))

    def last(x):
        return net.node("Transpose", x, perm=[0, 2, 3, 1])

    def first(x):
        return net.node("Transpose", x, perm=[0, 3, 1, 2])

    x = net.node("Sub", net.node("Mul", "x", net.constant([2.0, 1.0, 0.5])), net.constant(0.5))
    x = net.node("Add", last(net.conv(first(x), 3, 4)), net.random(4))
    y = net.node("Clip", net.node("Add", x, net.constant(3.0)), net.constant(0), net.constant(6))
    x = net.node("Mul", x, net.node("Mul", y, net.constant(1 / 6)))
    mean = net.node("ReduceMean", x, net.constant([1, 2], np.int64), keepdims=0)
    gate = net.node("Sigmoid", net.node("MatMul", mean, net.random(4, 4)))
    gate = net.node("Reshape", gate, net.constant([-1, 1, 1, 4], np.int64))
    y = net.node("Pad", net.node("Mul", x, gate), net.constant([0, 0, 0, 0, 0, 1, 1, 0], np.int64))
    y = last(net.conv(first(y), pads=[1, 1, 0, 0]))
    x = net.node("Concat", net.node("Add", x, y), y, axis=-1)
    left, right = net.node("Split", x, net.constant([5, 3], np.int64), outputs=2, axis=3)
    model = net.model(last(net.conv(first(right), 3)), net.node("MatMul", left, net.random(5, 2)))
    graph = convert(model, tmp_path / "net.stlq")
    assert set(in_float(graph)) <= {"Transpose", "Mul", "Sub"}
    assert in_float(graph).count("Transpose") == 3  # of the input and both outputs
    compare(model, graph, {"x": samples(model)["x"][:3]})


def test_shuffle_and_repetition_of_channels_last(tmp_path):
    net = Net(shape=("batch", 8, 6, 4))

    def sizes(*values):
        return net.constant(list(values), np.int64)

    x = net.conv(net.node("Transpose", "x", perm=[0, 3, 1, 2]))
    x = net.node("Transpose", x, perm=[0, 2, 3, 1])
    x = net.node("Reshape", x, sizes(-1, 8, 6, 2, 2))
    x = net.node("Reshape", net.node("Transpose", x, perm=[0, 1, 2, 4, 3]), sizes(-1, 8, 6, 4))
    for axis, size in ((2, (-1, 16, 6, 4)), (3, (-1, 16, 12, 4))):
        repeats = [1] * 5
        repeats[axis] = 2
        x = net.node("Tile", net.node("Unsqueeze", x, sizes(axis)), sizes(*repeats))
        x = net.node("Reshape", x, sizes(*size))
    x = net.conv(net.node("Transpose", x, perm=[0, 3, 1, 2]))
    model = net.model(x)
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == ["Transpose"]
    assert [n.op for n in graph.nodes if n.op in ("Gather", "Resize")] == [
        "Gather",
        *["Resize"] * 2,
    ]
    compare(model, graph, {"x": samples(model)["x"][:3]})


def test_channels_last_takes_pictures(tmp_path):
    model, path = channels_last(True), tmp_path / "net.stlq"
    pictures = np.random.default_rng(0).integers(0, 256, (8, 24, 20, 3)).astype(np.uint8)
    converter.convert(
        model, path, calibration=pictures, weight_bits=5, residual_ratio=1.0,
        preprocessing=converter.Preprocessing(),
    )  # fmt: skip
    session = runtime.load(path)
    x = converter.Preprocessing().apply(pictures[0], (12, 10)).transpose(1, 2, 0)[None]
    assert np.array_equal(session.run(pictures[0]), session.run(np.ascontiguousarray(x)))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rearranged_models_compute_the_same(data):
    """To the bit: random element-wise nodes, views and joins between Transposes."""
    n, h, w, c = (data.draw(st.integers(2, 4)) for _ in range(4))
    net = Net(shape=("batch", h, w, c))
    x = net.node("GlobalAveragePool", net.node("Transpose", "x", perm=[0, 3, 1, 2]))
    x = net.node("Add", x, net.random(1, c, h, w))
    x = net.node("Transpose", x, perm=[0, 2, 3, 1])
    for _ in range(data.draw(st.integers(1, 6))):
        match data.draw(
            st.sampled_from(["add", "relu", "concat", "pad", "slice", "shuffle", "tile"])
        ):
            case "add":
                shape = data.draw(st.sampled_from([(), (c,), (1, 1, c), (w, c), (1, h, 1, 1)]))
                x = net.node("Add", x, net.random(*shape))
            case "relu":
                x = net.node("Relu", x)
            case "concat":
                axis = data.draw(st.sampled_from([1, 2, -1]))
                x = net.node("Concat", x, net.node("Neg", x), axis=axis)
                h, w, c = h * (1 + (axis == 1)), w * (1 + (axis == 2)), c * (1 + (axis == -1))
            case "pad":
                x = net.node("Pad", x, net.constant([0, 1, 0, 0, 0, 0, 2, 0], np.int64))
                h, w = h + 1, w + 2
            case "slice":
                ends = net.constant([2**31 - 1, c], np.int64)
                axes = net.constant([-2, 3], np.int64)
                x = net.node("Slice", x, net.constant([w - 1, 0], np.int64), ends, axes)
                w = 1
            case "shuffle":
                x = net.node("Concat", x, x, axis=3)
                x = net.node("Reshape", x, net.constant([-1, h, w, 2, c], np.int64))
                x = net.node("Transpose", x, perm=[0, 1, 2, 4, 3])
                c *= 2
                x = net.node("Reshape", x, net.constant([-1, h, w, c], np.int64))
            case "tile":
                x = net.node("Unsqueeze", x, net.constant([2], np.int64))
                x = net.node("Tile", x, net.constant([1, 1, 3, 1, 1], np.int64))
                h *= 3
                x = net.node("Reshape", x, net.constant([-1, h, w, c], np.int64))
    proto = net.model(net.node("Transpose", x, perm=[0, 3, 1, 2]))
    model = onnx_model.load(proto)
    sample = {"x": net.rng.standard_normal((n, *net.inputs["x"][1:])).astype(np.float32)}
    rearrange(model, onnx_model.trace(model, sample))
    assert sum(node.op_type == "Transpose" for node in model.proto.graph.node) == 1
    (found,) = onnx_model.run(model.proto, sample)
    (expected,) = reference(proto, sample).values()
    assert np.array_equal(found, expected)


# --- PaddlePaddle ---------------------------------------------------------------------------------


def test_everything_in_constant_nodes(tmp_path):
    rng = np.random.default_rng(0)
    nodes = []

    def constant(value):
        name = f"p2o.Constant.{len(nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def random(*shape):
        return constant(rng.standard_normal(shape).astype(np.float32))

    def node(op, *inputs, **attributes):
        name = f"p2o.{op}.{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    x = node("Conv", "x", random(6, 4, 3, 3), pads=[1, 1, 1, 1])
    x = node("Add", x, node("Reshape", random(6), constant(np.array([1, 6, 1, 1]))))
    variance = constant(rng.uniform(0.5, 2, 6).astype(np.float32))
    x = node("BatchNormalization", x, random(6), random(6), random(6), variance)
    x = node("Clip", x, constant(np.float32(0)), constant(np.float32(6)))
    x = node("Mul", x, node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    x = node("GlobalAveragePool", x)
    x = node("MatMul", node("Flatten", x), random(6, 5))
    x = node("Softmax", node("Add", x, random(5)), axis=-1)
    nodes.append(helper.make_node("Identity", [x], ["save_infer_model/scale_0.tmp_0"]))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", (-1, 4, 8, 8)), (nodes[-1].output[0], (-1, 5)))
    ]
    graph = helper.make_graph(nodes, "PaddlePaddle Graph 0", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    packed = convert(model, tmp_path / "net.stlq")
    assert in_float(packed) == ["Flatten", "Softmax"]
    compare(model, packed, {"x": samples(model)["x"][:3]})


def test_dimensions_without_a_name(tmp_path):
    """Every "?" is a size of its own, not the same one."""
    net = Net(shape=("?", 4, "?", "?"))
    model = net.model(net.conv("x"))
    graph = convert(model, tmp_path / "net.stlq")
    assert graph.inputs[0].shape == ("x_dim_0", 4, "x_dim_2", "x_dim_3")
    x = np.random.default_rng(1).standard_normal((2, 4, 12, 6)).astype(np.float32)
    compare(model, graph, {"x": x})


def test_outputs_of_almost_nothing(tmp_path):
    """A detector that finds nothing: float32's noise is no wrong translation."""
    net = Net()
    x = net.node("Sub", net.conv("x"), net.constant(60.0))
    model = net.model(net.node("Sigmoid", x))
    convert(model, tmp_path / "net.stlq")


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 17, 18, 21, NEWEST])
def test_versions_of_the_operators(opset, tmp_path):
    """What has changed its form from one version of ONNX to another."""
    net = Net(opset=opset)

    def sizes(*values):
        return net.constant(list(values), np.int64)

    x = net.conv("x")
    constants = net.random(4), net.random(4), net.random(4), net.constant([1.0, 2.0, 0.5, 1.5])
    x = net.node("BatchNormalization", x, *constants)
    if opset < 11:
        x = net.node("Clip", x, min=-1.0, max=2.0)
        x = net.node("Pad", x, pads=[0, 0, 1, 0, 0, 0, 1, 2])
    else:
        x = net.node("Clip", x, net.constant(-1.0), net.constant(2.0))
        x = net.node("Pad", x, sizes(0, 0, 1, 0, 0, 0, 1, 2))
    if opset < 10:
        x = net.node("Slice", x, axes=[2, 3], starts=[1, 0], ends=[9, 8])
    else:
        x = net.node("Slice", x, sizes(1, 0), sizes(9, 8), sizes(2, 3))
    x = net.conv(x)
    if opset < 9:
        x = net.node("Upsample", x, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")
    elif opset < 11:
        operator = "Upsample" if opset < 10 else "Resize"
        x = net.node(operator, x, net.constant([1.0, 1.0, 2.0, 2.0]), mode="nearest")
    else:
        x = net.node(
            "Resize", x, net.constant([]), net.constant([1.0, 1.0, 2.0, 2.0]), mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
    if opset < 18:
        x = net.node("ReduceMean", x, axes=[2, 3], keepdims=1)
    else:
        x = net.node("ReduceMean", x, sizes(2, 3), keepdims=1)
    x = net.node("Squeeze", x, axes=[2, 3]) if opset < 13 else net.node("Squeeze", x, sizes(2, 3))
    x = net.node("Dropout", x)
    model = net.model(
        net.node("Softmax", net.node("Gemm", x, net.random(4, 3), net.random(3)), axis=1)
    )
    graph = convert(model, tmp_path / "net.stlq")
    assert in_float(graph) == ["Softmax"] or in_float(graph) == ["Flatten", "Softmax"]
    compare(model, graph, {"x": samples(model)["x"][:3]})
