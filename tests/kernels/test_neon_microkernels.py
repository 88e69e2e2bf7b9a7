"""Microkernels for aarch64 compile to the instructions that they are named after, anywhere."""

from __future__ import annotations

import re

import pytest
from support import adder_code, cross

from logshift.kernels.dot import microkernels as dot
from logshift.kernels.dot.tiles import MICROKERNELS
from logshift.kernels.fma import microkernels as fma
from logshift.kernels.fma.tiles import FLOAT_TILES
from logshift.kernels.machine import targets
from logshift.kernels.machine.isa.neon import NEON
from logshift.kernels.shift.adders import ADDERS

MACHINES = {"neon": cross.NEON, "neondot": cross.NEON_DOT, "neoni8mm": cross.NEON_I8MM}
TILES = {name: k for name, k in MICROKERNELS.items() if k.isa.name in MACHINES}
ADDITIONS = {name: adder for name, adder in ADDERS.items() if adder.isa.name in MACHINES}
FLOATS = {name: tile for name, tile in FLOAT_TILES.items() if tile.isa.name in MACHINES}


def printed(module, tiles, name):
    """Return the assembly of one microkernel; those of an instruction set are compiled at once."""
    isa = tiles[name].isa.name
    names = tuple(other for other, tile in tiles.items() if tile.isa.name == isa)
    return cross.printed(*MACHINES[isa], module.__name__, names)[name]


def products_of(loop, instruction):
    return sum(bool(re.match(rf"(?:{instruction})\b", line)) for line in loop)


@pytest.mark.parametrize("name", TILES)
def test_steps_take_lanes_of_codes_and_touch_no_stack(name):
    """And there are no more products than are needed, of several steps without a broadcast."""
    kernel = TILES[name]
    assembly = printed(dot, TILES, name)
    instruction = {"matrix": "usmmla", "dot": "sdot", "winograd_dot": "sdot"}.get(
        kernel.kind, "smlal2?"
    )
    loops = [lines for lines in cross.inner_loops(assembly) if products_of(lines, instruction)]
    assert loops
    per_vector = {
        "pair": 2, "dot": 1, "matrix": 1, "wide": 4, "depthwise": 1, "winograd": 2,
        "winograd_dot": 2,
    }[kernel.kind]  # fmt: skip
    pixels = max(kernel.pixels, 2) if kernel.kind == "matrix" else kernel.pixels
    per_step = per_vector * pixels * kernel.vectors
    for lines in loops:
        count = products_of(lines, instruction)
        assert count % per_step == 0
        assert not any("[sp" in line for line in lines)
        if "dot" in kernel.kind and count > per_step:
            assert len([line for line in lines if re.search(r"\.4b\[\d\]$", line)]) == count
    others = {"sdot", "udot", "sudot", "usdot", "ummla", "usmmla"} - {instruction}
    assert not re.search(rf"\b({'|'.join(others)})\s", assembly)


@pytest.mark.parametrize("name", TILES)
def test_outputs_are_rounded_once_packed_and_looked_up(name):
    assembly = printed(dot, TILES, name)
    for instruction in ("fcvtns", "sqxtn", "sqxtun", "tbl", "tbx"):
        assert re.search(rf"\b{instruction}\b", assembly), instruction
    # Without fused functions nothing but a sum is converted, once, and nothing is divided.
    assert not re.search(r"\b(frint\w|fcvtzs|fdiv|bl)\b", assembly)


@pytest.mark.parametrize("name", FLOATS)
def test_float_products_are_fused_and_touch_no_stack(name):
    tile = FLOATS[name]
    assembly = printed(fma, FLOATS, name)
    products = re.findall(r"\bfmla\s+v\d+\.4s", assembly)
    if tile.window is None:
        assert products and len(products) % (tile.pixels * tile.vectors) == 0
    else:  # each output has all of its taps, once; its first may be a product alone
        assert len(products) == tile.pixels * tile.window[0] ** 2
    assert not re.search(r"\bfmul\b", assembly)
    for lines in cross.inner_loops(assembly):
        if products_of(lines, "fmla") and tile.window is None:
            assert not any("[sp" in line for line in lines)


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_multiply_nothing_and_touch_no_stack(name):
    adder = ADDITIONS[name]
    assembly = printed(adder_code, ADDITIONS, name)
    assert not re.search(
        r"\b(mul|\w+mull?\w*|f?ml[as]\w*|[su]ml[as]l\w*|m(add|sub)|\w*dot)\s", assembly
    )
    (loop,) = [lines for lines in cross.inner_loops(assembly) if products_of(lines, "usra")]
    assert not any("[sp" in line for line in loop)
    additions = [line for line in loop if re.match(r"add\s+v\d+\.16b", line)]
    assert len(additions) == (adder.group - 1) * adder.vectors
    assert products_of(loop, "usra") == adder.vectors  # sums of odd bytes are widened by adding


@pytest.mark.slow
@pytest.mark.parametrize("cpu", sorted(targets._ARM.keys() - {"generic"}))
def test_no_inner_loop_touches_the_stack_on_any_cpu(cpu):
    """LLVM orders instructions by CPU, which may cost registers. (By no CPU, it does.)"""
    has = targets._ARM[cpu]
    own = "neoni8mm" if "i8mm" in has else "neondot" if "dotprod" in has else "neon"
    features = ",".join(f"+{name}" for name in sorted(has))
    count = 0
    for module, tiles in ((dot, TILES), (fma, FLOATS)):
        names = tuple(n for n, tile in tiles.items() if tile.isa is NEON or tile.isa.name == own)
        for name, text in cross.printed(cpu, features, module.__name__, names).items():
            for lines in cross.inner_loops(text):
                assert not any("[sp" in line for line in lines), name
                count += 1
    assert count > 20
