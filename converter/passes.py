"""Passes over a tensor of all calibration pictures: a few at a time, on all cores.

How pictures are cut does not depend on the number of cores, and what is found of the parts is in
their order, so that sums of it are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from logshift.kernels.machine.jit import njit
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread

# Values of a part: they and what is made of them stay in a core's cache.
PART = 2**18

_T = TypeVar("_T")


def over_pictures(function: Callable[[slice], _T], count: int, step: int) -> list[_T]:
    """Call a function with one part of the pictures after the other, `step` of them at a time."""
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    return spread(function, parts, default_threads())


def threads_of_part(count: int) -> int:
    """Return how many threads are left for each part, of so many pictures at least."""
    return -(-default_threads() // count)


def bounds(y: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest of float32 values; one is not finite if any is not."""
    low, high = _bounds(y.reshape(-1).view(np.int32))
    ends = np.array([low, high], np.int32)
    low, high = np.where(ends < 0, ends ^ np.int32(2**31 - 1), ends).view(np.float32)
    return float(low), float(high)


@njit(cache=True, nogil=True, error_model="numpy")
def _bounds(bits):
    """Do so with the bits of floats, put in the order of integers: that is faster, and sees NaN."""
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for i in range(bits.size):
        key = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(2**31 - 1)))
        low, high = min(low, key), max(high, key)
    return low, high


def squares(signal: np.ndarray, noisy: np.ndarray) -> tuple[float, float]:
    """Return the sums of squares of a signal and of what another array is off it."""
    if signal.dtype == np.float16:
        signal, noisy = signal.astype(np.float32), noisy.astype(np.float32)
    return _squares(signal.reshape(-1), noisy.reshape(-1))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _squares(signal, noisy):
    power = noise = 0.0
    for i in range(signal.size):
        x = np.float64(signal[i])
        error = x - np.float64(noisy[i])
        power += x * x
        noise += error * error
    return power, noise
