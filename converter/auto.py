"""The smallest network that is good enough, or the best that is small enough.

Bits and second words are chosen for every layer (`budget.best_plans`); how large and how good a
plan really is shows its conversion. What a plan does to the outputs is measured on every fourth
calibration picture, while the others calibrate: errors are fitted away on pictures that calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from logshift.converter.budget import Plan, best_plans
from logshift.converter.evaluate import evaluate_graph, snr_db
from logshift.converter.float_graph import FloatGraph
from logshift.converter.progress import Progress
from logshift.converter.quantize import quantize_graph
from logshift.converter.settings import Settings, Target
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.format import serialize
from logshift.runtime.graph import Graph
from logshift.runtime.session import Session

_TRIALS = 5  # conversions until the size is right
_AIM = 0.995  # of the size that is allowed; twice as far off is good enough
_PLANS = 32  # of different size that are considered for the least error
_HELD_BACK = 4  # one picture in so many measures
_FEWEST = 8  # batches, with fewer all of them calibrate and measure


def choose_plan(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    target: Target,
    finish: Callable[[Graph], None],
    progress: Progress,
) -> Plan:
    """Choose bits and second words of every layer.

    Parameters
    ----------
    graph : FloatGraph
        After `fuse` and `place`.
    samples : dict of input name to array (pictures, ...)
    batches : int
        How many batches of the model these are.
    settings : Settings
        Other than bits and `residual_ratio`.
    target : Target
    finish : callable(graph)
        Adds to the packed graph what else the file will hold.
    progress : callable(done, total, what)

    Raises
    ------
    ConversionError
        If no plan meets the target; says what the nearest one reaches.
    """
    plans = best_plans(graph, samples, batches, settings, progress)
    if target.max_bytes is not None:

        def size_of(plan: Plan) -> int:
            packed, _ = quantize_graph(graph, samples, batches, settings, progress, plan)
            finish(packed)
            return len(serialize(packed))

        return _largest(plans, target.max_bytes, size_of)
    trial = _Trial(graph, samples, batches, settings, target, progress)
    return _smallest(_thinned(plans), target, trial)


def _largest(
    plans: list[tuple[float, Plan]], max_bytes: int, size_of: Callable[[Plan], int]
) -> Plan:
    """Return the largest plan of at most so many bytes."""
    expected = np.array([max(size, 1.0) for size, _ in plans])  # 0 if all words are given
    found: dict[int, int] = {}  # by index
    for _ in range(_TRIALS):
        tried = sorted(found)
        factors = [found[i] / expected[i] for i in tried] or [1.0]
        likely = expected * np.interp(expected, expected[tried] if tried else [0.0], factors)
        fitting = np.flatnonzero(likely <= _AIM * max_bytes)
        index = int(fitting[-1]) if len(fitting) else 0
        if index in found:
            break
        found[index] = size_of(plans[index][1])
        if 2 * _AIM - 1 <= found[index] / max_bytes <= 1:
            break
    best = max(
        (i for i, size in found.items() if size <= max_bytes), key=found.__getitem__, default=None
    )
    if best is None:
        raise ConversionError(
            f"max_bytes is {max_bytes}, but the smallest file that was tried has"
            f" {min(found.values())} bytes"
        )
    return plans[best][1]


def _thinned(plans: list[tuple[float, Plan]]) -> list[Plan]:
    """Return fewer plans, in about equal steps of size."""
    sizes = np.array([size for size, _ in plans])
    wanted = np.geomspace(max(sizes[0], 1.0), max(sizes[-1], 1.0), _PLANS)
    return [plans[i][1] for i in sorted({int(np.abs(sizes - w).argmin()) for w in wanted})]


def _smallest(plans: list[Plan], target: Target, measure: Callable[[Plan], float]) -> Plan:
    """Return the smallest plan that is good enough; larger ones are taken to be better."""
    low, high = 0, len(plans)
    measured: list[float] = []
    while low < high:
        middle = (low + high) // 2
        measured.append(measure(plans[middle]))
        if target.is_met(measured[-1]):
            high = middle
        else:
            low = middle + 1
    if low == len(plans):
        raise ConversionError(f"{target} is out of reach: the best plan gives {measured[-1]:.2f}")
    return plans[low]


class _Trial:
    """Converts with a plan and measures on pictures that did not calibrate."""

    def __init__(
        self,
        graph: FloatGraph,
        samples: Mapping[str, np.ndarray],
        batches: int,
        settings: Settings,
        target: Target,
        progress: Progress,
    ) -> None:
        self.graph, self.settings, self.target = graph, settings, target
        self.progress = progress
        held_back = np.arange(batches) % _HELD_BACK == _HELD_BACK - 1
        if batches < _FEWEST:
            held_back[:] = True
        used = ~held_back if batches >= _FEWEST else held_back
        self.calibration = _batches(samples, batches, used)
        self.count = int(used.sum())
        self.inputs = [
            _batches(samples, batches, np.arange(batches) == i) for i in np.flatnonzero(held_back)
        ]
        self.exact = self._outputs(lambda x: evaluate_graph(graph, x))
        if target.max_drop is not None and (self.exact[0].ndim < 2 or self.exact[0].shape[1] < 2):
            name = graph.outputs[0].name
            raise InputError(
                f"max_drop needs scores of classes, but output {name!r} has shape"
                f" {self.exact[0].shape}: give min_snr"
            )

    def __call__(self, plan: Plan) -> float:
        """Return how good the outputs are, in the unit of the target."""
        packed, _ = quantize_graph(
            self.graph, self.calibration, self.count, self.settings, self.progress, plan
        )
        session = Session(packed)
        found = self._outputs(lambda x: _by_name(session, x))
        if self.target.max_drop is not None:
            return expected_drop(self.exact[0], found[0])
        return min(snr_db(x, y) for x, y in zip(self.exact, found, strict=True))

    def _outputs(
        self, run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> list[np.ndarray]:
        results = [run(x) for x in self.inputs]
        names = [info.name for info in self.graph.outputs if info.dtype.startswith("float")]
        return [np.concatenate([y[name] for y in results]) for name in names]


def _batches(
    samples: Mapping[str, np.ndarray], batches: int, chosen: np.ndarray
) -> dict[str, np.ndarray]:
    return {name: x[np.repeat(chosen, len(x) // batches)] for name, x in samples.items()}


def _by_name(session: Session, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    y = session.run(x)
    return y if isinstance(y, dict) else {session.outputs[0].name: y}


def expected_drop(exact: np.ndarray, found: np.ndarray) -> float:
    """Return by how many points accuracy is expected to fall, where nobody knows the labels.

    The float network says how probable each class is: where both networks decide for different
    ones, the difference is what is lost on average. Where it hesitates, little is. That is as true
    as its probabilities are: too much if it is surer than it is right, too little if less so. The
    packed network cannot be a second judge: it votes for its own errors.

    Parameters
    ----------
    exact, found : float arrays (N, classes, ...)
        Scores or probabilities, of the float network and of the quantized one.
    """
    probability = exact.astype(np.float64)
    sums = probability.sum(axis=1)
    if probability.min() < 0 or not np.allclose(sums, 1, atol=1e-3):
        probability = np.exp(probability - probability.max(axis=1, keepdims=True))
        probability /= probability.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(probability, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    return 100.0 * float((probability.max(axis=1) - chosen).mean())
