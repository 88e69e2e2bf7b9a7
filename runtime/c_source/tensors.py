"""Where the tensors of one picture lie: (C, H, W), codes inside the border that readers need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from logshift.kernels.machine.memory import Block, arrange
from logshift.runtime.graph import Graph, Node, Quantization, Shape
from logshift.runtime.operators.conv import phases

Border = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass
class Tensor:
    """A tensor of one picture.

    Attributes
    ----------
    shape : (int, int, int)
        (C, H, W)
    border : (int, int, int, int)
    quantization : Quantization, optional
        None for float32.
    pointer : str
        C expression of its first byte, or number.
    """

    shape: tuple[int, int, int]
    border: Border = (0, 0, 0, 0)
    quantization: Quantization | None = None
    pointer: str = ""

    @property
    def row(self) -> int:
        """Elements from one row to the next."""
        return self.shape[2] + self.border[1] + self.border[3]

    @property
    def plane(self) -> int:
        """Elements from one channel to the next."""
        return (self.shape[1] + self.border[0] + self.border[2]) * self.row

    @property
    def first(self) -> int:
        """Position of the first element of the picture."""
        return self.border[0] * self.row + self.border[1]

    @property
    def size(self) -> int:
        """Elements, border included."""
        return self.shape[0] * self.plane

    @property
    def is_bordered(self) -> bool:
        """Whether there is anything around the picture."""
        return any(self.border)

    @property
    def steps(self) -> tuple[int, int, int]:
        """Elements from one position to the next along each axis."""
        return self.plane, self.row, 1


def picture(shape: Shape) -> tuple[int, int, int]:
    """Return (C, H, W) of a tensor of one or several pictures."""
    c, h, w = (*shape[1:], 1, 1, 1)[:3] if len(shape) <= 4 else (math.prod(shape[1:]), 1, 1)
    return c, h, w


def borders(graph: Graph, nodes: list[Node], shapes: Mapping[str, Shape]) -> dict[str, Border]:
    """Return the border of each tensor of codes that convolutions read."""
    found: dict[str, Border] = {}
    for node in nodes:
        if node.weight_shape is None or node.is_onnx:
            continue
        x = node.inputs[0]
        size, out = shapes[x][2:], shapes[node.outputs[0]][2:]
        needed = list(found.get(x, (0, 0, 0, 0)))
        for taps, phase in phases(node):
            kernel = node.weight_shape[1:3] if taps is ... else (taps[1].shape[1], taps[2].shape[2])
            for axis in (0, 1):
                count = phase.count(axis, out[axis])
                if count > 0 and 0 not in kernel:
                    first = phase.first[axis]
                    extent = phase.dilations[axis] * (kernel[axis] - 1)
                    last = first + (count - 1) * phase.strides[axis] + extent
                    needed[axis] = max(needed[axis], -first)
                    needed[2 + axis] = max(needed[2 + axis], last - size[axis] + 1)
        top, left, bottom, right = needed
        found[x] = top, left, bottom, right
    return found


class Arena:
    """Memory that tensors and buffers share; each is in use for some steps."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []

    def add(self, nbytes: int, first: int, last: int) -> Block:
        """Return a block of whole words, whose offset `arrange` will tell."""
        self._blocks.append(Block(-(-max(nbytes, 1) // 4) * 4, first, last))
        return self._blocks[-1]

    def arrange(self) -> int:
        """Place all blocks; returns the size of the arena in bytes."""
        return arrange(self._blocks)
