"""`docs/from-pytorch.md` runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("logshift.converter", reason="needs the package logshift")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-pytorch.md"


def test_from_pytorch(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.data"))
    right = [float(x) for x in re.findall(r"(.*)% right", done.stdout.replace(": ", "\n"))]
    assert len(right) == 2 and min(right) > 80 and abs(right[0] - right[1]) < 2
    assert float(re.search(r"same class: (.*)%", done.stdout)[1]) > 98
