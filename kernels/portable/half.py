"""Kernels between float32 and float16: vectors of integers, on every machine the same."""

from __future__ import annotations

import numpy as np
from numba import carray

from logshift.kernels.records import share
from logshift.kernels.reference.half import (
    ONNX_NARROW,
    ONNX_WIDEN,
    halves,
    narrowed,
    singles,
    widened,
)
from logshift.kernels.registry import register


@register("onnx_widen", "portable", ONNX_WIDEN)
def _widen(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = halves(a.x), singles(a.y)
    begin, end = share(a.n, first_part, end_part, parts)
    for i in range(np.uintp(begin), np.uintp(end)):
        y[i] = widened(x[i])


@register("onnx_narrow", "portable", ONNX_NARROW)
def _narrow(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    x, y = singles(a.x), halves(a.y)
    begin, end = share(a.n, first_part, end_part, parts)
    for i in range(np.uintp(begin), np.uintp(end)):
        y[i] = narrowed(x[i])
