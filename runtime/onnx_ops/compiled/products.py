"""Products of matrices."""

from __future__ import annotations

import math

import numpy as np

from logshift.runtime.onnx_ops.compiled.site import (
    Builder,
    Site,
    axes,
    repeated,
)
from logshift.runtime.onnx_ops.compiled.views import contiguous
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import PRODUCT


def _matmul(n: Site) -> list[Call] | None:
    r = n.node.inputs[1]
    if not n.is_float(r):
        return None
    first, second = n.shape(n.x), n.shape(r)
    first = (1, *first) if len(first) == 1 else first
    second = (*second, 1) if len(second) == 1 else second
    # What a matrix is of: of batches that one tensor is repeated along it may be more than it has.
    (rows, count), columns = first[-2:], second[-1]
    whole = np.broadcast_shapes(first[:-2], second[:-2])
    steps = [
        [size * step for step in of_matrices]
        for size, of_matrices in (
            (rows * columns, contiguous(whole)),
            (rows * count, repeated(first[:-2], whole)),
            (count * columns, repeated(second[:-2], whole)),
        )
    ]
    if not any(steps[2]) and math.prod(whole) == math.prod(first[:-2]):
        # One matrix for all: the rows of the first ones follow each other.
        rows, whole, steps = rows * math.prod(whole), (), [[], [], []]
    table = axes(whole, *steps)
    fields = {
        "axes": table, "rank": len(table), "count": count,
        "n": math.prod(whole), "height": rows, "width": columns, "channels": 1,
    }  # fmt: skip
    return [Call("onnx_matmul", {"x": n.x, "r": r, "y": n.y}, fields, PRODUCT * count)]


def product(x: str, r: str, y: str, rows: int, count: int, columns: int) -> Call:
    """Return the call for one product of contiguous matrices."""
    table = axes((), [], [], [])
    fields = {
        "axes": table, "rank": len(table), "count": count,
        "n": 1, "height": rows, "width": columns, "channels": 1,
    }  # fmt: skip
    return Call("onnx_matmul", {"x": x, "r": r, "y": y}, fields, PRODUCT * count)


OPERATORS: dict[str, Builder] = {"MatMul": _matmul}
