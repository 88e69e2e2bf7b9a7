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
function = microkernels.function(sys.argv[1])
print(cfunc(types.void(types.uintp))(function)._library.get_asm_str())
"""
# Of a kind: the instruction of its inner loop, and how many per pixel and vector of channels.
PRODUCTS = {
    "pair": ("vpmaddubsw", 1), "dot": ("vpdpbusd", 1), "wide": ("vpmaddwd|vpdpwssd", 2),
    "depthwise": ("vpmaddubsw", 0.5), "winograd": ("vpmaddubsw", 1),
}  # fmt: skip


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instructions")
@pytest.mark.parametrize("name", MICROKERNELS)
def test_steps_have_no_more_products_than_they_need(name):
    kernel = MICROKERNELS[name]
    environment = os.environ | {"NUMBA_CPU_NAME": CPUS[kernel.isa], "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", ASSEMBLY, name],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    register = "zmm" if kernel.lanes == 16 else "ymm"
    instruction, per_vector = PRODUCTS[kernel.kind]
    products = re.findall(rf"\b(?:{instruction})\s.*%{register}\d+", done.stdout)
    needed = kernel.pixels * kernel.vectors * per_vector
    # Steps are there more than once: the first one, loops, what the compiler unrolled of them.
    assert products and len(products) % needed == 0
    others = {"vpmaddubsw", "vpdpbusd"} - {instruction}
    assert not any(other in done.stdout for other in others)
