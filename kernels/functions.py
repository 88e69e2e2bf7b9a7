"""Functions of float32 in fixed basic operations, so that every machine computes the same bits.

Additions, multiplications and divisions are rounded one by one; only `fma` is fused, everywhere. No
function of a mathematical library is called. All of them are free of branches, so that loops over
them become vectors. Errors, against the exact result: exp, expm1, sigmoid and tanh stay within 2
units in the last place.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from logshift.kernels.machine.targets import has_features


@intrinsic
def fma(typingctx, x, w, acc):
    """Return x * w + acc, rounded once; float32."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def codegen(context, builder, signature, args):
        if platform.machine() in ("x86_64", "AMD64", "i386", "i686") and not has_features(("fma",)):
            return _fma_in_float64(builder, *args)
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic(
            "llvm.fma", [kind], ir.FunctionType(kind, [kind] * 3)
        )
        return builder.call(function, args)

    return signature, codegen


def _fma_in_float64(b: ir.IRBuilder, x: Any, w: Any, acc: Any) -> Any:
    """Emit a fused multiply-add for machines without one: much faster than the C library's.

    The product is exact in float64. The sum is rounded to odd: if it is not exact, to whichever of
    its two neighbours has an odd last bit, so that rounding it once more to float32 gives what a
    single rounding would.
    """
    double, word = ir.DoubleType(), ir.IntType(64)
    zero, one = ir.Constant(word, 0), ir.Constant(word, 1)
    product = b.fmul(b.fpext(x, double), b.fpext(w, double))
    acc = b.fpext(acc, double)
    total = b.fadd(product, acc)
    # What the sum lacks (Knuth).
    part = b.fsub(total, product)
    lacking = b.fadd(b.fsub(product, b.fsub(total, part)), b.fsub(acc, part))
    bits = b.bitcast(total, word)
    inexact = b.fcmp_ordered("!=", lacking, ir.Constant(double, 0.0))
    even = b.icmp_signed("==", b.and_(bits, one), zero)
    # Away from zero if what is lacking has the sign of the sum.
    differ = b.icmp_signed("<", b.xor(bits, b.bitcast(lacking, word)), zero)
    change = b.select(differ, ir.Constant(word, -1), one)
    bits = b.add(bits, b.select(b.and_(inexact, even), change, zero))
    return b.fptrunc(b.bitcast(bits, double), ir.FloatType())


@intrinsic
def _power_of_two(typingctx, n):
    """Return 2^n for an int32 from -126 to 127."""
    signature = types.float32(types.int32)

    def codegen(context, builder, signature, args):
        word = args[0].type
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return signature, codegen


# Adding 1.5 * 2^23 rounds a float32 of magnitude below 2^22 half to even, with an addition that
# every machine has in vector form. The integer is then in the sum's lowest bits; subtracting
# 1.5 * 2^23 again gives it as a float32.
ROUND = np.float32(12582912.0)
_LOG2E = np.float32(1.44269504)
# ln 2 in two parts; products of the first with integers of up to 9 bits are exact
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ONE, _HALF, _TWO = np.float32(1), np.float32(0.5), np.float32(2)
_LEAST, _LARGEST = np.float32(-104.0), np.float32(89.0)  # beyond: 0 and infinity


def _chosen(order: str) -> Any:
    """Return what emits `v if v <order> bound else bound`, without a branch.

    From a branch the compiler may make a store under a condition, which is slow.
    """

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(order, *args), *args)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def least(typingctx, v, bound):
    """Return the smaller one; the bound if v is not a number."""
    return _chosen("<")


@intrinsic
def greatest(typingctx, v, bound):
    """Return the larger one; the bound if v is not a number."""
    return _chosen(">")


@njit(inline="always")
def clamp(v, lo, hi):
    """Return v within [lo, hi]; lo if it is not a number."""
    return least(greatest(v, lo), hi)


@njit(inline="always")
def _reduced(x):
    """Return n and exp(r) - 1 for x = n ln 2 + r, |r| <= ln 2 / 2, x within the range of exp."""
    n = (x * _LOG2E + ROUND) - ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + _HALF
    return np.int32(n), p * (r * r) + r


@njit(inline="always")
def exp(x):
    """Return e^x."""
    n, p = _reduced(clamp(x, _LEAST, _LARGEST))
    # In two steps: neither 2^128 nor what is below 2^-126 is a factor that float32 has.
    half = n >> np.int32(1)
    return ((p + _ONE) * _power_of_two(half)) * _power_of_two(n - half)


@njit(inline="always")
def expm1(x):
    """Return e^x - 1 for x <= 0."""
    n, p = _reduced(clamp(x, np.float32(-87.0), np.float32(0)))
    scale = _power_of_two(n)
    return p * scale + (scale - _ONE)


@njit(inline="always")
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    e = exp(-abs(x))
    return (_ONE if x >= 0 else e) / (_ONE + e)


@njit(inline="always")
def tanh(x):
    """Return the hyperbolic tangent."""
    size = abs(x)
    square = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * square + np.float32(2.06390887954e-2)
    p = p * square + np.float32(-5.37397155531e-2)
    p = p * square + np.float32(1.33314422036e-1)
    p = p * square + np.float32(-3.33332819422e-1)
    near = p * square * x + x
    far = _ONE - _TWO / (exp(size + size) + _ONE)
    far = far if x >= 0 else -far
    return near if size < np.float32(0.625) else far


# An odd rational function on [-4, 4], with a relative error below 5e-7.
ERF_NUMERATOR = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
ERF_DENOMINATOR = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
    -1.42647390514189e-02,
)  # fmt: skip


@njit(inline="always", error_model="numpy")
def erf(x):
    """Return the error function."""
    v = clamp(x, np.float32(-4), np.float32(4))
    square = v * v
    p = np.float32(ERF_NUMERATOR[0])
    p = p * square + np.float32(ERF_NUMERATOR[1])
    p = p * square + np.float32(ERF_NUMERATOR[2])
    p = p * square + np.float32(ERF_NUMERATOR[3])
    p = p * square + np.float32(ERF_NUMERATOR[4])
    p = p * square + np.float32(ERF_NUMERATOR[5])
    p = p * square + np.float32(ERF_NUMERATOR[6])
    q = np.float32(ERF_DENOMINATOR[0])
    q = q * square + np.float32(ERF_DENOMINATOR[1])
    q = q * square + np.float32(ERF_DENOMINATOR[2])
    q = q * square + np.float32(ERF_DENOMINATOR[3])
    q = q * square + np.float32(ERF_DENOMINATOR[4])
    return clamp(p * v / q, np.float32(-1), _ONE)


@njit(inline="always")
def add(x, r):
    """Return x + r."""
    return x + r


@njit(inline="always")
def add_size(x, r):
    """Return |x| + r."""
    return abs(x) + r


@njit(inline="always")
def add_square(x, r):
    """Return x * x + r."""
    return x * x + r


@njit(inline="always")
def sub(x, r):
    """Return x - r."""
    return x - r


@njit(inline="always")
def mul(x, r):
    """Return x * r."""
    return x * r


# --- of x and two parameters ----------------------------------------------------------------------


@njit(inline="always")
def leaky_relu(x, alpha, beta):
    """Return x, or alpha * x where it is negative."""
    return x if x >= 0 else alpha * x


@njit(inline="always")
def sigmoid_of(x, alpha, beta):
    """Return sigmoid(x)."""
    return sigmoid(x)


@njit(inline="always")
def hard_sigmoid(x, alpha, beta):
    """Return alpha * x + beta within [0, 1]."""
    return clamp(alpha * x + beta, np.float32(0), _ONE)


@njit(inline="always")
def hard_swish(x, alpha, beta):
    """Return x * hard_sigmoid(x)."""
    return x * hard_sigmoid(x, alpha, beta)


@njit(inline="always")
def silu(x, alpha, beta):
    """Return x * sigmoid(x)."""
    return x * sigmoid(x)


@njit(inline="always")
def tanh_of(x, alpha, beta):
    """Return tanh(x)."""
    return tanh(x)


@njit(inline="always")
def elu(x, alpha, beta):
    """Return x, or alpha * (e^x - 1) where it is negative."""
    return x if x >= 0 else alpha * expm1(x)


@njit(inline="always")
def gelu(x, alpha, beta):
    """Return x / 2 * (1 + erf(x / sqrt(2)))."""
    return np.float32(0.5) * x * (_ONE + erf(x * np.float32(0.7071067811865476)))


# --- of ONNX operators in ONNX's form: what is not a number stays so, as in NumPy -----------------


@njit(inline="always", error_model="numpy")
def div(x, r):
    """Return x / r."""
    return x / r


@njit(inline="always")
def maximum(x, r):
    """Return the larger one; not a number if either is not."""
    return x if x >= r or x != x else r


@njit(inline="always")
def minimum(x, r):
    """Return the smaller one; not a number if either is not."""
    return x if x <= r or x != x else r


@njit(inline="always")
def prelu(x, r):
    """Return x, or r * x where it is negative."""
    return x * r if x < 0 else x


@njit(inline="always")
def onnx_clip(x, alpha, beta):
    """Return x within [alpha, beta]."""
    y = clamp(x, alpha, beta)
    return y if x == x else x


@njit(inline="always")
def onnx_abs(x, alpha, beta):
    """Return |x|."""
    return abs(x)


@njit(inline="always")
def onnx_elu(x, alpha, beta):
    """Return x, or alpha * (e^x - 1) where it is negative."""
    y = elu(x, alpha, beta)
    return y if x == x else x


@njit(inline="always")
def onnx_erf(x, alpha, beta):
    """Return the error function."""
    y = erf(x)
    return y if x == x else x


@njit(inline="always")
def onnx_exp(x, alpha, beta):
    """Return e^x."""
    y = exp(x)
    return y if x == x else x


@njit(inline="always")
def onnx_ceil(x, alpha, beta):
    """Return the least integer that is not below x."""
    return np.ceil(x)


@njit(inline="always")
def onnx_cube(x, alpha, beta):
    """Return x * x * x."""
    return x * x * x


@njit(inline="always")
def onnx_floor(x, alpha, beta):
    """Return the largest integer that is not above x."""
    return np.floor(x)


@njit(inline="always")
def onnx_gelu(x, alpha, beta):
    """Return x / 2 * (1 + erf(x / sqrt(2)))."""
    return _HALF * x * (_ONE + onnx_erf(x * np.float32(0.7071067811865476), alpha, beta))


@njit(inline="always")
def onnx_gelu_tanh(x, alpha, beta):
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""
    v = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * (x * x * x))
    return _HALF * x * (_ONE + onnx_tanh(v, alpha, beta))


@njit(inline="always")
def onnx_round(x, alpha, beta):
    """Return the nearest integer, of two the even one."""
    return np.rint(x)


@njit(inline="always")
def onnx_hard_sigmoid(x, alpha, beta):
    """Return alpha * x + beta within [0, 1]."""
    y = hard_sigmoid(x, alpha, beta)
    return y if x == x else x


@njit(inline="always")
def onnx_hard_swish(x, alpha, beta):
    """Return x * hard_sigmoid(x)."""
    return x * onnx_hard_sigmoid(x, alpha, beta)


@njit(inline="always")
def onnx_neg(x, alpha, beta):
    """Return -x."""
    return -x


@njit(inline="always", error_model="numpy")
def onnx_reciprocal(x, alpha, beta):
    """Return 1 / x."""
    return _ONE / x


@njit(inline="always")
def onnx_sigmoid(x, alpha, beta):
    """Return sigmoid(x)."""
    y = sigmoid(x)
    return y if x == x else x


@njit(inline="always")
def onnx_sqrt(x, alpha, beta):
    """Return the square root of x."""
    return np.sqrt(x)


@njit(inline="always")
def onnx_swish(x, alpha, beta):
    """Return x * sigmoid(alpha * x)."""
    return x * onnx_sigmoid(alpha * x, alpha, beta)


@njit(inline="always")
def onnx_tanh(x, alpha, beta):
    """Return tanh(x)."""
    y = tanh(x)
    return y if x == x else x


# --- of recurrent networks, with fused multiply-adds ----------------------------------------------

# An odd rational function on [-8, 8], whose error is below 3e-7.
TANH_NUMERATOR = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_DENOMINATOR = (
    1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03,
)  # fmt: skip


@njit(inline="always", error_model="numpy")
def _fast_tanh(x):
    v = clamp(x, np.float32(-7.9053111), np.float32(7.9053111))
    square = v * v
    p = np.float32(TANH_NUMERATOR[0])
    p = fma(p, square, np.float32(TANH_NUMERATOR[1]))
    p = fma(p, square, np.float32(TANH_NUMERATOR[2]))
    p = fma(p, square, np.float32(TANH_NUMERATOR[3]))
    p = fma(p, square, np.float32(TANH_NUMERATOR[4]))
    p = fma(p, square, np.float32(TANH_NUMERATOR[5]))
    p = fma(p, square, np.float32(TANH_NUMERATOR[6]))
    q = np.float32(TANH_DENOMINATOR[0])
    q = fma(q, square, np.float32(TANH_DENOMINATOR[1]))
    q = fma(q, square, np.float32(TANH_DENOMINATOR[2]))
    q = fma(q, square, np.float32(TANH_DENOMINATOR[3]))
    return p * v / q


@njit(inline="always")
def gate_tanh(x, alpha, beta):
    """Return tanh(x), within 3e-7."""
    y = clamp(_fast_tanh(x), np.float32(-1), _ONE)
    return y if x == x else x


@njit(inline="always")
def gate_sigmoid(x, alpha, beta):
    """Return 1 / (1 + e^-x), as `sigmoid` does, with fused multiply-adds."""
    v = clamp(-abs(x), np.float32(-87.0), np.float32(0))
    n = fma(v, _LOG2E, ROUND) - ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, v))
    p = np.float32(1.9875691500e-4)
    p = fma(p, r, np.float32(1.3981999507e-3))
    p = fma(p, r, np.float32(8.3334519073e-3))
    p = fma(p, r, np.float32(4.1665795894e-2))
    p = fma(p, r, np.float32(1.6666665459e-1))
    p = fma(p, r, _HALF)
    scale = _power_of_two(np.int32(n))
    e = fma(fma(p, r * r, r), scale, scale)
    y = (_ONE if x >= 0 else e) / (_ONE + e)
    return y if x == x else x


@njit(inline="always")
def onnx_affine(x, alpha, beta):
    """Return alpha * x + beta."""
    return alpha * x + beta


@njit(inline="always")
def onnx_relu(x, alpha, beta):
    """Return x, or 0 where it is negative."""
    return maximum(x, np.float32(0))


@njit(inline="always")
def onnx_scaled_tanh(x, alpha, beta):
    """Return alpha * tanh(beta * x)."""
    return alpha * gate_tanh(beta * x, alpha, beta)


@njit(inline="always", error_model="numpy")
def onnx_softsign(x, alpha, beta):
    """Return x / (1 + |x|)."""
    return x / (_ONE + abs(x))


@njit(inline="always")
def onnx_thresholded_relu(x, alpha, beta):
    """Return x, or 0 where it is not above alpha."""
    return x if x > alpha else np.float32(0)


# --- by name and by number ------------------------------------------------------------------------

# What the argument `function` of a kernel says is a function's place in one of these.
UNARY_FUNCTIONS = {
    "clip": clamp, "leaky_relu": leaky_relu, "sigmoid": sigmoid_of, "hard_sigmoid": hard_sigmoid,
    "hard_swish": hard_swish, "silu": silu, "tanh": tanh_of, "elu": elu,
    "gelu": gelu,
}  # fmt: skip
ONNX_UNARY_FUNCTIONS = {
    "clip": onnx_clip, "abs": onnx_abs, "ceil": onnx_ceil, "cube": onnx_cube, "elu": onnx_elu,
    "erf": onnx_erf, "exp": onnx_exp, "floor": onnx_floor, "gelu": onnx_gelu,
    "gelu_tanh": onnx_gelu_tanh, "hard_sigmoid": onnx_hard_sigmoid, "hard_swish": onnx_hard_swish,
    "leaky_relu": leaky_relu, "neg": onnx_neg, "reciprocal": onnx_reciprocal,
    "round": onnx_round, "sigmoid": onnx_sigmoid, "softsign": onnx_softsign, "sqrt": onnx_sqrt,
    "swish": onnx_swish, "tanh": onnx_tanh, "thresholded_relu": onnx_thresholded_relu,
}  # fmt: skip
RECURRENT_FUNCTIONS = {
    "Affine": onnx_affine, "Elu": onnx_elu, "HardSigmoid": onnx_hard_sigmoid,
    "LeakyRelu": leaky_relu, "Relu": onnx_relu, "ScaledTanh": onnx_scaled_tanh,
    "Sigmoid": gate_sigmoid, "Softsign": onnx_softsign, "Tanh": gate_tanh,
    "ThresholdedRelu": onnx_thresholded_relu,
}  # fmt: skip
ONNX_BINARY_FUNCTIONS = {
    "add": add, "sub": sub, "mul": mul, "div": div, "maximum": maximum, "minimum": minimum,
    "prelu": prelu,
}  # fmt: skip
ONNX_REDUCTIONS = {
    "sum": add, "max": maximum, "min": minimum, "sum_size": add_size, "sum_square": add_square,
}  # fmt: skip
FIRST_TOTALS = (0.0, -np.inf, np.inf, 0.0, 0.0)  # of what reduces nothing yet


def by_number(table: Mapping[str, Any], call: Any = None) -> Any:
    """Return what calls the function of a number, its place in a table, with arguments after it.

    With `call` that is given the function and the arguments. It is compiled for each function by
    itself: with the choice inside, no loop would become vectors. Numba takes no function out of a
    table, so the choice is written out.
    """
    # As attributes of this module: a function that is a global itself would be passed by its
    # address, and code with addresses of one process in it cannot be kept for others.
    module = sys.modules[__name__]
    names = [f"module.{function.py_func.__name__}" for function in table.values()]
    if call is None:
        arguments = ", ".join(signature(next(iter(table.values())).py_func).parameters)
        calls = [f"{name}({arguments})" for name in names]
    else:
        arguments = ", ".join([*signature(call.py_func).parameters][1:])
        calls = [f"call({name}, {arguments})" for name in names]
    lines = [f"def choose(number, {arguments}):"]
    for number, text in enumerate(calls):
        lines += [f"    if number == {number}:", f"        return {text}"]
    scope: dict[str, Any] = {"module": module, "call": call}
    exec("\n".join(lines), scope)
    return njit(error_model="numpy")(scope["choose"])
