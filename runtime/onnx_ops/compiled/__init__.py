"""ONNX operators in ONNX's form that have compiled kernels, and how these are called.

That is decided for every node and set of input shapes: by the operator, and because all of its
tensors are float32, not empty, and of known shapes. NumPy does the rest, see `numpy_ops`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping

import numpy as np

from logshift.runtime.graph import Graph, Inference, Node
from logshift.runtime.onnx_ops.compiled.moves import VIEWS, order
from logshift.runtime.onnx_ops.compiled.site import FLOAT, Builder, Site
from logshift.runtime.onnx_ops.compiled.views import View
from logshift.runtime.plan.call import Call

# What makes the calls for a node, None where only NumPy can do it. A module here says what it
# builds as `OPERATORS`; all are found by themselves.
OPERATORS: dict[str, Builder] = {}

for _module in pkgutil.iter_modules(__path__):
    _found = importlib.import_module(f"{__name__}.{_module.name}")
    OPERATORS |= getattr(_found, "OPERATORS", {})


def calls(
    graph: Graph,
    found: Inference,
    prepared: dict[str, np.ndarray] | None = None,
    turned: Mapping[int, str] | None = None,
) -> dict[int, tuple[Call, ...]]:
    """Return how kernels are called for the nodes that have any, by their positions.

    There is no call for an operator whose output is its input under another name and shape. Calls
    may read what a node's inputs are made of, instead of these.

    Parameters
    ----------
    graph : Graph
    found : Inference
        Gets what lies between the calls of one node.
    prepared : dict of name to array, optional
        Constants that were laid out for kernels, for the next time; empty at first.
    turned : dict of a node's position to name, optional
        See `turned_back`.
    """
    prepared, result, views = {} if prepared is None else prepared, {}, dict[str, View]()
    for index, node in enumerate(graph.nodes):
        build = OPERATORS.get(node.op) if node.is_onnx else None
        is_float = _is_float(node, found)
        if build is None or not (is_float or _is_cast(node, found)):
            continue
        site = Site(graph, node, found, prepared, views)
        if (made := build(site)) is not None:
            result[index] = tuple(made)
        if is_float and node.op in VIEWS and index not in (turned or ()):
            parts = VIEWS[node.op](site, site.view(site.x)) or ()
            views.update(zip(node.outputs, parts, strict=False))
    return result


def turned_back(graph: Graph, found: Inference) -> dict[int, str]:
    """Return which Transposes give the bytes of a packed operator's output, as that is stored.

    That is channels last, and what a converted MatMul is followed by.

    Returns
    -------
    dict of a node's position to the name of that operator's output
    """
    sources: dict[str, str] = {}  # of views, by their names
    result = {}
    # These may need a border around what they read.
    packed = {name for node in graph.nodes if not node.is_onnx for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        if not node.is_onnx:
            out = node.outputs[0]
            if out not in packed and not graph.is_code(out):
                sources[out] = out
            continue
        source = sources.get(node.inputs[0]) if node.inputs else None
        if source is None or node.op not in VIEWS or not _is_float(node, found):
            continue
        site = Site(graph, node, found, {}, {})
        whole = VIEWS[node.op](site, site.view(site.x))
        size = math.prod(site.shape(site.x))
        if whole and whole[0].is_whole and math.prod(whole[0].shape) == size:
            sources[node.outputs[0]] = source
        elif node.op == "Transpose" and _is_channels_last(site, source):
            result[index] = source
    return result


def _is_cast(node: Node, found: Inference) -> bool:
    """Tell whether a node changes the type of what is not known before a run."""
    return node.op == "Cast" and node.outputs[0] not in found.values


def _is_float(node: Node, found: Inference) -> bool:
    """Tell whether all that a node reads and writes is float32, and there is something."""
    outputs = [name for name in node.outputs if name]
    first = slice(1, 2) if node.op == "Where" else slice(1)
    for name in (*node.inputs[first], *outputs):
        if found.dtypes.get(name) != FLOAT or 0 in found.shapes[name]:
            return False
    return found.values.keys().isdisjoint(outputs)


def _is_channels_last(n: Site, source: str) -> bool:
    """Whether a Transpose of a view of a tensor gives the bytes of that, channels last."""
    shape, whole = n.shape(n.x), n.shape(source)
    sizes = [size for size in whole if size != 1]
    if len(whole) != 4 or sizes != [size for size in shape if size != 1]:
        return False
    last = [axis for axis in (0, 2, 3, 1) if whole[axis] != 1]
    places = iter(axis for axis, size in enumerate(whole) if size != 1)
    axis_of = {axis: next(places) for axis, size in enumerate(shape) if size != 1}
    return [axis_of[axis] for axis in order(n) or () if axis in axis_of] == last
