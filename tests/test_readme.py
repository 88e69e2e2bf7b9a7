"""The README's code runs as it stands, and CI tests what the README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the README's examples convert a model")
pytest.importorskip("typer", reason="the README's examples use the command line")

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def blocks(language, mark=""):
    """All code blocks of a language with or without a mark."""
    return [code for name, marked, code in BLOCKS if (name, marked) == (language, mark)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with the files that the README speaks of."""
    directory = tmp_path_factory.mktemp("readme")
    demo = resources.files("logshift.converter") / "demo"
    shutil.copy(demo / "resnet20-cifar10.onnx", directory / "model.onnx")
    shutil.copytree(demo / "pictures", directory / "pictures")
    shutil.copy(sorted((directory / "pictures").glob("*.jpg"))[0], directory / "photo.jpg")
    return directory


def run(command, directory):
    """Run with the scripts of this interpreter's environment first in PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=directory, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_python_blocks_run_in_order(workplace):
    code = "\n".join(blocks("python"))
    assert "convert(" in code and "load(" in code
    output = run([sys.executable, "-c", code], workplace)
    assert "bits per weight" in output and "(8, 10)" in output


def test_shell_blocks_run_in_order(workplace):
    lines = [line for code in blocks("sh") for line in code.splitlines()]
    shown = {"convert", "info", "run", "verify", "bench", "export"}
    assert {line.split()[1] for line in lines} == shown
    if not (Path(sysconfig.get_path("scripts")) / "logshift").exists():
        pytest.skip("logshift is not installed in this environment")
    for line in lines:
        run(["bash", "-c", line], workplace)


def test_there_are_two_commands_to_start_with():
    commands = blocks("sh", "install")
    assert len(commands) == 2 and all(len(code.splitlines()) == 1 for code in commands)
    assert commands[0].rstrip().endswith("logshift demo")
    assert commands[1].rstrip().endswith("pytest")


def test_ci_runs_the_test_command_of_the_readme(repository):
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    expression = re.search(r"command=\$\(sed -n '(.*)' README.md\)", script)[1]
    done = subprocess.run(
        ["sed", "-n", expression, repository / "README.md"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == blocks("sh", "install")[1].strip()
