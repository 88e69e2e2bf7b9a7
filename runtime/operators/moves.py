"""Operators that move values and leave them as they are: parts, rows, channels, borders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from logshift.runtime import geometry
from logshift.runtime.graph import MAX_ATTRIBUTE, Graph, Node, Quantization, Shape
from logshift.runtime.operators.base import (
    REQUIRED,
    NodeError,
    Operand,
    Operator,
    Site,
    integer,
    integers,
    one_of,
    rank4,
)
from logshift.runtime.plan.call import Call


def copy(
    site: Site,
    x: Operand,
    *,
    at: tuple[int, ...] = (0, 0, 0),
    start: tuple[int, ...] = (0, 0, 0),
    step: tuple[int, ...] = (1, 1, 1),
    sizes: dict[str, Any] | None = None,
    table: np.ndarray | None = None,
) -> Call:
    """Copy from x to the output; `at`, `start` and `step` are (channel, row, column)."""
    y = site.output
    fields = {
        "channel0_x": start[0], "row0": x.top + start[1], "column0": x.left + start[2],
        "stride_c": step[0], "stride_h": step[1], "stride_w": step[2],
        "channel0_y": at[0], "row0_y": y.top + at[1], "column0_y": y.left + at[2],
        "table": 0 if table is None else table, "has_table": table is not None,
    }  # fmt: skip
    return Call(site.kernel_op("copy"), {"x": x.name, "y": y.name}, (sizes or x.sizes) | fields)


# --- Concat -------------------------------------------------------------------------------------


def _concat_shape(node: Node, inputs: list[Shape]) -> Shape:
    first = rank4(inputs[0])
    axis = node.attributes["axis"]
    for shape in inputs[1:]:
        if len(shape) != 4 or any(
            i != axis and s != f for i, (s, f) in enumerate(zip(shape, first, strict=True))
        ):
            raise NodeError(f"cannot concatenate shapes {first} and {shape} along axis {axis}")
    return tuple(sum(s[i] for s in inputs) if i == axis else size for i, size in enumerate(first))


def _concat(site: Site) -> Iterator[Call]:
    axis, position = site.node.attributes["axis"], 0
    for x in site.inputs:
        at = tuple(position if axis == a else 0 for a in (1, 2, 3))
        yield copy(site, x, at=at, table=_between(x.quantization, site.output.quantization))
        position += x.shape[axis]


def _between(q_x: Quantization | None, q_y: Quantization | None) -> np.ndarray | None:
    """Return the table from codes of one quantization to another's, None if they are the same."""
    if q_x is None or q_y is None or q_x == q_y:
        return None
    t = (np.arange(256) - q_x.zero_point).astype(np.float32)
    v = t * np.float32(q_x.scale / q_y.scale) + np.float32(q_y.zero_point)
    return np.clip(np.rint(v), 0, q_y.top).astype(np.uint8)


# --- Gather -------------------------------------------------------------------------------------


def _are_channels(v: Any) -> bool:
    return (
        isinstance(v, list)
        and 1 <= len(v) <= MAX_ATTRIBUTE
        and all(map(integer(0, MAX_ATTRIBUTE - 1), v))
    )


def _gather_shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = rank4(inputs[0])
    indices = node.attributes["indices"]
    if max(indices) >= c:
        raise NodeError(f"takes channel {max(indices)}, its input has {c}")
    return (n, len(indices), h, w)


def _gather(site: Site) -> Iterator[Call]:
    x, y = site.inputs[0], site.output
    indices = np.array(site.node.attributes["indices"], np.int32)
    interleaved = bool((indices[2:] == indices[:-2] + 1).all())
    fields = y.sizes | {"indices": indices, "interleaved": interleaved}
    yield Call("gather", {"x": x.name, "y": y.name}, fields)


# --- Slice --------------------------------------------------------------------------------------


def _are_positions(v: Any) -> bool:
    return isinstance(v, list) and len(v) <= 4 and all(type(i) is int and abs(i) < 2**63 for i in v)


def _check_slice(graph: Graph, node: Node) -> None:
    a = node.attributes
    if len({len(a[k]) for k in ("axes", "starts", "ends", "steps")}) != 1:
        raise NodeError("axes, starts, ends and steps must have one length")
    if len(set(a["axes"])) != len(a["axes"]):
        raise NodeError("an axis is given twice")


def _slices(a: dict[str, Any], shape: Shape) -> Iterator[tuple[int, range]]:
    """Yield the positions that are taken of axes."""
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        yield axis, geometry.slice_range(shape[axis], start, end, step)


def _slice_shape(node: Node, inputs: list[Shape]) -> Shape:
    shape = list(rank4(inputs[0]))
    for axis, taken in _slices(node.attributes, inputs[0]):
        shape[axis] = len(taken)
    return tuple(shape)


def _slice(site: Site) -> Iterator[Call]:
    x = site.inputs[0]
    start, step = [0, 0, 0], [1, 1, 1]
    for axis, taken in _slices(site.node.attributes, x.shape):
        start[axis - 1], step[axis - 1] = taken.start, taken.step
    yield copy(site, x, start=tuple(start), step=tuple(step), sizes=site.output.sizes)


# --- Pad ----------------------------------------------------------------------------------------


def _pad_shape(node: Node, inputs: list[Shape]) -> Shape:
    pads = node.attributes["pads"]
    return tuple(size + pads[i] + pads[i + 4] for i, size in enumerate(rank4(inputs[0])))


def _pad(site: Site) -> Iterator[Call]:
    y, pads = site.output, site.node.attributes["pads"]
    value = y.quantization.zero_point if y.quantization else 0
    yield Call(site.kernel_op("fill"), {"y": y.name}, y.sizes | {"value": value})
    yield copy(site, site.inputs[0], at=(pads[1], pads[2], pads[3]))


# --- DepthToSpace -------------------------------------------------------------------------------


def _depth_to_space_shape(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = rank4(inputs[0])
    b = node.attributes["blocksize"]
    if c % (b * b):
        raise NodeError(f"{c} channels are not a multiple of blocksize^2 = {b * b}")
    return (n, c // (b * b), h * b, w * b)


def _depth_to_space(site: Site) -> Iterator[Call]:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    fields = y.sizes | {"blocksize": a["blocksize"], "block_first": a["mode"] == "DCR"}
    yield Call(site.kernel_op("depth_to_space"), {"x": x.name, "y": y.name}, fields)


OPERATORS = [
    Operator(
        "Concat", "cc ff", _concat_shape, _concat, {"axis": (1, one_of(1, 2, 3))}, (1, 4096)
    ),
    Operator(
        "Gather", "cc", _gather_shape, _gather,
        {"axis": (1, one_of(1)), "indices": (REQUIRED, _are_channels)}, keeps_quantization=True,
    ),
    Operator(
        "Slice", "cc ff", _slice_shape, _slice,
        {"axes": (REQUIRED, lambda v: _are_positions(v) and set(v) <= {1, 2, 3}),
         "starts": (REQUIRED, _are_positions), "ends": (REQUIRED, _are_positions),
         "steps": (REQUIRED, lambda v: _are_positions(v) and all(map(integer(1), v)))},
        check=_check_slice, keeps_quantization=True, writes_within=True,
    ),
    Operator(
        "Pad", "cc ff", _pad_shape, _pad,
        {"pads": (REQUIRED, lambda v: integers(8, 0)(v) and v[0] == v[4] == 0)},
        keeps_quantization=True,
    ),
    Operator(
        "DepthToSpace", "cc ff", _depth_to_space_shape, _depth_to_space,
        {"blocksize": (REQUIRED, integer(1, 64)), "mode": ("DCR", one_of("DCR", "CRD"))},
        keeps_quantization=True,
    ),
]  # fmt: skip
