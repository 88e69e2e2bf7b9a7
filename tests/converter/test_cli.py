"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.onnx_nets import network, noise
from support.scripts import HOSTILE, make

from logshift import converter
from logshift.converter.encode import encode
from logshift.kernels.errors import InputError
from logshift.runtime import Session, load
from logshift.runtime.file import format as packed_format
from logshift.runtime.graph import ValueInfo

pytest.importorskip("typer", reason="needs the extra `cli`")
from logshift.converter import cli  # noqa: E402


@pytest.fixture
def packed(tmp_path):
    """A classifier of gray pictures: two channels, so only for arrays."""
    path = tmp_path / "net.stlq"
    packed_format.write(make.classifier(), path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """A folder of two pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory):
    """A small ONNX classifier of RGB pictures, its convolutions random."""
    onnx = pytest.importorskip("onnx", reason="needs the extra `converter`")
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)) / 5,
        "w2": rng.standard_normal((4, 8, 1, 1)),
    }
    h = onnx.helper
    nodes = [
        h.make_node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        h.make_node("Relu", ["c"], ["r"]),
        h.make_node("Conv", ["r", "w2"], ["d"]),
        h.make_node("GlobalAveragePool", ["d"], ["p"]),
        h.make_node("Flatten", ["p"], ["y"]),
    ]
    graph = h.make_graph(
        nodes, "net",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])],
        [h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(w.astype(np.float32), k) for k, w in weights.items()],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def converted(tmp_path, onnx_model, pictures, capsys):
    """The ONNX classifier, packed by the command."""
    labels = tmp_path / "labels.txt"
    labels.write_text("ape\nbee\ncat\ndog\n")
    path = tmp_path / "converted.stlq"
    arguments = ["--calibration", pictures, "--labels", labels, "--crop", "16x16", "--resize", "20"]
    call("convert", onnx_model, path, *arguments)
    assert "bits per weight" in capsys.readouterr().out
    return path


def call(*arguments):
    """Run the command in this process; the exit code."""
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


def output(capsys, *arguments):
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    assert call(*arguments) == 0
    return capsys.readouterr().out


def test_version_and_help(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("convert", "info", "run", "bench", "verify", "export", "demo", "warmup"):
        assert command in text
        assert "Example" in output(capsys, command, "--help")


def test_info_tells_sizes_and_nzr_without_loading(capsys, packed, monkeypatch):
    monkeypatch.setattr(packed_format, "read", None)
    record = json.loads(output(capsys, "info", packed, "--json"))
    graph = make.classifier()
    assert record["bytes"] == packed.stat().st_size
    (x,) = record["inputs"]
    assert x == {"name": "x", "shape": ["batch", 2, "height", "width"], "dtype": "float32"}
    assert record["labels"] == graph.labels
    for node, described in zip(graph.nodes, record["nodes"], strict=True):
        assert (node.name, node.op) == (described["name"], described["op"])
        if node.weights is not None:
            assert described["nzr"] == pytest.approx(node.weights.nzr)
            assert described["weight_shape"] == list(node.weights.shape)
    text = output(capsys, "info", packed)
    for part in ("x (batch, 2, height, width)", "cat, dog, ship", "sparse", "bits per weight"):
        assert part in text


def test_info_tells_who_made_a_file(capsys, tmp_path):
    path, model = tmp_path / "net.stlq", network()
    converter.convert(model, path, calibration=noise(4))
    by = f"logshift {version('logshift')}"
    assert json.loads(output(capsys, "info", path, "--json"))["producer"] == by
    assert f"format version 2, by {by}" in output(capsys, "info", path)


def test_info_tells_what_runs_how(capsys, packed):
    packed_format.write(make.mixed(), packed)
    record = json.loads(output(capsys, "info", packed, "--json"))
    runs = ["codes", "codes", *["float32"] * 3, "numpy", *["float32 or numpy"] * 2]
    assert [node["runs"] for node in record["nodes"]] == runs
    assert record["weights"] == 8 + 144  # words, not the float32 weights
    assert "numpy" in output(capsys, "info", packed)


@pytest.mark.parametrize(
    ("ratio", "encoding", "stream"), [(0.001, "list", "count"), (0.1, "bitmap", "position")]
)
def test_info_counts_second_words_in_deflated_streams(capsys, packed, ratio, encoding, stream):
    graph = make.classifier()
    w = np.zeros((12, 64, 64, 12), np.float32)
    w[..., :2] = np.random.default_rng(0).standard_normal(w[..., :2].shape)
    graph.nodes[make.DENSE].weights = encode(w, 3, ratio)
    graph.nodes[make.DENSE].attributes["pads"] = [32, 32, 31, 31]
    packed_format.write(graph, packed)
    weight = make.take_apart(packed.read_bytes())[0]["nodes"][make.DENSE]["weight"]
    assert weight["positions"] == encoding and stream in weight["zlib"]
    record = json.loads(output(capsys, "info", packed, "--json"))
    nzr = graph.nodes[make.DENSE].weights.nzr
    assert record["nodes"][make.DENSE]["nzr"] == pytest.approx(nzr) and nzr > 0


def test_convert_by_tiles_of_an_array(capsys, tmp_path, onnx_model):
    path = tmp_path / "net.stlq"
    np.save(tmp_path / "x.npy", noise(10))
    arguments = ("convert", onnx_model, path, "--calibration", tmp_path / "x.npy")
    options = ("--granularity", "tile", "--residual-ratio", "0.3")
    for given, expected in (((), [16, 16]), (("--tile", "2X4"), [2, 4]), (("--tile", "8"), 8)):
        output(capsys, *arguments, *options, *given)
        assert packed_format.read(path).settings["tile"] == expected
    for tile, message in (("4x", "like 16x16"), ("a", "like 16x16"), ("4x4x4", "two of them")):
        assert call(*arguments, *options, "--tile", tile) == 1
        assert message in capsys.readouterr().err
    assert call(*arguments, "--tile", "4x4") == 1
    assert "needs granularity 'tile'" in capsys.readouterr().err


def test_info_shows_tiles(capsys, packed):
    assert "by tiles" not in output(capsys, "info", packed)
    packed_format.write(make.tiled(), packed)
    text = output(capsys, "info", packed)
    assert "second words by tiles of an array: 16x4, 4x4, 8x8" in text and "tiles %" in text
    (line,) = [line for line in text.splitlines() if line.startswith("dense ")]
    assert line.split()[6] == "19.8"  # 16 of 81


def test_info_shows_kernels(capsys, packed):
    summary = load(packed).summary()
    record = json.loads(output(capsys, "info", packed, "--kernels", "--json"))
    assert [n["kernel"] for n in record["layers"]] == [n.kernel for n in summary.layers]


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.stlq")), ids=lambda path: path.stem)
def test_hostile_files_end_in_one_line(capsys, path):
    for command in (["info", path], ["run", path, "x.npy"]):
        code = call(*command)
        captured = capsys.readouterr()
        if command[0] == "info" and code == 0:
            continue  # only what is shown is read
        assert code == 1 and captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_convert_tells_the_verdict(capsys, tmp_path, onnx_model, monkeypatch):
    np.save(tmp_path / "x.npy", noise(10))
    path = tmp_path / "net.stlq"
    arguments = ("convert", onnx_model, path, "--calibration", tmp_path / "x.npy")
    text = output(capsys, *arguments)
    assert "on 2 samples that did not calibrate:\n  output 'y': SNR" in text
    assert "warning" not in text
    coarse = (*arguments, "--bits", "2", "--residual-ratio", "0", "--activation-bits", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not twice
        text = output(capsys, *coarse)
        record = json.loads(output(capsys, *coarse, "--json"))
    (line,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert line == f"warning: {record['verdict']['warning']}" and "\033" not in line
    assert record["verdict"]["remedy"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert f"\033[1;33m{line}" in output(capsys, *coarse)
    path.write_bytes(b"old")
    assert call(*coarse, "--strict") == 1
    assert line.removeprefix("warning: ") in capsys.readouterr().err
    assert path.read_bytes() == b"old"
    assert call(*arguments, "--strict") == 0 and path.read_bytes() != b"old"


def test_convert_by_labelled_pictures(capsys, tmp_path, onnx_model, pictures):
    for name in "0123":
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for picture in pictures.iterdir():
            (tmp_path / "labelled" / name / picture.name).write_bytes(picture.read_bytes())
    path = tmp_path / "net.stlq"
    arguments = (
        "convert", onnx_model, path, "--calibration", pictures, "--validate", tmp_path / "labelled"
    )  # fmt: skip
    # Every picture is of every class.
    text = output(capsys, *arguments)
    assert f"max_drop 0.5: {path.stat().st_size:,} bytes, score 25, float model 25, in" in text
    record = json.loads(output(capsys, *arguments, "--max-drop", "3", "--bits", "3", "--json"))
    assert record["search"]["chosen"]["figure"] == record["search"]["float_figure"] == 25.0
    assert {layer["bits"] for layer in record["layers"]} == {3, None}
    assert call(*arguments, "--max-bytes", "3000") == 1
    assert "validate goes with max_drop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["5"], 5),
        (["n*=4", "Gemm=32"], {"n*": 4, "Gemm": 32, "*": "auto"}),
        (["6", "a=b=32"], {"a=b": 32, "*": 6}),
    ],
)
def test_bits_of_activations_by_name(arguments, expected, tmp_path, monkeypatch):
    found = []

    def convert(*_, activation_bits, **more):
        found.append(activation_bits)
        raise InputError("far enough")

    monkeypatch.setattr(converter, "convert", convert)
    options = [f"--activation-bits={argument}" for argument in arguments]
    np.save(tmp_path / "x.npy", noise(2))
    call("convert", "x.onnx", "x.stlq", "--calibration", tmp_path / "x.npy", *options)
    assert found == [expected]
    if isinstance(expected, dict):  # the first that fits counts
        assert list(found[0]) == list(expected)


def test_bits_of_activations_that_are_no_numbers(tmp_path, capsys):
    np.save(tmp_path / "x.npy", noise(2))
    arguments = ("convert", "x.onnx", "x.stlq", "--calibration", tmp_path / "x.npy")
    assert call(*arguments, "--activation-bits", "conv=many") == 1
    assert "--activation-bits 'conv=many': give a number" in capsys.readouterr().err


def test_run_on_arrays(capsys, packed, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 2, 6, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    expected = Session(make.classifier()).run(x)
    text = output(capsys, "run", packed, tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(
        f"{tmp_path / 'x.npy'}[1]: {make.classifier().labels[expected[1].argmax()]} "
    )
    output(
        capsys,
        "run",
        packed,
        tmp_path / "x.npy",
        "-o",
        tmp_path / "y.npz",
        "--kernels",
        "reference",
    )
    assert np.array_equal(np.load(tmp_path / "y.npz")["y"], expected)


def test_convert_stores_what_it_is_told(converted, pictures):
    session = load(converted)
    assert session.labels == ["ape", "bee", "cat", "dog"]
    assert session.graph.preprocessing["resize"] == 20
    assert session.graph.preprocessing["crop"] == [16, 16]
    assert session.graph.settings["weight_bits"] == 4


def test_run_on_pictures(capsys, converted, pictures):
    session = load(converted)
    records = json.loads(output(capsys, "run", converted, pictures, "--json"))
    assert [r["input"] for r in records] == [str(pictures / "a.png"), str(pictures / "b.png")]
    for record in records:
        scores = session.run(np.asarray(Image.open(record["input"])))[0]
        assert [c["class"] for c in record["top"]] == list(np.argsort(-scores))
        assert record["top"][0]["score"] == pytest.approx(float(scores.max()))
        assert record["top"][0]["label"] == session.labels[scores.argmax()]


def test_verify_and_bench(capsys, converted, onnx_model, pictures):
    record = json.loads(output(capsys, "verify", onnx_model, converted, pictures, "--json"))
    assert record["samples"] == 2 and record["output"] == "y"
    assert [t["name"] for t in record["tensors"]][-1] == "y"
    assert all(t["snr_db"] > 5 and t["cosine"] > 0.9 for t in record["tensors"])
    assert "same top-1" in output(capsys, "verify", onnx_model, converted, pictures)
    arguments = ["--against", onnx_model, "--seconds", "0.1", "--batch", "2", "--layers"]
    records = json.loads(output(capsys, "bench", converted, *arguments, "--json"))
    assert [r["threads"] for r in records] == [1, 2]
    for r in records:
        assert 0 < r["ratio"]["p10"] <= r["ratio"]["median"] <= r["ratio"]["p90"]
        assert r["layers"][0]["op"] == "QuantizeLinear"
    text = output(capsys, "bench", converted, *arguments, "--threads", "1")
    assert "times as long" in text and "kernel" in text


def test_export_as_c(capsys, converted, tmp_path):
    options = ("--format", "c", "--name", "net", "--layout", "small", "--main")
    record = json.loads(output(capsys, "export", converted, "-o", tmp_path, *options, "--json"))
    assert [Path(file).name for file in record["files"]] == ["net.h", "net.c", "net_main.c"]
    assert f"NET_ARENA_BYTES {record['arena_bytes']}" in (tmp_path / "net.h").read_text()
    with pytest.raises(SystemExit, match="--codes: only with --format c"):
        cli.main(["export", str(converted), "-o", str(tmp_path / "net.onnx"), "--codes"])


def test_export_is_verified_to_be_the_same(capsys, converted, pictures, tmp_path):
    target = tmp_path / "exported.onnx"
    text = output(capsys, "export", converted, "-o", target)
    assert text.startswith(f"{target}: {target.stat().st_size:,} bytes") and text.count("\n") == 1
    record = json.loads(output(capsys, "export", converted, "-o", target, "--json"))
    assert record == {"file": str(target), "bytes": target.stat().st_size}
    record = json.loads(output(capsys, "verify", target, converted, pictures, "--json"))
    assert record["agreement"] == 1
    # Tensors of codes are compared with what they are rounded from.
    assert all((t["snr_db"] or np.inf) > 35 for t in record["tensors"])


def test_verifying_another_model_is_refused(capsys, packed, onnx_model):
    array = packed.with_name("x.npy")
    np.save(array, np.zeros((1, 2, 6, 6), np.float32))
    assert call("verify", onnx_model, packed, array) == 1
    assert "made from another model" in capsys.readouterr().err
    graph = make.classifier()
    graph.nodes[-1].outputs = ["z"]
    graph.outputs = [ValueInfo("z", *(getattr(graph.outputs[0], k) for k in ("shape", "nominal")))]
    packed_format.write(graph, packed)
    assert call("verify", onnx_model, packed, array) == 1
    assert "made from another model" in capsys.readouterr().err


def test_demo_names_what_is_on_the_pictures(capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra `converter`")
    out = tmp_path / "demo.stlq"
    record = json.loads(output(capsys, "demo", "--out", out, "--json"))
    four, three, plain = record["networks"]
    assert [n["network"] for n in record["networks"]] == ["4 bits", "3 bits", "float32"]
    assert out.stat().st_size == four["bytes"] > three["bytes"]
    assert four["bytes"] < 250_000 and four["bits_per_weight"] > three["bits_per_weight"]
    # What the command for one network says.
    pictures = cli.demo.DEMO / "pictures"
    answers = json.loads(output(capsys, "run", out, pictures, "--json"))
    for answer, shown in zip(answers, four["pictures"], strict=True):
        assert answer["top"][0]["label"] == shown["label"]
        assert answer["top"][0]["score"] == shown["score"]
    for kind in (four, three, plain):
        right = [p["truth"] == p["label"] for p in kind["pictures"]]
        assert kind["right"] == sum(right) > 0.5 * len(right) > 0
    text = output(capsys, "demo")
    assert f"{four['right']} of 6" in text and f"{three['bytes']:,}" in text


def test_warmup(capsys):
    text = output(capsys, "warmup")
    assert " MB in " in text and "ready" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "ghost.stlq"], "ghost.stlq"),
        (["run", "NET", "ghost.npy"], "ghost.npy"),
        (["run", "NET", "empty"], "no pictures"),
        (["run", "NET", "text.npy"], "not a .npy file"),
        (["run", "NET", "wrong.npy"], "shape"),
        (["run", "NET", "text.png"], "text.png"),
        (["run", "NET", "picture.png"], "shape"),
        (["run", "NET", "x.npy", "-o", "y.txt"], "--output"),
        (["bench", "NET", "--against", "ghost.onnx"], "ghost.onnx"),
        (["warmup", "--cpu", "zen9"], "zen9"),
        (["warmup", "--into", "x.npy"], "x.npy cannot be written"),
        (["convert", "ghost.onnx", "y.stlq", "--calibration", "x.npy"], "ghost.onnx"),
        (["convert", "ghost.onnx", "y.stlq", "--calibration", ".", "--mean", "a"], "--mean"),
        (["convert", "ghost.onnx", "y.stlq", "--calibration", ".", "--crop", "5"], "224x224"),
        (["convert", "ghost.onnx", "y.stlq", "--calibration", ".", "--bits", "9"], "weight_bits"),
    ],
)
def test_mistakes_end_in_one_line(capsys, packed, monkeypatch, arguments, message):
    pytest.importorskip("onnxruntime", reason="needs the extra `converter`")
    monkeypatch.chdir(packed.parent)
    (packed.parent / "empty").mkdir()
    (packed.parent / "text.npy").write_text("text")
    (packed.parent / "text.png").write_text("text")
    Image.new("RGB", (6, 6)).save("picture.png")
    np.save("x.npy", np.zeros((1, 2, 6, 6), np.float32))
    np.save("wrong.npy", np.zeros((1, 5, 6, 6), np.float32))
    assert call(*("net.stlq" if a == "NET" else a for a in arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("missing", ["onnx", "typer"])
def test_a_missing_extra_is_one_sentence(packed, missing):
    """In a fresh process where a package cannot be imported."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        f"sys.modules[{missing!r}] = None;"
        f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a);"
        "from logshift.converter import cli; cli.main(sys.argv[1:])"
    )
    commands = {
        "info": ["info", packed],
        "convert": ["convert", "a.onnx", "b.stlq", "--calibration", "x"],
    }
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True
        )
        if missing == "onnx" and name == "info":
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 1
        assert "pip install 'logshift[" in done.stderr and done.stderr.count("\n") == 1


def test_info_imports_no_onnx(packed):
    code = (
        "import sys; from logshift.converter import cli;"
        "cli.app(['info', sys.argv[1]], standalone_mode=False);"
        "print(set(sys.modules) & {'onnx', 'onnxruntime', 'onnxslim', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", code, packed], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("set()\n")


def test_convert_frees_sizes(tmp_path, onnx_model, capsys):
    data, out = tmp_path / "x.npy", tmp_path / "net.stlq"
    np.save(data, np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32))
    arguments = ["convert", str(onnx_model), str(out), "--calibration", str(data)]
    assert call(*arguments, "--input-shape", "x:?,3,h,-1") == 0
    assert load(out).inputs[0].shape == ("x_dim_0", 3, "h", "x_dim_3")
    assert load(out).run(np.zeros((1, 3, 24, 40), np.float32)).shape == (1, 4)
    assert call(*arguments, "--input-shape", "2,3,16,16") == 0
    assert load(out).inputs[0].shape == (2, 3, 16, 16)
    assert call(*arguments, "--input-shape", "y:1,3,16,16") == 1
    assert "no input 'y'" in capsys.readouterr().err
    assert call(*arguments, "--input-shape", "x:1,,16,16") == 1
    assert "give sizes like" in capsys.readouterr().err
