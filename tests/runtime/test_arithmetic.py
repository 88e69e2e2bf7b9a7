"""Sums and products of two tensors of codes, shuffles and tables by channel: what they compute."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from support import oracle
from support.graphs import build, random_inputs, random_weights

from logshift.kernels.errors import FormatError, InputError
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization, ValueInfo
from logshift.runtime.plan import work
from logshift.runtime.validate import validate

UNIT = Quantization(1.0, 0, 8)


def network(node, inputs, quantizations, padded=False):
    """Graph of one node on quantized inputs; `padded`: all its tensors lie inside borders."""
    names = list(inputs)
    nodes = [Node("QuantizeLinear", f"quantize {x}", [f"float {x}"], [x]) for x in names]
    nodes += [node, Node("DequantizeLinear", "dequantize", node.outputs, ["z"])]
    q = dict(zip([*names, *node.outputs], quantizations, strict=True))
    floats = {f"float {name}": shape for name, shape in inputs.items()}
    if padded:
        rng = np.random.default_rng(0)
        channels = build(nodes, q, floats, "z").outputs[0].nominal[1]
        shapes = {name: shape[1] for name, shape in inputs.items()} | {node.outputs[0]: channels}
        for name, c in shapes.items():
            weights = random_weights(rng, (1, 4, 5, c), 4, 0.0, 0)
            pads = {"pads": [3, 2, 3, 4]}
            nodes.append(Node("Conv", f"conv {name}", [name], [f"sum {name}"], pads, weights))
    return build(nodes, q, floats, "z")


def compute(op, a, b, scales=(1.0, 1.0, 1.0), **attributes):
    """Codes that an operation gives on single codes; zero points are 0, 0 and 100."""
    q = [Quantization(scales[i], (0, 0, 100)[i], 8) for i in range(3)]
    graph = network(
        Node(op, op, ["a", "b"], ["y"], attributes), {"a": (1, 1, 1, 1), "b": (1, 1, 1, 1)}, q
    )
    x = {"float a": a, "float b": b}
    x = {name: np.full((1, 1, 1, 1), v, np.float32) for name, v in x.items()}
    codes = {
        int(Session(graph, kernels=k).trace_codes(x)["y"].item()) for k in ("reference", "portable")
    }
    (code,) = codes
    return code


def test_results_by_hand():
    assert compute("Add", 20, 30) == 150
    assert compute("Sub", 20, 30) == 90
    assert compute("Mul", 5, 7) == 135
    assert compute("Mul", 5, 7, (1.0, 1.0, 2.0)) == 118  # 117.5 to even
    assert compute("Mul", 3, 7, (1.0, 1.0, 2.0)) == 110  # 110.5 to even
    assert compute("Mul", 200, 200) == 255
    assert compute("Sub", 0, 255) == 0
    assert compute("Mul", 5, 7, clamp=[None, 120]) == 120
    assert compute("Sub", 20, 30, clamp=[100, None]) == 100


BROADCASTS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("full", [(2, 61, 3, 5), (2, 61, 2, 137), (1, 5000, 2, 2)])
def test_all_ways_to_broadcast(op, full):
    """Rows shorter than what is repeated at once, longer by parts that differ, longer pixels."""
    q = [Quantization(0.1, 100, 8), Quantization(0.3, 31, 7), Quantization(2.0, 90, 8)]
    for axes in BROADCASTS:
        one = tuple(1 if once else size for size, once in zip(full, axes, strict=True))
        other = tuple(size if once else 1 for size, once in zip(full, axes, strict=True))
        for shapes in ((full, one), (one, full), (one, other)):
            node = Node(op, op, ["a", "b"], ["y"])
            inputs = dict(zip("ab", shapes, strict=True))
            graph = network(node, inputs, q, padded=full[1] < 100)
            x = random_inputs(graph, seed=math.prod(one))
            expected = oracle.evaluate(graph, x)["y"]
            assert expected.shape == full
            for threads in (1, 2, 3):
                actual = Session(graph, threads=threads, kernels="portable").trace_codes(x)["y"]
                assert np.array_equal(actual, expected), (shapes, threads)


@pytest.mark.parametrize("share", [1, 2000])
def test_threads_share_rows_and_channels(share, monkeypatch):
    monkeypatch.setattr(work, "SHARE", share)
    rng = np.random.default_rng(4)
    shape = (2, 150, 5, 7)
    table = rng.integers(0, 256, (150, 256)).astype(np.uint8)
    q = [Quantization(0.1, 100, 8)] * 3
    for node, inputs in (
        (Node("Mul", "n", ["a", "b"], ["y"]), {"a": shape, "b": (2, 150, 1, 1)}),
        (Node("Lookup", "n", ["a"], ["y"], table=table), {"a": shape}),
        (Node("Gather", "n", ["a"], ["y"], {"indices": [0, 75, 1, 76, 2]}), {"a": shape}),
        (Node("GlobalMaxPool", "n", ["a"], ["y"]), {"a": shape}),
    ):
        graph = network(node, inputs, q[: len(inputs) + 1], padded=True)
        x = random_inputs(graph, seed=1)
        expected = oracle.evaluate(graph, x)["y"]
        for threads in (1, 3, 8):
            actual = Session(graph, threads=threads, kernels="portable").trace_codes(x)["y"]
            assert np.array_equal(actual, expected), (node.op, threads)


def test_largest_and_smallest_scales_stay_finite():
    for scales in ((1e10, 1e5, 1.0), (1e-14, 1e-14, 1e14), (1e14, 1e14, 1e14)):
        for op in ("Add", "Sub", "Mul"):
            q = [Quantization(s, 128, 8) for s in scales]
            graph = network(
                Node(op, op, ["a", "b"], ["y"]), {"a": (1, 3, 8, 9), "b": (1, 3, 1, 1)}, q
            )
            x = random_inputs(graph)
            expected = oracle.evaluate(graph, x)["y"]
            for kernels in ("reference", "portable"):
                assert np.array_equal(Session(graph, kernels=kernels).trace_codes(x)["y"], expected)


# --- what is refused ----------------------------------------------------------------------------


def refused(node, inputs, quantizations, message):
    with pytest.raises(FormatError, match=message):
        network(node, inputs, quantizations)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_shapes_that_do_not_broadcast(op):
    node = Node(op, op, ["a", "b"], ["y"])
    for other in ((1, 2, 4, 5), (1, 3, 2, 5), (2, 3, 4, 6), (1, 3, 4, 4)):
        refused(node, {"a": (3, 3, 4, 5), "b": other}, [UNIT] * 3, "cannot broadcast")
    refused(node, {"a": (1, 3, 4, 5), "b": (3, 4, 5)}, [UNIT] * 3, "rank 4")


def test_products_that_could_overflow():
    node = Node("Mul", "mul", ["a", "b"], ["y"])
    shapes = {"a": (1, 1, 1, 1), "b": (1, 1, 1, 1)}
    huge, tiny = Quantization(1e14, 0, 8), Quantization(1e-14, 0, 8)
    refused(node, shapes, [huge, huge, tiny], "absurdly large")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "missing"),
        (np.zeros(255, np.uint8), r"shape \(255,\)"),
        (np.zeros((0, 256), np.uint8), r"shape \(0, 256\)"),
        (np.zeros((3, 1, 256), np.uint8), "shape"),
        (np.zeros(256, np.int64), "int64"),
        (np.zeros((2, 256), np.uint8), "2 channels"),
        (np.full((3, 256), 128, np.uint8), "no output codes"),
    ],
)
def test_tables_that_do_not_fit(table, message):
    node = Node("Lookup", "table", ["a"], ["y"], table=table)
    refused(node, {"a": (1, 3, 2, 2)}, [UNIT, Quantization(1.0, 0, 7)], message)


@pytest.mark.parametrize("indices", [[], [3], [-1], [0.0], [True], 1, None, [2**40], [0] * 65537])
def test_channels_that_cannot_be_gathered(indices):
    node = Node("Gather", "gather", ["a"], ["y"], {"indices": indices})
    refused(node, {"a": (1, 3, 2, 2)}, [UNIT, UNIT], "channel 3|indices")


def test_inputs_of_a_run_are_checked_like_the_nominal_ones():
    channels = ValueInfo("float a", (1, "channels", 2, 2), (1, 3, 2, 2))
    for node, message in (
        (Node("Gather", "n", ["a"], ["y"], {"indices": [0, 2]}), "channel 2"),
        (Node("Lookup", "n", ["a"], ["y"], table=np.zeros((3, 256), np.uint8)), "3 channels"),
    ):
        graph = network(node, {"a": (1, 3, 2, 2)}, [UNIT, UNIT])
        graph.inputs = [channels]
        validate(graph)
        with pytest.raises(InputError, match=message):
            Session(graph).run(np.zeros((1, 2, 2, 2), np.float32))
    graph = network(
        Node("Mul", "n", ["a", "b"], ["y"]), dict.fromkeys("ab", (2, 3, 2, 2)), [UNIT] * 3
    )
    graph.inputs = [ValueInfo(f"float {x}", (x, 3, 2, 2), (2, 3, 2, 2)) for x in "ab"]
    validate(graph)
    a, b = np.ones((1, 3, 2, 2), np.float32), np.ones((3, 3, 2, 2), np.float32)
    assert Session(graph).run({"float a": a, "float b": b}).shape == (3, 3, 2, 2)
    with pytest.raises(InputError, match="cannot broadcast"):
        Session(graph).run({"float a": b, "float b": np.ones((2, 3, 2, 2), np.float32)})
