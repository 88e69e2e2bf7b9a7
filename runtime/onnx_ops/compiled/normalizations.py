"""Normalizations by mean and variance, by a mean of squares, or by a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from logshift.kernels.reference.normalizations import DEVIATION, NORM, SQUARES, VARIANCE
from logshift.runtime.graph import Shape
from logshift.runtime.onnx_ops.compiled.site import Builder, Site
from logshift.runtime.onnx_ops.compiled.views import contiguous
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.work import ELEMENT


def _merged(shape: Shape, axes: Sequence[int]) -> list[list[int]] | None:
    """Return sizes and steps of two axes that some are, the inner one last; None if of more."""
    steps = contiguous(shape)
    rows: list[list[int]] = []
    for axis in axes:
        if shape[axis] == 1:
            continue
        if rows and rows[-1][1] == shape[axis] * steps[axis]:
            rows[-1] = [rows[-1][0] * shape[axis], steps[axis]]
        else:
            rows.append([shape[axis], steps[axis]])
    while len(rows) < 2:
        rows.insert(0, [1, 0])
    return rows if len(rows) == 2 else None


def _normalize(
    n: Site, along: Sequence[int], kind: int, factors: Sequence[str], steps: tuple[int, int, int],
    epsilon: float = 1e-5, outputs: dict[str, str] | None = None,
) -> list[Call] | None:  # fmt: skip
    """Normalize along some axes; `factors` are scale and bias, `steps` say how these go along."""
    shape = n.shape(n.x)
    kept, reduced = [axis for axis in range(len(shape)) if axis not in along], sorted(along)
    sets, within = _merged(shape, kept), _merged(shape, reduced)
    if sets is None or within is None:
        return None
    (count, of_set), (groups, of_group) = sets
    (outer, of_outer), (inner, of_inner) = within
    places = {"set": of_set, "group": of_group, "outer": of_outer, "inner": of_inner}
    fields: dict[str, Any] = {
        "n": count, "height": groups, "width": outer * inner, "channels": 1,
        "outer": outer, "inner": inner, "kind": kind, "epsilon": epsilon,
        **{f"{tensor}_{key}": step for tensor in "xy" for key, step in places.items()},
        **dict(zip(("scale_group", "scale_outer", "scale_inner"), steps, strict=True)),
    }  # fmt: skip
    scale, bias = factors
    tensors = {"x": n.x, "y": n.y, "scale": scale, "bias": bias, **(outputs or {})}
    return [Call("onnx_normalize", tensors, fields, 2 * ELEMENT)]


def _repeated(values: np.ndarray, whole: Shape) -> np.ndarray:
    return np.broadcast_to(values, whole).astype(np.float32)


def _filled(n: Site, value: int, shape: Shape = (1,)) -> str:
    """Return the name of a constant that is the same everywhere."""
    return n.constant(f"{value}, {shape}", lambda: np.full(shape, value, np.float32))


def _of_last(n: Site, kind: int) -> list[Call] | None:
    """Normalize along all axes from one on, as LayerNormalization and RMSNormalization do."""
    shape = n.shape(n.x)
    axis = n.get("axis", -1) % max(len(shape), 1)
    whole, names = shape[axis:], list[str]()
    for index, default in ((1, 1), (2, 0)):
        if not n.given(index):
            names.append(_filled(n, default, whole))
        elif n.is_float(n.name(index)) and math.prod(n.shape(n.name(index))) == math.prod(whole):
            names.append(n.name(index))
        elif (values := n.found.values.get(n.name(index))) is not None:
            make = partial(_repeated, values, whole)
            names.append(n.constant(f"input {index}, {whole}", make))
        else:
            return None
    if not shape:
        return None
    outputs = {"y_mean": n.output(1), "y_inverse": n.output(2)}
    return _normalize(
        n, range(axis, len(shape)), kind, names, (0, 0, 1), n.get("epsilon", 1e-5),
        {key: name for key, name in outputs.items() if name},
    )  # fmt: skip


def _are_floats(n: Site) -> bool:
    """Whether scale and bias are float32, of one number for each channel or group."""
    return all(n.is_float(n.name(i)) and len(n.shape(n.name(i))) == 1 for i in (1, 2))


def _instance(n: Site) -> list[Call] | None:
    shape = n.shape(n.x)
    if len(shape) < 3 or not _are_floats(n):
        return None
    return _of_channels(n, shape[1], (1, 0, 0))


def _group(n: Site) -> list[Call] | None:
    shape, groups = n.shape(n.x), n.get("num_groups", 0)
    if len(shape) < 2 or not _are_floats(n) or groups < 1:
        return None
    size = shape[1] // groups
    return _of_channels(n, groups, (1, 0, 0) if n.graph.opset < 21 else (size, 1, 0))


def _of_channels(n: Site, groups: int, steps: tuple[int, int, int]) -> list[Call] | None:
    """Normalize groups of channels."""
    count, channels, *sizes = n.shape(n.x)
    pixels, size = math.prod(sizes), channels // groups
    places = {
        "set": channels * pixels, "group": size * pixels, "outer": pixels, "inner": 1,
    }  # fmt: skip
    fields = {
        "n": count, "height": groups, "width": size * pixels, "channels": 1,
        "outer": size, "inner": pixels, "kind": VARIANCE, "epsilon": n.get("epsilon", 1e-5),
        **{f"{tensor}_{key}": step for tensor in "xy" for key, step in places.items()},
        **dict(zip(("scale_group", "scale_outer", "scale_inner"), steps, strict=True)),
    }  # fmt: skip
    tensors = {"x": n.x, "y": n.y, "scale": n.name(1), "bias": n.name(2)}
    return [Call("onnx_normalize", tensors, fields, 2 * ELEMENT)]


def _mean_variance(n: Site) -> list[Call] | None:
    rank = len(n.shape(n.x))
    along = {axis % rank for axis in n.get("axes", [0, 2, 3])} if rank else set()
    one, zero = _filled(n, 1), _filled(n, 0)
    return _normalize(n, sorted(along), DEVIATION, (one, zero), (0, 0, 0), 1e-9)


def _lp(n: Site) -> list[Call] | None:
    if n.get("p", 2) != 2 or not n.shape(n.x):
        return None
    axis = n.get("axis", -1) % len(n.shape(n.x))
    return _normalize(n, [axis], NORM, (_filled(n, 1), _filled(n, 0)), (0, 0, 0))


OPERATORS: dict[str, Builder] = {
    "GroupNormalization": _group, "InstanceNormalization": _instance,
    "LayerNormalization": lambda n: _of_last(n, VARIANCE), "LpNormalization": _lp,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": lambda n: _of_last(n, SQUARES),
}  # fmt: skip
