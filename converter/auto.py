"""The smallest network that is good enough, or the best that is small enough.

Bits and second words are chosen for every layer (`budget.best_plans`); how large and how good a
plan really is shows its conversion. What a plan does to the outputs is measured on samples that do
not calibrate (`samples.divide`): errors are fitted away on those that do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from logshift.converter.budget import Plan, best_plans
from logshift.converter.evaluate import evaluate_graph, snr_db
from logshift.converter.float_graph import FloatGraph
from logshift.converter.progress import Progress
from logshift.converter.quantize import quantize_graph
from logshift.converter.samples import Division
from logshift.converter.settings import Settings, Target
from logshift.converter.verdict import outputs_of
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.file.format import serialize
from logshift.runtime.graph import Graph
from logshift.runtime.session import Session

_TRIALS = 5  # conversions until the size is right
_AIM = 0.995  # of the size that is allowed; twice as far off is good enough
_PLANS = 32  # of different size that are considered for the least error
_ROWS = 2048  # pictures, or pixels of segmented ones, that the drop is estimated on
_LEAST = 1e-6  # probability, before taking logarithms


def choose_plan(
    graph: FloatGraph,
    samples: Division,
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
    samples : Division
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
    plans = best_plans(graph, samples.calibration, samples.batches, settings, progress)
    if target.max_bytes is not None:

        def size_of(plan: Plan) -> int:
            packed, _ = quantize_graph(
                graph, samples.calibration, samples.batches, settings, progress, plan
            )
            finish(packed)
            return len(serialize(packed))

        return _largest(plans, target.max_bytes, size_of)
    trial = _Trial(graph, samples, settings, target, progress)
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
        samples: Division,
        settings: Settings,
        target: Target,
        progress: Progress,
    ) -> None:
        self.graph, self.samples = graph, samples
        self.settings, self.target, self.progress = settings, target, progress
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
            self.graph, self.samples.calibration, self.samples.batches, self.settings,
            self.progress, plan,
        )  # fmt: skip
        session = Session(packed)
        found = self._outputs(lambda x: outputs_of(session, x))
        if self.target.max_drop is not None:
            return expected_drop(self.exact[0], found[0])
        return min(snr_db(x, y) for x, y in zip(self.exact, found, strict=True))

    def _outputs(
        self, run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    ) -> list[np.ndarray]:
        results = [run(x) for x in self.samples.measuring]
        names = [info.name for info in self.graph.outputs if info.dtype.startswith("float")]
        return [np.concatenate([y[name] for y in results]) for name in names]


def expected_drop(exact: np.ndarray, found: np.ndarray) -> float:
    """Return by how many points accuracy is expected to fall, where nobody knows the labels.

    The float network says how probable each class is: where quantization makes it decide for
    another one, the difference is what is lost on average. Few pictures are near enough to two
    classes to tell, so each gets the errors of all pictures, classes in order of their scores.

    It is as true as the probabilities are: too much if the float network is surer than it is
    right. The packed network cannot be a second judge: it votes for its own errors.

    Parameters
    ----------
    exact, found : float arrays (N, classes, ...)
        Scores or probabilities, of the float network and of the quantized one.
    """
    if exact.min() >= 0 and np.allclose(exact.sum(axis=1), 1, atol=1e-3):
        exact, found = (np.log(np.maximum(x, _LEAST)) for x in (exact, found))
    exact, found = _rows(exact), _rows(found)
    order = np.argsort(-exact, axis=1, kind="stable")
    exact, found = (np.take_along_axis(x, order, axis=1) for x in (exact, found))
    probability = np.exp(exact - exact[:, :1])
    probability /= probability.sum(axis=1, keepdims=True)
    errors = found - exact
    kept = [p[(x + errors).argmax(axis=1)].mean() for x, p in zip(exact, probability, strict=True)]
    return 100.0 * float((probability[:, 0] - kept).mean())


def _rows(scores: np.ndarray) -> np.ndarray:
    """Return the scores (rows, classes) of pictures or of their pixels, not of too many."""
    rows = np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])
    return rows[:: -(-len(rows) // _ROWS)].astype(np.float64)
