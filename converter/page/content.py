"""What the page shows, measured: errors and ranges of layers, times, and what mends weak ones."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logshift.converter.compare import GroupError
from logshift.converter.effects import Effect, layer_effects
from logshift.converter.evaluate import Network, rows
from logshift.converter.float_graph import FloatGraph
from logshift.converter.onnx_model import Runner
from logshift.converter.page.outputs import Picture, Sample, show_input, show_output
from logshift.converter.progress import Progress
from logshift.converter.report import LayerReport, Report
from logshift.converter.verdict import as_python, outputs_of, settings_without, verdict_on
from logshift.kernels.stlq.codec import exponent_levels
from logshift.runtime.graph import Graph, Node, Quantization
from logshift.runtime.session import LayerTime, Session

_BATCHES = 4  # of the model, that are shown, and that ranges are measured on
_FEW = 2  # of these, that layers' errors are measured on
_SECONDS = 20.0  # for what layers add, after which no further one is begun
_RUNS = 5  # that times are the median of
_WEAK = 0.05  # share of a group's error, with which a part of a layer is listed
_MOST_WEAK = 12
_BINS = 64
_MOST_LEVELS = 257  # of weights, that are drawn one by one


@dataclass(frozen=True)
class Histogram:
    """Values of a tensor, and what they become.

    Attributes
    ----------
    edges, shares : float arrays
        Of the float values; empty if these are not known.
    levels, level_shares : float arrays
        Of weights: what is stored. Of activations: the first and the last code.
    """

    edges: np.ndarray
    shares: np.ndarray
    levels: np.ndarray
    level_shares: np.ndarray


@dataclass(frozen=True)
class Layer:
    """A node of the packed network.

    Attributes
    ----------
    report : LayerReport
    time : LayerTime, optional
    weights_noise, codes_noise : float, optional
        What its words and its codes add to the group of outputs that they do most to: squared error
        over squares; None if that was not measured.
    bits : int, optional
        Of its codes.
    range : (low, high), optional
        What its codes cover.
    clipped : float, optional
        Share of the float values outside.
    weights, activations : Histogram, optional
    """

    report: LayerReport
    time: LayerTime | None = None
    weights_noise: float | None = None
    codes_noise: float | None = None
    bits: int | None = None
    range: tuple[float, float] | None = None
    clipped: float | None = None
    weights: Histogram | None = None
    activations: Histogram | None = None

    @property
    def noise(self) -> float | None:
        """What both parts add."""
        found = [n for n in (self.weights_noise, self.codes_noise) if n is not None]
        return sum(found) if found else None


@dataclass(frozen=True)
class Weak:
    """A part of a layer that adds much error, and what would mend it."""

    effect: Effect
    output: str
    share: float
    python: str
    command: str


@dataclass(frozen=True)
class Page:
    """All that is on the page; `samples` are inputs with what both networks make of them.

    Attributes
    ----------
    report : Report
    layers : list of Layer, in order of execution
    weak : list of Weak, the worst first
    samples : list of Sample
    threads : int
        That times were measured with.
    measured_on : int
        Batches of the model, for what layers add.
    notes : list of str
        What is not known, and why.
    """

    report: Report
    layers: list[Layer]
    weak: list[Weak]
    samples: list[Sample]
    threads: int
    measured_on: int
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time of all layers together."""
        return sum(layer.time.seconds for layer in self.layers if layer.time is not None)


def gather(
    report: Report,
    packed: Graph,
    graph: FloatGraph | None,
    reference: Runner,
    batches: Sequence[dict[str, np.ndarray]],
    progress: Progress,
) -> Page:
    """Measure what the page shows.

    Parameters
    ----------
    report : Report
        With a verdict.
    packed : Graph
        Validated.
    graph : FloatGraph, optional
        What it was made from, after `fuse` and `place`; without it layers' errors and ranges are
        not known.
    reference : Runner
        The float model.
    batches : list of dict of input name to array
        Batches of the model; the first ones are shown.
    progress : callable(done, total, what)
    """
    assert report.verdict is not None
    few, session = list(batches[:_BATCHES]), Session(packed)
    groups = {output.name: output.groups for output in report.verdict.outputs}
    effects: list[Effect] = []
    network: Network | None = None
    notes = []
    if graph is None:
        notes.append(
            "What layers add is not known: the model does not lead to the layers of the file."
        )
    else:
        effects, parts = layer_effects(graph, packed, few[:_FEW], groups, _SECONDS, progress)
        if len(effects) < parts:
            notes.append(
                f"There was time to measure what {len(effects)} of {parts} parts of layers add: the"
                " worst ones by themselves, and the last ones."
            )
        joined = {name: np.concatenate([batch[name] for batch in few]) for name in few[0]}
        network = Network(graph, joined, len(few))
    verdict = report.verdict
    if verdict.warning and not verdict.remedy and effects:
        found = verdict_on(
            verdict.outputs, verdict.samples, packed.settings, effects, verdict.held_back
        )
        report = replace(report, verdict=found)
    progress(0, 1, "timing layers")
    times: dict[tuple[str, str], list[LayerTime]] = {}
    for taken in session.profile(few[0], _RUNS):
        times.setdefault((taken.name, taken.op), []).append(taken)
    exact = float_weights(graph)
    layers = []
    for node, layer in zip(packed.nodes, report.layers, strict=True):
        waiting = times.get((node.name, node.op))  # some nodes take none
        time = waiting.pop(0) if waiting else None
        layers.append(_layer(node, layer, time, packed, effects, network, exact))
    return Page(
        report, layers, _weakest(effects, groups, packed.settings),
        _samples(report, packed, session, reference, few), session.threads, len(few[:_FEW]), notes,
    )  # fmt: skip


def float_weights(graph: FloatGraph | None) -> dict[str, np.ndarray]:
    """Return the float weights by the tensor that the packed node with them makes."""
    found = {}
    for node in graph.nodes if graph is not None else ():
        if node.weight is not None:
            found[node.output] = node.weight
            if node.table is not None:
                found[node.table.inputs[0]] = node.weight
    return found


def _layer(
    node: Node,
    report: LayerReport,
    time: LayerTime | None,
    packed: Graph,
    effects: Sequence[Effect],
    network: Network | None,
    exact_weights: Mapping[str, np.ndarray],
) -> Layer:
    out = next(filter(None, node.outputs))
    noise = {e.part: e.worst for e in effects if e.tensor == out}
    weights = None
    if node.weights is not None:
        weights = _of_weights(node, exact_weights.get(out))
    q = packed.quantization.get(out)
    if q is None or node.op == "DequantizeLinear":
        return Layer(report, time, noise.get("weights"), weights=weights)
    exact = None
    if network is not None and out in network.values:
        exact = rows(network.values[out])
    low, high = (float(end) for end in q.dequantize(np.array([0, q.top])))
    clipped, activations = None, None
    if exact is not None:
        half = q.scale / 2
        clipped = float(((exact < low - half) | (exact > high + half)).mean())
        activations = _of_activations(exact, q)
    return Layer(
        report, time, noise.get("weights"), noise.get("codes"), q.bits, (low, high), clipped,
        weights, activations,
    )  # fmt: skip


def _of_weights(node: Node, exact: np.ndarray | None) -> Histogram:
    """Return weights in units of alpha."""
    words = node.weights
    assert words is not None
    unit = 2.0 ** (exponent_levels(words.bits) - 1 + words.residual_shift)
    levels, counts = np.unique(words.integers(), return_counts=True)
    if len(levels) > _MOST_LEVELS:
        counts, edges = np.histogram(words.integers(), _MOST_LEVELS)
        levels = (edges[1:] + edges[:-1]) / 2
    edges, shares = np.zeros(0), np.zeros(0)
    if exact is not None and exact.shape == words.shape:
        alpha = words.alpha.reshape(-1, 1, 1, 1)
        scaled = exact / np.where(alpha > 0, alpha, 1)
        top = max(1.0, float(words.clip))
        counts_of, edges = np.histogram(np.clip(scaled, -top, top), _BINS, (-top, top))
        shares = counts_of / exact.size
    return Histogram(edges, shares, levels / unit, counts / counts.sum())


def _of_activations(exact: np.ndarray, q: Quantization) -> Histogram:
    ends = q.dequantize(np.array([0, q.top])).astype(np.float64)
    finite = exact[np.isfinite(exact)]
    low = min(float(finite.min(initial=0)), ends[0])
    high = max(float(finite.max(initial=0)), ends[1])
    if not low < high:
        high = low + 1
    counts, edges = np.histogram(finite, _BINS, (low, high))
    return Histogram(edges, counts / max(finite.size, 1), ends, np.zeros(2))


def _weakest(
    effects: Sequence[Effect],
    groups: Mapping[str, Sequence[GroupError]],
    settings: Mapping[str, Any],
) -> list[Weak]:
    """Return the parts that add most to any group of outputs."""
    found: list[Weak] = []
    for effect in effects:
        shares = {
            key: noise / total
            for key, noise in effect.noise.items()
            if groups[key[0]][key[1]].says_something
            and (total := sum(other.noise[key] for other in effects)) > 0
        }
        if not shares or max(shares.values()) < _WEAK:
            continue
        key = max(shares, key=lambda key: shares[key])
        remedy = settings_without([effect], settings)
        name = key[0]
        if (group := groups[name][key[1]]).channels:
            name = f"{name}, {group}"
        found.append(Weak(effect, name, shares[key], as_python(remedy), as_command(remedy)))
    return sorted(found, key=lambda weak: -weak.share)[:_MOST_WEAK]


def as_command(settings: Mapping[str, Any]) -> str:
    """Return settings as options of `logshift convert`."""
    options = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            options += [f"{option} {shlex.quote(f'{k}={v}')}" for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            options += [f"{option} {shlex.quote(str(v))}" for v in value]
        else:
            options.append(f"{option} {value}")
    return " ".join(options)


def _samples(
    report: Report,
    packed: Graph,
    session: Session,
    reference: Runner,
    batches: Sequence[dict[str, np.ndarray]],
) -> list[Sample]:
    """Return inputs that are pictures, and what both networks make of them."""
    assert report.verdict is not None
    samples = []
    for batch in batches:
        found = outputs_of(session, batch)
        expected = dict(zip(found, map(np.asarray, reference(batch)), strict=True))
        pictures = {info.name: show_input(batch[info.name][:1], packed) for info in packed.inputs}
        shown: list[Picture] = [p for p in pictures.values() if p is not None]
        outputs = [
            show_output(error, expected[error.name], found[error.name], shown, packed)
            for error in report.verdict.outputs
        ]
        if shown or any(output.pictures or output.classes for output in outputs):
            samples.append(Sample(shown, outputs))
    return samples
