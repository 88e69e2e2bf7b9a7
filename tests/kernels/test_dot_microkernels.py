"""Microkernels compile to the instructions that they are named after, wherever they are run."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.assembly import needs_x86, printed_for

from logshift.kernels import registry
from logshift.kernels.dot.tiles import MICROKERNELS
from logshift.kernels.layer import Layer
from logshift.kernels.stlq.codec import LogWeights

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
@pytest.mark.parametrize("name", [name for name, k in MICROKERNELS.items() if k.isa.name in CPUS])
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


AVX512, AVX2 = ("avx512vnni", "avx2", "ssse3"), ("avx2", "ssse3")


@pytest.mark.parametrize(
    ("sets", "out", "pixels", "chosen"),
    [
        (AVX512, 64, 3136, "avx512vnni-6x64"),
        (AVX512, 512, 49, "avx512vnni-6x64"),  # 28 pixels would leave 7
        (AVX512, 96, 2704, "avx512vnni-14x32"),
        (AVX512, 24, 2704, "avx512vnni-28x16"),  # blocks that overlap, not another's full ones
        (AVX512, 8, 2704, "avx2-12x8"),
        (AVX512, 1000, 1, "avx512vnni-6x64"),  # sums that do not wait for each other
        (AVX2, 64, 3136, "avx2-6x16"),
        (AVX2, 24, 2704, "avx2-12x8"),
        (AVX2, 4, 2704, "ssse3-12x4"),
    ],
)
def test_the_tile_that_wastes_least_is_chosen(sets, out, pixels, chosen):
    first = np.random.default_rng(0).integers(0, 16, (out, 1, 1, 64), np.uint8)
    m = np.ones(out, np.float32)
    weights = LogWeights(first, np.zeros_like(first), m, 4)
    layer = Layer(weights, 1, (1, 1), (1, 1), 8, 0, m, m, pixels)
    candidates = [
        k for k in registry.kernels()
        if k.op == "conv" and k.family == "dot" and k.variant.startswith(sets) and k.supports(layer)
    ]  # fmt: skip
    assert min(candidates, key=lambda k: k.cost(layer)).variant == chosen
