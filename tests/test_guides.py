"""What the guides in `docs/` show runs as it stands, each from its first block to its last.

That from PyTorch is run by the trainer's tests, in whose environment PyTorch is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.pages import blocks, has_command, lay_out, run

pytest.importorskip("onnxruntime", reason="the guides convert models")
pytest.importorskip("jinja2", reason="the guides write reports")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with the files that the guides speak of, in which one follows the other."""
    return lay_out(tmp_path_factory.mktemp("guides"))


def follow(page, workplace):
    """Run the commands of a page, then its Python as one program; return what that prints."""
    if has_command():
        for line in "".join(blocks(page, "sh")).splitlines():
            run(["bash", "-c", line], workplace)
    return run([sys.executable, "-c", "\n".join(blocks(page, "python"))], workplace)


def test_convert_then_run(workplace):
    assert "bits per weight" in follow("docs/converting.md", workplace)
    printed = follow("docs/running.md", workplace)
    assert "(8, 10)" in printed and "µs, " in printed


def test_from_tensorflow(tmp_path):
    """Train and export where TensorFlow is, here or in the environment that is named."""
    python = os.environ.get("LOGSHIFT_TENSORFLOW_PYTHON", sys.executable)
    (train,) = blocks("docs/from-tensorflow.md", "python", "train")
    if subprocess.run([python, "-c", "import tensorflow, tf2onnx"], capture_output=True).returncode:
        pytest.skip("needs TensorFlow and tf2onnx, in $LOGSHIFT_TENSORFLOW_PYTHON if not here")
    run([python, "-c", train], tmp_path)
    assert {"model.onnx", "samples.npz"} <= {path.name for path in tmp_path.iterdir()}
    printed = follow("docs/from-tensorflow.md", tmp_path)
    assert float(re.search(r"same class: (.*)%", printed)[1]) > 98
