"""`convert` as a whole: calibration data, ranges, corrections, settings, errors, the file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from support import oracle
from support.onnx_nets import Net, network, noise, reference
from support.tiles import tile_numbers

from logshift import converter, runtime
from logshift.converter import ConversionError, InputError, Preprocessing, convert
from logshift.converter.calibrate import choose_quantization
from logshift.converter.evaluate import AT_ONCE
from logshift.converter.verify import verify
from logshift.runtime import cores
from logshift.runtime.file import format as packed_format


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i, suffix in enumerate(("a/0.jpg", "a/1.png", "b/2.JPEG", "b/3.webp")):
        file = folder / suffix
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    (folder / "notes.txt").write_text("no picture")
    return folder


# --- calibration data -----------------------------------------------------------------------------


def test_folder_of_pictures(path, pictures):
    report = convert(network(), path, calibration=pictures, labels=list("abcde"))
    graph = packed_format.read(path)
    assert report.samples == 4
    assert Preprocessing.from_manifest(graph.preprocessing) == Preprocessing()
    assert graph.labels == list("abcde")
    assert any("assumed Preprocessing" in note for note in report.notes)
    assert graph.settings["weight_bits"] == 4


def test_given_preprocessing_is_stored_and_not_called_assumed(path, pictures):
    chosen = Preprocessing(crop=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    report = convert(network(), path, calibration=str(pictures), preprocessing=chosen)
    stored = packed_format.read(path).preprocessing
    assert Preprocessing.from_manifest(stored) == chosen and not report.notes


def test_array_of_pictures_equals_prepared_array(path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    convert(network(), path, calibration=pixels)
    first = packed_format.read(path)
    prepared = np.stack([Preprocessing().apply(p, (16, 16)) for p in pixels])
    convert(network(), path, calibration=prepared)
    second = packed_format.read(path)
    assert first.quantization == second.quantization
    assert first.preprocessing is not None and second.preprocessing is None


def test_limit_spreads_over_all_samples(path):
    x = noise(9)
    x[8] *= 100  # the last one must be among three of nine
    report = convert(network(), path, calibration=x, calibration_limit=3, activation_range="minmax")
    assert report.samples == 3
    assert packed_format.read(path).quantization["x/codes"].scale > 1


class Tensor:
    """As tensors of PyTorch and TensorFlow are: no array, but one if asked."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array

    def __iter__(self):
        return map(Tensor, self._array)


def test_tensor_calibrates_as_its_array_does(path):
    assert convert(network(), path, calibration=Tensor(noise(5))).samples == 4
    of_tensor = path.read_bytes()
    convert(network(), path, calibration=noise(5))
    assert of_tensor == path.read_bytes()


def test_model_that_is_not_onnx(path):
    with pytest.raises(InputError, match=r"the model is Tensor; .*torch\.onnx\.export"):
        convert(Tensor(noise(1)), path, calibration=noise(2))


def test_iterable_of_dictionaries(path):
    report = convert(network(), path, calibration=({"x": noise(2, seed=i)} for i in range(5)))
    assert report.samples == 8  # every fifth of ten is held back


BAD_CALIBRATION = {
    "no folder": (lambda tmp: tmp / "missing", "does not exist"),
    "empty folder": (lambda tmp: (tmp / "e").mkdir() or tmp / "e", "holds no pictures"),
    "not a picture": (
        lambda tmp: (tmp / "f").mkdir() or (tmp / "f/x.png").write_text("?") and tmp / "f",
        "cannot read picture.*x.png"),
    "wrong size": (lambda tmp: noise(2, (3, 8, 8)), r"expected float32 of shape \(N, 3, 16, 16\)"),
    "channels last": (lambda tmp: noise(2, (16, 16, 3)), "expected float32 of shape"),
    "wrong rank": (lambda tmp: noise(2, (3, 16)), r"expected float32 of shape \(N, 3, 16, 16\)"),
    "no samples": (lambda tmp: noise(0), "expected samples"),
    "integers": (lambda tmp: noise(2).astype(np.int32), "is int32"),
    "NaN": (lambda tmp: np.where(noise(2) > 2, np.nan, noise(2)), "holds NaN"),
    "wrong name": (lambda tmp: [{"y": noise(2)}], r"expected dictionaries of \['x'\]"),
    "no dictionaries": (lambda tmp: [noise(2)], r"got ndarray; .* numpy\.concatenate"),
    "empty list": (lambda tmp: [], "calibration is empty"),
    "number": (lambda tmp: 5, "calibration is int"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALIBRATION)
def test_bad_calibration(name, tmp_path):
    build, message = BAD_CALIBRATION[name]
    with pytest.raises(InputError, match=message):
        convert(network(), tmp_path / "net.stlq", calibration=build(tmp_path))
    assert not list(tmp_path.glob("*.stlq"))


def test_array_for_several_inputs(path):
    net = Net()
    net.inputs["other"] = net.inputs["x"]
    model = net.model(net.node("Add", "x", "other"))
    with pytest.raises(InputError, match="several inputs.*'x', 'other'"):
        convert(model, path, calibration=noise(2, (4, 8, 8)))


def test_pictures_for_an_unknown_size_or_number_of_channels(path, pictures):
    model = network(("batch", 3, "height", "width"))
    with pytest.raises(InputError, match=r"preprocessing=Preprocessing\(crop="):
        convert(model, path, calibration=pictures)
    report = convert(model, path, calibration=pictures, preprocessing=Preprocessing(crop=(12, 10)))
    assert report.samples == 4
    assert packed_format.read(path).inputs[0].nominal == (1, 3, 12, 10)
    with pytest.raises(InputError, match="makes 3 channels, input 'x' has 4"):
        net = Net()
        convert(net.model(net.conv("x")), path, calibration=pictures)
    with pytest.raises(InputError, match=r"crops to \(8, 8\)"):
        convert(network(), path, calibration=pictures, preprocessing=Preprocessing(crop=(8, 8)))


# --- ranges and corrections -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_range(method, bits):
    rng = np.random.default_rng(0)
    relu = np.maximum(rng.standard_normal(100_000), 0).astype(np.float32)
    assert choose_quantization(relu, bits, method, 99.99).zero_point == 0
    q = choose_quantization(
        rng.standard_normal(100_000).astype(np.float32) - 1, bits, method, 99.99
    )
    assert q.scale > 0 and 0 < q.zero_point <= q.top == 2**bits - 1
    assert q.dequantize(q.quantize(np.zeros(1, np.float32))) == 0
    q = choose_quantization(np.full(10, -3.0, np.float32), bits, method, 99.99)
    np.testing.assert_allclose(q.dequantize(q.quantize(np.array([-3.0]))), -3.0, rtol=1e-6)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_range_of_zeros(method):
    q = choose_quantization(np.zeros((3, 4), np.float32), 8, method, 99.99)
    assert q.scale > 0 and q.zero_point == 0


@pytest.mark.parametrize("percentile", [50.0, 90.0, 100.0])
def test_percentile(percentile, path):
    values = np.random.default_rng(0).uniform(-1, 3, 50_000).astype(np.float32)
    q = choose_quantization(values, 8, "percentile", percentile)
    low, high = q.dequantize(np.array([0, q.top]))
    assert low == pytest.approx(min(-1 + (100 - percentile) / 25, 0), abs=0.03)
    assert high == pytest.approx(-1 + percentile / 25, abs=0.03)
    scales = []
    for given in (percentile, 99.9):
        convert(
            network(), path, calibration=noise(), activation_range="percentile", percentile=given
        )
        graph = packed_format.read(path)
        assert graph.settings["percentile"] == given
        scales.append(next(iter(graph.quantization.values())).scale)
    assert (scales[0] < scales[1]) == (percentile < 99.9)


def test_mse_clips_outliers_of_few_bits():
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    values[0] = 50

    def error(method):
        q = choose_quantization(values, 4, method, 99.99)
        return np.square(q.dequantize(q.quantize(values)) - values).mean()

    assert error("mse") < error("minmax") / 4


def test_dead_channels_and_layers(path):
    net = Net(shape=("batch", 3, 16, 16))
    weight = net.constant(np.zeros((4, 3, 3, 3)))
    x = net.node("Relu", net.node("Conv", "x", weight, net.constant([0, 0, 0, -1.0])))
    model = net.model(net.conv(x, 4, 2))
    convert(model, path, calibration=noise())
    found = oracle.evaluate(packed_format.read(path), {"x": noise(2)})["Conv2"]
    np.testing.assert_allclose(found, reference(model, {"x": noise(2)})["Conv2"], atol=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_bias_correction_removes_the_mean_error(bits, path):
    model, x = network(width=32), noise(80)
    calibrating = np.delete(x, np.s_[4::5], axis=0)
    expected = reference(model, {"x": calibrating})

    def mean_error(correct):
        convert(model, path, calibration=x, weight_bits=bits, residual_ratio=0.0,
                bias_correction=correct)  # fmt: skip
        found = oracle.evaluate(packed_format.read(path), {"x": calibrating})
        return max(np.abs((found[n] - y).mean(axis=0)).max() for n, y in expected.items())

    # What stays is rounding alone.
    assert mean_error(True) < 0.05 * mean_error(False)


def test_every_layer_is_corrected_before_its_activation(path):
    settings = {"calibration": noise(64), "residual_ratio": 0.0, "error_feedback": False}
    convert(network(), path, **settings)
    corrected = packed_format.read(path)
    convert(network(), path, **settings, bias_correction=False)
    plain = packed_format.read(path)
    for one, other in zip(corrected.nodes, plain.nodes, strict=True):
        if one.weights is not None:
            assert not np.array_equal(one.bias, other.bias)
            assert np.array_equal(one.weights.first, other.weights.first)


# --- settings and report --------------------------------------------------------------------------


def test_more_bits_and_residuals_are_closer(path):
    model, x = network(), noise(16)
    expected = reference(model, {"x": x})

    def error(**settings):
        convert(model, path, calibration=x, **settings)
        found = oracle.evaluate(packed_format.read(path), {"x": x})
        return max(float(np.square(found[n] - y).sum()) for n, y in expected.items())

    assert error(residual_ratio=1.0) < error(residual_ratio=0.15) < error(residual_ratio=0.0)
    assert error(activation_bits=8) < error(activation_bits=3)
    assert error(granularity="filter") > error(granularity="element")


def layers_of_every_kind():
    """Of few channels, dense, grouped, depthwise, transposed, and a matrix of an ONNX operator."""
    net = Net(shape=("batch", 3, 12, 12))
    x = net.node("Relu", net.conv("x", 3, 20))
    x = net.node("Relu", net.conv(x, 20, 24))
    x = net.node("Relu", net.conv(x, 24, 24, group=2))
    x = net.node("Relu", net.conv(x, 24, 24, group=24))
    up = net.random(24, 20, 2, 2)
    x = net.node("Relu", net.node("ConvTranspose", x, up, strides=[2, 2]))
    x = net.node("Reshape", x, net.constant([0, 20, 2, 12, 24], np.int64))
    return net.model(net.node("MatMul", x, net.random(24, 60)))


def used_and_all(words, tile, group=1):
    """Weights in tiles that have a second word, all weights; so many tiles, and all."""
    numbers = tile_numbers(words.shape, tile, group)
    used = set(numbers[words.words().second != 0])
    return np.isin(numbers, list(used)).sum(), numbers.size, len(used), numbers.max() + 1


@pytest.mark.parametrize(
    "options",
    [
        {"residual_ratio": 0.3},
        {"residual_ratio": 0.3, "error_feedback": False},
        {"residual_ratio": "auto"},
        {"residual_ratio": 1.0},
        {"weight_bits": "auto", "min_snr": 14.0},
        {"weight_bits": "auto", "max_bytes": 20_000},
    ],
)
@pytest.mark.parametrize("tile", [(4, 8), (16, 16)])
def test_second_words_by_tiles_of_an_array(options, tile, path):
    x = noise(8, (3, 12, 12))
    report = convert(
        layers_of_every_kind(), path, calibration=x, granularity="tile", tile=tile, **options
    )
    graph = packed_format.read(path)
    assert graph.settings["tile"] == list(tile) and graph.settings["granularity"] == "tile"
    found = [
        used_and_all(node.weights, tile, node.attributes["group"])
        for node in graph.nodes
        if node.weights is not None
    ]
    (matrix,) = graph.constant_words.values()
    found.append(used_and_all(matrix.weights, tile))
    assert len(found) == 6
    inside, total = np.sum(found, axis=0)[:2]
    ratio = options.get("residual_ratio")
    if ratio == 0.3:  # tiles at edges are smaller than those that the budget counts
        assert 0.25 * total < inside <= 0.32 * total and 0.1 < report.nzr <= 0.3
    else:
        assert inside > 0
    # What runs is what the file says, whatever form its second words have.
    expected = oracle.evaluate(graph, {"x": x})
    session = runtime.load(path)
    assert np.array_equal(session.run(x), expected[session.outputs[0].name])


def test_tiles_are_exactly_as_many_as_asked_for_of_a_single_layer(path):
    net = Net(shape=("batch", 20, 6, 6))
    model = net.model(net.conv("x", 20, 40))
    for tile, total in (((16, 16), 3 * 9 * 2), ((4, 8), 5 * 9 * 5)):
        convert(model, path, calibration=noise(8, (20, 6, 6)), granularity="tile", tile=tile,
                residual_ratio=0.15)  # fmt: skip
        (words,) = (node.weights for node in packed_format.read(path).nodes if node.weights)
        assert used_and_all(words, tile)[2:] == (int(0.15 * total), total)


def test_a_tile_that_is_a_number_is_consecutive_weights_as_ever(path):
    x = noise(8, (3, 12, 12))
    convert(layers_of_every_kind(), path, calibration=x, granularity="tile", tile=16,
            residual_ratio=0.2)  # fmt: skip
    graph = packed_format.read(path)
    assert packed_format.read_manifest(path)["format_version"] == 4
    for node in graph.nodes:
        if node.weights is not None:
            second = node.weights.words().second.ravel()
            used = set(np.flatnonzero(second) // 16)
            assert node.weights.tile is None and len(used) < second.size / 16


def test_report(path):
    model = network()
    report = convert(model, path, calibration=noise())
    assert report.file_bytes == path.stat().st_size
    assert report.onnx_bytes == model.ByteSize()
    assert report.weights == 8 * 27 + 8 * 72 + 40
    assert 0.1 < report.nzr <= 0.5
    graph = packed_format.read(path)
    assert [layer.name for layer in report.layers] == [node.name for node in graph.nodes]
    for layer, node in zip(report.layers, graph.nodes, strict=True):
        assert (layer.bytes > 0) == (node.weights is not None) == (layer.bits == 4)
        assert layer.output_snr_db > 10
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["layers"][1]["weight_shape"] == [8, 3, 3, 3]
    assert record["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["layer", "op"]
    assert any("8x3x3x3" in line for line in lines)


def test_progress_is_called_for_every_node(path):
    calls = []
    report = convert(network(), path, calibration=noise(), progress=lambda *a: calls.append(a))
    count, weighted = len(report.layers), sum(layer.nzr is not None for layer in report.layers)
    compared = [call for call in calls if call[2].startswith("comparing")]
    assert [done for done, _, _ in compared] == list(range(6)) == list(range(compared[0][1]))
    rounded = [call for call in calls if call[2].startswith("rounding")]
    assert rounded and all(done < total for done, total, _ in rounded)
    calls = [call for call in calls if call not in compared + rounded]
    measured = [call for call in calls if call[2].startswith("measuring")]
    walked = [call for call in calls if call not in measured]
    # Some for every thread at once.
    together = AT_ONCE * cores.default_threads()
    assert [done for done, _, _ in measured] == list(range(0, weighted, together))
    assert {total for _, total, _ in measured} == {weighted}
    assert [done for done, _, _ in walked] == list(range(count + 1))
    assert {total for _, total, _ in walked} == {count}


def test_progress_bar_needs_a_terminal(path, capsys):
    convert(network(), path, calibration=noise(), progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 6}, "weight_bits is 6"),
        ({"weight_bits": 4.0}, "weight_bits is 4.0"),
        ({"residual_ratio": 1.5}, "residual_ratio is 1.5"),
        ({"residual_ratio": float("nan")}, "residual_ratio is nan"),
        ({"activation_bits": 1}, "activation_bits is 1"),
        ({"activation_bits": {"*": 9}}, r"activation_bits\['\*'\] is 9.*32 .float32. or 'auto'"),
        ({"activation_bits": {"nothing": 4}}, "activation_bits: no node.*'nothing'"),
        ({"keep_float": ["nothing"]}, "keep_float: no node.*'nothing'"),
        ({"keep_float": "x"}, "keep_float must be a list"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"tile": 0}, "tile is 0"),
        ({"tile": (16, 16)}, "tile is .16, 16., .* needs granularity 'tile'"),
        ({"tile": (16, 257), "granularity": "tile"}, "tile is .16, 257."),
        ({"residual_shift": 5}, "residual_shift is 5"),
        ({"activation_range": "kl"}, "activation_range is 'kl'"),
        ({"labels": "cat"}, "labels must be a list"),
        ({"calibration_limit": 0}, "calibration_limit is 0"),
    ],
)
def test_bad_setting(settings, message, path):
    with pytest.raises(InputError, match=message):
        convert(network(), path, calibration=noise(), **settings)


# --- models and files -----------------------------------------------------------------------------


def test_model_from_a_file_is_the_same(path, tmp_path):
    onnx.save(network(), tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx", path, calibration=noise())
    first = path.read_bytes()
    convert(network(), path, calibration=noise())
    assert path.read_bytes() == first


def test_given_model_is_left_alone(path):
    model = network()
    before = model.SerializeToString()
    convert(model, path, calibration=noise())
    assert model.SerializeToString() == before


def test_unreadable_models(path, tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        convert(tmp_path / "missing.onnx", path, calibration=noise())
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ConversionError, match="broken.onnx: not a"):
        convert(tmp_path / "broken.onnx", path, calibration=noise())


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        (TensorProto.STRING, (1, 3, 4, 4), "input 'x' is STRING; export"),
        (TensorProto.FLOAT, (), "no dimensions"),
    ],
)
def test_unsupported_inputs(dtype, shape, message, path):
    value = [helper.make_tensor_value_info(name, dtype, shape) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(ConversionError, match=message):
        convert(model, path, calibration=noise())


def test_overflowing_model_names_the_node(path):
    net = Net(shape=("batch", 3, 16, 16))
    x = net.node("Conv", "x", net.constant(np.full((2, 3, 1, 1), 3e38)))
    model, data = net.model(net.conv(x, 2, 2)), noise()
    with pytest.raises(ConversionError, match="the ONNX model itself produces NaN"):
        convert(model, path, calibration=data)
    data[0] = 0
    with pytest.raises(ConversionError, match="Conv 'n_Conv0'.*NaN or infinity"):
        convert(model, path, calibration=data)


def test_old_opset(path):
    with pytest.raises(ConversionError, match="opset 6 is too old"):
        net = Net(opset=6)
        convert(net.model(net.conv("x")), path, calibration=noise())


def test_target_directory_must_exist(tmp_path):
    with pytest.raises(InputError, match="the directory .*missing.* does not exist"):
        convert(network(), tmp_path / "missing/net.stlq", calibration=noise())
    with pytest.raises(InputError, match="is a directory"):
        convert(network(), tmp_path, calibration=noise())


def test_failure_leaves_the_old_file(path):
    path.write_bytes(b"old")

    def interrupt(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(network(), path, calibration=noise(), progress=interrupt)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["net.stlq"]


def test_import_is_light():
    code = (
        "import sys, logshift.converter; print('onnx' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_missing_packages_are_named(path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "onnxslim" else find(n))
    with pytest.raises(ConversionError, match=r"converting needs onnxslim.*logshift\[converter\]"):
        converter.convert(network(), path, calibration=noise())


def test_runtime_runs_what_was_converted(path):
    from logshift import runtime

    convert(network(), path, calibration=noise())
    found = runtime.load(path, threads=1).run(noise(3))
    graph = packed_format.read(path)
    expected = oracle.evaluate(graph, {"x": noise(3)})[graph.outputs[0].name]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_resnet20_on_cifar10(shared, path):
    """Post-training accuracy and size; 256 training pictures calibrate."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import io

    from logshift import runtime

    def rows(part, count):
        table = parquet.read_table(shared / f"data/cifar10-{part}.parquet")
        step = table.num_rows // count
        images = table["image"].to_pylist()[: count * step : step]
        images = [i["bytes"] if isinstance(i, dict) else i for i in images]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(i)).convert("RGB")) for i in images])
        return pixels, np.array(table["label"].to_pylist()[: count * step : step])

    model = shared / "models/resnet20-cifar10.onnx"
    report = convert(model, path, calibration=rows("train", 256)[0])
    pixels, labels = rows("test", 10_000)
    session = runtime.load(path)
    correct = 0
    for start in range(0, len(pixels), 250):
        x = np.stack([Preprocessing().apply(p, (32, 32)) for p in pixels[start : start + 250]])
        correct += int((session.run(x).argmax(axis=1) == labels[start : start + 250]).sum())
    assert correct >= 7850
    assert report.file_bytes <= 182_087


def test_sessions_of_onnxruntime_do_not_spin(monkeypatch, path):
    made = []

    class Recorded(onnxruntime.InferenceSession):
        def __init__(self, model, options, **settings):
            made.append(options)
            super().__init__(model, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    convert(network(), path, calibration=noise(4))
    verify(network(), path, noise(2))
    assert len(made) > 3
    for options in made:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        # Where several networks run at once, each has one.
        assert options.intra_op_num_threads in (1, cores.default_threads())
