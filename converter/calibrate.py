"""Scales and zero points of activations from observed values."""

from __future__ import annotations

import numpy as np

from logshift.kernels.machine.jit import njit
from logshift.runtime.graph import Quantization

_SAMPLE = 2**16
_FRACTIONS = np.linspace(0.2, 1.0, 33)
_SMALLEST_RANGE = 1e-12

# How ranges are chosen that are tried on a tensor, the one that clips nothing first.
RANGES = ("minmax", "cubic", "mse")
_POWERS = {"cubic": 3, "mse": 2}


def choose_quantization(
    values: np.ndarray, bits: int, method: str, percentile: float
) -> Quantization:
    """Choose scale and zero point for a tensor.

    Parameters
    ----------
    values : float32 array, any shape, finite
    bits : int
        A; codes are 0 to 2^A - 1.
    method : {"minmax", "percentile", "mse", "cubic"}
        The range of codes covers all values, those between two percentiles, or minimises the
        squared error of a sample of the values, or the third power of its size.
    percentile : float
        The upper one, 50 to 100; the lower one is as far from the other end.

    Returns
    -------
    Quantization
        Zero is a code exactly; it is code 0 if no value is negative.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low < _SMALLEST_RANGE:
        return Quantization(1.0, 0, bits)
    if method == "minmax":
        return _affine(low, high, bits)
    if method == "percentile":
        # Of the values beside zero: most of a tensor after a Relu is zero.
        sample = _sample(values[values != 0], 16 * _SAMPLE)
        ends = np.percentile(sample, [100 - percentile, percentile])
        return _affine(min(float(ends[0]), 0.0), max(float(ends[1]), 0.0), bits)
    sample = _sample(values, _SAMPLE)
    best = _affine(low, high, bits)
    # Each end by itself: the two tails of a distribution may be quite different.
    for side in (0, 1):
        ends = np.outer(_FRACTIONS, [low, high])
        ends[:, 1 - side] = (low, high)[1 - side]
        candidates = [_affine(a, b, bits) for a, b in ends]
        best = min(candidates, key=lambda q: _error_of(sample, q, _POWERS[method]))
        low, high = _range(best)
    return best


def _sample(values: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` values, drawn without any pattern of their positions."""
    flat = values.reshape(-1)
    if flat.size <= count:
        return flat
    return flat[np.random.default_rng(0).integers(0, flat.size, count)]


def _affine(low: float, high: float, bits: int) -> Quantization:
    top = 2**bits - 1
    scale = max(high - low, _SMALLEST_RANGE) / top
    return Quantization(scale, int(np.clip(np.rint(-low / scale), 0, top)), bits)


def _range(q: Quantization) -> tuple[float, float]:
    return -q.zero_point * q.scale, (q.top - q.zero_point) * q.scale


def _error_of(values: np.ndarray, q: Quantization, power: int) -> float:
    return _error(values, np.float32(q.scale), np.float32(q.zero_point), np.float32(q.top), power)


@njit(cache=True, nogil=True, error_model="numpy")
def _error(values, scale, zero, top, power):
    """Error of values, to a power of 2 or 3, as `Quantization` quantizes and dequantizes them."""
    total = 0.0
    for i in range(values.size):
        code = min(max(np.rint(values[i] / scale) + zero, np.float32(0)), top)
        error = abs((code - zero) * scale - values[i])
        total += np.float64(error * error) * (np.float64(error) if power == 3 else 1.0)
    return total
