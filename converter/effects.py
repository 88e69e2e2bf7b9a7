"""What the quantization of each layer by itself does to the outputs of the float network.

A layer has two parts that cost accuracy: its weights become words, and its result becomes codes.
Each is measured alone: the float network runs on what comes out of a layer that has only this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

from logshift.converter.compare import GroupError, Noise
from logshift.converter.evaluate import AT_ONCE, Network, Value, rows
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.passes import squares
from logshift.converter.progress import Progress
from logshift.kernels.errors import ConversionError
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread
from logshift.runtime.graph import Graph, Node

# Made by `place`: settings cannot name them.
_ENDS = ("QuantizeLinear", "DequantizeLinear", "Flatten", "Identity")


@dataclass(frozen=True)
class Effect:
    """What one part of a layer adds to the outputs.

    Attributes
    ----------
    name, op : str
    tensor : str
        That the layer makes.
    part : {"weights", "codes"}
        What is quantized.
    bits : int
        Of a word, or of a code.
    settled_by : tuple of str
        Nodes that stay float, or have activations in float32, so that this part is not quantized.
    noise : dict of (output name, number of the group) to float
        Squared error over squares of the float values.
    """

    name: str
    op: str
    tensor: str
    part: Literal["weights", "codes"]
    bits: int
    settled_by: tuple[str, ...]
    noise: Noise

    @property
    def worst(self) -> float:
        """The noise of the group that it does most to."""
        return max(self.noise.values(), default=0.0)


def layer_effects(
    graph: FloatGraph,
    packed: Graph,
    batches: Sequence[Mapping[str, np.ndarray]],
    groups: Mapping[str, Sequence[GroupError]],
    seconds: float,
    progress: Progress,
) -> tuple[list[Effect], int]:
    """Measure what each layer adds to the outputs, those first that look worst.

    Parameters
    ----------
    graph : FloatGraph
        After `fuse` and `place`.
    packed : Graph
        What it has become.
    batches : list of dict of input name to array
        Of the model; a few are enough, and of large networks fewer are taken.
    groups : dict of output name to list of GroupError
        What of the outputs is looked at.
    seconds : float
        After which no further layer is begun.
    progress : callable(done, total, what)

    Returns
    -------
    list of Effect
        In order of execution.
    int
        How many parts there are, measured or not.
    """
    network = _Network(graph, packed, batches[:1], groups)
    parts, threads = _in_turns(network.parts()), default_threads()
    # A part takes about half of what the network takes, for each batch.
    expected = len(parts) * network.seconds / 2 / threads
    if (count := min(int(seconds / expected) if expected else 1, len(batches))) > 1:
        network = _Network(graph, packed, batches[:count], groups)
    until = time.perf_counter() + seconds

    def measure(part: _Part) -> tuple[int, Effect] | None:
        try:
            return part.index, network.effect(part)
        except ConversionError:  # an ONNX operator takes only what the float network makes
            return None

    measured: list[tuple[int, Effect]] = []
    for begin in range(0, len(parts), AT_ONCE * threads):
        if time.perf_counter() > until:
            break
        progress(begin, len(parts), f"measuring {parts[begin].node.name}")
        some = parts[begin : begin + AT_ONCE * threads]
        measured += filter(None, spread(measure, some, threads))
    effects = [effect for _, effect in sorted(measured, key=lambda item: item[0])]
    return effects, len(parts)


def _in_turns(parts: Sequence[_Part]) -> list[_Part]:
    """Return in turns the worst weights by themselves, the worst codes, and the last parts.

    The last ones are soon measured, and nothing after them makes up for what they do.
    """
    ranked = sorted(parts, key=lambda part: -part.alone)
    turns = [
        [part for part in ranked if part.of == "weights"],
        [part for part in ranked if part.of == "codes"],
        sorted(parts, key=lambda part: -part.index),
    ]
    order = (part for turn in zip_longest(*turns) for part in turn if part is not None)
    return list(dict.fromkeys(order))


@dataclass(frozen=True, eq=False)
class _Part:
    """The weights or the codes of a node, and the noise that these are by themselves."""

    index: int
    node: FloatNode
    of: Literal["weights", "codes"]
    alone: float


class _Network(Network):
    """The float network on a few pictures, of which one part is quantized."""

    def __init__(
        self,
        graph: FloatGraph,
        packed: Graph,
        batches: Sequence[Mapping[str, np.ndarray]],
        groups: Mapping[str, Sequence[GroupError]],
    ) -> None:
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        super().__init__(graph, joined, len(batches), 1)
        start = time.perf_counter()
        for stretch in self.stretches:
            self.run(stretch, self.values, self.batches)
        self.seconds = time.perf_counter() - start
        self.packed, self.compared = packed, groups
        self.made: dict[str, Node] = {
            name: node for node in packed.nodes for name in node.outputs if name
        }
        self.readers = graph.readers()

    def parts(self) -> list[_Part]:
        """Return all parts that are quantized."""
        found = []
        for index, node in enumerate(self.graph.nodes):
            if (words := self._packed(node).weights) is not None and node.weight is not None:
                noise = _ratio(node.weight, words.values())
                found.append(_Part(index, node, "weights", noise))
            q = self.packed.quantization.get(node.output)
            if q is not None and node.output not in self.graph.quantization:  # not the model's own
                exact = rows(self.values[node.output])
                noise = _ratio(exact, q.dequantize(q.quantize(exact)))
                found.append(_Part(index, node, "codes", noise))
        return [part for part in found if part.alone > 0]

    def effect(self, part: _Part) -> Effect:
        """Return what a part does to the outputs."""
        node, evaluator = part.node, self.evaluator(part.node)
        if part.of == "weights":
            words = self._packed(node).weights
            assert words is not None
            inputs = [rows(self.values[name]) for name in node.inputs]
            exact, found = evaluator(inputs), evaluator(inputs, words.values())
            if self.packed.settings.get("bias_correction", True):
                found -= (found - exact).mean(axis=(0, 2, 3), keepdims=True)
            made = evaluator.finish(found)
            bits, tensor = words.bits, self._packed(node).outputs[0]
        else:
            q = self.packed.quantization[node.output]
            made = q.dequantize(q.quantize(rows(self.values[node.output])))
            bits, tensor = q.bits, node.output
        changed = self.rerun({node.output: lambda _: made})
        values = self.values | changed
        return Effect(
            node.name, node.op, tensor, part.of, bits, self._settled_by(part),
            {
                (name, number): self._noise(group, self.values[name], values[name])
                for name, groups in self.compared.items()
                for number, group in enumerate(groups)
            },
        )  # fmt: skip

    def _packed(self, node: FloatNode) -> Node:
        """Return the packed node with the weights: one whose function is a table comes before."""
        made = self.made[node.output]
        if node.table is not None and node.table.inputs[0] in self.made:
            made = self.made[node.table.inputs[0]]
        return made

    def _settled_by(self, part: _Part) -> tuple[str, ...]:
        """Return the nodes that have to be on float32: who reads codes, and who moves them."""
        if part.of == "weights":
            return (part.node.name,)
        nodes = list(self.readers.get(part.node.output, ()))
        if not part.node.is_conv:
            nodes.insert(0, part.node)
        return tuple(dict.fromkeys(node.name for node in nodes if node.op not in _ENDS))

    def _noise(self, group: GroupError, exact: Value, found: Value) -> float:
        exact, found = rows(exact), rows(found)
        if exact.shape != found.shape or exact.dtype.kind != "f":
            return 0.0
        return _ratio(group.part(exact), group.part(found))


def _ratio(exact: np.ndarray, found: np.ndarray) -> float:
    """Return squared error over squares, 0 where there is nothing, or nothing that is finite."""
    power, error = squares(exact, found)
    return error / power if power > 0 and math.isfinite(error) else 0.0
