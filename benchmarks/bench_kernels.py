"""Kernels on codes that this machine can run, on a few small operations.

    python -m pytest benchmarks/bench_kernels.py

Times are of one kernel call on one thread, its operands in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from logshift.converter.encode import encode
from logshift.kernels import registry
from logshift.runtime import executor
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.plan.planner import Planner
from logshift.runtime.plan.prepare import prepare
from logshift.runtime.plan.program import Plan
from logshift.runtime.validate import validate

# name -> output channels, kernel, input channels per group, group
CONVOLUTIONS = {
    "stem": (32, 3, 3, 1),
    "3x3": (64, 3, 64, 1),
    "1x1": (96, 1, 64, 1),
    "depthwise": (64, 3, 1, 64),
}
# kernel's op -> a node in whose graph it is called: op, attributes, number of inputs, and what
# becomes of 64 channels of 14x14
OTHERS = {
    "quantize": ("Add", {}, 2, (64, 14, 14)),
    "dequantize": ("Add", {}, 2, (64, 14, 14)),
    "pool_max": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}, 1, (64, 7, 7)),
    "pool_average": ("GlobalAveragePool", {}, 1, (64, 1, 1)),
    "add": ("Add", {}, 2, (64, 14, 14)),
    "multiply": ("Mul", {}, 2, (64, 14, 14)),
    "gather": ("Gather", {"indices": list(range(63, -1, -1))}, 1, (64, 14, 14)),
    "copy": ("Concat", {"axis": 2}, 2, (64, 28, 14)),
    "resize": ("Resize", {"mode": "linear", "scales": [2.0, 2.0]}, 1, (64, 28, 28)),
    "depth_to_space": ("DepthToSpace", {"blocksize": 2}, 1, (16, 28, 28)),
}
_SIZE = 14


def graph_of(
    node: Node, channels: int, output: tuple[int, int, int], size: int = _SIZE, bits: int = 8
) -> Graph:
    """Quantize the node's inputs, which are alike, and dequantize its output."""
    q, shape = Quantization(0.05 * 2 ** (8 - bits), 3, bits), (1, channels, size, size)
    infos = [ValueInfo(f"float {name}", shape, shape) for name in node.inputs]
    nodes = [Node("QuantizeLinear", name, [f"float {name}"], [name]) for name in node.inputs]
    nodes += [node, Node("DequantizeLinear", "dequantize", node.outputs, ["output"])]
    quantization = dict.fromkeys([*node.inputs, *node.outputs], q)
    outputs = [ValueInfo("output", (1, *output), (1, *output))]
    graph = Graph(infos, outputs, quantization, nodes)
    validate(graph)
    return graph


def convolution(name: str) -> Graph:
    """One of `CONVOLUTIONS`, padded to "same"."""
    out, kernel, channels, group = CONVOLUTIONS[name]
    w = np.random.default_rng(0).laplace(0, 0.05, (out, kernel, kernel, channels))
    weights = encode(w.astype(np.float32))
    attributes = {"pads": [kernel // 2] * 4, "group": group}
    node = Node("Conv", "conv", ["x"], ["y"], attributes, weights, np.zeros(out, np.float32))
    return graph_of(node, channels * group, (out, _SIZE, _SIZE))


def plan_with(graph: Graph, kernel: registry.Kernel) -> Plan:
    """Plan of a graph that calls a kernel, also where another would be chosen."""
    convolutions = {
        index: [replace(part, kernel=kernel, packed=kernel.pack(part.layer)) for part in parts]
        for index, parts in prepare(graph, "portable").items()
    }
    return Planner(graph, convolutions, kernel.family, 1).plan(graph.nominal_inputs())


def cases() -> Iterator[tuple[Graph, registry.Kernel]]:
    """Yield every kernel with those of the operations above that it supports."""
    convolutions = {name: convolution(name) for name in CONVOLUTIONS}
    for kernel in registry.kernels():
        if not kernel.available():
            continue
        if kernel.op == "conv":
            for name, graph in convolutions.items():
                (part,) = prepare(graph, "portable")[1]
                if kernel.supports is None or kernel.supports(part.layer):
                    yield pytest.param(graph, kernel, id=f"{kernel.name}-{name}")
        elif kernel.op in OTHERS:
            op, attributes, count, output = OTHERS[kernel.op]
            node = Node(op, op, ["x0", "x1"][:count], ["y"], dict(attributes))
            yield pytest.param(graph_of(node, 64, output), kernel, id=kernel.name)


@pytest.mark.parametrize(("graph", "kernel"), list(cases()))
def test_kernel(benchmark, graph: Graph, kernel: registry.Kernel) -> None:
    """Time the calls of one kernel."""
    plan = plan_with(graph, kernel)
    inputs = {info.name: np.zeros(info.nominal, np.float32) for info in graph.inputs}
    outputs = plan.bind(inputs)  # held, like the inputs: the calls know their addresses
    calls = [index for index, step in enumerate(plan.steps) if step.kernel is kernel]
    benchmark(executor.team(1).run, plan.program[calls])
    del outputs
