"""Dynamic quantization taken back: scales that are measured at every run, on tensors of floats.

ConvInteger and MatMulInteger of what DynamicQuantizeLinear gave, a Cast, and Muls by the scales are
a Conv or MatMul of floats; weights are what their codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from logshift.converter.imports.editor import Rule, Stays, Use, dequantized
from logshift.converter.imports.microsoft import DOMAIN

DYNAMIC: dict[tuple[str, str], Rule] = {}
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_LSTM = (
    "activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size",
    "input_forget",
)  # fmt: skip


def _rule(*keys: tuple[str, str]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        DYNAMIC.update(dict.fromkeys(keys, rule))
        return rule

    return register


# --- chains of standard operators -----------------------------------------------------------------


@_rule(("", "ConvInteger"))
def _conv(n: Use) -> None:
    x, scale = _operand(n, 0, 2)
    factor, end = _scaling(n, [scale])
    weight = dequantized(n.weight(1), np.ones(()), _zero(n, 3), 0)
    if factor.size not in (1, len(weight)):
        raise Stays("its sums are multiplied by a scale that is not one of channels")
    weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    n.emit("Conv", [x, n.constant("weight", weight)], end, name=n.name, **n.kept(*_CONV))


@_rule(("", "MatMulInteger"))
def _matmul(n: Use) -> None:
    a, scale = _operand(n, 0, 2)
    if n.array(1) is None:
        b, other = _operand(n, 1, 3)
        factor, end = _scaling(n, [scale, other])
        if factor.size != 1:
            raise Stays("its sums are multiplied by a scale that is not one number")
        y = n.emit("MatMul", [a, b], name=n.name)
        n.scaled(y, float(factor.reshape(-1)[0]), end)
        return
    factor, end = _scaling(n, [scale])
    weight = dequantized(n.weight(1), np.ones(()), _zero(n, 3), -1)
    if factor.size not in (1, weight.shape[-1]):
        raise Stays("its sums are multiplied by a scale that is not one of columns")
    weight = weight * factor.reshape(-1)
    n.emit("MatMul", [a, n.constant("weight", weight)], end, name=n.name)


def _operand(n: Use, codes: int, zero: int) -> tuple[str, str]:
    """Return the float tensor that codes were made of, and the scale that they have."""
    producer = n.edit.producers.get(n.x(codes))
    if producer is not None and producer.op_type == "DynamicQuantizeLinear":
        scale = producer.output[1]
    elif producer is not None and producer.op_type == "QuantizeLinear":
        scale = producer.input[1]
    else:
        raise Stays(f"what its codes {n.x(codes)!r} stand for is not known")
    return n.real(n.x(codes), scale, n.x(zero)), scale


def _zero(n: Use, index: int) -> np.ndarray:
    return n.weight(index) if n.x(index) else np.zeros((), np.int8)


def _scaling(n: Use, scales: list[str]) -> tuple[np.ndarray, str]:
    """Return what a product of floats is multiplied with to be what sums of integers end as.

    Sums are that product divided by the scales of what was quantized, and are cast and multiplied
    by these scales and others.

    Returns
    -------
    factor : array
        Scales that are left.
    end : str
        The tensor that the product is; nodes up to the one that made it are dropped.
    """
    wanted = [name for name in scales if n.edit.array(name) is None]
    factor = np.ones(1)
    for name in scales:
        if (array := n.edit.array(name)) is not None:
            factor = factor / array.astype(np.float64).reshape(-1)
    chain = [_only_reader(n, n.y(), "Cast")]
    if chain[0].attribute[0].i != TensorProto.FLOAT:
        raise Stays("its sums are not cast to float32")
    while wanted:
        result = chain[-1].output[0]
        chain.append(_only_reader(n, result, "Mul"))
        other = next(name for name in chain[-1].input if name != result)
        for name in _factors(n, other):
            if name in wanted:
                wanted.remove(name)
            elif (array := n.edit.array(name)) is not None:
                factor = factor * array.astype(np.float64).reshape(-1)
            else:
                raise Stays(f"its sums are multiplied by {name!r}, which is no constant")
    for node in chain:
        n.edit.drop(node)
    return factor, chain[-1].output[0]


def _only_reader(n: Use, name: str, op: str) -> onnx.NodeProto:
    readers = n.edit.readers.get(name, [])
    if len(readers) != 1 or readers[0].op_type != op or name in n.edit.outputs:
        raise Stays(f"its sums {name!r} are not read by one {op} alone")
    if len(set(readers[0].input)) != len(readers[0].input):
        raise Stays(f"its sums {name!r} are multiplied with themselves")
    return readers[0]


def _factors(n: Use, name: str) -> list[str]:
    """Return the tensors that a tensor is a product of."""
    node = n.edit.producers.get(name)
    if node is None or name in n.edit.tensors:
        return [name]
    if node.op_type == "Mul":
        return [factor for part in node.input for factor in _factors(n, part)]
    if node.op_type in ("Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return _factors(n, node.input[0])
    return [name]


# --- ONNX Runtime's operators ---------------------------------------------------------------------


@_rule((DOMAIN, "DynamicQuantizeMatMul"))
def _dynamic_matmul(n: Use) -> None:
    _product(n, n.x(0), n.real(n.x(1), n.x(2), n.x(3), axis=-1), n.x(4))


@_rule((DOMAIN, "MatMulIntegerToFloat"))
def _integers_to_float(n: Use) -> None:
    a = n.real(n.x(0), n.x(2), n.x(4))
    _product(n, a, n.real(n.x(1), n.x(3), n.x(5), axis=-1), n.x(6))


def _product(n: Use, a: str, b: str, bias: str) -> None:
    y = n.emit("MatMul", [a, b], None if bias else n.y(), name=n.name)
    if bias:
        n.emit("Add", [y, bias], n.y())


@_rule((DOMAIN, "DynamicQuantizeLSTM"))
def _lstm(n: Use) -> None:
    weights = [_recurrent(n, "W", 1, 8), _recurrent(n, "R", 2, 10)]
    inputs = [n.x(0), *weights, *(n.x(i) for i in range(3, 8))]
    n.emit_all("LSTM", inputs, n.node.output, name=n.name, **n.kept(*_LSTM))


def _recurrent(n: Use, what: str, codes: int, scale: int) -> str:
    """Return weights (directions, gates, size) of codes, which have the last two axes changed."""
    array = n.weight(codes)
    steps, zeros = n.weight(scale), n.weight(scale + 1)
    along = (len(array), 1, -1)  # a scale for each direction, or for each of its gates too
    steps = np.broadcast_to(steps.reshape(along), (len(array), 1, array.shape[2]))
    zeros = np.broadcast_to(zeros.reshape(along), steps.shape).astype(np.float32)
    return n.constant(what, ((array.astype(np.float32) - zeros) * steps).transpose(0, 2, 1))
