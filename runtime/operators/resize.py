"""Resize: the height and width of a picture, by its nearest positions or linearly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.operators.base import (
    REQUIRED,
    NodeError,
    Operator,
    Site,
    integers,
    one_of,
    rank4,
)
from logshift.runtime.plan.call import Call

ONE = 2048  # weights of linear resizing of codes are integers of this


def _are_scales(v: Any) -> bool:
    return v is None or (
        isinstance(v, list)
        and len(v) == 2
        and all(type(i) in (int, float) and 1e-4 < i < 1e4 for i in v)
    )


def _shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = rank4(inputs[0])
    a = node.attributes
    if len(inputs) == 2:
        return (n, c, *rank4(inputs[1])[2:])
    if a["sizes"] is not None:
        return (n, c, a["sizes"][0], a["sizes"][1])
    return (n, c, math.floor(h * a["scales"][0]), math.floor(w * a["scales"][1]))


def _check(graph: Graph, node: Node) -> None:
    given = [node.attributes[key] is not None for key in ("scales", "sizes")]
    if sum([*given, len(node.inputs) == 2]) != 1:
        raise NodeError("needs scales, sizes or a tensor whose size it takes")


def _build(site: Site) -> Iterator[Call]:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    fields = y.sizes | {"linear": a["mode"] == "linear"}
    for axis, label in ((0, "row"), (1, "column")):
        first, second, weight = positions(a, axis, x.shape[2 + axis], y.shape[2 + axis])
        if x.quantization is not None:
            weight = np.rint(weight * ONE).astype(np.int64)
        else:
            weight = weight.astype(np.float32)
        fields |= {
            f"{label}_index0": first, f"{label}_index1": second, f"{label}_weight": weight
        }  # fmt: skip
    yield Call(site.kernel_op("resize"), {"x": x.name, "y": y.name}, fields)


def positions(
    attributes: dict[str, Any], axis: int, size: int, out: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source positions of a Resize along one axis (0 height, 1 width).

    Returns
    -------
    index0, index1 : int64 arrays of shape (out,)
        The two neighbours; equal for mode "nearest".
    weight : float64 array of shape (out,)
        Weight of index1; index0 has the rest.
    """
    scale = out / size if attributes["scales"] is None else attributes["scales"][axis]
    i = np.arange(out, dtype=np.float64)
    mode = attributes["coordinate_transformation_mode"]
    if mode == "asymmetric":
        source = i / scale
    elif mode == "align_corners":
        source = i * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    elif mode == "pytorch_half_pixel" and out == 1:
        source = np.zeros(1)
    else:
        source = (i + 0.5) / scale - 0.5
    if attributes["mode"] == "nearest":
        index = np.clip(_NEAREST[attributes["nearest_mode"]](source), 0, size - 1).astype(np.int64)
        return index, index, np.zeros(out)
    source = np.clip(source, 0, size - 1)
    index0 = np.floor(source).astype(np.int64)
    return index0, np.minimum(index0 + 1, size - 1), source - index0


_NEAREST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda v: np.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


OPERATORS = [
    Operator(
        "Resize", "cc ff", _shape, _build,
        {
            "mode": (REQUIRED, one_of("nearest", "linear")),
            "coordinate_transformation_mode": (
                "half_pixel",
                one_of("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"),
            ),
            "nearest_mode": (
                "round_prefer_floor",
                one_of("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
            ),
            "scales": (None, _are_scales),
            "sizes": (None, lambda v: v is None or integers(2, 1)(v)),
        },
        (1, 2), check=_check, keeps_quantization=True, writes_parts=True,
    )
]  # fmt: skip
