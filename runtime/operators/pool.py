"""Pooling: windows of a picture, or all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime import geometry
from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.operators.base import (
    REQUIRED,
    Attributes,
    NodeError,
    Operator,
    Site,
    integers,
    one_of,
    rank4,
)
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import ELEMENT


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, *sizes = rank4(inputs[0])
    a = node.attributes
    height, width = (
        geometry.pool_windows(
            sizes[i], geometry.extent(a["kernel_shape"][i], a["dilations"][i]), a["strides"][i],
            a["pads"][i], a["pads"][2 + i], a["ceil_mode"],
        )
        for i in (0, 1)
    )  # fmt: skip
    return (n, c, height, width)


def _global_shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, _, _ = rank4(inputs[0])
    return (n, c, 1, 1)


def pads_fit(pads: Sequence[int], kernel: Sequence[int]) -> bool:
    """Tell whether pads are allowed: less than the kernel's size."""
    return all(0 <= pad < kernel[side % 2] for side, pad in enumerate(pads))


def _check(graph: Graph, node: Node) -> None:
    a = node.attributes
    if not pads_fit(a["pads"], a["kernel_shape"]):
        raise NodeError(f"pads {a['pads']} must be below kernel_shape {a['kernel_shape']}")


def window_of(node: Node, x: Shape) -> dict[str, Any]:
    """Return the attributes of a node's windows; those of a global one take all of a picture."""
    a = node.attributes
    if node.op.startswith("Global"):
        a = {
            "kernel_shape": list(x[2:]), "strides": [1, 1],
            "dilations": [1, 1], "pads": [0, 0, 0, 0],
        }  # fmt: skip
    if math.prod(a["kernel_shape"]) >= 2**23:
        raise InputError(f"node {node.name!r}: a window of {a['kernel_shape']} is too large")
    return a


def _largest(site: Site) -> Iterator[Call]:
    yield _pool(site, "pool_max", window_of(site.node, site.inputs[0].shape), {})


def _average(site: Site) -> Iterator[Call]:
    a = window_of(site.node, site.inputs[0].shape)
    x, q_y = site.inputs[0], site.output.quantization
    _, _, h, w = x.shape
    counted = a["pads"] if a.get("count_include_pad") else [0, 0, 0, 0]
    fields: dict[str, Any] = {
        "count_low_h": x.top - counted[0], "count_high_h": x.top + h + counted[2],
        "count_low_w": x.left - counted[1], "count_high_w": x.left + w + counted[3],
    }  # fmt: skip
    if x.quantization is not None and q_y is not None:
        counts = np.arange(math.prod(a["kernel_shape"]) + 1, dtype=np.float64)
        counts[0] = 1  # a window with nothing in it has a sum of 0 to divide
        fields |= {
            "z_x": x.quantization.zero_point, "b": q_y.zero_point,
            "m": (x.quantization.scale / (counts * q_y.scale)).astype(np.float32),
        }  # fmt: skip
    yield _pool(site, "pool_average", a, fields)


def _pool(site: Site, op: str, a: dict[str, Any], more: dict[str, Any]) -> Call:
    x, y = site.inputs[0], site.output
    _, _, h, w = x.shape
    kernel_h, kernel_w = a["kernel_shape"]
    fields = {
        "kernel_h": kernel_h, "kernel_w": kernel_w,
        "stride_h": a["strides"][0], "stride_w": a["strides"][1],
        "dilation_h": a["dilations"][0], "dilation_w": a["dilations"][1],
        "row0": x.top - a["pads"][0], "column0": x.left - a["pads"][1],
        "low_h": x.top, "high_h": x.top + h, "low_w": x.left, "high_w": x.left + w,
    }  # fmt: skip
    return Call(
        site.kernel_op(op), {"x": x.name, "y": y.name},
        y.sizes | fields | more | site.bounds(), ELEMENT * kernel_h * kernel_w,
    )  # fmt: skip


_ATTRIBUTES: Attributes = {
    "kernel_shape": (REQUIRED, integers(2, 1)),
    "strides": ([1, 1], integers(2, 1)),
    "pads": ([0, 0, 0, 0], integers(4, 0)),
    "dilations": ([1, 1], integers(2, 1)),
    "ceil_mode": (0, one_of(0, 1)),
}

OPERATORS = [
    Operator(
        "MaxPool", "cc ff", _shape, _largest, _ATTRIBUTES, check=_check, keeps_quantization=True,
        writes_parts=True,
    ),
    Operator(
        "AveragePool", "cc ff", _shape, _average,
        {**_ATTRIBUTES, "count_include_pad": (0, one_of(0, 1))}, check=_check, writes_parts=True,
    ),
    Operator(
        "GlobalMaxPool", "cc ff", _global_shape, _largest, keeps_quantization=True,
        writes_parts=True,
    ),
    Operator("GlobalAveragePool", "cc ff", _global_shape, _average, writes_parts=True),
]  # fmt: skip
