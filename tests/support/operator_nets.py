"""ONNX operators, each in a small model, and what packed operators it becomes."""

from __future__ import annotations

import numpy as np
from support.onnx_nets import SHAPE

# --- operators: name -> (function of a Net that returns outputs, packed operators) ---------------


def _reshape_sizes(net, x, *sizes):
    return net.node("Reshape", x, net.constant(sizes, np.int64))


def batch_norm(net, x, channels=4):
    scale, shift, mean = net.random(channels), net.random(channels), net.random(channels)
    variance = net.constant(net.rng.uniform(0.5, 2.0, channels))
    return net.node("BatchNormalization", x, scale, shift, mean, variance)


def _hard_swish(net, x):
    """HardSwish as old exporters write it."""
    shifted = net.node("Add", x, net.constant(3.0))
    clipped = net.node("Clip", shifted, net.constant(0.0), net.constant(6.0))
    return net.node("Div", net.node("Mul", x, clipped), net.constant(6.0))


def resized(net, x, how, **attributes):
    empty = ""
    scales = net.constant([1, 1, *how]) if "." in str(how) else empty
    sizes = empty if scales else net.constant([SHAPE[0], SHAPE[1], *how], np.int64)
    return net.node("Resize", x, empty, scales, sizes, **attributes)


def _depthwise(net, x, **attributes):
    return net.conv(x, group=4, **attributes)


def _transpose(net, x, group=1, **attributes):
    weight = net.random(4, 6 // group, 3, 3)
    return net.node("ConvTranspose", x, weight, net.random(6), group=group, **attributes)


OPERATORS = {
    "conv": (lambda n: n.conv("x"), ["Conv"]),
    "conv without bias": (lambda n: n.node("Conv", "x", n.random(3, 4, 1, 1)), ["Conv"]),
    "conv, strides, dilations, uneven pads": (
        lambda n: n.conv("x", strides=[2, 1], dilations=[1, 2], pads=[1, 2, 0, 1]), ["Conv"]),
    "conv, groups": (lambda n: n.conv("x", out=6, group=2), ["Conv"]),
    "conv, depthwise": (lambda n: _depthwise(n, "x"), ["Conv"]),
    "conv, SAME_UPPER": (
        lambda n: n.conv("x", kernel=4, strides=[2, 2], pads=None, auto_pad="SAME_UPPER"),
        ["Conv"]),
    "conv, SAME_LOWER": (
        lambda n: n.conv("x", kernel=4, pads=None, auto_pad="SAME_LOWER"), ["Conv"]),
    "conv, VALID": (lambda n: n.conv("x", pads=None, auto_pad="VALID"), ["Conv"]),
    "conv and output used twice": (
        lambda n: (n.conv("x"), n.conv(n.nodes[-1].output[0])), ["Conv", "Conv"]),
    "transposed conv": (
        lambda n: _transpose(n, "x", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        ["ConvTranspose"]),
    "transposed conv, groups": (
        lambda n: _transpose(n, "x", group=2, strides=[2, 1], dilations=[1, 2]),
        ["ConvTranspose"]),
    "transposed conv, SAME_UPPER": (
        lambda n: _transpose(n, "x", strides=[2, 2], auto_pad="SAME_UPPER"), ["ConvTranspose"]),
    "transposed conv, output_shape": (
        lambda n: _transpose(n, "x", strides=[2, 2], output_shape=[16, 15]), ["ConvTranspose"]),
    "gemm after flatten": (
        lambda n: n.node("Gemm", n.node("Flatten", "x"), n.random(5, 256), n.random(5), transB=1),
        ["Conv"]),
    "gemm, alpha and beta": (
        lambda n: n.node("Gemm", n.node("Flatten", "x"), n.random(256, 5), n.random(1, 5),
                         alpha=0.5, beta=2.0), ["Conv"]),
    "matmul and add": (
        lambda n: n.node("Add", n.node("MatMul", _reshape_sizes(n, "x", -1, 256),
                                       n.random(256, 5)), n.random(5)), ["Conv"]),
    "two gemms with relu": (
        lambda n: n.node("Gemm", n.node("Relu", n.node("Gemm", n.node("Flatten", "x"),
                         n.random(256, 7))), n.random(7, 3)), ["Conv", "Conv"]),
    "batch norm after conv": (lambda n: batch_norm(n, n.conv("x")), ["Conv"]),
    "batch norm after transposed conv": (
        lambda n: batch_norm(n, _transpose(n, "x"), 6), ["ConvTranspose"]),
    "batch norm alone": (lambda n: n.node("Relu", batch_norm(n, "x")), ["Conv"]),
    "scale per channel": (lambda n: n.node("Mul", "x", n.random(4, 1, 1)), ["Lookup"]),
    "subtraction from channels": (
        lambda n: n.node("Sub", n.random(1, 4, 1, 1), "x"), ["Lookup"]),
    "slope per channel": (lambda n: n.node("PRelu", "x", n.random(4, 1, 1)), ["Lookup"]),
    "product": (lambda n: n.node("Mul", n.conv("x"), n.conv("x")), ["Conv", "Conv", "Mul"]),
    "difference": (lambda n: n.node("Sub", n.conv("x"), n.conv("x")), ["Conv", "Conv", "Sub"]),
    "squeeze and excitation": (
        lambda n: n.node("Mul", "x", n.node("Sigmoid", n.conv(n.node("GlobalAveragePool", "x"),
                                                              kernel=1))),
        ["GlobalAveragePool", "Conv", "Mul"]),
    "sum with one value per picture": (
        lambda n: n.node("Add", "x", n.conv("x", out=1)), ["Conv", "Add"]),
    "swish": (
        lambda n: n.node("Mul", n.conv("x"), n.node("Sigmoid", "Conv0")), ["Conv"]),
    "division after conv": (
        lambda n: n.node("Div", n.conv("x"), n.constant(3.0)), ["Conv"]),
    "relu after conv": (lambda n: n.node("Relu", n.conv("x")), ["Conv"]),
    "clip after conv": (
        lambda n: n.node("Clip", n.conv("x"), n.constant(0.0), n.constant(6.0)), ["Conv"]),
    "relu then min": (
        lambda n: n.node("Min", n.node("Relu", n.conv("x")), n.constant(2.0)), ["Conv"]),
    "add": (lambda n: n.node("Add", n.node("Relu", "x"), n.node("MaxPool", "x",
            kernel_shape=[1, 1])), ["Lookup", "MaxPool", "Add"]),
    "sum and relu": (
        lambda n: n.node("Relu", n.node("Sum", "x", n.node("MaxPool", "x", kernel_shape=[1, 1]))),
        ["MaxPool", "Add"]),
    "residual": (
        lambda n: n.node("Relu", n.node("Add", n.conv("x"), "x")), ["Conv"]),
    "residual of two convs": (
        lambda n: n.node("Add", n.conv("x"), n.conv("x", kernel=1)), ["Conv", "Conv"]),
    "max pool": (
        lambda n: n.node("MaxPool", n.node("Relu", n.conv("x")), kernel_shape=[3, 3],
                         strides=[2, 2], pads=[1, 1, 1, 1]), ["Conv", "MaxPool"]),
    "max pool, ceil_mode": (
        lambda n: n.node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        ["MaxPool"]),
    "average pool": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 2], strides=[2, 2],
                         pads=[1, 0, 1, 1]), ["AveragePool"]),
    "average pool, count_include_pad": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                         count_include_pad=1), ["AveragePool"]),
    "average pool, SAME_UPPER": (
        lambda n: n.node("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2],
                         auto_pad="SAME_UPPER"), ["AveragePool"]),
    "global average pool and flatten": (
        lambda n: n.node("Flatten", n.node("GlobalAveragePool", "x")), ["GlobalAveragePool"]),
    "global max pool": (lambda n: n.node("GlobalMaxPool", "x"), ["GlobalMaxPool"]),
    "reduce mean": (
        lambda n: n.node("ReduceMean", "x", n.constant([-1, -2], np.int64), keepdims=0),
        ["GlobalAveragePool"]),
    "squeeze": (
        lambda n: n.node("Squeeze", n.conv(n.node("GlobalAveragePool", "x"), kernel=1),
                         n.constant([2, 3], np.int64)), ["GlobalAveragePool", "Conv"]),
    "classifier": (
        lambda n: n.node("Gemm", _reshape_sizes(n, n.node("GlobalAveragePool", n.node(
            "Relu", n.conv("x"))), 0, -1), n.random(4, 3), n.random(3)),
        ["Conv", "GlobalAveragePool", "Conv"]),
    "identity, dropout, cast": (
        lambda n: n.conv(n.node("Dropout", n.node("Cast", n.node("Identity", "x"), to=1))),
        ["Conv"]),
    "concat": (
        lambda n: n.node("Concat", "x", n.conv("x"), n.node("Sigmoid", "x"), axis=1),
        ["Conv", "Lookup", "Concat"]),
    "concat of flat tensors": (
        lambda n: n.node("Concat", *(n.node("Flatten", n.node("GlobalAveragePool", t))
                                     for t in ("x", n.conv("x"))), axis=-1),
        ["Conv", "GlobalAveragePool", "GlobalAveragePool", "Concat"]),
    "slice": (
        lambda n: n.node("Slice", "x", *(n.constant(v, np.int64) for v in (
            [0, -7], [2**63 - 1, 8], [3, -2], [2, 3]))), ["Slice"]),
    "split": (
        lambda n: n.node("Concat", *reversed(n.node("Split", "x", n.constant([1, 3], np.int64),
                         outputs=2, axis=1)), axis=1), ["Slice", "Slice", "Concat"]),
    "pad": (
        lambda n: n.node("Pad", "x", n.constant([0, 1, 0, 2, 0, 0, 1, 0], np.int64)), ["Pad"]),
    "pad before conv": (
        lambda n: n.conv(n.node("Pad", "x", n.constant([0, 0, 1, 0, 0, 0, 1, 1], np.int64)),
                         pads=[0, 1, 0, 0]), ["Conv"]),
    "wide pad before conv": (
        lambda n: n.conv(n.node("Pad", "x", n.constant([0, 0, 3, 3, 0, 0, 3, 3], np.int64))),
        ["Pad", "Conv"]),
    "resize, nearest": (
        lambda n: resized(n, "x", [2.0, 1.5], mode="nearest", nearest_mode="floor",
                           coordinate_transformation_mode="asymmetric"), ["Resize"]),
    "resize, linear": (
        lambda n: resized(n, "x", [2.0, 2.0], mode="linear"), ["Resize"]),
    "resize, linear, align_corners": (
        lambda n: resized(n, "x", [2.0, 2.0], mode="linear",
                           coordinate_transformation_mode="align_corners"), ["Resize"]),
    "depth to space, DCR": (lambda n: n.node("DepthToSpace", "x", blocksize=2), ["DepthToSpace"]),
    "depth to space, CRD": (
        lambda n: n.node("DepthToSpace", "x", blocksize=2, mode="CRD"), ["DepthToSpace"]),
    "leaky relu": (lambda n: n.node("LeakyRelu", n.conv("x"), alpha=0.1), ["Conv"]),
    "sigmoid of tanh": (lambda n: n.node("Sigmoid", n.node("Tanh", "x")), ["Lookup"]),
    "hard sigmoid": (lambda n: n.node("HardSigmoid", "x"), ["Lookup"]),
    "hard swish": (lambda n: n.node("HardSwish", "x"), ["Lookup"]),
    "hard swish in parts": (lambda n: _hard_swish(n, n.conv("x")), ["Conv"]),
    "silu in parts": (
        lambda n: n.node("Mul", n.conv("x"), n.node("Sigmoid", n.nodes[-1].output[0])),
        ["Conv"]),
    "elu": (lambda n: n.node("Elu", "x", alpha=0.7), ["Lookup"]),
    "selu": (lambda n: n.node("Selu", "x"), ["Lookup"]),
    "softplus": (lambda n: n.node("Softplus", "x"), ["Lookup"]),
    "mish": (lambda n: n.node("Mish", "x"), ["Lookup"]),
    "prelu, one slope": (lambda n: n.node("PRelu", "x", n.constant([[[0.2]]])), ["Lookup"]),
    "power": (lambda n: n.node("Pow", "x", n.constant(2.0)), ["Lookup"]),
    "clip": (lambda n: n.node("Clip", "x", n.constant(-0.5), n.constant(1.0)), ["Lookup"]),
    "arithmetic with scalars": (
        lambda n: n.node("Sub", n.constant(1.0), n.node("Mul", "x", n.constant(0.3))), ["Lookup"]),
    "lookup of a flattened tensor": (
        lambda n: n.node("Gemm", n.node("Relu", n.node("Flatten", "x")), n.random(256, 3)),
        ["Lookup", "Conv"]),
}  # fmt: skip


# --- what stays an ONNX operator ------------------------------------------------------------------

KEPT = {
    "softmax": (lambda n: n.node("Softmax", "x"), ["Softmax"]),
    "batch": (lambda n: n.node("Concat", "x", n.conv("x"), axis=0), ["Conv", "Concat"]),
    "transpose": (
        lambda n: n.conv(n.node("Transpose", "x", perm=[0, 2, 3, 1]), 8), ["Transpose", "Conv"]),
    "computed weight": (
        lambda n: n.node("Conv", "x", n.node("Slice", n.conv("x"), *(n.constant([v], np.int64)
                         for v in (0, 1, 0)))), ["Conv", "Slice", "Conv"]),
    "pad mode": (
        lambda n: n.conv(n.node("Pad", n.conv("x"), n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
                         mode="reflect")), ["Conv", "Pad", "Conv"]),
    "pad value": (
        lambda n: n.node("Pad", "x", n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
                         n.constant(1.0)), ["Pad"]),
    "cubic": (lambda n: resized(n, "x", [2.0, 2.0], mode="cubic"), ["Resize"]),
    "reverse": (
        lambda n: n.node("Slice", "x", *(n.constant([v], np.int64) for v in (-1, -9, 3, -1))),
        ["Slice"]),
    "mean over channels": (
        lambda n: n.node("ReduceMean", n.conv("x"), n.constant([1], np.int64)),
        ["Conv", "ReduceMean"]),
    "reshape": (
        lambda n: n.conv(_reshape_sizes(n, n.conv("x"), -1, 8, 4, 8), 8),
        ["Conv", "Reshape", "Conv"]),
    "pool indices": (
        lambda n: n.node("MaxUnpool", *n.node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2],
                         outputs=2), kernel_shape=[2, 2], strides=[2, 2]),
        ["MaxPool", "MaxUnpool"]),
    "picture constant": (lambda n: n.node("Add", "x", n.random(1, 4, 8, 8)), ["Add"]),
    "flattened output": (lambda n: n.node("Flatten", n.conv("x")), ["Conv"]),
    "division": (
        lambda n: n.node("Div", n.conv("x"), n.node("Exp", n.node("Tanh", n.conv("x")))),
        ["Conv", "Conv", "Tanh", "Exp", "Div"]),
    "one dimension": (
        lambda n: n.node("Reshape", n.node("MaxPool", n.node("Conv", _reshape_sizes(n, "x", 2, 4,
                         64), n.random(4, 4, 3), pads=[1, 1]), kernel_shape=[3], pads=[1, 1]),
                         n.constant(SHAPE, np.int64)),
        ["Reshape", "Unsqueeze", "Conv", "Squeeze", "Unsqueeze", "MaxPool", "Squeeze", "Reshape"]),
    "rank 2 between": (
        lambda n: n.node("Gemm", n.node("Softmax", n.node("Gemm", n.node("Flatten", "x"),
                         n.random(256, 6))), n.random(6, 5)),
        ["Conv", "Softmax", "Unsqueeze", "Conv"]),
    "sequence of features": (
        lambda n: n.node("Softmax", n.node("Add", n.node("MatMul", n.node("Transpose",
                         _reshape_sizes(n, n.conv("x"), 2, 32, 8), perm=[0, 2, 1]),
                         n.random(32, 5)), n.random(5)), axis=-1),
        ["Conv", "Reshape", "Transpose", "Reshape", "Unsqueeze", "Conv", "Reshape", "Softmax"]),
    "matrix of rank 3": (
        lambda n: n.node("MatMul", _reshape_sizes(n, n.conv("x"), 2, 8, 32), n.random(32, 5)),
        ["Conv", "Reshape", "Transpose", "Unsqueeze", "Conv", "Squeeze", "Transpose"]),
    "constant": (lambda n: n.node("Shape", n.conv("x")), ["Conv", "Shape"]),
    "several outputs": (
        lambda n: n.node("TopK", n.conv("x"), n.constant([2], np.int64), outputs=2, axis=1)[0],
        ["Conv", "TopK"]),
}  # fmt: skip
