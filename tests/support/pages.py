"""Code blocks of pages, and how a user would run them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from importlib import resources
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)(?: ([\w-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language, mark=""):
    """Return all code blocks of a page in a language with or without a mark."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [
        code for name, marked, code in _BLOCK.findall(text) if (name, marked) == (language, mark)
    ]


def imported(path):
    """Import a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lay_out(directory):
    """Fill a directory with the files that pages speak of: a model, pictures, a photo."""
    demo = resources.files("logshift.converter") / "demo"
    shutil.copy(demo / "resnet20-cifar10.onnx", directory / "model.onnx")
    shutil.copytree(demo / "pictures", directory / "pictures")
    shutil.copy(sorted((directory / "pictures").glob("*.jpg"))[0], directory / "photo.jpg")
    return directory


def has_command():
    """Whether this interpreter's environment has the command `logshift`."""
    return (Path(sysconfig.get_path("scripts")) / "logshift").exists()


def run(command, directory):
    """Run with the scripts of this interpreter's environment first in PATH; returns the output."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=directory, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
