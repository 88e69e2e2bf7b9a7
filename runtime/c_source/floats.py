"""What comes before and after the codes: moves and functions of float32, of the runtime's bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from logshift.runtime.c_source.site import Site, emits, refused
from logshift.runtime.c_source.source import nest, number
from logshift.runtime.c_source.tensors import Tensor
from logshift.runtime.graph import Shape
from logshift.runtime.operators.base import bounds


def _are_floats(site: Site, x: Tensor) -> None:
    if x.quantization is not None or site.output.quantization is not None:
        raise refused(site.node, "mixes codes and float32", "nothing in keep_float")


def _each(site: Site, value: str) -> None:
    x, y = site.inputs[0], site.output
    _are_floats(site, x)
    body = nest([x.size], {"i": (0, 1)}, f"y[i] = {value};")
    site.write(body, "const float *x, float *restrict y", lambda: x.pointer, lambda: y.pointer)


def _steps(shape: Shape) -> tuple[int, ...]:
    """Return the elements from one position to the next along each axis but that of the batch."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(1, len(shape)))


def _moved(
    site: Site, x: Tensor, steps: Sequence[int], at: int, to: Sequence[int], counts: Sequence[int]
) -> None:
    """Write a function that copies elements."""
    y = site.output
    _are_floats(site, x)
    body = nest(counts, {"s": (0, *steps), "t": (at, *to)}, "y[t] = x[s];")
    site.write(body, "const float *x, float *restrict y", lambda: x.pointer, lambda: y.pointer)


@emits("Transpose", domain="ai.onnx")
def _transpose(site: Site) -> None:
    shape, made = site.shape, site.shapes[site.node.outputs[0]]
    order = site.node.attributes.get("perm", list(range(len(shape)))[::-1])
    if not order or order[0] != 0:
        raise refused(site.node, "moves the batch", "the batch as the first axis")
    steps = [_steps(shape)[axis - 1] for axis in order[1:]]
    _moved(site, site.inputs[0], steps, 0, _steps(made), made[1:])


@emits("Concat", domain="ai.onnx")
def _concat(site: Site) -> None:
    made, position = site.shapes[site.node.outputs[0]], 0
    axis = site.node.attributes["axis"] % len(made)
    if axis == 0:
        raise refused(site.node, "joins pictures", "an axis of its own for the batch")
    to = _steps(made)
    for i, (name, x) in enumerate(zip(site.node.inputs, site.inputs, strict=True)):
        shape, part = site.shapes[name], replace(site, name=f"{site.name}_{i}")
        _moved(part, x, _steps(shape), position * to[axis - 1], to, shape[1:])
        position += shape[axis]


@emits("Clip")
def _clip(site: Site) -> None:
    limits = bounds(site.node, None)
    site.helper("bounded")
    lo, hi = (number(float(np.float32(limits[key]))) for key in ("lo", "hi"))
    _each(site, f"bounded(x[i], {lo}, {hi})")


@emits("Sigmoid")
def _sigmoid(site: Site) -> None:
    site.helper("sigmoid")
    _each(site, "sigmoid(x[i])")


@emits("Softmax", domain="ai.onnx")
def _softmax(site: Site) -> None:
    x, y, attributes = site.inputs[0], site.output, site.node.attributes
    shape = site.shape
    rank = len(shape)
    axis = attributes.get("axis", -1 if site.graph.opset >= 13 else 1) % rank
    if site.graph.opset < 13 and axis != rank - 1:
        raise refused(site.node, "goes over several axes", "a model of opset 13 or later")
    if axis == 0:
        raise refused(site.node, "goes along the batch", "an axis of its own for the batch")
    before, size = int(np.prod(shape[1:axis], dtype=int)), shape[axis]
    after = int(np.prod(shape[axis + 1 :], dtype=int))
    site.helper("softmax")
    body = f"""\
    int32_t i, j;
    for (i = 0; i < {before}; i++, x += {size * after}, y += {size * after})
        for (j = 0; j < {after}; j++)
            softmax(x + j, y + j, {size}, {after});"""
    site.write(body, "const float *x, float *restrict y", lambda: x.pointer, lambda: y.pointer)
