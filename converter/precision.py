"""Bits where they matter: how each tensor is rounded, chosen by what that does to the outputs.

Each tensor of codes is rounded by itself, and the rest of the float network runs on what comes out:
so it is measured what its codes cost the outputs, each group of channels by itself, and which range
of them costs least. Where all of them together cost too much, those tensors stay float32 that give
most for the time it takes; where coarser codes save time and cost next to nothing, there are these.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np

from logshift.converter.budget import few_samples
from logshift.converter.calibrate import RANGES, choose_quantization
from logshift.converter.compare import Noise
from logshift.converter.evaluate import AT_ONCE, Network, Value, rows
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.progress import Progress
from logshift.converter.samples import by_batch
from logshift.converter.settings import AUTO, Settings
from logshift.converter.stretches import Stretch
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread
from logshift.runtime.graph import Quantization
from logshift.runtime.operators import OPERATORS

_PICTURES = 4  # that effects are measured on
# Squared error over squares of a group of outputs, of all tensors together: until it is reached,
# float32 is spent.
_ENOUGH = 5e-4
_OBSERVED = 2**15  # values of a tensor that its range is chosen on
_BETTER = 0.8  # times the noise of a range that clips less: a few samples do not show it all
# Times its scale: noise falls with the square, and what more of it a few samples show is luck.
_FINER = math.sqrt(_BETTER)
_TRIED = 0.02  # of the noise that is enough: above it other ranges of a tensor are tried

# What float32 costs, in products of codes: a product of float32, and to write or to round a value.
_PRODUCT = 3.0
_VALUE = 60.0
# The time of the whole network that may go to it, as a share of that of codes alone.
_SHARES = {"speed": 0.0, "size": 0.18, None: 0.18, "accuracy": 1.0}

# What coarser codes may add, all together, as a share of `_ENOUGH`.
_COARSER = {"speed": 1.0, "size": 0.1, None: 0.1, "accuracy": 0.0}
# Codes, words and channels with which 3x3 convolutions are faster as Winograd, on some machines.
_WINOGRAD_CODES, _WINOGRAD_WORDS, _WINOGRAD_CHANNELS = 6, 3, 32

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
    # Errors that go together do not just add up.
    total = network.effect(ranges)
    if floats := _Spending(lowered, network.costs, total, settings).run():
        graph = place(floats)
    # Where codes and float32 of a tensor are both there, these have its name.
    named = {node.output: node.output for node in _rounded(graph)}
    named |= {name: _plain(name) for name in named if name not in ranges}
    saved = {named[name]: value for name, value in _saved(graph, settings).items()}
    coarser = network.coarser(saved, progress)
    chosen = ranges | coarser if settings.activation_range == AUTO else coarser
    graph.ranges = {name: chosen[own] for name, own in named.items() if own in chosen}
    return graph


def _saved(graph: FloatGraph, settings: Settings) -> dict[str, float]:
    """Return the tensors that coarser codes let be read faster, with the products in question."""
    if settings.weight_bits > _WINOGRAD_WORDS or settings.residual_shift:
        return {}
    readers = graph.readers()
    saved: dict[str, float] = {}
    for node in _rounded(graph):
        waiting, products = [node.output], 0.0
        while waiting:
            for reader in readers.get(waiting.pop(), ()):
                if _is_for_winograd(reader):
                    products += _products(graph, reader)
                elif not reader.is_onnx and OPERATORS[reader.op].keeps_quantization:
                    waiting.append(reader.output)
        if products and settings.activation_bits_of(node.name) == AUTO:
            saved[node.output] = products
    return saved


def _is_for_winograd(node: FloatNode) -> bool:
    if node.op != "Conv" or not node.is_quantized or node.is_float:
        return False
    assert node.weight is not None
    o, *kernel, channels = node.weight.shape
    once = all(node.attributes[key] == [1, 1] for key in ("strides", "dilations"))
    few = min(o, channels) < _WINOGRAD_CHANNELS
    return kernel == [3, 3] and once and node.attributes["group"] == 1 and not few


def _products(graph: FloatGraph, node: FloatNode) -> float:
    if not node.is_conv:
        return 0.0
    assert node.weight is not None
    positions = node.output if node.op == "Conv" else node.inputs[0]
    n, _, h, w = graph.shapes[positions]
    return float(node.weight.size * n * h * w)


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
    costs : dict of tensor name to Noise
        What the codes of each tensor do to the outputs; known after `ranges`.
    """

    def __init__(
        self, graph: FloatGraph, samples: Mapping[str, np.ndarray], batches: int, settings: Settings
    ) -> None:
        self.rounded, self.settings = _rounded(graph), settings
        few = few_samples(graph, samples, batches, len(self.rounded), _PICTURES)
        super().__init__(graph, *few, 1)
        self.observed = self._observe(samples, batches)
        self.costs: dict[str, Noise] = {}

    def _observe(self, samples: Mapping[str, np.ndarray], batches: int) -> dict[str, np.ndarray]:
        """Return some values of each tensor that is rounded, its least and its largest among them.

        Of all samples: an end that a few do not reach is one for those that do.
        """
        split = by_batch(samples, batches)
        wanted = {node.output for node in self.rounded}
        last_use = {name: i for i, s in enumerate(self.stretches) for name in s.inputs}

        def look(batch: int) -> dict[str, np.ndarray]:
            values: dict[str, Value] = {name: x[batch] for name, x in split.items()}
            values |= self.graph.constants
            found: dict[str, np.ndarray] = {}
            rng = np.random.default_rng(batch)
            for index, stretch in enumerate(self.stretches):
                for name, y in self._clipped(stretch, values).items():
                    values[name] = y
                    if name in wanted:
                        flat = rows(y).reshape(-1)
                        some = flat[rng.integers(0, flat.size, max(_OBSERVED // batches, 64))]
                        found[name] = np.append(some, [flat.min(), flat.max()])
                for name in [n for n in values if last_use.get(n, index) <= index]:
                    del values[name]
            return found

        parts = spread(look, range(batches), default_threads())
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}

    def _clipped(self, stretch: Stretch, values: Mapping[str, Value]) -> dict[str, Value]:
        """Evaluate a stretch for one batch, with the ends of ranges that the model gives."""
        given = self.graph.quantization
        if given.keys().isdisjoint(stretch.sources):
            return self.run(stretch, values, 1)
        found = ChainMap[str, Value]({}, values)  # type: ignore[arg-type]
        for node in stretch.nodes:
            found.update(self.results(node, found, 1))
            if (q := given.get(node.output)) is not None:
                ends = q.dequantize(np.array([0, q.top]))
                found[node.output] = np.clip(rows(found[node.output]), *ends)
        return dict(found.maps[0])

    def ranges(self, progress: Progress) -> dict[str, Quantization]:
        """Choose the range of each tensor, and note what its codes cost."""
        found: dict[str, Quantization] = {}
        measured = self._measured(self.rounded, None, progress)
        for node, result in zip(self.rounded, measured, strict=True):
            if result is not None:
                found[node.output], self.costs[node.output] = result
        return found

    def coarser(self, saved: Mapping[str, float], progress: Progress) -> dict[str, Quantization]:
        """Choose tensors whose codes get fewer bits, of those that save so much; returns these."""
        limit = _COARSER[self.settings.prefer] * _ENOUGH
        nodes = [node for node in self.rounded if node.output in saved] if limit else []
        measured = self._measured(nodes, _WINOGRAD_CODES, progress)
        found = {
            node.output: result
            for node, result in zip(nodes, measured, strict=True)
            if result is not None and _worst(result[1]) <= limit
        }
        order = sorted(found, key=lambda name: _worst(found[name][1]) / saved[name])
        chosen: dict[str, Quantization] = {}
        added: Noise = {}
        for name in order:
            q, noise = found[name]
            more = {key: added.get(key, 0.0) + value for key, value in noise.items()}
            if _worst(more) <= limit:
                chosen[name], added = q, more
        # Errors that go together do not just add up.
        while chosen and _worst(self.effect(chosen)) > limit:
            chosen.popitem()
        return chosen

    def _measured(
        self, nodes: Sequence[FloatNode], bits: int | None, progress: Progress
    ) -> list[tuple[Quantization, Noise] | None]:
        """Choose the range of each node's codes, of so many bits; returns what they cost as well.

        None where values are not finite, which the conversion itself refuses.
        """
        given, threads = self.settings.activation_range, default_threads()
        methods = RANGES if given == AUTO else (given,)

        def measure(node: FloatNode) -> tuple[Quantization, Noise] | None:
            observed = self.observed[node.output]
            if not np.isfinite(observed).all():
                return None
            best: tuple[Quantization, Noise] | None = None
            for method in methods:
                of_code = bits or self.settings.code_bits_of(node.name)
                q = choose_quantization(observed, of_code, method, self.settings.percentile)
                if best is not None and q.scale > _FINER * best[0].scale:
                    continue
                noise = self.effect({node.output: q})
                if best is None or _worst(noise) < _BETTER * _worst(best[1]):
                    best = q, noise
                if _worst(best[1]) <= _TRIED * _ENOUGH:
                    break
            return best

        found: list[tuple[Quantization, Noise] | None] = []
        for begin in range(0, len(nodes), AT_ONCE * threads):
            some = nodes[begin : begin + AT_ONCE * threads]
            progress(begin, len(nodes), f"rounding {some[0].name}")
            found += spread(measure, some, threads)
        return found

    def effect(self, rounding: Mapping[str, Quantization]) -> Noise:
        """Return what it does to the outputs that these tensors are rounded."""

        def rounded(values: Mapping[str, Value], name: str, q: Quantization) -> np.ndarray:
            return q.dequantize(q.quantize(rows(values[name])))

        changes = {name: partial(rounded, name=name, q=q) for name, q in rounding.items()}
        return self.noise(self.rerun(changes))


def _worst(noise: Noise) -> float:
    return max(noise.values(), default=0.0)


class _Spending:
    """Which tensors of the network before `place` stay float32, for what they give and cost."""

    def __init__(
        self, graph: FloatGraph, noise: Mapping[str, Noise], total: Noise, settings: Settings
    ) -> None:
        self.graph, self.settings, self.total = graph, settings, total
        # Each has its part of what all do together.
        added = {key: sum(of.get(key, 0.0) for of in noise.values()) or 1.0 for key in total}
        self.noise = {
            _plain(name): {key: of.get(key, 0.0) * total[key] / added[key] for key in total}
            for name, of in noise.items()
        }
        self.producers = {node.output: node for node in graph.nodes}
        self.readers = graph.readers()

    def run(self) -> set[str]:
        """Return the outputs of the nodes that work on float32."""
        total = dict(self.total)
        regions = {name: found for name in self.noise if (found := self._region(name))}
        whole = sum(
            _products(self.graph, node) + self._size(node.output) for node in self.graph.nodes
        )
        left = _SHARES[self.settings.prefer] * whole
        chosen: set[str] = set()
        while wanting := {key: value for key, value in total.items() if value > _ENOUGH}:
            best, most, price = "", 0.0, 0.0
            for name, region in regions.items():
                cost = self._cost(region - chosen) + _VALUE * self._size(name)
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

    def _cost(self, region: set[str]) -> float:
        """Return what it costs to have these nodes on float32."""
        cost = 0.0
        for name in region:
            node = self.producers[name]
            cost += _PRODUCT * _products(self.graph, node) + _VALUE * self._size(name)
        return cost

    def _size(self, tensor: str) -> int:
        return math.prod(self.graph.shapes.get(tensor, ()))
