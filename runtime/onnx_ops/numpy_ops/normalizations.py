"""Values brought to a common scale: softmax, normalization by mean, variance or norm."""

from __future__ import annotations

import math

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import (
    Array,
    Call,
    Implementation,
    as_matrix,
    mean_of,
    widened,
)
from logshift.runtime.onnx_ops.numpy_ops.types import dtype_of


def _softmax(c: Call) -> Array:
    if c.opset < 13:
        # Of a matrix: all axes from `axis` on are one.
        return _softmax_of(c.op, as_matrix(c.x, c.get("axis", 1)), 1).reshape(c.x.shape)
    return _softmax_of(c.op, c.x, c.axis(-1))


def _softmax_of(op: str, x: Array, axis: int) -> Array:
    if x.size == 0:
        return x
    if op == "Hardmax":
        y = np.zeros_like(x)
        np.put_along_axis(y, np.expand_dims(np.argmax(x, axis), axis), 1, axis)
        return y
    y = x - np.max(x, axis=axis, keepdims=True)
    if op == "LogSoftmax":
        y -= np.log(np.sum(np.exp(y), axis=axis, keepdims=True))
    else:
        np.exp(y, out=y)
        y /= np.sum(y, axis=axis, keepdims=True)
    return y


def _standardised(c: Call, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return x with mean 0 and variance 1, its mean and what it was multiplied by."""
    x = widened(x)
    mean = mean_of(x, axes)
    y = x - mean
    inverse = 1 / np.sqrt(mean_of(y * y, axes) + x.dtype.type(c.get("epsilon", 1e-5)))
    y *= inverse
    return y, mean, inverse


def _scaled(c: Call, y: Array, scale: Array, bias: Array | None = None) -> Array:
    """Return y * scale + bias in the type of the input; y may be overwritten."""
    dtype = c.x.dtype
    if y.dtype != dtype or not y.flags.owndata:
        y = y.astype(dtype)
    y *= scale
    if bias is not None:
        y += bias
    return y


def _per_channel(values: Array, x: Array) -> Array:
    if x.ndim > 1 and values.shape != x.shape[1:2]:
        raise InputError(f"has {x.shape[1]} channels, but values for {values.shape}")
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def _batch_normalization(c: Call) -> Array:
    if c.get("training_mode", 0):
        raise InputError("is in training mode; export the model for inference")
    gamma, beta, mean, variance = (_per_channel(c.input(i), c.x) for i in range(1, 5))
    y = c.x - mean
    y *= gamma / np.sqrt(variance + c.get("epsilon", 1e-5))
    y += beta
    return y.astype(c.x.dtype, copy=False)


def _instance_normalization(c: Call) -> Array:
    y, _, _ = _standardised(c, c.x, tuple(range(2, c.x.ndim)))
    return _scaled(c, y, *(_per_channel(c.input(i), c.x) for i in (1, 2)))


def _group_normalization(c: Call) -> Array:
    x, groups = c.x, c.get("num_groups", 0)
    if groups < 1 or x.ndim < 2 or x.shape[1] % groups:
        raise InputError(f"cannot make {groups} groups of channels of the shape {x.shape}")
    parts = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    y = _standardised(c, parts, (2,))[0].reshape(x.shape)
    repeats = x.shape[1] // groups if c.opset < 21 else 1  # one value per group then
    return _scaled(c, y, *(_per_channel(np.repeat(c.input(i), repeats), x) for i in (1, 2)))


def _layer_normalization(c: Call) -> list[Array]:
    y, *statistics = _standardised(c, c.x, tuple(range(c.axis(-1), c.x.ndim)))
    dtype = dtype_of(c.get("stash_type", 1))
    y = _scaled(c, y, c.input(1), c.optional(2))
    return [y, *(v.astype(dtype, copy=False) for v in statistics)]


def _rms_normalization(c: Call) -> Array:
    x = widened(c.x)
    square = mean_of(x * x, tuple(range(c.axis(-1), x.ndim)))
    return _scaled(c, x / np.sqrt(square + x.dtype.type(c.get("epsilon", 1e-5))), c.input(1))


def _lp_normalization(c: Call) -> Array:
    p, axis = c.get("p", 2), c.axis(-1)
    norm = np.sum(np.abs(c.x) ** p, axis=axis, keepdims=True) ** (1 / p)
    return np.divide(c.x, norm, out=np.zeros_like(c.x), where=norm != 0).astype(c.x.dtype)


def _mean_variance_normalization(c: Call) -> Array:
    axes = tuple(c.get("axes", [0, 2, 3]))
    centred = c.x - mean_of(c.x, axes)
    deviation = np.sqrt(mean_of(centred * centred, axes))
    return centred / (deviation + c.x.dtype.type(1e-9))


def _local_response_normalization(c: Call) -> Array:
    x, size = c.x, c.get("size", 0)
    alpha, beta, bias = c.get("alpha", 1e-4), c.get("beta", 0.75), c.get("bias", 1.0)
    if size < 1 or x.ndim < 2:
        raise InputError(f"cannot take {size} channels of the shape {x.shape}")
    # Not beyond the channels that there are.
    before, after = min((size - 1) // 2, x.shape[1]), min(size // 2, x.shape[1])
    widths = [(0, 0)] * x.ndim
    widths[1] = (before, after)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x * x, widths), before + after + 1, 1)
    return (x / (bias + alpha / size * windows.sum(-1)) ** beta).astype(x.dtype)


OPERATORS: dict[str, Implementation] = {
    "BatchNormalization": _batch_normalization, "GroupNormalization": _group_normalization,
    "Hardmax": _softmax, "InstanceNormalization": _instance_normalization,
    "LRN": _local_response_normalization, "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax, "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "RMSNormalization": _rms_normalization, "Softmax": _softmax,
}  # fmt: skip
