"""The definition of normalizations, in plain loops.

Sums are made in float64: 16 of every sixteenth element of an inner stretch, in their order, which
are joined in pairs that lie half of them apart; then those of the outer ones, in order.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import FLOAT, INT, OUTPUT, SCRATCH, TENSOR, record
from logshift.kernels.reference.onnx_ops import values
from logshift.kernels.registry import register

LANES = 16  # sums of a stretch
# What `kind` says: by variance, by the mean of squares; by the deviation; by the norm.
VARIANCE, SQUARES, DEVIATION, NORM = range(4)

# n sets of `height` groups of outer times inner elements, each group normalized by itself. Steps
# are in elements; those of scale and bias are within a set. Of means, and of what elements were
# multiplied by, there is one for each group; 0 is the address of what nobody wants.
ONNX_NORMALIZE = record(
    **OUTPUT, scale=TENSOR, bias=TENSOR, y_mean=TENSOR, y_inverse=TENSOR,
    outer=INT, inner=INT, kind=INT, epsilon=FLOAT,
    x_set=INT, x_group=INT, x_outer=INT, x_inner=INT,
    y_set=INT, y_group=INT, y_outer=INT, y_inner=INT,
    scale_group=INT, scale_outer=INT, scale_inner=INT,
    **SCRATCH,
)  # fmt: skip


@njit
def joined(lanes):
    """Join the sums of a stretch."""
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@njit(error_model="numpy")
def statistics(total, squares, count, kind, epsilon):
    """Return what is subtracted from all elements, and what they are multiplied by."""
    mean, square = total / count, squares / count
    if kind == NORM:
        norm = np.sqrt(squares)
        return np.float32(0), np.float32(0 if norm == 0 else 1 / norm)
    if kind == SQUARES:
        return np.float32(0), np.float32(1 / np.sqrt(square + np.float64(epsilon)))
    variance = square - mean * mean
    if variance < 0:
        variance = 0.0
    if kind == DEVIATION:
        return np.float32(mean), np.float32(1 / (np.sqrt(variance) + np.float64(epsilon)))
    return np.float32(mean), np.float32(1 / np.sqrt(variance + np.float64(epsilon)))


@njit
def _normalized(v, mean, inverse, a, place):
    return ((v - mean) * inverse) * values(a.scale)[place] + values(a.bias)[place]


@register("onnx_normalize", "reference", ONNX_NORMALIZE, scratch=lambda record: 16 * LANES)
def _normalize(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = values(a.x), values(a.y)
    sums = carray(as_pointer(a.scratch), (2, LANES), np.float64)
    for n in range(a.n):
        for g in range(a.height):
            p, q = n * a.x_set + g * a.x_group, n * a.y_set + g * a.y_group
            total = squares = 0.0
            for o in range(a.outer):
                sums[:] = 0
                for i in range(a.inner):
                    v = np.float64(x[p + o * a.x_outer + i * a.x_inner])
                    sums[0, i % LANES] += v
                    sums[1, i % LANES] += v * v
                total += joined(sums[0])
                squares += joined(sums[1])
            count = a.outer * a.inner
            mean, inverse = statistics(total, squares, count, a.kind, a.epsilon)
            if a.y_mean.data != 0:
                values(a.y_mean)[n * a.height + g] = mean
            if a.y_inverse.data != 0:
                values(a.y_inverse)[n * a.height + g] = inverse
            for o in range(a.outer):
                for i in range(a.inner):
                    place = g * a.scale_group + o * a.scale_outer + i * a.scale_inner
                    v = x[p + o * a.x_outer + i * a.x_inner]
                    y[q + o * a.y_outer + i * a.y_inner] = _normalized(v, mean, inverse, a, place)
