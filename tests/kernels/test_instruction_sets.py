"""The same bits on every instruction set: each in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from support.float_digest import digest as float_digest
from support.instruction_set_digest import digest

from logshift.kernels.machine import arm, targets

MACHINES = {
    "x86_64": [
        ("x86-64", ""), ("nehalem", ""), ("haswell", ""), ("cascadelake", ""),
        ("icelake-server", None),
    ],
    "AMD64": [("x86-64", ""), ("nehalem", ""), ("haswell", "")],
    "aarch64": [("generic", ""), ("cortex-a53", ""), ("cortex-a76", ""), ("neoverse-v1", "")],
    "arm64": [("generic", ""), ("apple-m1", ""), ("apple-m2", "")],
}  # fmt: skip


def _runs_here(cpu):
    if targets.IS_ARM:
        own = {name for name, there in arm.detected().items() if there}
        return targets.baked(cpu).needs <= own
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    vnni = {"avx512vl", "avx512bw", "avx512dq", "avx512cd", "avx512_vnni"}
    needed = {"haswell": {"avx2", "fma", "bmi2"}, "cascadelake": vnni, "icelake-server": vnni}
    return needed.get(cpu, set()) <= set(flags)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("instruction_set_digest", lambda: 2 * [digest("reference")]),
        ("float_digest", lambda: [float_digest("reference")]),
    ],
)
@pytest.mark.parametrize(("cpu", "features"), MACHINES.get(platform.machine(), []))
def test_other_instruction_sets_give_the_same_bits(cpu, features, script, expected):
    if not _runs_here(cpu):
        pytest.skip(f"this machine cannot run code for {cpu}")
    environment = os.environ | {"NUMBA_CPU_NAME": cpu}
    if features is not None:
        environment["NUMBA_CPU_FEATURES"] = features
    done = subprocess.run(
        [sys.executable, "-m", f"support.{script}"], cwd=Path(__file__).parents[1],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected()


@pytest.mark.parametrize("features", [None, "", "+neon,+dotprod"])
@pytest.mark.parametrize(
    "cpu", ["haswell", "x86-64"] if targets.IS_ARM else ["cortex-a53", "cortex-a76", "cortex-x4",
                                                         "neoverse-v1", "apple-m2"],
)  # fmt: skip
def test_cpu_of_another_kind_of_machine_is_refused(cpu, features):
    """Before LLVM ends the process."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu}
    if features is not None:
        environment["NUMBA_CPU_FEATURES"] = features
    done = subprocess.run(
        [sys.executable, "-c", "import logshift.runtime"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("logshift.kernels.errors.InputError: ")
    assert f"NUMBA_CPU_NAME is {cpu!r}" in error and "unset it" in error
