"""Functions of one tensor, or of two, element by element."""

from __future__ import annotations

import math

import numpy as np

from logshift.kernels import functions
from logshift.runtime.onnx_ops.compiled.site import (
    Builder,
    Site,
    axes,
    fields_of,
    repeated,
)
from logshift.runtime.onnx_ops.compiled.views import contiguous
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import FUNCTION


def _binary(function: str) -> Builder:
    def build(n: Site) -> list[Call] | None:
        if len(n.node.inputs) != 2 or not n.is_float(n.node.inputs[1]):
            return None
        return [_of_two(n, n.node.inputs[1], function)]

    return build


def _of_two(n: Site, r: str, function: str) -> Call:
    whole = n.shape(n.y)
    if n.shape(n.x) == n.shape(r):
        table = axes([math.prod(whole)], [1], [1], [1])
    else:
        steps = (repeated(n.shape(name), whole) for name in (n.x, r))
        table = axes(whole, contiguous(whole), *steps)
    fields = fields_of(table)
    fields["function"] = [*functions.ONNX_BINARY_FUNCTIONS].index(function)
    return Call("onnx_binary", {"x": n.x, "r": r, "y": n.y}, fields)


def _power(n: Site) -> list[Call] | None:
    return [_of_two(n, n.x, "mul")] if n.value(1) == 2 and n.shape(n.x) == n.shape(n.y) else None


def _unary(function: str, **defaults: float) -> Builder:
    """Apply a function, which has attributes of these names, to each element."""
    return lambda n: [_function(n, function, **{k: n.get(k, v) for k, v in defaults.items()})]


def _function(n: Site, function: str, alpha: float = 0, beta: float = 0) -> Call:
    with np.errstate(over="ignore"):
        alpha, beta = float(np.float32(alpha)), float(np.float32(beta))
    fields = {
        "n": math.prod(n.shape(n.x)), "height": 1, "width": 1, "channels": 1,
        "function": [*functions.ONNX_UNARY_FUNCTIONS].index(function), "alpha": alpha, "beta": beta,
    }  # fmt: skip
    return Call("onnx_unary", {"x": n.x, "y": n.y}, fields, FUNCTION)


def _clip(n: Site) -> list[Call] | None:
    bounds = []
    for index, name, none in ((1, "min", -math.inf), (2, "max", math.inf)):
        bound = n.value(index) if n.given(index) else n.get(name, none)
        if not isinstance(bound, int | float) or bound != bound:
            return None
        bounds.append(bound)
    return [_function(n, "clip", *bounds)]


OPERATORS: dict[str, Builder] = {
    "Add": _binary("add"), "Div": _binary("div"), "Max": _binary("maximum"),
    "Min": _binary("minimum"), "Mul": _binary("mul"), "PRelu": _binary("prelu"), "Pow": _power,
    "Sub": _binary("sub"), "Sum": _binary("add"),
    "Abs": _unary("abs"), "Clip": _clip, "Elu": _unary("elu", alpha=1), "Erf": _unary("erf"),
    "Exp": _unary("exp"), "HardSigmoid": _unary("hard_sigmoid", alpha=0.2, beta=0.5),
    "HardSwish": lambda n: [_function(n, "hard_swish", 1 / 6, 0.5)],
    "LeakyRelu": _unary("leaky_relu", alpha=0.01), "Neg": _unary("neg"),
    "Reciprocal": _unary("reciprocal"), "Relu": lambda n: [_function(n, "clip", 0, math.inf)],
    "Sigmoid": _unary("sigmoid"), "Sqrt": _unary("sqrt"), "Swish": _unary("swish", alpha=1),
    "Tanh": _unary("tanh"),
}  # fmt: skip
