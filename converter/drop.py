"""By how much accuracy falls, where nobody knows the labels: what is expected, and a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95  # of bounds

_ROWS = 2048  # pictures, or pixels of segmented ones, that the drop is estimated on
_BEST = 5  # classes whose errors are compared
_LEAST = 1e-6  # probability, before taking logarithms
# A network may be right more often than it says: its logits times this. Of EfficientNet-Lite0's,
# trained with smoothed labels, 1.5 has the greatest likelihood.
_SURER = 1.75


@dataclass(frozen=True)
class Drop:
    """Points of accuracy that quantization costs.

    Attributes
    ----------
    expected : float
    share : float
        `expected` as a share of `worst`.
    worst : float
        What is lost on average where a picture is as undecided as errors can make use of.
    samples : int
        Pictures that it was measured on.
    """

    expected: float
    share: float
    worst: float
    samples: int

    @property
    def most(self) -> float:
        """Upper bound: of `CONFIDENCE`, whatever the distribution of pictures.

        What a picture loses lies between 0 and `worst`, so the tail of a mean is Chernoff's
        (Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", 1963,
        theorem 1).
        """
        low, high = self.share, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if self.samples * _divergence(self.share, middle) > -math.log1p(-CONFIDENCE):
                high = middle
            else:
                low = middle
        return self.worst * high

    def needed(self, most: float) -> int:
        """Return how many pictures would show that no more is lost than `most`, or 0 if none."""
        if self.worst * self.share >= most:
            return 0
        divergence = _divergence(self.share, min(most / self.worst, 1.0))
        return math.ceil(-math.log1p(-CONFIDENCE) / divergence)


def _divergence(p: float, q: float) -> float:
    """Kullback-Leibler divergence of two chances."""
    if q >= 1.0:
        return 0.0 if p >= 1.0 else math.inf
    found = (1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0
    return found + (p * math.log(p / q) if p > 0 else 0.0)


def drop(exact: np.ndarray, found: np.ndarray, others: np.ndarray | None = None) -> Drop:
    """Bound by how many points accuracy falls, where nobody knows the labels.

    What is expected is that of `expected_drop`, for a float network that is surer than it says:
    networks that were trained with smoothed labels are, and what they prefer is worth more then.

    Parameters
    ----------
    exact, found : float arrays (N, classes, ...)
        Scores or probabilities, of the float network and of the quantized one, on pictures that
        did not calibrate.
    others : float array (M, classes, ...), optional
        Of the float network, on further pictures: how undecided it is says more of them.
    """
    known = exact if others is None else np.concatenate([exact, others])
    losses, errors = _losses(known, exact, found, _SURER)
    of_pictures = _means(losses, _pictures(known))
    worst = max(_worst(errors), float(of_pictures.max()))
    expected = float(of_pictures.mean())
    share = expected / worst if worst > 0 else 0.0
    return Drop(100 * expected, share, 100 * worst, len(of_pictures))


def _worst(errors: np.ndarray) -> float:
    """Return what is lost where two classes are apart by what costs most: many errors exceed it.

    Errors of the best few classes are alike, and half of their differences are the wrong way.
    """
    first, second = np.triu_indices(min(errors.shape[1], _BEST), 1)
    gaps = -np.sort(-np.abs(errors[:, first] - errors[:, second]).ravel())
    exceeding = np.arange(1, len(gaps) + 1) / len(gaps) / 2
    return float((np.tanh(_SURER * gaps / 2) * exceeding).max())


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
    return 100.0 * float(_losses(exact, exact, found, 1.0)[0].mean())


def _losses(
    known: np.ndarray, exact: np.ndarray, found: np.ndarray, surer: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each row of `known` loses by errors, and these, classes in order of scores."""
    if exact.min() >= 0 and np.allclose(exact.sum(axis=1), 1, atol=1e-3):
        known, exact, found = (np.log(np.maximum(x, _LEAST)) for x in (known, exact, found))
    known, exact, found = _rows(known), _rows(exact), _rows(found)
    order = np.argsort(-exact, axis=1, kind="stable")
    errors = np.take_along_axis(found - exact, order, axis=1)
    known = -np.sort(-known, axis=1)
    probability = np.exp(surer * (known - known[:, :1]))
    probability /= probability.sum(axis=1, keepdims=True)
    losses = [
        (p[0] - p[(x + errors).argmax(axis=1)]).mean()
        for x, p in zip(known, probability, strict=True)
    ]
    return np.array(losses), errors


def _rows(scores: np.ndarray) -> np.ndarray:
    """Return the scores (rows, classes) of pictures or of their pixels, not of too many."""
    rows = np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])
    return _thinned(rows).astype(np.float64)


def _pictures(scores: np.ndarray) -> np.ndarray:
    """Return which picture each of `_rows` is of."""
    pixels = math.prod(scores.shape[2:])
    return _thinned(np.arange(len(scores) * pixels)) // pixels


def _thinned(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // _ROWS)]


def _means(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return the mean of the values of each number that there is."""
    counts = np.bincount(of)
    return np.bincount(of, values)[counts > 0] / counts[counts > 0]
