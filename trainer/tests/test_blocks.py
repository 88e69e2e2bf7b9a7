"""What second words are chosen for together, against loops over the weights."""

import itertools

import pytest
import torch
from torch import nn

from logshift.trainer.blocks import Blocks
from logshift.trainer.weights import Layout

# outputs, kernel, inputs of a group, groups
LAYERS = [(20, 3, 35, 1), (16, 1, 16, 1), (5, 2, 3, 1), (12, 3, 18, 3), (40, 3, 1, 40)]
KINDS = [("element", 16), ("filter", 16), ("tile", 7), ("tile", (16, 16)), ("tile", (4, 8))]


def numbered(outputs, kernel, inputs, groups, granularity, tile):
    """Return the block of each weight, (O, K), numbered as they are first met in their order."""
    positions = kernel * kernel
    keys = {}
    for o, p, c in itertools.product(range(outputs), range(positions), range(inputs)):
        flat = (o * positions + p) * inputs + c
        if granularity == "element":
            key = (flat,)
        elif granularity == "filter":
            key = (o,)
        elif isinstance(tile, int):
            key = (flat // tile,)
        elif inputs == 1:
            key = (o // tile[1], p, 0)
        else:
            of_group = outputs // groups
            key = (o // of_group, o % of_group // tile[1], p, c // tile[0])
        keys[o, p, c] = key
    order = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return torch.tensor([order[key] for key in keys.values()]).view(outputs, -1), len(order)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("granularity, tile", KINDS, ids=str)
def test_blocks_are_those_of_a_loop_over_the_weights(layer, granularity, tile):
    outputs, kernel, inputs, groups = layer
    blocks = Blocks(outputs, kernel * kernel, inputs, groups, granularity, tile)
    number, count = numbered(*layer, granularity, tile)
    assert blocks.shape[0] * blocks.shape[1] == count
    values = torch.arange(count).view(blocks.shape)
    assert torch.equal(blocks.spread(values), number)
    x = torch.randint(-9, 9, number.shape)
    expected = torch.zeros(count, dtype=x.dtype).index_add_(0, number.flatten(), x.flatten())
    assert torch.equal(blocks.sum(x).flatten(), expected)
    for ratio in (0.0, 0.15, 0.5, 1.0):
        error = torch.randn(number.shape)
        chosen = blocks.select(error, ratio)
        assert int(chosen.sum()) == int(ratio * count + 1e-9)
        energy = blocks.sum(error.double().square())
        if 0 < chosen.sum() < count:
            assert energy[chosen].min() >= energy[~chosen].max()


def test_of_equal_blocks_the_first_are_chosen():
    chosen = Blocks(4, 1, 4).select(torch.ones(4, 4), 0.3)
    assert chosen.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("layer, expected", [
    (nn.Conv2d(35, 20, 3), (20, 9, 35, 1)),
    (nn.Conv2d(36, 18, (1, 3), groups=3), (18, 3, 12, 3)),
    (nn.Conv2d(24, 24, 3, groups=24), (24, 9, 1, 24)),
    (nn.ConvTranspose2d(12, 20, 2, groups=2), (20, 4, 6, 2)),
    (nn.Linear(40, 10), (10, 1, 40, 1)),
])  # fmt: skip
def test_a_layer_has_the_blocks_of_its_shape(layer, expected):
    ours = Layout(layer).blocks("tile", (4, 8))
    numbers = torch.arange(ours.shape[0] * ours.shape[1]).view(ours.shape)
    outputs, positions, inputs, groups = expected
    theirs = Blocks(outputs, positions, inputs, groups, "tile", (4, 8))
    assert torch.equal(ours.spread(numbers), theirs.spread(numbers))
    assert ours.rows == Layout(layer).rows(layer.weight).shape
