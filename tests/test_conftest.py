"""Property tests draw the same examples in every run, and with `-m slow` random ones of a seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DRAWS = """
from hypothesis import given, strategies as st
if {neighbour}:
    import neighbour

@given(st.integers(), st.floats(width=32))
def test_drawn(i, x):
    print("drawn", i, x)

def test_other():
    print("no property ran")
"""


@pytest.fixture
def run(tmp_path):
    """Run pytest on a property in a directory of its own, as it is run here."""
    (tmp_path / "neighbour.py").write_text("NUMBERS = [123456789, 987654321, 0.123, 0.321]\n")

    def run(*options, neighbour=False):
        (tmp_path / "test_drawn.py").write_text(DRAWS.format(neighbour=neighbour))
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "conftest", "-s", "-p", "no:cacheprovider",
             "-c", Path(__file__).parent.parent / "pyproject.toml", "--rootdir", tmp_path,
             tmp_path, *options],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, re.findall("^(?:.*)drawn (.*)$", done.stdout, re.MULTILINE)

    return run


def test_the_same_examples_in_every_run(run):
    text, drawn = run()
    assert "property tests: the same examples" in text and "no property ran" in text
    assert len(drawn) >= 100
    # Not even with what another test has imported.
    assert run(neighbour=True)[1] == drawn


@pytest.mark.parametrize("ci", [False, True])
def test_random_examples_of_a_seed_that_is_printed(run, monkeypatch, ci):
    _, fixed = run()
    if ci:
        monkeypatch.setenv("CI", "true")  # where Hypothesis has other defaults
    else:
        monkeypatch.delenv("CI", raising=False)
    text, drawn = run("-m", "slow")
    assert "no property ran" not in text and len(drawn) >= 100 and drawn != fixed
    (seed,) = re.findall("random examples, --hypothesis-seed=([0-9]+)", text)
    assert run("-m", "slow", f"--hypothesis-seed={seed}")[1] == drawn
