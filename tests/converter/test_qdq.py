"""Quantized models as input: what they fix is kept, bit for bit, and the rest is calibrated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import graphs, oracle

onnx = pytest.importorskip("onnx", reason="needs the extra `converter`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `converter`")
from onnx import TensorProto, helper  # noqa: E402
from support.graphs import assume_small_output_padding  # noqa: E402
from support.onnx_nets import Net, network, noise, operations, reference  # noqa: E402

from logshift.converter import ConversionError, convert  # noqa: E402
from logshift.converter.encode import encode  # noqa: E402
from logshift.converter.export import export  # noqa: E402
from logshift.converter.metadata import KEY, WeightRecord  # noqa: E402
from logshift.converter.recognise import recognise, scaled  # noqa: E402
from logshift.runtime import load  # noqa: E402
from logshift.runtime.file import format as packed_format  # noqa: E402
from logshift.runtime.graph import Quantization  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


class QuantizedNet(Net):
    """A `Net` with pairs of QuantizeLinear and DequantizeLinear, and weights on a grid."""

    def __init__(self, **options):
        super().__init__(**{"opset": 21} | options)
        self.records = {}

    def pair(self, x, scale, zero_point=0, dtype=np.uint8, bits=8):
        parameters = [self.constant(scale), self.constant(zero_point, dtype)]
        if bits < 8:
            low, high = (-zero_point * scale, (2**bits - 1 - zero_point) * scale)
            x = self.node("Clip", x, self.constant(low), self.constant(high))
        codes = self.node("QuantizeLinear", x, *parameters)
        return self.node("DequantizeLinear", codes, *parameters)

    def on_grid(self, *shape, bits=4, ratio=0.3, **options):
        words = encode(self.rng.standard_normal(shape), bits, ratio, **options)
        return words, self.constant(words.values().transpose(0, 3, 1, 2))

    def conv(self, x, channels=4, out=4, kernel=3, words=True, **attributes):
        if not words:
            return super().conv(x, channels, out, kernel, **attributes)
        attributes.setdefault("pads", [kernel // 2] * 4)
        shape = (out, kernel, kernel, channels // attributes.get("group", 1))
        weight, name = self.on_grid(*shape)
        self.records[name] = vars(WeightRecord.of(weight, "element"))
        bias = self.constant(0.1 * self.rng.standard_normal(out))
        return self.node("Conv", x, name, bias, **attributes)

    def model(self, *outputs, hints=True):
        model = super().model(*outputs)
        model.ir_version = 10
        if hints:
            text = json.dumps({"weights": self.records})
            helper.set_model_props(model, {KEY: text})
        return model


def check(model, path, scale, expected_operations=None, count=4, share=0.999):
    """The packed network agrees with the quantized model to within one code."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    report = convert(model, path, calibration=noise(8, shape))
    x = noise(count, shape, seed=1)
    graph = packed_format.read(path)
    found = oracle.evaluate(graph, {"x": x})
    for name, y in reference(model, {"x": x}).items():
        assert (np.abs(found[name] - y) <= 1.001 * scale + 1e-5).mean() >= share, name
    if expected_operations is not None:
        assert operations(graph) == expected_operations
    return graph, report


# --- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "zero_point", "expected"),
    [(np.uint8, 0, 0), (np.uint8, 30, 30), (np.int8, -128, 0), (np.int8, 5, 133)],
)
def test_quantization_is_the_models(path, dtype, zero_point, expected):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.03, 128)
    y = net.pair(net.conv(x), 0.11, zero_point, dtype)
    graph, report = check(net.model(net.pair(net.conv(y), 0.5, 120)), path, 0.5)
    scales = [np.float32(s).item() for s in (0.03, 0.11, 0.5)]
    assert list(graph.quantization.values()) == [
        Quantization(scales[0], 128, 8), Quantization(scales[1], expected, 8),
        Quantization(scales[2], 120, 8),
    ]  # fmt: skip
    assert "ranges of 3 of 3 tensors are the model's" in report.notes
    assert "weights of 2 of 2 layers were words already: kept" in report.notes
    assert operations(graph) == ["Conv", "Conv"]


@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_a_clip_makes_fewer_codes(path, bits):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.5, 1, bits=bits)
    y = net.pair(net.node("Relu", net.conv(x)), 0.6, bits=bits)
    graph, _ = check(net.model(net.pair(net.conv(y), 0.8, 2**bits // 2, bits=bits)), path, 0.8)
    assert [q.bits for q in graph.quantization.values()] == [bits] * 3
    assert operations(graph) == ["Conv", "Conv"]


def test_what_it_is_compared_with_computes_what_the_model_says(path):
    """Left to itself onnxruntime rounds weights between codes to int8, and the verdict is wrong."""
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.5, 4, bits=3)
    for _ in range(6):
        x = net.pair(net.node("Relu", net.conv(x)), 0.5, bits=3)
    report = convert(net.model(net.conv(x)), path, calibration=noise(16, (4, 8, 8)))
    (output,) = report.verdict.outputs
    assert output.cosine > 0.99999 and not report.verdict.warning


@pytest.mark.parametrize(("kind", "zero_point"), [(TensorProto.UINT4, 8), (TensorProto.INT4, 0)])
def test_types_of_four_bits(path, kind, zero_point):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    net.initializers.append(helper.make_tensor("z", kind, [], [zero_point]))
    parameters = [net.constant(0.3), "z"]
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", "x", *parameters), *parameters)
    graph, _ = check(net.model(net.conv(x)), path, 1e-3)
    assert list(graph.quantization.values()) == [Quantization(np.float32(0.3).item(), 8, 4)]


def test_a_left_out_relu_is_still_one(path):
    """Codes that begin at zero cut negative values off, whatever comes after them."""
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.05, 128)
    y = net.pair(net.conv(x), 0.05)
    z = net.pair(net.node("MaxPool", net.conv(y), kernel_shape=[2, 2]), 0.1)
    y = net.pair(net.node("GlobalAveragePool", y), 0.02)
    check(net.model(net.pair(net.conv(z), 0.5, 128), y), path, 0.1)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_left_out_relu_is_one_in_float_as_well(path, bits):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    y = net.pair(net.conv(net.pair("x", 0.001, 128)), 0.001)
    model = net.model(net.conv(net.node("MaxPool", y, kernel_shape=[2, 2])))
    convert(model, path, calibration=noise(8, (4, 8, 8)), activation_bits=bits)


def test_sums_pools_and_joins(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.03, 128)
    one = net.pair(net.node("Relu", net.conv(x)), 0.03)
    two = net.pair(net.conv(one), 0.08, 120)
    y = net.pair(net.node("Relu", net.node("Add", two, one)), 0.07)
    pooled = net.pair(net.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 0.07)
    means = net.pair(net.node("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2]), 0.05)
    joined = net.pair(net.node("Concat", pooled, means, axis=1), 0.06)
    y = net.pair(net.conv(joined, 8, 6), 0.4, 128)
    y = net.node("Flatten", net.pair(net.node("GlobalAveragePool", y), 0.1, 128))
    words, _ = net.on_grid(5, 1, 1, 6)
    weight = net.constant(words.values().reshape(5, 6))
    model = net.model(net.node("Gemm", y, weight, net.random(5), transB=1))
    graph, report = check(model, path, 0.1, [
        "Conv", "Conv", "Add", "MaxPool", "AveragePool", "Concat", "Conv", "GlobalAveragePool",
        "Conv",
    ])  # fmt: skip
    assert "weights of 4 of 4 layers were words already: kept" in report.notes
    assert "ranges of 9 of 9 tensors are the model's" in report.notes
    np.testing.assert_array_equal(graph.nodes[-2].weights.integers(), words.integers())


def test_rounding_before_a_sum_is_left_out_only_of_layers_that_are_rounded_anyway(path):
    for words, expected in ((True, ["Conv", "Conv", "Add"]), (False, ["Conv", "Conv"])):
        net = QuantizedNet(shape=("batch", 4, 8, 8))
        x = net.pair("x", 0.03, 128)
        y = net.pair(net.conv(x), 0.1, 128)
        z = net.pair(net.conv(y, words=words), 0.1, 128)
        convert(
            net.model(net.pair(net.node("Add", y, z), 0.2, 128)),
            path,
            calibration=noise(8, (4, 8, 8)),
        )
        assert operations(packed_format.read(path)) == expected


def test_the_nearest_following_pair_holds(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    y = net.pair(net.conv(net.pair("x", 0.03, 128)), 0.11, 100)
    y = net.pair(net.node("Relu", y), 0.07)
    model = net.model(net.pair(net.conv(y), 0.5, 120))
    graph, _ = check(model, path, 0.5, ["Conv", "Conv"], share=0.9)  # one layer is rounded once
    assert list(graph.quantization.values())[1] == Quantization(np.float32(0.07).item(), 0, 8)


def test_a_pair_before_a_relu_holds_if_none_follows(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    y = net.node("Relu", net.pair(net.conv(net.pair("x", 0.03, 128)), 0.11, 100))
    graph, _ = check(net.model(net.pair(net.conv(y), 0.5, 120)), path, 0.5, ["Conv", "Conv"])
    assert list(graph.quantization.values())[1] == Quantization(np.float32(0.11).item(), 100, 8)
    assert graph.nodes[1].attributes["clamp"] == [100, None]


def test_moving_values_keeps_the_quantization(path):
    """Known of the result only; of both and different; and a tensor that is rounded twice."""
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.conv(net.pair("x", 0.03, 128))
    y = net.pair(net.node("MaxPool", x, kernel_shape=[2, 2]), 0.1, 90)
    z = net.pair(net.node("MaxPool", y, kernel_shape=[2, 2]), 0.15, 110)
    other = net.pair(y, 0.17, 80)
    model = net.model(net.pair(net.conv(z), 0.4, 128), net.pair(net.conv(other), 0.4, 128))
    graph, _ = check(model, path, 0.4)
    assert sorted(operations(graph)) == sorted(
        ["Conv", "MaxPool", "MaxPool", "Lookup", "Lookup", "Conv", "Conv"]
    )


@pytest.mark.parametrize("agree", [True, False])
def test_joining_tensors_that_agree_only_moves_codes(path, agree):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.1, 128)
    y = net.pair(net.conv(x), 0.1, 128 if agree else 120)
    joined = net.node("Concat", x, y, axis=1)
    graph, _ = check(net.model(net.pair(net.conv(joined, channels=8), 0.4, 128)), path, 0.4)
    (join,) = (node for node in graph.nodes if node.op == "Concat")
    found = graph.quantization
    assert found[join.inputs[1]].zero_point == (128 if agree else 120)
    assert (found[join.outputs[0]] == found[join.inputs[0]]) == agree


def test_functions_and_what_is_not_said(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.03, 128)
    y = net.pair(net.node("HardSwish", net.pair(net.conv(x), 0.1, 128)), 0.05, 20)
    y = net.node("Relu", net.conv(y))
    model = net.model(net.pair(net.conv(y), 1.0, 128))
    report = convert(model, path, calibration=noise(8, (4, 8, 8)))
    graph = packed_format.read(path)
    assert operations(graph) == ["Conv", "Lookup", "Conv", "Conv"]
    name = graph.nodes[3].outputs[0]
    assert f"ranges of 4 of 5 tensors are the model's; calibrated: {name!r}" in report.notes


def test_pairs_that_codes_cannot_express_are_arithmetic(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.001, 1000, np.uint16)
    graph, _ = check(net.model(net.conv(x)), path, 1.0, share=0.98)  # calibrated ranges
    ops = [node.op for node in graph.nodes if node.is_onnx]
    assert [op for op in ops if op in ("Round", "Clip", "Cast")] == [
        "Round",
        "Clip",
        "Cast",
        "Cast",
    ]
    assert not {"QuantizeLinear", "DequantizeLinear"} & {*ops}


def test_scale_must_be_positive(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    with pytest.raises(ConversionError, match="QuantizeLinear 'n_QuantizeLinear0': scale 0.0"):
        convert(net.model(net.conv(net.pair("x", 0.0))), path, calibration=noise(4, (4, 8, 8)))


# --- weights ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 5), shift=st.integers(0, 4),
    clip=st.sampled_from([1, 2]), ratio=st.sampled_from([0.0, 0.2, 1.0]),
)  # fmt: skip
def test_words_are_recognised(seed, bits, shift, clip, ratio):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, 3)) + (int(rng.integers(1, 9)),)
    words = graphs.random_weights(rng, shape, bits, ratio, shift, clip)
    values = words.values()
    found = recognise(values)
    assert found.bits <= bits
    np.testing.assert_array_equal(found.values(), values)
    found = recognise(values, WeightRecord.of(words, "element"))
    assert (found.bits, found.residual_shift, found.clip) == (bits, shift, clip)
    np.testing.assert_array_equal(found.integers(), words.integers())
    np.testing.assert_array_equal(found.alpha, words.alpha)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_float_weights_are_not(seed):
    rng = np.random.default_rng(seed)
    for shape in ((4, 3, 3, 8), (16, 3, 3, 1), (10, 1, 1, 16)):
        w = rng.standard_normal(shape).astype(np.float32)
        assert recognise(w) is None
        words = encode(w, 4, 0.3)
        values = words.values()
        values.ravel()[np.abs(values).argmax()] *= 1 + 1e-5
        hint = WeightRecord.of(words, "element")
        assert recognise(values, hint) is None or shape[-1] == 1


def test_scaling_channels_changes_alpha_and_signs_only():
    w = np.random.default_rng(0).standard_normal((3, 3, 3, 2))
    words = encode(w, 4, 0.3, granularity="tile", tile=(1, 2))
    found = scaled(words, np.array([2.5, -0.3, 0.0]))
    assert found.tile == (1, 2)
    w = words.integers()
    np.testing.assert_array_equal(found.integers(), np.stack([w[0], -w[1], 0 * w[2]]))
    np.testing.assert_array_equal(
        found.alpha, np.float32([2.5 * words.alpha[0], np.float64(words.alpha[1]) * 0.3, 1])
    )


def test_scaling_to_next_to_nothing_gives_zeros():
    words = encode(np.random.default_rng(0).standard_normal((3, 3, 3, 2)), 4, 0.3)
    found = scaled(words, np.array([1e-45, -1e-31, 1e-20]))
    np.testing.assert_array_equal(found.integers()[2], words.integers()[2])
    assert not found.integers()[:2].any() and (found.alpha[:2] == 1).all()


@pytest.mark.parametrize("hints", [True, False])
def test_batch_normalization_goes_into_alpha(path, hints):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    y = net.conv(net.pair("x", 0.03, 128))
    scale, shift, mean = net.random(4), net.random(4), net.random(4)
    variance = net.constant([0.5, 1.0, 2.0, 0.7])
    y = net.node("BatchNormalization", y, scale, shift, mean, variance)
    model = net.model(net.pair(net.node("Relu", y), 0.1), hints=hints)
    graph, report = check(model, path, 0.1, ["Conv"])
    record = next(iter(net.records.values()))
    words = recognise(
        np.stack([t for t in _initializers(model, 4)])[0].transpose(0, 2, 3, 1),
        WeightRecord(**record),
    )
    signs = np.sign(_initializers(model, 1)[1]).reshape(-1, 1, 1, 1)
    found = graph.nodes[1].weights
    assert (found.integers() == signs * words.integers()).all()
    assert "weights of 1 of 1 layers were words already: kept" in report.notes


def _initializers(model, rank):
    arrays = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    return [a for a in arrays if a.ndim == rank]


def test_quantized_weights_and_biases_become_float(path):
    """Per channel int8, int32 biases: folded exactly, then encoded like float weights."""
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.03, 128)
    scales = net.constant([0.01, 0.02, 0.015])
    weight = net.node(
        "DequantizeLinear", net.constant(net.rng.integers(-127, 128, (3, 4, 3, 3)), np.int8),
        scales, net.constant(np.zeros(3), np.int8), axis=0,
    )  # fmt: skip
    bias = net.node("DequantizeLinear", net.constant([100, -200, 2**20], np.int32), scales, axis=0)
    y = net.pair(net.node("Conv", x, weight, bias, pads=[1] * 4), 0.5, 128)
    model = net.model(y)
    report = convert(
        model, path, calibration=noise(8, (4, 8, 8)), residual_ratio=1.0, bias_correction=False
    )
    graph = packed_format.read(path)
    assert "ranges of 2 of 2 tensors are the model's" in report.notes
    assert not any("words already" in note for note in report.notes)
    np.testing.assert_array_equal(graph.nodes[1].bias, np.float32([1, -4, 2**20 * 0.015]))
    assert report.layers[1].weight_snr_db > 25


def test_a_model_quantized_by_onnxruntime(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rows = iter(noise(16))

        def get_next(self):
            return next(({"x": row[None]} for row in self.rows), None)

    onnx.save(network(), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    report = convert(
        tmp_path / "int8.onnx", tmp_path / "net.stlq", calibration=noise(), residual_ratio=1.0
    )
    assert any(note.startswith("ranges of") and "calibrated" not in note for note in report.notes)
    model = onnx.load(tmp_path / "int8.onnx")
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    known = {float(a) for n, a in scales.items() if n.endswith("_scale") and a.size == 1}
    graph = packed_format.read(tmp_path / "net.stlq")
    assert {q.scale for q in graph.quantization.values()} <= known
    x = noise(4, seed=2)
    expected = next(iter(reference(model, {"x": x}).values()))
    found = load(tmp_path / "net.stlq").run(x)
    assert np.square(found - expected).mean() < 0.01 * np.square(expected).mean()


# --- and back -----------------------------------------------------------------------------------


def same_network(one, two, inputs):
    """Integer weights, quantization and outputs are the same, bit for bit."""
    assert set(one.quantization.values()) == set(two.quantization.values())
    layers = [[n for n in g.nodes if n.weights is not None] for g in (one, two)]
    for a, b in zip(*layers, strict=True):
        np.testing.assert_array_equal(a.weights.integers(), b.weights.integers())
        np.testing.assert_array_equal(a.weights.alpha, b.weights.alpha)
        np.testing.assert_array_equal(a.bias, b.bias)
    found = [oracle.evaluate(graph, inputs) for graph in (one, two)]
    for info in one.outputs:
        np.testing.assert_array_equal(found[0][info.name], found[1][info.name])


@pytest.mark.parametrize(
    "options", [{}, {"weight_bits": 3, "activation_bits": 5}, {"residual_shift": 2}]
)
def test_round_trip(tmp_path, options):
    names = [tmp_path / f"{name}.stlq" for name in ("one", "two")]
    net = Net(shape=("batch", 3, 16, 16))
    x = net.node("HardSwish", net.conv("x", 3, 8))
    x = net.node("Relu", net.node("Add", net.conv(x, 8, 8), x))
    y = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    z = net.node("LeakyRelu", net.conv(x, 8, 4, strides=[2, 2]))
    x = net.node("Concat", y, z, axis=1)
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    model = net.model(net.node("Gemm", x, net.random(12, 5), net.random(5)))
    convert(model, names[0], calibration=noise(), labels=list("abcde"), **options)
    export(names[0], tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx", names[1], calibration=noise(seed=7))
    graphs_ = [packed_format.read(name) for name in names]
    assert operations(graphs_[0]) == operations(graphs_[1])
    assert graphs_[0].labels == graphs_[1].labels
    assert graphs_[0].inputs == graphs_[1].inputs and graphs_[0].outputs == graphs_[1].outputs
    assert graphs_[0].quantization == graphs_[1].quantization
    same_network(*graphs_, {"x": noise(4, seed=3)})


@pytest.mark.parametrize("kind", graphs.GRAPHS)
@pytest.mark.hypothesis
def test_round_trip_of_random_graphs(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(graph=graphs.GRAPHS[kind])
    def check(graph):
        for node in graph.nodes:  # onnxruntime, which converting runs, has no other
            assume_small_output_padding(node)
            assume(node.op != "AveragePool" or not node.attributes["ceil_mode"])
            assume(node.op != "Concat" or len(node.inputs) > 1)  # which is none
        assume(len({info.nominal[0] for info in graph.inputs}) == 1)
        inputs = {n: np.nan_to_num(x, nan=1, posinf=9, neginf=-9) for n, x in
                  graphs.random_inputs(graph).items()}  # fmt: skip
        export(graph, folder / "net.onnx")
        convert(folder / "net.onnx", folder / "net.stlq", calibration=[inputs])
        same_network(graph, packed_format.read(folder / "net.stlq"), inputs)

    check()


@pytest.mark.parametrize("options", [{}, {"max_bytes": 10_000}])
def test_words_that_are_given_are_not_chosen_anew(tmp_path, options):
    names = [tmp_path / f"{name}.stlq" for name in ("one", "two")]
    convert(network(), names[0], calibration=noise(), weight_bits=3)
    export(names[0], tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx", names[1], calibration=noise(), weight_bits="auto", **options)
    same_network(*map(packed_format.read, names), {"x": noise(4, seed=3)})


def test_preprocessing_and_labels_come_along(tmp_path):
    from logshift.converter import Preprocessing

    preprocessing = Preprocessing(crop=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    convert(network(), tmp_path / "one.stlq", calibration=pixels, preprocessing=preprocessing,
            labels=list("abcde"))  # fmt: skip
    export(tmp_path / "one.stlq", tmp_path / "net.onnx")
    report = convert(tmp_path / "net.onnx", tmp_path / "two.stlq", calibration=pixels)
    one, two = (packed_format.read(tmp_path / f"{name}.stlq") for name in ("one", "two"))
    assert one.preprocessing == two.preprocessing and two.labels == list("abcde")
    assert not any("assumed" in note for note in report.notes)
    report = convert(tmp_path / "net.onnx", tmp_path / "two.stlq", calibration=pixels,
                     labels=list("vwxyz"))  # fmt: skip
    assert packed_format.read(tmp_path / "two.stlq").labels == list("vwxyz")


def test_weights_that_shall_stay_float(path):
    net = QuantizedNet(shape=("batch", 4, 8, 8))
    x = net.pair("x", 0.03, 128)
    x = net.pair(net.node("Relu", net.conv(x, words=False)), 0.05)
    y = net.conv(x)
    model = net.model(y)
    weight = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    helper.set_model_props(
        model, {KEY: json.dumps({"weights": net.records, "keep_float": [weight]})}
    )
    convert(model, path, calibration=noise(8, (4, 8, 8)))
    float_conv, packed_conv = (node for node in packed_format.read(path).nodes if node.op == "Conv")
    assert float_conv.weights is None and packed_conv.weights is not None
    helper.set_model_props(model, {KEY: json.dumps({"keep_float": weight})})
    with pytest.raises(ConversionError, match="keep_float must be a list of strings"):
        convert(model, path, calibration=noise(8, (4, 8, 8)))
