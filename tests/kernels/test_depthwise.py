"""Depthwise convolutions in rows: the reference's bits from every tile, whatever the geometry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import build, quantizations, random_weights, with_ending
from support.packed_nets import check_dot

from logshift.kernels import registry
from logshift.kernels.dot.tiles import MICROKERNELS
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization
from logshift.runtime.plan.prepare import prepare

TILES = [tile for tile in MICROKERNELS.values() if tile.kind == "rows" and tile.pixels > 1]
each_tile = pytest.mark.parametrize(
    "tile",
    [
        pytest.param(tile, marks=() if tile.available else pytest.mark.skip("instructions"))
        for tile in TILES
    ],
    ids=lambda tile: tile.name,
)


@pytest.fixture
def preferred(tile):
    """Make a tile the choice wherever it is supported."""
    with pytest.MonkeyPatch.context() as patch:
        list(registry.kernels())  # all are there
        key = ("conv", "dot", tile.name)
        patch.setitem(
            registry._REGISTRY, key, replace(registry._REGISTRY[key], cost=lambda layer: -1.0)
        )
        yield


def check(graph, tile, seed):
    """Compare with the reference, for some numbers of threads."""
    ((convolution,),) = prepare(graph, "dot").values()
    assert convolution.kernel.name == f"dot-conv-{tile.name}"
    check_dot(graph, seed)


@st.composite
def graphs(draw, tile):
    """A convolution that a tile supports, and everything else that may vary about it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, channels = draw(st.integers(1, 2)), draw(st.integers(1, 100))
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    dilations = [draw(st.integers(1, 3)) for _ in range(2)]
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    if tile.window is not None:
        rows, columns, strides[1] = tile.window
        kernel = [draw(st.integers(3, rows + 5)), draw(st.integers(columns, 2 * columns + 2))]
        dilations[1] = 1
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = [draw(st.integers(0, extent[i % 2] - 1)) for i in range(4)]
    outputs = [draw(st.integers(1, 4)), draw(st.integers(1, 25))]
    size = [
        max(1, (outputs[i] - 1) * strides[i] + extent[i] - pads[i] - pads[i + 2]) for i in range(2)
    ]
    weights = random_weights(
        rng, (channels, *kernel, 1), draw(st.integers(2, 4)), draw(st.sampled_from([0.0, 1.0])), 0
    )
    q = {"x": draw(quantizations())}
    scale = float(weights.unit().mean() * q["x"].scale * 20 * np.sqrt(kernel[0] * kernel[1]))
    attributes = {"pads": pads, "strides": strides, "dilations": dilations, "group": channels}
    conv = Node("Conv", "conv", ["x"], ["y"], attributes, weights)
    height, width = (
        (size[i] + pads[i] + pads[i + 2] - extent[i]) // strides[i] + 1 for i in range(2)
    )
    inputs = {"input": (n, channels, *size)}
    return with_ending(draw, rng, conv, q, inputs, scale, (n, channels, height, width))


@each_tile
@pytest.mark.usefixtures("preferred")
@pytest.mark.hypothesis
def test_equals_reference(tile):
    @given(data=st.data(), seed=st.integers(0, 2**16))
    def compare(data, seed):
        check(data.draw(graphs(tile)), tile, seed)

    compare()


@each_tile
@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("kernel", [(7, 7), (31, 31), (6, 13)])
def test_large_kernels(tile, kernel):
    rng = np.random.default_rng(0)
    stride = tile.window[2] if tile.window else 1
    weights = random_weights(rng, (70, *kernel, 1), 4, 0.15, 0)
    pads = [kernel[0] // 2, kernel[1] // 2] * 2
    conv = Node(
        "Conv", "conv", ["x"], ["y"], {"pads": pads, "strides": [stride] * 2, "group": 70}, weights
    )
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"]), conv]
    check(build(nodes, {"x": Quantization(0.1, 9, 8)}, {"input": (1, 70, 9, 20)}, "y"), tile, 1)


@each_tile
@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_weights_and_codes(tile, sign):
    rows, columns, stride = tile.window or (3, 3, 1)
    first = np.full((33, rows, columns, 1), 7 if sign > 0 else 15, np.uint8)
    weights = LogWeights(first, np.zeros_like(first), np.ones(33, np.float32), 4)
    conv = Node("Conv", "conv", ["x"], ["y"], {"strides": [1, stride], "group": 33}, weights)
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"]), conv]
    graph = build(nodes, {"x": Quantization(1.0, 0, 8)}, {"input": (1, 33, 6, 20)}, "y")
    x = np.full((1, 33, 6, 20), 255, np.float32)
    found = Session(graph, kernels="dot").run(x)
    assert np.array_equal(found, Session(graph, kernels="reference").run(x))
    assert found.any()
