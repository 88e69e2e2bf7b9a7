"""Rounding with error feedback: weights that are rounded later make up for those before them.

Weights of an output channel are rounded one after the other. What one loses is spread over those
still to come so that the channel's outputs change least, as far as its inputs go together on
calibration data. This is the order and the update of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023), on
the grids of `docs/quantization.md` and with the choice of second words inside: their gain is what
they take from the error of outputs, not of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from logshift.converter.encode import (
    eligible,
    encode,
    gains,
    round_again,
    round_in_turn,
    select,
)
from logshift.converter.float_graph import FloatNode
from logshift.converter.settings import Settings
from logshift.kernels.machine.jit import njit
from logshift.kernels.stlq.codec import LogWeights, exponent_levels
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread
from logshift.runtime.graph import Quantization

# Of the mean variance: covariances are those of some pictures. With 0.1 to 1 EfficientNet-Lite0
# keeps 17.6 dB on others, with 0.01, which suits those that calibrate better, 16.7.
_DAMPING = 0.5
_PASSES = 2  # the choice of second words and the errors it leaves depend on each other
# Weights that make up for others outgrow the alpha that the float ones have.
_LARGER = tuple(2 ** (eighth / 8) for eighth in range(9))
_SUITABLE = 0.8, 1.25  # times an alpha, to suit its words
# How often each weight is rounded again with second words chosen anew, and then with the same.
_CHOSEN_ANEW, _KEPT = 2, 2
_PART = 2**15  # weights that are rounded at a time
# Weights of an output: the memory of their covariance, and the time of its inverse, have an end.
MOST_INPUTS = 8192
_TOGETHER = 2**25  # values of covariances of groups that are quantized together
# Samples of a covariance, per input of an output: many as long as these are not too many.
_FEWEST_SAMPLES, _MANY_SAMPLES = 1024, 4096
_MANY_PER_INPUT, _SAMPLES_PER_INPUT = 64, 3
_PARTS = 8  # of the groups, which several threads work on
_ELEMENTS = 2**23  # of inputs that are multiplied together
_TRIANGLE = 128  # rows of a triangular matrix that are inverted at once


@dataclass(frozen=True)
class Inputs:
    """A tensor of all pictures: float32 (pictures, C, H, W), or its codes."""

    values: np.ndarray
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Covariance:
    """Of what the weights of an output are multiplied with.

    Attributes
    ----------
    moments : float32 array (group, K, K), K = kh * kw * C / group in the order of the weights
        Of the quantized inputs: covariances, or second moments if nothing makes up for the mean.
    lost : float64 array (group, O / group, K)
        The weights, times what quantization took from the inputs, with the quantized inputs.
    mean : float64 array (group, K)
        Of the quantized inputs.
    """

    moments: np.ndarray
    lost: np.ndarray
    mean: np.ndarray


def covariance(
    node: FloatNode,
    quantized: Inputs,
    exact: Inputs | None,
    center: bool,
    groups: slice = slice(None),
) -> Covariance:
    """Covariance of what the weights of an output are multiplied with.

    Parameters
    ----------
    node : FloatNode
        A Conv or ConvTranspose. Of the latter, inputs of different taps count as independent.
    quantized, exact : Inputs
        Of the node, in the quantized network and in the float one; None if these are the same.
    center : bool
        Whether the mean is taken away; else these are second moments.
    groups : slice
        Of which groups of channels.
    """
    assert node.weight is not None
    _, kh, kw, in_group = node.weight.shape
    group, count = node.attributes["group"], len(quantized.values)
    weight = node.weight.reshape(group, -1, kh * kw * in_group)[groups]
    # Of a ConvTranspose, what goes together does at one tap.
    taps = kh * kw if node.op == "Conv" else 1
    size, repeats = taps * in_group, weight.shape[2] // (taps * in_group)
    wanted = max(min(_MANY_PER_INPUT * size, _MANY_SAMPLES), _SAMPLES_PER_INPUT * size)
    places = _Places(node, quantized.values.shape[2:], -(-max(wanted, _FEWEST_SAMPLES) // count))
    of_taps = weight.reshape(len(weight), -1, size).transpose(0, 2, 1)

    moments = np.zeros((len(weight), size, size), np.float32)
    lost = np.zeros((len(weight), weight.shape[1], repeats, size))
    mean, mean_lost = np.zeros((len(weight), size)), np.zeros(lost.shape[:3])
    # Around the first picture's mean: what varies little, far from zero, would drown in rounding.
    origin = np.zeros((len(weight), 1, size), np.float32)
    parts = _parts(len(weight), _ELEMENTS // (places.count * count * size))
    threads = default_threads() if len(parts) == 1 else 1

    # Sums that are not finite are seen later. Threads do not have the caller's `errstate`.
    @np.errstate(over="ignore", invalid="ignore")
    def add_moments(part: slice, columns: np.ndarray) -> None:
        for total, own in zip(moments[part], columns, strict=True):
            total += own.T @ own  # one at a time: BLAS knows that it is symmetric
        mean[part] += columns.sum(axis=1, dtype=np.float64)

    @np.errstate(over="ignore", invalid="ignore")
    def add_lost(part: slice, columns: np.ndarray, taken: np.ndarray) -> None:
        outputs = taken @ of_taps[part]
        lost[part] += (outputs.transpose(0, 2, 1) @ columns).reshape(lost[part].shape)
        total = outputs.sum(axis=1, dtype=np.float64)
        mean_lost[part] += total.reshape(mean_lost[part].shape)

    def add(part: slice) -> None:
        first = groups.indices(group)[0]
        channels = slice((first + part.start) * in_group, (first + part.stop) * in_group)
        if center:
            of_first = places.columns(quantized, 0, channels, in_group)
            origin[part] = of_first.mean(axis=1, keepdims=True)
        together = max(1, _ELEMENTS // (places.count * len(weight[part]) * size))
        for begin in range(0, count, together):
            pictures = range(begin, min(begin + together, count))
            columns, taken = places.gather(
                quantized, exact, pictures, channels, origin[part], threads
            )
            tasks = [partial(add_moments, part, columns)]
            if taken is not None:
                tasks.append(partial(add_lost, part, columns, taken))
            spread(lambda task: task(), tasks, threads)

    spread(add, parts, default_threads())
    for total in (moments, lost, mean, mean_lost):
        total /= places.count * count
    if center:
        moments -= mean[:, :, None] * mean[:, None, :]
        lost -= mean_lost[..., None] * mean[:, None, None, :]
        mean += origin[:, 0]
    return Covariance(
        _independent(moments, repeats),
        lost.reshape(weight.shape),
        np.tile(mean, (1, repeats)),
    )


def _parts(groups: int, most: int) -> list[slice]:
    """Return groups that are worked on together, at least one and at most so many."""
    step = max(1, min(most, -(-groups // _PARTS)))
    return [slice(begin, min(begin + step, groups)) for begin in range(0, groups, step)]


def is_followed(node: FloatNode) -> bool:
    """Tell whether the covariances of all inputs of a layer find place in memory."""
    assert node.weight is not None
    size = node.weight[0].size
    return size <= MOST_INPUTS and node.attributes["group"] * size**2 <= max(_TOGETHER, size**2)


def _independent(matrices: np.ndarray, parts: int) -> np.ndarray:
    """Put each matrix on the diagonal so many times."""
    if parts == 1:
        return matrices
    group, size, _ = matrices.shape
    blocks = np.zeros((group, parts, size, parts, size), matrices.dtype)
    for part in range(parts):
        blocks[:, part, :, part] = matrices
    return blocks.reshape(group, parts * size, -1)


def input_variance(node: FloatNode, x: np.ndarray) -> np.ndarray:
    """Variance of what each weight of an output is multiplied with, (group, K).

    x : float32 array (pictures, C, H, W)
    """
    assert node.weight is not None
    _, kh, kw, in_group = node.weight.shape
    # Of a pixel that is padded now and then the variance is nearly that of one that never is.
    variance = x.var(axis=(0, 2, 3), dtype=np.float64).reshape(-1, 1, in_group)
    return np.tile(variance, (1, kh * kw, 1)).reshape(len(variance), -1)


class _Places:
    """Randomly chosen positions of a convolution's outputs, the same in both networks.

    Of a ConvTranspose they are positions of its input.
    """

    def __init__(self, node: FloatNode, size: tuple[int, ...], most: int) -> None:
        assert node.weight is not None
        height, width = size
        self.kernel = self.strides = self.dilations = (1, 1)
        self.begin = (0, 0)
        self.extent = (height, width)
        if node.op == "Conv":
            a = node.attributes
            self.kernel, self.begin = node.weight.shape[1:3], (a["pads"][0], a["pads"][1])
            self.strides, self.dilations = a["strides"], a["dilations"]
            top, left, bottom, right = a["pads"]
            rows, columns = (
                (size + pads - d * (k - 1) - 1) // stride + 1
                for size, pads, d, k, stride in zip(
                    (height, width), (top + bottom, left + right), self.dilations, self.kernel,
                    self.strides, strict=True,
                )
            )  # fmt: skip
            self.extent = rows, columns
        self.count = min(most, self.extent[0] * self.extent[1])
        self._begins: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def gather(
        self,
        quantized: Inputs,
        exact: Inputs | None,
        pictures: range,
        channels: slice,
        origin: np.ndarray,
        threads: int,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what weights are multiplied with, less `origin`, and what was taken from it.

        Both are float32 (groups, pictures * positions, taps * in_group).
        """
        groups, _, size = origin.shape
        in_group = (channels.stop - channels.start) // groups
        shape = (groups, len(pictures), self.count, size)
        columns = np.empty(shape, np.float32)
        taken = None if exact is None else np.empty(shape, np.float32)

        def fill(index: int) -> None:
            found = self.columns(quantized, pictures[index], channels, in_group)
            if exact is not None and taken is not None:
                whole = self.columns(exact, pictures[index], channels, in_group)
                np.subtract(whole, found, out=taken[:, index])
            np.subtract(found, origin, out=columns[:, index])

        spread(fill, range(len(pictures)), threads)
        flat = groups, -1, size
        return columns.reshape(flat), None if taken is None else taken.reshape(flat)

    def columns(self, inputs: Inputs, picture: int, channels: slice, in_group: int) -> np.ndarray:
        """Return what weights are multiplied with, float32 (groups, positions, taps * in_group)."""
        rows, columns = self._chosen(picture)
        q = inputs.quantization
        zero, scale = (0.0, 1.0) if q is None else (q.zero_point, q.scale)
        x = inputs.values[picture, channels]
        kh, kw = self.kernel
        found = np.empty((len(x) // in_group, self.count, kh * kw, in_group), np.float32)
        _gather(
            np.ascontiguousarray(x), rows, columns, kh, kw, self.dilations[0], self.dilations[1],
            np.float32(zero), np.float32(scale), found,
        )  # fmt: skip
        return found.reshape(len(found), self.count, -1)

    def _chosen(self, picture: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the windows of a picture begin, the same for all groups."""
        if (found := self._begins.get(picture)) is None:
            rng = np.random.default_rng(picture)
            chosen = rng.choice(self.extent[0] * self.extent[1], self.count, replace=False)
            rows, columns = np.divmod(chosen, self.extent[1])
            found = self._begins[picture] = (
                rows * self.strides[0] - self.begin[0],
                columns * self.strides[1] - self.begin[1],
            )
        return found


@njit(cache=True, nogil=True, error_model="numpy")
def _gather(x, rows, columns, kh, kw, dilation_h, dilation_w, zero, scale, found):
    """Copy the windows at some positions; what is outside of the picture is 0."""
    groups, count, _, in_group = found.shape
    for g in range(np.uintp(groups)):
        for c in range(np.uintp(in_group)):  # one after the other: each fits into a cache
            channel = x[g * np.uintp(in_group) + c]
            for n in range(np.uintp(count)):
                tap = np.uintp(0)
                for down in range(kh):
                    row = rows[n] + down * dilation_h
                    within = 0 <= row < channel.shape[0]
                    line = channel[np.uintp(row if within else 0)]
                    for right in range(kw):
                        column = columns[n] + right * dilation_w
                        value = np.float32(0)
                        if within and 0 <= column < channel.shape[1]:
                            value = (np.float32(line[np.uintp(column)]) - zero) * scale
                        found[g, n, tap, c] = value
                        tap += np.uintp(1)


def encode_alone(
    weight: np.ndarray, settings: Settings, ratio: float, group: int = 1
) -> LogWeights:
    """Quantize the weights of one layer, each by itself."""
    return encode(
        weight, settings.weight_bits, ratio, granularity=settings.granularity,
        tile=settings.tile, residual_shift=settings.residual_shift, group=group,
    )  # fmt: skip


def encode_layer(
    node: FloatNode,
    quantized: Inputs,
    exact: Inputs,
    settings: Settings,
    ratio: float,
    more: np.ndarray | None = None,
) -> LogWeights:
    """Quantize the weights of one layer.

    Parameters
    ----------
    node : FloatNode
    quantized, exact : Inputs
        Of the node, in the quantized network and in the float one.
    settings : Settings
    ratio : float
        `residual_ratio` of this layer.
    more : float32 array (group, K, K), optional
        Added to the covariance: that of other nodes with these weights.

    Notes
    -----
    Of groups whose covariances are too many, some are quantized at a time, each with `ratio`.
    """
    assert node.weight is not None
    size, group = node.weight[0].size, node.attributes["group"]
    together = group if more is not None else min(group, max(1, _TOGETHER // size**2))
    if together < group and node.weight.shape[3] == 1 and isinstance(settings.tile, tuple):
        # A tile has outputs of several groups.
        together -= together % _groups_of_tiles(settings.tile, len(node.weight) // group)
    if not settings.error_feedback or size > MOST_INPUTS or not together:
        return encode_alone(node.weight, settings, ratio, group)
    parts = []
    for begin in range(0, group, together):
        groups = slice(begin, min(begin + together, group))
        found = covariance(node, quantized, exact, settings.bias_correction, groups)
        moments = found.moments if more is None else found.moments + more[groups]
        weight = node.weight.reshape(group, -1, *node.weight.shape[1:])[groups]
        weight = weight.reshape(-1, *weight.shape[2:])
        count = len(moments)
        parts.append(encode_with_feedback(weight, moments, found.lost, settings, ratio, count))
    if len(parts) == 1:
        return parts[0]
    first, second, alpha = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("first", "second", "alpha")
    )
    return replace(parts[0], first=first, second=second, alpha=alpha)


def _groups_of_tiles(tile: tuple[int, int], outputs: int) -> int:
    """Return how many groups of so many outputs are whole tiles, of one input for each output."""
    return tile[1] // math.gcd(tile[1], outputs)


def encode_with_feedback(
    weight: np.ndarray,
    moments: np.ndarray,
    lost: np.ndarray,
    settings: Settings,
    ratio: float,
    group: int = 1,
) -> LogWeights:
    """Quantize the weights of one layer.

    First they are fitted so that, on quantized inputs, the layer's outputs come near those of the
    float network: what rounding has done to the inputs can be made up for as far as it goes
    together with them.

    Parameters
    ----------
    weight : float32 array (O, kh, kw, C / group)
    moments : float array (group, K, K)
    lost : float64 array (group, O / group, K)
        See `Covariance`.
    settings : Settings
    ratio : float
        `residual_ratio` of this layer.
    group : int
        Groups that no tile of an array straddles; a constant has one, whatever reads it.

    Returns
    -------
    LogWeights
    """
    if not (np.isfinite(moments).all() and np.isfinite(lost).all()):
        return encode_alone(weight, settings, ratio, group)
    return _Rounding(weight, moments, lost, settings, ratio, group).run()


class _Rounding:
    """Words of one layer, found so that its outputs lose least.

    Attributes
    ----------
    target : float64 array (group, O / group, K)
        The weights, fitted to quantized inputs.
    alpha : float32 array (group, O / group)
    first, second : uint8 arrays (group, O / group, K)
    gain : float64 array (group, O / group, K)
        What second words take, or would take, from the error of outputs.
    """

    def __init__(
        self,
        weight: np.ndarray,
        moments: np.ndarray,
        lost: np.ndarray,
        settings: Settings,
        ratio: float,
        group_of_tiles: int,
    ) -> None:
        self.settings, self.ratio, self.group_of_tiles = settings, ratio, group_of_tiles
        parts = _parts(len(moments), len(moments))
        tasks: list[Callable[[], Any]] = [
            partial(encode_alone, weight, settings, ratio, group_of_tiles),
            *(partial(_updates, moments[part]) for part in parts),
        ]
        self.plain: LogWeights
        self.plain, *found = spread(lambda find: find(), tasks, default_threads())
        order, self.update = (np.concatenate(each) for each in zip(*found, strict=True))
        plain, group = self.plain, len(moments)
        self.moments, self.order = _damped(moments, _DAMPING), order[:, None]
        self.target = weight.reshape(group, -1, moments.shape[1]).astype(np.float64)
        if lost.any():
            made_up_for = np.take_along_axis(lost, self.order, axis=2)
            made_up_for = made_up_for @ self.update.transpose(0, 2, 1) @ self.update
            self.target += _back(made_up_for, self.order)
        self.alpha = plain.alpha.reshape(group, -1)
        self.first, self.second, gain = (
            values.reshape(self.target.shape)
            for values in (
                plain.first,
                plain.second,
                gains(weight, plain.alpha, plain.bits, plain.residual_shift, plain.clip),
            )
        )
        left = np.diagonal(self.update, axis1=1, axis2=2)
        self.gain: np.ndarray = gain / np.square(_back(left[:, None], self.order))
        # Groups, or outputs of one group, that are worked on at the same time.
        axis = group if group > 1 else len(weight)
        step = max(1, _PART * axis // weight.size)
        some = [slice(begin, begin + step) for begin in range(0, axis, step)]
        every = slice(None)
        self.parts = [(part, every) if group > 1 else (every, part) for part in some]

    def run(self) -> LogWeights:
        """Round in turn, then with larger alphas as well, then each weight again."""
        for _ in range(_PASSES):
            self._in_turn((1.0,))
        self._in_turn(_LARGER)
        self._again()
        return self._words()

    def _words(self) -> LogWeights:
        shape, alpha = self.plain.first.shape, self.alpha.reshape(-1)
        first, second = self.first.reshape(shape), self.second.reshape(shape)
        return replace(self.plain, first=first, second=second, alpha=alpha)

    def _in_turn(self, factors: Sequence[float]) -> None:
        """Round column by column, with the best of some multiples of alpha for every output."""
        allowed, least = self._choice()
        first, second, gain = (np.empty_like(x) for x in (self.first, self.second, self.gain))
        alpha, plain = self.alpha.copy(), self.plain

        def work(part: tuple[slice, slice]) -> None:
            order, update = self.order[part[0]], self.update[part[0]]
            ordered, permitted = (
                np.take_along_axis(values[part], order, axis=2) for values in (self.target, allowed)
            )
            best = np.full(alpha[part].shape, np.inf)
            for factor in factors:
                tried = self.alpha[part] * np.float32(factor)
                *found, error = round_in_turn(
                    ordered, update, tried, plain.bits, plain.residual_shift, plain.clip,
                    permitted, least,
                )  # fmt: skip
                cost = error + least * np.count_nonzero(found[1], axis=2)
                better = cost < best
                best[better], alpha[part][better] = cost[better], tried[better]
                for target, values in zip((first, second, gain), found, strict=True):
                    target[part][better] = _back(values, order)[better]

        spread(work, self.parts, default_threads())
        self.first, self.second, self.gain, self.alpha = first, second, gain, alpha

    def _again(self) -> None:
        """Round each weight again and again for what all others of its output lose."""
        plain, levels = self.plain, exponent_levels(self.plain.bits)
        w, slope = np.empty_like(self.target), np.empty_like(self.target)
        integers = self._words().integers().reshape(w.shape)
        unit = np.float32(0.5 ** (levels - 1 + plain.residual_shift))

        def begin(part: tuple[slice, slice]) -> None:
            moments = self.moments[part[0]]
            w[part] = integers[part] * (self.alpha[part] * unit)[..., None]
            slope[part] = w[part] @ moments
            wanted = self.target[part] @ moments
            # The alpha that suits the words best.
            power = (slope[part] * w[part]).sum(axis=2)
            shared = (wanted * w[part]).sum(axis=2)
            suits = np.divide(shared, power, out=np.ones_like(power), where=power > 0)
            self.alpha[part] *= suits.clip(*_SUITABLE).astype(np.float32)
            w[part] = integers[part] * (self.alpha[part] * unit)[..., None]
            slope[part] = w[part] @ moments - wanted

        def work(allowed: np.ndarray, least: float, part: tuple[slice, slice]) -> None:
            round_again(
                w[part], slope[part], self.moments[part[0]], self.alpha[part], levels,
                plain.residual_shift, plain.clip, allowed[part], least, self.first[part],
                self.second[part], self.gain[part],
            )  # fmt: skip

        spread(begin, self.parts, default_threads())
        for allowed, least in self._choices():
            spread(partial(work, allowed, least), self.parts, default_threads())

    def _choices(self) -> Iterator[tuple[np.ndarray, float]]:
        """Yield which weights may have second words, and what these must gain, time after time."""
        yield self.second != 0, 0.0
        for _ in range(_CHOSEN_ANEW):
            yield self._choice()
        # The gains that led to the choice were those of the time before: now there are no more.
        chosen = self._blocks(select)
        for _ in range(_KEPT):
            yield chosen, 0.0

    def _choice(self) -> tuple[np.ndarray, float]:
        """Say which weights may have second words, and the least gain for as many as allowed."""
        allowed = self._blocks(eligible)
        if self.settings.granularity != "element":
            return allowed, 0.0
        some = np.full(allowed.shape, self.ratio > 0)
        return some, float(self.gain[~allowed].max(initial=0.0))

    def _blocks(self, choose: Callable[..., np.ndarray]) -> np.ndarray:
        """Choose by what second words gain now."""
        s, gain = self.settings, self.gain.reshape(self.plain.shape)
        chosen = choose(gain, self.ratio, s.granularity, s.tile, self.group_of_tiles)
        return chosen.reshape(self.gain.shape)


def _back(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Undo `take_along_axis` of the last axis."""
    result = np.empty_like(values)
    np.put_along_axis(result, order, values, axis=-1)
    return result


def _damped(moments: np.ndarray, share: float) -> np.ndarray:
    """Add a share of the mean variance to all variances: then there is an inverse."""
    # Of what hardly varies rounding makes some negative.
    variances = np.maximum(np.diagonal(moments, axis1=1, axis2=2), 0)
    mean = variances.mean(axis=1, dtype=np.float64)
    mean[mean == 0] = 1
    damped = moments.astype(np.float64)
    np.einsum("gkk->gk", damped)[...] = variances + share * mean[:, None]
    return damped


def _updates(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders (group, K) in which columns are rounded; updates: upper factors of the inverses."""
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")
    # Group by group: of large ones there are few.
    ordered = np.stack([m[np.ix_(turn, turn)] for m, turn in zip(moments, order, strict=True)])
    try:
        return order, _factors(ordered, _DAMPING)
    except np.linalg.LinAlgError:  # rounding has made a small variance negative, somewhere
        return order, np.concatenate([_factor(each[None]) for each in ordered])


def _factor(moments: np.ndarray) -> np.ndarray:
    damping = _DAMPING
    while True:
        try:
            return _factors(moments, damping)
        except np.linalg.LinAlgError:
            damping *= 10


def _factors(moments: np.ndarray, damping: float) -> np.ndarray:
    """Return upper triangular U with U^T U = C^-1, for covariances C (group, K, K).

    Of C with rows and columns in reverse order, Cholesky's factor L is the reverse of U^-1: that
    spares the inverse of C.
    """
    lower = np.linalg.cholesky(_damped(moments, damping)[:, ::-1, ::-1])
    return _inverse(lower)[:, ::-1, ::-1].copy()


def _inverse(lower: np.ndarray) -> np.ndarray:
    """Return the inverse of lower triangular matrices (group, K, K)."""
    size = lower.shape[1]
    if size <= _TRIANGLE:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:, :half, :half] = _inverse(lower[:, :half, :half])
    inverse[:, half:, half:] = _inverse(lower[:, half:, half:])
    product = inverse[:, half:, half:] @ lower[:, half:, :half]
    inverse[:, half:, :half] = -product @ inverse[:, :half, :half]
    return inverse
