"""Sums, means and extremes along axes, and softmax."""

from __future__ import annotations

import math

from logshift.kernels import functions
from logshift.runtime.onnx_ops.compiled.site import Builder, Site, axes, fields_of
from logshift.runtime.onnx_ops.compiled.views import contiguous
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import ELEMENT, SOFTMAX


def _reduce(function: str, mean: bool = False, root: bool = False) -> Builder:
    def build(n: Site) -> list[Call] | None:
        shape = n.shape(n.x)
        chosen = n.get("axes", None)
        if "Global" in n.node.op:
            chosen = list(range(2, len(shape)))
            if not chosen:
                return None
        chosen = [chosen] if isinstance(chosen, int) else chosen
        if n.given(1):
            chosen = n.found.values[n.node.inputs[1]].ravel().tolist()
        if not chosen:
            if n.get("noop_with_empty_axes", 0):
                return None
            chosen = range(len(shape))
        along = {axis % len(shape) for axis in chosen} if shape else set()
        steps = contiguous(shape)
        kept = [axis for axis in range(len(shape)) if axis not in along]
        sizes = [shape[axis] for axis in kept]
        if math.prod(sizes) != math.prod(n.shape(n.y)):  # axes are given twice, and differ
            return None
        table = axes(sizes, contiguous(sizes), [steps[axis] for axis in kept])
        reduced = [shape[axis] for axis in sorted(along)]
        fields = fields_of(table) | {
            "reduced": axes(reduced, [steps[axis] for axis in sorted(along)]),
            "function": [*functions.ONNX_REDUCTIONS].index(function),
            "divisor": math.prod(reduced) if mean else 1, "root": root,
        }  # fmt: skip
        fields["reduced_rank"] = len(fields["reduced"])
        return [Call("onnx_reduce", {"x": n.x, "y": n.y}, fields, ELEMENT * math.prod(reduced))]

    return build


def _softmax(n: Site) -> list[Call] | None:
    shape = n.shape(n.x)
    if not shape:
        return None
    last = n.graph.opset >= 13
    axis = n.get("axis", -1 if last else 1)
    axis = axis if axis == len(shape) else axis % len(shape)
    after = math.prod(shape[axis + 1 :]) if last else 1
    fields = {
        "n": math.prod(shape[:axis]), "height": math.prod(shape[axis:]) // after,
        "width": after, "channels": 1,
    }  # fmt: skip
    return [Call("onnx_softmax", {"x": n.x, "y": n.y}, fields, SOFTMAX)]


OPERATORS: dict[str, Builder] = {
    "GlobalAveragePool": _reduce("sum", mean=True), "GlobalMaxPool": _reduce("max"),
    "ReduceL1": _reduce("sum_size"), "ReduceL2": _reduce("sum_square", root=True),
    "ReduceMax": _reduce("max"), "ReduceMean": _reduce("sum", mean=True),
    "ReduceMin": _reduce("min"), "ReduceSum": _reduce("sum"),
    "ReduceSumSquare": _reduce("sum_square"),
    "Softmax": _softmax,
}  # fmt: skip
