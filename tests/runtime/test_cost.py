"""Counts of shifts and adds, bits and cycles, on networks small enough to count by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import build
from support.scripts import make
from support.tiles import tile_numbers, tilings

from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import InputError, Session
from logshift.runtime.cost import LayerCost, cost
from logshift.runtime.file import format as packed_format
from logshift.runtime.graph import Node, Quantization

Q8, Q5 = Quantization(0.05, 3, 8), Quantization(0.1, 0, 5)


def weights(first, second, shape, bits=4):
    """Weights of these codes, rows of [O, K]."""
    first, second = (np.array(codes, np.uint8).reshape(shape) for codes in (first, second))
    return LogWeights(first, second, np.ones(shape[0], np.float32), bits)


def network(conv, channels, height, width, batch=1):
    """One convolution of 8-bit codes `x` (and their like `r`) to 5-bit codes `y`."""
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"])]
    inputs = {"input": (batch, channels, height, width)}
    quantization = {"x": Q8, "y": Q5}
    if "r" in conv.inputs:
        inputs["other"] = (batch, conv.weights.shape[0], height, width)
        quantization["r"] = Q8
        nodes.append(Node("QuantizeLinear", "q_r", ["other"], ["r"]))
    nodes += [conv, Node("DequantizeLinear", "d", ["y"], ["z"])]
    return build(nodes, quantization, inputs, "z")


def dense():
    """Three rows of four weights, at 4x4 positions; row 0 has a second word on a first of 0."""
    first = [[1, 0, 2, 3], [0, 0, 0, 9], [1, 1, 1, 1]]
    second = [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]
    conv = Node("Conv", "conv", ["x"], ["y"], {}, weights(first, second, (3, 1, 2, 2)))
    return network(conv, 2, 4, 5)


def only(graph, **options):
    """The one layer of a graph."""
    (layer,) = cost(graph, **options).layers
    assert layer.first + layer.skipped == layer.macs
    return layer


def test_every_count_of_a_convolution():
    assert only(dense(), tile=(2, 3)) == LayerCost(
        name="conv",
        op="Conv",
        weight_shape=(3, 1, 2, 2),
        macs=16 * 12,
        first=16 * 8,
        skipped=16 * 4,
        second=16 * 2,
        weights=12,
        weight_bits=4 * 12 + 4 * 2 + 12,  # a list would take 16 + 2 * 8 bits
        activations=2 * 4 * 5 + 3 * 4 * 4,
        activation_bits=8 * 2 * 4 * 5 + 5 * 3 * 4 * 4,
        cycles_first=16 * 4,
        cycles=16 * (4 + 2),
        # Of 12 weights two have a second word: two tiles of 4, two of 2.
        cycles_element=pytest.approx(16 * (4 + 2 * (1 - 28 / 66) + 2 * (1 - 45 / 66))),
        cycles_all=16 * 8,
    )


@pytest.mark.parametrize(
    ("tile", "tiles", "two_word_tiles"),
    [
        ((1, 1), 12, 2),
        ((1, 4), 6, 2),
        ((3, 1), 4, 2),
        ((2, 2), 4, 2),
        ((1, 2), 6, 2),
        ((3, 4), 2, 2),
        ((16, 16), 2, 2),
        ((10**30, 10**30), 2, 2),
    ],
)
def test_tiles_at_the_edges_are_tiles(tile, tiles, two_word_tiles):
    layer = only(dense(), tile=tile)
    assert layer.cycles_first == 16 * tiles
    assert layer.cycles == 16 * (tiles + two_word_tiles)
    assert layer.cycles_all == 16 * 2 * tiles


def test_a_grouped_convolution_with_padding_a_batch_and_a_residual():
    first = np.ones((4, 18), np.uint8)
    first[1, :5] = 0
    second = np.zeros((4, 18), np.uint8)
    second[3, 17] = 1
    conv = Node(
        "Conv", "conv", ["x", "r"], ["y"], {"group": 2, "pads": [1, 1, 1, 1]},
        weights(first, second, (4, 3, 3, 2), bits=3),
    )  # fmt: skip
    layer = only(network(conv, 4, 6, 7, batch=3), tile=(2, 16))
    positions = 3 * 6 * 7
    assert layer.macs == positions * 72
    assert layer.skipped == positions * 5
    assert layer.second == positions
    assert layer.weight_bits == 3 * 73 + 16 + 8
    assert layer.activations == 3 * positions * 4
    assert layer.activation_bits == (8 + 8 + 5) * positions * 4
    # Two outputs of each group at nine kernel positions.
    assert (layer.cycles_first, layer.cycles) == (18 * positions, 19 * positions)


def test_a_transposed_convolution_uses_its_weights_once_per_input_position():
    codes = np.zeros((2, 12), np.uint8)
    conv = Node(
        "ConvTranspose", "conv", ["x"], ["y"], {"strides": [2, 2]},
        weights(codes + 1, codes, (2, 2, 2, 3)),
    )  # fmt: skip
    layer = only(network(conv, 3, 5, 4))
    assert layer.macs == layer.first == 20 * 24
    assert layer.activations == 3 * 20 + 2 * 80
    assert layer.weight_bits == 4 * 24
    assert layer.cycles == layer.cycles_first == layer.cycles_element == 20 * 4


def test_a_float32_output_has_32_bits():
    conv = Node("Conv", "conv", ["x"], ["y"], {}, weights([[1, 2]], [[0, 0]], (1, 1, 1, 2)))
    graph = build(
        [Node("QuantizeLinear", "q", ["input"], ["x"]), conv], {"x": Q5}, {"input": (1, 2, 3, 3)},
        "y",
    )  # fmt: skip
    assert only(graph).activation_bits == 5 * 18 + 32 * 9


def test_totals():
    record = cost(dense(), tile=(2, 3)).to_dict()
    assert record["tile"] == (2, 3)
    assert record["energy_pj"] == pytest.approx(
        {"stlq": 160 * (0.13 + 0.1), "int8": 192 * (0.2 + 0.1), "float32": 192 * (3.7 + 0.9)}
    )
    assert record["weight_bits"] == {"stlq": 68, "int8": 96, "float32": 384}
    assert record["activation_bits"] == {"stlq": 560, "int8": 704, "float32": 2816}
    assert record["cycle_ratio"] == 1.5
    counted = cost(make.classifier())
    for name, value in counted.total.items():
        assert value == sum(getattr(layer, name) for layer in counted.layers) > 0


@pytest.mark.parametrize("graph", [make.classifier(), make.upscaler()])
def test_multiplications_are_those_of_the_summary(graph):
    summary = Session(graph, kernels="reference").summary()
    expected = [(layer.name, layer.macs) for layer in summary.layers if layer.macs]
    assert [(layer.name, layer.macs) for layer in cost(graph).layers] == expected


def test_a_network_without_convolutions_costs_nothing():
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("DequantizeLinear", "d", ["x"], ["z"]),
    ]
    counted = cost(build(nodes, {"x": Q8}, {"input": (1, 2, 3, 3)}, "z"))
    assert counted.layers == [] and not any(counted.total.values())
    assert "0.00 MMAC" in str(counted)


@given(
    case=tilings(6), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]), seed=st.integers(0, 2**32 - 1)
)
def test_cycles_are_those_of_the_twin(case, share, seed):
    shape, (inputs, outputs), group = case
    numbers = tile_numbers(shape, (inputs, outputs), group)
    second = (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)
    code = weights(np.ones(shape), second, shape)
    conv = Node("Conv", "conv", ["x"], ["y"], {"group": group}, code)
    layer = only(network(conv, shape[3] * group, *shape[1:3]), tile=(outputs, inputs))
    tiles, total, chosen = numbers.max() + 1, second.size, int(second.sum())
    assert layer.cycles_first == tiles and layer.cycles_all == 2 * tiles
    assert layer.cycles == tiles + len(set(numbers[second != 0]))
    # Of all ways to choose as many, those that leave a tile without.
    without = sum(
        Fraction(math.comb(total - size, chosen), math.comb(total, chosen))
        for size in map(int, np.bincount(numbers.ravel()))
    )
    assert layer.cycles_element == pytest.approx(2 * tiles - float(without))


def test_expected_cycles_of_a_large_layer():
    """Where tiles are few of all weights it is nearly the binomial's 1 - (1 - p)^n."""
    shape = (512, 3, 3, 512)
    second = np.random.default_rng(0).random(shape) < 0.01
    code = weights(np.ones(shape), second, shape)
    layer = only(network(Node("Conv", "conv", ["x"], ["y"], {}, code), 512, 3, 3))
    two_word = layer.cycles_element / layer.cycles_first - 1
    assert two_word == pytest.approx(1 - (1 - code.nzr) ** 256, abs=1e-4)
    assert layer.cycles == pytest.approx(layer.cycles_element, rel=0.01)  # it was drawn at random


def test_words_of_tiles_have_a_bit_for_each_tile():
    second = np.zeros((4, 1, 1, 8), np.uint8)
    second[2:, ..., :4] = 1
    second[2, ..., 0] = 0
    code = weights(np.ones(second.shape), second, second.shape)
    layers = [
        only(network(Node("Conv", "conv", ["x"], ["y"], {}, each), 8, 2, 2))
        for each in (code, replace(code, tile=(4, 2)), replace(code, tile=(8, 4)))
    ]
    # A bitmap; four tiles and all eight words of one; one tile and all words are more than a map.
    assert [layer.weight_bits - 4 * 32 for layer in layers] == [28 + 32, 4 + 4 * 8, 28 + 32]


@pytest.mark.parametrize("tile", [(0, 16), (16, -1)])
def test_a_tile_has_sides(tile):
    with pytest.raises(InputError, match="at least 1"):
        cost(dense(), tile=tile)


# --- the command --------------------------------------------------------------------------------


def call(*arguments):
    """Run the command in this process; what it leaves with."""
    pytest.importorskip("typer", reason="needs the extra `cli`")
    from logshift.converter import cli

    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return stop.value.code


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "net.stlq"
    packed_format.write(dense(), path)
    return path


def test_info_counts(capsys, packed):
    assert not call("info", packed, "--cost", "--tile", "2x3", "--json")
    record = json.loads(capsys.readouterr().out)
    expected = cost(dense(), tile=(2, 3)).to_dict()
    assert record == json.loads(json.dumps(expected))
    assert not call("info", packed, "--cost")
    text = capsys.readouterr().out
    assert text == f"{cost(dense())}\n"
    sides = "tiles of 16 outputs x 16 inputs"
    for part in ("3x1x2x2", sides, "by element", "not measured on this CPU"):
        assert part in text


def test_info_counts_by_the_tiles_of_the_file(capsys, packed):
    graph = make.tiled()
    for node in graph.nodes:
        if node.weights is not None and node.name != "few":  # by 16 inputs, 4 outputs
            none = np.zeros_like(node.weights.second)
            node.weights = replace(node.weights, second=none, tile=None)
    packed_format.write(graph, packed)
    assert not call("info", packed, "--cost")
    assert capsys.readouterr().out == f"{cost(graph, tile=(4, 16))}\n"
    assert not call("info", packed, "--cost", "--tile", "16x16")
    assert capsys.readouterr().out == f"{cost(graph)}\n"
    packed_format.write(make.tiled(), packed)  # of several sizes
    assert not call("info", packed, "--cost")
    assert capsys.readouterr().out == f"{cost(make.tiled())}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost", "--tile", "16"], "like 16x16"),
        (["--cost", "--tile", "16x16x16"], "like 16x16"),
        (["--cost", "--tile", "axb"], "like 16x16"),
        (["--cost", "--tile", "0x16"], "at least 1"),
        (["--cost", "--kernels"], "give one of them"),
    ],
)
def test_mistakes_are_one_line(packed, options, message):
    error = call("info", packed, *options)
    assert error.startswith("error: ") and message in error and "\n" not in error
