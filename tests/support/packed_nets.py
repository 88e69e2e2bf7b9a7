"""A small packed network, pictures for it, and runs compared with those of the reference."""

from __future__ import annotations

import numpy as np
from support.graphs import random_weights

from logshift.runtime import Preprocessing, Session
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.validate import validate


def small_network(height="height", width="width", classes=5):
    """Convolution with residual, pooling and a classifier; any batch and picture size."""
    rng = np.random.default_rng(7)
    q8 = Quantization(0.05, 0, 8)
    nodes = [
        Node("QuantizeLinear", "q", ["picture"], ["x"]),
        Node("Conv", "a", ["x"], ["a"], {"pads": [1, 1, 1, 1], "clamp": [0, None]},
             random_weights(rng, (8, 3, 3, 3), 4, 0.15, 0), rng.standard_normal(8)),
        Node("Conv", "b", ["a", "a"], ["b"], {"pads": [1, 1, 1, 1], "clamp": [0, None]},
             random_weights(rng, (8, 3, 3, 8), 3, 0.15, 0), rng.standard_normal(8)),
        Node("GlobalAveragePool", "p", ["b"], ["p"]),
        Node("Conv", "fc", ["p"], ["l"], {}, random_weights(rng, (classes, 1, 1, 8), 4, 1.0, 0),
             rng.standard_normal(classes)),
        Node("Flatten", "f", ["l"], ["logits"]),
    ]  # fmt: skip
    for node in nodes:
        if node.bias is not None:
            node.bias = node.bias.astype(np.float32)
    graph = Graph(
        [ValueInfo("picture", ("batch", 3, height, width), (1, 3, 12, 10))],
        [ValueInfo("logits", ("batch", classes), (1, classes))],
        {"x": Quantization(0.02, 114, 8), "a": q8, "b": q8, "p": Quantization(0.02, 0, 8)},
        nodes,
        preprocessing=Preprocessing().to_manifest(),
        labels=[f"class {i}" for i in range(classes)],
    )
    validate(graph)
    return graph


def pictures(n=1, height=12, width=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3, height, width)).astype(np.float32)


def check_dot(graph, seed):
    """Compare the family dot with the reference, for some numbers of threads."""
    rng = np.random.default_rng(seed)
    inputs = {
        info.name: rng.standard_normal(info.nominal).astype(np.float32) * 10
        for info in graph.inputs
    }  # fmt: skip
    expected = Session(graph, kernels="reference").run(inputs)
    for threads in (1, 2):
        found = Session(graph, threads=threads, kernels="dot").run(inputs)
        assert found.tobytes() == expected.tobytes()
