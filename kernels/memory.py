"""Buffers that kernels may load and store with vector instructions."""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """Return an uninitialised array that begins at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)
