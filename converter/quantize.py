"""Quantize a lowered network layer by layer, following it with calibration data.

Two streams of values run through the network side by side: the float one, and the quantized one
that sees every weight and activation quantized so far. Each layer's bias makes up for what the
quantization of everything before it has shifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from logshift.converter import feedback, shared
from logshift.converter.activation import activation, rounded
from logshift.converter.budget import Plan, Share, fixed_plan
from logshift.converter.calibrate import RANGES, choose_quantization
from logshift.converter.clamp import NO_CLAMP
from logshift.converter.constant_words import encode_constant, rows_read
from logshift.converter.evaluate import (
    Evaluator,
    Value,
    ratio_db,
    rows,
    run_onnx,
    snr_db,
)
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.passes import PART, bounds, over_pictures, squares, threads_of_part
from logshift.converter.progress import Progress
from logshift.converter.settings import AUTO, Settings
from logshift.kernels.errors import ConversionError
from logshift.kernels.machine.memory import trim
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.graph import (
    NEWEST_OPSET,
    ONNX_DOMAIN,
    ConstantWords,
    Graph,
    Node,
    Quantization,
)
from logshift.runtime.operators import OPERATORS
from logshift.runtime.validate import validate

# Before the walk, float stream and codes of the quantized one: bytes per value of a tensor.
_BYTES_PER_VALUE = 5


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one node: signal-to-noise ratios, float against quantized stream."""

    weight_snr_db: float | None
    output_snr_db: float | None


@dataclass
class _Streams:
    """Values of a tensor for all calibration pictures: float, and codes unless it stays float32."""

    exact: Value
    quantized: Value


@dataclass(frozen=True)
class _Seen:
    """What a node makes in the float network.

    Attributes
    ----------
    values : float32 array
    before, bounds : (low, high)
        Of what its function is computed of, and of the values.
    means : float64 array (O,), optional
        Of channels before the function; of a layer that is quantized.
    """

    values: np.ndarray
    before: tuple[float, float]
    bounds: tuple[float, float]
    means: np.ndarray | None


class _Rows:
    """An array of all pictures that is put together from its parts, by several threads."""

    def __init__(self, count: int) -> None:
        self.values = np.empty(0)
        self._count, self._is_made, self._lock = count, False, Lock()

    def put(self, part: slice, y: np.ndarray) -> None:
        with self._lock:
            if not self._is_made:
                self.values = np.empty((self._count, *y.shape[1:]), y.dtype)
                self._is_made = True
        self.values[part] = y


def bytes_per_picture(graph: FloatGraph) -> int:
    """Return the most memory that `quantize_graph` holds at once, per calibration picture."""
    batch = next(iter(graph.inputs)).nominal[0]
    sizes = {name: int(np.prod(shape)) // batch for name, shape in graph.shapes.items()}
    last_use = _last_uses(graph)
    alive = {info.name for info in graph.inputs}
    most = largest = 0
    for index, node in enumerate(graph.nodes):
        alive.update(filter(None, node.outputs))
        own = max(sizes[name] for name in node.outputs if name)
        most = max(most, sum(sizes[name] for name in alive) + own)
        largest = max(largest, own)
        alive -= {name for name in alive if last_use.get(name, index) <= index}
    return max(most + largest, 1) * _BYTES_PER_VALUE


def quantize_graph(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
    plan: Plan | None = None,
) -> tuple[Graph, list[LayerError]]:
    """Quantize every node in execution order.

    Parameters
    ----------
    graph : FloatGraph
        After `fuse` and `place`.
    samples : dict of input name to array (pictures, ...)
        Whole batches of the model.
    batches : int
        How many batches these are.
    settings : Settings
    progress : callable(done, total, what)
    plan : Plan, optional
        Bits and second words of every layer; by default those of `settings`, divided as is best.

    Returns
    -------
    Graph
        Packed and validated; without preprocessing, labels and settings.
    list of LayerError
        One per node.
    """
    if plan is None:
        plan = fixed_plan(graph, samples, batches, settings, progress)
    packed, errors = _Walk(graph, samples, batches, settings, plan).run(progress)
    validate(packed)  # fills in what attributes are by default
    return packed, errors


class _NeedsTable(Exception):
    """The function of a node can only be a table of codes."""


class _Walk:
    def __init__(
        self,
        graph: FloatGraph,
        samples: Mapping[str, np.ndarray],
        batches: int,
        settings: Settings,
        plan: Plan,
    ) -> None:
        self.graph = graph
        self.samples = samples
        self.batches = batches
        self.settings = settings
        self.plan = plan
        self.streams = {name: _Streams(x, x) for name, x in {**samples, **graph.constants}.items()}
        self.quantization: dict[str, Quantization] = {}
        self.code_tensors = set(graph.code_tensors)
        # Of weights that several nodes have, by their `id`: what is known of all, and their words.
        self.ahead = shared.look_ahead(graph, samples, batches, settings)
        self.encoded: dict[int, LogWeights] = {}
        self.constant_words: dict[str, ConstantWords] = {}
        self.scratch = np.empty(0, np.float32)  # see `_memory`

    def run(self, progress: Progress) -> tuple[Graph, list[LayerError]]:
        with ThreadPoolExecutor(1) as self.helper:
            return self._run(progress)

    def _run(self, progress: Progress) -> tuple[Graph, list[LayerError]]:
        last_use = _last_uses(self.graph)
        nodes, errors = [], []
        for index, node in enumerate(self.graph.nodes):
            progress(index, len(self.graph.nodes), node.name)
            for packed, error in self._nodes(node):
                nodes.append(packed)
                errors.append(error)
            for name in [n for n in self.streams if last_use.get(n, index) <= index]:
                del self.streams[name]
            trim()
        progress(len(self.graph.nodes), len(self.graph.nodes), "")
        opset = max((node.opset for node in self.graph.nodes), default=0) or NEWEST_OPSET
        graph = Graph(
            self.graph.inputs,
            self.graph.outputs,
            self.quantization,
            nodes,
            constants={
                name: self.constant_words[name].values() if name in self.constant_words else array
                for name, array in self.graph.constants.items()
            },
            opset=opset,
            constant_words=self.constant_words,
        )
        return graph, errors

    def _onnx(self, node: FloatNode) -> tuple[Node, LayerError]:
        streams = [self.streams[name] if name else None for name in node.inputs]
        constant = [name in self.graph.constants for name in node.inputs]
        exact = run_onnx(
            node, [None if s is None else s.exact for s in streams], constant, self.batches
        )
        self._encode_constants(node, exact)
        quantized = exact
        if any(s is not None and s.exact is not s.quantized for s in streams):
            inputs = [None if s is None else s.quantized for s in streams]
            quantized = run_onnx(node, inputs, constant, self.batches)
        for name, y, z in zip(node.outputs, exact, quantized, strict=True):
            if name:
                self.streams[name] = _Streams(y, z)
        packed = Node(
            node.op, node.name, list(node.inputs), node.outputs, dict(node.attributes),
            domain=ONNX_DOMAIN,
        )  # fmt: skip
        pairs = list(zip(exact[0], quantized[0], strict=True))
        if any(y.dtype.kind != "f" or y.shape != z.shape for y, z in pairs):
            return packed, LayerError(None, None)
        return packed, LayerError(None, _ratio([squares(y, z) for y, z in pairs]))

    def _encode_constants(self, node: FloatNode, outputs: list[list[np.ndarray]]) -> None:
        """Choose the words of the constants that are weights of a node, where nobody has yet."""
        for index, name in enumerate(node.inputs):
            if name not in self.graph.weights or name in self.constant_words:
                continue
            words = self.graph.constant_words.get(name)
            if words is None:
                streams = [self.streams[n] if n else None for n in node.inputs]
                quantized, exact = (
                    rows_read(node, index, values, outputs)
                    for values in (
                        [s and s.quantized for s in streams], [s and s.exact for s in streams]
                    )
                )  # fmt: skip
                s = self.settings
                share = self.plan.get(name, Share(s.weight_bits, s.ratio_of_constants))
                words = encode_constant(
                    self.graph.constants[name], self.graph.weights[name], quantized, exact,
                    replace(s, weight_bits=share.bits), share.ratio,
                )  # fmt: skip
            self.constant_words[name] = words
            self.streams[name].quantized = words.values()

    def _nodes(self, node: FloatNode) -> Iterator[tuple[Node, LayerError]]:
        """Pack a node; one whose function cannot be computed at once becomes two."""
        try:
            yield self._onnx(node) if node.is_onnx else self._node(node)
        except _NeedsTable:
            assert node.table is not None
            before = node.table.inputs[0]
            self.code_tensors.add(before)
            if node.output in self.plan:
                self.plan = self.plan | {before: self.plan[node.output]}
            yield self._node(
                replace(node, output=before, function=None, table=None, clamp=NO_CLAMP)
            )
            yield self._node(node.table)

    def _node(self, node: FloatNode) -> tuple[Node, LayerError]:
        for name in node.inputs:
            stream = self.streams[name]
            if not isinstance(stream.exact, np.ndarray):
                same = stream.quantized is stream.exact
                stream.exact = rows(stream.exact)
                stream.quantized = stream.exact if same else rows(stream.quantized)
        count = len(self.streams[node.inputs[0]].exact)
        evaluator = Evaluator(node, threads_of_part(count))
        # What the words depend on is known: they are chosen while the float network goes on.
        words = self.helper.submit(self._encode, node) if node.is_quantized else None
        seen = self._look(node, evaluator, count)
        packed = Node(node.op, node.name, list(node.inputs), [node.output], dict(node.attributes))
        q = None
        if node.output in self.code_tensors:
            self.quantization[node.output] = q = self._choose(node, seen)
            if node.function is not None and node.table is not None:
                packed.activation = activation(node.function, q, *seen.before, node.clamp)
                if packed.activation is None:
                    raise _NeedsTable
        values = weight_snr = shift = None
        is_corrected = False
        packed.bias = node.bias
        if node.is_conv and node.keeps_weight:
            packed.float_weights = node.weight
        elif words is not None:
            assert node.weight is not None
            packed.weights = words.result()
            values = packed.weights.values()
            weight_snr = snr_db(node.weight, values)
            is_corrected = self.settings.bias_correction and not self._is_given(node)
            ahead = self.ahead.get(id(node.weight))
            if is_corrected and ahead is not None and ahead.has_one_bias:
                shift = ahead.shift(node.weight, values)
        made = _Rows(count)

        def settle(part: slice, y: np.ndarray) -> tuple[float, float]:
            exact = seen.values[part]
            if q is None:
                y = evaluator.finish(y)
                made.put(part, y)
                return squares(exact, y)
            codes = self._codes(packed, evaluator, y, q)
            made.put(part, codes)
            if node.output in self.graph.quantization:
                np.clip(exact, *q.dequantize(np.array([0, q.top])), out=exact)
            return squares(exact, q.dequantize(codes))

        fetch = self._quantized(node)
        if is_corrected:
            before = self._memory(seen.values.shape)
            found = evaluator.sweep(fetch, count, lambda _, y: _means(y), values, before)
            if shift is None:
                assert seen.means is not None
                shift = seen.means - _mean(found)
            packed.bias = (node.bias + shift).astype(np.float32)
            sums = _shifted(before, shift, settle)
        else:
            sums = evaluator.sweep(fetch, count, settle, values)
        self.streams[node.output] = _Streams(seen.values, made.values)
        self._fill_in(packed, node)
        return packed, LayerError(weight_snr, _ratio(sums))

    def _look(self, node: FloatNode, evaluator: Evaluator, count: int) -> _Seen:
        """Evaluate a node in the float network."""
        made = _Rows(count)

        def look(part: slice, y: np.ndarray) -> tuple[Any, Any, np.ndarray | None]:
            before, means = bounds(y), _means(y) if node.is_quantized else None
            y = evaluator.finish(y)
            made.put(part, y)
            return before, bounds(y), means

        before, after, means = zip(*evaluator.sweep(self._exact(node), count, look), strict=True)
        if node.is_quantized or node.output in self.code_tensors:
            if not np.isfinite([before, after]).all():
                raise ConversionError(
                    f"{node.op} {node.name!r}: the float model produces NaN or infinity here on the"
                    " calibration data"
                )
        return _Seen(
            made.values, _outermost(before), _outermost(after),
            _mean(means) if node.is_quantized else None,
        )  # fmt: skip

    def _memory(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a float32 array that is used until the next layer.

        It is the same memory for all layers: new pages take as long as what is written to them.
        """
        size = math.prod(shape)
        if size > self.scratch.size:
            self.scratch = np.empty(0, np.float32)  # that goes first
            self.scratch = np.empty(size, np.float32)
        return self.scratch[:size].reshape(shape)

    def _codes(
        self, packed: Node, evaluator: Evaluator, before: np.ndarray, q: Quantization
    ) -> np.ndarray:
        """Return the codes that a node makes of what it computes before its function.

        Parabolas are not quite the function: what they are wrong by on average is a mean error
        like others, for the layers that follow to make up for.
        """
        found = packed.activation
        if found is None or found.op != "Piecewise":
            return q.quantize(evaluator.finish(before))
        low, high = (_bound(bound, q) for bound in evaluator.node.clamp)
        return rounded(found, q, before, low or 0, q.top if high is None else high)

    def _exact(self, node: FloatNode) -> Callable[[slice], list[np.ndarray]]:
        return lambda part: [self.streams[name].exact[part] for name in node.inputs]  # type: ignore[misc]

    def _quantized(self, node: FloatNode) -> Callable[[slice], list[np.ndarray]]:
        def fetch(part: slice) -> list[np.ndarray]:
            parts: list[tuple[Any, str]] = [
                (self.streams[n].quantized[part], n) for n in node.inputs
            ]
            return [
                self.quantization[name].dequantize(x) if name in self.quantization else x
                for x, name in parts
            ]

        return fetch

    def _is_given(self, node: FloatNode) -> bool:
        """Tell whether the model leaves nothing to choose about a layer."""
        codes = self.code_tensors.intersection([*node.inputs, node.output])
        return node.words is not None and codes <= set(self.graph.quantization)

    def _encode(self, node: FloatNode) -> LogWeights:
        if node.words is not None:
            return node.words
        key = id(node.weight)
        if key not in self.encoded:
            # What is not finite the network will be refused for.
            with np.errstate(over="ignore", invalid="ignore"):
                self.encoded[key] = self._chosen(node)
        return self.encoded[key]

    def _chosen(self, node: FloatNode) -> LogWeights:
        """Choose the words of a layer."""
        share, ahead = self.plan[node.output], self.ahead.get(id(node.weight))
        stream, q = self.streams[node.inputs[0]], self.quantization.get(node.inputs[0])
        return feedback.encode_layer(
            node,
            feedback.Inputs(rows(stream.quantized), q),
            feedback.Inputs(rows(stream.exact)),
            replace(self.settings, weight_bits=share.bits),
            share.ratio,
            None if ahead is None else ahead.moments,
        )

    def _choose(self, node: FloatNode, seen: _Seen) -> Quantization:
        if node.output in self.graph.quantization:
            return self.graph.quantization[node.output]
        if OPERATORS[node.op].keeps_quantization:
            return self.quantization[node.inputs[0]]
        if node.output in self.graph.ranges:
            return self.graph.ranges[node.output]
        s = self.settings
        method = RANGES[0] if s.activation_range == AUTO else s.activation_range
        values = np.array(seen.bounds) if method == RANGES[0] else seen.values
        return choose_quantization(values, s.code_bits_of(node.name), method, s.percentile)

    def _fill_in(self, packed: Node, node: FloatNode) -> None:
        """Add what depends on the quantization of inputs and output: clamp and table."""
        q = self.quantization.get(node.output)
        low, high = node.clamp
        bounded = "clamp" in OPERATORS[node.op].attributes
        if bounded and (low is not None or high is not None):
            packed.attributes["clamp"] = [_bound(low, q), _bound(high, q)]
        if node.op == "Lookup":
            assert node.function is not None and q is not None
            q_x = self.quantization[node.inputs[0]]
            # Codes beyond the top never occur; they get the top's value.
            codes = np.minimum(np.arange(256), q_x.top)
            y = node.function((codes - q_x.zero_point) * q_x.scale)
            table = np.clip(np.rint(y / q.scale + q.zero_point), 0, q.top)
            packed.table = table.astype(np.uint8)


def _shifted(
    y: np.ndarray,
    shift: np.ndarray,
    settle: Callable[[slice, np.ndarray], tuple[float, float]],
) -> list[tuple[float, float]]:
    """Shift the channels of a tensor, and call `settle` with its parts."""
    added = shift.astype(np.float32).reshape(-1, 1, 1)

    def shifted(part: slice) -> tuple[float, float]:
        rows = y[part]
        rows += added
        return settle(part, rows)

    return over_pictures(shifted, len(y), max(1, PART // y[0].size))


def _bound(value: float | None, q: Quantization | None) -> Any:
    """Return a clamp bound in codes, or in real units of a float32 output."""
    if value is None or q is None:
        return value
    return int(np.clip(np.rint(value / q.scale + q.zero_point), 0, q.top))


def _means(y: np.ndarray) -> np.ndarray:
    """Return the mean of every channel of every picture.

    Pictures first: NumPy adds up what lies side by side much faster, and more exactly.
    """
    return y.mean(axis=(2, 3))


def _mean(means: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of every channel, of what `_means` returned for parts of the pictures."""
    return np.concatenate(means).mean(axis=0, dtype=np.float64)


def _outermost(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the bounds of a tensor, of those of its parts."""
    return min(low for low, _ in found), max(high for _, high in found)


def _ratio(sums: Sequence[tuple[float, float]]) -> float:
    """Return a signal-to-noise ratio in dB, of what `squares` returned for parts of a tensor."""
    power, noise = (sum(part) for part in zip(*sums, strict=True))
    return ratio_db(power, noise)


def _last_uses(graph: FloatGraph) -> dict[str, int]:
    return {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
