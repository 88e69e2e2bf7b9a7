"""ONNX Runtime's own operators: in standard ones they compute what ONNX Runtime does."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from logshift.converter.imports import brought_in, put_in_order
from logshift.converter.onnx_model import run

DOMAIN = "com.microsoft"
OPSETS = (13, 17, 20, 21)


def model_of(op, inputs, outputs=1, opset=17, domain=DOMAIN, **attributes):
    """A model of one node; inputs are arrays, None if not given; those named `w...` are constants.

    Parameters
    ----------
    inputs : dict of name to array or None
    outputs : int, or list of which outputs there are
    """
    count = range(outputs) if isinstance(outputs, int) else outputs
    names = [f"y{i}" if i in count else "" for i in range(max(count) + 1)]
    given = [name if x is not None else "" for name, x in inputs.items()]
    node = helper.make_node(op, given, names, "node", domain=domain, **attributes)
    arrays = {name: x for name, x in inputs.items() if x is not None}
    kind = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        [node], "net",
        [
            helper.make_tensor_value_info(n, kind(x.dtype), [f"{n}_{i}" for i in range(x.ndim)])
            if op not in STATIC else helper.make_tensor_value_info(n, kind(x.dtype), x.shape)
            for n, x in arrays.items() if not n.startswith("w")
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n],
        [numpy_helper.from_array(x, n) for n, x in arrays.items() if n.startswith("w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


STATIC = ("MultiHeadAttention", "FusedMatMul")  # whose sizes must be known


def check(model, inputs, tolerance=1e-4, expected=None):
    """Compare what onnxruntime computes before and after, and find only standard operators.

    Where it has no kernel for CPUs, `expected` is the output.
    """
    feed = {n: x for n, x in inputs.items() if x is not None and not n.startswith("w")}
    expected = run(model, feed) if expected is None else [expected]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    put_in_order(copy)
    imported = brought_in(copy)
    assert {node.domain for node in imported.model.graph.node} == {""}, imported.left
    for y, z in zip(expected, run(imported.model, feed, optimize=False), strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype
        np.testing.assert_allclose(z, y, tolerance, tolerance * np.abs(y).max())
    return imported.model


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


PICTURE = {"x": normal(2, 6, 9, 8), "w": normal(4, 6, 3, 3), "wb": normal(4)}
ROWS, SEQUENCE = normal(5, 12), normal(2, 7, 12)
GAMMA, BETA = normal(12, seed=1), normal(12, seed=2)
HALF = {"x": SEQUENCE, "wbias": GAMMA}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Gelu", {"x": SEQUENCE}, {}),
        ("BiasGelu", HALF, {}),
        ("FastGelu", {"x": SEQUENCE, "b": None}, {}),
        ("FastGelu", HALF, {}),
        ("QuickGelu", {"x": SEQUENCE}, {"alpha": 1.5}),
        ("SkipLayerNormalization",
         {"x": SEQUENCE, "s": normal(2, 7, 12, seed=1), "wg": GAMMA, "wb": BETA, "wa": GAMMA + 1},
         {"epsilon": 0.01}),
        ("SkipLayerNormalization",
         {"x": SEQUENCE, "s": normal(2, 7, 12, seed=1), "wg": GAMMA}, {"epsilon": 1e-5}),
        ("SkipSimplifiedLayerNormalization",
         {"x": SEQUENCE, "s": normal(2, 7, 12, seed=1), "wg": GAMMA}, {"epsilon": 1e-5}),
        ("Trilu", {"x": normal(4, 5)}, {"upper": 0}),
        ("FusedGemm", {"x": ROWS, "w": normal(3, 12), "wb": normal(3)},
         {"transB": 1, "alpha": 0.5, "activation": "LeakyRelu", "activation_alpha": 0.2}),
    ],
)  # fmt: skip
def test_operator(op, inputs, attributes, opset):
    if op == "Trilu" and opset < 14:
        pytest.skip("ONNX has it since operator set 14")
    check(model_of(op, inputs, opset=opset, **attributes), inputs)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_softmax_with_a_bias():
    inputs = {"x": normal(2, 4, 5, 7), "b": normal(2, 1, 1, 7)}
    model = model_of("BiasSoftmax", inputs, axis=3, is_inner_broadcast=0)
    check(model, inputs, expected=softmax(inputs["x"] + inputs["b"]))


def gelu(x):
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5)), np.float32)


def test_biases_of_diffusion_models():
    inputs = {"x": SEQUENCE, "wb": GAMMA, "s": SEQUENCE + 1}
    check(model_of("BiasAdd", inputs), inputs, expected=SEQUENCE + GAMMA + inputs["s"])
    del inputs["s"]
    left, right = np.split(SEQUENCE + GAMMA, 2, axis=-1)
    check(model_of("BiasSplitGelu", inputs), inputs, expected=left * gelu(right))


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("last", [0, 1])
def test_group_normalization(last, skips, opset):
    x = normal(2, 6, 5, 4)
    total = x + x[::-1] + GAMMA[:6].reshape(-1, 1, 1) if skips else x
    groups = total.reshape(2, 3, -1)
    even = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 0.01)
    y = even.reshape(x.shape) * GAMMA[6:].reshape(-1, 1, 1) + BETA[6:].reshape(-1, 1, 1)
    y = y / (1 + np.exp(-y))
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
    inputs = {"x": x.transpose(order), "wg": GAMMA[6:], "wb": BETA[6:]}
    if skips:
        bias = GAMMA[:6] if last else GAMMA[:6].reshape(-1, 1, 1)
        inputs |= {"s": x[::-1].transpose(order), "wa": bias}
    op = "SkipGroupNorm" if skips else "GroupNorm"
    model = model_of(
        op, inputs, opset=opset, groups=3, epsilon=0.01, activation=1, channels_last=last
    )
    check(model, inputs, expected=y.transpose(order))


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("Relu", []), ("Tanh", []), ("Sigmoid", []), ("LeakyRelu", [0.3]),
        ("Clip", [-0.5, 0.75]), ("HardSigmoid", [0.3, 0.4]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opset", [8, 13])
def test_fused_convolution(activation, parameters, opset):
    other = {"z": normal(2, 4, 9, 8, seed=4)} if activation == "Relu" else {}
    inputs = PICTURE | other
    given = {"activation_params": parameters} if parameters else {}
    model = model_of("FusedConv", inputs, opset=opset, activation=activation, pads=[1] * 4, **given)
    check(model, inputs)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("a", "b", "attributes"),
    [
        ((3, 4), (4, 5), {"alpha": 0.25}),
        ((4, 3), (5, 4), {"transA": 1, "transB": 1}),
        ((2, 4, 3), (2, 4, 5), {"transA": 1, "alpha": 2.0}),
        ((3, 2, 4), (5, 2, 4), {"transBatchA": 1, "transBatchB": 1, "transB": 1}),
    ],
)
def test_fused_matmul(a, b, attributes, constant):
    inputs = {"x": normal(*a), "w" if constant else "b": normal(*b)}
    check(model_of("FusedMatMul", inputs, **attributes), inputs)


def test_sums_beside_normalizations():
    inputs = {"x": SEQUENCE, "s": normal(2, 7, 12, seed=1), "wg": GAMMA, "wb": BETA}
    model = model_of("SkipLayerNormalization", inputs, outputs=[0, 3], epsilon=1e-5)
    check(model, inputs)


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_normalizations_that_are_older_than_onnx_has_them(op, opset, axis):
    inputs = {"x": SEQUENCE, "wg": normal(*SEQUENCE.shape[axis:], seed=4)}
    model = model_of(op, inputs, opset=opset, domain="", axis=axis, epsilon=1e-4)
    check(model, inputs)


def masks():
    keeps = np.ones((2, 7), np.int32)
    keeps[0, 5:], keeps[1, 3:] = 0, 0
    return {
        "none": None, "lengths": keeps.sum(1).astype(np.int32), "positions": keeps,
        "pairs": np.broadcast_to(keeps[:, None], (2, 7, 7)).copy(),
    }  # fmt: skip


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.2}])
def test_attention(mask, attributes, opset):
    inputs = {
        "x": SEQUENCE, "w": normal(12, 36), "wb": normal(36), "mask": masks()[mask], "past": None,
        "bias": normal(1, 3, 7, 7) if attributes == {} else None,
    }  # fmt: skip
    check(model_of("Attention", inputs, opset=opset, num_heads=3, **attributes), inputs)


@pytest.mark.parametrize("mask", ["none", "positions"])
@pytest.mark.parametrize("apart", [False, True])
def test_multi_head_attention(mask, apart):
    key = normal(2, 7, 12, seed=5)
    if apart:
        key = key.reshape(2, 7, 3, 4).transpose(0, 2, 1, 3).copy()
    inputs = {
        "x": normal(2, 5, 12), "k": key, "v": key + 1, "wb": None if apart else normal(36),
        "mask": masks()[mask], "bias": normal(2, 3, 5, 7),
    }  # fmt: skip
    check(model_of("MultiHeadAttention", inputs, num_heads=3), inputs)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("opset", [12, 17])
def test_embedding(segments, opset):
    rng = np.random.default_rng(0)
    inputs = {
        "ids": rng.integers(0, 20, (2, 7)).astype(np.int32),
        "segments": rng.integers(0, 2, (2, 7)).astype(np.int32) if segments else None,
        "ww": normal(20, 12), "wp": normal(9, 12), "ws": normal(2, 12) if segments else None,
        "wg": GAMMA, "wb": BETA, "mask": masks()["positions"],
    }  # fmt: skip
    model = model_of("EmbedLayerNormalization", inputs, outputs=2, opset=opset)
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT32
    check(model, inputs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_of_few_bits(bits, zero_points):
    rng = np.random.default_rng(bits)
    blocks, size = 3, 16 * bits // 8
    inputs = {
        "x": normal(2, 5, 40),
        "wcodes": rng.integers(0, 256, (6, blocks, size)).astype(np.uint8),
        "wscale": abs(normal(6 * blocks)) + 0.1,
        "wzero": rng.integers(0, 256, 6 * -(-blocks * bits // 8)).astype(np.uint8)
        if zero_points else None,
    }  # fmt: skip
    attributes = {"N": 6, "K": 40, "bits": bits, "block_size": 16}
    check(model_of("MatMulNBits", inputs, **attributes), inputs, 1e-3)


def test_what_has_no_standard_form_is_refused_by_name(tmp_path):
    from logshift import converter

    inputs = {"x": SEQUENCE, "w": normal(12, 36), "wb": normal(36)}
    model = model_of("Attention", inputs, num_heads=3, do_rotary=1)
    with pytest.raises(converter.ConversionError, match="Attention 'node'.*rotates positions"):
        converter.convert(model, tmp_path / "a.stlq", calibration=[{"x": SEQUENCE}])
    assert not list(tmp_path.iterdir())
