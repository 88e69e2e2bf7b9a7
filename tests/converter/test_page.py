"""The page about a conversion: what it holds, that it needs nothing else, and what it shows."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from PIL import Image
from support.onnx_nets import Net, network, noise, one_called

from logshift import converter, runtime
from logshift.converter import ConversionError, InputError, Preprocessing, verify

pytest.importorskip("jinja2", reason="needs the extra `report`")
pytest.importorskip("matplotlib", reason="needs the extra `report`")
from logshift.converter.page import content  # noqa: E402
from logshift.converter.page.outputs import show_input, show_output  # noqa: E402

VOID = {"meta", "img", "link", "br", "hr", "input"}
SVG_VOID = {"path", "use", "rect"}


class Parsed(HTMLParser):
    """A page as elements, with the text of each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open, "elements are closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, tag
        self.open.pop()

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag, **wanted):
        """Attributes and text of all elements of a kind."""
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]

    @property
    def text(self):
        return self.all("body")[0][1]

    def rows(self, caption):
        """Cells of the rows of the table that a heading or a caption tells."""
        tables, current = [], None
        for tag, attributes, text in self.elements:
            cell = " ".join("".join(text).split())
            if tag == "table":
                current = []
                tables.append((attributes.get("aria-labelledby", "") + cell, current))
            elif tag == "tr":
                current.append([])
            elif tag in ("th", "td"):
                current[-1].append(cell)
        return next(rows for name, rows in tables if caption in name)


def check(path):
    """Parse a page and check what holds of any."""
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert text.startswith("<!DOCTYPE html>") and page.all("html")[0][0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:image/jpeg;base64,")), value
                assert not value.startswith("#") or value[1:] in ids, value
            assert not re.search(r"url\((?!#)", value or ""), value
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["aria-hidden"] == "true"
    written = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", text)
    assert not re.search(r"@import|url\((?!#)|https?:|\bNaN\b|\bnan\b|\bNone\b", written)
    assert len(page.all("table")) == len(page.all("thead"))
    return page


def pictures(page):
    """Pixels by what they show."""
    found = {}
    for attributes, _ in page.all("img"):
        data = base64.b64decode(attributes["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            found.setdefault(attributes["alt"], np.asarray(image.convert("RGB")))
    return found


PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def photographs(count=10, size=(16, 16), seed=0):
    """Smooth pictures, as bytes and as a network takes them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(p).resize(size[::-1], Image.BICUBIC)) for p in small]
    return np.stack(large)


def convert(model, tmp_path, **settings):
    """Convert with a page; returns both."""
    path = tmp_path / "page.html"
    settings = {"calibration": photographs(), "preprocessing": PREPROCESSING} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", converter.AccuracyWarning)
        report = converter.convert(model, tmp_path / "net.stlq", report=path, **settings)
    return report, check(path)


def test_classifier(tmp_path):
    labels = ["ape", "bee", "cat", "<dog>", "elk"]
    model = network()
    report, page = convert(model, tmp_path, labels=labels)
    session = runtime.load(tmp_path / "net.stlq")
    assert page.all("title")[0][1].startswith("net.stlq")
    # Figures are those of the report.
    (output,) = report.verdict.outputs
    (row,) = page.rows("verdict")[1:]
    assert row[0] == "Gemm7" and row[2:4] == [f"{output.snr_db:.1f} dB", f"{output.cosine:.5f}"]
    assert row[4] == f"{100 * output.agreement:.3g} %"
    assert f"{report.verdict.samples} samples that did not calibrate" in page.text
    assert f"{report.weights:,}" in page.text and f"{report.ratio:.1f} times" in page.text
    header, *rows = page.rows("layers")
    assert [header[i] for i in (0, 3, 5, 8, 10, 11)] == [
        "Layer", "Bits", "Size", "Error added", "Clipped", "Time"
    ]  # fmt: skip
    assert len(rows) == len(report.layers)
    for number, (row, layer) in enumerate(zip(rows, report.layers, strict=True), 1):
        assert row[0].split(None, 1) == [f"{number}.", layer.name] and row[1] == layer.op
        assert row[2] == "x".join(map(str, layer.weight_shape or ()))
        assert row[3] == str(layer.bits or "")
        assert row[7] == f"{layer.output_snr_db:.1f} dB"
        if layer.bits:
            assert row[6] == f"{layer.weight_snr_db:.1f} dB" and row[5] == f"{layer.bytes} bytes"
            assert row[8].endswith("%") and "conv" in row[12] and row[11].endswith("ms")
    # A plot of all layers; of each with weights or codes its histograms.
    details = [text for _, text in page.all("summary")]
    assert details[1] == "2. Conv n_Conv0" and len(details) == 5
    assert len(page.all("svg")) == 1 + 3 + 4
    # Pictures are as they were before preprocessing, their classes by name.
    shown = pictures(page)["The input of sample 1"]
    middle = shown.reshape(16, len(shown) // 16, 16, -1, 3)[:, 3, :, 3].astype(int)
    original = min(photographs()[4::5], key=lambda pixels: np.abs(middle - pixels).mean())
    assert np.abs(middle - original).mean() < 6
    rows = page.rows("Gemm7: top classes")[1:]
    x = PREPROCESSING.apply(original, (16, 16))[None]
    scores = session.run(x)[0]
    assert {row[0] for row in rows} == set(labels)
    assert [float(row[2]) for row in rows] == pytest.approx(
        [scores[labels.index(row[0])] for row in rows], rel=1e-3
    )


def test_weak_layers_come_with_settings_to_copy(tmp_path):
    settings = {"weight_bits": 2, "residual_ratio": 0.0, "activation_bits": 8}
    net = Net(shape=("batch", 3, 16, 16))
    model = net.model(net.conv(net.node("Relu", net.conv("x", 3, 16)), 16, 3))
    report, page = convert(model, tmp_path, **settings)
    assert report.verdict.warning in page.text
    commands = [text for _, text in page.all("code")]
    assert "keep_float=['n_Conv2']" in commands and "--keep-float n_Conv2" in commands
    assert "of the error of Conv2, by its 2-bit weights." in page.text
    shares = [float(s) for s in re.findall(r"([\d.]+) % of the error", page.text)]
    assert shares == sorted(shares, reverse=True) and 80 < sum(shares) <= 101
    # The verdict's own comes first.
    remedy = next(eval(f"dict({text})") for text in commands if text.startswith("keep_float="))
    assert remedy == report.verdict.remedy
    better, _ = convert(model, tmp_path, **settings, **remedy)
    assert better.verdict.outputs[0].snr_db > report.verdict.outputs[0].snr_db + 3


@pytest.mark.parametrize(
    ("remedy", "expected"),
    [
        ({"activation_bits": {"a b": 3, "*": 5}},
         "--activation-bits 'a b=3' --activation-bits '*=5'"),
        ({"keep_float": ["x", "it's"]}, """--keep-float x --keep-float 'it'"'"'s'"""),
        ({"weight_bits": 5, "residual_ratio": 1.0}, "--weight-bits 5 --residual-ratio 1.0"),
    ],
)  # fmt: skip
def test_settings_on_the_command_line(remedy, expected):
    assert content.as_command(remedy) == expected


def test_detector(tmp_path):
    net = Net(shape=(1, 3, 16, 16))
    x = net.node("Relu", net.conv("x", 3, 8))
    weight = net.rng.standard_normal((10, 8, 1, 1))
    weight[:4] *= 60
    joined = net.node("Conv", x, net.constant(weight), net.constant(np.zeros(10)))
    joined = net.node("MaxPool", joined, kernel_shape=[3, 3], pads=[1] * 4)
    flat = net.node("Reshape", joined, net.constant([1, 10, 256], np.int64))
    count = net.node("ReduceSum", net.node("Sigmoid", net.conv(x, 8, 1, 1)))
    report, page = convert(net.model(flat, count), tmp_path, activation_bits=8)
    rows = page.rows("verdict")[1:]
    assert [row[:2] for row in rows] == [
        [flat, "channels 0-3 of axis 1"], [flat, "channels 4-9 of axis 1"], [count, "all"]
    ]  # fmt: skip
    scores = report.verdict.outputs[0].groups[1]
    assert rows[1][3] == f"{scores.cosine:.5f}"
    captions = [text for _, text in page.all("figcaption")]
    assert any(text.startswith(f"{flat}, channels 4-9 of axis 1: values of") for text in captions)
    assert report.verdict.warning in page.text
    assert "--activation-bits" in page.text and "channels 4-9 of axis 1, by its 8-bit" in page.text


def test_segmentation(tmp_path):
    net = Net(shape=("batch", 3, 16, 24))
    x = net.node("Relu", net.conv("x", 3, 8))
    model = net.model(net.conv(x, 8, 5))
    report, page = convert(model, tmp_path, calibration=photographs(size=(16, 24)))
    (output,) = report.verdict.outputs
    assert 0.5 < output.agreement <= 1
    shown = pictures(page)
    assert {name.split(" ", 2)[1] for name in shown if name.startswith("Conv")} == {
        "float", "packed", "different"
    }  # fmt: skip
    shares = [float(s) for s in re.findall(r"different, ([\d.]+) % of the places", page.text)]
    assert len(shares) == report.verdict.samples
    assert np.mean(shares) == pytest.approx(100 * (1 - output.agreement), abs=0.01)


def test_enhancement(tmp_path):
    net = Net(shape=(1, 3, 16, 16))
    x = net.node("Relu", net.conv("x", 3, 6))
    model = net.model(net.node("Sigmoid", net.conv(x, 6, 3)))
    report, page = convert(model, tmp_path)
    shown = pictures(page)
    names = [name for name in shown if name.startswith("Sigmoid")]
    assert [name.split()[1] for name in names[:3]] == ["float", "packed", "difference"]
    assert re.search(r"difference, \d+ times enlarged; root mean square [\d.]+ % of the range",
                     page.text)  # fmt: skip
    x = np.stack([PREPROCESSING.apply(pixels, (16, 16)) for pixels in photographs()[4::5]])
    session = runtime.load(tmp_path / "net.stlq")
    found = [255 * session.run(one[None])[0].transpose(1, 2, 0) for one in x]
    packed = next(pixels for name, pixels in shown.items() if "packed" in name)
    middle = packed.reshape(16, len(packed) // 16, 16, -1, 3)[:, 3, :, 3]
    assert min(np.abs(middle.astype(int) - y).mean() for y in found) < 20  # JPEG of noise


def test_what_is_clipped(tmp_path):
    x = noise(10)
    x[4] *= 3  # held back
    _, page = convert(network(), tmp_path, calibration=x, preprocessing=None,
                      activation_range="minmax")  # fmt: skip
    graph = runtime.load(tmp_path / "net.stlq").graph
    q = graph.quantization["x/codes"]
    low, high = q.dequantize(np.array([0, q.top]))
    measured = x[4::5]
    outside = ((measured < low - q.scale / 2) | (measured > high + q.scale / 2)).mean()
    clipped = page.rows("layers")[1][10]
    assert float(clipped.removesuffix(" %")) == pytest.approx(100 * outside, rel=0.01)
    assert f"codes of 8 bits from {low:.4g} to {high:.4g}, {clipped} clipped" in page.text


def test_verify_writes_the_same_page(tmp_path):
    net = Net(shape=(1, 3, 16, 16))
    x = net.node("Relu", net.conv("x", 3, 8))
    model = net.model(net.node("Sigmoid", net.conv(x, 8, 3)))
    x = np.stack([PREPROCESSING.apply(p, (16, 16)) for p in photographs()])
    settings = {"calibration": x, "preprocessing": PREPROCESSING}
    report, made = convert(model, tmp_path, **settings)
    onnx.save(model, tmp_path / "net.onnx")
    verification = verify.verify(
        tmp_path / "net.onnx", tmp_path / "net.stlq", x[4::5], html=tmp_path / "verified.html"
    )
    page = check(tmp_path / "verified.html")
    for caption in ("verdict", "layers"):
        for row, other in zip(made.rows(caption), page.rows(caption), strict=True):
            kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10] if caption == "layers" else range(len(row))
            assert [row[i] for i in kept] == [other[i] for i in kept]
    assert len(page.all("svg")) == len(made.all("svg"))
    assert pictures(page).keys() == pictures(made).keys()
    assert verification.verdict.outputs[0].cosine == pytest.approx(
        report.verdict.outputs[0].cosine, abs=1e-6
    )


def test_verify_of_another_version_of_the_model(tmp_path):
    """A file whose layers are not those of the model is compared as far as that goes."""
    convert(network(), tmp_path)
    model = network()
    for node in model.graph.node:
        if node.op_type == "Relu":  # other tensors, same result
            node.op_type = "Clip"
            node.input.append("zero")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "renamed"
    path = tmp_path / "verified.html"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", converter.AccuracyWarning)
        verify.verify(model, tmp_path / "net.stlq", noise(3), html=path)
    page = check(path)
    assert len(page.rows("layers")) > 5 and page.rows("verdict")[1][0] == "Gemm7"


def test_hostile_names(tmp_path):
    name = '<script>alert("x")</script>\n"\'&{{ 7 * 7 }}$x^2$'
    model = one_called(name, 16)
    labels = [f"</td><img src=x onerror=alert({i})>" for i in range(4)]
    _, page = convert(model, tmp_path, weight_bits=2, residual_ratio=0.0, labels=labels)
    shown = " ".join(name.split())
    assert any(shown in text for _, text in page.all("th"))
    assert "49" not in "".join(text for _, text in page.all("summary"))


def test_page_is_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_RUNS", 1)
    texts = []
    for _ in range(2):
        convert(network(), tmp_path)
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        texts.append(re.sub(r"[\d.]+ ms", "", text))
    assert texts[0] == texts[1]


def test_layers_that_there_is_no_time_for(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_SECONDS", -1.0)
    _, page = convert(network(), tmp_path)
    assert all(row[8] == "" for row in page.rows("layers")[1:])
    assert "Where the error comes from" not in page.text


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_packages_are_named_before_anything_runs(missing, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == missing else find(n))
    message = rf"a report page needs {missing}: pip install 'logshift\[report\]'"
    path = tmp_path / "net.stlq"
    with pytest.raises(ConversionError, match=message):
        converter.convert(network(), path, calibration=noise(), report=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
    converter.convert(network(), path, calibration=noise())
    with pytest.raises(ConversionError, match=message):
        verify.verify(network(), path, noise(), html=tmp_path / "page.html")


def test_bad_targets(tmp_path):
    path = tmp_path / "net.stlq"
    settings = {"calibration": noise()}
    for page, message in (
        (tmp_path / "no" / "page.html", "report: the directory .*no' does not exist"),
        (tmp_path, "report: .* is a directory"),
        (path, "report: .* is the packed file"),
    ):
        with pytest.raises(InputError, match=message):
            converter.convert(network(), path, report=page, **settings)
    assert not list(tmp_path.iterdir())
    converter.convert(network(), path, **settings)
    with pytest.raises(InputError, match="html: .*no' does not exist"):
        verify.verify(network(), path, noise(), html=tmp_path / "no" / "page.html")
    with pytest.raises(InputError, match="html: give the path"):
        verify.verify(network(), runtime.load(path), noise(), html=tmp_path / "page.html")


def test_command_line(tmp_path, capsys):
    pytest.importorskip("typer", reason="needs the extra `cli`")
    from logshift.converter import cli

    onnx.save(network(), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", noise(10))
    files = [str(tmp_path / name) for name in ("net.onnx", "net.stlq", "x.npy", "page.html")]

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments])
        assert not stop.value.code
        return capsys.readouterr().out

    text = call("convert", *files[:2], "--calibration", files[2], "--report", files[3], "--json")
    figure = json.loads(text)["verdict"]["outputs"][0]["cosine"]
    assert check(tmp_path / "page.html").rows("verdict")[1][3] == f"{figure:.5f}"
    (tmp_path / "page.html").unlink()
    call("verify", *files[:3], "--html", files[3])
    check(tmp_path / "page.html")


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("last", [False, True])
def test_inputs_are_shown_as_they_were(order, last, tmp_path):
    graph = runtime.graph.Graph([], [], {}, [])
    chosen = Preprocessing(mean=(0.1, 0.5, 0.9), std=(0.3, 0.2, 0.1), channel_order=order)
    pixels = photographs(1)[0]
    x = chosen.prepare(pixels, (16, 16), last)[None]
    graph.preprocessing = chosen.to_manifest()
    assert np.array_equal(show_input(x, graph).pixels, pixels)
    graph.preprocessing = None
    assert "least" in show_input(x * 50, graph).note
    assert show_input(noise(1, (5, 16, 16)), graph) is None
    assert show_input(noise(1, (3, 2, 2)), graph) is None


def test_outputs_of_every_kind():
    graph = runtime.graph.Graph([], [], {}, [])

    def shown(x, y=None, **more):
        error = converter.OutputError("y", **more)
        return show_output(error, x, x if y is None else y, [], graph)

    classes = [converter.GroupError((), 1, 9.0, 0.9)]
    mask = np.random.default_rng(0).integers(0, 4, (1, 12, 16))
    other = mask.copy()
    other[0, 0, 0] = 3 - other[0, 0, 0]
    first, second, different = shown(mask, other).pictures
    assert different.note == f"{100 / 192:.2f} % of the places"
    assert (
        first.pixels.shape == (12, 16, 3)
        and len(np.unique(first.pixels.reshape(-1, 3), axis=0)) == 4
    )
    assert not np.array_equal(first.pixels, second.pixels)
    scores = shown(np.eye(4, dtype=np.float32)[None, 1], agreement=1.0, groups=classes)
    assert scores.classes[0].label == "class 1" and scores.classes[0].found == 1
    maps = np.moveaxis(np.eye(4, dtype=np.float32)[mask], 3, 1)
    assert np.array_equal(
        shown(maps, agreement=1.0, groups=classes).pictures[0].pixels, first.pixels
    )
    heat = noise(1, (1, 10, 12))
    assert [p.title for p in shown(heat).pictures] == ["float", "packed", "difference"]
    values = noise(1, (4, 10, 12))
    pairs = shown(values, values + 1, groups=[converter.GroupError(((1, 2),), 1, 9.0, 0.9)]).points
    (points,) = pairs.values()
    assert list(pairs) == ["y, channels 1-2 of axis 1"]
    assert np.array_equal(points, [values[0, 1:3].ravel(), values[0, 1:3].ravel() + 1])
    many = np.zeros((1, 100_000), np.float32)
    many[0, 12345] = 7.0
    (points,) = shown(many, groups=[converter.GroupError((), 1, 9.0, 0.9)]).points.values()
    assert points.max() == 7 and points.shape[1] <= 1500
    assert shown(noise(1, (4, 10)), noise(1, (3, 10))).points == {}
    assert shown(np.arange(3)).pictures == []
