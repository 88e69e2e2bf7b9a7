"""ONNX Runtime's own operators, as its optimised models have them, in standard ones.

ONNX Runtime's docs/ContribOperators.md defines them. Some it puts into the default domain, where
ONNX has them later or never: `claim` gives them their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from logshift.converter.imports.editor import STANDARD, Rule, Stays, Use, all_graphs, opset_of

DOMAIN = "com.microsoft"
ONNXRUNTIME: dict[tuple[str, str], Rule] = {}
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        ONNXRUNTIME.update(dict.fromkeys([(DOMAIN, op) for op in ops], rule))
        return rule

    return register


def claim(model: onnx.ModelProto) -> bool:
    """Give nodes of the default domain that ONNX does not have there ONNX Runtime's, in place.

    Returns whether there are any.
    """
    opset, claimed = opset_of(model), False
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.domain in STANDARD and (DOMAIN, node.op_type) in ONNXRUNTIME:
                if not onnx.defs.has(node.op_type, opset, ""):
                    node.domain, claimed = DOMAIN, True
    if claimed and all(o.domain != DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return claimed


# --- products, and the functions after them -------------------------------------------------------


def _activate(n: Use, x: str, function: str, parameters: list[float], output: str) -> None:
    """Add the activation function that a fused operator ends with."""
    name = {"Silu": "Swish", "QuickGelu": "Swish"}.get(function, function)
    if name in ("", "None"):
        n.emit("Identity", [x], output)
    elif name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish"):
        if name == "HardSwish" and n.edit.opset < 14:
            gate = n.emit("HardSigmoid", [x], alpha=1 / 6, beta=0.5)
            n.emit("Mul", [x, gate], output)
        else:
            n.emit(name, [x], output)
    elif name == "Clip":
        low, high = parameters
        if n.edit.opset < 11:
            n.emit("Clip", [x], output, min=low, max=high)
        else:
            n.emit("Clip", [x, n.constant("min", low), n.constant("max", high)], output)
    elif name in ("LeakyRelu", "Elu", "ThresholdedRelu", "HardSigmoid"):
        given: dict[str, Any] = dict(zip(("alpha", "beta"), parameters, strict=False))
        n.emit(name, [x], output, **given)
    elif name == "Swish":
        gate = x if not parameters or parameters[0] == 1 else n.scaled(x, parameters[0])
        n.emit("Mul", [x, n.emit("Sigmoid", [gate])], output)
    elif name == "Gelu":
        _gelu(n, x, output)
    else:
        raise Stays(f"its activation function {function!r} is not known")


@_rule("FusedConv", "NhwcFusedConv", "NhwcConv")
def _fused_conv(n: Use) -> None:
    x, last = n.x(0), n.node.op_type.startswith("Nhwc")
    if last:
        x = n.emit("Transpose", [x], perm=[0, 3, 1, 2])
    y = n.emit("Conv", [x, n.x(1), n.x(2)], name=n.name, **n.kept(*_CONV))
    if n.x(3):
        other = n.emit("Transpose", [n.x(3)], perm=[0, 3, 1, 2]) if last else n.x(3)
        y = n.emit("Add", [y, other])
    result = n.edit.fresh(f"{n.name}/activated") if last else n.y()
    _activate(n, y, n.get("activation", ""), n.get("activation_params", []), result)
    if last:
        n.emit("Transpose", [result], n.y(), perm=[0, 2, 3, 1])


@_rule("FusedGemm")
def _fused_gemm(n: Use) -> None:
    attributes = n.kept("alpha", "beta", "transA", "transB")
    y = n.emit("Gemm", [n.x(0), n.x(1), n.x(2)], name=n.name, **attributes)
    _activate(n, y, n.get("activation", ""), _parameters(n), n.y())


def _parameters(n: Use) -> list[float]:
    given = [n.attributes.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return [value for value in given if value is not None]


@_rule("FusedMatMul", "TransposeMatMul", "FusedMatMulActivation")
def _fused_matmul(n: Use) -> None:
    a = _transposed(n, n.x(0), n.get("transA", 0), n.get("transBatchA", 0))
    b = _transposed(n, n.x(1), n.get("transB", 0), n.get("transBatchB", 0))
    alpha, function = n.get("alpha", 1.0), n.get("activation", "")
    last = n.y() if alpha == 1 and not function else None
    y = n.emit("MatMul", [a, b], last, name=n.name)
    if alpha != 1:
        y = n.scaled(y, alpha, None if function else n.y())
    if function:
        _activate(n, y, function, _parameters(n), n.y())


def _transposed(n: Use, x: str, last: int, batch: int) -> str:
    """Return a matrix with its last two axes changed, and its first before these."""
    if not last and not batch:
        return x
    order = [*range(n.rank(x))]
    if batch:
        order = [*order[1:-1], order[0], order[-1]]
    if last:
        order[-2:] = order[:-3:-1]
    if (array := n.edit.array(x)) is not None:
        return n.constant("transposed", array.transpose(order))
    return n.emit("Transpose", [x], perm=order)


@_rule("GemmFastGelu")
def _gemm_gelu(n: Use) -> None:
    y = n.emit("MatMul", [n.x(0), n.x(1)], name=n.name)
    _fast_gelu_of(n, n.biased(y, n.x(2)), n.y())


@_rule("MatMulNBits")
def _matmul_of_few_bits(n: Use) -> None:
    n.refuse_inputs(4)
    columns, count, bits = n.get("N", 0), n.get("K", 0), n.get("bits", 4)
    block = n.get("block_size", 0)
    if bits not in (2, 4, 8) or n.get("weight_prepacked", 0):
        raise Stays(f"its weights have {bits} bits, or are packed for a machine")
    blocks = -(-count // block)
    codes = _unpacked(n.weight(1), bits).reshape(columns, -1)[:, : blocks * block]
    codes = codes.reshape(columns, blocks, block).astype(np.float32)
    zero = np.full((columns, blocks), 2.0 ** (bits - 1), np.float32)
    if n.x(3):
        zero = n.weight(3)
        if zero.dtype == np.uint8:
            zero = _unpacked(zero, bits).reshape(columns, -1)[:, :blocks]
        zero = zero.reshape(columns, blocks).astype(np.float32)
    scale = n.weight(2).reshape(columns, blocks).astype(np.float32)
    weight = ((codes - zero[:, :, None]) * scale[:, :, None]).reshape(columns, -1)[:, :count]
    matrix = n.constant("weight", weight.T)
    if n.x(5):
        n.emit("Add", [n.emit("MatMul", [n.x(0), matrix], name=n.name), n.x(5)], n.y())
    else:
        n.emit("MatMul", [n.x(0), matrix], n.y(), name=n.name)


def _unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in bytes, lowest bits first."""
    flat = codes.astype(np.uint8).reshape(-1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((flat[:, None] >> shifts) & (2**bits - 1)).reshape(*codes.shape[:-1], -1)


# --- functions ------------------------------------------------------------------------------------


def _gelu(n: Use, x: str, output: str) -> None:
    if n.edit.opset >= 20:
        n.emit("Gelu", [x], output)
        return
    inner = n.emit("Erf", [n.emit("Div", [x, n.constant("root", math.sqrt(2))])])
    gate = n.emit("Add", [inner, n.constant("one", 1)])
    n.scaled(n.emit("Mul", [x, gate]), 0.5, output)


def _fast_gelu_of(n: Use, x: str, output: str) -> None:
    if n.edit.opset >= 20:
        n.emit("Gelu", [x], output, approximate="tanh")
        return
    square = n.emit("Mul", [x, x])
    slope = n.emit("Add", [n.scaled(square, 0.044715 * math.sqrt(2 / math.pi)),
                           n.constant("slope", math.sqrt(2 / math.pi))])  # fmt: skip
    inner = n.emit("Tanh", [n.emit("Mul", [x, slope])])
    gate = n.emit("Add", [inner, n.constant("one", 1)])
    n.scaled(n.emit("Mul", [x, gate]), 0.5, output)


@_rule("Gelu")
def _plain_gelu(n: Use) -> None:
    _gelu(n, n.x(0), n.y())


@_rule("BiasGelu")
def _bias_gelu(n: Use) -> None:
    _gelu(n, n.emit("Add", [n.x(0), n.x(1)]), n.y())


@_rule("FastGelu")
def _fast_gelu(n: Use) -> None:
    _fast_gelu_of(n, n.biased(n.x(0), n.x(1)), n.y())


@_rule("QuickGelu")
def _quick_gelu(n: Use) -> None:
    _activate(n, n.x(0), "Swish", [n.get("alpha", 1.702)], n.y())


@_rule("BiasSplitGelu")
def _bias_split_gelu(n: Use) -> None:
    half = len(n.weight(1).reshape(-1)) // 2
    left, right = n.split(n.emit("Add", [n.x(0), n.x(1)]), -1, [half, half])
    gate = n.edit.fresh(f"{n.name}/gate")
    _gelu(n, right, gate)
    n.emit("Mul", [left, gate], n.y())


@_rule("BiasAdd")
def _bias_add(n: Use) -> None:
    n.emit("Add", [n.emit("Add", [n.x(0), n.x(1)]), n.x(2)], n.y())


@_rule("BiasDropout")
def _bias_dropout(n: Use) -> None:
    n.refuse_outputs(1)
    x = n.biased(n.emit("Add", [n.x(0), n.x(1)]), n.x(2))
    n.emit("Identity", [x], n.y())


@_rule("BiasSoftmax")
def _bias_softmax(n: Use) -> None:
    rank = n.rank(n.x(0))
    if n.get("axis", 1) % rank != rank - 1 and n.edit.opset >= 13:
        raise Stays("it is a softmax along several axes at once")
    n.emit("Softmax", [n.emit("Add", [n.x(0), n.x(1)])], n.y(), axis=n.get("axis", 1))


@_rule("Affine")
def _affine(n: Use) -> None:
    y = n.scaled(n.x(0), n.get("alpha", 1.0))
    n.emit("Add", [y, n.constant("beta", n.get("beta", 0.0))], n.y())


@_rule("ScaledTanh")
def _scaled_tanh(n: Use) -> None:
    y = n.emit("Tanh", [n.scaled(n.x(0), n.get("beta", 1.0))])
    n.scaled(y, n.get("alpha", 1.0), n.y())


@_rule("ParametricSoftplus")
def _parametric_softplus(n: Use) -> None:
    y = n.emit("Softplus", [n.scaled(n.x(0), n.get("beta", 1.0))])
    n.scaled(y, n.get("alpha", 1.0), n.y())


@_rule("ImageScaler")
def _image_scaler(n: Use) -> None:
    y = n.scaled(n.x(0), n.get("scale", 1.0))
    bias = np.reshape(n.get("bias", [0.0]), (1, -1, 1, 1))
    n.emit("Add", [y, n.constant("bias", bias)], n.y())


@_rule("Scale")
def _scale(n: Use) -> None:
    n.scaled(n.x(0), n.get("scale", 1.0), n.y())


# --- normalizations -------------------------------------------------------------------------------


def _layer_norm(n: Use, x: str, gamma: str, beta: str, output: str, axis: int = -1) -> None:
    epsilon = n.get("epsilon", 1e-5 if n.node.op_type == "LayerNormalization" else 1e-12)
    if n.edit.opset >= 17:
        n.emit(
            "LayerNormalization", [x, gamma, beta], output, name=n.name, axis=axis, epsilon=epsilon
        )
        return
    axes = _axes(n, x, axis)
    centred = n.emit("Sub", [x, n.mean(x, axes)])
    variance = n.mean(n.emit("Mul", [centred, centred]), axes)
    root = n.emit("Sqrt", [n.emit("Add", [variance, n.constant("epsilon", epsilon)])])
    y = n.emit("Mul", [n.emit("Div", [centred, root]), gamma], None if beta else output)
    if beta:
        n.emit("Add", [y, beta], output)


def _axes(n: Use, x: str, axis: int) -> list[int]:
    """Return the last axes of a tensor, from `axis` on."""
    if axis == -1:
        return [-1]
    rank = n.rank(x)
    return [*range(axis % rank - rank, 0)]


def _rms_norm(n: Use, x: str, gamma: str, output: str, axis: int = -1) -> None:
    epsilon = n.get("epsilon", 1e-5 if n.node.op_type.startswith("Simplified") else 1e-12)
    mean = n.mean(n.emit("Mul", [x, x]), _axes(n, x, axis))
    root = n.emit("Sqrt", [n.emit("Add", [mean, n.constant("epsilon", epsilon)])])
    n.emit("Mul", [n.emit("Div", [x, root]), gamma], output)


@_rule("LayerNormalization")
def _layer_normalization(n: Use) -> None:
    n.refuse_outputs(1, 2)
    _layer_norm(n, n.x(0), n.x(1), n.x(2), n.y(), n.get("axis", -1))


@_rule("SimplifiedLayerNormalization")
def _simplified_normalization(n: Use) -> None:
    n.refuse_outputs(1)
    _rms_norm(n, n.x(0), n.x(1), n.y(), n.get("axis", -1))


def _with_skip(n: Use, bias: str) -> str:
    """Return the sum of what is to be normalized, which is an output too."""
    n.refuse_outputs(1, 2)
    total = n.y(3) if n.asked(3) else None
    if not bias:
        return n.emit("Add", [n.x(0), n.x(1)], total)
    return n.emit("Add", [n.emit("Add", [n.x(0), n.x(1)]), bias], total)


@_rule("SkipLayerNormalization")
def _skip_layer_normalization(n: Use) -> None:
    _layer_norm(n, _with_skip(n, n.x(4)), n.x(2), n.x(3), n.y())


@_rule("SkipSimplifiedLayerNormalization")
def _skip_simplified_normalization(n: Use) -> None:
    _rms_norm(n, _with_skip(n, n.x(3)), n.x(2), n.y())


@_rule("GroupNorm", "SkipGroupNorm")
def _group_norm(n: Use) -> None:
    x = n.x(0)
    if n.node.op_type == "SkipGroupNorm":
        total = n.y(1) if n.asked(1) else None
        if n.x(4):
            x = n.emit("Add", [n.emit("Add", [x, n.x(3)]), n.x(4)], total)
        else:
            x = n.emit("Add", [x, n.x(3)], total)
    last, silu = n.get("channels_last", 1), n.get("activation", 0)
    groups, epsilon = n.get("groups", 0), n.get("epsilon", 1e-5)
    if last:
        x = n.emit("Transpose", [x], perm=[0, 3, 1, 2])
    gamma, beta = n.weight(1), n.weight(2)
    if n.edit.opset >= 21:
        inputs = [x, n.constant("scale", gamma), n.constant("bias", beta)]
        y = n.emit("GroupNormalization", inputs, name=n.name, num_groups=groups, epsilon=epsilon)
    else:
        ones, zeros = (n.constant(k, np.full(groups, v)) for k, v in (("ones", 1), ("zeros", 0)))
        parts = n.reshape(x, [0, groups, -1])
        even = n.emit("InstanceNormalization", [parts, ones, zeros], name=n.name, epsilon=epsilon)
        even = n.emit("Reshape", [even, n.emit("Shape", [x])])
        y = n.emit("Mul", [even, n.constant("scale", gamma.reshape(-1, 1, 1))])
        y = n.emit("Add", [y, n.constant("bias", beta.reshape(-1, 1, 1))])
    if silu:
        y = n.emit("Mul", [y, n.emit("Sigmoid", [y])])
    if last:
        n.emit("Transpose", [y], n.y(), perm=[0, 2, 3, 1])
    else:
        n.emit("Identity", [y], n.y())


# --- attention ------------------------------------------------------------------------------------


@_rule("Attention")
def _attention(n: Use) -> None:
    n.refuse_inputs(4, 6)
    n.refuse_outputs(1)
    if n.get("do_rotary", 0):
        raise Stays("it rotates positions")
    heads, weight = n.get("num_heads", 0), n.weight(1)
    sizes = n.get("qkv_hidden_sizes", [weight.shape[1] // 3] * 3)
    cuts = np.cumsum(sizes)[:2]
    biases = np.split(n.weight(2), cuts) if n.x(2) else [None] * 3
    parts = []
    for what, w, b in zip(
        ("query", "key", "value"), np.split(weight, cuts, axis=1), biases, strict=True
    ):
        part = n.emit("MatMul", [n.x(0), n.constant(f"{what}/weight", w)], name=f"{n.name}/{what}")
        if b is not None:
            part = n.emit("Add", [part, n.constant(f"{what}/bias", b)])
        parts.append(_heads(n, part, heads))
    scale = n.get("scale", 0.0) or 1 / math.sqrt(sizes[0] // heads)
    biases_of_scores = [name for name in (n.x(5), _mask(n, n.x(3), n.x(0))) if name]
    _attend(n, parts, scale, biases_of_scores, n.get("unidirectional", 0), n.x(0))


@_rule("MultiHeadAttention")
def _multi_head_attention(n: Use) -> None:
    n.refuse_inputs(6, 7, 8, 9)
    n.refuse_outputs(1, 2, 3)
    if not (n.x(1) and n.x(2)):
        raise Stays("its query, key and value are packed in one tensor")
    heads, shape = n.get("num_heads", 0), n.edit.shape(n.x(0))
    hidden = shape[-1] if shape else None
    bias = n.array(3)
    if hidden is None and bias is not None:
        hidden = len(bias) // 3
    if hidden is None:
        raise Stays(f"the size of its query {n.x(0)!r} is not known")
    parts = []
    for index, what in enumerate(("query", "key", "value")):
        x, flat = n.x(index), n.rank(n.x(index)) == 3
        if n.x(3):
            b = n.weight(3)
            ends = [0, hidden, 2 * hidden, len(b)]
            cut = b[ends[index] : ends[index + 1]]
            if flat:
                x = n.emit("Add", [x, n.constant(f"{what}/bias", cut)])
            elif cut.any():
                raise Stays("its keys have a bias and are cut in heads already")
        parts.append(_heads(n, x, heads) if flat else x)
    scale = n.get("scale", 0.0) or 1 / math.sqrt(hidden // heads)
    biases = [name for name in (n.x(5), _mask(n, n.x(4), n.x(0))) if name]
    _attend(n, parts, scale, biases, n.get("unidirectional", 0), n.x(0))


def _heads(n: Use, x: str, heads: int) -> str:
    """Return (N, heads, L, size) of (N, L, heads * size)."""
    return n.emit("Transpose", [n.reshape(x, [0, 0, heads, -1])], perm=[0, 2, 1, 3])


def _attend(n: Use, parts: list[str], scale: float, biases: list[str], causal: int, x: str) -> None:
    query, key, value = parts
    key = n.emit("Transpose", [key], perm=[0, 1, 3, 2])
    scores = n.scaled(n.emit("MatMul", [query, key]), scale)
    for bias in biases:
        scores = n.emit("Add", [scores, bias])
    if causal:
        scores = n.emit("Add", [scores, _causal(n, x)])
    y = n.emit("MatMul", [n.emit("Softmax", [scores], axis=-1), value])
    n.reshape(n.emit("Transpose", [y], perm=[0, 2, 1, 3]), [0, 0, -1], n.y())


def _positions(n: Use, x: str) -> str:
    """Return 0, 1, ... along axis 1 of a tensor, int64."""
    length = n.emit("Gather", [n.emit("Shape", [x]), n.constant("axis", 1, np.int64)])
    return n.emit("Range", [n.constant("start", 0, np.int64), length,
                            n.constant("step", 1, np.int64)])  # fmt: skip


def _hidden(n: Use, keeps: str, kind: str) -> str:
    """Return what is added to scores where `keeps` is false."""
    value = n.get("mask_filter_value", -10000.0)
    return n.emit("Where", [keeps, n.constant("kept", 0.0), n.constant(kind, value)])


def _causal(n: Use, x: str) -> str:
    positions = _positions(n, x)
    later = n.emit(
        "Less", [n.move("Unsqueeze", positions, [1]), n.move("Unsqueeze", positions, [0])]
    )
    return _hidden(n, n.emit("Not", [later]), "later")


def _mask(n: Use, mask: str, x: str) -> str:
    """Return what a mask of positions adds to scores; "" if there is none."""
    if not mask:
        return ""
    rank = n.rank(mask)
    if rank == 1:  # lengths
        lengths = n.move("Unsqueeze", n.emit("Cast", [mask], to=TensorProto.INT64), [1])
        keeps = n.emit("Less", [n.move("Unsqueeze", _positions(n, x), [0]), lengths])
    elif rank in (2, 3):
        keeps = n.emit("Cast", [mask], to=TensorProto.BOOL)
    else:
        raise Stays(f"its mask {mask!r} has {rank} axes")
    return n.move("Unsqueeze", _hidden(n, keeps, "masked"), [1] if rank == 3 else [1, 2])


@_rule("EmbedLayerNormalization")
def _embed(n: Use) -> None:
    words = n.emit("Gather", [n.x(2), n.x(0)])
    places = n.x(8) or _positions(n, n.x(0))
    total = n.emit("Add", [words, n.emit("Gather", [n.x(3), places])])
    if n.x(4):
        segments = n.x(1)
        if not segments:
            raise Stays("it has an embedding of segments, but no segments")
        total = n.emit("Add", [total, n.emit("Gather", [n.x(4), segments])])
    if n.asked(2):
        n.emit("Identity", [total], n.y(2))
    if n.asked(1):
        if not n.x(7) or n.get("mask_index_type", 0):
            raise Stays(f"its output {n.y(1)!r} is asked for, but it has no mask")
        lengths = [n.x(7), n.constant("axes", [1], np.int64)]
        if n.edit.opset < 13:
            n.emit("ReduceSum", lengths[:1], n.y(1), axes=[1], keepdims=0)
        else:
            n.emit("ReduceSum", lengths, n.y(1), keepdims=0)
    _layer_norm(n, total, n.x(5), n.x(6), n.y())


# --- operators that ONNX has by the same or another name ------------------------------------------


def _same(since: int) -> Rule:
    def rule(n: Use) -> None:
        if n.edit.opset < since:
            raise Stays(f"ONNX has it since operator set {since}, not in {n.edit.opset}")
        n.emit_all(n.node.op_type, n.node.input, n.node.output, name=n.name, **n.attributes)

    return rule


for _op, _since in (("GatherND", 11), ("Pad", 11), ("Range", 11), ("Trilu", 14)):
    ONNXRUNTIME[DOMAIN, _op] = _same(_since)


@_rule("QuantizeLinear", "DequantizeLinear")
def _edge_of_codes(n: Use) -> None:
    wide = n.edit.opset < 21 and any(
        t is not None and t.dtype not in (np.uint8, np.int8, np.int32)
        for t in [n.array(2), n.array(0)][: 1 + (n.node.op_type == "DequantizeLinear")]
    )
    if wide:
        raise Stays("ONNX has codes of 16 and 4 bits since operator set 21")
    given = n.attributes if n.edit.opset >= 13 else {}
    n.emit(n.node.op_type, n.node.input, n.y(), name=n.name, **given)


@_rule("ExpandDims")
def _expand_dims(n: Use) -> None:
    n.move("Unsqueeze", n.x(0), [int(n.number(1, 0))], n.y())


@_rule("GridSample")
def _grid_sample(n: Use) -> None:
    if n.edit.opset < 16:
        raise Stays(f"ONNX has it since operator set 16, not in {n.edit.opset}")
    given = n.attributes
    if n.edit.opset >= 20:
        modes = {"bilinear": "linear", "bicubic": "cubic"}
        given["mode"] = modes.get(given.get("mode", "bilinear"), given.get("mode", "linear"))
    n.emit("GridSample", n.node.input, n.y(), name=n.name, **given)
