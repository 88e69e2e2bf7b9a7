"""Codes of real values, and back: in one pass each, for whole tensors of many pictures."""

from __future__ import annotations

import numpy as np

from logshift.kernels.machine.jit import njit


@njit(cache=True, nogil=True, error_model="numpy")
def quantize(x, scale, zero, top, codes):
    """Set the codes of values: float32 arrays and numbers, uint8 codes."""
    for i in range(x.size):
        code = np.rint(x[i] / scale) + zero
        code = code if code > np.float32(0) else np.float32(0)  # which a NaN becomes as well
        codes[i] = np.uint8(np.int32(code if code < top else top))


@njit(cache=True, nogil=True, error_model="numpy")
def dequantize(codes, zero, scale, x):
    """Set the values of codes: float32 numbers and values."""
    for i in range(codes.size):
        x[i] = (np.float32(codes[i]) - zero) * scale
