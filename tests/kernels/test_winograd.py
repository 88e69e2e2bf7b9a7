"""Winograd convolution: exactly the direct one, also at its bounds, and only where they hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.graphs import build, quantizations, random_weights, with_ending
from support.packed_nets import check_dot

from logshift.kernels import registry
from logshift.kernels.dot.tiles import MICROKERNELS
from logshift.kernels.layer import Layer
from logshift.kernels.machine.targets import has_features
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization
from logshift.runtime.plan.prepare import prepare

KERNELS = [k for k in registry.kernels() if "winograd" in k.variant]

B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])


def name_of_choice(graph):
    """Name of the kernel that the only convolution of a graph gets."""
    ((convolution,),) = prepare(graph, "dot").values()
    return convolution.kernel.name


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: k.variant)
def kernel(request):
    """Make a Winograd kernel the choice wherever it is supported."""
    kernel = request.param
    # What is written for AVX-VNNI compiles to AVX-512's instructions on vectors of as many lanes,
    # and what is written for SSSE3 runs on all machines that have more.
    needed = {"avxvnni": ("avx512vnni", "avx512vl"), "ssse3": ("ssse3",)}
    isa = kernel.variant.partition("-")[0] + "-"  # neon is not neondot
    alike = isa in needed and has_features(needed[isa])
    if not (kernel.available() or alike):
        pytest.skip("another machine's instructions")
    with pytest.MonkeyPatch.context() as patch:
        key = (kernel.op, kernel.family, kernel.variant)
        chosen = replace(kernel, cost=lambda layer: -1.0, available=lambda: True)
        patch.setitem(registry._REGISTRY, key, chosen)
        yield kernel


@st.composite
def graphs(draw):
    """A convolution of 3x3 with 32 channels or more, and everything else that may vary about it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, out, channels = draw(st.integers(1, 3)), draw(st.integers(32, 72)), draw(st.integers(1, 140))
    pads = [draw(st.integers(0, 2)) for _ in range(4)]
    size = [draw(st.integers(max(1, 3 - pads[i] - pads[i + 2]), 9)) for i in range(2)]
    bits, ratio = draw(st.integers(2, 4)), draw(st.sampled_from([0.0, 0.15, 1.0]))
    weights = random_weights(rng, (out, 3, 3, channels), bits, ratio, 0)
    if bits == 4:  # one of 9, of which any fits
        taps = rng.integers(0, 9, (out, channels, 1)) == np.arange(9)
        for words in (weights.first, weights.second):
            words *= taps.transpose(0, 2, 1).reshape(words.shape)
    q = {"x": draw(quantizations())}
    scale = float(weights.unit().mean() * q["x"].scale * 20 * np.sqrt(9 * channels))
    conv = Node("Conv", "conv", ["x"], ["y"], {"pads": pads}, weights)
    height, width = (size[i] + pads[i] + pads[i + 2] - 2 for i in range(2))
    inputs = {"input": (n, channels, *size)}
    return with_ending(draw, rng, conv, q, inputs, scale, (n, out, height, width))


@given(graph=graphs(), seed=st.integers(0, 2**16))
def test_equals_reference(kernel, graph, seed):
    assume(name_of_choice(graph) == kernel.name)
    check_dot(graph, seed)


def convolution(weights, x, bits, attributes=None):
    """Graph of one convolution with float output, whose codes are its input."""
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Conv", "conv", ["x"], ["y"], attributes or {}, weights),
    ]
    return build(nodes, {"x": Quantization(1.0, 0, bits)}, {"input": x.shape}, "y")


@pytest.mark.parametrize("bits, largest", [(5, 8), (6, 4), (2, 8), (6, 8), (6, 14)])
@pytest.mark.parametrize("channels", [4, 33, 200])
def test_extremes_of_every_position(kernel, bits, largest, channels):
    """Weights and codes that reach both ends of each of the 16 positions, and every mix of them."""
    of_weights, of_codes = (
        np.sign(np.einsum("pi,qj->pqij", m, m)).reshape(16, *2 * m.shape[1:]) for m in (G, B_T)
    )
    signs = np.concatenate([of_weights, -of_weights])[..., None] * np.ones(channels)
    # Codes of 4 bits, the sign above the exponent: 4, 4 + 4 and 16 - 2.
    words = {4: (3, 0), 8: (3, 3), 14: (5, 8 + 2)}[largest]
    first, second = (
        np.select([signs > 0, signs < 0], [word, word ^ 8 if word else 0]).astype(np.uint8)
        for word in words
    )
    weights = LogWeights(first, second, np.ones(32, np.float32), 4)
    top = 2**bits - 1
    x = np.concatenate([of_codes > 0, of_codes < 0, np.ones((1, 4, 4)), np.zeros((1, 4, 4))])
    x = np.repeat(x[:, None] * np.float32(top), channels, axis=1).astype(np.float32)
    graph = convolution(weights, x, bits)
    # Where pairs are summed with saturation, both cannot be large.
    saturates = MICROKERNELS[kernel.variant].kind == "winograd"
    fits = not saturates or largest * 2**bits <= 256
    assert (name_of_choice(graph) == kernel.name) == fits
    expected = Session(graph, kernels="reference").run(x)
    assert np.array_equal(Session(graph, kernels="dot").run(x), expected)


def test_several_strips(kernel):
    rng = np.random.default_rng(0)
    weights = random_weights(rng, (40, 3, 3, 64), 3, 0.15, 0)
    x = rng.integers(0, 32, (2, 64, 33, 34)).astype(np.float32)
    graph = convolution(weights, x, 5, {"pads": [1, 1, 1, 1]})
    assert name_of_choice(graph) == kernel.name
    expected = Session(graph, kernels="reference").run(x)
    for threads in (1, 2, 5):
        assert np.array_equal(Session(graph, threads=threads, kernels="dot").run(x), expected)


def layer(out=64, channels=64, kernel=3, bits=3, **changes):
    """Build a layer like those of ResNet-18."""
    first = np.random.default_rng(0).integers(0, 2**bits, (out, kernel, kernel, channels), np.uint8)
    weights = LogWeights(first, np.zeros_like(first), np.ones(out, np.float32), bits)
    m = np.ones(out, np.float32)
    return replace(Layer(weights, 1, (1, 1), (1, 1), 5, 0, m, m, 49), **changes)


def cost_of_the_direct_way(kernel, layer):
    """Return the least cost of the other kernels for the same instructions."""
    isa = kernel.variant.partition("-")[0] + "-"  # neon is not neondot
    others = (k for k in registry.kernels() if k.family == "dot" and "winograd" not in k.variant)
    return min(k.cost(layer) for k in others if k.variant.startswith(isa) and k.supports(layer))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.variant)
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_chosen_for_resnet18(kernel, channels):
    resnet = layer(channels, channels)
    assert kernel.supports(resnet)
    assert kernel.cost(resnet) < cost_of_the_direct_way(kernel, resnet)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.variant)
@pytest.mark.parametrize(
    "other",
    [
        layer(strides=(2, 2)), layer(strides=(1, 2)), layer(dilations=(1, 2)),
        layer(activation_bits=7), layer(group=2), layer(kernel=1), layer(kernel=5),
        layer(bits=4), layer(out=4),
    ],
)  # fmt: skip
def test_not_supported(kernel, other):
    assert not kernel.supports(other)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.variant)
def test_few_channels_are_left_to_the_direct_way(kernel):
    assert cost_of_the_direct_way(kernel, layer(16, 16)) < kernel.cost(layer(16, 16))
