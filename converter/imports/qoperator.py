"""Operators on integer codes (QOperator), as operators on floats with pairs around them.

That is QuantizeLinear and DequantizeLinear, which `qdq` reads: ranges and zero points are the
model's. Operators that only move codes lie between such pairs as well. Weights and biases become
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from logshift.converter.imports.editor import Rule, Stays, Use, dequantized
from logshift.converter.imports.microsoft import DOMAIN

QOPERATORS: dict[tuple[str, str], Rule] = {}
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
# Standard operators that take codes and only move them; all but Concat those of their first input.
MOVES = (
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GlobalMaxPool", "Identity", "MaxPool",
    "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
)  # fmt: skip


def _rule(*ops: str, domains: Sequence[str] = (DOMAIN,)) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        QOPERATORS.update({(domain, op): rule for domain in domains for op in ops})
        return rule

    return register


def _quantize(n: Use, y: str, scale: int, zero: int) -> None:
    """Add the QuantizeLinear that makes a node's result codes again."""
    n.emit("QuantizeLinear", [y, n.x(scale), n.x(zero)], n.y())


def _real(n: Use, codes: int, scale: int, zero: int, axis: int = 1) -> str:
    """Return the float tensor that codes among the inputs stand for."""
    return n.real(n.x(codes), n.x(scale), n.x(zero), axis)


def _bias(n: Use, bias: int, scales: Sequence[int]) -> str:
    """Return a bias of int32, whose scale is the product of two others, as float32."""
    if not n.x(bias):
        return ""
    scale = np.prod([n.weight(i).astype(np.float64).reshape(-1) for i in scales[:1]], axis=0)
    scale = scale * n.weight(scales[1]).astype(np.float64).reshape(-1)
    return n.constant("bias", n.weight(bias).astype(np.float64).reshape(-1) * scale)


def _first(n: Use, x: str) -> str:
    """Return a tensor of which channels are the last axis with channels first."""
    return n.emit("Transpose", [x], perm=[0, 3, 1, 2])


def _last(n: Use, x: str) -> str:
    return n.emit("Transpose", [x], perm=[0, 2, 3, 1])


@_rule("QLinearConv", domains=("", DOMAIN))
def _conv(n: Use) -> None:
    last = n.get("channels_last", 0)
    x = _real(n, 0, 1, 2)
    inputs = [_first(n, x) if last else x, _real(n, 3, 4, 5, axis=0), _bias(n, 8, (1, 4))]
    y = n.emit("Conv", inputs, name=n.name, **n.kept(*_CONV))
    _quantize(n, _last(n, y) if last else y, 6, 7)


@_rule("QLinearMatMul", domains=("", DOMAIN))
def _matmul(n: Use) -> None:
    y = n.emit("MatMul", [_real(n, 0, 1, 2), _real(n, 3, 4, 5, axis=-1)], name=n.name)
    _quantize(n, y, 6, 7)


@_rule("QGemm")
def _gemm(n: Use) -> None:
    weight = _real(n, 3, 4, 5, axis=0 if n.get("transB", 0) else 1)
    alpha = n.get("alpha", 1.0)
    inputs = [_real(n, 0, 1, 2), weight]
    if n.x(6):
        # It is added before alpha is multiplied with.
        bias = n.weight(6).astype(np.float64) * n.weight(1) * n.weight(4) * alpha
        inputs.append(n.constant("bias", bias))
    given = n.kept("transA", "transB", "alpha")
    y = n.emit("Gemm", inputs, None if n.x(7) else n.y(), name=n.name, **given)
    if n.x(7):
        _quantize(n, y, 7, 8)


def _of_two(op: str) -> Rule:
    def rule(n: Use) -> None:
        inputs = [_real(n, 0, 1, 2), _real(n, 3, 4, 5)]
        _quantize(n, n.emit(op, inputs, name=n.name), 6, 7)

    return rule


def _of_one(op: str, *attributes: str) -> Rule:
    def rule(n: Use) -> None:
        y = n.emit(op, [_real(n, 0, 1, 2)], name=n.name, **n.kept(*attributes))
        _quantize(n, y, 3, 4)

    return rule


QOPERATORS.update({
    (DOMAIN, "QLinearAdd"): _of_two("Add"),
    (DOMAIN, "QLinearMul"): _of_two("Mul"),
    (DOMAIN, "QLinearSigmoid"): _of_one("Sigmoid"),
    (DOMAIN, "QLinearLeakyRelu"): _of_one("LeakyRelu", "alpha"),
})  # fmt: skip


@_rule("QLinearSoftmax")
def _softmax(n: Use) -> None:
    x, axis = _real(n, 0, 1, 2), n.get("axis", -1)
    if n.get("opset", n.edit.opset) < 13 <= n.edit.opset and axis % n.rank(x) != n.rank(x) - 1:
        raise Stays("it is a softmax along several axes at once")
    _quantize(n, n.emit("Softmax", [x], name=n.name, axis=axis), 3, 4)


@_rule("QLinearReduceMean")
def _reduce_mean(n: Use) -> None:
    inputs, given = [_real(n, 0, 1, 2)], n.kept("axes", "keepdims")
    if n.edit.opset >= 18 and "axes" in given:
        inputs.append(n.constant("axes", given.pop("axes"), np.int64))
    _quantize(n, n.emit("ReduceMean", inputs, name=n.name, **given), 3, 4)


@_rule("QLinearAveragePool", "QLinearGlobalAveragePool")
def _average_pool(n: Use) -> None:
    x, last = _real(n, 0, 1, 2), n.get("channels_last", 0)
    op = n.node.op_type.removeprefix("QLinear")
    y = n.emit(op, [_first(n, x) if last else x], name=n.name, **n.kept(*_POOL))
    _quantize(n, _last(n, y) if last else y, 3, 4)


@_rule("QLinearConcat")
def _concat(n: Use) -> None:
    parts = [_real(n, i, i + 1, i + 2) for i in range(2, len(n.node.input), 3)]
    _quantize(n, n.emit("Concat", parts, name=n.name, axis=n.get("axis", 0)), 0, 1)


@_rule("QLinearWhere")
def _where(n: Use) -> None:
    inputs = [n.x(0), _real(n, 1, 2, 3), _real(n, 4, 5, 6)]
    _quantize(n, n.emit("Where", inputs, name=n.name), 7, 8)


@_rule("QAttention")
def _attention(n: Use) -> None:
    n.refuse_inputs(8)
    weight = dequantized(
        n.weight(1), n.weight(4), n.weight(7) if n.x(7) else np.zeros((), np.int8), -1
    )
    inputs = [_real(n, 0, 3, 6), n.constant("weight", weight), n.x(2), n.x(5)]
    given = n.kept("num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary")
    n.emit_all("Attention", inputs, n.node.output, name=n.name, domain=DOMAIN, **given)


@_rule("QEmbedLayerNormalization")
def _embed(n: Use) -> None:
    parts = [_real(n, i, i + 6, i + 11) if n.x(i) else "" for i in range(2, 7)]
    inputs = [n.x(0), n.x(1), *parts, n.x(7)]
    given = n.kept("epsilon")
    n.emit_all(
        "EmbedLayerNormalization", inputs, n.node.output, name=n.name, domain=DOMAIN, **given
    )


# --- operators that move codes --------------------------------------------------------------------


def _parameters(n: Use, codes: str) -> tuple[str, str] | None:
    """Return the scale and zero point of codes, if it is known that they are codes."""
    node = n.edit.producers.get(codes)
    if node is None or node.op_type != "QuantizeLinear":
        return None
    return node.input[1], node.input[2] if len(node.input) > 2 else ""


@_rule(*MOVES[1:], domains=("",))
def _move(n: Use) -> None:
    if n.node.op_type == "MaxPool":
        n.refuse_outputs(1)
    if (found := _parameters(n, n.x(0))) is None:
        raise Stays
    _check_single(n, *found)
    x = n.real(n.x(0), *found)
    inputs = [x, *n.node.input[1:]]
    if n.node.op_type == "Pad" and n.get("mode", "constant") == "constant":
        if n.edit.opset < 11:
            raise Stays("what it pads with is an attribute")
        inputs[2:3] = [_padding(n, *found)]
    results = [n.edit.fresh(f"{y}/moved") for y in n.node.output]
    n.emit_all(n.node.op_type, inputs, results, name=n.name, **n.attributes)
    for y, codes in zip(results, n.node.output, strict=True):
        n.emit("QuantizeLinear", [y, *found], codes)


def _padding(n: Use, scale: str, zero: str) -> str:
    """Return what a Pad of codes pads with, as a real value."""
    step, least = n.edit.array(scale), n.edit.array(zero) if zero else np.zeros(1, np.uint8)
    assert step is not None and least is not None  # `_check_single` has seen them
    code = n.number(2, 0)
    return n.constant("value", (code - float(least.reshape(-1)[0])) * step.reshape(()))


def _check_single(n: Use, scale: str, zero: str) -> None:
    for name in filter(None, (scale, zero)):
        if (array := n.edit.array(name)) is None or array.size != 1:
            raise Stays("codes differ along an axis")


@_rule("Concat", domains=("",))
def _concat_codes(n: Use) -> None:
    found = [_parameters(n, name) for name in n.node.input]
    if any(p is None for p in found):
        raise Stays
    first, *others = [p for p in found if p is not None]
    _check_single(n, *first)
    for other in others:
        _check_single(n, *other)
        if not all(_equal(n, a, b) for a, b in zip(first, other, strict=True)):
            raise Stays("joins codes of different scales")
    parts = [n.real(name, *first) for name in n.node.input]
    y = n.emit("Concat", parts, name=n.name, **n.attributes)
    n.emit("QuantizeLinear", [y, *first], n.y())


def _equal(n: Use, one: str, other: str) -> bool:
    a, b = n.edit.array(one), n.edit.array(other)
    return one == other or (a is not None and b is not None and np.array_equal(a, b))


@_rule("NhwcMaxPool")
def _max_pool(n: Use) -> None:
    if (found := _parameters(n, n.x(0))) is None:
        raise Stays("the scale of its codes is not known")
    _check_single(n, *found)
    x = _first(n, n.real(n.x(0), *found))
    given = n.kept("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    y = _last(n, n.emit("MaxPool", [x], name=n.name, **given))
    n.emit("QuantizeLinear", [y, *found], n.y())
