"""Float32 microkernels compile to the instructions that they are named after, wherever they run."""

from __future__ import annotations

import re

import pytest
from support.assembly import needs_x86, printed_for

from logshift.kernels.fma.tiles import FLOAT_TILES

CPUS = {"avx512": "icelake-server", "fma": "haswell"}
REGISTERS = {"avx512": "zmm", "fma": "ymm"}

ASSEMBLY = """
import sys
from numba import cfunc, types
from logshift.kernels.fma import microkernels, tiles
from logshift.kernels.machine.microkernel import function
assert tiles.FLOAT_TILES[sys.argv[1]].available
function = function(microkernels.__name__, sys.argv[1])
print(cfunc(types.void(types.uintp))(function)._library.get_asm_str())
"""


@needs_x86
@pytest.mark.parametrize("name", [name for name, t in FLOAT_TILES.items() if t.isa.name in CPUS])
def test_products_are_fused_and_sums_stay_in_registers(name):
    tile = FLOAT_TILES[name]
    assembly = printed_for(CPUS[tile.isa.name], ASSEMBLY, name)
    register = REGISTERS[tile.isa.name]
    products = re.findall(rf"\bvfmadd\w+ps\s.*%{register}\d+", assembly)
    if tile.window is None:
        needed = tile.pixels * tile.vectors
        assert products and len(products) % needed == 0
    else:  # each output has all of its taps, once
        assert len(products) == tile.pixels * tile.window[0] ** 2
    assert not re.search(r"\bvmulps", assembly)
    if tile.window is None or tile.window[0] == 3:
        assert not re.search(rf"\bvmov\w+\s+%{register}\d+, -?\d*\(%r[sb]p\)", assembly), "spills"
