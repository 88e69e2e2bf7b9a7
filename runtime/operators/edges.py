"""Operators at the edges: from float32 to codes and back, and to what ONNX operators read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from logshift.runtime.graph import Node, Shape
from logshift.runtime.operators.base import NodeError, Operator, Site, rank4
from logshift.runtime.plan.call import Call


def _same_shape(node: Node, inputs: list[Shape]) -> Shape:
    return inputs[0]


def _quantize(site: Site) -> Iterator[Call]:
    x, y = site.inputs[0], site.output
    q = y.quantization
    assert q is not None
    fields = {"scale": np.float32(q.scale), "zero_point": q.zero_point, "top": q.top}
    yield Call("quantize", {"x": x.name, "y": y.name}, y.sizes | fields)


def _dequantize(site: Site) -> Iterator[Call]:
    x, y = site.inputs[0], site.output
    q = x.quantization
    assert q is not None
    fields = {"scale": np.float32(q.scale), "zero_point": q.zero_point}
    yield Call("dequantize", {"x": x.name, "y": y.name}, y.sizes | fields)


def _flat_shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = rank4(inputs[0])
    if h != 1 or w != 1:
        raise NodeError(f"flattens only tensors of height and width 1, got {inputs[0]}")
    return (n, c)


def _nothing(site: Site) -> Iterator[Call]:
    yield from ()


OPERATORS = [
    Operator("QuantizeLinear", "fc", _same_shape, _quantize, reads_onnx=True, writes_parts=True),
    Operator("DequantizeLinear", "cf", _same_shape, _dequantize, writes_onnx=True),
    Operator("Flatten", "ff", _flat_shape, _nothing, renames=True),
]
