"""What float32 kernels compute, in plain NumPy; pictures are (N, H, W, C), sums are in float64."""

from __future__ import annotations

import math

import numpy as np


def padded(x, pads, value=0.0):
    """Put a border (top, left, bottom, right) around x."""
    top, left, bottom, right = pads
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=value)


def windows(x, kernel, strides, dilations):
    """Yield, tap by tap, what all outputs read: ((ky, kx), x of that tap)."""
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    height, width = ((x.shape[1 + i] - extent[i]) // strides[i] + 1 for i in (0, 1))
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            row, column = ky * dilations[0], kx * dilations[1]
            yield (
                (ky, kx),
                x[
                    :,
                    row : row + (height - 1) * strides[0] + 1 : strides[0],
                    column : column + (width - 1) * strides[1] + 1 : strides[1],
                ],
            )


def conv(x, weights, bias, strides, dilations, group, pads, residual=None):
    """Convolve in float64; also returns the sum of magnitudes, which bounds the error."""
    x = padded(x.astype(np.float64), pads)
    out, kh, kw, in_group = weights.shape
    total = magnitude = 0.0
    for (ky, kx), part in windows(x, (kh, kw), strides, dilations):
        grouped = part.reshape(*part.shape[:3], group, in_group)
        w = weights[:, ky, kx].reshape(group, out // group, in_group).astype(np.float64)
        total = total + np.einsum("nijgc,goc->nijgo", grouped, w)
        magnitude = magnitude + np.einsum("nijgc,goc->nijgo", abs(grouped), abs(w))
    shape = (*total.shape[:3], out)
    total, magnitude = total.reshape(shape) + bias, magnitude.reshape(shape) + abs(bias)
    if residual is not None:
        total, magnitude = total + residual, magnitude + abs(residual)
    return total, magnitude


def pool_max(x, kernel, strides, dilations, pads):
    """Largest value of every window; what is not in the picture is none."""
    taps = windows(padded(x, pads, -np.inf), kernel, strides, dilations)
    return np.max([part for _, part in taps], axis=0)


def pool_average(x, kernel, strides, dilations, pads, count_pads):
    """Mean of every window in float64."""
    total = sum(
        p for _, p in windows(padded(x.astype(np.float64), pads), kernel, strides, dilations)
    )
    ones = padded(np.ones_like(x, np.float64), pads, float(count_pads))
    count = sum(p for _, p in windows(ones, kernel, strides, dilations))
    return total / np.maximum(count, 1)


def unary(name, x, alpha, beta):
    """Apply a function of `functions.UNARY_FUNCTIONS` in float64."""
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
        hard = np.clip(alpha * x + beta, 0, 1)
        return {
            "clip": np.clip(x, alpha, beta), "leaky_relu": np.where(x >= 0, x, alpha * x),
            "sigmoid": sigmoid, "hard_sigmoid": hard, "hard_swish": x * hard, "silu": x * sigmoid,
            "tanh": np.tanh(x), "elu": np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))),
            "gelu": x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        }[name]  # fmt: skip
