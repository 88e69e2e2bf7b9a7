"""The smallest network that is good enough, or the best that is small enough.

Bits and second words are chosen for every layer (`budget.best_plans`); how large and how good a
plan really is shows its conversion. Where no plan is good enough, more tensors stay float32. How
good a network is says a score of the user's own (`validate`), or else samples that do not calibrate
(`samples.divide`): errors are fitted away on those that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from logshift.converter.budget import Plan, Priced, best_plans, fixed_plan
from logshift.converter.drop import CONFIDENCE, Drop, drop
from logshift.converter.evaluate import snr_db
from logshift.converter.float_graph import FloatGraph
from logshift.converter.progress import Progress
from logshift.converter.quantize import LayerError, quantize_graph
from logshift.converter.report import Search, Trial
from logshift.converter.samples import Division
from logshift.converter.settings import AUTO, Settings, Target
from logshift.converter.verdict import outputs_of
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.file.format import serialize
from logshift.runtime.graph import Graph
from logshift.runtime.session import Session

_TRIALS = 5  # conversions until the size is right
_AIM = 0.995  # of the size that is allowed; twice as far off is good enough
FEWEST = 10  # samples that tell what errors of outputs are like
_PLANS = 32  # of different size that are considered for the least error

Run = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Found:
    """A network that meets a target.

    Attributes
    ----------
    graph : FloatGraph
        What it was made from.
    packed : Graph
    errors : list of LayerError
    search : Search
        How it was found.
    """

    graph: FloatGraph
    packed: Graph
    errors: list[LayerError]
    search: Search


class Measure(Protocol):
    """How good a network is.

    Attributes
    ----------
    what : str
        What the figure is.
    """

    what: str

    @property
    def float_figure(self) -> float | None:
        """That of the float model, if it is not what networks are compared with."""
        ...

    def __call__(self, session: Session) -> float:
        """Return the figure of a network."""
        ...

    def lack(self, figure: float) -> float:
        """Return what it lacks, 0 or less if it is good enough."""
        ...

    def advice(self) -> str:
        """Return what may help where the best network is not good enough, or nothing."""
        ...


class Maker:
    """Makes networks of plans.

    Parameters
    ----------
    samples : Division
    settings : Settings
        Other than bits and `residual_ratio`.
    bits : sequence of int, optional
        That words of one network may have, if there is to be more than one number.
    finish : callable(packed, graph)
        Adds to a packed graph what else the file will hold.
    progress : callable(done, total, what)
    """

    def __init__(
        self,
        samples: Division,
        settings: Settings,
        bits: Sequence[int] | None,
        finish: Callable[[Graph, FloatGraph], None],
        progress: Progress,
    ) -> None:
        self.samples, self.settings, self.bits = samples, settings, bits
        self.finish, self.progress = finish, progress

    def plans(self, graph: FloatGraph) -> list[Priced]:
        """Return what may be tried, the smallest first; what is given leaves nothing to choose."""
        data, batches = self.samples.calibration, self.samples.batches
        if self.bits is None and self.settings.residual_ratio != AUTO:
            plan = fixed_plan(graph, data, batches, self.settings, self.progress)
            return [Priced(0.0, plan)]
        bits = self.bits or (self.settings.weight_bits,)
        return best_plans(graph, data, batches, self.settings, self.progress, bits)

    def __call__(self, graph: FloatGraph, plan: Plan | None) -> tuple[Graph, list[LayerError]]:
        """Return a packed graph, ready to be written, and its errors."""
        samples = self.samples
        packed, errors = quantize_graph(
            graph, samples.calibration, samples.batches, self.settings, self.progress, plan
        )
        self.finish(packed, graph)
        return packed, errors


def find(
    graph: FloatGraph,
    make: Maker,
    target: Target,
    score: Measure | None,
    run: Run,
    refine: Callable[[], FloatGraph] | None,
) -> Found:
    """Find a network that meets a target.

    Parameters
    ----------
    graph : FloatGraph
        After `fuse` and `place`.
    make : Maker
    target : Target
    score : Measure, optional
        By default outputs on samples that do not calibrate are what counts.
    run : callable(inputs) -> arrays
        Of the float network.
    refine : callable() -> FloatGraph, optional
        Returns the network with more tensors on float32, for when no words are good enough.

    Raises
    ------
    ConversionError
        If no network meets it; says what the nearest one reaches.
    InputError
        If outputs or samples are not what the target needs.
    """
    if target.max_bytes is not None:
        return _largest(graph, make, target.max_bytes)
    if score is None and target.max_drop is not None:
        score = DropBound(graph, make.samples, run, target.max_drop)
    elif score is None and target.min_snr is not None:
        score = OutputRatio(graph, make.samples, run, target.min_snr)
    assert score is not None
    return _smallest(graph, _Hunt(make, target, score), refine)


def _largest(graph: FloatGraph, make: Maker, max_bytes: int) -> Found:
    """Return the best network of at most so many bytes.

    Raises
    ------
    ConversionError
        If none is that small; says what the smallest one takes.
    """
    plans = make.plans(graph)
    expected = np.array([max(priced.size, 1.0) for priced in plans])  # 0 if all words are given
    found: dict[int, int] = {}  # by index
    best: tuple[Trial, Graph, list[LayerError]] | None = None
    for _ in range(_TRIALS):
        tried = sorted(found)
        factors = [found[i] / expected[i] for i in tried] or [1.0]
        likely = expected * np.interp(expected, expected[tried] if tried else [0.0], factors)
        fitting = np.flatnonzero(likely <= _AIM * max_bytes)
        index = int(fitting[-1]) if len(fitting) else 0
        if index in found:
            break
        packed, errors = make(graph, plans[index].plan)
        found[index] = size = len(serialize(packed))
        if size <= max_bytes and (best is None or size > best[0].file_bytes):
            best = Trial(size), packed, errors
        if 2 * _AIM - 1 <= size / max_bytes <= 1:
            break
    if best is None:
        raise ConversionError(
            f"max_bytes is {max_bytes}, but the smallest file that was tried has"
            f" {min(found.values())} bytes"
        )
    search = Search(f"max_bytes {max_bytes}", [Trial(size) for size in found.values()], best[0])
    return Found(graph, best[1], best[2], search)


def _smallest(graph: FloatGraph, hunt: _Hunt, refine: Callable[[], FloatGraph] | None) -> Found:
    """Return the smallest network that is good enough; larger ones are taken to be better."""
    if found := hunt.run(graph):
        return found
    if refine is not None:
        refined = refine()
        if refined.floats != graph.floats and (found := hunt.run(refined)):
            return found
    raise ConversionError(hunt.failure())


class _Hunt:
    """Tries plans, and keeps the smallest network that is good enough."""

    def __init__(self, make: Maker, target: Target, measure: Measure) -> None:
        self.make, self.target, self.measure = make, target, measure
        self.trials: list[Trial] = []

    def run(self, graph: FloatGraph) -> Found | None:
        """Return the smallest network that some plan makes good enough.

        Where the middle one is not, the largest one tells whether any is.
        """
        plans = _thinned(self.make.plans(graph))
        found: Found | None = None
        low, high = 0, len(plans)
        index = high // 2
        while low < high:
            packed, errors = self.make(graph, plans[index].plan)
            trial = self._measured(packed)
            if self._lack(trial) <= 0:
                found, high = Found(graph, packed, errors, self.search(trial)), index
            else:
                low = index + 1
            index = (low + high) // 2 if found else len(plans) - 1
        return found

    def _measured(self, packed: Graph) -> Trial:
        number = len(self.trials) + 1
        self.make.progress(number, number, f"measuring trial {number}")
        trial = Trial(len(serialize(packed)), self.measure(Session(packed)))
        self.trials.append(trial)
        return trial

    def _lack(self, trial: Trial) -> float:
        return math.inf if trial.figure is None else self.measure.lack(trial.figure)

    def search(self, chosen: Trial) -> Search:
        """Return how one of the networks was found."""
        measure = self.measure
        return Search(str(self.target), self.trials, chosen, measure.what, measure.float_figure)

    def failure(self) -> str:
        """Say what came nearest."""
        reached = self.search(min(self.trials, key=self._lack)).reached
        return (
            f"{self.target} is out of reach: the nearest of {len(self.trials)} networks has"
            f" {reached}{self.measure.advice()}"
        )


def _thinned(plans: list[Priced]) -> list[Priced]:
    """Return fewer plans, in about equal steps of size."""
    sizes = np.array([priced.size for priced in plans])
    wanted = np.geomspace(max(sizes[0], 1.0), max(sizes[-1], 1.0), _PLANS)
    return [plans[i] for i in sorted({int(np.abs(sizes - w).argmin()) for w in wanted})]


class OutputRatio:
    """The signal-to-noise ratio of the worst output, on samples that do not calibrate.

    Parameters
    ----------
    graph : FloatGraph
    samples : Division
    run : callable(inputs) -> arrays
        Of the float network.
    min_snr : float
        In dB.
    """

    what = "signal-to-noise ratio in dB"
    float_figure = None

    def __init__(self, graph: FloatGraph, samples: Division, run: Run, min_snr: float) -> None:
        self.batches, self.min_snr = samples.measuring, min_snr
        self.names = [info.name for info in graph.outputs]
        self.exact = [run(inputs) for inputs in self.batches]

    def __call__(self, session: Session) -> float:
        """Return the signal-to-noise ratio in dB."""
        found = [outputs_of(session, inputs) for inputs in self.batches]
        return min(
            snr_db(
                np.concatenate([y[number] for y in self.exact]),
                np.concatenate([y[name] for y in found]),
            )
            for number, name in enumerate(self.names)
            if self.exact[0][number].dtype.kind == "f"
        )

    def lack(self, figure: float) -> float:
        """Return how many dB are missing."""
        return self.min_snr - figure

    def advice(self) -> str:
        """Return nothing."""
        return ""


class DropBound:
    """How many points of accuracy are lost at most, by samples without labels.

    Parameters
    ----------
    graph, samples, run
        As for `OutputRatio`.
    max_drop : float
        In points.

    Raises
    ------
    InputError
        If the first output holds no scores of classes, or there are too few samples.
    """

    what = f"points lost at most ({100 * CONFIDENCE:g} % confidence)"
    float_figure = None

    def __init__(self, graph: FloatGraph, samples: Division, run: Run, max_drop: float) -> None:
        if samples.samples_held_back < FEWEST:
            raise InputError(
                f"max_drop needs at least {FEWEST} samples that do not calibrate, a fifth of those"
                f" that are given, but there are {samples.samples_held_back}: give more, or"
                " labelled ones and validate"
            )
        self.batches, self.max_drop = samples.measuring, max_drop
        self.exact = _scores(run, self.batches)
        if self.exact.ndim < 2 or self.exact.shape[1] < 2:
            name = graph.outputs[0].name
            raise InputError(
                f"max_drop needs scores of classes, but output {name!r} has shape"
                f" {self.exact.shape}: give min_snr, or validate"
            )
        # How undecided the float model is says every sample.
        count = samples.batches
        split = {n: x.reshape(count, -1, *x.shape[1:]) for n, x in samples.calibration.items()}
        others = ({name: x[i] for name, x in split.items()} for i in range(count))
        self.others = _scores(run, others)
        self.best: Drop | None = None

    def __call__(self, session: Session) -> float:
        """Return the points that are lost at most."""
        name = session.outputs[0].name
        found = [outputs_of(session, inputs)[name] for inputs in self.batches]
        measured = drop(self.exact, np.concatenate(found), self.others)
        if self.best is None or measured.most < self.best.most:
            self.best = measured
        return measured.most

    def lack(self, figure: float) -> float:
        """Return how many points too many may be lost."""
        return figure - self.max_drop

    def advice(self) -> str:
        """Return how many samples would do, if they are what is missing."""
        assert self.best is not None
        if not (needed := self.best.needed(self.max_drop)):
            return f", {self.best.expected:.2g} expected"
        return (
            f", {self.best.expected:.2g} expected: {self.best.samples} samples are too few, give"
            f" about {needed}, or labelled ones and validate"
        )


def _scores(run: Run, batches: Iterable[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the first output of the float network."""
    return np.concatenate([run(inputs)[0] for inputs in batches])
