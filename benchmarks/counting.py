"""Executed instructions, counted by a plugin of QEMU's user-mode emulation: `count.c`."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MARK = 5000  # of `count.c`: a program makes this system call with 0, does its work, calls it with 1


@dataclass(frozen=True)
class Counts:
    """Executed instructions, those on vectors, and those that multiply integers."""

    instructions: int
    vector: int
    products: int


def plugin(directory: Path) -> Path:
    """Compile the plugin."""
    library = directory / "libcount.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("a C compiler is missing")
    source = Path(__file__).with_name("count.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
    return library


def counts(printed: str) -> Counts | None:
    """Return what was executed between the marks 0 and 1, from what the plugin printed."""
    found = re.search(
        r"^mark 1 instructions (\d+) vector (\d+) products (\d+)", printed, re.MULTILINE
    )
    return Counts(*map(int, found.groups())) if found else None
