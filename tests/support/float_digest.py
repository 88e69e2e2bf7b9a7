"""Print a digest of what the fast kernels on float32 compute; run under different NUMBA_CPU_*."""

import hashlib

import numpy as np
from support.float_driver import Picture, call, convolution, program, sizes
from support.graphs import network, node

from logshift.kernels import functions, registry
from logshift.kernels.layer import FloatLayer
from logshift.runtime import Session, executor
from logshift.runtime.onnx_ops.recurrent import GATES

# Output channels, kernel, input channels of a group, group, stride
LAYERS = [
    (37, 3, 5, 1, 1), (64, 1, 33, 1, 1), (24, 3, 8, 1, 2), (20, 3, 4, 5, 1), (7, 2, 3, 1, 1),
    (37, 3, 1, 37, 1), (40, 3, 1, 40, 2), (16, 5, 1, 16, 1), (19, 2, 1, 19, 1), (24, 5, 1, 24, 2),
    (128, 1, 20, 1, 1),
]  # fmt: skip
# Each on many pixels, and on one.
FLOAT_CONVOLUTIONS = {
    f"{layer} of {side}": (layer, side) for layer in LAYERS for side in (9, layer[1])
}


def random(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


def float_convolution(name, kernel):
    """Output of a kernel, or of that of a family; None if it does not support the layer."""
    (out, size, depth, group, stride), side = FLOAT_CONVOLUTIONS[name]
    rng = np.random.default_rng(list(FLOAT_CONVOLUTIONS).index(name))
    weights, bias = random(rng, (out, size, size, depth)), random(rng, out)
    count = (side - size) // stride + 1
    layer = FloatLayer(weights, group, (stride, stride), (1, 1), bias, count**2)
    if isinstance(kernel, str):
        kernel = registry.kernel("float_conv", kernel, layer)
    if not kernel.supports(layer):
        return None
    x = Picture(random(rng, (1, side, side, depth * group)))
    y = Picture(np.zeros((1, count, count, out), np.float32))
    r = Picture(random(rng, y.inside.shape))
    arguments, keep = convolution(kernel, layer, x, y, r)
    steps, scratch = program(kernel, arguments, 1)
    executor.team(1).run(steps)
    del keep, scratch
    return y.buffer


def results(family):
    """Yield what kernels of a family compute from the same random numbers."""
    rng = np.random.default_rng(9)
    for name in FLOAT_CONVOLUTIONS:
        yield float_convolution(name, family)
    x = Picture(3 * random(rng, (2, 9, 11, 5)))
    y = Picture(np.zeros_like(x.buffer))
    for function in range(len(functions.UNARY_FUNCTIONS)):
        fields = {"function": function, "alpha": 0.3, "beta": 0.6}
        call(registry.kernel("float_unary", family), 1, {"x": x, "y": y}, **sizes(y), **fields)
        yield y.buffer
    every = [f"{key}_step_{axis}" for key in "xr" for axis in "nhwc"]
    steps, pictures = dict.fromkeys(every, 1), {"x": x, "r": Picture(x.buffer), "y": y}
    for op in ("float_add", "float_sub", "float_mul"):
        call(registry.kernel(op, family), 1, pictures, **sizes(y), **steps, lo=-9, hi=9)
        yield y.buffer
    window = dict.fromkeys(
        ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w"), 1
    )
    window |= {"kernel_h": 3, "kernel_w": 2, "high_h": 11, "high_w": 12}
    window |= {"count_high_h": 11, "count_high_w": 12, "lo": -9, "hi": 9}
    x = Picture(random(rng, (2, 11, 12, 5)))
    for op in ("float_pool_max", "float_pool_average"):
        call(registry.kernel(op, family), 1, {"x": x, "y": y}, **sizes(y), **window)
        yield y.buffer
    tables = {
        f"{axis}_index{n}": np.arange(11) // 2 + n for axis in ("row", "column") for n in (0, 1)
    }
    tables |= {f"{axis}_weight": rng.random(11, np.float32) for axis in ("row", "column")}
    call(
        registry.kernel("float_resize", family), 1, {"x": x, "y": y}, **sizes(y), linear=1, **tables
    )
    yield y.buffer


def onnx_results(family):
    """Yield what ONNX operators as they are compute."""
    functions = (
        "Clip", "Abs", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg",
        "Reciprocal", "Round", "Sigmoid", "Softsign", "Swish", "Tanh",
    )  # fmt: skip
    of_two = ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")
    reductions = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2")
    nodes = [node(op, ["x"], op) for op in functions]
    nodes.append(node("Sqrt", ["Abs"], "Sqrt"))
    nodes += [node(op, ["x", "r"], op) for op in of_two]
    nodes += [node(op, ["x", axes], op + axes) for op in reductions for axes in ("first", "last")]
    nodes += [node("Softmax", ["x"], f"Softmax{axis}", axis=axis) for axis in (1, 2)]
    nodes.append(node("Transpose", ["x"], "Transpose", perm=[2, 0, 1]))
    nodes += [
        node("MatMul", names, f"MatMul{names}") for names in (("wide", "tall"), ("tall", "wide"))
    ]
    nodes.append(node("LayerNormalization", ["x", "factors"], "LayerNormalization"))
    nodes.append(node("InstanceNormalization", ["x", "few", "few"], "InstanceNormalization"))
    nodes += [
        node(op, ["x", f"{op}/w", f"{op}/r"], op, hidden_size=19, direction="bidirectional")
        for op in GATES
    ]
    rng = np.random.default_rng(10)
    constants = {"first": np.array([0, 1]), "last": np.array([-1])}
    constants |= {"factors": random(rng, 75), "few": random(rng, 7)}
    for op, gates in GATES.items():
        constants[f"{op}/w"] = random(rng, (2, gates * 19, 75)) / 8
        constants[f"{op}/r"] = random(rng, (2, gates * 19, 19)) / 8
    inputs = {"x": 3 * random(rng, (3, 7, 75)), "r": random(rng, (7, 1))}
    inputs |= {"wide": random(rng, (2, 1, 13, 71)), "tall": random(rng, (3, 71, 13))}
    graph = network(nodes, inputs, [each.outputs[0] for each in nodes], constants, opset=24)
    session = Session(graph, threads=1, kernels=family)
    assert len(session._plan(inputs).parts) == 1
    yield from session.run(inputs).values()


def digest(family):
    """Hash of all results."""
    result = hashlib.sha256()
    for buffer in (*results(family), *onnx_results(family)):
        result.update(buffer.tobytes())
    return result.hexdigest()


if __name__ == "__main__":
    print(digest("auto"))
