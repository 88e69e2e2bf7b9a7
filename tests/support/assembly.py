"""What compiled code consists of, on processors that need not be here."""

import os
import platform
import subprocess
import sys

import pytest

needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instructions"
)


def printed_for(cpu, script, argument):
    """Run a script that prints assembly, in a process that compiles for this processor."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
