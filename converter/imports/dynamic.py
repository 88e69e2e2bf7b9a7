"""Dynamic quantization taken back: scales that are measured at every run, on tensors of floats.

ConvInteger and MatMulInteger of what DynamicQuantizeLinear gave, a Cast, and Muls by the scales are
a Conv or MatMul of floats; weights are what their codes stand for. Older quantizers divide the bias
by the scales, round it, and add it to the sums.
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
_VIEWS = ("Identity", "Reshape", "Squeeze", "Unsqueeze")
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
    end = _End(n, [scale])
    weight = dequantized(n.weight(1), np.ones(()), _zero(n, 3), 0)
    if not {end.factor.size, end.bias.size} <= {1, len(weight)}:
        raise Stays("its sums are multiplied by, or added to, what is not one number a channel")
    weight = weight * end.factor.reshape(-1, *[1] * (weight.ndim - 1))
    inputs = [x, n.constant("weight", weight)]
    if end.bias.any():
        inputs.append(n.constant("bias", np.broadcast_to(end.bias, len(weight))))
    n.emit("Conv", inputs, end.tensor, name=n.name, **n.kept(*_CONV))


@_rule(("", "MatMulInteger"))
def _matmul(n: Use) -> None:
    a, scale = _operand(n, 0, 2)
    if n.array(1) is None:
        b, other = _operand(n, 1, 3)
        end = _End(n, [scale, other])
        if end.factor.size != 1 or end.bias.any():
            raise Stays("its sums are multiplied by a scale that is not one number, or added to")
        y = n.emit("MatMul", [a, b], name=n.name)
        n.scaled(y, float(end.factor[0]), end.tensor)
        return
    end = _End(n, [scale])
    weight = dequantized(n.weight(1), np.ones(()), _zero(n, 3), -1)
    if not {end.factor.size, end.bias.size} <= {1, weight.shape[-1]}:
        raise Stays("its sums are multiplied by, or added to, what is not one number a column")
    inputs = [a, n.constant("weight", weight * end.factor)]
    y = n.emit("MatMul", inputs, None if end.bias.any() else end.tensor, name=n.name)
    if end.bias.any():
        n.emit("Add", [y, n.constant("bias", end.bias)], end.tensor)


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


class _End:
    """What the sums of a node end as, several nodes later: floats again.

    Sums of integers are a product of floats, divided by the scales of what was quantized. A bias
    may be added; then they are cast, and multiplied by these scales and others. The nodes that do
    so are dropped.

    Parameters
    ----------
    n : Use
    scales : names of the scales of what was quantized

    Attributes
    ----------
    tensor : str
        The last of these nodes' result.
    factor, bias : float64 arrays, one-dimensional
        It is the product of floats times `factor`, plus `bias`.
    """

    def __init__(self, n: Use, scales: list[str]) -> None:
        self.factor, self.bias = np.ones(1), np.zeros(1)
        wanted = [name for name in scales if n.edit.array(name) is None]
        for name in scales:
            if (array := n.edit.array(name)) is not None:
                self.factor = self.factor / array.astype(np.float64).reshape(-1)
        nodes, added = [_only_reader(n, n.y(), "Cast", "Add")], ""
        if nodes[0].op_type == "Add":
            added = next(name for name in nodes[0].input if name != n.y())
            nodes.append(_only_reader(n, nodes[0].output[0], "Cast"))
        if nodes[-1].attribute[0].i != TensorProto.FLOAT:
            raise Stays("its sums are not cast to float32")
        factors: list[str] = []
        while wanted:
            result = nodes[-1].output[0]
            nodes.append(_only_reader(n, result, "Mul"))
            other = next(name for name in nodes[-1].input if name != result)
            for name in _factors(n, other):
                factors.append(name)
                if name in wanted:
                    wanted.remove(name)
                elif (array := n.edit.array(name)) is not None:
                    self.factor = self.factor * array.astype(np.float64).reshape(-1)
                else:
                    raise Stays(f"its sums are multiplied by {name!r}, which is no constant")
        if added:
            self.bias = _bias(n, added, factors)
        for node in nodes:
            n.edit.drop(node)
        self.tensor = nodes[-1].output[0]


def _bias(n: Use, name: str, factors: list[str]) -> np.ndarray:
    """Return the real values of a bias that was divided by factors and rounded."""
    while (array := n.edit.array(name)) is None:
        node = n.edit.producers.get(name)
        if node is None or node.op_type not in (*_VIEWS, "Cast", "Floor", "Round", "Div"):
            raise Stays(f"what is added to its sums, {name!r}, is no bias")
        if node.op_type == "Div":
            if sorted(_factors(n, node.input[1])) != sorted(factors):
                raise Stays(f"its bias {name!r} has another scale than its sums")
            factors = []
        name = node.input[0]
    if factors:
        raise Stays(f"its bias {name!r} has no scale")
    return array.astype(np.float64).reshape(-1)


def _only_reader(n: Use, name: str, *ops: str) -> onnx.NodeProto:
    readers = n.edit.readers.get(name, [])
    if len(readers) != 1 or readers[0].op_type not in ops or name in n.edit.outputs:
        raise Stays(f"its sums {name!r} are not read by one {' or '.join(ops)} alone")
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
    if node.op_type in _VIEWS:
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
