"""Fused activation functions without float32: the code of v by where v lies.

`fixed` gives u, which is (v + 1/2) * 2^f but for an error. A function's code changes at some
hundred places of v at most. Farther from these than the error the code of u is that of v, and is
found by a binary search; nearer the definition is computed (docs/quantization.md section 4), in
float32. Those are few outputs in a thousand of Piecewise, a tenth of HardSwish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from logshift.kernels.activation import HARD_SWISH, PIECEWISE, Target, activated
from logshift.kernels.machine.jit import njit
from logshift.runtime.c_source.fixed import Fixed
from logshift.runtime.c_source.requantize import Scale, scale
from logshift.runtime.c_source.site import Site
from logshift.runtime.c_source.source import braced

_MOST = 1023  # places: more are no function that a network has
_GRID = 2**20  # points at which HardSwish is looked at
_FARTHEST = 2**12  # of v, beyond which HardSwish is constant
_TOUCHING = 1e-3  # of a code


@dataclass(frozen=True)
class Curve:
    """Codes of u.

    Attributes
    ----------
    edges : int32 array (n,), ascending
        From each of these u on the code is another one.
    codes : uint8 array (n + 1,)
    doubt : int
        Nearer to an edge than that the code may be either.
    """

    edges: np.ndarray
    codes: np.ndarray
    doubt: int


def span(to: Target, most: int) -> tuple[int, int] | None:
    """Return the v between which the code, at most `most`, changes, where that is known."""
    if to.kind == PIECEWISE:
        return -(2**15), 2**15 - 1
    if to.kind != HARD_SWISH:  # slopes of PRelu differ between channels
        return None
    factor, added, zero = map(float, to.coefficients)
    if factor <= 0:
        return None
    end = max(1.0, (most - zero - added) / factor)
    turn = -added / (2 * factor)  # the least value, if it lies within 0 and 1
    if 0 < turn < 1:
        value = zero + (turn * factor + added) * turn
        if abs(abs(value - round(value)) - 0.5) < _TOUCHING:
            return None
    return (-1, math.ceil(end) + 1) if end < _FARTHEST else None


def curve(to: Target, form: Fixed, least: int, most: int) -> Curve | None:
    """Return the codes of a function, at least `least` and at most `most`.

    Parameters
    ----------
    to : Target
        Of a kind that `span` knows.
    form : Fixed
        Of v, with the bounds that `span` returns.
    least, most : int

    Returns
    -------
    Curve, or None if u or the function's codes are not known well enough.
    """
    if not form.fraction:
        return None
    one = 1 << form.fraction
    if to.kind == PIECEWISE:  # a function of v rounded: edges are in the middle between two
        step, slack = one, 1.0
    else:
        step = max(1, (form.hi - form.lo) * one // _GRID)
        # The definition's own roundings, of (v * factor + added) * inside + zero, move an edge most
        # where the slope is least, which is next to the turn that is not touching.
        factor, added, zero = map(float, np.abs(to.coefficients))
        noise = 2.0**-24 * (3 * factor * form.hi + 2 * added + zero + most)
        slack = step + one * (noise / (2 * math.sqrt(_TOUCHING * factor)) + form.hi * 2.0**-24)
    grid = np.arange(form.lo * one, form.hi * one + 1, step)
    edges = grid if to.kind == PIECEWISE else grid + one // 2
    v = grid / one
    values = _values(v.astype(np.float32), to.kind, to.coefficients.ctypes.data)
    codes = np.rint(values).clip(least, most).astype(np.uint8)
    places = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    if len(places) > _MOST:
        return None
    return Curve(edges[places].astype(np.int32), codes[[0, *places]], form.doubt + math.ceil(slack))


def write(site: Site, form: Fixed, found: Curve, zero: int, factor: float) -> tuple[Scale, str]:
    """Write the records of a layer and of its curve; returns their names."""
    count = len(found.edges)
    site.helper("curved")
    record = braced([
        site.source.table(found.edges, f"{site.name}_edges"),
        site.source.table(found.codes, f"{site.name}_codes"),
        count, 1 << count.bit_length() >> 1, found.doubt,
    ])  # fmt: skip
    name = site.source.scalar("struct curve", record, f"{site.name}_curve")
    return scale(site, replace(form, lo=0, hi=0), zero, factor), name


@njit(cache=True)
def _values(v: np.ndarray, kind: int, address: int) -> np.ndarray:
    """Return a function that has no slopes of v, float32."""
    values = np.empty_like(v)
    for i in range(len(v)):
        values[i] = activated(v[i], kind, np.float32(0), address)
    return values
