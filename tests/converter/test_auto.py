"""Bits and second words chosen for every layer, for a size or an accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_nets import Net, network, noise

from logshift import runtime
from logshift.converter import ConversionError, auto, convert, pipeline
from logshift.converter.drop import drop, expected_drop
from logshift.kernels.errors import InputError

onnxruntime = pytest.importorskip("onnxruntime")


def automatic(path, model=None, **target):
    model = model or network(width=32)
    return convert(model, path, calibration=noise(24), weight_bits="auto", **target)


def test_largest_file_within_a_size(tmp_path):
    sizes = []
    for max_bytes in (8_000, 10_000, 12_000):
        path = tmp_path / f"{max_bytes}.stlq"
        report = automatic(path, max_bytes=max_bytes)
        assert path.stat().st_size == report.file_bytes <= max_bytes
        sizes.append(report.file_bytes)
        graph = runtime.load(path).graph
        assert graph.settings["weight_bits"] == "auto"
        assert graph.settings["max_bytes"] == max_bytes
        assert {n.weights.bits for n in graph.nodes if n.weights} <= {3, 4, 5}
    assert sizes == sorted(set(sizes))


def test_more_is_closer(tmp_path):
    net = Net(shape=("batch", 3, 16, 16))
    model = net.model(net.conv(net.node("Relu", net.conv("x", 3, 24)), 24, 12))
    x = noise(40)[24:]
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (exact,) = session.run(None, {"x": x})

    def snr(min_snr):
        path = tmp_path / f"{min_snr}.stlq"
        automatic(path, model, min_snr=min_snr)
        noise_power = np.square(runtime.load(path).run(x) - exact).sum()
        return 10 * np.log10(np.square(exact).sum() / noise_power), path.stat().st_size

    (low, small), (high, large) = snr(15.0), snr(25.0)
    assert small < large
    # Measured on other inputs than those it was chosen on.
    assert 13.0 < low < high and high > 23.0


def test_a_bound_by_default(tmp_path):
    report = convert(
        network(width=32), tmp_path / "net.stlq", calibration=noise(200), weight_bits="auto"
    )
    assert report.settings["max_drop"] == 0.5 and report.settings["max_bytes"] is None
    search = report.search
    assert search.target == "max_drop 0.5" and search.chosen.figure <= 0.5
    assert all(t.figure > 0.5 for t in search.trials if t.file_bytes < report.file_bytes)
    assert "points lost at most (95 % confidence) 0." in str(report)


def test_a_target_is_enough(tmp_path):
    report = convert(network(width=32), tmp_path / "n.stlq", calibration=noise(24), min_snr=20.0)
    assert report.settings["weight_bits"] == "auto" and report.search.chosen.figure >= 20.0
    plain = convert(network(width=32), tmp_path / "n.stlq", calibration=noise(24))
    assert plain.settings["weight_bits"] == 4 and plain.search is None


def test_too_few_samples(tmp_path):
    settings = {"model": network(width=32), "out": tmp_path / "net.stlq", "max_drop": 0.5}
    for count, held_back in ((4, 0), (49, 9)):
        with pytest.raises(InputError, match=f"at least 10 samples .* but there are {held_back}:"):
            convert(calibration=noise(count), **settings)
    with pytest.raises(ConversionError, match="50 samples are too few, give about") as caught:
        convert(calibration=noise(50), **settings)
    needed = int(str(caught.value).split("give about ")[1].split(",")[0])
    assert 50 < needed < 1000
    assert not list(tmp_path.iterdir())
    convert(calibration=noise(2 * needed), **settings)


def test_pictures_that_do_not_fit_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_MEMORY", 2**21)
    measured = []

    def recorded(exact, found, others):
        measured.append((len(exact), len(others)))
        return drop(exact, found, others)

    monkeypatch.setattr(auto, "drop", recorded)
    settings = {"calibration": noise(40), "weight_bits": "auto"}
    report = convert(network(width=32), tmp_path / "net.stlq", max_drop=50.0, **settings)
    assert report.samples == 16 and set(measured) == {(24, 16)}
    measured.clear()
    report = convert(
        network(width=32), tmp_path / "net.stlq", calibration_limit=8, max_drop=50.0, **settings
    )
    assert report.samples == 8 and set(measured) == {(32, 8)}
    measured.clear()
    settings["calibration"] = noise(54)
    monkeypatch.setattr(pipeline, "_MEMORY", 2**30)
    report = convert(network(width=32), tmp_path / "net.stlq", max_drop=50.0, **settings)
    assert report.samples == 44 and set(measured) == {(10, 44)}


def test_expected_drop():
    scores = np.array([[2.0, 0.0], [4.0, 5.0]])
    found = np.array([[1.0, 2.0], [4.0, 5.0]])
    assert expected_drop(scores, scores) == 0
    # The first one's error, 3 from the best class to the second, would decide both otherwise;
    # the second's, none, neither: half of what is at stake in either is lost.
    expected = 100 * (np.tanh(2 / 2) + np.tanh(1 / 2)) / 4
    assert expected_drop(scores, found) == pytest.approx(expected)
    probability, other = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (scores, found))
    assert expected_drop(probability, other) == pytest.approx(expected)
    pixels, others = (np.stack([x.T] * 3, axis=2)[None] for x in (scores, found))
    assert expected_drop(pixels, others) == pytest.approx(expected)


def test_expected_drop_of_many_rows():
    rng = np.random.default_rng(0)
    scores = 3 * rng.standard_normal((4, 10, 100, 100)).astype(np.float32)
    found = scores + rng.standard_normal(scores.shape)
    exact, other = (np.moveaxis(x, 1, 3).reshape(-1, 10) for x in (scores, found))
    probability = np.exp(exact) / np.exp(exact).sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(probability, other.argmax(axis=1)[:, None], axis=1)[:, 0]
    lost = 100 * (probability.max(axis=1) - chosen).mean()
    assert expected_drop(scores, found) == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 4, "max_bytes": 1000}, "max_bytes needs weight_bits='auto'"),
        ({"weight_bits": "auto", "max_bytes": 1000, "max_drop": 1.0}, "give one of them"),
        ({"weight_bits": "auto", "max_bytes": 0}, "max_bytes is 0"),
        ({"weight_bits": "auto", "max_drop": -1.0}, "max_drop is -1.0"),
        ({"max_drop": 100.5}, "from 0 to 100 points"),
        ({"weight_bits": "auto", "min_snr": float("nan")}, "min_snr is nan"),
        ({"validate": max}, "validate needs max_drop"),
        ({"validate": max, "min_snr": 20.0}, "validate goes with max_drop, not with min_snr"),
        ({"validate": max, "max_drop": float("inf")}, "max_drop is inf"),
        ({"validate": 0.5, "max_drop": 1.0}, "validate is float"),
        ({"weight_bits": "best"}, "weight_bits is 'best'"),
        ({"residual_ratio": "most"}, "residual_ratio is most; it must be from 0 to 1"),
    ],
)
def test_bad_targets(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        convert(network(), tmp_path / "net.stlq", calibration=noise(), **settings)


def test_targets_out_of_reach(tmp_path):
    with pytest.raises(ConversionError, match="max_bytes is 1000, but the smallest file"):
        automatic(tmp_path / "net.stlq", max_bytes=1000)
    with pytest.raises(ConversionError, match="min_snr 200.* is out of reach"):
        automatic(tmp_path / "net.stlq", min_snr=200.0)
    assert not list(tmp_path.iterdir())


def test_few_samples_and_no_target(tmp_path):
    report = convert(
        network(width=32), tmp_path / "net.stlq", calibration=noise(8), weight_bits="auto"
    )
    assert any("too few" in note for note in report.notes)
    assert report.settings["min_snr"] == 20.0 and report.settings["weight_bits"] == "auto"
    with pytest.raises(InputError, match="max_drop needs at least 10 samples"):
        automatic(tmp_path / "net.stlq", max_drop=0.5)
