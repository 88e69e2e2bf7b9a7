"""Microkernels compile to the instructions that they are named after, wherever they are run."""

from __future__ import annotations

import re

import pytest
from support.assembly import needs_x86, printed_for

from logshift.kernels.dot.tiles import MICROKERNELS

CPUS = {
    "avx512vnni": "icelake-server",
    "avxvnni": "alderlake",
    "avx2": "haswell",
    "ssse3": "nehalem",
}
REGISTERS = {64: "zmm", 32: "ymm", 16: "xmm"}

ASSEMBLY = """
import sys
from numba import cfunc, types
from logshift.kernels.dot import microkernels, tiles
from logshift.kernels.machine.microkernel import function
assert tiles.MICROKERNELS[sys.argv[1]].available
function = function(microkernels.__name__, sys.argv[1])
print(cfunc(types.void(types.uintp))(function)._library.get_asm_str())
"""
# Of a kind: the instruction of its inner loop, and how many per pixel and vector of channels.
PRODUCTS = {
    "pair": ("v?pmaddubsw", 1), "dot": ("vpdpbusd", 1), "wide": ("v?pmaddwd|vpdpwssd", 2),
    "depthwise": ("v?pmaddubsw", 0.5), "winograd": ("v?pmaddubsw", 1),
    "winograd_dot": ("vpdpbusd", 2), "rows": ("vpdpbusd", 1),
}  # fmt: skip


@needs_x86
@pytest.mark.parametrize("name", MICROKERNELS)
def test_steps_have_no_more_products_than_they_need(name):
    kernel = MICROKERNELS[name]
    assembly = printed_for(CPUS[kernel.isa.name], ASSEMBLY, name)
    register = REGISTERS[kernel.isa.vector]
    instruction, per_vector = PRODUCTS[kernel.kind]
    products = re.findall(rf"\b(?:{instruction})\s.*%{register}\d+", assembly)
    needed = kernel.pixels * kernel.vectors * per_vector
    # Steps are there more than once: the first one, loops, what the compiler unrolled of them.
    assert products and len(products) % needed == 0
    others = {"v?pmaddubsw", "vpdpbusd"} - {instruction}
    assert not any(re.search(rf"\b{other}\s", assembly) for other in others)
