"""The definition of the kernels between float32 and float16, as integers: CPUs differ in NaN.

float16 has a sign, 5 bits of exponent (bias 15) and 10 of fraction. Numbers between two of it are
rounded to the nearer one, in the middle to the even one.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import OUTPUT, record
from logshift.kernels.registry import register

_MOST = 2**40  # elements that an address is given; indices were checked when the plan was made
_REBIAS = np.uint32(112 << 23)  # from float16's bias to float32's
_LEAST_NORMAL = np.uint32(113 << 23)  # 2^-14
_INFINITY = np.uint32(255 << 23)
_TOO_LARGE = np.uint32(0x477FF000)  # 65520, which rounds to 2^16
_FINEST, _STEPS = np.float32(2.0**-24), np.float32(2.0**24)  # of float16's numbers the smallest
_ROUND = np.float32(2.0**23)  # a float32 from here on has no fraction
_ROUND_BITS = _ROUND.view(np.uint32)


@njit(inline="always", error_model="numpy")
def widened(half):
    """Return the float32 that the bits of a float16 are, as bits."""
    sign, rest = np.uint32(np.uint32(half & 0x8000) << 16), np.uint32(half & 0x7FFF)
    bits = np.uint32((rest << 13) + _REBIAS)
    if rest < 0x400:  # no leading one is left out
        bits = np.float32(np.float32(np.int32(rest)) * _FINEST).view(np.uint32)
    if rest >= 0x7C00:
        bits = np.uint32(bits | _INFINITY)
    return np.uint32(sign | bits)


@njit(inline="always", error_model="numpy")
def narrowed(bits):
    """Return the bits of the float16 next to a float32 of these bits."""
    sign, rest = np.uint32((bits >> 16) & 0x8000), np.uint32(bits & 0x7FFFFFFF)
    half = np.uint32(np.uint32(rest - _REBIAS + 0xFFF + ((rest >> 13) & 1)) >> 13)
    if rest < _LEAST_NORMAL:
        steps = np.float32(rest.view(np.float32) * _STEPS)
        half = np.uint32(np.float32(steps + _ROUND).view(np.uint32) - _ROUND_BITS)
    if rest >= _TOO_LARGE:
        half = np.uint32(0x7C00)
    if rest > _INFINITY:
        half = np.uint32(0x7E00 | ((rest >> 13) & 0x3FF))
    return np.uint16(sign | half)


@njit(inline="always", error_model="numpy")
def halves(tensor):
    """Return what begins at the address of a TENSOR record, as bits of float16."""
    return carray(as_pointer(tensor.data), _MOST, np.uint16)


@njit(inline="always", error_model="numpy")
def singles(tensor):
    """Return what begins at the address of a TENSOR record, as bits of float32."""
    return carray(as_pointer(tensor.data), _MOST, np.uint32)


# Of n elements: y is float32 and x float16, or the other way round.
ONNX_WIDEN = record(**OUTPUT)
ONNX_NARROW = record(**OUTPUT)


@register("onnx_widen", "reference", ONNX_WIDEN)
def _widen(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = halves(a.x), singles(a.y)
    for i in range(a.n):
        y[i] = widened(x[i])


@register("onnx_narrow", "reference", ONNX_NARROW)
def _narrow(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    if first_part != 0:
        return
    x, y = singles(a.x), halves(a.y)
    for i in range(a.n):
        y[i] = narrowed(x[i])
