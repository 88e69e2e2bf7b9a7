"""Every kernel against its slow twin: the same codes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.graphs import GRAPHS, build, concatenations, random_inputs, random_weights

from logshift.kernels import registry
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization, ValueInfo

FAST = ("portable", "dot", "shift")
KINDS = GRAPHS | {"Concat": concatenations()}


def assert_same(expected, actual, context):
    """Assert that two dicts of tensors hold the same bits."""
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, (context, name)
        assert tensor.tobytes() == actual[name].tobytes(), (context, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.hypothesis
def test_fast_equals_reference_equals_numpy(kind):
    @settings(max_examples=60, deadline=None)
    @given(graph=KINDS[kind], seed=st.integers(0, 2**16))
    def check(graph, seed):
        inputs = random_inputs(graph, seed)
        expected = Session(graph, threads=1, kernels="reference").trace_codes(inputs)
        tensors = oracle.evaluate(graph, inputs)
        names = [info.name for info in graph.outputs]
        for name in graph.quantization:
            assert np.array_equal(tensors[name], expected[name]), name
        for kernels in FAST:
            for threads in (1, 2):
                session = Session(graph, threads=threads, kernels=kernels)
                assert_same(expected, session.trace_codes(inputs), (kind, kernels, threads))
                # A trace keeps every tensor; a run fuses and reuses what it can.
                output = session.run(inputs)
                assert_same({k: expected[k] for k in names}, {names[0]: output}, (kind, kernels))

    check()


@pytest.mark.parametrize("size", [(130, 1), (65, 1), (1, 70), (3, 67)])
@pytest.mark.parametrize("channels", [3, 7])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
def test_columns_are_quantized_as_rows_are(size, channels, pads):
    rng = np.random.default_rng(0)
    weights = random_weights(rng, (4, 1, 1 + pads[3], channels), 4, 0.15, 0)
    if pads[0]:
        weights = random_weights(rng, (4, 2, 1, channels), 4, 0.15, 0)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Conv", "conv", ["x"], ["y"], {"pads": pads}, weights),
    ]
    graph = build(nodes, {"x": Quantization(0.1, 100, 8)}, {"input": (2, channels, *size)}, "y")
    inputs = random_inputs(graph)
    expected = Session(graph, threads=1, kernels="reference").trace_codes(inputs)
    for threads in (1, 2):
        session = Session(graph, threads=threads, kernels="portable")
        assert_same(expected, session.trace_codes(inputs), threads)
        np.testing.assert_array_equal(session.run(inputs), expected["y"])


@pytest.mark.parametrize("size", [(1, 1), (1, 15), (5, 16), (130, 1), (3, 67), (20, 20)])
@pytest.mark.parametrize("channels", [1, 3, 15, 16, 21, 64, 70])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_codes_become_values_in_planes(size, channels, pads):
    """Those that a convolution with a border reads as well, and others."""
    weights = random_weights(np.random.default_rng(0), (4, 3, 3, channels), 4, 0.15, 0)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("MaxPool", "p", ["x"], ["y"], {"kernel_shape": [1, 1]}),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
        Node("Conv", "conv", ["y"], ["v"], {"pads": [1, 1, 1, 1]}, weights),
    ][: 4 if any(pads) else 3]
    q = {name: Quantization(0.1, 100, 8) for name in "xy"}
    graph = build(nodes, q, {"input": (2, channels, *size)}, "v" if any(pads) else "z")
    if any(pads):
        graph.outputs.append(ValueInfo("z", (2, channels, *size), (2, channels, *size)))
    inputs = random_inputs(graph)
    expected = Session(graph, threads=1, kernels="reference").run(inputs)
    for threads in (1, 2):
        found = Session(graph, threads=threads, kernels="portable").run(inputs)
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("channels", [3, 15, 16, 21, 63, 64, 70, 133])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 2, 0]}),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]}),
        ("Resize", {"mode": "linear", "sizes": [13, 20]}),
        ("Resize", {"mode": "linear", "scales": [0.6, 0.7]}),
        ("Resize", {"mode": "nearest", "scales": [2.0, 2.0]}),
        ("Slice", {"axes": [2, 3], "starts": [1, 0], "ends": [9, 9], "steps": [2, 3]}),
    ],
)
def test_any_number_of_channels_fits_vectors(op, attributes, channels):
    q = dict.fromkeys(("x", "y"), Quantization(0.1, 100, 8))
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]), Node(op, "node", ["x"], ["y"], attributes),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
    ]  # fmt: skip
    graph = build(nodes, q, {"input": (2, channels, 7, 8)}, "z")
    inputs = random_inputs(graph)
    expected = Session(graph, threads=1, kernels="reference").run(inputs)
    for threads in (1, 2):
        np.testing.assert_array_equal(
            Session(graph, threads=threads, kernels="portable").run(inputs), expected
        )


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("signs", ["plus", "minus", "pairs", "halves"])
def test_largest_weights_and_codes_do_not_overflow(bits, signs):
    shape = (17, 3, 3, 8)
    largest = 2 ** (bits - 1) - 1  # the field e of the largest magnitude
    negative = {
        "plus": np.zeros(shape, bool),
        "minus": np.ones(shape, bool),
        "pairs": np.arange(np.prod(shape)).reshape(shape) // 2 % 2 == 1,
        "halves": np.arange(np.prod(shape)).reshape(shape) % 72 >= 36,
    }[signs]
    first = np.where(negative, largest + 2 ** (bits - 1), largest).astype(np.uint8)
    # At 3 bits both words may be at their largest, at 4 bits the bound is the first word's.
    second = first if bits == 3 else np.zeros_like(first)
    weights = LogWeights(first, second, np.ones(17, np.float32), bits, clip=2 if bits == 3 else 1)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Conv", "conv", ["x"], ["y"], {}, weights),
    ]
    graph = build(nodes, {"x": Quantization(1.0, 0, 8)}, {"input": (1, 8, 5, 9)}, "y")
    x = np.full((1, 8, 5, 9), 255, np.float32)
    expected = Session(graph, kernels="reference").run(x)
    for kernels in FAST:
        assert np.array_equal(Session(graph, kernels=kernels).run(x), expected)


@pytest.mark.parametrize("scales", [(1e3, None), (1e-9, 1e3), (1e3, 1e3)])
def test_outputs_beyond_int32_are_clamped(scales):
    """Scales of the input and of a residual against which that of the output is tiny."""
    rng = np.random.default_rng(0)
    scale_x, scale_r = scales
    q = {"x": Quantization(scale_x, 100, 8), "y": Quantization(1e-9, 7, 8)}
    conv = Node("Conv", "conv", ["x"], ["y"], {"clamp": [3, 250]})
    conv.weights = random_weights(rng, (40, 3, 3, 5), 4, 0.15, 0)
    nodes, inputs = [Node("QuantizeLinear", "q", ["input"], ["x"])], {"input": (1, 5, 6, 7)}
    if scale_r is not None:
        q["r"], inputs["other"] = Quantization(scale_r, 100, 8), (1, 40, 4, 5)
        nodes.append(Node("QuantizeLinear", "q_r", ["other"], ["r"]))
        conv.inputs.append("r")
    nodes += [conv, Node("DequantizeLinear", "d", ["y"], ["z"])]
    graph = build(nodes, q, inputs, "z")
    x = {
        info.name: (rng.standard_normal(info.nominal) * 50 * scale).astype(np.float32)
        for info, scale in zip(graph.inputs, scales, strict=False)
    }
    expected = Session(graph, kernels="reference").run(x)
    for kernels in FAST:
        assert np.array_equal(Session(graph, kernels=kernels).run(x), expected)


def test_every_operation_has_a_reference_and_a_portable_kernel():
    operations = {k.op for k in registry.kernels()}
    for op in operations:
        families = {k.family for k in registry.kernels() if k.op == op}
        known = {name for names in registry.FAMILIES.values() for name in names}
        assert {"reference", "portable"} <= families <= known


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "pad", "extra", "count"),
    [
        (5, 2, 2, 0, 0, 2),  # a row of phases is one convolution
        (1, 3, 3, 0, 0, 3),
        (5, 2, 2, 0, 1, 4),  # the first phase has an output more than the second one
        (24, 3, 3, 0, 1, 6),
        (5, 4, 2, 1, 0, 4),  # phases begin at different inputs
        (5, 4, 4, 1, 2, 8),  # the last phase begins one input later
        (5, 1, 3, 0, 0, 6),  # two phases have no taps
        (16, 2, 2, 0, 0, 4),  # channels fill vectors as they are
    ],
)
def test_phases_of_a_transposed_convolution_are_joined_where_they_read_alike(
    channels, kernel, stride, pad, extra, count
):
    rng = np.random.default_rng(channels)
    weights = random_weights(rng, (channels, kernel, kernel, 6), 4, 0.2, 0)
    attributes = {
        "strides": [stride] * 2, "pads": [pad] * 4, "output_padding": [extra] * 2
    }  # fmt: skip
    conv = Node("ConvTranspose", "conv", ["x", "r"], ["y"], attributes, weights)
    conv.bias = rng.standard_normal(channels).astype(np.float32)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("QuantizeLinear", "s", ["other"], ["r"]),
        conv,
        Node("Lookup", "l", ["y"], ["t"], table=rng.integers(0, 256, 256).astype(np.uint8)),
        Node("DequantizeLinear", "d", ["t"], ["z"]),
    ]
    size = stride * 4 + extra + kernel - 2 * pad
    q = {name: Quantization(0.1, 9, 8) for name in "xryt"}
    inputs = {"input": (2, 6, 5, 5), "other": (2, channels, size, size)}
    graph = build(nodes, q, inputs, "z")
    inputs = random_inputs(graph)
    expected = oracle.evaluate(graph, inputs)["z"]
    for kernels in registry.FAMILIES:
        session = Session(graph, threads=2, kernels=kernels)
        assert [len(found) for found in session._planner.convolutions.values()] == [count]
        assert np.array_equal(session.run(inputs), expected), kernels
