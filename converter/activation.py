"""Functions of one tensor as what kernels compute before they round: `docs/quantization.md` 4.

A function that is one of those with a formula of its own is recognised by its values, whatever
nodes compute it. Every other one is fitted by parabolas, where these come near enough.
"""

from __future__ import annotations

import numpy as np

from logshift.converter.clamp import NO_CLAMP, Clamp
from logshift.converter.function import Function
from logshift.kernels.activation import PIECES, Activation, activated, target
from logshift.kernels.machine.jit import njit
from logshift.runtime.graph import Quantization

# Codes by which a fit may be wrong. A table is wrong by as much, for rounding moves its input by up
# to half a code, and somewhere its codes change at least as fast as those of its input.
_WORST = 0.5
_SAME = 1e-6  # relative: functions this near to each other are the same
_PER_DECADE = 10  # points on which that is seen

# What is beyond the values that were seen.
_MARGIN = 0.25  # of their span, on both sides, where a fit has to be as good
_FAR = np.geomspace(0.01, 1e3, 20)  # spans from there, where an error counts less
_FAR_WEIGHT = 1 / 256

_FEW, _MANY = 192, 1024  # points on which fits are compared: all, and the best ones
_CHECKED = 4096  # on which the one that is taken is judged
_WIDTHS = np.geomspace(0.15, 1e-4, 56)  # of a piece, in spans
_FINER = np.linspace(0.9, 1.1, 11)  # times these, of the best ones
_BEST = 20
_WIDTH_BITS = 10  # of the mantissa of a width: its multiples are float32
_CENTRES = 15  # besides those with a border at zero, where many functions bend
_NOTHING = 4e-3  # of a code: no error, so that wider pieces are taken

# Where a parabola goes through a function so that it is hardly wrong: zeros of a Chebyshev
# polynomial. And the points on which it then gets as near as it can, in so many steps.
_THROUGH = np.array([-np.sqrt(0.75), 0, np.sqrt(0.75)])
_ACROSS = np.linspace(-1, 1, 33)
_STEPS = 12

_STEP = 2**12  # of v, from one piece to the next
_UNIT = 2**7  # of coefficients, in a code
_MOST = 2**13 - 1  # of |c1| + |c2|: then float32, in which `export` writes it, is exact


def activation(
    function: Function, q: Quantization, low: float, high: float, clamp: Clamp = NO_CLAMP
) -> Activation | None:
    """Return what computes a function whose result has this quantization.

    Parameters
    ----------
    function : Function
    q : Quantization
        Of the result.
    low, high : float
        Bounds of what it is computed of, as far as that is known.
    clamp : (low, high)
        Bounds of the result, real.

    Returns
    -------
    Activation, or None if nothing comes near enough.
    """
    size = max(abs(low), abs(high)) or 1.0
    x = _around(max(min(size, q.scale), float(np.finfo(np.float32).tiny)), size)
    if (found := _prelu(function, x)) is not None:
        return found
    if function.channels > 1:
        return None
    return _hard_swish(function, x) or _written(function, q) or _fit(function, q, low, high, clamp)


def rounded(found: Activation, q: Quantization, x: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the codes that kernels make of values, uint8.

    Parameters
    ----------
    found : Activation
        The same for all channels.
    q : Quantization
        Of the result.
    x : float32 array
    low, high : int
        Bounds of the codes.
    """
    to = target(found, q.scale, q.zero_point)
    slope = np.float32(0 if to.slopes is None else to.slopes[0])
    codes = np.empty(x.shape, np.uint8)
    _round(
        x.reshape(-1), np.float32(to.unit), np.float32(to.zero), to.kind, slope,
        to.coefficients.ctypes.data, np.float32(low), np.float32(high), codes.reshape(-1),
    )  # fmt: skip
    return codes


@njit(cache=True, nogil=True, error_model="numpy")
def _round(x, unit, zero, kind, slope, coefficients, low, high, codes):
    for i in range(x.size):
        code = np.rint(activated(x[i] / unit + zero, kind, slope, coefficients))
        codes[i] = np.uint8(np.int32(min(max(code, low), high)))


# --- functions with a formula of their own ------------------------------------------------------


def _around(least: float, most: float) -> np.ndarray:
    """Return points on both sides of zero, from far within `least` to far beyond `most`."""
    first, last = np.log10([1e-3 * least, 1e3 * most])
    far = np.logspace(first, last, int(_PER_DECADE * (last - first)) + 1)
    points = np.concatenate([far, np.linspace(0, 16, 257)])
    return np.unique(np.concatenate([-points, points]))


def _prelu(function: Function, x: np.ndarray) -> Activation | None:
    """Return the function if it is a straight line below zero and x above it, where it is seen."""
    y = np.atleast_2d(function.values(x))
    slopes = (y[:, 0] / x[0]).astype(np.float32)
    expected = np.where(x < 0, slopes[:, None] * x, x)
    if not (np.abs(y - expected) <= _SAME * np.abs(x)).all():
        return None
    return Activation("PRelu", 0.0, 1.0, slopes[:1] if (slopes == slopes[0]).all() else slopes)


def _hard_swish(function: Function, x: np.ndarray) -> Activation | None:
    """Return the function if it is x * clamp((x - origin) / unit, 0, 1), where it is seen."""
    y = function.values(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        closed, opened = (np.flatnonzero(part) for part in (y / x < 0.05, y / x > 0.95))
    if not (len(closed) and len(opened) and closed[-1] < opened[0] and np.isfinite(y).all()):
        return None
    # Around where it opens, not at zero, where it cannot be seen how far.
    points = np.linspace(x[closed[-1]], x[opened[0]], 101)
    points = points[points != 0]
    gate = function.values(points) / points
    between = np.flatnonzero((gate > 0.05) & (gate < 0.95))
    if len(between) < 2:
        return None
    first, last = between[[0, -1]]
    unit = (points[last] - points[first]) / (gate[last] - gate[first])
    origin = points[first] - gate[first] * unit
    if not unit > 0:
        return None
    unit = _plain(float(unit))
    origin = _plain(float(origin)) if abs(origin) > _SAME * unit else 0.0
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
    """Return what the parabolas make of x, in output codes before they are rounded."""
    v = ((x - found.origin) / found.unit).astype(np.float32)
    k = np.rint(v.clip(-(2**15), 2**15 - 1)).astype(np.int64)
    return _parabolas(found.coefficients.astype(np.int64), k // _STEP + PIECES // 2, k % _STEP)


def _parabolas(c: np.ndarray, n: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return codes before rounding: of pieces n (...), c (..., 3, 16), of integers."""
    f = 16 * position - 2**15
    c0, c1, c2 = (np.take_along_axis(c[..., i, :], n, axis=-1) for i in range(3))
    p = c1 + ((c2 * f + 2**14) >> 15)
    return (c0 + ((p * f + 2**14) >> 15)).clip(-(2**15), 2**15 - 1) / _UNIT


def _written(function: Function, q: Quantization) -> Activation | None:
    """Return the parabolas that `export` has written as the nodes of the function."""
    gathers = [node for node in function.nodes if node.op_type == "Gather"]
    ratio = next((node for node in function.nodes if node.op_type == "Div"), None)
    if len(gathers) != 3 or ratio is None:
        return None
    # Without an origin nothing is added.
    offset = next((node for node in function.nodes if node.output[0] == ratio.input[0]), ratio)
    origin = function.constants.get(offset.input[1]) if offset.op_type == "Add" else np.zeros(())
    unit = function.constants.get(ratio.input[1])
    tables = [function.constants.get(node.input[0], np.empty(0)) for node in gathers]
    if origin is None or unit is None or any(table.shape != (PIECES,) for table in tables):
        return None
    c = np.stack(tables[::-1]).astype(np.int16)
    found = Activation("Piecewise", float(origin), -float(unit), c)
    x = found.origin + found.unit * np.linspace(-(2**16), 2**16, _CHECKED)
    expected = (function.values(x) / q.scale + q.zero_point).clip(0, q.top)
    same = np.abs(np.floor(codes(found, x) + 0.5).clip(0, q.top) - expected) < 0.01
    return found if same.mean() > 0.99 else None


class _Fit:
    """What parabolas are to come near to: a function in output codes, as far as they matter."""

    def __init__(
        self, function: Function, q: Quantization, low: float, high: float, clamp: Clamp
    ) -> None:
        self.function, self.q = function, q
        self.bottom, self.top = (
            end if bound is None else float(np.clip(bound / q.scale + q.zero_point, 0, q.top))
            for bound, end in zip(clamp, (0, q.top), strict=True)
        )
        self.span = (high - low) or abs(high) or 1.0
        margin = _MARGIN * self.span
        self.low, self.high = low - margin, high + margin
        self.is_finite = bool(np.isfinite(self.codes(self.near(_MANY))).all())

    def near(self, count: int) -> np.ndarray:
        """Return points where a fit has to be good, closer to each other around zero."""
        around = max(abs(self.low), abs(self.high)) * np.geomspace(1e-4, 1, count // 3)
        x = np.concatenate([np.linspace(self.low, self.high, count), -around, [0.0], around])
        return np.unique(x.clip(self.low, self.high))

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Return the function, in output codes."""
        with np.errstate(all="ignore"):
            y = self.function.values(x.ravel()).reshape(x.shape)
            return y / self.q.scale + self.q.zero_point

    def inside(self, y: np.ndarray) -> np.ndarray:
        """Return codes as far as they are not clamped anyway."""
        return y.clip(self.bottom, self.top)

    def error(self, found: Activation, x: np.ndarray) -> float:
        """Return by how many codes, before rounding, parabolas are wrong at worst."""
        return float(np.abs(self.inside(codes(found, x)) - self.inside(self.codes(x))).max())

    def best(self) -> Activation:
        """Return the candidate with the least error."""
        widths = self.span * _WIDTHS
        width, border = np.meshgrid(widths, np.arange(-PIECES // 2, PIECES // 2 + 1))
        other, free = np.meshgrid(widths, np.linspace(self.low, self.high, _CENTRES))
        centre = np.concatenate([border * width, free]).ravel()
        first = _Candidates(self, centre, np.concatenate([width, other]).ravel())
        chosen = np.argsort(first.cost(_FEW, _BEST), kind="stable")[:_BEST, None]
        centre, width = (values[chosen] * _FINER for values in (first.centre, first.width))
        second = _Candidates(self, centre.ravel(), width.ravel())
        second.improve()
        return second.activation(int(second.cost(_MANY, 1).argmin()))


class _Candidates:
    """Fits by pieces of some width, side by side around a centre.

    Attributes
    ----------
    centre, width : float64 array
    c : float64 array (candidates, 16, 3)
        Coefficients, in codes.
    """

    def __init__(self, fit: _Fit, centre: np.ndarray, width: np.ndarray) -> None:
        mantissa, exponent = np.frexp(width)
        width = np.ldexp(np.rint(np.ldexp(mantissa, _WIDTH_BITS)), exponent - _WIDTH_BITS)
        # Where a border is at zero it stays there.
        border = np.rint(centre / width)
        centre = np.where(np.abs(centre / width - border) < 0.05, border * width, centre)
        self.fit, self.width = fit, width
        self.centre = centre.astype(np.float32).astype(np.float64)
        y = fit.codes(self._x(_THROUGH))
        inside = _through(fit.inside(y))
        with np.errstate(all="ignore"):
            self.c = _through(y)
            fits = np.abs(self.c[..., 1:]).sum(axis=-1) <= _MOST / _UNIT
        self.c = np.where(fits[..., None], self.c, inside)

    def _x(self, across: np.ndarray) -> np.ndarray:
        """Return points at some places across every piece: (candidates, 16, places)."""
        place = np.arange(PIECES)[:, None] + (across - PIECES + 1) / 2
        return self.centre[:, None, None] + self.width[:, None, None] * place

    def improve(self) -> None:
        """Bring pieces nearer to the function where they are wrong most: Lawson's algorithm."""
        fit = self.fit
        across, y, known = self._across()
        exact = fit.inside(y)
        y = y.clip(fit.bottom - fit.q.top, fit.top + fit.q.top)
        _improve(self.c, across, y, exact, known, fit.bottom, fit.top)

    def _across(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return points across every piece, the function there, and where it is known.

        Beyond the outermost pieces their last value counts, for all that the function is there.
        """
        fit = self.fit
        across = np.broadcast_to(_ACROSS, (len(self.width), PIECES, len(_ACROSS)))
        y, near = fit.codes(self._x(_ACROSS)), fit.near(_FEW)
        values = fit.inside(fit.codes(near))
        more = np.full((*y.shape[:2], 2), np.nan)
        place = (near - self.centre[:, None]) / self.width[:, None]
        for piece, beyond in ((0, place < -PIECES / 2), (-1, place > PIECES / 2)):
            found = beyond.any(axis=1)
            for index, extreme, none in ((0, np.min, np.inf), (1, np.max, -np.inf)):
                end = extreme(np.where(beyond, values, none), axis=1)
                more[:, piece, index] = np.where(found, end, np.nan)
        edge = np.zeros(more.shape)
        edge[:, 0], edge[:, -1] = -1, 1
        y, across = np.concatenate([y, more], axis=-1), np.concatenate([across, edge], axis=-1)
        known = np.isfinite(y)
        return across, np.where(known, y, 0), known

    def _stored(self) -> np.ndarray:
        """Return coefficients (candidates, 3, 16) as they are stored."""
        c = np.rint(self.c * _UNIT).transpose(0, 2, 1)
        c[:, 0] = c[:, 0].clip(-(2**15), 2**15 - 1)
        c[:, 1:] = c[:, 1:].clip(-_MOST, _MOST)
        return np.nan_to_num(c).astype(np.int32)

    def cost(self, count: int, wanted: int) -> np.ndarray:
        """Return what is wrong with each, on so many points and far beyond them.

        It is infinite of those that are none of the so many best.
        """
        fit = self.fit
        near, far = fit.near(count), fit.span * _FAR
        y = fit.codes(x := np.concatenate([near, fit.low - far, fit.high + far]))
        x, y = x[~np.isnan(y)], fit.inside(y[~np.isnan(y)])
        c = self._stored()
        fits = np.abs(c[:, 1:]).sum(axis=1).max(axis=1) <= _MOST
        unit = self.width / _STEP
        return _cost(c, fits, self.centre, unit, x, y, len(near), fit.bottom, fit.top, wanted)

    def activation(self, index: int) -> Activation:
        """Return one of them."""
        c = self._stored()[index].astype(np.int16)
        return Activation(
            "Piecewise", float(self.centre[index]), float(self.width[index] / _STEP), c
        )


@njit(cache=True, nogil=True, error_model="numpy")
def _cost(c, fits, centre, unit, x, y, near, bottom, top, wanted):
    """Return the cost of every candidate: its largest errors on the first points and after them."""
    cost = np.full(len(c), np.inf)
    least = np.full(wanted, np.inf)  # costs of the best ones, in order
    for candidate in range(len(c)):
        if not fits[candidate]:
            continue
        first = last = 0.0
        for i in range(x.size):
            k = np.rint((x[i] - centre[candidate]) / unit[candidate])
            k = np.int64(min(max(k, -(2.0**15)), 2.0**15 - 1))
            piece, f = k // _STEP + PIECES // 2, 16 * (k % _STEP) - 2**15
            p = c[candidate, 1, piece] + ((c[candidate, 2, piece] * f + 2**14) >> 15)
            p = c[candidate, 0, piece] + ((p * f + 2**14) >> 15)
            code = min(max(p, -(2**15)), 2**15 - 1) / _UNIT
            error = abs(min(max(code, bottom), top) - y[i])
            if i >= near:
                last = max(last, error)
            elif error > first:
                first = error
                if first > least[-1]:
                    break
        else:
            cost[candidate] = max(first, _NOTHING) + _FAR_WEIGHT * last
            place = np.searchsorted(least, cost[candidate])
            if place < wanted:
                least[place + 1 :] = least[place:-1].copy()
                least[place] = cost[candidate]
    return cost


@njit(cache=True, nogil=True, error_model="numpy")
def _improve(c, across, y, exact, known, bottom, top):
    """Improve the parabolas of all candidates (candidates, pieces, 3), in place."""
    weight = np.empty(y.shape[2])
    for candidate in range(y.shape[0]):
        for piece in range(y.shape[1]):
            x, best = across[candidate, piece], c[candidate, piece]
            target, bounded = y[candidate, piece], exact[candidate, piece]
            given = known[candidate, piece]
            weight[:] = given
            c0, c1, c2 = best[0], best[1], best[2]
            least = np.inf
            for _ in range(_STEPS):
                worst = total = 0.0
                for i in range(x.size):
                    error = min(max(c0 + (c1 + c2 * x[i]) * x[i], bottom), top) - bounded[i]
                    error = abs(error) if given[i] else 0.0
                    weight[i] = (weight[i] + 1e-3) * error
                    total += weight[i]
                    worst = max(worst, error)
                if worst < least:
                    least = worst
                    best[0], best[1], best[2] = c0, c1, c2
                share = max(worst, 1e-9) * (total / max(worst, 1e-9) + 1e-9)
                m0 = m1 = m2 = m3 = m4 = s0 = s1 = s2 = 0.0
                for i in range(x.size):
                    weight[i] /= share
                    w1 = weight[i] * x[i]
                    w2 = w1 * x[i]
                    w3 = w2 * x[i]
                    m0, m1, m2, m3, m4 = m0 + weight[i], m1 + w1, m2 + w2, m3 + w3, m4 + w3 * x[i]
                    s0, s1, s2 = (
                        s0 + weight[i] * target[i],
                        s1 + w1 * target[i],
                        s2 + w2 * target[i],
                    )
                c0, c1, c2 = _parabola((m0, m1, m2, m3, m4), (s0, s1, s2))


@njit(cache=True, nogil=True, error_model="numpy")
def _parabola(moments, sums):
    """Solve the normal equations of a parabola, by Cholesky's factors."""
    d0 = moments[0] + 1e-12
    l1, l2 = moments[1] / d0, moments[2] / d0
    d1 = moments[2] + 1e-12 - l1 * moments[1]
    l3 = (moments[3] - l2 * moments[1]) / d1
    d2 = moments[4] + 1e-12 - l2 * moments[2] - l3 * l3 * d1
    z1 = sums[1] - l1 * sums[0]
    z2 = (sums[2] - l2 * sums[0] - l3 * z1) / d2
    z1 = z1 / d1 - l3 * z2
    return sums[0] / d0 - l1 * z1 - l2 * z2, z1, z2


def _through(y: np.ndarray) -> np.ndarray:
    """Return the coefficients (..., 3) of parabolas through values (..., 3) at `_THROUGH`."""
    left, middle, right = np.moveaxis(y, -1, 0)
    end = _THROUGH[2]
    return np.stack(
        [middle, (right - left) / (2 * end), (left + right - 2 * middle) / (2 * end**2)], axis=-1
    )


def _fit(
    function: Function, q: Quantization, low: float, high: float, clamp: Clamp
) -> Activation | None:
    fit = _Fit(function, q, low, high, clamp)
    if not fit.is_finite:
        return None
    found = fit.best()
    # Inside of pieces too, however small they are: that is where a jump would be.
    inside = found.origin + found.unit * np.linspace(-(2**15), 2**15, _CHECKED)
    x = np.concatenate([fit.near(_CHECKED), inside.clip(fit.low, fit.high)])
    return found if fit.error(found, x) <= _WORST else None
