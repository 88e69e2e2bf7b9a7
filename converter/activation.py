"""Functions of one tensor as what kernels compute before they round: `docs/quantization.md` 4.

A function that is one of those with a formula of its own is recognised by its values, whatever
nodes compute it. Every other one is fitted by parabolas, where these come near enough.
"""

from __future__ import annotations

import numpy as np

from logshift.converter.function import Function
from logshift.kernels.activation import PIECES, Activation
from logshift.runtime.graph import Quantization

_WORST = 0.25  # codes by which a fit may be wrong; else rounding twice is no worse
_SAME = 1e-6  # relative: functions this near to each other are the same

# What is beyond the values that were seen.
_MARGIN = 0.25  # of their span, on both sides, where a fit has to be as good
_FAR = np.geomspace(0.01, 1e3, 20)  # spans from there, where an error counts less
_FAR_WEIGHT = 1 / 256

_FEW, _MANY = 192, 1024  # points on which fits are compared: all, and the best ones
_CHECKED = 4096  # on which the one that is taken is judged
_WIDTHS = np.geomspace(0.15, 1e-4, 40)  # of a piece, in spans
_NOTHING = 1e-3  # of a code: no error, so that wider pieces are taken
_FINER = np.linspace(0.9, 1.1, 9)  # times these, of the best ones
_BEST = 12
_WIDTH_BITS = 10  # of the mantissa of a width: its multiples are float32
_ORIGINS = 15  # besides those with a border at zero, where many functions bend


def activation(function: Function, q: Quantization, low: float, high: float) -> Activation | None:
    """Return what computes a function whose result has this quantization.

    Parameters
    ----------
    function : Function
    q : Quantization
        Of the result.
    low, high : float
        Bounds of what it is computed of, as far as that is known.

    Returns
    -------
    Activation, or None if nothing comes near enough.
    """
    size = max(abs(low), abs(high)) or 1.0
    if (found := _prelu(function, size)) is not None:
        return found
    if function.channels > 1:
        return None
    return _hard_swish(function, size) or _written(function, q) or _fit(function, q, low, high)


# --- functions with a formula of their own ------------------------------------------------------


def _around(size: float) -> np.ndarray:
    """Return points on both sides of zero, from far within `size` to far beyond it."""
    points = np.concatenate([np.geomspace(1e-3, 1e3, 61) * size, np.linspace(0, 16, 257)])
    return np.unique(np.concatenate([-points, points]))


def _prelu(function: Function, size: float) -> Activation | None:
    x = _around(size)
    y = np.atleast_2d(function.values(x))
    slopes = (y[:, 0] / x[0]).astype(np.float32)
    expected = np.where(x < 0, slopes[:, None] * x, x)
    if not (np.abs(y - expected) <= _SAME * np.abs(x)).all():
        return None
    return Activation("PRelu", 0.0, 1.0, slopes[:1] if (slopes == slopes[0]).all() else slopes)


def _hard_swish(function: Function, size: float) -> Activation | None:
    """Return the function if it is x * clamp((x - origin) / unit, 0, 1)."""
    x = _around(size)
    y = function.values(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        gate = y / x
    between = np.flatnonzero((gate > 0.05) & (gate < 0.95))
    if len(between) < 2 or not np.isfinite(y).all():
        return None
    first, last = between[[0, -1]]
    unit = (x[last] - x[first]) / (gate[last] - gate[first])
    origin = x[first] - gate[first] * unit
    if not unit > 0:
        return None
    unit, origin = _plain(unit), _plain(origin)
    expected = x * np.clip((x - origin) / unit, 0, 1)
    if not (np.abs(y - expected) <= _SAME * np.abs(x)).all():
        return None
    return Activation("HardSwish", origin, unit, np.zeros(0, np.float32))


def _plain(value: float) -> float:
    """Return the number that float32 constants have kept from being this one."""
    short = float(f"{value:.5g}")
    return short if abs(short - value) <= _SAME * abs(value) else float(np.float32(value))


# --- parabolas ----------------------------------------------------------------------------------


def codes(found: Activation, x: np.ndarray) -> np.ndarray:
    """Return what the parabolas make of x, in output codes, as the definition says."""
    v = ((x - found.origin) / found.unit).astype(np.float32)
    i = np.rint(np.clip(v, np.float32(0), np.float32(PIECES - 1)))
    f, (c0, c1, c2) = v - i, found.coefficients[:, i.astype(np.intp)]
    return (c2 * f + c1) * f + c0


def _error(found: Activation, function: Function, q: Quantization, x: np.ndarray) -> float:
    """Return by how many codes, before rounding, the parabolas are wrong at worst."""
    expected = function.values(x) / q.scale + q.zero_point
    error = np.clip(codes(found, x), 0, q.top) - np.clip(expected, 0, q.top)
    return float(np.abs(error).max())


def _written(function: Function, q: Quantization) -> Activation | None:
    """Return the parabolas that `export` has written as the nodes of the function."""
    gathers = [node for node in function.nodes if node.op_type == "Gather"]
    offset = next((node for node in function.nodes if node.op_type == "Add"), None)
    ratio = next((node for node in function.nodes if node.op_type == "Div"), None)
    if len(gathers) != 3 or offset is None or ratio is None:
        return None
    tables = [function.constants.get(node.input[0], np.empty(0)) for node in gathers]
    origin, unit = (function.constants.get(node.input[1]) for node in (offset, ratio))
    if origin is None or unit is None or any(table.shape != (PIECES,) for table in tables):
        return None
    found = Activation(
        "Piecewise", float(origin), -float(unit), np.stack(tables[::-1]).astype(np.float32)
    )
    x = found.origin + found.unit * np.linspace(-1, PIECES, _CHECKED)
    return found if _error(found, function, q, x) < 0.01 else None


class _Fit:
    """What parabolas are to come near to: a function in output codes, at points near and far."""

    def __init__(self, function: Function, q: Quantization, low: float, high: float) -> None:
        self.function, self.q = function, q
        self.span = (high - low) or abs(high) or 1.0
        margin = _MARGIN * self.span
        self.low, self.high = low - margin, high + margin
        self.is_finite = bool(np.isfinite(self.codes(self.near(_MANY))).all())
        self.lines = [self._line(side) for side in (-1, 1)]

    def near(self, count: int) -> np.ndarray:
        """Return points where a fit has to be good, closer to each other around zero."""
        around = max(abs(self.low), abs(self.high)) * np.geomspace(1e-4, 1, count // 3)
        x = np.concatenate([np.linspace(self.low, self.high, count), -around, around])
        return np.unique(x.clip(self.low, self.high))

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Return the function, in output codes."""
        with np.errstate(all="ignore"):
            y = self.function.values(x.ravel()).reshape(x.shape)
            return y / self.q.scale + self.q.zero_point

    def _line(self, side: int) -> tuple[float, float] | None:
        """Return slope and offset of the line that the function becomes on one side, if any."""
        x = side * self.span * np.array([1e3, 1e4, 1e5])
        y = self.codes(x)
        with np.errstate(all="ignore"):
            before, slope = np.diff(y) / np.diff(x)
            offsets = y - slope * x
            is_line = abs(before - slope) * self.span < _SAME and np.ptp(offsets) < 1e-3
        return (float(slope), float(offsets[0])) if is_line else None

    def best(self) -> Activation:
        """Return the candidate with the least error."""
        width, border = np.meshgrid(self.span * _WIDTHS, np.arange(PIECES - 1))
        other, free = np.meshgrid(
            self.span * _WIDTHS, np.linspace(self.low - self.span, self.high, _ORIGINS)
        )
        first = _Candidates(
            self,
            _FEW,
            np.concatenate([-(border + 0.5) * width, free]).ravel(),
            np.concatenate([width, other]).ravel(),
        )
        chosen = np.argsort(first.cost, kind="stable")[:_BEST, None]
        origin, unit = (values[chosen] * _FINER for values in (first.origin, first.unit))
        second = _Candidates(self, _MANY, origin.ravel(), unit.ravel())
        return second.best()


class _Candidates:
    """Fits with these origins and units, and what is wrong with them."""

    def __init__(self, fit: _Fit, points: int, origin: np.ndarray, unit: np.ndarray) -> None:
        mantissa, exponent = np.frexp(unit)
        unit = np.ldexp(np.rint(np.ldexp(mantissa, _WIDTH_BITS)), exponent - _WIDTH_BITS)
        # Where a border is at zero it stays there.
        at_border = np.rint(origin / unit - 0.5) + 0.5
        origin = np.where(np.abs(origin / unit - at_border) < 0.05, at_border * unit, origin)
        self.fit, self.unit = fit, unit
        self.origin = origin.astype(np.float32).astype(np.float64)
        near, far = fit.near(points), fit.span * _FAR
        self.near = len(near)
        x = np.concatenate([near, fit.low - far, fit.high + far])
        y = fit.codes(x)
        x, self.y = x[~np.isnan(y)], y[~np.isnan(y)].clip(0, fit.q.top)
        with np.errstate(all="ignore"):
            self.forms = [c.astype(np.float32) for c in self._pieces()]
            v = (x - self.origin[:, None]) / unit[:, None]
            i = np.rint(v.clip(0, PIECES - 1)).astype(np.intp)
            f = (v - i).astype(np.float32)
            errors = np.stack([self._errors(c, i, f) for c in self.forms])
        # By form of the first piece and of the last one.
        worst = np.maximum(errors[:, None, ..., 0], errors[None, :, ..., 2])
        worst = np.maximum(worst, errors[0, ..., 1]).clip(_NOTHING)
        self.costs = worst[:, :, 0] + _FAR_WEIGHT * worst[:, :, 1]
        self.cost = self.costs.min(axis=(0, 1))

    def best(self) -> Activation:
        """Return the one with the least error."""
        first, last, best = np.unravel_index(self.costs.argmin(), self.costs.shape)
        half = PIECES // 2
        left, right = self.forms[first][best], self.forms[last][best]
        c = np.concatenate([left[:, :half], right[:, half:]], axis=1)
        return Activation("Piecewise", float(self.origin[best]), float(self.unit[best]), c)

    def _pieces(self) -> list[np.ndarray]:
        """Return coefficients (candidates, 3, 16), with three forms of the outermost pieces.

        Parabolas go through the function at their borders and in their middle. Outermost are lines
        that the function comes near to far out, if there are any, and the border is halfway to
        them, so that errors on both sides of it are alike; or lines that go on as the function
        does at the border; or parabolas like the others.
        """
        fit, unit = self.fit, self.unit
        # Borders and middles of pieces, of which the outermost are as wide as the others.
        x = self.origin[:, None] + unit[:, None] * np.arange(-0.5, PIECES, 0.5)
        y = fit.codes(x)
        forms = []
        for form in range(3):
            z = y.copy()
            for line, sign, border, middle, end in zip(
                fit.lines, (-1, 1), (2, -3), (1, -2), (0, -1), strict=True
            ):
                if form == 0 and line is not None:
                    slope, offset = line
                    z[:, border] = (y[:, border] + slope * x[:, border] + offset) / 2
                    z[:, end] = z[:, border] + sign * slope * unit
                if form < 2:
                    z[:, middle] = (z[:, border] + z[:, end]) / 2
            left, middle, right = z[:, :-2:2], z[:, 1::2], z[:, 2::2]
            forms.append(np.stack([middle, right - left, 2 * (left + right - 2 * middle)], axis=1))
        return forms

    def _errors(self, c: np.ndarray, i: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Return the largest errors near and far: (2, candidates, 3).

        The last axis is where: in the first two pieces, which depend on the form of the first, in
        the last two, and between.
        """
        c0, c1, c2 = (np.take_along_axis(c[:, k], i, axis=1) for k in range(3))
        error = np.abs(((c2 * f + c1) * f + c0).clip(0, self.fit.q.top) - self.y)
        error[np.isnan(error)] = np.inf
        first, last = i <= 1, i >= PIECES - 2
        parts = [np.where(part, error, 0) for part in (first, ~(first | last), last)]
        return np.stack(
            [
                [part[:, : self.near].max(axis=1) for part in parts],
                [part[:, self.near :].max(axis=1, initial=0) for part in parts],
            ]
        ).transpose(0, 2, 1)


def _fit(function: Function, q: Quantization, low: float, high: float) -> Activation | None:
    fit = _Fit(function, q, low, high)
    if not fit.is_finite:
        return None
    found = fit.best()
    if not np.isfinite(found.coefficients).all():
        return None
    # Inside of pieces too, however small they are: that is where a jump would be.
    inside = found.origin + found.unit * np.linspace(-0.5, PIECES - 0.5, _CHECKED)
    x = np.concatenate([fit.near(_CHECKED), inside.clip(fit.low, fit.high)])
    return found if _error(found, function, q, x) <= _WORST else None
