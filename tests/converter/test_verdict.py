"""The verdict: a packed network is measured against its float model, and what is wrong is said."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
from support.onnx_nets import Net, network, noise, one_called, reference

from logshift import converter, runtime
from logshift.converter import AccuracyWarning, ConversionError, compare, verdict, verify
from logshift.converter.effects import Effect
from logshift.converter.verdict import settings_without

pytest.importorskip("onnxruntime")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def held_back(x):
    """Of an array of samples, those that do not calibrate."""
    return x[4::5]


def boxes_and_scores():
    """A detector's end: boxes and scores of other ranges, which one convolution makes."""
    net = Net(shape=(1, 3, 16, 16))
    x = net.node("Relu", net.conv("x", 3, 8))
    weight = net.rng.standard_normal((10, 8, 1, 1))
    weight[:4] *= 60
    x = net.node("Conv", x, net.constant(weight), net.constant(np.zeros(10)))
    return net.model(net.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4))


EIGHT = {"activation_bits": 8, "weight_bits": 5, "residual_ratio": 1.0}
COARSE = {"activation_bits": 8, "weight_bits": 2, "residual_ratio": 0.0, "error_feedback": False}


def test_figures_are_those_of_the_file(path):
    model, x = network(), noise(40)
    report = converter.convert(model, path, calibration=x)
    assert report.samples == 32 and report.verdict.samples == 8 and report.verdict.held_back
    (output,) = report.verdict.outputs
    measured = held_back(x)
    expected = reference(model, {"x": measured})["Gemm7"].astype(np.float64)
    found = runtime.load(path).run(measured).astype(np.float64)
    noise_power = np.square(expected - found).sum()
    snr = 10 * np.log10(np.square(expected).sum() / noise_power)
    assert output.snr_db == pytest.approx(snr, abs=1e-3)
    cosine = (expected * found).sum() / np.linalg.norm(expected) / np.linalg.norm(found)
    assert output.cosine == pytest.approx(cosine, rel=1e-6)
    assert output.agreement == (expected.argmax(1) == found.argmax(1)).mean()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))["verdict"]
    assert record["outputs"][0]["cosine"] == output.cosine and record["warning"] == ""
    assert "on 8 samples that did not calibrate:" in str(report)
    assert f"output 'Gemm7': SNR {output.snr_db:.1f} dB" in str(report)


def test_samples_beyond_those_that_calibrate_measure(path):
    x = noise(30)
    x[::2] = 0
    report = converter.convert(network(), path, calibration=x, calibration_limit=10)
    assert report.samples == 10 and report.verdict.samples == 20 and report.verdict.held_back


def test_no_sample_measures_that_calibrates(path, monkeypatch):
    seen = []

    class Recorded(runtime.Session):
        def run(self, x):
            seen.append(x["x"])
            return super().run(x)

    monkeypatch.setattr(verdict, "Session", Recorded)
    x = noise(50)
    x[4::5] *= 100  # would widen the ranges
    converter.convert(network(), path, calibration=x, activation_range="minmax")
    assert sorted(map(np.sum, seen)) == sorted(map(np.sum, held_back(x)[:, None]))
    assert runtime.load(path).graph.quantization["x/codes"].scale < 0.1


@pytest.mark.parametrize("count", [1, 4])
def test_few_samples_do_both(path, count):
    report = converter.convert(network(), path, calibration=noise(count))
    assert report.samples == report.verdict.samples == count
    assert not report.verdict.held_back
    assert "that calibrated, for want of others" in str(report)


def test_dictionaries_and_batches_of_a_model_of_several_inputs(path):
    net = Net(shape=(4, 3, 8, 8))
    net.inputs["other"] = (4, 3, 8, 8)
    x = net.node("Add", net.conv("x", 3, 4), net.conv("other", 3, 4))
    model = net.model(net.node("Relu", x))
    samples = [{"x": noise(4, (3, 8, 8), i), "other": noise(4, (3, 8, 8), 99 - i)}
               for i in range(6)]  # fmt: skip
    report = converter.convert(model, path, calibration=iter(samples))
    assert report.samples == 20 and report.verdict.samples == 1
    expected = reference(model, samples[4])["Relu3"]
    found = runtime.load(path).run(samples[4])
    cosine = (expected * found).sum() / np.linalg.norm(expected) / np.linalg.norm(found)
    assert report.verdict.outputs[0].cosine == pytest.approx(float(cosine), abs=1e-5)


def test_scores_beside_boxes_are_told(path):
    model, x = boxes_and_scores(), noise(10)
    with pytest.warns(AccuracyWarning) as caught:
        report = converter.convert(model, path, calibration=x, **EIGHT)
    (output,) = report.verdict.outputs
    assert [group.channels for group in output.groups] == [((0, 3),), ((4, 9),)]
    assert min(output.cosine, output.groups[0].cosine) > 0.998 > output.groups[1].cosine
    warning = report.verdict.warning
    parts = ("output 'MaxPool", "channels 4-9 of axis 1", f"{output.groups[1].cosine:.4f}",
             "on 2 samples", "Conv 'n_Conv2'", "8-bit activations", "should mend it")  # fmt: skip
    for part in parts:
        assert part in warning, part
    assert [str(w.message) for w in caught] == [f"{path}: {warning}"]
    assert f"warning: {warning}" in str(report).splitlines()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = converter.convert(model, path, calibration=x, **EIGHT | report.verdict.remedy)
    assert mended.verdict.outputs[0].groups[1].cosine > 0.99 and not mended.verdict.warning


def two_convolutions():
    net = Net(shape=("batch", 3, 16, 16))
    return net.model(net.conv(net.node("Relu", net.conv("x", 3, 16)), 16, 3))


def test_weights_that_hurt_are_told_and_mended(path):
    model, x = two_convolutions(), noise(40)
    with pytest.warns(AccuracyWarning, match="adds most error by its weights"):
        report = converter.convert(model, path, calibration=x, **COARSE)
    (output,) = report.verdict.outputs
    assert output.groups[0].cosine < 0.99
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = converter.convert(model, path, calibration=x, **COARSE | report.verdict.remedy)
    assert mended.verdict.outputs[0].cosine > 0.99 > output.cosine


def test_samples_that_differ_most_are_looked_at_first(path):
    x = noise(25)
    x[14] *= 30
    model = two_convolutions()
    looked_at = []

    def recorded(graph, packed, batches, *more):
        looked_at.extend(batches)
        return [], 0

    from logshift.converter import effects

    with pytest.MonkeyPatch.context() as patch, pytest.warns(AccuracyWarning):
        patch.setattr(effects, "layer_effects", recorded)
        converter.convert(model, path, calibration=x, **COARSE)
    assert np.array_equal(looked_at[0]["x"], x[14:15])


@pytest.mark.parametrize("bits", [3, 4])
def test_remedies_can_be_given_as_they_are(path, bits):
    """Whatever part it is that is told, `convert` takes the settings without it."""
    from logshift.converter import effects

    model, x = network(), noise(20)
    settings = {"calibration": x, "activation_bits": bits}
    found = []
    original = effects.layer_effects
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "LEAST_COSINE_OF_CLASSES", 2.0)  # whatever it is
        patch.setattr(effects, "layer_effects", lambda *a: found.append(original(*a)) or found[-1])
        with pytest.warns(AccuracyWarning):
            report = converter.convert(model, path, **settings)
    for one in found[0][0]:
        remedy = settings_without([one], report.settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccuracyWarning)
            converter.convert(model, path, **settings | remedy)


def test_strict_writes_nothing(path):
    path.write_bytes(b"old")
    settings = {"calibration": noise(10), "strict": True} | EIGHT
    with pytest.raises(ConversionError, match="output 'MaxPool.*channels 4-9.*nothing was written"):
        converter.convert(boxes_and_scores(), path, **settings)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["net.stlq"]
    converter.convert(network(), path, **settings)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("corrects", [True, False])
def test_effects_add_up(path, corrects):
    """Errors of layers by themselves, as squares, are about that of all together."""
    model, x = network(width=32) if not corrects else two_convolutions(), noise(60)
    settings = {"calibration": x, "bias_correction": corrects} | COARSE
    from logshift.converter import effects

    measured = []
    original = effects.layer_effects

    def recorded(*arguments):
        found, parts = original(*arguments)
        assert len(found) == parts
        measured.extend(found)
        return found, parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effects, "layer_effects", recorded)
        with pytest.warns(AccuracyWarning):
            report = converter.convert(model, path, **settings)
    parts = {("x/QuantizeLinear", "codes"), ("n_Conv0", "weights"), ("n_Conv0", "codes"),
             ("n_Conv2", "weights")}  # fmt: skip
    assert {(effect.name, effect.part) for effect in measured} >= parts
    together = 10 ** (-report.verdict.outputs[0].groups[0].snr_db / 10)
    assert together / 4 < sum(effect.worst for effect in measured) < 4 * together


def test_a_quantized_model_is_what_it_is_compared_with(path):
    """Rounding that the model asks for itself is no error."""
    net = Net(shape=("batch", 3, 16, 16))
    scale, zero = net.constant(0.5), net.constant(7, np.uint8)

    def rounded(x):
        codes = net.node("QuantizeLinear", x, scale, zero)
        return net.node("DequantizeLinear", codes, scale, zero)

    x = rounded(net.conv(rounded("x"), 3, 4))
    model, data = net.model(x), noise(10)
    report = converter.convert(model, path, calibration=data, residual_ratio=1.0)
    (output,) = report.verdict.outputs
    measured = held_back(data)
    expected = reference(model, {"x": measured})[x]
    error = np.square(expected - runtime.load(path).run(measured)).sum()
    assert output.snr_db == pytest.approx(
        10 * np.log10(np.square(expected).sum() / error), abs=0.01
    )


def test_integer_outputs_are_compared(path):
    net = Net(shape=("batch", 3, 16, 16))
    classes = net.node("ArgMax", net.conv("x", 3, 5), axis=1, keepdims=0)
    model, data = net.model(classes), noise(20)
    report = converter.convert(model, path, calibration=data)
    (output,) = report.verdict.outputs
    expected = reference(model, {"x": held_back(data)})[classes]
    assert output.agreement == (runtime.load(path).run(held_back(data)) == expected).mean()
    assert 0.9 < output.agreement < 1 and "equal values" in str(report.verdict)


def test_what_cannot_be_measured_is_no_error(path, monkeypatch):
    class Failing(runtime.Session):
        def run(self, x):
            raise converter.InputError("not\nthis one")

    monkeypatch.setattr(verdict, "Session", Failing)
    report = converter.convert(network(), path, calibration=noise(10))
    assert "not compared with the float model: not this one" in str(report)
    assert path.exists() and not report.verdict.warning


def test_verify_tells_the_same(path):
    model, x = boxes_and_scores(), noise(10)
    with pytest.warns(AccuracyWarning):
        report = converter.convert(model, path, calibration=x, **EIGHT)
    verification = verify.verify(model, path, held_back(x))
    for one, other in zip(report.verdict.outputs, verification.verdict.outputs, strict=True):
        assert one.name == other.name
        for a, b in zip(one.groups, other.groups, strict=True):
            assert a.channels == b.channels and a.cosine == pytest.approx(b.cosine, rel=1e-4)
    assert verification.verdict.warning.startswith(report.verdict.warning.split(";")[0])
    assert verification.verdict.warning in str(verification)
    json.dumps(verification.to_dict(), allow_nan=False)


def test_what_helps_where_many_layers_add():
    ranked = [dataclasses.replace(effect("weights"), name=str(i), settled_by=(str(i),),
                                  noise={("y", 0): 0.1 / 2**i}) for i in range(12)]  # fmt: skip
    key = ("y", 0)
    assert verdict.remedy_for(ranked, key, 0.2, 0.06, {}) == {"keep_float": ["0", "1"]}
    # Half of it is by parts that were not measured.
    assert verdict.remedy_for(ranked, key, 0.4, 0.06, {}) == {}
    assert verdict.remedy_for(ranked, key, 0.2, 1e-4, {}) == {}
    assert verdict.remedy_for_all(ranked, key, {"residual_ratio": 0.15}) == {"residual_ratio": 0.5}
    codes = dataclasses.replace(effect("codes"), noise={key: 1.0})
    assert verdict.remedy_for_all([*ranked, codes], key, {}) == {"activation_bits": 32}
    group = compare.GroupError((), 1, 4.0, 0.8)
    output = compare.OutputError("y", 4.0, 0.8, [group])
    found = verdict.verdict_on([output], 3, {"residual_ratio": 0.15}, ranked)
    assert found.remedy == {"keep_float": ["0", "1"]}
    assert "Conv '0' adds most error by its weights; keep_float" in found.warning
    assert found.warning.endswith("would help most")
    even = [dataclasses.replace(part, noise={key: 0.01}) for part in ranked]
    found = verdict.verdict_on([output], 3, {"residual_ratio": 0.15}, even)
    assert found.remedy == {"residual_ratio": 0.5} and "residual_ratio=0.5 would" in found.warning


def effect(part, bits=8, name="a[0]", settled_by=("a[0]", "b")):
    return Effect(name, "Conv", "t", part, bits, settled_by, {("y", 0): 1.0})


@pytest.mark.parametrize(
    ("effects", "settings", "expected"),
    [
        ([effect("codes")], {}, {"activation_bits": {"a[[]0]": 32, "b": 32}}),
        ([effect("codes", 5)], {"activation_bits": 5},
         {"activation_bits": {"a[[]0]": 8, "*": 5}}),
        ([dataclasses.replace(effect("codes", 5), op="QuantizeLinear")], {},
         {"activation_bits": {"a[[]0]": 32, "b": 32}}),
        ([effect("codes")], {"activation_bits": {"b": 4, "c": 5}},
         {"activation_bits": {"a[[]0]": 32, "b": 32, "c": 5}}),
        ([effect("weights", 4, settled_by=("a[0]",))], {"keep_float": ["c"]},
         {"keep_float": ["c", "a[[]0]"]}),
    ],
)  # fmt: skip
def test_settings_that_mend(effects, settings, expected):
    found = settings_without(effects, settings)
    assert found == expected
    if "activation_bits" in found:  # the first pattern that fits counts
        assert list(found["activation_bits"]) == list(expected["activation_bits"])


def test_names_from_the_model_stay_on_their_line(path):
    name = 'two\nlines "and" <b>'
    model = one_called(name, 8)
    with pytest.warns(AccuracyWarning):
        report = converter.convert(model, path, calibration=noise(10, (3, 8, 8)), **COARSE)
    assert repr(name) in report.verdict.warning
    assert len(str(report.verdict).splitlines()) == 3


def test_channels_are_compared_as_they_are_found(path):
    """Thresholds stand for what is noticed, not for what a group happens to be called."""
    group = compare.GroupError((), 1, 16.0, 0.98)
    output = compare.OutputError("y", 16.0, 0.98, [group])
    assert "cosine 0.9800, less than 0.99" in verdict.verdict_on([output], 3, {}).warning
    good = compare.OutputError("y", 30.0, 0.999, [compare.GroupError((), 1, 30.0, 0.999)], 0.5, 8)
    assert "same top class in 50.0 %, less than 90 %" in verdict.verdict_on([good], 8, {}).warning
    assert not verdict.verdict_on([dataclasses.replace(good, positions=2)], 2, {}).warning
    nothing = compare.GroupError((), 1, -3.0, 0.1, False)
    assert not verdict.verdict_on([compare.OutputError("y", 1, 1, [nothing])], 3, {}).warning
