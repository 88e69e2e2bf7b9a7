"""Bits where they matter: how each tensor is rounded, chosen by what that does to the outputs.

Each tensor of codes is rounded by itself, and the rest of the float network runs on what comes out:
so it is measured what its codes cost the outputs, each group of channels by itself, and which range
of them costs least. Where all of them together cost too much, those tensors stay float32 that give
most for the time it takes; what is read as float32 anyway comes first.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping

import numpy as np

from logshift.converter.budget import few_pictures
from logshift.converter.calibrate import RANGES, choose_quantization
from logshift.converter.compare import Groups, groups_of
from logshift.converter.evaluate import Network, Value, rows
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.progress import Progress
from logshift.converter.settings import AUTO, Settings
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread
from logshift.runtime.operators import OPERATORS

_PICTURES = 4  # that effects are measured on
# Squared error over squares of a group of outputs, of all tensors together: until it is reached,
# float32 is spent.
_ENOUGH = 5e-4
_TRIED = 0.02  # of the noise that is enough: above it other ranges of a tensor are tried

# What float32 costs, in products of codes: a product of float32, and to write or to round a value.
_PRODUCT = 3.0
_VALUE = 12.0
# The time of the whole network that may go to it, as a share of that of codes alone.
_SHARES = {"speed": 0.0, "size": 0.1, None: 0.1, "accuracy": 1.0}

Noise = dict[tuple[str, int], float]


Place = Callable[[Collection[str]], FloatGraph]


def choose_precision(
    lowered: FloatGraph,
    graph: FloatGraph,
    place: Place,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
) -> FloatGraph:
    """Choose what `activation_bits="auto"` and `activation_range="auto"` leave open.

    Parameters
    ----------
    lowered : FloatGraph
        Before `place`.
    graph : FloatGraph
        After it.
    place : callable(tensor names) -> FloatGraph
        Returns what it is if the nodes that make these tensors work on float32.
    samples : dict of input name to array (pictures, ...)
    batches : int
        Batches of the model that these are.
    settings : Settings
    progress : callable(done, total, what)

    Returns
    -------
    FloatGraph
        After `place`, with `ranges`.
    """
    if not _rounded(graph) or not settings.chooses_precision:
        return graph
    network = _Network(graph, samples, batches, settings)
    ranges = network.ranges(progress)
    if floats := _Spending(lowered, network.noise, settings).run():
        graph = place(floats)
    # Where codes and float32 of a tensor are both there, these have its name.
    graph.ranges = {
        node.output: ranges.get(node.output) or ranges.get(_plain(node.output)) or RANGES[0]
        for node in _rounded(graph)
    }
    return graph


def _plain(name: str) -> str:
    """Return what a tensor of codes is called in the network before `place`."""
    return name.removesuffix("/codes")


def _rounded(graph: FloatGraph) -> list[FloatNode]:
    """Return the nodes whose results get a quantization of their own."""
    return [
        node
        for node in graph.nodes
        if node.output in graph.code_tensors
        and node.output not in graph.quantization
        and not OPERATORS[node.op].keeps_quantization
    ]


class _Network(Network):
    """The float network on a few pictures, of which one tensor is rounded.

    Attributes
    ----------
    noise : dict of tensor name to Noise
        What the codes of each tensor do to the outputs.
    """

    def __init__(
        self, graph: FloatGraph, samples: Mapping[str, np.ndarray], batches: int, settings: Settings
    ) -> None:
        self.rounded, self.settings = _rounded(graph), settings
        size = max(len(x) // batches for x in samples.values())
        few = min(batches, max(1, min(few_pictures(graph, len(self.rounded)), _PICTURES) // size))
        inputs = {name: x[: few * (len(x) // batches)] for name, x in samples.items()}
        super().__init__(graph, inputs, few, 1)
        self.groups: Groups = groups_of(graph.outputs, self.outputs)
        self.noise: dict[str, Noise] = {}

    def ranges(self, progress: Progress) -> dict[str, str]:
        """Choose how the range of each tensor is chosen, and note what its codes cost."""
        given, threads = self.settings.activation_range, default_threads()
        methods = RANGES if given == AUTO else (given,)

        def measure(node: FloatNode) -> tuple[str, Noise]:
            best, noise = methods[0], self._noise(node, methods[0])
            if _worst(noise) > _TRIED * _ENOUGH:
                for method in methods[1:]:
                    other = self._noise(node, method)
                    if _worst(other) < _worst(noise):
                        best, noise = method, other
            return best, noise

        found: dict[str, str] = {}
        for begin in range(0, len(self.rounded), threads):
            nodes = self.rounded[begin : begin + threads]
            progress(begin, len(self.rounded), f"rounding {nodes[0].name}")
            for node, result in zip(nodes, spread(measure, nodes, threads), strict=True):
                found[node.output], self.noise[node.output] = result
        return found

    def _noise(self, node: FloatNode, method: str) -> Noise:
        """Return what codes of a node's result do to the outputs."""
        exact = rows(self.values[node.output])
        if not np.isfinite(exact).all():  # which the conversion itself refuses
            return {}
        bits = self.settings.code_bits_of(node.name)
        q = choose_quantization(exact, bits, method, self.settings.percentile)
        changed: dict[str, Value] = {node.output: q.dequantize(q.quantize(exact))}
        values = ChainMap(changed, self.values)
        for later, evaluator in zip(self.graph.nodes, self.evaluators, strict=True):
            if later is not node and changed.keys() & set(later.inputs):
                changed.update(self.results(later, evaluator, values))
        noise: Noise = {}
        for name in self.groups.of.keys() & changed.keys():
            noise |= self.groups.noise(name, rows(self.values[name]), rows(changed[name]))
        return noise


def _worst(noise: Noise) -> float:
    return max(noise.values(), default=0.0)


class _Spending:
    """Which tensors of the network before `place` stay float32, for what they give and cost."""

    def __init__(self, graph: FloatGraph, noise: Mapping[str, Noise], settings: Settings) -> None:
        self.graph, self.settings = graph, settings
        self.noise = {_plain(name): of for name, of in noise.items()}
        self.producers = {node.output: node for node in graph.nodes}
        self.readers: dict[str, list[FloatNode]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)

    def run(self) -> set[str]:
        """Return the outputs of the nodes that work on float32."""
        total: Noise = {}
        for noise in self.noise.values():
            for key, value in noise.items():
                total[key] = total.get(key, 0.0) + value
        regions = {name: found for name in self.noise if (found := self._region(name))}
        whole = sum(self._products(node) + self._values(node) for node in self.graph.nodes)
        left = _SHARES[self.settings.prefer] * whole
        chosen: set[str] = set()
        while wanting := {key: value for key, value in total.items() if value > _ENOUGH}:
            best, most, price = "", 0.0, 0.0
            for name, region in regions.items():
                cost = self._cost(region - chosen) + _VALUE * _size(self.graph, name)
                gain = sum(self.noise[name].get(key, 0.0) / wanting[key] for key in wanting)
                if gain > _TRIED and cost <= left and gain / cost > most:
                    best, most, price = name, gain / cost, cost
            if not best:
                break
            left -= price
            chosen |= regions.pop(best)
            for key, value in self.noise[best].items():
                total[key] -= value
        return chosen

    def _region(self, tensor: str) -> set[str]:
        """Return which nodes have to be on float32 for a tensor to be; none if that cannot be."""
        nodes: dict[str, FloatNode] = {}
        producer = self.producers.get(tensor)
        if producer is not None and not producer.is_conv:
            nodes[producer.output] = producer
        waiting = [tensor]
        while waiting:
            for node in self.readers.get(waiting.pop(), ()):
                if not node.is_onnx and node.output not in nodes:
                    nodes[node.output] = node
                    if OPERATORS[node.op].keeps_quantization:
                        waiting.append(node.output)
        of_choice = (self.settings.activation_bits_of(node.name) == AUTO for node in nodes.values())
        return set(nodes) if all(of_choice) else set()

    def _products(self, node: FloatNode) -> float:
        if not node.is_conv:
            return 0.0
        assert node.weight is not None
        positions = node.output if node.op == "Conv" else node.inputs[0]
        n, _, h, w = self.graph.shapes[positions]
        return float(node.weight.size * n * h * w)

    def _values(self, node: FloatNode) -> float:
        return float(_size(self.graph, node.output))

    def _cost(self, region: set[str]) -> float:
        """Return what it costs to have these nodes on float32."""
        cost = 0.0
        for name in region:
            node = self.producers[name]
            cost += _PRODUCT * self._products(node) + _VALUE * self._values(node)
        return cost


def _size(graph: FloatGraph, tensor: str) -> int:
    return math.prod(graph.shapes.get(tensor, ()))
