"""Buffers that kernels may load and store with vector instructions, and read a little beyond."""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Return an uninitialised array at a multiple of 64 bytes, 64 readable bytes behind it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 2 * ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)
