"""Float evaluation of lowered nodes: each becomes a tiny ONNX model that onnxruntime runs.

Weights are inputs of that model, so that one session serves float and quantized weights. ONNX
operators run as the runtime runs them, one batch of the model at a time.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import onnxruntime

from logshift.converter.compare import Groups, Noise, groups_of
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.layout import onnx_weight
from logshift.converter.onnx_writer import OPSET, AnyNode, FloatWriter
from logshift.converter.operators.registry import WRITINGS
from logshift.converter.ort import session
from logshift.converter.passes import PART, over_pictures, squares
from logshift.converter.stretches import Stretch, stretches
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.onnx_ops import numpy_ops

_PLACES = 64  # of a part, at least: weights are read from memory for every one
# Tensors for each thread whose effects are measured before anything is said of progress.
AT_ONCE = 4

_T = TypeVar("_T")

# Takes rows (pictures) and returns the node's inputs for them.
Fetch = Callable[[slice], list[np.ndarray]]

# A tensor for many pictures: rows, or what an ONNX operator made of one batch after the other.
Value = np.ndarray | list[np.ndarray]


def rows(value: Value) -> np.ndarray:
    """Return a tensor of all pictures in one array, flat if the data decide on its other sizes."""
    if isinstance(value, np.ndarray):
        return value
    if len(value) == 1:
        return value[0]
    parts = [np.atleast_1d(y) for y in value]
    if len({y.shape[1:] for y in parts}) > 1:
        parts = [y.reshape(-1) for y in parts]
    return np.concatenate(parts)


def run_onnx(
    node: FloatNode, inputs: Sequence[Value | None], constant: Sequence[bool], batches: int
) -> list[list[np.ndarray]]:
    """Run an ONNX operator on one batch of the model after the other.

    Parameters
    ----------
    node : FloatNode
    inputs : list of Value, None for inputs that are not given
    constant : list of bool
        Whether an input is the same for all batches.
    batches : int

    Returns
    -------
    list of list of array
        Its outputs, for every batch.
    """

    def part(value: Value | None, fixed: bool, batch: int) -> np.ndarray | None:
        if value is None or fixed:
            return value  # type: ignore[return-value]
        if isinstance(value, list):
            return value[batch]
        size = len(value) // batches
        return value[batch * size : (batch + 1) * size]

    results: list[list[np.ndarray]] = [[] for _ in node.outputs]
    for batch in range(batches):
        arguments = [part(v, fixed, batch) for v, fixed in zip(inputs, constant, strict=True)]
        try:
            outputs = numpy_ops.compute(
                node.op, node.attributes, node.opset, arguments, len(node.outputs)
            )
        except InputError as error:
            raise ConversionError(f"{node.op} {node.name!r}: {error}") from None
        for result, y in zip(results, outputs, strict=True):
            result.append(y)
    return results


class Evaluator:
    """Evaluates one lowered node, without its activation function and clamp: `finish` has these.

    Parameters
    ----------
    node : FloatNode
    threads : int, optional
        Of every evaluation; by default as many as a session of logshift would have.
    keeps_memory : bool
        Whether what an evaluation has taken is kept for the next one.
    """

    def __init__(
        self, node: FloatNode, threads: int | None = None, keeps_memory: bool = True
    ) -> None:
        self.node = node
        self.session: onnxruntime.InferenceSession | None = None
        self.function: onnxruntime.InferenceSession | None = None
        if node.function is not None and node.table is not None:
            model = node.function.model(np.float32)
            self.function = session(model, threads, keeps_memory=keeps_memory)
        if node.is_onnx or node.op in ("QuantizeLinear", "DequantizeLinear", "Flatten", "Clip"):
            return
        if node.op == "Lookup":
            assert node.function is not None
            model = node.function.model(np.float32)
        else:
            writer = _NodeWriter(node)
            model = writer.model(writer.inputs, [writer.output])
        self.session = opened = session(model, threads, keeps_memory=keeps_memory)
        self.names = [value.name for value in opened.get_inputs()]

    def __call__(self, inputs: list[np.ndarray], weight: np.ndarray | None = None) -> np.ndarray:
        """Return the output for `inputs`; `weight` replaces the node's own."""
        return self._run(inputs, self._parameters(weight))

    def _parameters(self, weight: np.ndarray | None) -> list[np.ndarray]:
        """Return what a layer's session gets after its inputs."""
        if not self.node.is_conv:
            return []
        assert self.node.weight is not None and self.node.bias is not None
        w = self.node.weight if weight is None else weight
        return [onnx_weight(self.node.op, w, self.node.attributes["group"]), self.node.bias]

    def _run(self, inputs: list[np.ndarray], parameters: list[np.ndarray]) -> np.ndarray:
        if self.session is None:
            x = inputs[0]
            return x.reshape(x.shape[:2]) if self.node.op == "Flatten" else x
        arguments = [*inputs, *parameters]
        return self.session.run(None, dict(zip(self.names, arguments, strict=True)))[0]

    def _run_into(
        self, inputs: list[np.ndarray], parameters: list[np.ndarray], out: np.ndarray
    ) -> None:
        """Do what `_run` does, without copies of the output."""
        assert self.session is not None
        arguments = [np.ascontiguousarray(x) for x in (*inputs, *parameters)]
        binding = self.session.io_binding()
        for name, x in zip(self.names, arguments, strict=True):
            binding.bind_input(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
        name = self.session.get_outputs()[0].name
        binding.bind_output(name, "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self.session.run_with_iobinding(binding)

    def sweep(
        self,
        fetch: Fetch,
        count: int,
        then: Callable[[slice, np.ndarray], _T],
        weight: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> list[_T]:
        """Evaluate the node for `count` pictures, a few at a time, on all cores.

        Parameters
        ----------
        fetch : Fetch
        count : int
        then : callable(rows, output)
            Called with every part of the output while it is in a cache; it may change that.
        weight : array, optional
            Replaces the node's own.
        out : float32 array, contiguous, optional
            Of a layer: what holds all of its output in the end.

        Returns
        -------
        list
            What `then` returned, in the order of the pictures.
        """
        parameters = self._parameters(weight)

        def evaluate(part: slice) -> _T:
            inputs = fetch(part)
            if out is not None:
                self._run_into(inputs, parameters, out[part])
                return then(part, out[part])
            y = self._run(inputs, parameters)
            return then(part, np.array(y, np.float32, order="C") if self.session is None else y)

        first = fetch(slice(0, 1))
        places = min(math.prod(x.shape[2:]) for x in first)
        step = max(PART // max(x.size for x in first), _PLACES // max(places, 1), 1)
        return over_pictures(evaluate, count, step)

    def finish(self, y: np.ndarray) -> np.ndarray:
        """Return the output for what the node computes before its function and its clamp.

        `y` is used for it, unless it is an input of the node.
        """
        if self.function is not None:
            assert self.node.function is not None
            step = max(1, PART // y[:1].size)
            for start in range(0, len(y), step):
                part = y[start : start + step]
                part[...] = self.function.run(None, {self.node.function.input: part})[0]
        low, high = self.node.clamp
        if low is None and high is None:
            return y
        return np.clip(y, low, high, out=None if self.session is None else y)


def evaluate_graph(graph: FloatGraph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Evaluate the lowered network in float32 and return its outputs."""
    return Network(graph, inputs, 1).outputs


def results(
    node: FloatNode,
    evaluator: Evaluator,
    values: Mapping[str, Value],
    constants: Collection[str],
    batches: int,
) -> dict[str, Value]:
    """Evaluate a node on `values`; returns its outputs by name."""
    if not node.is_onnx:
        y = evaluator([rows(values[name]) for name in node.inputs])
        return {node.output: evaluator.finish(y)}
    inputs = [values[name] if name else None for name in node.inputs]
    constant = [name in constants for name in node.inputs]
    found = run_onnx(node, inputs, constant, batches)
    return {name: y for name, y in zip(node.outputs, found, strict=True) if name}


def walk(
    graph: FloatGraph, inputs: Mapping[str, np.ndarray], batches: int
) -> Iterator[tuple[FloatNode, Mapping[str, Value]]]:
    """Evaluate the float network; yields every node with its inputs, before it is evaluated."""
    values: dict[str, Value] = {**inputs, **graph.constants}
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        yield node, values
        values.update(results(node, Evaluator(node), values, graph.constants, batches))
        for name in [n for n in values if last_use.get(n, index) <= index]:
            del values[name]


class Network:
    """The float network on some pictures, every tensor kept.

    Attributes
    ----------
    values : dict of tensor name to Value
    stretches : list of Stretch
    """

    def __init__(
        self,
        graph: FloatGraph,
        inputs: Mapping[str, np.ndarray],
        batches: int,
        threads: int | None = None,
    ) -> None:
        self.graph, self.batches = graph, batches
        self.values: dict[str, Value] = {**inputs, **graph.constants}
        self.stretches = stretches(graph, threads)
        self._threads, self._evaluators = threads, dict[str, Evaluator]()
        for stretch in self.stretches:
            self.values.update(self.run(stretch, self.values, batches))

    def evaluator(self, node: FloatNode) -> Evaluator:
        """Return what evaluates a node by itself."""
        if (found := self._evaluators.get(node.output)) is None:
            found = Evaluator(node, self._threads, keeps_memory=False)
            self._evaluators[node.output] = found
        return found

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """The network's outputs by name."""
        return {info.name: rows(self.values[info.name]) for info in self.graph.outputs}

    def results(
        self, node: FloatNode, values: Mapping[str, Value], batches: int
    ) -> dict[str, Value]:
        """Evaluate a node on `values`; returns its outputs by name."""
        return results(node, self.evaluator(node), values, self.graph.constants, batches)

    def run(self, stretch: Stretch, values: Mapping[str, Value], batches: int) -> dict[str, Value]:
        """Evaluate a stretch on `values`; returns all that it makes by name."""
        if not stretch.is_written:
            return self.results(stretch.nodes[0], values, batches)
        inputs = {name: rows(values[name]) for name in stretch.inputs}
        wanted = list(stretch.sources)
        return dict(zip(wanted, stretch.run(inputs, wanted), strict=True))

    @cached_property
    def groups(self) -> Groups:
        """Groups of channels of the outputs."""
        return groups_of(self.graph.outputs, self.outputs)

    def rerun(self, changes: Mapping[str, Change]) -> dict[str, Value]:
        """Run the network on with other tensors than it has made; it stays as it is.

        Parameters
        ----------
        changes : dict of the output of a node to callable(values) -> Value
            What that is to be instead. `values` has all tensors as they have become, this one as
            well.

        Returns
        -------
        dict of tensor name to Value
            Of those that are not what they were.
        """
        changed: dict[str, Value] = {}
        values = ChainMap(changed, self.values)
        for stretch in self.stretches:
            if not changes.keys().isdisjoint(stretch.sources):
                for node in stretch.nodes:
                    if not changed.keys().isdisjoint(node.inputs):
                        changed.update(self.results(node, values, self.batches))
                    if (change := changes.get(node.output)) is not None:
                        changed[node.output] = change(values)
            elif not changed.keys().isdisjoint(stretch.inputs):
                changed.update(self._changed(stretch, values, changed))
        return changed

    def _changed(
        self, stretch: Stretch, values: Mapping[str, Value], changed: Collection[str]
    ) -> dict[str, Value]:
        """Evaluate a stretch of which inputs have changed; returns what it makes others read."""
        if not stretch.is_written:
            found = self.results(stretch.nodes[0], values, self.batches)
            # Sizes stay what they are.
            return {n: y for n, y in found.items() if not _same_integers(y, self.values[n])}
        inputs = {name: rows(values[name]) for name in stretch.inputs}
        wanted = [
            name
            for name, sources in stretch.sources.items()
            if name in self._read_elsewhere and not sources.isdisjoint(changed)
        ]
        return dict(zip(wanted, stretch.run(inputs, wanted), strict=True)) if wanted else {}

    @cached_property
    def _read_elsewhere(self) -> set[str]:
        """Results, and what stretches read."""
        results = {info.name for info in self.graph.outputs}
        return results.union(*(stretch.inputs for stretch in self.stretches))

    def noise(self, changed: Mapping[str, Value]) -> Noise:
        """Return what `rerun` has made of the groups of outputs."""
        noise: Noise = {}
        for name in self.groups.of:
            if name in changed:
                noise |= self.groups.noise(name, rows(self.values[name]), rows(changed[name]))
        return noise


# See `Network.rerun`.
Change = Callable[[Mapping[str, Value]], Value]


def _same_integers(y: Value, z: Value) -> bool:
    # Batch by batch: of what an operator finds in them there may be more in one than in another.
    return isinstance(y, list) and all(
        a.dtype.kind != "f" and np.array_equal(a, b) for a, b in zip(y, z, strict=True)
    )


class _NodeWriter(FloatWriter):
    """Writes one node as a model whose inputs are the node's, and its weights."""

    def __init__(self, node: FloatNode) -> None:
        super().__init__(OPSET)
        self.names.update(node.outputs)
        self.inputs = [self.fresh(f"x{i}") for i in range(len(node.inputs))]
        self._parameters: list[str] = []
        steps = WRITINGS[node.op](self, node, list(self.inputs))
        self.output = self.steps(node, steps, self.inputs[0])
        self.inputs += self._parameters

    def parameters(self, node: AnyNode) -> list[str]:
        self._parameters = [self.fresh("weight"), self.fresh("bias")]
        return self._parameters


def snr_db(signal: np.ndarray, noisy: np.ndarray) -> float:
    """Signal-to-noise ratio in dB: infinite without noise, NaN without a (finite) signal."""
    return ratio_db(*squares(signal, noisy))


def ratio_db(power: float, noise: float) -> float:
    """Return the signal-to-noise ratio in dB of what `squares` returns."""
    if power == 0.0 or not math.isfinite(power):
        return math.nan
    return math.inf if noise == 0.0 else 10.0 * math.log10(power / noise)
