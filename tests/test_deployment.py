"""What `docs/deployment.md` shows runs as it stands."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support.pages import blocks, imported

from logshift import converter
from logshift.kernels.machine import targets
from logshift.runtime import Session, load

TEXT = (Path(__file__).parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
DEMO = Path(converter.__file__).parent / "demo"
PICTURE = sorted((DEMO / "pictures").glob("*.jpg"))[0]


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The Python block that defines a function, imported beside a model."""
    shutil.copy(DEMO / "resnet20-cifar10-w4.stlq", tmp_path / "model.stlq")
    monkeypatch.chdir(tmp_path)
    (code,) = (
        code for code in blocks("docs/deployment.md", "python") if f"def {request.param}(" in code
    )
    path = tmp_path / f"{request.param}.py"
    path.write_text(code)
    return imported(path)


@pytest.fixture(scope="module")
def scores():
    """What the model says of the picture."""
    from PIL import Image

    return load(DEMO / "resnet20-cifar10-w4.stlq", kernels="portable").run(Image.open(PICTURE))


def _served(app, queue):
    body = PICTURE.read_bytes()
    environ = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    (answer,) = app(environ, lambda status, headers: queue.put(status))
    queue.put(json.loads(answer))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("module", ["app"], indirect=True)
def test_server_that_loads_before_it_forks(module, scores):
    assert isinstance(module.session, Session)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_served, args=(module.app, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
        worker.join(120)
        assert worker.exitcode == 0
        assert queue.get() == "200 OK"
        assert (np.float32(queue.get()) == scores).all()


@pytest.mark.parametrize("module", ["handler"], indirect=True)
def test_lambda_handler(module, scores):
    event = {"body": base64.b64encode(PICTURE.read_bytes()).decode()}
    answer = json.loads(json.dumps(module.handler(event, None)))
    assert (np.float32(answer["scores"]) == scores[0]).all()


def test_cpus_that_are_named_exist():
    names = set(re.findall(r"--cpu ([\w-]+)", TEXT))
    assert "znver4" in names and "neoverse-v1" in names
    assert names <= set(targets._X86) | set(targets._ARM)
