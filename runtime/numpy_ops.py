"""ONNX operators in NumPy, for what a packed network need not quantize.

Semantics are those of the ONNX operator specification at the version that is asked for. What no
ordinary network needs goes through `onnx.reference`, slowly, if the package onnx is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError

Array = np.ndarray

_MAX_ELEMENTS = 2**31 - 1

# Operators whose results' shapes depend on the values of their inputs.
DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

# Operators that `onnx.reference` runs.
SLOW = frozenset(
    {
        "AffineGrid", "Attention", "AveragePool", "BlackmanWindow", "CenterCropPad", "Col2Im",
        "Conv", "ConvInteger", "ConvTranspose", "DFT", "DeformConv", "DequantizeLinear", "Det",
        "DynamicQuantizeLinear", "EyeLike", "GRU", "GlobalLpPool", "GridSample", "HammingWindow",
        "HannWindow", "LSTM", "LpPool", "MatMulInteger", "MaxPool", "MaxRoiPool", "MaxUnpool",
        "MelWeightMatrix", "NegativeLogLikelihoodLoss", "NonMaxSuppression", "QLinearConv",
        "QLinearMatMul", "QuantizeLinear", "RNN", "Resize", "ReverseSequence", "RoiAlign",
        "RotaryEmbedding", "STFT", "SoftmaxCrossEntropyLoss", "TensorScatter", "Unique", "Upsample",
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

    def optional(self, index: int) -> Array | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def integers(self, index: int, name: str) -> list[int] | None:
        """Return integers that newer versions take as an input, older ones as an attribute."""
        given = self.optional(index)
        if given is not None:
            return [int(v) for v in given.ravel()]
        value = self.get(name)
        return value if value is None or isinstance(value, list) else [value]

    def axis(self, default: int) -> int:
        axis, rank = self.get("axis", default), self.x.ndim
        if not -rank <= axis < max(rank, 1):
            raise InputError(f"axis {axis} is beyond rank {rank}")
        return axis % max(rank, 1)


def _limited(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that an array may have."""
    sizes = tuple(int(size) for size in shape)
    if math.prod(sizes) > _MAX_ELEMENTS or min(sizes, default=0) < 0:
        raise InputError(f"its result would have the shape {sizes}")
    return sizes


# --- element-wise -------------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    # Abramowitz and Stegun, 7.1.26: within 1.5e-7.
    a = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * a)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (
        -1.453152027 + t * 1.061405429))))  # fmt: skip
    return np.copysign(1 - p * np.exp(-a * a), x).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    # exp of what is not positive: no overflow.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, x.dtype.type(0))


def _gelu(x: Array, approximate: str) -> Array:
    if approximate == "tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def _selu(x: Array, alpha: float, gamma: float) -> Array:
    return gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _shrink(x: Array, bias: float, lambd: float) -> Array:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


def _is_infinite(x: Array, detect_negative: int, detect_positive: int) -> Array:
    return (np.isposinf(x) & bool(detect_positive)) | (np.isneginf(x) & bool(detect_negative))


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "Abs": np.abs, "Acos": np.arccos, "Acosh": np.arccosh, "Asin": np.arcsin,
    "Asinh": np.arcsinh, "Atan": np.arctan, "Atanh": np.arctanh, "BitwiseNot": np.invert,
    "Ceil": np.ceil, "Cos": np.cos, "Cosh": np.cosh, "Erf": _erf, "Exp": np.exp,
    "Floor": np.floor, "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "Identity": lambda x: x, "IsNaN": np.isnan, "Log": np.log,
    "Mish": lambda x: x * np.tanh(_softplus(x)), "Neg": np.negative, "Not": np.logical_not,
    "Reciprocal": lambda x: x.dtype.type(1) / x, "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Round": np.rint, "Sigmoid": _sigmoid, "Sign": np.sign, "Sin": np.sin, "Sinh": np.sinh,
    "Softplus": _softplus, "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt,
    "Tan": np.tan, "Tanh": np.tanh,
}  # fmt: skip

# With attributes, and their defaults.
_PARAMETRIC: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "Celu": (lambda x, alpha: np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0) / alpha),
             {"alpha": 1.0}),
    "Elu": (lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
            {"alpha": 1.0}),
    "Gelu": (_gelu, {"approximate": "none"}),
    "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "IsInf": (_is_infinite, {"detect_negative": 1, "detect_positive": 1}),
    "LeakyRelu": (lambda x, alpha: np.where(x < 0, alpha * x, x), {"alpha": 0.01}),
    "Selu": (_selu, {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}),
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
    "PRelu": lambda x, slope: np.where(x < 0, x * slope, x), "Pow": _power, "Sub": np.subtract,
    "Xor": np.logical_xor,
}  # fmt: skip

_VARIADIC: dict[str, Callable[[list[Array]], Array]] = {
    "Max": lambda xs: reduce(np.maximum, xs), "Min": lambda xs: reduce(np.minimum, xs),
    "Sum": lambda xs: reduce(np.add, xs),
    "Mean": lambda xs: reduce(np.add, xs) / xs[0].dtype.type(len(xs)),
}  # fmt: skip


def _parametric(c: _Call) -> Array:
    function, defaults = _PARAMETRIC[c.op]
    values = {name: c.get(name, default) for name, default in defaults.items()}
    y = function(c.x, **values)
    return y if y.dtype == bool else y.astype(c.x.dtype)


def _mod(c: _Call) -> Array:
    if not c.get("fmod", 0):
        return np.mod(c.x, c.input(1))
    return np.fmod(c.x, c.input(1))


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
    y = c.x
    if low is not None:
        y = np.maximum(y, np.asarray(low, y.dtype))
    return y if high is None else np.minimum(y, np.asarray(high, y.dtype))


def _where(c: _Call) -> Array:
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
    axis = c.get("axis", 1)
    axis += c.x.ndim if axis < 0 else 0
    return c.x.reshape(math.prod(c.x.shape[:axis]), -1)


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
    arrays = [c.input(i) for i in range(len(c.inputs))]
    return np.concatenate(arrays, c.axis(1))


def _split(c: _Call) -> list[Array]:
    axis = c.axis(0)
    size = c.x.shape[axis]
    sizes = c.integers(1, "split")
    if sizes is None:
        count = c.get("num_outputs", c.outputs)
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
            start = min(start + size if start < 0 else start, size - 1)
            end = max(end + size if end < 0 else end, -1)
            if start < 0:
                start = end  # nothing
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
        index[axis] = slice(max(-before, 0), x.shape[axis] + min(after, 0))
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
    return (np.triu if c.get("upper", 1) else np.tril)(c.x, k)


# --- indices ------------------------------------------------------------------------------------


def _gather(c: _Call) -> Array:
    indices = c.input(1)
    axis = c.axis(0)
    _limited([*c.x.shape[:axis], *indices.shape, *c.x.shape[axis + 1 :]])
    return np.take(c.x, indices, axis)


def _gather_elements(c: _Call) -> Array:
    return np.take_along_axis(c.x, c.input(1), c.axis(0))


def _gather_nd(c: _Call) -> Array:
    x, indices, batch = c.x, c.input(1), c.get("batch_dims", 0)
    shape = x.shape[:batch]
    x = x.reshape(-1, *x.shape[batch:])
    rows = indices.reshape(len(x), *indices.shape[batch:])
    found = np.stack([a[tuple(np.moveaxis(i, -1, 0))] for a, i in zip(x, rows, strict=True)])
    return found.reshape(*shape, *found.shape[1:])


_REDUCTIONS: dict[str, Any] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum
}  # fmt: skip


def _scatter(y: Array, index: Any, updates: Array, reduction: str) -> Array:
    if reduction == "none":
        y[index] = updates
    else:
        _REDUCTIONS[reduction].at(y, index, updates)
    return y


def _scatter_elements(c: _Call) -> Array:
    indices, axis = c.input(1), c.axis(0)
    index = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[axis] = np.where(indices < 0, indices + c.x.shape[axis], indices)
    return _scatter(c.x.copy(), tuple(index), c.input(2), c.get("reduction", "none"))


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


def _cumulative_sum(c: _Call) -> Array:
    axis = int(c.input(1).item())
    x = np.flip(c.x, axis) if c.get("reverse", 0) else c.x
    y = np.cumsum(x, axis, dtype=x.dtype)
    if c.get("exclusive", 0):
        y = y - x
    return np.flip(y, axis) if c.get("reverse", 0) else y


# --- reductions ---------------------------------------------------------------------------------


def _log_sum_exp(x: Array, **k: Any) -> Array:
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
    "Mean": np.mean,
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
    keep = bool(c.get("keepdims", 1))
    y = _REDUCE[c.op.removeprefix("Reduce")](c.x, axis=tuple(axes), keepdims=keep)
    return np.asarray(y).astype(c.x.dtype)


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


def _gemm(c: _Call) -> Array:
    a = c.x.T if c.get("transA", 0) else c.x
    b = c.input(1).T if c.get("transB", 0) else c.input(1)
    kind = c.x.dtype.type
    y = a @ b
    if c.get("alpha", 1.0) != 1.0:
        y = kind(c.get("alpha")) * y
    bias = c.optional(2)
    if bias is not None:
        y = y + (bias if c.get("beta", 1.0) == 1.0 else kind(c.get("beta")) * bias)
    return y


def _einsum(c: _Call) -> Array:
    arrays = [c.input(i) for i in range(len(c.inputs))]
    return np.einsum(c.get("equation").replace(" ", ""), *arrays)


def _softmax(c: _Call) -> Array:
    x = c.x
    if c.opset < 13:
        # Of a matrix: all axes from `axis` on are one.
        axis = c.get("axis", 1)
        rows = math.prod(x.shape[: axis % x.ndim])
        return _softmax_of(c.op, x.reshape(rows, -1), 1).reshape(x.shape)
    return _softmax_of(c.op, x, c.axis(-1))


def _softmax_of(op: str, x: Array, axis: int) -> Array:
    if op == "Hardmax":
        y = np.zeros_like(x)
        np.put_along_axis(y, np.expand_dims(np.argmax(x, axis), axis), 1, axis)
        return y
    shifted = x - np.max(x, axis=axis, keepdims=True)
    e = np.exp(shifted)
    total = np.sum(e, axis=axis, keepdims=True)
    return shifted - np.log(total) if op == "LogSoftmax" else e / total


def _standardised(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    mean = np.mean(x, axis=axes, keepdims=True, dtype=x.dtype)
    centred = x - mean
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    inverse = 1 / np.sqrt(variance + x.dtype.type(epsilon))
    return centred * inverse, mean, inverse


def _per_channel(values: Array, rank: int) -> Array:
    return values.reshape(-1, *(1,) * (rank - 2))


def _batch_normalization(c: _Call) -> Array:
    if c.get("training_mode", 0):
        raise InputError("is in training mode; export the model for inference")
    gamma, beta, mean, variance = (_per_channel(c.input(i), c.x.ndim) for i in range(1, 5))
    scale = gamma / np.sqrt(variance + c.get("epsilon", 1e-5))
    return ((c.x - mean) * scale + beta).astype(c.x.dtype)


def _instance_normalization(c: _Call) -> Array:
    y, _, _ = _standardised(c.x, tuple(range(2, c.x.ndim)), c.get("epsilon", 1e-5))
    return y * _per_channel(c.input(1), c.x.ndim) + _per_channel(c.input(2), c.x.ndim)


def _group_normalization(c: _Call) -> Array:
    x, groups = c.x, c.get("num_groups")
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _standardised(grouped, (2,), c.get("epsilon", 1e-5))[0].reshape(x.shape)
    scale, bias = c.input(1), c.input(2)
    if c.opset < 21:  # one value per group then
        scale, bias = (np.repeat(v, x.shape[1] // groups) for v in (scale, bias))
    return y * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


def _layer_normalization(c: _Call) -> list[Array]:
    axes = tuple(range(c.axis(-1), c.x.ndim))
    y, mean, inverse = _standardised(c.x, axes, c.get("epsilon", 1e-5))
    y = y * c.input(1)
    bias = c.optional(2)
    return [y if bias is None else y + bias, mean, inverse]


def _rms_normalization(c: _Call) -> Array:
    axes = tuple(range(c.axis(-1), c.x.ndim))
    square = np.mean(c.x * c.x, axis=axes, keepdims=True)
    return c.x / np.sqrt(square + c.x.dtype.type(c.get("epsilon", 1e-5))) * c.input(1)


def _lp_normalization(c: _Call) -> Array:
    p, axis = c.get("p", 2), c.axis(-1)
    norm = np.sum(np.abs(c.x) ** p, axis=axis, keepdims=True) ** (1 / p)
    return np.divide(c.x, norm, out=np.zeros_like(c.x), where=norm != 0).astype(c.x.dtype)


def _mean_variance_normalization(c: _Call) -> Array:
    axes = tuple(c.get("axes", [0, 2, 3]))
    centred = c.x - np.mean(c.x, axis=axes, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True))
    return centred / (deviation + c.x.dtype.type(1e-9))


def _local_response_normalization(c: _Call) -> Array:
    size = c.get("size")
    alpha, beta, bias = c.get("alpha", 1e-4), c.get("beta", 0.75), c.get("bias", 1.0)
    before, after = (size - 1) // 2, size // 2
    widths = [(0, 0)] * c.x.ndim
    widths[1] = (before, after)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(c.x * c.x, widths), size, 1)
    return (c.x / (bias + alpha / size * windows.sum(-1)) ** beta).astype(c.x.dtype)


def _global_pool(c: _Call) -> Array:
    axes = tuple(range(2, c.x.ndim))
    return (np.mean if c.op == "GlobalAveragePool" else np.max)(c.x, axis=axes, keepdims=True)


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


def _through_reference(c: _Call) -> list[Array]:
    if c.op == "Resize" and c.opset < 11:
        attributes = {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return compute("Resize", {**c.attributes, **attributes}, 13, [c.x, None, c.input(1)], 1)
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
    return lambda c: function(c.x)


def _of_two(function: Callable[[Array, Array], Array]) -> Callable[[_Call], Array]:
    return lambda c: function(c.x, c.input(1))


def _of_all(function: Callable[[list[Array]], Array]) -> Callable[[_Call], Array]:
    return lambda c: function([c.input(i) for i in range(len(c.inputs))])


_OWN: dict[str, Callable[[_Call], Any]] = {
    **{op: _of_one(f) for op, f in _UNARY.items()},
    **{op: _of_two(f) for op, f in _BINARY.items()},
    **{op: _of_all(f) for op, f in _VARIADIC.items()},
    **dict.fromkeys(_PARAMETRIC, _parametric),
    **{f"Reduce{kind}": _reduce for kind in _REDUCE},
    "ArgMax": _arg_extreme, "ArgMin": _arg_extreme,
    "BatchNormalization": _batch_normalization, "BitShift": _bit_shift, "Cast": _cast,
    "CastLike": _cast, "Clip": _clip, "Compress": _compress, "Concat": _concat,
    "CumSum": _cumulative_sum, "DepthToSpace": _depth_to_space,
    "Dropout": _dropout, "Einsum": _einsum, "Expand": _expand,
    "Flatten": _flatten, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd, "Gemm": _gemm, "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool, "GroupNormalization": _group_normalization,
    "Hardmax": _softmax, "InstanceNormalization": _instance_normalization,
    "LRN": _local_response_normalization, "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax, "LpNormalization": _lp_normalization,
    "MatMul": lambda c: np.matmul(c.x, c.input(1)),
    "MeanVarianceNormalization": _mean_variance_normalization, "Mod": _mod,
    "NonZero": lambda c: np.array(np.nonzero(c.x), np.int64).reshape(c.x.ndim, -1),
    "OneHot": _one_hot, "Pad": _pad, "RMSNormalization": _rms_normalization, "Range": _range,
    "Reshape": _reshape, "Scatter": _scatter_elements, "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd, "Shape": _shape,
    "Size": lambda c: np.array(c.x.size, np.int64), "Slice": _slice, "Softmax": _softmax,
    "SpaceToDepth": _space_to_depth, "Split": _split, "Squeeze": _squeeze, "Tile": _tile,
    "TopK": _top_k, "Transpose": _transpose, "Trilu": _trilu, "Unsqueeze": _unsqueeze,
    "Upsample": _upsample, "Where": _where,
}  # fmt: skip

OPERATORS = frozenset(_OWN) | SLOW
