"""ONNX operators in NumPy, for what a packed network need not quantize.

Semantics are those of the ONNX operator specification at the version that is asked for. What no
ordinary network needs goes through `onnx.reference`, slowly, if the package onnx is installed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.functions import ERF_DENOMINATOR, ERF_NUMERATOR

Array = np.ndarray

_MAX_ELEMENTS = 2**31 - 1
_MAX_INTEGERS = 2**16  # of an input that holds axes, sizes and the like

# Operators whose results' shapes depend on the values of their inputs.
DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

# Operators that `onnx.reference` runs.
SLOW = frozenset(
    {
        "AffineGrid", "Attention", "BlackmanWindow", "CenterCropPad", "Col2Im", "Conv",
        "ConvInteger", "ConvTranspose", "DFT", "DeformConv", "DequantizeLinear", "Det",
        "DynamicQuantizeLinear", "EyeLike", "GRU", "GlobalLpPool", "GridSample", "HammingWindow",
        "HannWindow", "LSTM", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
        "NegativeLogLikelihoodLoss", "NonMaxSuppression", "QLinearConv", "QLinearMatMul",
        "QuantizeLinear", "RNN", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding",
        "STFT", "SoftmaxCrossEntropyLoss", "TensorScatter", "Unique", "Upsample",
    }
)  # fmt: skip


def compute(
    op: str,
    attributes: Mapping[str, Any],
    opset: int,
    inputs: Sequence[Array | None],
    outputs: int,
) -> list[Array]:
    """Run one operator.

    Parameters
    ----------
    op : str
        One of `OPERATORS`.
    attributes : mapping of name to number, string or list of those
        ONNX's.
    opset : int
        Version of the default operator set, 7 or newer.
    inputs : list of array
        None for inputs that are not given.
    outputs : int
        How many outputs are wanted.

    Returns
    -------
    list of array
        The outputs; they may be views of the inputs.

    Raises
    ------
    InputError
        If the operator cannot take these inputs, or needs a package that is not installed.
    """
    if op not in OPERATORS:
        raise InputError(f"{op} is no ONNX operator that is supported")
    call = _Call(op, attributes, opset, inputs, outputs)
    try:
        with np.errstate(all="ignore"):
            results = _OWN[op](call) if op in _OWN else _through_reference(call)
    except (InputError, ModuleNotFoundError) as error:
        raise InputError(str(error)) from None
    except MemoryError:
        raise InputError("not enough memory for its result") from None
    except Exception as error:  # whatever NumPy says of shapes, indices and types
        shapes = ", ".join("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in inputs)
        raise InputError(f"cannot take inputs ({shapes}): {error}") from None
    found = [np.asarray(y) for y in (results if isinstance(results, (list, tuple)) else [results])]
    if len(found) < outputs:
        raise InputError(f"has {len(found)} outputs, {outputs} are asked for")
    return found[:outputs]


class _Call:
    """One use of an operator: what its implementation asks for."""

    def __init__(
        self,
        op: str,
        attributes: Mapping[str, Any],
        opset: int,
        inputs: Sequence[Array | None],
        outputs: int,
    ) -> None:
        self.op, self.attributes, self.opset, self.outputs = op, attributes, opset, outputs
        self.inputs = list(inputs)

    @property
    def x(self) -> Array:
        return self.input(0)

    def input(self, index: int) -> Array:
        x = self.optional(index)
        if x is None:
            raise InputError(f"needs its input {index}")
        return x

    def all(self) -> list[Array]:
        return [self.input(i) for i in range(max(len(self.inputs), 1))]

    def optional(self, index: int) -> Array | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and not isinstance(value, kinds):
            kind = type(default).__name__
            raise InputError(f"attribute {name} must be of the type {kind}, not {value!r}")
        return value

    def integers(self, index: int, name: str) -> list[int] | None:
        """Return integers that newer versions take as an input, older ones as an attribute."""
        given = self.optional(index)
        if given is not None:
            if given.size > _MAX_INTEGERS:
                raise InputError(f"its input {index} has {given.size} numbers")
            return [int(v) for v in given.ravel()]
        value = self.get(name)
        return value if value is None or isinstance(value, list) else [value]

    def axis(self, default: int) -> int:
        axis, rank = self.get("axis", default), self.x.ndim
        if not -rank <= axis < max(rank, 1):
            raise InputError(f"axis {axis} is beyond rank {rank}")
        return axis % max(rank, 1)


def _limited(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape that an array may have."""
    sizes = tuple(int(size) for size in shape)
    if math.prod(sizes) > _MAX_ELEMENTS or min(sizes, default=0) < 0:
        raise InputError(f"its result would have the shape {sizes}")
    return sizes


def _broadcast(*arrays: Array) -> None:
    """Check that arrays go together, and that the result is one that an array may have."""
    size = np.broadcast(*arrays).size
    if size > _MAX_ELEMENTS:
        raise InputError(f"its result would have {size} elements")


def _mean(x: Array, axes: tuple[int, ...], keepdims: bool = True) -> Array:
    """Return the mean, which is NaN, without a warning, if it is of nothing."""
    dtype = np.float32 if x.dtype == np.float16 else None
    total = np.sum(x, axis=axes, keepdims=keepdims, dtype=dtype)
    return np.asarray(total / math.prod(x.shape[axis] for axis in axes), x.dtype)


# --- element-wise -------------------------------------------------------------------------------


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += coefficient
    return y


def _erf(x: Array) -> Array:
    x = np.clip(_widened(x), -4, 4)
    square = x * x
    y = _polynomial(square, ERF_NUMERATOR)
    y *= x
    y /= _polynomial(square, ERF_DENOMINATOR)
    return np.clip(y, -1, 1, out=y)


def _sigmoid(x: Array) -> Array:
    # Where exp(-x) overflows to infinity, the result is 0, as it should be.
    y = np.negative(_widened(x))
    np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def _softplus(x: Array) -> Array:
    y = np.negative(np.abs(x))
    np.exp(y, out=y)
    np.log1p(y, out=y)
    y += np.maximum(x, 0)
    return y


def _gelu(x: Array, approximate: str) -> Array:
    if approximate not in ("none", "tanh"):
        raise InputError(f"attribute approximate is {approximate!r}")
    if approximate == "tanh":
        y = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))
    else:
        y = _erf(x * math.sqrt(0.5))
    y += 1
    y *= x
    y *= 0.5
    return y


def _elu(x: Array, alpha: float) -> Array:
    y = np.minimum(x, 0)
    np.expm1(y, out=y)
    y *= alpha
    y += np.maximum(x, 0)
    return y


def _celu(x: Array, alpha: float) -> Array:
    return np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha)


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    y = x * alpha
    y += beta
    return np.clip(y, 0, 1, out=y)


def _shrink(x: Array, bias: float, lambd: float) -> Array:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


def _is_infinite(x: Array, detect_negative: int, detect_positive: int) -> Array:
    return (np.isposinf(x) & bool(detect_positive)) | (np.isneginf(x) & bool(detect_negative))


_UNARY: dict[str, Callable[[Array], Array]] = {
    "Abs": np.abs, "Acos": np.arccos, "Acosh": np.arccosh, "Asin": np.arcsin,
    "Asinh": np.arcsinh, "Atan": np.arctan, "Atanh": np.arctanh, "BitwiseNot": np.invert,
    "Ceil": np.ceil, "Cos": np.cos, "Cosh": np.cosh, "Erf": _erf, "Exp": np.exp,
    "Floor": np.floor, "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "Identity": lambda x: x, "IsNaN": np.isnan, "Log": np.log,
    "Mish": lambda x: x * np.tanh(_softplus(x)), "Neg": np.negative, "Not": np.logical_not,
    "Reciprocal": np.reciprocal, "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Round": np.rint, "Sigmoid": _sigmoid, "Sign": np.sign, "Sin": np.sin, "Sinh": np.sinh,
    "Softplus": _softplus, "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt,
    "Tan": np.tan, "Tanh": np.tanh,
}  # fmt: skip

# With attributes, and their defaults.
_PARAMETRIC: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "Celu": (_celu, {"alpha": 1.0}),
    "Elu": (_elu, {"alpha": 1.0}),
    "Gelu": (_gelu, {"approximate": "none"}),
    "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "IsInf": (_is_infinite, {"detect_negative": 1, "detect_positive": 1}),
    "LeakyRelu": (lambda x, alpha: np.where(x < 0, alpha * x, x), {"alpha": 0.01}),
    "Selu": (lambda x, alpha, gamma: gamma * _elu(x, alpha),
             {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}),
    "Shrink": (_shrink, {"bias": 0.0, "lambd": 0.5}),
    "Swish": (lambda x, alpha: x * _sigmoid(alpha * x), {"alpha": 1.0}),
    "ThresholdedRelu": (lambda x, alpha: np.where(x > alpha, x, 0), {"alpha": 1.0}),
}  # fmt: skip


def _divide(x: Array, y: Array) -> Array:
    if x.dtype.kind not in "iu":
        return np.divide(x, y)
    # Towards zero; by zero it is 0, as in NumPy.
    return x // y + ((np.remainder(x, y) != 0) & ((x < 0) != (y < 0))).astype(x.dtype)


def _power(x: Array, y: Array) -> Array:
    return np.power(x.astype(np.result_type(x, y)), y).astype(x.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add, "And": np.logical_and, "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor, "Div": _divide, "Equal": np.equal,
    "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Mul": np.multiply, "Or": np.logical_or,
    "PRelu": lambda x, slope: np.where(x < 0, x * np.broadcast_to(slope, x.shape), x),
    "Pow": _power, "Sub": np.subtract, "Xor": np.logical_xor,
}  # fmt: skip

_VARIADIC: dict[str, Callable[[list[Array]], Array]] = {
    "Max": lambda xs: reduce(np.maximum, xs), "Min": lambda xs: reduce(np.minimum, xs),
    "Sum": lambda xs: reduce(np.add, xs),
    "Mean": lambda xs: reduce(np.add, xs) / xs[0].dtype.type(len(xs)),
}  # fmt: skip


def _widened(x: Array) -> Array:
    """Return float16 as float32, in which functions of it are computed."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _each(function: Callable[..., Array], x: Array, **values: Any) -> Array:
    # NumPy makes numbers of arrays without dimensions, and those have other rules.
    y = function(x.reshape(x.shape or 1), **values)
    return (y if y.dtype == bool else y.astype(x.dtype, copy=False)).reshape(x.shape)


def _parametric(c: _Call) -> Array:
    function, defaults = _PARAMETRIC[c.op]
    return _each(function, c.x, **{name: c.get(name, value) for name, value in defaults.items()})


def _mod(c: _Call) -> Array:
    if not c.get("fmod", 0):
        return np.mod(c.x, c.input(1))
    return np.fmod(c.x, c.input(1))


def _swiglu(c: _Call) -> Array:
    gate, x = c.x, c.input(1)
    if gate.shape != x.shape:
        raise InputError(f"multiplies {gate.shape} with {x.shape}")
    return compute("Swish", c.attributes, c.opset, [gate], 1)[0] * x


def _bit_shift(c: _Call) -> Array:
    return (np.left_shift if c.get("direction") == "LEFT" else np.right_shift)(c.x, c.input(1))


def _dropout(c: _Call) -> list[Array]:
    training = c.optional(2)
    if training is not None and training.item():
        raise InputError("is in training mode; export the model for inference")
    return [c.x, np.ones(c.x.shape, bool)]


def _clip(c: _Call) -> Array:
    low, high = (
        c.get(name) if given is None else given.reshape(())
        for name, given in (("min", c.optional(1)), ("max", c.optional(2)))
    )
    if low is None and high is None:
        return c.x
    dtype = c.x.dtype
    bounds: list[Any] = [None if v is None else np.asarray(v, dtype) for v in (low, high)]
    return np.clip(c.x, bounds[0], bounds[1])


def _where(c: _Call) -> Array:
    _broadcast(c.x, c.input(1), c.input(2))
    return np.where(c.x, c.input(1), c.input(2))


# --- types and constants ------------------------------------------------------------------------

# By ONNX's numbers.
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip


def _dtype(number: int) -> np.dtype:
    if number not in _DTYPES:
        raise InputError(f"the type number {number} is not supported")
    return np.dtype(_DTYPES[number])


def _cast(c: _Call) -> Array:
    dtype = c.input(1).dtype if c.op == "CastLike" else _dtype(c.get("to"))
    return c.x.astype(dtype)


def _bit_cast(c: _Call) -> Array:
    dtype = _dtype(c.get("to"))
    if dtype.itemsize != c.x.dtype.itemsize:
        raise InputError(f"cannot take {c.x.dtype} for {dtype}")
    return c.x.view(dtype)


def _range(c: _Call) -> Array:
    start, limit, delta = (c.input(i).item() for i in range(3))
    if delta == 0:
        raise InputError("delta is 0")
    count = max(math.ceil((limit - start) / delta), 0)
    _limited([count])
    return (start + np.arange(count) * delta).astype(c.x.dtype)


def _one_hot(c: _Call) -> Array:
    indices, depth, values = c.x, int(c.input(1).item()), c.input(2)
    axis = c.get("axis", -1)
    axis += indices.ndim + 1 if axis < 0 else 0
    _limited([*indices.shape, depth])
    expanded = np.expand_dims(np.where(indices < 0, indices + depth, indices), axis)
    places = np.arange(depth).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return np.where(expanded == places, values[1], values[0])


# --- shapes -------------------------------------------------------------------------------------


def _shape(c: _Call) -> Array:
    sizes = c.x.shape[c.get("start", 0) : c.get("end", None)]
    return np.array(sizes, np.int64)


def _reshape(c: _Call) -> Array:
    sizes = c.integers(1, "shape") or []
    if not c.get("allowzero", 0):
        sizes = [c.x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return c.x.reshape(sizes)


def _flatten(c: _Call) -> Array:
    return _as_matrix(c.x, c.get("axis", 1))


def _as_matrix(x: Array, axis: int) -> Array:
    if not -x.ndim <= axis <= x.ndim:
        raise InputError(f"axis {axis} is beyond rank {x.ndim}")
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(c: _Call) -> Array:
    axes = c.integers(1, "axes")
    return np.squeeze(c.x, None if axes is None else tuple(axes))


def _unsqueeze(c: _Call) -> Array:
    return np.expand_dims(c.x, tuple(c.integers(1, "axes") or ()))


def _transpose(c: _Call) -> Array:
    return np.transpose(c.x, c.get("perm"))


def _expand(c: _Call) -> Array:
    shape = np.broadcast_shapes(c.x.shape, tuple(c.integers(1, "shape") or ()))
    return np.broadcast_to(c.x, _limited(shape))


def _tile(c: _Call) -> Array:
    repeats = c.integers(1, "repeats") or []
    _limited([size * count for size, count in zip(c.x.shape, repeats, strict=True)])
    return np.tile(c.x, repeats)


def _concat(c: _Call) -> Array:
    arrays, axis = c.all(), c.axis(1)
    _limited([sum(x.size for x in arrays)])
    return np.concatenate(arrays, axis)


def _split(c: _Call) -> list[Array]:
    axis = c.axis(0)
    size = c.x.shape[axis]
    sizes = c.integers(1, "split")
    if sizes is None:
        count = c.get("num_outputs", c.outputs)
        if count != c.outputs:
            raise InputError(f"num_outputs is {count}, {c.outputs} are asked for")
        part = -(-size // count)
        sizes = [min(part, size - i * part) for i in range(count)]
    if sum(sizes) != size or min(sizes, default=0) < 0:
        raise InputError(f"splits {size} into {sizes}")
    return np.split(c.x, np.cumsum(sizes)[:-1], axis)


def _slice(c: _Call) -> Array:
    starts, ends = c.integers(1, "starts") or [], c.integers(2, "ends") or []
    axes = c.integers(3, "axes")
    steps = c.integers(4, "steps")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * c.x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = c.x.shape[axis]
        if step < 0:
            # Python's -1 is the last element; ONNX's end below all elements is none of them.
            start = max(min(start + size if start < 0 else start, size - 1), 0)
            end = max(end + size if end < 0 else end, -1)
        index[axis] = slice(start, None if step < 0 and end < 0 else end, step)
    return c.x[tuple(index)]


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad(c: _Call) -> Array:
    x = c.x
    pads = c.integers(1, "pads") or []
    value: Any = c.get("value", 0.0)
    if (given := c.optional(2)) is not None:
        value = given.ravel()[0] if given.size else 0
    axes = c.integers(3, "axes")
    axes = list(range(x.ndim)) if axes is None else axes
    widths, index = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        widths[axis] = max(before, 0), max(after, 0)
        # Negative pads cut off.
        end = x.shape[axis] + min(after, 0)
        if end < max(-before, 0):
            raise InputError(f"pads {before} and {after} cut off more than there is")
        index[axis] = slice(max(-before, 0), end)
    x = x[tuple(index)]
    _limited([size + sum(width) for size, width in zip(x.shape, widths, strict=True)])
    mode = _PAD_MODES[c.get("mode", "constant")]
    more = {"constant_values": np.asarray(value, x.dtype)} if mode == "constant" else {}
    return np.pad(x, widths, mode, **more)  # type: ignore[call-overload]


def _depth_to_space(c: _Call) -> Array:
    n, channels, h, w = c.x.shape
    b = c.get("blocksize")
    depth = channels // (b * b)
    if c.get("mode", "DCR") == "DCR":
        blocks = c.x.reshape(n, b, b, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = c.x.reshape(n, depth, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, depth, h * b, w * b)


def _space_to_depth(c: _Call) -> Array:
    n, channels, h, w = c.x.shape
    b = c.get("blocksize")
    blocks = c.x.reshape(n, channels, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if c.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.transpose(order).reshape(n, channels * b * b, h // b, w // b)


def _trilu(c: _Call) -> Array:
    given = c.optional(1)
    k = 0 if given is None else int(given.item())
    if c.x.ndim < 2:
        raise InputError("needs matrices")
    k = min(max(k, -c.x.shape[-2]), c.x.shape[-1])
    return (np.triu if c.get("upper", 1) else np.tril)(c.x, k)


# --- indices ------------------------------------------------------------------------------------


def _gather(c: _Call) -> Array:
    indices = c.input(1)
    axis = c.axis(0)
    _limited([*c.x.shape[:axis], *indices.shape, *c.x.shape[axis + 1 :]])
    return np.take(c.x, indices, axis)


def _gather_elements(c: _Call) -> Array:
    return c.x[_index_along(c)]


def _index_along(c: _Call) -> tuple[Array, ...]:
    """Return the index of the elements that GatherElements and ScatterElements name."""
    indices, axis = c.input(1), c.axis(0)
    if indices.ndim != c.x.ndim:
        raise InputError(f"indices of rank {indices.ndim} are for data of that rank")
    index = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[axis] = indices
    return tuple(index)


def _gather_nd(c: _Call) -> Array:
    x, indices, batch = c.x, c.input(1), c.get("batch_dims", 0)
    shape, depth = indices.shape[:-1], indices.shape[-1]
    if not 0 <= batch < min(x.ndim, indices.ndim) or x.shape[:batch] != shape[:batch]:
        raise InputError(f"batch_dims {batch} do not fit")
    _limited([*shape, *x.shape[batch + depth :]])
    # The first axes index themselves.
    own = np.ogrid[tuple(slice(size) for size in shape[:batch])]
    index = [i.reshape(*i.shape, *(1,) * (len(shape) - batch)) for i in own]
    return x[tuple([*index, *np.moveaxis(indices, -1, 0)])]


_REDUCTIONS: dict[str, Any] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum
}  # fmt: skip


def _scatter(y: Array, index: Any, updates: Array, reduction: str) -> Array:
    if reduction not in ("none", *_REDUCTIONS):
        raise InputError(f"attribute reduction is {reduction!r}")
    if y[index].shape != updates.shape:
        raise InputError(f"updates {y[index].shape} elements, {updates.shape} are given")
    if reduction == "none":
        y[index] = updates
    else:
        _REDUCTIONS[reduction].at(y, index, updates)
    return y


def _scatter_elements(c: _Call) -> Array:
    return _scatter(c.x.copy(), _index_along(c), c.input(2), c.get("reduction", "none"))


def _scatter_nd(c: _Call) -> Array:
    index = tuple(np.moveaxis(c.input(1), -1, 0))
    return _scatter(c.x.copy(), index, c.input(2), c.get("reduction", "none"))


def _compress(c: _Call) -> Array:
    axis = c.get("axis")
    return np.compress(c.input(1), c.x if axis is not None else c.x.ravel(), axis)


def _top_k(c: _Call) -> list[Array]:
    axis = c.axis(-1)
    (k,) = c.integers(1, "k") or [0]
    if not 0 <= k <= c.x.shape[axis]:
        raise InputError(f"k is {k}, the axis has {c.x.shape[axis]}")
    if not c.get("largest", 1):
        order = np.argsort(c.x, axis, kind="stable")
    else:
        # Of equal values the first comes first.
        flipped = np.flip(c.x, axis)
        order = c.x.shape[axis] - 1 - np.flip(np.argsort(flipped, axis, kind="stable"), axis)
    order = np.take(order, np.arange(k), axis)
    return [np.take_along_axis(c.x, order, axis), order.astype(np.int64)]


def _cumulative(c: _Call) -> Array:
    axis = int(c.input(1).item())
    x = np.flip(c.x, axis) if c.get("reverse", 0) else c.x
    function = np.add if c.op == "CumSum" else np.multiply
    y = function.accumulate(x, axis, dtype=x.dtype)
    if c.get("exclusive", 0) and y.size:
        first = np.full_like(np.take(y, [0], axis), function.identity)
        y = np.concatenate([first, np.delete(y, -1, axis)], axis)
    return np.flip(y, axis) if c.get("reverse", 0) else y


# --- reductions ---------------------------------------------------------------------------------


def _log_sum_exp(x: Array, **k: Any) -> Array:
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    top = np.max(x, axis=k["axis"], keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    sums = np.log(np.sum(np.exp(x - top), axis=k["axis"], keepdims=True)) + top
    return sums if k["keepdims"] else np.squeeze(sums, k["axis"])


_REDUCE: dict[str, Callable[..., Array]] = {
    "L1": lambda x, **k: np.sum(np.abs(x), **k),
    "L2": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "LogSum": lambda x, **k: np.log(np.sum(x, **k)),
    "LogSumExp": _log_sum_exp,
    "Max": lambda x, **k: np.max(x, initial=_least(x.dtype), **k),
    "Mean": lambda x, axis, keepdims: _mean(x, axis, keepdims),
    "Min": lambda x, **k: np.min(x, initial=_largest(x.dtype), **k),
    "Prod": np.prod,
    "Sum": np.sum,
    "SumSquare": lambda x, **k: np.sum(x * x, **k),
}  # fmt: skip


def _least(dtype: np.dtype) -> Any:
    if dtype.kind == "b":
        return False
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _largest(dtype: np.dtype) -> Any:
    if dtype.kind == "b":
        return True
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


def _reduce(c: _Call) -> Array:
    axes = c.integers(1, "axes")
    if not axes and c.get("noop_with_empty_axes", 0):
        # Of single elements.
        axes = []
    elif not axes:
        axes = list(range(c.x.ndim))
    if any(not -c.x.ndim <= axis < c.x.ndim for axis in axes):
        raise InputError(f"axes {axes} are beyond rank {c.x.ndim}")
    keep = bool(c.get("keepdims", 1))
    y = _REDUCE[c.op.removeprefix("Reduce")](c.x, axis=tuple(axes), keepdims=keep)
    return np.asarray(y).astype(c.x.dtype, copy=False)


def _arg_extreme(c: _Call) -> Array:
    axis = c.axis(0)
    find = np.argmax if c.op == "ArgMax" else np.argmin
    if c.get("select_last_index", 0):
        y = c.x.shape[axis] - 1 - find(np.flip(c.x, axis), axis)
    else:
        y = find(c.x, axis)
    y = np.asarray(y, np.int64)
    return np.expand_dims(y, axis) if c.get("keepdims", 1) else y


# --- products and normalisations ----------------------------------------------------------------


def _matmul(a: Array, b: Array) -> Array:
    rows, columns = a.shape[:-1][-1:], b.shape[1:][-1:]
    _limited([*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns])
    return np.matmul(a, b)


def _gemm(c: _Call) -> Array:
    a = c.x.T if c.get("transA", 0) else c.x
    b = c.input(1).T if c.get("transB", 0) else c.input(1)
    if a.ndim != 2 or b.ndim != 2:
        raise InputError("multiplies matrices")
    y, kind = _matmul(a, b), c.x.dtype.type
    if c.get("alpha", 1.0) != 1.0:
        y *= kind(c.get("alpha"))
    bias = c.optional(2)
    if bias is not None:
        y += bias if c.get("beta", 1.0) == 1.0 else kind(c.get("beta")) * bias
    return y


def _einsum(c: _Call) -> Array:
    arrays, equation = c.all(), c.get("equation", "").replace(" ", "")
    terms, _, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, x in zip(terms.split(","), arrays, strict=True):
        # The axes that "..." stands for count from the last.
        letters = term.replace("...", "")
        start = term.find("...")
        more = [f"...{i}" for i in range(x.ndim - len(letters), 0, -1)] if start >= 0 else []
        names = [*letters[:start], *more, *letters[start:]] if more else [*letters]
        for name, size in zip(names, x.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    wanted = result if "->" in equation else "".join({i for i in terms if terms.count(i) == 1})
    _limited([size for name, size in sizes.items() if name in wanted or name.startswith("...")])
    return np.einsum(equation, *arrays)


def _softmax(c: _Call) -> Array:
    if c.opset < 13:
        # Of a matrix: all axes from `axis` on are one.
        return _softmax_of(c.op, _as_matrix(c.x, c.get("axis", 1)), 1).reshape(c.x.shape)
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


def _standardised(c: _Call, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return x with mean 0 and variance 1, its mean and what it was multiplied by."""
    x = _widened(x)
    mean = _mean(x, axes)
    y = x - mean
    inverse = 1 / np.sqrt(_mean(y * y, axes) + x.dtype.type(c.get("epsilon", 1e-5)))
    y *= inverse
    return y, mean, inverse


def _scaled(c: _Call, y: Array, scale: Array, bias: Array | None = None) -> Array:
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


def _batch_normalization(c: _Call) -> Array:
    if c.get("training_mode", 0):
        raise InputError("is in training mode; export the model for inference")
    gamma, beta, mean, variance = (_per_channel(c.input(i), c.x) for i in range(1, 5))
    y = c.x - mean
    y *= gamma / np.sqrt(variance + c.get("epsilon", 1e-5))
    y += beta
    return y.astype(c.x.dtype, copy=False)


def _instance_normalization(c: _Call) -> Array:
    y, _, _ = _standardised(c, c.x, tuple(range(2, c.x.ndim)))
    return _scaled(c, y, *(_per_channel(c.input(i), c.x) for i in (1, 2)))


def _group_normalization(c: _Call) -> Array:
    x, groups = c.x, c.get("num_groups", 0)
    if groups < 1 or x.ndim < 2 or x.shape[1] % groups:
        raise InputError(f"cannot make {groups} groups of channels of the shape {x.shape}")
    parts = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    y = _standardised(c, parts, (2,))[0].reshape(x.shape)
    repeats = x.shape[1] // groups if c.opset < 21 else 1  # one value per group then
    return _scaled(c, y, *(_per_channel(np.repeat(c.input(i), repeats), x) for i in (1, 2)))


def _layer_normalization(c: _Call) -> list[Array]:
    y, *statistics = _standardised(c, c.x, tuple(range(c.axis(-1), c.x.ndim)))
    dtype = _dtype(c.get("stash_type", 1))
    y = _scaled(c, y, c.input(1), c.optional(2))
    return [y, *(v.astype(dtype, copy=False) for v in statistics)]


def _rms_normalization(c: _Call) -> Array:
    x = _widened(c.x)
    square = _mean(x * x, tuple(range(c.axis(-1), x.ndim)))
    return _scaled(c, x / np.sqrt(square + x.dtype.type(c.get("epsilon", 1e-5))), c.input(1))


def _lp_normalization(c: _Call) -> Array:
    p, axis = c.get("p", 2), c.axis(-1)
    norm = np.sum(np.abs(c.x) ** p, axis=axis, keepdims=True) ** (1 / p)
    return np.divide(c.x, norm, out=np.zeros_like(c.x), where=norm != 0).astype(c.x.dtype)


def _mean_variance_normalization(c: _Call) -> Array:
    axes = tuple(c.get("axes", [0, 2, 3]))
    centred = c.x - _mean(c.x, axes)
    deviation = np.sqrt(_mean(centred * centred, axes))
    return centred / (deviation + c.x.dtype.type(1e-9))


def _local_response_normalization(c: _Call) -> Array:
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


def _global_pool(c: _Call) -> Array:
    axes = tuple(range(2, c.x.ndim))
    if c.op == "GlobalAveragePool":
        return _mean(c.x, axes)
    return np.max(c.x, axis=axes, keepdims=True, initial=_least(c.x.dtype))


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a pooling operator lie on the axes after the second."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    more: list[int]  # what windows beyond the padding need, with ceil_mode
    counts: list[int]

    def padded(self, x: Array, value: Any, more: Any) -> Array:
        """Return an array inside its padding, and what is beyond that."""
        sizes = x.shape[x.ndim - len(self.pads) :]
        rest = [(0, 0)] * (x.ndim - len(sizes))
        ends = zip(sizes, self.pads, self.more, strict=True)
        _limited([*x.shape[: len(rest)], *(n + sum(pads) + end for n, pads, end in ends)])
        x = np.pad(x, [*rest, *self.pads], constant_values=value)
        return np.pad(x, [*rest, *((0, n) for n in self.more)], constant_values=more)

    def taps(self, x: Array) -> Iterator[Array]:
        """Yield for each position in a window what all windows have there."""
        steps = list(zip(self.strides, self.dilations, self.counts, strict=True))
        for position in itertools.product(*map(range, self.kernel)):
            index: list[Any] = [...]
            for k, (s, d, n) in zip(position, steps, strict=True):
                index.append(slice(k * d, k * d + (n - 1) * s + 1, s))
            yield x[tuple(index)]


def _windows(c: _Call) -> _Windows:
    sizes = c.x.shape[2:]
    rank = len(sizes)
    kernel, ones = c.get("kernel_shape", []), [1] * rank
    strides, dilations = c.get("strides", ones), c.get("dilations", ones)
    given, mode = c.get("pads", [0] * (2 * rank)), c.get("auto_pad", "NOTSET")
    if rank < 1 or min(kernel + strides + dilations) < 1 or min(given) < 0:
        raise InputError("has no windows of such sizes")
    found = _Windows(kernel, strides, dilations, [], [], [])
    for axis, (size, k, stride, dilation) in enumerate(
        zip(sizes, kernel, strides, dilations, strict=True)
    ):
        extent, (before, after) = dilation * (k - 1) + 1, (given[axis], given[axis + rank])
        if mode == "VALID":
            before = after = 0
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
            before = (total + (mode == "SAME_LOWER")) // 2
            after = total - before
        room = size + before + after - extent
        count = (-(-room // stride) if c.get("ceil_mode", 0) else room // stride) + 1
        # No window begins in the padding at the end.
        count -= (count - 1) * stride >= size + before
        if count < 1:
            raise InputError(f"has windows of {extent} on a size of {size}")
        found.pads.append((before, after))
        found.counts.append(count)
        found.more.append(max((count - 1) * stride + extent - size - before - after, 0))
    return found


def _max_pool(c: _Call) -> list[Array]:
    windows, least = _windows(c), _least(c.x.dtype)
    taps = windows.taps(windows.padded(c.x, least, least))
    if c.outputs < 2:
        return [reduce(np.maximum, taps)]
    sizes = c.x.shape[2:]
    places: Array = np.arange(math.prod(sizes), dtype=np.int64)
    if c.get("storage_order", 0):
        places = places.reshape(sizes[::-1]).T
    places = places.reshape(sizes)
    # Of equal values the first comes first.
    first, *rest = zip(taps, windows.taps(windows.padded(places, -1, -1)), strict=True)
    y = first[0].copy()
    index = np.broadcast_to(first[1], y.shape).copy()
    for tap, place in rest:
        better = (tap > y) | ((index < 0) & (place >= 0))
        np.copyto(y, tap, where=better)
        np.copyto(index, place, where=better)
    planes = np.arange(math.prod(c.x.shape[:2])).reshape(*c.x.shape[:2], *(1,) * len(sizes))
    return [y, index + planes * places.size]


def _average_pool(c: _Call) -> Array:
    windows, x = _windows(c), _widened(c.x)
    total = reduce(np.add, windows.taps(windows.padded(x, 0, 0)))
    ones = np.ones(x.shape[2:], x.dtype)
    counted = windows.padded(ones, 1 if c.get("count_include_pad", 0) else 0, 0)
    return (total / reduce(np.add, windows.taps(counted))).astype(c.x.dtype, copy=False)


def _lp_pool(c: _Call) -> Array:
    windows, p = _windows(c), c.get("p", 2)
    taps = windows.taps(windows.padded(np.abs(_widened(c.x)) ** p, 0, 0))
    return (reduce(np.add, taps) ** (1 / p)).astype(c.x.dtype, copy=False)


def _upsample(c: _Call) -> list[Array]:
    """Run what became Resize, as that."""
    scales = c.optional(1)
    if scales is None:
        scales = np.array(c.get("scales"), np.float32)
    attributes = {
        "mode": c.get("mode", "nearest"), "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }  # fmt: skip
    return compute("Resize", attributes, 13, [c.x, None, scales], 1)


# --- the long tail ------------------------------------------------------------------------------


def _convolved(c: _Call, x: Array, weights: Array) -> list[int]:
    """Return the padded size of a convolution, or, if that is more, the transposed one's result."""
    rank = x.ndim - 2
    ones = [1] * rank
    pads, strides = c.get("pads", [0] * (2 * rank)), c.get("strides", ones)
    extents = [
        d * (k - 1) + 1 for d, k in zip(c.get("dilations", ones), weights.shape[2:], strict=True)
    ]
    _limited([*weights.shape[:2], *extents])
    before = [n + max(pads[i], 0) + max(pads[i + rank], 0) for i, n in enumerate(x.shape[2:])]
    if c.op != "ConvTranspose":
        return [*x.shape[:2], *before]
    more = c.get("output_padding", [0] * rank)
    made = [n * s + e + m for n, s, e, m in zip(before, strides, extents, more, strict=True)]
    wanted = c.get("output_shape", made)
    return [x.shape[0], weights.shape[1] * c.get("group", 1), *map(max, made, wanted)]


def _resized(c: _Call) -> list[int]:
    sizes = list(c.x.shape)
    axes = [axis % c.x.ndim for axis in c.get("axes", list(range(c.x.ndim)))]
    wanted = c.integers(3, "")
    if wanted:
        scales = [w / max(c.x.shape[i], 1) for i, w in zip(axes, wanted, strict=True)]
    else:
        scales = c.input(2).tolist()
    if c.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        scales = [max(scales, default=1)] * len(axes)
    for axis, scale in zip(axes, scales, strict=True):
        sizes[axis] = math.ceil(sizes[axis] * scale)
    return sizes


def _transformed(c: _Call) -> list[int]:
    axis = c.get("axis", 1) if c.opset < 20 else (c.integers(2, "") or [-2])[0]
    size = c.x.shape[axis]
    return [2, c.x.size // max(size, 1), *(c.integers(1, "") or [size])]


def _framed(c: _Call) -> list[int]:
    window = c.optional(2)
    (size,) = c.integers(3, "") or [0 if window is None else window.size]
    frames = (c.x.shape[1] - size) // (c.integers(1, "") or [1])[0] + 1
    return [2, c.x.shape[0], max(frames, 0), size]


def _attended(c: _Call) -> list[int]:
    keys, past = c.input(1), c.optional(4)
    heads = c.x.shape[1] if c.x.ndim == 4 else c.get("q_num_heads", 1)
    count = keys.shape[-2] + (0 if past is None else past.shape[-2])
    return [c.x.shape[0], heads, c.x.shape[-2], count]


def _cropped(c: _Call) -> list[int]:
    sizes = list(c.x.shape)
    axes = c.get("axes", list(range(c.x.ndim)))
    for axis, size in zip(axes, c.integers(1, "") or [], strict=True):
        sizes[axis] = size
    return sizes


def _unpooled(c: _Call) -> list[int]:
    rank = c.x.ndim - 2
    strides, kernel = c.get("strides", [1] * rank), c.get("kernel_shape", [1] * rank)
    made = [n * s + k for n, s, k in zip(c.x.shape[2:], strides, kernel, strict=True)]
    return c.integers(2, "") or [*c.x.shape[:2], *made]


def _product_of(c: _Call, a: int, b: int) -> list[int]:
    x, y = c.input(a).shape, c.input(b).shape
    return [*np.broadcast_shapes(x[:-2], y[:-2]), *x[:-1][-1:], *y[1:][-1:]]


def _aligned(c: _Call) -> list[int]:
    sizes = [c.get("output_height", 1), c.get("output_width", 1)]
    samples = max(c.get("sampling_ratio", 0), 1)
    _limited([64, *sizes, samples, samples])  # each is a Python object
    return [len(c.input(1)), c.x.shape[1], *sizes]


def _length(c: _Call) -> list[int]:
    return c.integers(0, "") or []


# How large operators' results are, or what they are made from, of those whose inputs are not: the
# rest are as large as these.
_SIZES: dict[str, Callable[[_Call], Sequence[int]]] = {
    "AffineGrid": lambda c: [3, *(c.integers(1, "") or [])],
    "Attention": _attended,
    "BlackmanWindow": _length,
    "CenterCropPad": _cropped,
    "Col2Im": lambda c: [
        *c.x.shape[:2], *(n + 2 * max(c.get("pads", [0])) for n in c.integers(1, "") or [])
    ],
    "Conv": lambda c: _convolved(c, c.x, c.input(1)),
    "ConvInteger": lambda c: _convolved(c, c.x, c.input(1)),
    "ConvTranspose": lambda c: _convolved(c, c.x, c.input(1)),
    "DFT": _transformed,
    "DeformConv": lambda c: _convolved(c, c.x, c.input(1)),
    "EyeLike": lambda c: [c.x.shape[0], c.x.shape[-1]],
    "GRU": lambda c: [*c.x.shape[:2], *c.input(1).shape[:2]],
    "GridSample": lambda c: [*c.x.shape[:2], *c.input(1).shape[1:]],
    "HammingWindow": _length,
    "HannWindow": _length,
    "LSTM": lambda c: [*c.x.shape[:2], *c.input(1).shape[:2]],
    "MatMulInteger": lambda c: _product_of(c, 0, 1),
    "MaxRoiPool": lambda c: [len(c.input(1)), c.x.shape[1], *c.get("pooled_shape", [])],
    "MaxUnpool": _unpooled,
    "MelWeightMatrix": lambda c: [*(c.integers(0, "") or []), *(c.integers(1, "") or [])],
    "QLinearConv": lambda c: _convolved(c, c.x, c.input(3)),
    "QLinearMatMul": lambda c: _product_of(c, 0, 3),
    "RNN": lambda c: [*c.x.shape[:2], *c.input(1).shape[:2]],
    "Resize": _resized,
    "RoiAlign": _aligned,
    "STFT": _framed,
}  # fmt: skip


def _through_reference(c: _Call) -> list[Array]:
    c.input(0)  # no operator does without
    if c.op == "Resize" and c.opset < 11:
        attributes = {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return compute("Resize", {**c.attributes, **attributes}, 13, [c.x, None, c.input(1)], 1)
    if c.op in _SIZES:
        _limited(_SIZES[c.op](c))
    given = tuple("" if x is None else x.dtype.name for x in c.inputs)
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in c.attributes.items()
    }
    evaluator = _evaluator(c.op, tuple(sorted(values.items())), c.opset, given, c.outputs)
    return evaluator.run(None, {f"x{i}": x for i, x in enumerate(c.inputs) if x is not None})


@cache
def _evaluator(
    op: str, attributes: tuple[tuple[str, Any], ...], opset: int, given: tuple[str, ...],
    outputs: int,
) -> Any:  # fmt: skip
    try:
        from onnx import helper
        from onnx.reference import ReferenceEvaluator
    except ModuleNotFoundError:
        raise InputError("needs the package onnx: pip install onnx") from None
    inputs = {f"x{i}": dtype for i, dtype in enumerate(given) if dtype}
    names = [f"x{i}" if dtype else "" for i, dtype in enumerate(given)]
    results = [f"y{i}" for i in range(outputs)]
    values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in attributes}
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        for name, dtype in inputs.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **values)], "node", infos,
        [helper.make_tensor_value_info(name, 0, None) for name in results],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ReferenceEvaluator(model)


# --- all of them --------------------------------------------------------------------------------


def _of_one(function: Callable[[Array], Array]) -> Callable[[_Call], Array]:
    return lambda c: _each(function, c.x)


def _of_two(function: Callable[[Array, Array], Array]) -> Callable[[_Call], Array]:
    def run(c: _Call) -> Array:
        _broadcast(c.x, c.input(1))
        return function(c.x, c.input(1))

    return run


def _of_all(function: Callable[[list[Array]], Array]) -> Callable[[_Call], Array]:
    def run(c: _Call) -> Array:
        _limited(np.broadcast_shapes(*(x.shape for x in c.all())))
        return function(c.all())

    return run


_OWN: dict[str, Callable[[_Call], Any]] = {
    **{op: _of_one(f) for op, f in _UNARY.items()},
    **{op: _of_two(f) for op, f in _BINARY.items()},
    **{op: _of_all(f) for op, f in _VARIADIC.items()},
    **dict.fromkeys(_PARAMETRIC, _parametric),
    **{f"Reduce{kind}": _reduce for kind in _REDUCE},
    "ArgMax": _arg_extreme, "ArgMin": _arg_extreme, "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization, "BitCast": _bit_cast, "BitShift": _bit_shift,
    "Cast": _cast,
    "CastLike": _cast, "Clip": _clip, "Compress": _compress, "Concat": _concat,
    "CumProd": _cumulative, "CumSum": _cumulative, "DepthToSpace": _depth_to_space,
    "Dropout": _dropout, "Einsum": _einsum, "Expand": _expand,
    "Flatten": _flatten, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd, "Gemm": _gemm, "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool, "GroupNormalization": _group_normalization,
    "Hardmax": _softmax, "InstanceNormalization": _instance_normalization,
    "LRN": _local_response_normalization, "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax, "LpNormalization": _lp_normalization, "LpPool": _lp_pool,
    "MatMul": lambda c: _matmul(c.x, c.input(1)), "MaxPool": _max_pool,
    "MeanVarianceNormalization": _mean_variance_normalization, "Mod": _mod,
    "NonZero": lambda c: np.array(np.nonzero(c.x), np.int64).reshape(c.x.ndim, -1),
    "OneHot": _one_hot, "Pad": _pad, "RMSNormalization": _rms_normalization, "Range": _range,
    "Reshape": _reshape, "Scatter": _scatter_elements, "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd, "Shape": _shape,
    "Size": lambda c: np.array(c.x.size, np.int64), "Slice": _slice, "Softmax": _softmax,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze,
    "SwiGLU": _swiglu, "Tile": _tile,
    "TopK": _top_k, "Transpose": _transpose, "Trilu": _trilu, "Unsqueeze": _unsqueeze,
    "Upsample": _upsample, "Where": _where,
}  # fmt: skip

OPERATORS = frozenset(_OWN) | SLOW
