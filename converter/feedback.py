"""Rounding with error feedback: weights that are rounded later make up for those before them.

Weights of an output channel are rounded one after the other. What one loses is spread over those
still to come so that the channel's outputs change least, as far as its inputs go together on
calibration data. This is the order and the update of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023), on
the grids of `docs/quantization.md` and with the choice of second words inside: their gain is what
they take from the error of outputs, not of weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from logshift.converter.encode import eligible, encode, gains, round_in_turn, select
from logshift.converter.evaluate import Fetch
from logshift.converter.float_graph import FloatNode
from logshift.converter.settings import Settings
from logshift.kernels.stlq.codec import LogWeights

_DAMPING = 0.01  # of the mean variance: inputs that never vary must not break the inverse
# Of the mean variance, in the fit to what the float network computes: few samples must not rule.
_CAUTION = 0.3
_PASSES = 3  # the choice of second words and the errors it leaves depend on each other
# Weights of an output: the memory of their covariance, and the time of its inverse, have an end.
MOST_INPUTS = 8192
_SAMPLES_PER_INPUT = 3
_FEWEST_SAMPLES = 4096
_ELEMENTS = 2**23  # of inputs that are multiplied together


def covariance(
    node: FloatNode, fetch: Fetch, fetch_exact: Fetch, count: int, center: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Covariance of what the weights of an output are multiplied with.

    Parameters
    ----------
    node : FloatNode
        A Conv or ConvTranspose. Of the latter, inputs of different taps count as independent.
    fetch, fetch_exact : callable(rows) -> inputs
        Of the node for these pictures, in the quantized network and in the float one.
    count : int
        Number of pictures.
    center : bool
        Whether the mean is taken away; else these are second moments.

    Returns
    -------
    moments : float64 array (group, K, K), K = kh * kw * C / group in the order of the weights
        Of the quantized inputs.
    cross : float64 array (group, K, K)
        Of what quantization took from the inputs (rows), with the quantized inputs (columns).
    """
    assert node.weight is not None
    _, kh, kw, in_group = node.weight.shape
    group = node.attributes["group"]
    patches = kh * kw if node.op == "Conv" else 1
    size = patches * in_group
    wanted = max(_FEWEST_SAMPLES, _SAMPLES_PER_INPUT * size)
    per_picture = -(-wanted // count)
    moments, cross = (np.zeros((group, size, size)) for _ in range(2))
    mean, lost = (np.zeros((group, size)) for _ in range(2))
    samples = 0

    def columns_of(fetch: Fetch, picture: int) -> np.ndarray:
        x = fetch(slice(picture, picture + 1))[0][0]
        # The same positions in both networks.
        columns = _columns(node, x, per_picture, np.random.default_rng(picture))
        columns = columns.reshape(len(columns), patches, group, in_group).transpose(2, 0, 1, 3)
        return columns.reshape(group, -1, size).astype(np.float32)

    # Around the first picture's mean: what varies little, far from zero, would drown in rounding.
    origin = np.zeros((group, 1, size), np.float32)
    if center:
        origin = columns_of(fetch, 0).mean(axis=1, keepdims=True)
    together = max(1, _ELEMENTS // (per_picture * group * size))
    for begin in range(0, count, together):
        pictures = range(begin, min(begin + together, count))
        columns, exact = (
            np.concatenate([columns_of(f, picture) for picture in pictures], axis=1)
            for f in (fetch, fetch_exact)
        )
        taken = exact - columns
        columns = columns - origin
        moments += columns.transpose(0, 2, 1) @ columns
        cross += taken.transpose(0, 2, 1) @ columns
        mean += columns.sum(axis=1)
        lost += taken.sum(axis=1)
        samples += columns.shape[1]
    for total in (moments, cross, mean, lost):
        total /= samples
    if center:
        moments -= mean[:, :, None] * mean[:, None, :]
        cross -= lost[:, :, None] * mean[:, None, :]
    if node.op == "Conv":
        return moments, cross
    return _independent(moments, kh * kw), _independent(cross, kh * kw)


def _independent(matrices: np.ndarray, taps: int) -> np.ndarray:
    """Put each matrix (C, C) on the diagonal once for every tap."""
    group, size, _ = matrices.shape
    blocks = np.zeros((group, taps, size, taps, size))
    for tap in range(taps):
        blocks[:, tap, :, tap] = matrices
    return blocks.reshape(group, taps * size, -1)


def input_variance(node: FloatNode, x: np.ndarray) -> np.ndarray:
    """Variance of what each weight of an output is multiplied with, (group, K).

    x : float32 array (pictures, C, H, W)
    """
    assert node.weight is not None
    _, kh, kw, in_group = node.weight.shape
    # Of a pixel that is padded now and then the variance is nearly that of one that never is.
    variance = x.var(axis=(0, 2, 3), dtype=np.float64).reshape(-1, 1, in_group)
    return np.tile(variance, (1, kh * kw, 1)).reshape(len(variance), -1)


def _columns(node: FloatNode, x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return inputs (C, H, W) of randomly chosen positions as (positions, taps, C)."""
    assert node.weight is not None
    channels, height, width = x.shape
    if node.op == "ConvTranspose":
        chosen = rng.choice(height * width, min(count, height * width), replace=False)
        return x.reshape(channels, -1)[:, chosen].T[:, None]
    _, kh, kw, _ = node.weight.shape
    a = node.attributes
    (stride_h, stride_w), (dilation_h, dilation_w) = a["strides"], a["dilations"]
    top, left, bottom, right = a["pads"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    rows = (padded.shape[1] - dilation_h * (kh - 1) - 1) // stride_h + 1
    columns = (padded.shape[2] - dilation_w * (kw - 1) - 1) // stride_w + 1
    chosen = rng.choice(rows * columns, min(count, rows * columns), replace=False)
    i = chosen // columns * stride_h
    j = chosen % columns * stride_w
    row, column = np.divmod(np.arange(kh * kw), kw)
    i = i[:, None] + row * dilation_h
    j = j[:, None] + column * dilation_w
    return padded[:, i, j].transpose(1, 2, 0)


def encode_alone(weight: np.ndarray, settings: Settings, ratio: float) -> LogWeights:
    """Quantize the weights of one layer, each by itself."""
    return encode(
        weight, settings.weight_bits, ratio, granularity=settings.granularity,
        tile=settings.tile, residual_shift=settings.residual_shift,
    )  # fmt: skip


def encode_with_feedback(
    weight: np.ndarray, moments: np.ndarray, cross: np.ndarray, settings: Settings, ratio: float
) -> LogWeights:
    """Quantize the weights of one layer.

    First they are fitted so that, on quantized inputs, the layer's outputs come near those of the
    float network: what rounding has done to the inputs can be made up for as far as it goes
    together with them.

    Parameters
    ----------
    weight : float32 array (O, kh, kw, C / group)
    moments, cross : float64 arrays (group, K, K), see `covariance`
    settings : Settings
    ratio : float
        `residual_ratio` of this layer.

    Returns
    -------
    LogWeights
    """
    plain = encode_alone(weight, settings, ratio)
    o, group = len(weight), len(moments)
    matrix = weight.reshape(group, o // group, -1).astype(np.float64)
    for g in range(group):
        matrix[g] += matrix[g] @ cross[g] @ np.linalg.inv(_damped(moments[g], _CAUTION))
    alpha = plain.alpha.reshape(group, -1)
    updates = [_update(m) for m in moments]
    gain = gains(weight, plain.alpha, plain.bits, plain.residual_shift, plain.clip)
    gain = gain.reshape(matrix.shape)
    for g, (order, update) in enumerate(updates):
        gain[g][:, order] /= np.diag(update) ** 2
    first, second = (np.empty(matrix.shape, np.uint8) for _ in range(2))
    for _ in range(_PASSES):
        allowed, least = _choice(gain, ratio, settings)
        for g, (order, update) in enumerate(updates):
            first[g][:, order], second[g][:, order], gain[g][:, order] = round_in_turn(
                matrix[g][:, order], update, alpha[g], plain.bits, plain.residual_shift,
                plain.clip, allowed[g][:, order], least,
            )  # fmt: skip
    if settings.granularity == "element":
        # The gains that led to the choice were those of the pass before.
        second[~select(gain.reshape(o, -1), ratio).reshape(gain.shape)] = 0
    return replace(plain, first=first.reshape(weight.shape), second=second.reshape(weight.shape))


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
    mean = max(float(np.diag(moments).mean()), 0.0) or 1.0
    return moments + share * mean * np.eye(len(moments))


def _update(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order in which columns are rounded, and the update: upper factor of the inverse."""
    order = np.argsort(-np.diag(moments), kind="stable")
    ordered, damping = moments[np.ix_(order, order)], _DAMPING
    while True:
        inverse = np.linalg.inv(_damped(ordered, damping))
        try:
            return order, np.linalg.cholesky((inverse + inverse.T) / 2).T.copy()
        except np.linalg.LinAlgError:  # rounding has made a small variance negative
            damping *= 10
