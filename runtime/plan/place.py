"""Where the tensors of a plan lie: one arena, planned by when they are in use.

Tensors of packed operators lie as (N, H, W, C) inside a border of their zero point, as wide as the
paddings of the convolutions that read them need: padding then costs nothing and no kernel tests for
edges. A border whose bytes other tensors use as well is written anew at every run. For small
tensors that would take too long; they keep their bytes, which go only to tensors of the same
geometry and zero point, and their borders are written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logshift.kernels.machine.memory import ALIGNMENT, Block, arena, arrange
from logshift.runtime.graph import Shape
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.schedule import Schedule

_SMALL = 2**16  # bytes of a tensor below which its border is written once

_Border = tuple[int, int, int, int]  # top, left, bottom, right


def nchw(shape: Shape) -> Shape:
    """Return (N, C, H, W) of a tensor; all is N in one that packed operators cannot have."""
    return (*shape, 1, 1)[:4] if 2 <= len(shape) <= 4 else (math.prod(shape), 1, 1, 1)


@dataclass(frozen=True)
class Geometry:
    """Size of a tensor's buffer, and where in it the picture lies."""

    shape: Shape  # (N, H, W, C), border included
    dtype: np.dtype
    size: tuple[int, int]  # of the picture
    top: int = 0
    left: int = 0
    zero_point: int = 0

    @property
    def bordered(self) -> bool:
        """Whether there is anything beside the picture."""
        return self.shape[1:3] != self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor lives, and the values of its `records.TENSOR`."""

    geometry: Geometry
    offset: int  # in the arena
    values: tuple[int, ...]


class Places:
    """The places of all tensors that only programs read.

    Parameters
    ----------
    schedule : Schedule
    shapes : dict of the name that a tensor is stored under to its shape

    Attributes
    ----------
    arena : uint8 array
    found : dict of the name that a tensor is stored under to Place
    rewritten : set of names of tensors whose borders are written at every run
    """

    def __init__(self, schedule: Schedule, shapes: Mapping[str, Shape]) -> None:
        self._shapes, self._quantization = shapes, schedule.graph.quantization
        self.found: dict[str, Place] = {}
        self.rewritten: set[str] = set()
        blocks, tensors = self._blocks(schedule)
        self.arena = arena(arrange(blocks))
        begin = self.arena.ctypes.data
        for name, (block, geometry) in tensors.items():
            values = (begin + block.offset, *geometry.shape, geometry.top, geometry.left)
            self.found[name] = Place(geometry, block.offset, values)
            if geometry.bordered:
                if block.shared:
                    self.rewritten.add(name)
                else:
                    self.array(name).fill(geometry.zero_point)
        for name, (whole, channel) in self._parts(schedule).items():
            place = self.found[whole]
            data, rest = place.values[0], place.values[1:]
            self.found[name] = Place(
                place.geometry, place.offset + channel, (data + channel, *rest)
            )

    def array(self, name: str) -> np.ndarray:
        """Return a tensor's buffer, (N, H, W, C)."""
        place = self.found[name]
        part = self.arena[place.offset : place.offset + place.geometry.nbytes]
        return part.view(place.geometry.dtype).reshape(place.geometry.shape)

    def picture(self, name: str) -> np.ndarray:
        """Return what a tensor's border encloses, (N, H, W, C)."""
        geometry = self.found[name].geometry
        h, w = geometry.size
        return self.array(name)[
            :, geometry.top : geometry.top + h, geometry.left : geometry.left + w
        ]

    def write_border(self, name: str) -> Iterator[Call]:
        """Yield calls that write a tensor's border: above and below all of it, then beside."""
        geometry, is_code = self.found[name].geometry, name in self._quantization
        n, rows, columns, c = geometry.shape
        h, w = geometry.size
        bottom, right = geometry.top + h, geometry.left + w
        for top, left, height, width in (
            (0, 0, geometry.top, columns),
            (bottom, 0, rows - bottom, columns),
            (geometry.top, 0, h, geometry.left),
            (geometry.top, right, h, columns - right),
        ):
            if height and width:
                yield Call(
                    "fill" if is_code else "float_fill", {"y": name},
                    {"n": n, "height": height, "width": width, "channels": c,
                     "value": geometry.zero_point},
                    moved={"y": (top - geometry.top, left - geometry.left)},
                )  # fmt: skip

    def _blocks(self, schedule: Schedule) -> tuple[list[Block], dict[str, tuple[Block, Geometry]]]:
        """Return all blocks of the arena, and which of them is whose."""
        borders = self._borders(schedule)
        end = len(schedule.operations)
        blocks: list[Block] = []
        tensors: dict[str, tuple[Block, Geometry]] = {}
        # Blocks of small tensors, each with the step until which it is in use.
        kept: dict[Geometry, list[list[Any]]] = {}
        for index, operation in enumerate(schedule.operations):
            for name in operation.writes if operation.kind != "numpy" else ():
                name = schedule.within.get(name, name)
                if name in schedule.outside or name in tensors:
                    continue
                geometry = self._geometry(name, borders.get(name, (0, 0, 0, 0)))
                last, nbytes = schedule.last_use[name], geometry.nbytes
                small = geometry.bordered and nbytes < _SMALL
                users = kept.setdefault(geometry, []) if small else []
                user = next((user for user in users if user[1] < index), None)
                if user is None:
                    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
                    user = [Block(size, 0, end) if small else Block(size, index, last), last]
                    users.append(user)
                    blocks.append(user[0])
                user[1] = last
                tensors[name] = user[0], geometry
        return blocks, tensors

    def _parts(self, schedule: Schedule) -> dict[str, tuple[str, int]]:
        """Return of which tensor, and from which channel on, others are parts."""
        parts = {}
        wholes = set(schedule.within.values())
        for operation in schedule.operations:
            channel = 0
            if wholes.intersection(operation.writes):
                for name in operation.reads:
                    if name in schedule.within:
                        parts[name] = schedule.within[name], channel
                    channel += self._shapes[name][1]
        return parts

    def _borders(self, schedule: Schedule) -> dict[str, _Border]:
        """Return the border that the readers of each stored tensor need."""
        borders: dict[str, _Border] = {}
        for node, x, convolutions in schedule.readers:
            if x not in self._shapes:  # nobody computes it
                continue
            size, out = self._shapes[x][2:], self._shapes[node.outputs[0]][2:]
            needed = list(borders.get(x, (0, 0, 0, 0)))
            for conv in convolutions:
                phase, shape = conv.phase, conv.layer.weights.shape
                for axis in (0, 1):
                    count = phase.count(axis, out[axis])
                    if count > 0 and 0 not in shape:
                        first = phase.first[axis]
                        extent = phase.dilations[axis] * (shape[1 + axis] - 1)
                        last = first + (count - 1) * phase.strides[axis] + extent
                        needed[axis] = max(needed[axis], -first)
                        needed[2 + axis] = max(needed[2 + axis], last - size[axis] + 1)
            top, left, bottom, right = needed
            borders[x] = (top, left, bottom, right)
        return borders

    def _geometry(self, name: str, border: _Border) -> Geometry:
        n, c, h, w = nchw(self._shapes[name])
        top, left, bottom, right = border
        q = self._quantization.get(name)
        return Geometry(
            (n, h + top + bottom, w + left + right, c), np.dtype(np.uint8 if q else np.float32),
            (h, w), top, left, q.zero_point if q else 0,
        )  # fmt: skip
