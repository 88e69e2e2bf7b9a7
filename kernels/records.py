"""Argument records: what a kernel of each operation is told, and how it reads that.

Code tensors lie in memory as (N, H, W, C), C contiguous, with a border of the zero point around
each picture; a `TENSOR` record describes the whole buffer, `top` and `left` say where the picture
begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.native import as_pointer

TENSOR = np.dtype(
    [
        ("data", np.uintp),  # address of the buffer
        ("n", np.int64),
        ("h", np.int64),  # of the buffer, border included
        ("w", np.int64),
        ("c", np.int64),
        ("top", np.int64),  # first row and column of the picture itself
        ("left", np.int64),
    ]
)


def _record(**fields: Any) -> np.dtype:
    return np.dtype(list(fields.items()))


_SIZES = ("n", "height", "width", "channels")  # of the picture that is computed
_I, _F, _P = np.int64, np.float32, np.uintp
_OUTPUT = {"x": TENSOR, "y": TENSOR} | dict.fromkeys(_SIZES, _I)

# Output pixel (i, j) reads input rows row0 + i * stride_h + ky * dilation_h of the buffer (columns
# alike), and is written at row y.top + i * step_h: step is above 1 in a phase of ConvTranspose.
CONV = _record(
    **_OUTPUT,
    r=TENSOR,  # residual, of the geometry of y; unused without has_residual
    kernel_h=_I, kernel_w=_I, stride_h=_I, stride_w=_I, dilation_h=_I, dilation_w=_I,
    row0=_I, column0=_I, step_h=_I, step_w=_I,
    group=_I,
    bits=_I, residual_shift=_I,
    # What the kernel's `pack` laid out, each in a form of its own: weights, z_x * sum of W, M, B.
    weights=_P, offset=_P, m=_P, b=_P,
    block=_I, existing=_I,  # channels per block of the packed weights, and those that exist
    z_r=_I, m_r=_F, lo=_F, hi=_F,
    has_residual=_I, float_output=_I,
    scratch=_P, scratch_size=_I,  # bytes per slot
    # Byte-dot kernels: microkernel, its pixels, and its twin for single pixels or 0; SEGMENTs of
    # all blocks (microkernels); runs of blocks that one call takes (dot.CHUNK).
    tile=_P, pixels=_I, single=_P, segments=_P, x_step=_I, chunks=_P, chunk_count=_I,
    table=_P,  # uint8 (256,) that output codes go through at the end, or 0
    # Rows of a depthwise convolution: READS of windows and of all.
    window_count=_I, segment_count=_I,
    # Winograd: what makes differences of codes unsigned; steps of a position
    added=_I, steps=_I,
    # `shift` (chunks: what to make which rows of): sets of groups, int64 (sets, 2), their first
    # input and output channels; blocks of rows; where streams begin, int64
    sets=_P, set_count=_I, blocks=_I, positions=_P,
)  # fmt: skip
# Window as for CONV; rows below `low` and from `high` on hold no picture (padding).
POOL = _record(
    **_OUTPUT,
    kernel_h=_I, kernel_w=_I, stride_h=_I, stride_w=_I, dilation_h=_I, dilation_w=_I,
    row0=_I, column0=_I, low_h=_I, high_h=_I, low_w=_I, high_w=_I,
    # AveragePool: positions in [count_low, count_high) count, each worth z_x if not in the picture
    count_low_h=_I, count_high_h=_I, count_low_w=_I, count_high_w=_I,
    z_x=_I, m=_P, b=_F, lo=_F, hi=_F,  # m: float32, indexed by the count
    scratch=_P, scratch_size=_I,
)  # fmt: skip
# Operations on two tensors of codes. The pictures of x and r have these sizes; an axis of which a
# tensor has one position, where y has more, is repeated.
BINARY = _record(
    **_OUTPUT, r=TENSOR, x_height=_I, x_width=_I, r_height=_I, r_width=_I,
    z_x=_I, m=_F, b=_F, z_r=_I, m_r=_F, lo=_F, hi=_F,
    pixels=_I,  # that are computed together where a tensor is repeated along a row
    scratch=_P, scratch_size=_I,
)  # fmt: skip
# y[i, j, channel0_y + k] = table[x[row0 + i * stride_h, ..., channel0_x + k * stride_c]]
COPY = _record(
    **_OUTPUT,
    row0=_I, column0=_I, channel0_x=_I, stride_h=_I, stride_w=_I, stride_c=_I,
    row0_y=_I, column0_y=_I, channel0_y=_I,
    table=_P, has_table=_I,
)  # fmt: skip
# y[..., k] = x[..., indices[k]], int32; interleaved: indices[k + 2] is indices[k] + 1
GATHER = _record(**_OUTPUT, indices=_P, interleaved=_I)
# y[..., k] = tables[k][x[..., k]], uint8 (C, 256)
CHANNEL_LOOKUP = _record(**_OUTPUT, tables=_P)
FILL = _record(y=TENSOR, n=_I, height=_I, width=_I, channels=_I, value=_I)
# index0/index1 (int64) and weight1 (int64, of 2048) per output row, then per output column
RESIZE = _record(
    **_OUTPUT, linear=_I, row_index0=_P, row_index1=_P, row_weight=_P,
    column_index0=_P, column_index1=_P, column_weight=_P,
)  # fmt: skip
DEPTH_TO_SPACE = _record(**_OUTPUT, blocksize=_I, block_first=_I)  # block_first: mode DCR
# float32 (N, C, H, W) to codes and back
QUANTIZE = _record(**_OUTPUT, scale=_F, zero_point=_I, top=_I, scratch=_P, scratch_size=_I)
DEQUANTIZE = _record(**_OUTPUT, scale=_F, zero_point=_I)
# float32 (N, H, W, C) to (N, C, H, W) without a border, and back
TO_CHANNELS_FIRST = _record(**_OUTPUT)
TO_CHANNELS_LAST = _record(**_OUTPUT)

# Kernels of float32, whose tensors lie as codes do, inside a border of 0.0. What they share with
# those of codes is said there.
FLOAT_CONV = _record(
    **_OUTPUT,
    r=TENSOR,
    kernel_h=_I, kernel_w=_I, stride_h=_I, stride_w=_I, dilation_h=_I, dilation_w=_I,
    row0=_I, column0=_I, step_h=_I, step_w=_I,
    group=_I,
    lo=_F, hi=_F, has_residual=_I,
    scratch=_P, scratch_size=_I,
    weights=_P, b=_P, block=_I, existing=_I,
    # Microkernels: as above; FLOAT_SEGMENTs, and the chunks of `fma`; strips of `pixels`
    # output pixels that one chunk of weights serves in a row.
    # Fewer pixels than `few`, or as many, are left to `single`.
    tile=_P, pixels=_I, single=_P, few=_I, segments=_P, segment_count=_I,
    x_step=_I, w_step=_I, chunks=_P, chunk_count=_I, panel=_I,
)  # fmt: skip
# AveragePool: positions in [count_low, count_high) count, those not in the picture are worth 0.
FLOAT_POOL = _record(
    **_OUTPUT,
    kernel_h=_I, kernel_w=_I, stride_h=_I, stride_w=_I, dilation_h=_I, dilation_w=_I,
    row0=_I, column0=_I, low_h=_I, high_h=_I, low_w=_I, high_w=_I,
    count_low_h=_I, count_high_h=_I, count_low_w=_I, count_high_w=_I,
    lo=_F, hi=_F,
)  # fmt: skip
# y[n, i, j, c] of x[n * x_step_n, i * x_step_h, ...] and r alike: a step is 1, or 0 along an axis
# that is broadcast.
FLOAT_BINARY = _record(
    **_OUTPUT, r=TENSOR,
    x_step_n=_I, x_step_h=_I, x_step_w=_I, x_step_c=_I,
    r_step_n=_I, r_step_h=_I, r_step_w=_I, r_step_c=_I,
    lo=_F, hi=_F,
)  # fmt: skip
FLOAT_FILL = _record(y=TENSOR, n=_I, height=_I, width=_I, channels=_I, value=_F)
# "float_resize" takes a RESIZE whose weights are float32 and parts of 1.
# What `function` is to be: its place in UNARY; its parameters, 0 where it has fewer.
FLOAT_UNARY = _record(**_OUTPUT, function=_I, alpha=_F, beta=_F)
UNARY = ("clip", "leaky_relu", "sigmoid", "hard_sigmoid", "hard_swish", "silu", "tanh", "elu")

# Kernels of ONNX operators in ONNX's form, on float32 tensors of any rank, contiguous: of a TENSOR
# record only the address counts. `axes`, int64 (rank, columns), has a row for each axis of the
# output, at least two: its size, and how far apart its positions lie in y, x and r; 0 where x or r
# is repeated.
_AXES = {"axes": _P, "rank": _I}
# Elements of x from `start_x` on go to where they belong in y, from `start_y` on.
PLAIN_MOVE = _record(**_OUTPUT, **_AXES, start_x=_I, start_y=_I)
# `function`: its place in PLAIN_BINARY_FUNCTIONS. Along the last axis x and r are contiguous, or
# one of them is repeated.
PLAIN_BINARY = _record(**_OUTPUT, r=TENSOR, **_AXES, function=_I)
PLAIN_BINARY_FUNCTIONS = ("add", "sub", "mul", "div", "maximum", "minimum", "prelu")
# Of n elements; `function`: its place in PLAIN_UNARY_FUNCTIONS.
PLAIN_UNARY = _record(**_OUTPUT, function=_I, alpha=_F, beta=_F)
PLAIN_UNARY_FUNCTIONS = (
    "clip", "abs", "elu", "erf", "exp", "hard_sigmoid", "hard_swish", "leaky_relu", "neg",
    "reciprocal", "sigmoid", "sqrt", "swish", "tanh",
)  # fmt: skip
# What lies along the axes of `reduced`, int64 (reduced_rank, 2): sizes, and distances in x.
PLAIN_REDUCE = _record(
    **_OUTPUT, **_AXES, reduced=_P, reduced_rank=_I, function=_I, divisor=_I,
    scratch=_P, scratch_size=_I,
)  # fmt: skip
PLAIN_REDUCTIONS = ("sum", "max", "min")  # the mean is the sum, divided
# Of (n, height, width), along `height`.
PLAIN_SOFTMAX = _record(**_OUTPUT, scratch=_P, scratch_size=_I)


@njit(inline="always")
def codes(tensor):
    """Array (N, H, W, C) of uint8 over the buffer of a TENSOR record."""
    shape = (tensor.n, tensor.h, tensor.w, tensor.c)
    return carray(as_pointer(tensor.data), shape, np.uint8)


@njit(inline="always")
def floats(tensor):
    """Array (N, H, W, C) of float32 over the buffer of a TENSOR record."""
    shape = (tensor.n, tensor.h, tensor.w, tensor.c)
    return carray(as_pointer(tensor.data), shape, np.float32)


@njit(inline="always")
def share(work, first_part, end_part, parts):
    """Begin and end of some of the `parts` equal parts of `work` items."""
    return work * first_part // parts, work * end_part // parts
