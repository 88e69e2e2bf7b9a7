"""What only changes the order, the shape or the number of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from logshift.runtime.graph import Shape
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.onnx_ops.compiled.site import (
    Builder,
    Site,
    axes,
    contiguous,
    fields_of,
    repeated,
)
from logshift.runtime.plan.call import Call


def _move(
    x: str, y: str, shape: Shape, steps: Sequence[int], start: int, y_steps: Sequence[int],
    y_start: int = 0,
) -> Call:  # fmt: skip
    fields = fields_of(axes(shape, y_steps, steps)) | {"start_x": start, "start_y": y_start}
    return Call("onnx_move", {"x": x, "y": y}, fields)


def _view(n: Site) -> list[Call]:
    """Make no call: the output is the same bytes under another name."""
    return []


def order(n: Site) -> list[int] | None:
    """Return which axis of its input each axis of a Transpose's output is."""
    rank = len(n.shape(n.x))
    places = n.get("perm", [*range(rank)][::-1])
    return [axis % rank for axis in places] if isinstance(places, list) else None


def _transpose(n: Site) -> list[Call] | None:
    shape, steps, places = n.shape(n.x), contiguous(n.shape(n.x)), order(n)
    if places is None:
        return None
    moved = [axis for axis in places if shape[axis] != 1]
    if moved == sorted(moved):
        return []
    whole = n.shape(n.y)
    return [_move(n.x, n.y, whole, [steps[axis] for axis in places], 0, contiguous(whole))]


def _expand(n: Site) -> list[Call]:
    whole = n.shape(n.y)
    if math.prod(n.shape(n.x)) == math.prod(whole):
        return []
    return [_move(n.x, n.y, whole, repeated(n.shape(n.x), whole), 0, contiguous(whole))]


def _windows(n: Site) -> list[Call] | None:
    """Move parts of a tensor: those of the views that NumPy makes of it."""
    x = np.empty(n.shape(n.x), np.float32)
    inputs = [x, *(n.found.values.get(name) for name in n.node.inputs[1:])]
    results = numpy_ops.compute(
        n.node.op, n.node.attributes, n.graph.opset, inputs, len(n.node.outputs)
    )
    if results[0].size == x.size and results[0].flags.c_contiguous:
        return []
    made = []
    for name, y in zip(n.node.outputs, results, strict=True):
        start, steps = y.ctypes.data - x.ctypes.data, [step // 4 for step in y.strides]
        made.append(_move(n.x, name, y.shape, steps, start // 4, contiguous(y.shape)))
    return made


_RUNS = 64  # of indices, above which NumPy is as fast


def _gather(n: Site) -> list[Call] | None:
    """Move what known indices name, each run of evenly spaced ones at once."""
    indices = n.found.values.get(n.name(1))
    shape = n.shape(n.x)
    if indices is None or not shape:
        return None
    axis = n.get("axis", 0) % len(shape)
    size, steps = shape[axis], contiguous(shape)
    places = [place % size for place in indices.ravel().tolist()]
    runs = [(0, len(places), 1)] if len(places) < 2 else _runs(places)
    if len(runs) > _RUNS:
        return None
    whole = (*shape[:axis], len(places), *shape[axis + 1 :])
    y_steps, made = contiguous(whole), []
    for first, count, step in runs:
        part = (*shape[:axis], count, *shape[axis + 1 :])
        x_steps = [*steps[:axis], steps[axis] * step, *steps[axis + 1 :]]
        start, y_start = places[first] * steps[axis], first * y_steps[axis]
        made.append(_move(n.x, n.y, part, x_steps, start, y_steps, y_start))
    return made


def _runs(places: list[int]) -> list[tuple[int, int, int]]:
    """Return where runs of evenly spaced numbers begin, how long they are, and their steps."""
    runs, first = [], 0
    while first < len(places):
        end, step = first + 1, 1
        if end < len(places):
            step = places[end] - places[first]
        while end < len(places) and places[end] - places[end - 1] == step:
            end += 1
        runs.append((first, end - first, step))
        first = end
    return runs


def _concat(n: Site) -> list[Call] | None:
    whole, start, made = n.shape(n.y), 0, []
    axis = n.get("axis", 1) % len(whole)
    for name in n.node.inputs:
        shape = n.shape(name)
        if not n.is_float(name):
            return None
        if 0 not in shape:
            steps = contiguous(whole)
            made.append(_move(name, n.y, shape, contiguous(shape), 0, steps, start * steps[axis]))
        start += shape[axis]
    return made


def _where(n: Site) -> list[Call] | None:
    """Move what a condition chooses that sizes decide."""
    if (chosen := n.value(0)) is None:
        return None
    name = n.name(1 if chosen else 2)
    if not n.is_float(name):
        return None
    whole = n.shape(n.y)
    return [_move(name, n.y, whole, repeated(n.shape(name), whole), 0, contiguous(whole))]


OPERATORS: dict[str, Builder] = {
    **dict.fromkeys(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _view),
    "Concat": _concat, "Expand": _expand, "Gather": _gather, "Slice": _windows, "Split": _windows,
    "Transpose": _transpose, "Where": _where,
}  # fmt: skip
