"""Functions of one tensor, or of two, element by element."""

from __future__ import annotations

import math
from functools import partial

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
        names = n.node.inputs
        if len(names) < 2 or not all(map(n.is_float, names)):
            return None
        if np.broadcast_shapes(*map(n.shape, names[:2])) != n.shape(n.y):
            return None
        others = [_of_two(n, n.y, r, function) for r in names[2:]]
        return [_of_two(n, n.x, names[1], function), *others]

    return build


def _of_two(n: Site, x: str, r: str, function: str) -> Call:
    whole = n.shape(n.y)
    if n.shape(x) == n.shape(r):
        table = axes([math.prod(whole)], [1], [1], [1])
    else:
        steps = (repeated(n.shape(name), whole) for name in (x, r))
        table = axes(whole, contiguous(whole), *steps)
    fields = fields_of(table)
    fields["function"] = [*functions.ONNX_BINARY_FUNCTIONS].index(function)
    return Call("onnx_binary", {"x": x, "r": r, "y": n.y}, fields)


def _power(n: Site) -> list[Call] | None:
    if n.shape(n.x) != n.shape(n.y):
        return None
    if n.value(1) == 2:
        return [_of_two(n, n.x, n.x, "mul")]
    function = {0.5: "sqrt", 3: "cube"}.get(n.value(1))
    return None if function is None else [_function(n, function)]


def _gelu(n: Site) -> list[Call]:
    return [_function(n, "gelu_tanh" if n.get("approximate", "none") == "tanh" else "gelu")]


def _batch_normalization(n: Site) -> list[Call] | None:
    """Subtract the mean, multiply by one factor, and add the bias, of each channel."""
    scale, bias, mean, variance = (n.found.values.get(n.name(index)) for index in range(1, 5))
    if scale is None or bias is None or mean is None or variance is None or n.output(1):
        return None
    if len(n.shape(n.x)) < 2:
        return None
    shape = (-1, *(1,) * (len(n.shape(n.x)) - 2))
    factor = scale / np.sqrt(variance + n.get("epsilon", 1e-5))
    names = [
        n.constant(what, partial(np.reshape, value.astype(np.float32), shape))
        for what, value in (("mean", mean), ("factor", factor), ("bias", bias))
    ]
    functions = ("sub", "mul", "add")
    sources = (n.x, n.y, n.y)
    return [_of_two(n, *each) for each in zip(sources, names, functions, strict=True)]


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
    "Abs": _unary("abs"), "BatchNormalization": _batch_normalization, "Ceil": _unary("ceil"),
    "Clip": _clip, "Elu": _unary("elu", alpha=1), "Erf": _unary("erf"),
    "Exp": _unary("exp"), "Floor": _unary("floor"), "Gelu": _gelu,
    "HardSigmoid": _unary("hard_sigmoid", alpha=0.2, beta=0.5),
    "HardSwish": lambda n: [_function(n, "hard_swish", 1 / 6, 0.5)],
    "LeakyRelu": _unary("leaky_relu", alpha=0.01), "Neg": _unary("neg"),
    "Reciprocal": _unary("reciprocal"), "Relu": lambda n: [_function(n, "clip", 0, math.inf)],
    "Round": _unary("round"), "Sigmoid": _unary("sigmoid"), "Softsign": _unary("softsign"),
    "Sqrt": _unary("sqrt"), "Swish": _unary("swish", alpha=1), "Tanh": _unary("tanh"),
    "ThresholdedRelu": _unary("thresholded_relu", alpha=1),
}  # fmt: skip
