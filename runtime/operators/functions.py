"""Functions of one float32 tensor, element by element."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logshift.kernels.functions import UNARY_FUNCTIONS
from logshift.runtime.graph import Node, Shape
from logshift.runtime.operators.base import (
    NO_CLAMP,
    Attributes,
    Operator,
    Site,
    clamp,
    number,
    rank4,
)
from logshift.runtime.plan.call import Call

# What kernels call them, and their attributes.
_FUNCTIONS: dict[str, tuple[str, Attributes]] = {
    "Clip": ("clip", {"clamp": (NO_CLAMP, clamp)}),
    "Elu": ("elu", {"alpha": (1.0, number)}),
    "Gelu": ("gelu", {}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": (0.2, number), "beta": (0.5, number)}),
    "HardSwish": ("hard_swish", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": (0.01, number)}),
    "Sigmoid": ("sigmoid", {}),
    "Swish": ("silu", {}),
    "Tanh": ("tanh", {}),
}


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    return rank4(inputs[0])


def _build(site: Site) -> Iterator[Call]:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    alpha, beta = a.get("alpha", 0.0), a.get("beta", 0.0)
    if site.node.op == "Clip":
        alpha, beta = site.bounds().values()
    elif site.node.op == "HardSwish":
        alpha, beta = np.float32(1 / 6), 0.5
    function = [*UNARY_FUNCTIONS].index(_FUNCTIONS[site.node.op][0])
    fields = y.sizes | {"function": function, "alpha": alpha, "beta": beta}
    yield Call("float_unary", {"x": x.name, "y": y.name}, fields)


OPERATORS = [
    Operator(name, "ff", _shape, _build, attributes) for name, (_, attributes) in _FUNCTIONS.items()
]
