"""What is known of an ONNX operator when its calls are made, and what these say of axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels.machine.memory import aligned
from logshift.runtime.graph import Graph, Inference, Node, Shape
from logshift.runtime.onnx_ops.compiled.views import View, contiguous, plain
from logshift.runtime.plan.call import Call

FLOAT = np.dtype(np.float32)
_CUT = 2**12  # elements of a contiguous axis above which it is cut in two, for threads to share


class Site:
    """A node, and what is known of its tensors.

    Parameters
    ----------
    graph : Graph
    node : Node
    found : Inference
        Gets what a builder adds: constants that it has laid out, tensors between its calls.
    prepared : dict of name to array
        Constants that were laid out before, for other shapes.
    views : dict of name to View
        What tensors are that need not be made.
    """

    def __init__(
        self,
        graph: Graph,
        node: Node,
        found: Inference,
        prepared: dict[str, np.ndarray],
        views: Mapping[str, View],
    ) -> None:
        self.graph, self.node, self.found = graph, node, found
        self._prepared, self._views = prepared, views
        self.x, self.y = node.inputs[0], node.outputs[0]

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        return self.found.shapes[name]

    def view(self, name: str) -> View:
        """Return where the elements of a tensor lie before anything is moved."""
        return self._views.get(name) or plain(name, self.shape(name))

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.node.attributes.get(name, default)

    def name(self, index: int) -> str:
        """Return the name of an input, "" if it is not given."""
        return self.node.inputs[index] if index < len(self.node.inputs) else ""

    def output(self, index: int) -> str:
        """Return the name of an output, "" if nobody wants it."""
        return self.node.outputs[index] if index < len(self.node.outputs) else ""

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float32, and its shape known."""
        return self.found.dtypes.get(name) == FLOAT

    def value(self, index: int) -> Any:
        """Return the known number that an input is, or None."""
        value = self.found.values.get(self.name(index))
        return value.item() if value is not None and value.size == 1 else None

    def given(self, index: int) -> bool:
        """Whether an input is given."""
        return self.name(index) != ""

    def constant(self, what: str, make: Callable[[], np.ndarray]) -> str:
        """Return the name of a constant that is laid out for the node, once for all shapes."""
        name = f"{next(filter(None, self.node.outputs))} ({what})"
        if name not in self._prepared:
            made = make()
            self._prepared[name] = aligned(made.shape, made.dtype)
            self._prepared[name][...] = made
        array = self._prepared[name]
        self.found.values[name] = array
        self.found.shapes[name], self.found.dtypes[name] = array.shape, array.dtype
        return name

    def between(self, what: str, shape: Shape) -> str:
        """Return the name of a float32 tensor that one call of the node writes for another."""
        name = f"{next(filter(None, self.node.outputs))} ({what})"
        self.found.shapes[name], self.found.dtypes[name] = shape, FLOAT
        return name


# Makes the calls for a node; None where only NumPy can do it.
Builder = Callable[[Site], Iterable[Call] | None]


def axes(sizes: Sequence[int], *steps: Sequence[int]) -> np.ndarray:
    """Return what a kernel gets of axes: as few rows as there can be, but two.

    Parameters
    ----------
    sizes : of all axes
    steps : of each tensor, along each axis

    Returns
    -------
    int64 array (rank, 1 + tensors)
    """
    rows: list[list[int]] = []
    for size, *inner in zip(sizes, *steps, strict=True):
        if size == 1:
            continue
        if rows and rows[-1][1:] == [size * step for step in inner]:
            rows[-1] = [rows[-1][0] * size, *inner]
        else:
            rows.append([size, *inner])
    if len(rows) == 1 and (cut := _cut(rows[0][0])) > 1:
        size, *inner = rows[0]
        rows = [[cut, *(step * (size // cut) for step in inner)], [size // cut, *inner]]
    while len(rows) < 2:
        rows.insert(0, [1] + [0] * len(steps))
    return np.array(rows, np.int64)


def _cut(size: int) -> int:
    """Into how many parts a long axis is cut."""
    if size <= _CUT:
        return 1
    return next((count for count in range(min(64, size // 1024), 1, -1) if size % count == 0), 1)


def repeated(shape: Shape, whole: Shape) -> list[int]:
    """Return the steps of a contiguous tensor that is repeated to another shape."""
    steps = [0 if size == 1 else step for size, step in zip(shape, contiguous(shape), strict=True)]
    return [0] * (len(whole) - len(shape)) + steps


def fields_of(table: np.ndarray) -> dict[str, Any]:
    """Return the fields of an argument record that axes decide."""
    *outer, width = table[:, 0].tolist()
    return {
        "axes": table, "rank": len(table),
        "n": math.prod(outer), "height": 1, "width": width, "channels": 1,
    }  # fmt: skip
