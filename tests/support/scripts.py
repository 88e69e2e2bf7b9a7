"""Scripts of the repository as modules; that which makes the hostile files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOSTILE = Path(__file__).parents[1] / "hostile"


def script(path):
    """Import a script that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = script(HOSTILE / "make.py")
