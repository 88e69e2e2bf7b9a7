"""Networks that are searched by a score of the user's own, or by labelled pictures."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from PIL import Image
from support.onnx_nets import Net, network, noise, reference

from logshift import runtime
from logshift.converter import ConversionError, convert
from logshift.kernels.errors import InputError
from logshift.runtime import Preprocessing, Session

pytest.importorskip("onnxruntime")

MODEL = network(width=32)
X = noise(60, seed=9)
LABELS = reference(MODEL, {"x": X})[MODEL.graph.output[0].name].argmax(axis=1)


class Accuracy:
    """Top-1 accuracy in percent; keeps what it is called with and what it says."""

    def __init__(self, x=X, labels=LABELS):
        self.x, self.labels, self.sessions, self.said = x, labels, [], []

    def __call__(self, session):
        self.sessions.append(session)
        self.said.append(100 * float((session.run(self.x).argmax(axis=1) == self.labels).mean()))
        return self.said[-1]


def close(session):
    """Minus the error on some inputs, as a share of the outputs."""
    exact = reference(MODEL, {"x": X})[MODEL.graph.output[0].name]
    return -float(np.linalg.norm(session.run(X) - exact) / np.linalg.norm(exact))


def searched(path, validate, max_drop, **settings):
    return convert(
        MODEL, path, calibration=noise(24), validate=validate, max_drop=max_drop, **settings
    )


def test_the_smallest_network_within_the_drop(tmp_path):
    path, sizes = tmp_path / "net.stlq", []
    worst = -searched(path, close, 10.0).search.chosen.figure
    for most in (0.7 * worst, 0.4 * worst):
        report = searched(path, close, most)
        search, packed = report.search, runtime.load(path)
        assert search.float_figure == pytest.approx(0, abs=1e-6)
        # What was measured is what is written.
        assert close(packed) == search.chosen.figure >= -most - 1e-6
        assert path.stat().st_size == report.file_bytes == search.chosen.file_bytes
        assert search.chosen in search.trials and len(search.trials) <= 9
        smaller = [t for t in search.trials if t.file_bytes < search.chosen.file_bytes]
        assert smaller and all(trial.figure < -most for trial in smaller)
        assert packed.graph.settings["weight_bits"] == "auto"
        assert packed.graph.settings["max_drop"] == most
        sizes.append(report.file_bytes)
    assert sizes == sorted(set(sizes))


def test_the_report_has_every_trial(tmp_path):
    score = Accuracy()
    report = searched(tmp_path / "net.stlq", score, 5.0)
    search = report.search
    assert score.said[0] == search.float_figure == 100.0
    assert score.said[1:] == [trial.figure for trial in search.trials]
    assert search.chosen.figure >= 95.0
    text = str(report)
    assert f"max_drop 5.0: {report.file_bytes:,} bytes, score" in text
    assert "float model 100, in" in text
    for trial in search.trials:
        assert f"  {trial.file_bytes:,} bytes, score {trial.figure:.4g}" in text.splitlines()
    record = report.to_dict()["search"]
    assert [trial["figure"] for trial in record["trials"]] == score.said[1:]


def test_a_session_of_the_float_model(tmp_path):
    score = Accuracy()
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    names = list("abcde")
    searched(tmp_path / "net.stlq", score, 50.0, preprocessing=preprocessing, labels=names)
    first, packed = score.sessions[:2]
    assert isinstance(first, Session) and first.labels == packed.labels == names
    assert [(i.name, i.shape, i.dtype) for i in first.inputs] == (
        [(i.name, i.shape, i.dtype) for i in packed.inputs]
    )
    assert [o.name for o in first.outputs] == [o.name for o in packed.outputs]
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    x = preprocessing.apply(picture, (16, 16))[None]
    (expected,) = reference(MODEL, {"x": x}).values()
    other = pickle.loads(pickle.dumps(first))
    for given in (x, picture, Image.fromarray(picture), [picture], {"x": x}, picture[None]):
        for session in (first, other, copy.copy(first), copy.deepcopy(first)):
            np.testing.assert_array_equal(session.run(given), expected)
    for method in (first.trace, first.trace_codes, first.profile):
        with pytest.raises(InputError, match="this is the float model"):
            method(x)
    with pytest.raises(InputError, match="takes float32"):
        first.run(x.astype(np.int64))


def test_what_is_given_stays(tmp_path):
    path = tmp_path / "net.stlq"
    searched(path, close, 0.1, weight_bits=4)
    graph = runtime.load(path).graph
    assert {node.weights.bits for node in graph.nodes if node.weights} == {4}
    assert graph.settings["weight_bits"] == 4
    report = searched(path, close, 10.0, weight_bits=3, residual_ratio=0.25)
    assert len(report.search.trials) == 1 and report.settings["residual_ratio"] == 0.25
    alone = convert(MODEL, path, calibration=noise(24), weight_bits=3, residual_ratio=0.25)
    assert report.layers == alone.layers


def test_more_tensors_stay_float32_where_words_are_not_enough(tmp_path):
    net = Net(shape=("batch", 3, 16, 16))
    y = net.node("Relu", net.conv(net.node("Relu", net.conv("x", 3, 32)), 32, 32))
    # One channel takes all of the range, and has no say.
    y = net.node("Mul", y, net.constant(np.r_[200.0, np.ones(31)].reshape(1, 32, 1, 1)))
    weight = net.rng.standard_normal((8, 32, 1, 1))
    weight[:, 0] = 0
    model = net.model(net.node("Conv", y, net.constant(weight)))
    (exact,) = reference(model, {"x": X}).values()

    def decibels(session):
        error = np.square(session.run(X) - exact).sum()
        return 10 * np.log10(np.square(exact).sum() / error) if error > 1e-6 else 100.0

    settings = {"calibration": noise(24), "validate": decibels, "weight_bits": 5}
    path = tmp_path / "net.stlq"
    with pytest.raises(ConversionError, match="out of reach") as caught:
        convert(model, path, **settings, max_drop=0.0, activation_bits=8)
    assert not path.exists()
    reached = float(str(caught.value).split("score ")[1].split(",")[0])
    convert(model, path, **settings, max_drop=100 - reached - 0.5)
    graph = runtime.load(path).graph
    assert decibels(runtime.load(path)) >= reached + 0.5
    assert graph.settings["float_tensors"]


def test_out_of_reach_says_what_came_nearest(tmp_path):
    seen = []

    def falling(session):
        seen.append(session)
        return -len(seen)

    with pytest.raises(ConversionError, match=r"nearest of .* score -2, float model -1") as caught:
        searched(tmp_path / "net.stlq", falling, 0.5)
    assert "max_drop 0.5 is out of reach" in str(caught.value)
    assert len(seen) <= 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "returned nan for the float model"),
        (float("inf"), "returned inf"),
        (None, "returned None"),
        ("98", "returned '98'"),
        (np.zeros(3), "returned array"),
        (1 + 2j, "returned"),
    ],
)
def test_what_is_no_score(tmp_path, value, said):
    with pytest.raises(InputError, match=said):
        searched(tmp_path / "net.stlq", lambda session: value, 0.5)
    assert not list(tmp_path.iterdir())


def test_a_score_that_fails(tmp_path):
    def failing(session):
        raise KeyError("dog")

    with pytest.raises(InputError, match="validate failed on the float model: KeyError") as caught:
        searched(tmp_path / "net.stlq", failing, 0.5)
    assert isinstance(caught.value.__cause__, KeyError)

    def later(session):
        return 1.0 if type(session) is not Session else session.nothing

    with pytest.raises(InputError, match="validate failed on a packed network: AttributeError"):
        searched(tmp_path / "net.stlq", later, 0.5)
    assert not list(tmp_path.iterdir())


def test_numbers_of_any_kind(tmp_path):
    for value in (np.float32(0.5), np.int64(3), np.array(0.25), 2):
        report = searched(tmp_path / "net.stlq", lambda session, v=value: v, 0.0)
        assert report.search.float_figure == report.search.chosen.figure == float(value)


# --- labelled pictures ---------------------------------------------------------------------------

PREPROCESSING = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def pictures():
    """Pictures, and the classes that the float model sees on them."""
    pixels = np.random.default_rng(4).integers(0, 256, (40, 16, 16, 3), np.uint8)
    x = np.stack([PREPROCESSING.apply(p, (16, 16)) for p in pixels])
    (scores,) = reference(MODEL, {"x": x}).values()
    return pixels, scores.argmax(axis=1)


def labelled(source, path, pictures, **settings):
    settings = {"preprocessing": PREPROCESSING, "calibration": pictures[0][:20]} | settings
    return convert(settings.pop("model", MODEL), path, validate=source, **settings)


def folders(root, pictures, names):
    for number, (pixels, wanted) in enumerate(zip(*pictures, strict=True)):
        (root / names[wanted]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / names[wanted] / f"{number}.png")
    for name in names:
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(pictures[0][0]).save(root / name / "more.png")
    return root


NAMES = ["e", "d", "c", "b", "a"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (NAMES, NAMES),
        (["0", "01", "2", "3", "4"], NAMES),
        (["n01", "n02", "n03", "n04", "n05"], None),  # as there are classes
    ],
)
def test_a_folder_for_each_class(tmp_path, pictures, names, labels):
    root = folders(tmp_path / "pictures", pictures, names)
    report = labelled(root, tmp_path / "net.stlq", pictures, labels=labels, max_drop=10.0)
    # The same picture is in every folder once more.
    assert report.search.float_figure == pytest.approx(100 * 41 / 45)
    assert report.search.chosen.figure >= report.search.float_figure - 10


def lines(root, pictures, form):
    root.mkdir()
    text = []
    for number, (pixels, wanted) in enumerate(zip(*pictures, strict=True)):
        Image.fromarray(pixels).save(root / f"a {number}.png")
        text.append(form.format(picture=f"a {number}.png", number=wanted, name=NAMES[wanted]))
    return text


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("{picture},{number}", ["picture,class"]),
        ('"{picture}", {name}', []),
        ("{picture}\t{name}", ["file\tlabel"]),
        ("{picture} {number}", []),
    ],
)
@pytest.mark.parametrize("batch", ["batch", 7])
def test_a_picture_and_its_class_on_each_line(tmp_path, pictures, form, more, batch):
    text = [*more, *lines(tmp_path / "p", pictures, form), ""]
    (tmp_path / "p" / "labels.txt").write_text("\n".join(text))
    report = labelled(
        tmp_path / "p" / "labels.txt", tmp_path / "net.stlq", pictures, labels=NAMES,
        model=network((batch, 3, 16, 16), width=32), max_drop=20.0,
    )  # fmt: skip
    assert report.search.float_figure == 100.0


def test_half_a_point_by_default(tmp_path, pictures):
    root = folders(tmp_path / "pictures", pictures, NAMES)
    report = labelled(root, tmp_path / "net.stlq", pictures, labels=NAMES)
    assert report.search.target == "max_drop 0.5"
    assert report.search.chosen.figure >= report.search.float_figure - 0.5


def test_labelled_pictures_that_do_not_fit(tmp_path, pictures):
    path, given = tmp_path / "net.stlq", tmp_path / "p" / "labels.csv"
    text = lines(tmp_path / "p", pictures, "{picture},{number}")

    def refused(message, source=given, **settings):
        with pytest.raises(InputError, match=message):
            labelled(source, path, pictures, **settings)
        assert not path.exists()

    refused("labels.csv' does not exist")
    given.write_text("\n".join([*text, "a 0.png,5"]))
    refused("line 41: '5' is no class; .* an index below 5")
    given.write_text("\n".join([*text, "b.png,4"]))
    refused("line 41: there is no picture 'b.png'")
    given.write_text("picture,class\n")
    refused("names no pictures")
    given.write_bytes(b"\xff\xfe")
    refused("not a text file in UTF-8")
    (tmp_path / "p" / "bad.png").write_text("no picture")
    given.write_text("bad.png,1")
    refused("cannot read picture .*bad.png")
    given.write_text("\n".join(text))
    refused("pictures need preprocessing", calibration=noise(20), preprocessing=None)
    refused("holds no folders", source=tmp_path / "p")
    root = folders(tmp_path / "some", pictures, ["a", "b", "c", "d", "x"])
    refused("'x' is no class", source=root, labels=list("abcde"))
    net = Net(shape=("batch", 3, 16, 16))
    refused("needs scores of classes", model=net.model(net.conv("x", 3, 4)))
