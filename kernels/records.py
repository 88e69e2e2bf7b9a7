"""Argument records: what a kernel of each operation is told, and how it reads that.

Code tensors lie in memory as (N, H, W, C), C contiguous, with a border of the zero point around
each picture; a `TENSOR` record describes the whole buffer, `top` and `left` say where the picture
begins.

A record is declared beside the definition of the operation, in `reference`, from what is here; here
are those of convolutions, which kernels of several families serve.
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
# Types of other fields: numbers, and addresses of arrays.
INT, FLOAT, ADDRESS = np.int64, np.float32, np.uintp
# Of an operation of one input: tensors, and the size of the picture that is computed.
OUTPUT = {"x": TENSOR, "y": TENSOR} | dict.fromkeys(("n", "height", "width", "channels"), INT)
# Where a kernel has some: its scratch memory, and the bytes of that for a slot.
SCRATCH = {"scratch": ADDRESS, "scratch_size": INT}
# A fused activation function: kind and coefficients as `activation.Target` has them, slopes as the
# kernel's `pack` laid them out; of arithmetic there is one.
ACTIVATION = {"activation": INT, "coefficients": ADDRESS, "slopes": ADDRESS}
# Of a convolution, or pooling: output pixel (i, j) reads input rows
# row0 + i * stride_h + ky * dilation_h of the buffer, and columns alike.
WINDOW = dict.fromkeys(
    (
        "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w",
        "row0", "column0",
    ),
    INT,
)  # fmt: skip


def record(**fields: Any) -> np.dtype:
    """Type of an argument record, from its fields in their order."""
    return np.dtype(list(fields.items()))


# Output pixel (i, j) is written at row y.top + i * step_h, and columns alike: step is above 1 in a
# phase of ConvTranspose.
CONV = record(
    **OUTPUT,
    r=TENSOR,  # residual, of the geometry of y; unused without has_residual
    **WINDOW, step_h=INT, step_w=INT,
    group=INT,
    bits=INT, residual_shift=INT,
    # What the kernel's `pack` laid out, each in a form of its own: weights, z_x * sum of W, M, B.
    weights=ADDRESS, offset=ADDRESS, m=ADDRESS, b=ADDRESS,
    block=INT, existing=INT,  # channels per block of the packed weights, and those that exist
    z_r=INT, m_r=FLOAT, lo=FLOAT, hi=FLOAT,
    has_residual=INT, float_output=INT,
    **ACTIVATION,
    **SCRATCH,
    # Byte-dot kernels: microkernel, its pixels, and its twin for single pixels or 0; SEGMENTs of
    # all blocks; runs of blocks that one call takes, CHUNKs (`dot.tiles`).
    tile=ADDRESS, pixels=INT, single=ADDRESS, segments=ADDRESS, x_step=INT,
    chunks=ADDRESS, chunk_count=INT,
    table=ADDRESS,  # uint8 (256,) that output codes go through at the end, or 0
    # Rows of a depthwise convolution: READS of windows and of all.
    window_count=INT, segment_count=INT,
    # Winograd: what brings differences of codes, and sums of four, into the range of products;
    # steps of a position
    added=INT, both=INT, steps=INT,
    # The shift family (chunks: what to make which rows of): sets of groups, int64 (sets, 2), their
    # first input and output channels; blocks of rows; where streams begin, int64
    sets=ADDRESS, set_count=INT, blocks=INT, positions=ADDRESS,
)  # fmt: skip
# Of float32: tensors lie as codes do, inside a border of 0.0. What is not said here is as above.
FLOAT_CONV = record(
    **OUTPUT,
    r=TENSOR,
    **WINDOW, step_h=INT, step_w=INT,
    group=INT,
    lo=FLOAT, hi=FLOAT, has_residual=INT,
    **SCRATCH,
    weights=ADDRESS, b=ADDRESS, block=INT, existing=INT,
    # Microkernels: as above; FLOAT_SEGMENTs, and CHUNKs (`fma.family`); strips of `pixels`
    # output pixels that one chunk of weights serves in a row.
    # Fewer pixels than `few`, or as many, are left to `single`.
    tile=ADDRESS, pixels=INT, single=ADDRESS, few=INT, segments=ADDRESS, segment_count=INT,
    x_step=INT, w_step=INT, chunks=ADDRESS, chunk_count=INT, panel=INT,
)  # fmt: skip


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
