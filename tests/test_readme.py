"""The README's code runs as it stands, and CI tests what the README says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support.pages import blocks, has_command, lay_out, run

pytest.importorskip("onnxruntime", reason="the README's examples convert a model")
pytest.importorskip("typer", reason="the README's examples use the command line")

PAGE = "README.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with the files that the README speaks of."""
    return lay_out(tmp_path_factory.mktemp("readme"))


def test_python_blocks_run_in_order(workplace):
    code = "\n".join(blocks(PAGE, "python"))
    assert "convert(" in code and "load(" in code
    output = run([sys.executable, "-c", code], workplace)
    assert "bits per weight" in output and "(8, 10)" in output


def test_shell_blocks_run_in_order(workplace):
    lines = [line for code in blocks(PAGE, "sh") for line in code.splitlines()]
    shown = {"convert", "info", "run", "verify", "bench", "export"}
    assert {line.split()[1] for line in lines} == shown
    if not has_command():
        pytest.skip("logshift is not installed in this environment")
    for line in lines:
        run(["bash", "-c", line], workplace)


def test_there_are_two_commands_to_start_with():
    commands = blocks(PAGE, "sh", "install")
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
    assert done.stdout.strip() == blocks(PAGE, "sh", "install")[1].strip()
