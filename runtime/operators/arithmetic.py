"""Sums, differences and products of two tensors, which are repeated to each other's shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from logshift.kernels.activation import target
from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.operators.base import (
    NO_CLAMP,
    Attributes,
    NodeError,
    Operator,
    Site,
    check_activation,
    check_clamp,
    clamp,
    rank4,
    target_of,
)
from logshift.runtime.plan.call import Call

# Bytes of a part of a row that is computed at once where a tensor is repeated along it: long enough
# for the loops, short enough for the first-level cache.
_REPEATED = 2**12


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    first, second = map(rank4, inputs)
    if any(1 not in pair and len(set(pair)) > 1 for pair in zip(first, second, strict=True)):
        raise NodeError(f"cannot broadcast shapes {first} and {second} to each other")
    return tuple(map(max, first, second))


def _check(graph: Graph, node: Node) -> None:
    check_clamp(graph, node)
    check_activation(graph, node, 1)


def _check_product(graph: Graph, node: Node) -> None:
    _check(graph, node)
    if not graph.on_codes(node):
        return
    first, second, q = (graph.quantization[name] for name in (*node.inputs, *node.outputs))
    # Keeps t * M + B far from float32 infinity for any codes.
    if first.scale * second.scale / min(q.scale, target_of(graph, node).unit) > 1e15:
        raise NodeError("the input scales are absurdly large against the output scale")


def _build(site: Site) -> Iterator[Call]:
    x, r = site.inputs
    yield _on_floats(site) if x.quantization is None else _on_codes(site)


def _on_codes(site: Site) -> Call:
    (x, r), y, op = site.inputs, site.output, site.node.op
    q_x, q_r, q_y = x.quantization, r.quantization, y.quantization
    assert q_x is not None and q_r is not None and q_y is not None
    to = target(site.node.activation, q_y.scale, q_y.zero_point)
    factors: dict[str, Any]
    if op == "Mul":
        factors = {"m": np.float32(q_x.scale * q_r.scale / to.unit)}
    else:
        m_r = np.float32(q_r.scale / to.unit)
        factors = {"m": np.float32(q_x.scale / to.unit), "m_r": -m_r if op == "Sub" else m_r}
    if to.kind:
        factors |= {"activation": to.kind, "coefficients": to.coefficients}
    if to.slopes is not None:
        factors["slopes"] = to.slopes
    _, channels, _, width = y.shape
    parts = -(-width * channels // _REPEATED)
    fields = {
        "x_height": x.shape[2], "x_width": x.shape[3],
        "r_height": r.shape[2], "r_width": r.shape[3],
        "z_x": q_x.zero_point, "z_r": q_r.zero_point, "b": to.zero,
        "pixels": -(-width // parts),
    }  # fmt: skip
    return Call(
        "multiply" if op == "Mul" else "add", {"x": x.name, "r": r.name, "y": y.name},
        y.sizes | fields | factors | site.bounds(),
    )  # fmt: skip


def _on_floats(site: Site) -> Call:
    (x, r), y = site.inputs, site.output
    steps: dict[str, Any] = {}
    for key, tensor in (("x", x), ("r", r)):
        for axis, size, whole in zip("nchw", tensor.shape, y.shape, strict=True):
            steps[f"{key}_step_{axis}"] = size == whole
    return Call(
        f"float_{site.node.op.lower()}", {"x": x.name, "r": r.name, "y": y.name},
        y.sizes | steps | site.bounds(),
    )  # fmt: skip


_ATTRIBUTES: Attributes = {"clamp": (NO_CLAMP, clamp)}

OPERATORS = [
    Operator("Add", "cc ff", _shape, _build, _ATTRIBUTES, (2, 2), check=_check, activates=True),
    Operator("Sub", "cc ff", _shape, _build, _ATTRIBUTES, (2, 2), check=_check, activates=True),
    Operator(
        "Mul", "cc ff", _shape, _build, _ATTRIBUTES, (2, 2), check=_check_product, activates=True
    ),
]
