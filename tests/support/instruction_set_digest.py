"""Print a digest of what the fast kernels compute; run under different NUMBA_CPU_* settings."""

import hashlib

import numpy as np
from support.graphs import build, random_inputs, random_weights

from logshift.kernels.activation import Activation
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization


def network():
    """Every kernel once."""
    rng = np.random.default_rng(3)
    q = {
        "x": Quantization(0.03, 100, 8), "a": Quantization(0.9, 3, 8),
        "b": Quantization(0.5, 7, 7), "c": Quantization(0.5, 7, 7), "e": Quantization(0.02, 5, 8),
        "f": Quantization(0.3, 0, 5), "g": Quantization(0.4, 9, 8), "h": Quantization(0.4, 9, 8),
        "i": Quantization(0.4, 9, 8), "j": Quantization(3.0, 128, 8),
        "k": Quantization(3.0, 128, 8), "l": Quantization(0.4, 9, 8),
        "m": Quantization(11.0, 20, 8), "n": Quantization(5.0, 90, 8),
        "o": Quantization(5.0, 90, 8), "p": Quantization(0.4, 9, 8),
    }  # fmt: skip
    pads = {"pads": [1, 1, 1, 1]}
    weights = {
        "a": (37, 3, 3, 5), "b": (37, 3, 3, 1), "j": (20, 2, 2, 37), "y": (16, 3, 3, 5),
    }  # fmt: skip
    codes = {k: random_weights(rng, v, 4, 0.15, 0) for k, v in weights.items()}
    codes["j"] = random_weights(rng, weights["j"], 5, 0.5, 2)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Conv", "dense", ["x"], ["a"], pads, codes["a"]),
        Node("Conv", "depthwise", ["a"], ["b"], pads | {"group": 37}, codes["b"]),
        Node("MaxPool", "max", ["b"], ["c"], {"kernel_shape": [3, 3], **pads}),
        Node("AveragePool", "average", ["c"], ["e"], {"kernel_shape": [2, 2]}),
        Node("Lookup", "table", ["e"], ["f"]),
        Node("Concat", "concat", ["e", "f"], ["g"], {"axis": 3}),
        Node("Resize", "resize", ["g"], ["h"], {"mode": "linear", "sizes": [9, 11]}),
        Node("Add", "add", ["h", "h"], ["i"]),
        Node("GlobalMaxPool", "largest", ["i"], ["l"]),
        Node("Mul", "multiply", ["l", "i"], ["m"]),
        Node("Sub", "subtract", ["m", "l"], ["n"]),
        Node("Gather", "shuffle", ["n"], ["o"], {"indices": [i * 19 % 37 for i in range(37)]}),
        Node("Lookup", "tables", ["o"], ["p"]),
        Node("ConvTranspose", "up", ["p"], ["j"], {"strides": [2, 2]}, codes["j"]),
        Node("DepthToSpace", "d2s", ["j"], ["k"], {"blocksize": 2}),
        Node("Conv", "last", ["k"], ["y"], pads, codes["y"]),
    ]
    nodes[5].table = rng.integers(0, 32, 256).astype(np.uint8)
    nodes[13].table = rng.integers(0, 256, (37, 256)).astype(np.uint8)
    for node in nodes:
        if node.weights is not None:
            node.bias = rng.standard_normal(node.weights.shape[0]).astype(np.float32)
    return build(nodes, q, {"input": (2, 5, 10, 9)}, "y")


FUNCTIONS = [
    None,
    Activation("PRelu", 0.0, 1.0, np.float32([0.2])),
    Activation("HardSwish", -3.0, 6.0, np.zeros(0, np.float32)),
    Activation("Piecewise", 0.0, 5e-4, np.arange(-4800, 4800, 200).astype(np.int16).reshape(3, 16)),
]


def with_function(channels, function, bits=4, group=1):
    """A convolution with a residual, and a function, or a lookup that it does itself."""
    rng = np.random.default_rng(channels)
    inputs = 8 if group == 1 else channels
    weights = random_weights(rng, (channels, 3, 3, inputs // group), bits, 0.15, 0)
    q = {
        "x": Quantization(0.03, 100, 8), "a": Quantization(0.5, 30, 8),
        "b": Quantization(0.5, 120, 8), "c": Quantization(0.02, 5, 8),
    }  # fmt: skip
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("QuantizeLinear", "q_a", ["other"], ["a"]),
        Node("Conv", "conv", ["x", "a"], ["b"], {"pads": [1] * 4, "group": group}, weights),
        Node("Lookup", "table", ["b"], ["c"]),
        Node("DequantizeLinear", "d", ["c"], ["y"]),
    ]
    nodes[2].bias = rng.standard_normal(channels).astype(np.float32)
    nodes[2].activation = function
    nodes[3].table = rng.integers(0, 256, 256).astype(np.uint8)
    return build(nodes, q, {"input": (1, inputs, 7, 9), "other": (1, channels, 7, 9)}, "y")


def digest(kernels):
    """Hash of all tensors of the network, and of outputs of tiles of every width."""
    graph = network()
    tensors = Session(graph, kernels=kernels).trace_codes(random_inputs(graph))
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(tensors[name].tobytes())
    for function in FUNCTIONS:
        graphs = [with_function(channels, function) for channels in (16, 24, 32, 64)]
        graphs.append(with_function(40, function, bits=5))  # weights of int16
        graphs.append(with_function(40, function, group=40))
        for graph in graphs:
            result.update(Session(graph, kernels=kernels).run(random_inputs(graph)).tobytes())
    return result.hexdigest()


if __name__ == "__main__":
    print(digest("auto"), digest("shift"))
