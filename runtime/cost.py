"""What a packed network costs as shifts and adds, in bits moved, and in cycles of a tiled array.

All of it follows from the file; nothing is measured. `docs/cost.md` has the formulas.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.stlq.codec import MAX_TILE, LogWeights
from logshift.kernels.stlq.tiling import Tiling
from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.infer import nominal_shapes
from logshift.runtime.operators.conv import weight_uses
from logshift.runtime.table import text_table

# pJ per operation at 45 nm; docs/cost.md has the sources.
SHIFT_INT32 = 0.13
ADD_INT32 = 0.1
MULTIPLY_INT8 = 0.2
ADD_FLOAT32 = 0.9
MULTIPLY_FLOAT32 = 3.7

_COUNTS = (
    "macs", "first", "skipped", "second", "weights", "weight_bits", "activations",
    "activation_bits", "cycles_first", "cycles", "cycles_element", "cycles_all",
)  # fmt: skip


@dataclass(frozen=True)
class LayerCost:
    """Counts of one Conv or ConvTranspose, per inference.

    Attributes
    ----------
    name, op : str
    weight_shape : (O, kh, kw, C / group)
    macs : int
        Multiplications that the layer stands for, those with padding included: first + skipped.
    first, second : int
        Products with non-zero first and second words; each is one shift and one add.
    skipped : int
        Products whose first word is zero; a second word there still counts in `second`.
    weights : int
        Number of weights.
    weight_bits : int
        First words, second words and the places of second words as the file packs them before
        compression: a bitmap, or a list of a byte each and 16 bits per 256 weights; or, if they are
        stored by tiles of an array, a bit for each of these and all words of those that have one.
    activations : int
        Elements of all inputs and of the output, each counted once.
    activation_bits : int
        The same in bits: A for codes, 32 for a float32 output.
    cycles_first, cycles, cycles_all : int
        Cycles of the tiled array with first words alone, with the second words that there are, and
        if every tile had one.
    cycles_element : float
        Expected cycles with as many second words at places that are drawn at random from the
        layer's: what choosing them one by one comes to.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    macs: int
    first: int
    skipped: int
    second: int
    weights: int
    weight_bits: int
    activations: int
    activation_bits: int
    cycles_first: int
    cycles: int
    cycles_element: float
    cycles_all: int


@dataclass(frozen=True)
class Cost:
    """Result of `cost`, at the nominal input size; `str()` is a table, `to_dict()` is for JSON.

    Attributes
    ----------
    layers : list of LayerCost, in execution order
    tile : (P, Q)
        Output and input channels of a tile.
    """

    layers: list[LayerCost]
    tile: tuple[int, int]

    @property
    def total(self) -> dict[str, Any]:
        """Every count of `LayerCost`, summed over the layers."""
        return {name: sum(getattr(layer, name) for layer in self.layers) for name in _COUNTS}

    @property
    def energy(self) -> dict[str, float]:
        """Estimated pJ of the arithmetic alone, from figures published for 45 nm circuits."""
        total = self.total
        return {
            "stlq": (total["first"] + total["second"]) * (SHIFT_INT32 + ADD_INT32),
            "int8": total["macs"] * (MULTIPLY_INT8 + ADD_INT32),
            "float32": total["macs"] * (MULTIPLY_FLOAT32 + ADD_FLOAT32),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data."""
        total = self.total
        return asdict(self) | {
            "total": total,
            "energy_pj": self.energy,
            "weight_bits": _bits(total["weight_bits"], total["weights"]),
            "activation_bits": _bits(total["activation_bits"], total["activations"]),
            "cycle_ratio": total["cycles"] / max(total["cycles_first"], 1),
            "cycle_ratio_element": total["cycles_element"] / max(total["cycles_first"], 1),
        }

    def __str__(self) -> str:
        """Return a table of the layers, then the totals."""
        rows: list[tuple[str, ...]] = [(
            "node", "op", "weights", "MMAC", "first", "skipped", "second", "W Mbit", "A Mbit",
            "kcycles 1", "kcycles", "ratio", "by element",
        )]  # fmt: skip
        for layer in self.layers:
            rows.append((
                layer.name, layer.op, "x".join(map(str, layer.weight_shape)),
                *(f"{count / 1e6:.2f}" for count in (
                    layer.macs, layer.first, layer.skipped, layer.second, layer.weight_bits,
                    layer.activation_bits,
                )),
                f"{layer.cycles_first / 1e3:.1f}", f"{layer.cycles / 1e3:.1f}",
                f"{layer.cycles / layer.cycles_first:.2f}",
                f"{layer.cycles_element / layer.cycles_first:.2f}",
            ))  # fmt: skip
        record = self.to_dict()
        total = record["total"]
        lines = [
            text_table(rows, left=3),
            "",
            f"{total['macs'] / 1e6:.2f} MMAC: {total['first'] / 1e6:.2f} M products with first"
            f" words, {total['skipped'] / 1e6:.2f} M skipped; {total['second'] / 1e6:.2f} M more"
            " with second words",
            f"arithmetic: {_compared(record['energy_pj'], 'uJ')}: estimated from energies published"
            " for 45 nm, not measured on this CPU",
            f"weights: {_compared(record['weight_bits'], 'Mbit')}",
            f"activations: {_compared(record['activation_bits'], 'Mbit')}",
            f"tiles of {self.tile[0]} outputs x {self.tile[1]} inputs:"
            f" {total['cycles_first'] / 1e3:.1f} kcycles"
            f" with first words alone, {total['cycles'] / 1e3:.1f} with the second words there are"
            f" ({record['cycle_ratio']:.2f} times), {total['cycles_element'] / 1e3:.1f} expected if"
            f" as many were chosen one by one ({record['cycle_ratio_element']:.2f} times),"
            f" {total['cycles_all'] / 1e3:.1f} if every tile had one",
        ]
        return "\n".join(lines)


def _bits(stlq: int, count: int) -> dict[str, int]:
    return {"stlq": stlq, "int8": 8 * count, "float32": 32 * count}


def _compared(values: Mapping[str, float], unit: str) -> str:
    """Return millions in words, those of int8 and float32 also as multiples of STLQ's."""
    stlq = values["stlq"]
    return f"{stlq / 1e6:.2f} {unit} in STLQ, " + ", ".join(
        f"{values[name] / 1e6:.2f} in {name} ({values[name] / (stlq or 1):.2f} times)"
        for name in ("int8", "float32")
    )


def cost(graph: Graph, tile: tuple[int, int] = (16, 16)) -> Cost:
    """Count what a network's convolutions cost, at the nominal input size.

    Parameters
    ----------
    graph : Graph
    tile : (P, Q)
        The array multiplies a tile of P output channels and Q input channels at one kernel position
        per cycle, see `tiling.Tiling`, and needs one cycle more if the tile has any second word.

    Returns
    -------
    Cost

    Raises
    ------
    InputError
        If a side of the tile is below 1.
    """
    if min(tile) < 1:
        raise InputError(f"tile is {tile[0]}x{tile[1]}; both sides must be at least 1")
    shapes = nominal_shapes(graph)
    layers = [
        _layer_cost(graph, node, node.weights, shapes, tile)
        for node in graph.nodes
        if node.weights is not None
    ]
    return Cost(layers, tile)


def _layer_cost(
    graph: Graph, node: Node, weights: LogWeights, shapes: Mapping[str, Shape],
    tile: tuple[int, int],
) -> LayerCost:  # fmt: skip
    uses = weight_uses(node, shapes)
    count = math.prod(weights.shape)
    nonzero = int(np.count_nonzero(weights.first))
    second = weights.second != 0
    selected = int(np.count_nonzero(second))
    group = node.attributes["group"]
    tiling = Tiling(weights.shape, (tile[1], tile[0]), group)
    two_word_tiles = int(np.count_nonzero(tiling.any(second)))
    tensors = [*node.inputs, *node.outputs]
    elements = [math.prod(shapes[name]) for name in tensors]
    widths = [q.bits if (q := graph.quantization.get(name)) else 32 for name in tensors]
    return LayerCost(
        name=node.name,
        op=node.op,
        weight_shape=weights.shape,
        macs=uses * count,
        first=uses * nonzero,
        skipped=uses * (count - nonzero),
        second=uses * selected,
        weights=count,
        weight_bits=weights.bits * count + _second_bits(weights, second, selected, group),
        activations=sum(elements),
        activation_bits=sum(map(operator.mul, elements, widths)),
        cycles_first=uses * tiling.count,
        cycles=uses * (tiling.count + two_word_tiles),
        cycles_element=uses * (tiling.count + _expected_tiles(tiling.sizes(), selected)),
        cycles_all=uses * 2 * tiling.count,
    )


def _second_bits(weights: LogWeights, second: np.ndarray, selected: int, group: int) -> int:
    """Return what second words and their places take; of tiles as the file has them, or would."""
    count = second.size
    if not selected:
        return 0
    places = min(count, 8 * selected + 16 * -(-count // MAX_TILE))
    bits = weights.bits * selected + places
    if weights.tile is None:
        return bits
    tiling = Tiling(weights.shape, weights.tile, group)
    inside = int(tiling.sizes()[tiling.any(second)].sum())
    return min(bits, weights.bits * inside + tiling.count)


def _expected_tiles(sizes: np.ndarray, selected: int) -> float:
    """Return the mean number of tiles with any of so many weights, drawn from those of all tiles.

    A tile of n of N weights has none with probability C(N - n, k) / C(N, k).
    """
    total = int(sizes.sum())
    expected = 0.0
    for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
        left = total - int(size)
        none = 0.0
        if left >= selected:
            none = math.exp(
                math.lgamma(left + 1) - math.lgamma(left - selected + 1)
                - math.lgamma(total + 1) + math.lgamma(total - selected + 1)
            )  # fmt: skip
        expected += int(count) * (1 - none)
    return expected
