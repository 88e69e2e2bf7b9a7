"""Export to ONNX: what onnxruntime computes from it, against the packed network itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from PIL import Image
from support import graphs, oracle
from support.graphs import assume_small_output_padding
from support.onnx_nets import Net, network, noise
from support.scripts import make

onnx = pytest.importorskip("onnx", reason="needs the extra `converter`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `converter`")
from logshift.converter import ConversionError, Preprocessing, convert  # noqa: E402
from logshift.converter.encode import encode  # noqa: E402
from logshift.converter.export import export  # noqa: E402
from logshift.converter.metadata import KEY, Metadata, WeightRecord  # noqa: E402
from logshift.runtime import load  # noqa: E402
from logshift.runtime.file import format as packed_format  # noqa: E402

DEMO = Path(__file__).parents[2] / "converter" / "demo"
VECTORS = json.loads((Path(__file__).parents[1] / "vectors/metadata.json").read_text())


def run(path, inputs, codes=()):
    """Outputs by name, and the codes of these tensors; the model must be valid in every shape."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for name in codes:
        value = onnx.helper.make_tensor_value_info(
            f"{name}/quantized", onnx.TensorProto.UINT8, None
        )
        model.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    values = zip(names, session.run(names, inputs), strict=True)
    return {name.removesuffix("/quantized"): y for name, y in values}


def compare(graph, found, expected, tolerance=None):
    """Codes are the same or neighbours, since engines sum in different orders.

    tolerance : of float32 tensors; by default what summing in another order does.
    """
    for node in graph.nodes:
        name = node.outputs[0]
        if name not in found:
            continue
        x, y = (values[name].astype(np.float64) for values in (found, expected))
        assert x.shape == y.shape
        same = np.ones(x.shape, bool)
        if node.op in ("Lookup", "DequantizeLinear"):  # any function of codes may jump
            before = node.inputs[0]
            same = found[before] == expected[before]
            np.testing.assert_array_equal(x[same], y[same])
        unit = 1.001 if graph.is_code(name) else tolerance or 1e-5 * np.abs(y).max()
        assert (np.abs(x - y)[same] > unit).sum() <= 0.001 * x.size, node.op


@pytest.mark.parametrize("kind", graphs.GRAPHS)
@pytest.mark.hypothesis
def test_random_graphs(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind) / "net.onnx"

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(graph=graphs.GRAPHS[kind])
    def check(graph):
        for node in graph.nodes:  # onnxruntime has no other
            a = node.attributes
            assume_small_output_padding(node)
            if node.op == "AveragePool":
                assume(a["dilations"] == [1, 1] and not (a["ceil_mode"] and a["count_include_pad"]))
        inputs = graphs.random_inputs(graph)
        # ONNX does not say which code NaN becomes.
        inputs = {name: np.nan_to_num(x, nan=1.0) for name, x in inputs.items()}
        export(graph, path)
        compare(graph, run(path, inputs, graph.quantization), oracle.evaluate(graph, inputs))

    check()


def test_words_are_plain_weights_of_exactly_their_values(tmp_path):
    graph = make.classifier()
    export(graph, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in graph.nodes:
        if node.weights is not None:
            values = weights[f"{node.outputs[0]}/weight"]
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values.transpose(0, 2, 3, 1), node.weights.values())


def test_metadata_and_free_dimensions(tmp_path):
    graph = make.classifier()
    packed_format.write(graph, tmp_path / "net.stlq")
    export(tmp_path / "net.stlq", tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    for info, value in zip(
        graph.inputs + graph.outputs, [*model.graph.input, *model.graph.output], strict=True
    ):
        dims = value.type.tensor_type.shape.dim
        assert info.name == value.name
        assert info.shape == tuple(d.dim_param or d.dim_value for d in dims)
    found = Metadata.read(model)
    assert found.labels == graph.labels
    assert found.preprocessing == Preprocessing.from_manifest(graph.preprocessing)
    for node in graph.nodes:
        if node.weights is not None:
            record = found.weights[f"{node.outputs[0]}/weight"]
            assert record == WeightRecord.of(node.weights, "element")
            assert record.bits == node.weights.bits
            np.testing.assert_array_equal(np.float32(record.alpha), node.weights.alpha)


def of_tile(tile, **others):
    """Metadata of a weight of these tiles."""
    grid = {"bits": 4, "residual_shift": 0, "clip": 1, "alpha": [1.0]}
    return json.dumps({"weights": {"w": grid | {"tile": tile} | others}})


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"weights": {"w": {"bits": 4}}}', '{"labels": [1]}', of_tile(16), of_tile([16]),
     of_tile([16, 0]), of_tile([16, 16.0]), of_tile([4, 4, 4])],
)  # fmt: skip
def test_metadata_of_others_is_refused(text):
    model = onnx.ModelProto()
    assert Metadata.read(model) == Metadata()
    onnx.helper.set_model_props(model, {KEY: text})
    with pytest.raises(ConversionError, match="docs/qdq.md"):
        Metadata.read(model)


@pytest.mark.parametrize("others", [{}, {"granularity": "tile"}, {"granularity": "of my own"}])
def test_sides_of_tiles_are_read_whatever_is_said_for_the_eye(others):
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, {KEY: of_tile([16, 8], **others)})
    assert Metadata.read(model).weights["w"].array_tile == (16, 8)


@pytest.mark.parametrize("name", VECTORS)
def test_metadata_of_the_vectors_shared_with_the_trainer(name):
    record = VECTORS[name]
    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, {KEY: json.dumps(record)})
    found = Metadata.read(model)
    grids = {key: grid.to_json() for key, grid in found.weights.items()}
    assert grids == record.get("weights", {})
    assert found.keep_float == set(record.get("keep_float", ()))
    assert found.labels == record.get("labels")
    written = onnx.ModelProto()
    found.write(written)
    assert Metadata.read(written) == found
    (entry,) = written.metadata_props
    assert json.loads(entry.value) == {"weights": {}, "scales": {}} | record


@pytest.mark.parametrize("kept", [["n_Conv0"], ["*"]])
def test_layers_on_float32_stay_so_when_converted_again(kept, tmp_path):
    model, paths = network(), [tmp_path / "one.stlq", tmp_path / "two.stlq"]
    convert(model, paths[0], calibration=noise(), keep_float=kept)
    export(paths[0], tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx", paths[1], calibration=noise())
    one, two = map(packed_format.read, paths)
    assert [node.op for node in one.nodes] == [node.op for node in two.nodes]
    assert list(one.quantization.values()) == list(two.quantization.values())
    for first, second in zip(one.nodes, two.nodes, strict=True):
        for before, after in zip(*map(_parameters, (first, second)), strict=True):
            np.testing.assert_array_equal(before, after)
    floats = sum(node.float_weights is not None for node in two.nodes)
    assert floats == (3 if kept == ["*"] else 1)


def _parameters(node):
    words = node.weights and node.weights.integers()
    return [x for x in (node.float_weights, words, node.bias) if x is not None]


def with_tiles(graph, network):
    """Metadata of the weights of a graph, as it is exported."""
    export(graph, network)
    found = Metadata.read(onnx.load(network)).weights
    return [found[f"{node.outputs[0]}/weight"] for node in graph.nodes if node.weights is not None]


def test_tiles_of_an_array_come_back(tmp_path):
    graph, names = make.tiled(), [tmp_path / "net.onnx", tmp_path / "net.stlq"]
    records = with_tiles(graph, names[0])
    tiles = [[16, 4], [8, 8], [4, 4], [16, 4]]
    assert [(r.granularity, r.tile) for r in records] == [("tile", tile) for tile in tiles]
    convert(names[0], names[1], calibration=np.zeros((2, 2, 4, 4), np.float32))
    again = packed_format.read(names[1])
    pairs = [
        (one.weights, two.weights)
        for one, two in zip(graph.nodes, again.nodes, strict=True)
        if one.weights is not None
    ]
    for one, two in pairs:
        assert two.tile == one.tile and two.streams.positions == "tiles"
        np.testing.assert_array_equal(two.integers(), one.integers())
    assert with_tiles(again, names[0]) == records


def test_tiles_that_would_not_be_smallest_are_not_stored(tmp_path):
    """Second words were trained by tiles, or so it says, and lie everywhere."""
    graph, names = make.tiled(), [tmp_path / "net.onnx", tmp_path / "net.stlq"]
    w = np.random.default_rng(0).standard_normal((18, 3, 3, 18))
    scattered = replace(encode(w, 4, 0.1), tile=(8, 8))
    graph.nodes[make.WHOLE].weights = scattered
    with_tiles(graph, names[0])
    convert(names[0], names[1], calibration=np.zeros((2, 2, 4, 4), np.float32))
    found = packed_format.read(names[1]).nodes[make.WHOLE].weights
    assert found.tile is None and found.streams.positions == "bitmap"
    np.testing.assert_array_equal(found.integers(), scattered.integers())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"granularity": "tile", "tile": [16, 8]}, ("tile", [16, 8])),
        ({"granularity": "tile", "tile": 256}, ("tile", None)),
        ({"granularity": "tile", "tile": [16, "x"]}, ("tile", None)),
        ({"granularity": "element", "tile": [16, 8]}, ("element", None)),
        ({"granularity": "filter"}, ("filter", None)),
        ({}, ("element", None)),
    ],
)
def test_of_what_is_not_stored_by_tiles_the_settings_tell_the_tile(settings, expected, tmp_path):
    graph = make.classifier()
    graph.settings = settings
    for record in with_tiles(graph, tmp_path / "net.onnx"):
        assert (record.granularity, record.tile) == expected


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", None)
    with pytest.raises(TypeError):
        export(make.classifier(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_demo_network(tmp_path):
    """ResNet-20: the same class for every picture, and codes that are the same or neighbours."""
    preprocessing = Preprocessing()
    convert(DEMO / "resnet20-cifar10.onnx", tmp_path / "net.stlq", calibration=DEMO / "pictures",
            preprocessing=preprocessing)  # fmt: skip
    export(tmp_path / "net.stlq", tmp_path / "net.onnx")
    session = load(tmp_path / "net.stlq")
    pictures = [Image.open(p) for p in sorted((DEMO / "pictures").glob("*.jpg"))]
    x = np.stack([preprocessing.apply(p, (32, 32)) for p in pictures])
    found = run(tmp_path / "net.onnx", {session.inputs[0].name: x}, session.graph.quantization)
    expected = session.trace_codes(x)
    last = [q.scale for q in session.graph.quantization.values()][-1]
    compare(session.graph, found, expected, tolerance=3 * last)
    output = session.outputs[0].name
    assert (found[output].argmax(axis=1) == expected[output].argmax(axis=1)).all()


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("options", [{}, {"activation_bits": 32}, {"keep_float": ["*"]}])
def test_float32_and_onnx_operators(opset, options, tmp_path):
    net = Net(shape=("batch", 4, 8, 8), opset=opset)
    x = net.node("LeakyRelu", net.conv("x"), alpha=0.2)
    x = net.node("Mul", x, net.node("HardSigmoid", net.conv(x), alpha=1 / 6))
    x = net.node("Clip", net.conv(x), net.constant(-1.0), net.constant(2.0))
    y = net.conv(x)
    x = net.node("Add", net.node("Mul", y, net.node("Sigmoid", y)), x)
    x = net.node("Concat", net.node("Elu", net.conv(x)), net.node("Tanh", net.conv(x)), axis=1)
    roi = net.constant([])
    x = net.node("Resize", x, roi, net.constant([1, 1, 2, 2]), mode="nearest",
                 coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    x = net.node("Reshape", x, net.constant([0, 8, -1], np.int64))
    x = net.node("Softmax", net.node("Transpose", x, perm=[0, 2, 1]), axis=2)
    model = net.model(net.node("ReduceMax", x, axes=[1]) if opset < 18 else x)
    convert(model, tmp_path / "net.stlq", calibration=noise(10, (4, 8, 8)), **options)
    export(tmp_path / "net.stlq", tmp_path / "net.onnx")
    x = noise(3, (4, 8, 8), seed=1)
    session = load(tmp_path / "net.stlq")
    found = run(tmp_path / "net.onnx", {"x": x})[session.outputs[0].name]
    expected = session.run(x)
    assert found.shape == expected.shape
    # A neighbouring code somewhere moves all that comes after it.
    tolerance = 1e-5 if options else 0.02
    assert (np.abs(found - expected) <= tolerance).mean() >= 0.999
    written = onnx.load(tmp_path / "net.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in written.graph.node) != bool(options)
    assert bool(Metadata.read(written).weights) == ("keep_float" not in options)


def test_old_onnx_operators_are_refused(tmp_path):
    net = Net(shape=("batch", 4, 8, 8), opset=10)
    model = net.model(net.node("Softmax", net.node("Flatten", net.conv("x"))))
    convert(model, tmp_path / "net.stlq", calibration=noise(8, (4, 8, 8)))
    with pytest.raises(ConversionError, match="version 10"):
        export(tmp_path / "net.stlq", tmp_path / "net.onnx")
