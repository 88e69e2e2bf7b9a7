"""Functions of each element, of one tensor or of several that are repeated to one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.functions import ERF_DENOMINATOR, ERF_NUMERATOR
from logshift.runtime.onnx_ops.numpy_ops.call import (
    Array,
    Call,
    Implementation,
    check_broadcast,
    limited,
    widened,
)


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += coefficient
    return y


def _erf(x: Array) -> Array:
    x = np.clip(widened(x), -4, 4)
    square = x * x
    y = _polynomial(square, ERF_NUMERATOR)
    y *= x
    y /= _polynomial(square, ERF_DENOMINATOR)
    return np.clip(y, -1, 1, out=y)


def _sigmoid(x: Array) -> Array:
    # Where exp(-x) overflows to infinity, the result is 0, as it should be.
    y = np.negative(widened(x))
    np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def _softplus(x: Array) -> Array:
    y = np.negative(np.abs(x))
    np.exp(y, out=y)
    np.log1p(y, out=y)
    y += np.maximum(x, 0)
    return y


def _gelu(x: Array, approximate: str) -> Array:
    if approximate not in ("none", "tanh"):
        raise InputError(f"attribute approximate is {approximate!r}")
    if approximate == "tanh":
        y = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))
    else:
        y = _erf(x * math.sqrt(0.5))
    y += 1
    y *= x
    y *= 0.5
    return y


def _elu(x: Array, alpha: float) -> Array:
    y = np.minimum(x, 0)
    np.expm1(y, out=y)
    y *= alpha
    y += np.maximum(x, 0)
    return y


def _celu(x: Array, alpha: float) -> Array:
    return np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha)


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    y = x * alpha
    y += beta
    return np.clip(y, 0, 1, out=y)


def _shrink(x: Array, bias: float, lambd: float) -> Array:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


def _is_infinite(x: Array, detect_negative: int, detect_positive: int) -> Array:
    return (np.isposinf(x) & bool(detect_positive)) | (np.isneginf(x) & bool(detect_negative))


_UNARY: dict[str, Callable[[Array], Array]] = {
    "Abs": np.abs, "Acos": np.arccos, "Acosh": np.arccosh, "Asin": np.arcsin,
    "Asinh": np.arcsinh, "Atan": np.arctan, "Atanh": np.arctanh, "BitwiseNot": np.invert,
    "Ceil": np.ceil, "Cos": np.cos, "Cosh": np.cosh, "Erf": _erf, "Exp": np.exp,
    "Floor": np.floor, "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "Identity": lambda x: x, "IsNaN": np.isnan, "Log": np.log,
    "Mish": lambda x: x * np.tanh(_softplus(x)), "Neg": np.negative, "Not": np.logical_not,
    "Reciprocal": np.reciprocal, "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Round": np.rint, "Sigmoid": _sigmoid, "Sign": np.sign, "Sin": np.sin, "Sinh": np.sinh,
    "Softplus": _softplus, "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt,
    "Tan": np.tan, "Tanh": np.tanh,
}  # fmt: skip

# With attributes, and their defaults.
_PARAMETRIC: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "Celu": (_celu, {"alpha": 1.0}),
    "Elu": (_elu, {"alpha": 1.0}),
    "Gelu": (_gelu, {"approximate": "none"}),
    "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "IsInf": (_is_infinite, {"detect_negative": 1, "detect_positive": 1}),
    "LeakyRelu": (lambda x, alpha: np.where(x < 0, alpha * x, x), {"alpha": 0.01}),
    "Selu": (lambda x, alpha, gamma: gamma * _elu(x, alpha),
             {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}),
    "Shrink": (_shrink, {"bias": 0.0, "lambd": 0.5}),
    "Swish": (lambda x, alpha: x * _sigmoid(alpha * x), {"alpha": 1.0}),
    "ThresholdedRelu": (lambda x, alpha: np.where(x > alpha, x, 0), {"alpha": 1.0}),
}  # fmt: skip


def _divide(x: Array, y: Array) -> Array:
    if x.dtype.kind not in "iu":
        return np.divide(x, y)
    # Towards zero; by zero it is 0, as in NumPy.
    return x // y + ((np.remainder(x, y) != 0) & ((x < 0) != (y < 0))).astype(x.dtype)


def _power(x: Array, y: Array) -> Array:
    return np.power(x.astype(np.result_type(x, y)), y).astype(x.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add, "And": np.logical_and, "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor, "Div": _divide, "Equal": np.equal,
    "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Mul": np.multiply, "Or": np.logical_or,
    "PRelu": lambda x, slope: np.where(x < 0, x * np.broadcast_to(slope, x.shape), x),
    "Pow": _power, "Sub": np.subtract, "Xor": np.logical_xor,
}  # fmt: skip

_VARIADIC: dict[str, Callable[[list[Array]], Array]] = {
    "Max": lambda xs: reduce(np.maximum, xs), "Min": lambda xs: reduce(np.minimum, xs),
    "Sum": lambda xs: reduce(np.add, xs),
    "Mean": lambda xs: reduce(np.add, xs) / xs[0].dtype.type(len(xs)),
}  # fmt: skip


def _each(function: Callable[..., Array], x: Array, **values: Any) -> Array:
    # NumPy makes numbers of arrays without dimensions, and those have other rules.
    y = function(x.reshape(x.shape or 1), **values)
    return (y if y.dtype == bool else y.astype(x.dtype, copy=False)).reshape(x.shape)


def _parametric(c: Call) -> Array:
    function, defaults = _PARAMETRIC[c.op]
    return _each(function, c.x, **{name: c.get(name, value) for name, value in defaults.items()})


def _mod(c: Call) -> Array:
    if not c.get("fmod", 0):
        return np.mod(c.x, c.input(1))
    return np.fmod(c.x, c.input(1))


def _swiglu(c: Call) -> Array:
    gate, x = c.x, c.input(1)
    if gate.shape != x.shape:
        raise InputError(f"multiplies {gate.shape} with {x.shape}")
    return _parametric(Call("Swish", c.attributes, c.opset, [gate], 1)) * x


def _bit_shift(c: Call) -> Array:
    return (np.left_shift if c.get("direction") == "LEFT" else np.right_shift)(c.x, c.input(1))


def _dropout(c: Call) -> list[Array]:
    training = c.optional(2)
    if training is not None and training.item():
        raise InputError("is in training mode; export the model for inference")
    return [c.x, np.ones(c.x.shape, bool)]


def _clip(c: Call) -> Array:
    low, high = (
        c.get(name) if given is None else given.reshape(())
        for name, given in (("min", c.optional(1)), ("max", c.optional(2)))
    )
    if low is None and high is None:
        return c.x
    dtype = c.x.dtype
    bounds: list[Any] = [None if v is None else np.asarray(v, dtype) for v in (low, high)]
    return np.clip(c.x, bounds[0], bounds[1])


def _where(c: Call) -> Array:
    check_broadcast(c.x, c.input(1), c.input(2))
    return np.where(c.x, c.input(1), c.input(2))


def _of_one(function: Callable[[Array], Array]) -> Callable[[Call], Array]:
    return lambda c: _each(function, c.x)


def _of_two(function: Callable[[Array, Array], Array]) -> Callable[[Call], Array]:
    def run(c: Call) -> Array:
        check_broadcast(c.x, c.input(1))
        return function(c.x, c.input(1))

    return run


def _of_all(function: Callable[[list[Array]], Array]) -> Callable[[Call], Array]:
    def run(c: Call) -> Array:
        limited(np.broadcast_shapes(*(x.shape for x in c.all())))
        return function(c.all())

    return run


OPERATORS: dict[str, Implementation] = {
    **{op: _of_one(f) for op, f in _UNARY.items()},
    **{op: _of_two(f) for op, f in _BINARY.items()},
    **{op: _of_all(f) for op, f in _VARIADIC.items()},
    **dict.fromkeys(_PARAMETRIC, _parametric),
    "BitShift": _bit_shift, "Clip": _clip, "Dropout": _dropout, "Mod": _mod, "SwiGLU": _swiglu,
    "Where": _where,
}  # fmt: skip
