"""Shifts and additions: no multiplication in the code, and the reference's bits."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.assembly import needs_x86, printed_for
from support.graphs import build, random_inputs, random_weights

from logshift.kernels import registry
from logshift.kernels.shift import family
from logshift.kernels.shift.adders import ADDERS
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization
from logshift.runtime.plan.prepare import prepare

CPUS = {"avx512": "icelake-server", "avx2": "haswell", "any": "x86-64"}
REGISTERS = {"avx512": "zmm", "avx2": "ymm", "any": "xmm"}

# What a panel goes through: rows made from codes, added, and results brought back.
ASSEMBLY = """
import sys
from numba import cfunc, types
from logshift.kernels.shift import adders
adder = adders.ADDERS[sys.argv[1]]
assert adder.available
vector, vectors, digits, group = adder.vector, adder.vectors, adder.digits, adder.group
lanes, count, pixels = adder.lanes, vectors // digits, adder.pixels
half_vector, half_vectors, half_step = adder.half or (vector, vectors, vector)
def add(panel, stream, sums):
    adders.add_rows(panel, stream, sums, vector, vectors, vector, lanes, group)
def add_half(panel, stream, sums):
    adders.add_rows(panel, stream, sums, half_vector, half_vectors, half_step, lanes, group)
def gather(table, offset, target):
    adders.gather(table, offset, target, vector, count, lanes, digits)
def scatter(source, table, offset):
    adders.scatter(source, table, offset, vector, count, pixels)
for function in (add, add_half, gather, scatter):
    compiled = cfunc(types.void(*3 * [types.uintp]))(function)
    print(compiled._library.get_asm_str())
"""
MULTIPLICATION = re.compile(r"\b(v?p?mul\w*|imul\w*|v?pmadd\w*|v?fn?m(?:add|sub)\w*|v?pdp\w*)\s")


@needs_x86
@pytest.mark.parametrize("name", [name for name, adder in ADDERS.items() if adder.isa.name in CPUS])
def test_nothing_multiplies(name):
    adder = ADDERS[name]
    assembly = printed_for(CPUS[adder.isa.name], ASSEMBLY, name)
    additions = re.findall(rf"\bv?paddb\s.*%{REGISTERS[adder.isa.name]}\d+", assembly)
    # Single rows are widened before they are added.
    assert len(additions) >= (7 * adder.vectors if adder.group == 8 else 0)
    assert re.search(rf"\bv?paddw\s.*%{REGISTERS[adder.isa.name]}\d+", assembly)
    assert MULTIPLICATION.findall(assembly) == []


@pytest.mark.parametrize("instruction", ["vpmullw", "imulq", "vpmaddubsw", "vfmadd231ps", "mulsd"])
def test_multiplications_would_be_found(instruction):
    assert MULTIPLICATION.findall(f"\tvpaddb\t%ymm0, %ymm1\n\t{instruction}\t%ymm0, %ymm1, %ymm2\n")


def network(o, kernel, channels, group, activation_bits, weights, size=7, strides=1, batch=1):
    """A convolution with a residual, "same" padding, and codes for inputs and outputs."""
    rng = np.random.default_rng(o)
    pads = {"pads": [kernel // 2] * 4, "strides": [strides] * 2, "group": group}
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("QuantizeLinear", "q2", ["other"], ["r"]),
        Node("Conv", "conv", ["x", "r"], ["y"], pads, weights),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
    ]
    nodes[2].bias = rng.standard_normal(o).astype(np.float32)
    x = Quantization(0.05, 3, activation_bits)
    scale = float(
        weights.unit().mean() * 0.05 * 2**activation_bits * np.sqrt(weights.first[0].size)
    )
    q = {"x": x, "r": Quantization(scale, 77, 8), "y": Quantization(scale, 100, 8)}
    out = -(-size // strides)
    inputs = {"input": (batch, channels, size, size), "other": (batch, o, out, out)}
    return build(nodes, q, inputs, "z")


CASES = {
    "several blocks of rows": (40, 3, 64, 1, 5, 3, 0.15, 0),
    "several blocks of digits": (40, 3, 64, 1, 8, 4, 0.15, 0),
    "a block that ends within a tap": (17, 3, 100, 1, 5, 4, 0.5, 0),
    "sets that overlap": (37, 3, 37, 37, 8, 4, 0.15, 0),
    "groups that share a panel": (48, 3, 24, 12, 5, 3, 0.15, 0),
    "groups larger than a piece": (60, 3, 60, 3, 8, 4, 1.0, 0),
    "segments by the range of sums": (20, 3, 64, 1, 8, 5, 1.0, 0),
    "a finer second word": (20, 3, 40, 1, 8, 4, 1.0, 4),
    "one output of many inputs": (1, 5, 70, 1, 5, 2, 0.0, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "strides"), [(7, 1), (7, 2), (9, 1), (11, 1)])
def test_equals_reference(case, size, strides):
    """Panels of which all pixels, more or less than half, or a few are outputs."""
    o, kernel, channels, group, activation_bits, bits, ratio, residual_shift = CASES[case]
    rng = np.random.default_rng(5)
    shape = (o, kernel, kernel, channels // group)
    weights = random_weights(rng, shape, bits, ratio, residual_shift)
    graph = network(o, kernel, channels, group, activation_bits, weights, size, strides)
    inputs = random_inputs(graph)
    expected = Session(graph, threads=1, kernels="reference").run(inputs)
    assert len(np.unique(expected)) > 10
    (layer,) = [parts[0].layer for parts in prepare(graph, "reference").values()]
    serving = [k for k in registry.kernels() if k.family == "shift" and k.available()]
    serving = [k for k in serving if k.supports(layer)]
    assert serving
    for kernel in serving:  # also those of narrower registers, which nobody chooses here
        with pytest.MonkeyPatch.context() as patch:
            chosen = replace(kernel, cost=lambda layer: -1.0)
            patch.setitem(
                registry._REGISTRY, ("conv", "shift", kernel.name[len("shift-conv-") :]), chosen
            )
            for threads in (1, 2):
                session = Session(graph, threads=threads, kernels="shift")
                assert kernel.name in {layer.kernel for layer in session.summary().layers}
                assert np.array_equal(session.run(inputs), expected), (kernel.name, threads)


def test_panels_across_pictures():
    weights = random_weights(np.random.default_rng(5), (20, 3, 3, 40), 3, 0.15, 0)
    graph = network(20, 3, 40, 1, 5, weights, batch=3)
    inputs = random_inputs(graph)
    expected = Session(graph, kernels="reference").run(inputs)
    assert np.array_equal(Session(graph, kernels="shift").run(inputs), expected)


@given(counts=arrays(np.int64, (2, 7), elements=st.integers(0, 30)), group=st.sampled_from([1, 8]))
def test_groups_are_filled_up(counts, group):
    """No more groups than before, and every row as often, in units of the smallest exponent."""
    buckets = np.zeros((2, 7, 60 + 2 * group), np.int64)
    buckets[:, :, :30] = np.random.default_rng(counts.sum()).integers(1, 100, (2, 7, 30))
    filled = counts.copy()

    def units(counts):
        total = np.zeros((2, 100), np.int64)
        for (sign, exponent), count in np.ndenumerate(counts):
            np.add.at(total[sign], buckets[sign, exponent, :count], 2**exponent)
        return total

    expected = units(counts)
    family._fill_up(buckets, filled, group)
    assert np.array_equal(units(filled), expected)
    assert (-(-filled // group)).sum() <= (-(-counts // group)).sum()


@pytest.mark.parametrize("activation_bits", [5, 8])
@pytest.mark.parametrize("sign", [0, 8])
def test_largest_sums_and_no_sums(activation_bits, sign):
    first = np.zeros((18, 3, 3, 128), np.uint8)
    first[1::2] = 7 + sign  # every other channel is zero
    weights = LogWeights(first, np.zeros_like(first), np.ones(18, np.float32), 4)
    graph = network(18, 3, 128, 1, activation_bits, weights)
    inputs = {"input": np.full((1, 128, 7, 7), 1e9), "other": np.zeros((1, 18, 7, 7))}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    expected = Session(graph, kernels="reference").run(inputs)
    assert np.array_equal(Session(graph, kernels="shift").run(inputs), expected)


def test_auto_takes_it_where_there_are_no_products_of_bytes(monkeypatch):
    """Not for depthwise convolutions, nor for a few pixels; and never where there are."""
    rng = np.random.default_rng(5)
    dense = random_weights(rng, (40, 3, 3, 64), 4, 0.15, 0)
    depthwise = random_weights(rng, (40, 3, 3, 1), 4, 0.15, 0)
    graphs = [
        network(40, 3, 64, 1, 8, dense),
        network(40, 3, 64, 1, 8, dense, size=1),
        network(40, 3, 40, 40, 8, depthwise),
    ]

    def families():
        chosen = [next(iter(prepare(graph, "auto").values()))[0].kernel for graph in graphs]
        return [kernel.family for kernel in chosen]

    if any(k.family == "dot" and k.available() for k in registry.kernels()):
        assert families() == ["dot"] * 3
    without = {
        key: replace(k, available=lambda: False) if k.family == "dot" else k
        for key, k in registry._REGISTRY.items()
    }
    monkeypatch.setattr(registry, "_REGISTRY", without)
    assert families() == ["shift", "portable", "portable"]
