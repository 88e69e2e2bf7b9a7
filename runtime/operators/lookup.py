"""Lookup: a function of one tensor of codes, as a table, or as one for each channel."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.operators.base import NodeError, Operator, Site
from logshift.runtime.operators.moves import copy
from logshift.runtime.plan.call import Call


def has_one_table(node: Node) -> bool:
    """Tell whether a node is a Lookup of one table for all channels."""
    return node.op == "Lookup" and node.table is not None and node.table.ndim == 1


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    assert node.table is not None
    if node.table.ndim == 2 and node.table.shape[:1] != inputs[0][1:2]:
        raise NodeError(
            f"has tables for {len(node.table)} channels, its input has shape {inputs[0]}"
        )
    return inputs[0]


def _check(graph: Graph, node: Node) -> None:
    if node.table is None:
        raise NodeError("table is missing")
    shape, dtype = node.table.shape, node.table.dtype
    if dtype != np.uint8 or not 1 <= len(shape) <= 2 or shape[-1] != 256 or shape[0] < 1:
        raise NodeError(
            f"the table is {dtype} of shape {shape}, expected uint8 of shape (256,) or (C, 256)"
        )
    if int(node.table.max()) > graph.quantization[node.outputs[0]].top:
        raise NodeError("the table holds values that are no output codes")


def _build(site: Site) -> Iterator[Call]:
    x, y, table = site.inputs[0], site.output, site.node.table
    assert table is not None
    if has_one_table(site.node):
        yield copy(site, x, table=table)
    else:
        fields = y.sizes | {"tables": np.ascontiguousarray(table)}
        yield Call("lookup_channels", {"x": x.name, "y": y.name}, fields)


OPERATORS = [
    Operator("Lookup", "cc", _shape, _build, check=_check, stores="table", writes_parts=True)
]
