"""Rounding with error feedback: weights that are rounded later make up for those before them.

Weights of an output channel are rounded one after the other. What one loses is spread over those
still to come so that the channel's outputs change least, as far as its inputs go together on
calibration data. This is the order and the update of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023), on
the grids of `docs/quantization.md` and with the choice of second words inside: their gain is what
they take from the error of outputs, not of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from logshift.converter.encode import eligible, encode, gains, round_in_turn, select
from logshift.converter.float_graph import FloatNode
from logshift.converter.settings import Settings
from logshift.kernels.machine.jit import njit
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.graph import Quantization

_DAMPING = 0.01  # of the mean variance: inputs that never vary must not break the inverse
# Of the mean variance, in the fit to what the float network computes: few samples must not rule.
_CAUTION = 0.3
_PASSES = 3  # the choice of second words and the errors it leaves depend on each other
# Weights of an output: the memory of their covariance, and the time of its inverse, have an end.
MOST_INPUTS = 8192
_TOGETHER = 2**25  # values of covariances of groups that are quantized together
_SAMPLES_PER_INPUT = 3
_FEWEST_SAMPLES = 4096
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
    group = node.attributes["group"]
    weight = node.weight.reshape(group, -1, kh * kw * in_group)[groups]
    # Of a ConvTranspose, what goes together does at one tap.
    taps = kh * kw if node.op == "Conv" else 1
    size, parts = taps * in_group, weight.shape[2] // (taps * in_group)
    first, count = groups.indices(group)[0], len(quantized.values)
    wanted = max(_FEWEST_SAMPLES, _SAMPLES_PER_INPUT * size)
    places = _Places(node, quantized.values.shape[2:], -(-wanted // count))

    def columns_of(inputs: Inputs, picture: int) -> np.ndarray:
        return places.columns(inputs, picture, slice(first, first + len(weight)), in_group)

    moments = np.zeros((len(weight), size, size), np.float32)
    lost = np.zeros((len(weight), weight.shape[1], parts, size))
    mean, mean_lost = np.zeros((len(weight), size)), np.zeros(lost.shape[:3])
    # Around the first picture's mean: what varies little, far from zero, would drown in rounding.
    origin = np.zeros((len(weight), 1, size), np.float32)
    if center:
        origin = columns_of(quantized, 0).mean(axis=1, keepdims=True)
    of_taps = weight.reshape(len(weight), -1, size).transpose(0, 2, 1)
    samples = 0
    together = max(1, _ELEMENTS // (places.count * len(weight) * size))
    for begin in range(0, count, together):
        pictures = range(begin, min(begin + together, count))
        columns = np.concatenate([columns_of(quantized, p) for p in pictures], axis=1)
        taken = None
        if exact is not None:
            taken = np.concatenate([columns_of(exact, p) for p in pictures], axis=1) - columns
        columns -= origin
        for g, own in enumerate(columns):  # one at a time: BLAS knows that the product is symmetric
            moments[g] += own.T @ own
        mean += columns.sum(axis=1, dtype=np.float64)
        if taken is not None:
            outputs = taken @ of_taps
            lost += (outputs.transpose(0, 2, 1) @ columns).reshape(lost.shape)
            mean_lost += outputs.sum(axis=1, dtype=np.float64).reshape(mean_lost.shape)
        samples += columns.shape[1]
    moments /= samples
    for total in (lost, mean, mean_lost):
        total /= samples
    if center:
        moments -= mean[:, :, None] * mean[:, None, :]
        lost -= mean_lost[..., None] * mean[:, None, None, :]
        mean += origin[:, 0]
    return Covariance(
        _independent(moments, parts),
        lost.reshape(weight.shape),
        np.tile(mean, (1, parts)),
    )


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

    def columns(self, inputs: Inputs, picture: int, groups: slice, in_group: int) -> np.ndarray:
        """Return what weights are multiplied with, float32 (groups, positions, taps * in_group)."""
        rng = np.random.default_rng(picture)
        chosen = rng.choice(self.extent[0] * self.extent[1], self.count, replace=False)
        rows, columns = np.divmod(chosen, self.extent[1])
        q = inputs.quantization
        zero, scale = (0.0, 1.0) if q is None else (q.zero_point, q.scale)
        x = inputs.values[picture, groups.start * in_group : groups.stop * in_group]
        kh, kw = self.kernel
        found = np.empty((groups.stop - groups.start, self.count, kh * kw, in_group), np.float32)
        _gather(
            np.ascontiguousarray(x), rows * self.strides[0] - self.begin[0],
            columns * self.strides[1] - self.begin[1], kh, kw, self.dilations[0],
            self.dilations[1], np.float32(zero), np.float32(scale), found,
        )  # fmt: skip
        return found.reshape(len(found), self.count, -1)


@njit(cache=True, nogil=True, error_model="numpy")
def _gather(x, rows, columns, kh, kw, dilation_h, dilation_w, zero, scale, found):
    """Copy the windows at some positions; what is outside of the picture is 0."""
    groups, count, _, in_group = found.shape
    for g in range(np.uintp(groups)):
        for c in range(np.uintp(in_group)):  # one after the other: each fits into a cache
            channel = x[g * np.uintp(in_group) + c]
            for tap in range(kh * kw):
                down, right = tap // kw * dilation_h, tap % kw * dilation_w
                for n in range(np.uintp(count)):
                    row, column = rows[n] + down, columns[n] + right
                    value = np.float32(0)
                    if 0 <= row < channel.shape[0] and 0 <= column < channel.shape[1]:
                        pixel = channel[np.uintp(row), np.uintp(column)]
                        value = (np.float32(pixel) - zero) * scale
                    found[g, n, np.uintp(tap), c] = value


def encode_alone(weight: np.ndarray, settings: Settings, ratio: float) -> LogWeights:
    """Quantize the weights of one layer, each by itself."""
    return encode(
        weight, settings.weight_bits, ratio, granularity=settings.granularity,
        tile=settings.tile, residual_shift=settings.residual_shift,
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
    if not settings.error_feedback or size > MOST_INPUTS:
        return encode_alone(node.weight, settings, ratio)
    together = group if more is not None else max(1, _TOGETHER // size**2)
    parts = []
    for begin in range(0, group, together):
        groups = slice(begin, min(begin + together, group))
        found = covariance(node, quantized, exact, settings.bias_correction, groups)
        moments = found.moments if more is None else found.moments + more[groups]
        weight = node.weight.reshape(group, -1, *node.weight.shape[1:])[groups]
        weight = weight.reshape(-1, *weight.shape[2:])
        parts.append(encode_with_feedback(weight, moments, found.lost, settings, ratio))
    if len(parts) == 1:
        return parts[0]
    first, second, alpha = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("first", "second", "alpha")
    )
    return replace(parts[0], first=first, second=second, alpha=alpha)


def encode_with_feedback(
    weight: np.ndarray, moments: np.ndarray, lost: np.ndarray, settings: Settings, ratio: float
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

    Returns
    -------
    LogWeights
    """
    plain = encode_alone(weight, settings, ratio)
    if not (np.isfinite(moments).all() and np.isfinite(lost).all()):
        return plain
    o, group = len(weight), len(moments)
    matrix = weight.reshape(group, o // group, -1).astype(np.float64)
    if lost.any():
        fit = np.linalg.solve(_damped(moments, _CAUTION), lost.transpose(0, 2, 1))
        matrix += fit.transpose(0, 2, 1)
    alpha = plain.alpha.reshape(group, -1)
    order, update = _updates(moments)
    gain = gains(weight, plain.alpha, plain.bits, plain.residual_shift, plain.clip)
    gain = gain.reshape(matrix.shape)
    turn = np.broadcast_to(order[:, None], matrix.shape)
    gain /= np.square(_back(np.diagonal(update, axis1=1, axis2=2)[:, None], order[:, None]))
    ordered = np.take_along_axis(matrix, turn, axis=2)
    for _ in range(_PASSES):
        allowed, least = _choice(gain, ratio, settings)
        found = round_in_turn(
            ordered, update, alpha, plain.bits, plain.residual_shift, plain.clip,
            np.take_along_axis(allowed, turn, axis=2), least,
        )  # fmt: skip
        first, second, gain = (_back(values, turn) for values in found)
    if settings.granularity == "element":
        # The gains that led to the choice were those of the pass before.
        second[~select(gain.reshape(o, -1), ratio).reshape(gain.shape)] = 0
    return replace(plain, first=first.reshape(weight.shape), second=second.reshape(weight.shape))


def _back(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Undo `take_along_axis` of the last axis."""
    result = np.empty_like(values)
    np.put_along_axis(result, order, values, axis=-1)
    return result


def _choice(
    gain: np.ndarray, residual_ratio: float, settings: Settings
) -> tuple[np.ndarray, float]:
    """Say which weights may have second words, and what these must gain for as many as allowed."""
    matrix = gain.reshape(-1, gain.shape[-1])
    allowed = eligible(matrix, residual_ratio, settings.granularity, settings.tile)
    if settings.granularity != "element":
        return allowed.reshape(gain.shape), 0.0
    return np.ones(gain.shape, bool), float(matrix[~allowed].max(initial=0.0))


def _damped(moments: np.ndarray, share: float) -> np.ndarray:
    """Add a share of the mean variance to all variances: then there is an inverse."""
    mean = np.maximum(np.diagonal(moments, axis1=1, axis2=2).mean(axis=1, dtype=np.float64), 0)
    mean[mean == 0] = 1
    damped = moments.astype(np.float64)
    np.einsum("gkk->gk", damped)[...] += share * mean[:, None]
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
