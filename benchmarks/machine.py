"""What a figure was measured on, for publishing beside it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from logshift.runtime import cores


def describe() -> str:
    """Processor, cores, Python and Numba in one line."""
    import numba

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    import llvmlite.binding as llvm

    count, usable = os.cpu_count(), min(cores.affinity(), cores.quota() or cores.affinity())
    shown = f"{count} cores" if usable == count else f"{count} cores ({usable} usable)"
    return (
        f"{name} ({llvm.get_host_cpu_name()}), {shown}, Python"
        f" {platform.python_version()}, Numba {numba.__version__}"
    )
