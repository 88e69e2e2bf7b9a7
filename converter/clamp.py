"""Bounds of values, None for no bound: what Relu and Clip are, and codes that end at zero."""

from __future__ import annotations

from logshift.runtime.graph import Quantization

Clamp = tuple[float | None, float | None]
NO_CLAMP: Clamp = (None, None)


def ordered(low: float | None, high: float | None) -> Clamp:
    """Return the bounds of a Clip: where they cross, all values become the upper one."""
    crossed = low is not None and high is not None and low > high
    return (high if crossed else low), high


def clamp_twice(first: Clamp, second: Clamp) -> Clamp:
    """Return the bounds of one clamp after another."""
    low, high = second

    def bound(value: float | None, fallback: float | None) -> float | None:
        if value is None:
            return fallback
        if low is not None:
            value = max(value, low)
        return value if high is None else min(value, high)

    return bound(first[0], low), bound(first[1], high)


def zero_side(q: Quantization) -> Clamp:
    """Return the bound of codes that begin or end at zero."""
    return 0.0 if q.zero_point == 0 else None, 0.0 if q.zero_point == q.top else None
