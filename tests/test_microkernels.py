"""Microkernels compile to the instructions that they are named after, wherever they are run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import pytest

from logshift.kernels.microkernels import MICROKERNELS

CPUS = {"avx512vnni": "icelake-server", "avxvnni": "alderlake", "avx2": "haswell"}

ASSEMBLY = """
import sys
from numba import cfunc, types
from logshift.kernels import microkernels
assert microkernels.MICROKERNELS[sys.argv[1]].available
function = getattr(microkernels, "_" + sys.argv[1].replace("-", "_"))
print(cfunc(types.void(types.uintp))(function)._library.get_asm_str())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instructions")
@pytest.mark.parametrize("name", MICROKERNELS)
def test_inner_loop_is_one_dot_product_per_vector(name):
    kernel = MICROKERNELS[name]
    environment = os.environ | {"NUMBA_CPU_NAME": CPUS[kernel.isa], "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ASSEMBLY, name],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    register = "zmm" if kernel.lanes == 16 else "ymm"
    instruction = "vpmaddubsw" if kernel.pair else "vpdpbusd"
    products = re.findall(rf"\b{instruction}\s.*%{register}\d+", done.stdout)
    assert len(products) == kernel.pixels * kernel.vectors
    others = {"vpmaddubsw", "vpdpbusd"} - {instruction}
    assert not any(other in done.stdout for other in others)
