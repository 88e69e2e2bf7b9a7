"""The packed graph: its nodes, tensors and their quantization, as a `.stlq` file stores them.

Shapes and axes are ONNX's (N, C, H, W); how tensors lie in memory is the plan's business. A tensor
named in `Graph.quantization` holds uint8 codes. Packed operators (`operators/`) work on codes or on
float32; nodes of the domain "ai.onnx" are ONNX operators in ONNX's own form (`onnx_ops/`), on
tensors of any type and rank but codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logshift.kernels.activation import Activation
from logshift.kernels.codes import dequantize, quantize
from logshift.kernels.stlq.codec import LogWeights

Shape = tuple[int, ...]
Dim = int | str

# Far above any real network; keeps every size and index of a kernel inside int64 and every buffer
# inside what an allocator can answer for.
MAX_ELEMENTS = 2**31 - 1
MAX_ATTRIBUTE = 2**16
MAX_RANK = 8

ONNX_DOMAIN = "ai.onnx"
NEWEST_OPSET = 28

# Types of tensors that are no codes.
DTYPES = (
    "float32", "float64", "float16", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """Activation quantization x = scale * (c - zero_point), codes c in [0, 2^bits - 1]."""

    scale: float
    zero_point: int
    bits: int

    @property
    def top(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Return the codes of real values, uint8."""
        x = np.asarray(x, np.float32)
        codes = np.empty(x.shape, np.uint8)
        scale, zero, top = (np.float32(v) for v in (self.scale, self.zero_point, self.top))
        quantize(x.reshape(-1), scale, zero, top, codes.reshape(-1))
        return codes

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """Return the real values of codes, float32."""
        codes = np.asarray(codes)
        x = np.empty(codes.shape, np.float32)
        zero, scale = np.float32(self.zero_point), np.float32(self.scale)
        dequantize(codes.reshape(-1), zero, scale, x.reshape(-1))
        return x


@dataclass(frozen=True)
class ValueInfo:
    """A graph input or output; `shape` may name dimensions, `nominal` gives their size."""

    name: str
    shape: tuple[Dim, ...]
    nominal: Shape
    dtype: str = "float32"


@dataclass
class Node:
    """One operation.

    Attributes
    ----------
    op : str
        A key of `operators.OPERATORS`, or an ONNX operator.
    name : str
        Name of the ONNX node it came from.
    inputs, outputs : tensor names
        Packed operators have one output; "" stands for what an ONNX operator can do without.
    attributes : dict
        ONNX names and meanings; `validate` fills in defaults.
    weights : LogWeights, optional
        Conv and ConvTranspose; shape (O, kh, kw, C / group).
    float_weights : float32 array (O, kh, kw, C / group), optional
        Instead of `weights`, of a Conv or ConvTranspose on float32 that is not quantized.
    bias : float32 array of shape (O,), optional
        With weights of either kind.
    table : uint8 array of shape (256,) or (C, 256), optional
        Lookup: one table, or one for each channel.
    activation : Activation, optional
        Of a convolution or of arithmetic whose output is codes.
    domain : str
        "" for a packed operator, "ai.onnx" for an ONNX operator.
    """

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    weights: LogWeights | None = None
    bias: np.ndarray | None = None
    table: np.ndarray | None = None
    float_weights: np.ndarray | None = None
    activation: Activation | None = None
    domain: str = ""

    @property
    def is_onnx(self) -> bool:
        """Tell whether it is an ONNX operator in ONNX's own form."""
        return self.domain == ONNX_DOMAIN

    @property
    def weight_shape(self) -> Shape | None:
        """(O, kh, kw, C / group), or None without weights."""
        if self.weights is not None:
            return self.weights.shape
        return None if self.float_weights is None else self.float_weights.shape


@dataclass(frozen=True)
class ConstantWords:
    """A constant whose values are those of words.

    Attributes
    ----------
    weights : LogWeights
        Shape (O, 1, 1, K): rows are what the constant holds at each place along `axes`.
    shape : Shape
        Of the constant.
    axes : tuple of int
        Those that have an alpha for each place, in this order; O is the product of their sizes.
    """

    weights: LogWeights
    shape: Shape
    axes: tuple[int, ...]

    def values(self) -> np.ndarray:
        """Return the constant, float32."""
        w = self.weights.integers().reshape(self.weights.shape[0], -1)
        matrix = np.empty(w.shape, np.float32)
        # In float64 until the last step, a piece at a time.
        np.multiply(w, self.weights.unit()[:, None], out=matrix, casting="same_kind")
        order = rows_first(self.axes, len(self.shape))
        front = matrix.reshape([self.shape[axis] for axis in order])
        return np.ascontiguousarray(front.transpose(np.argsort(order)))


def rows_first(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return all axes in the order in which the words of a constant have them."""
    return (*axes, *(axis for axis in range(rank) if axis not in axes))


@dataclass
class Graph:
    """A packed network.

    Attributes
    ----------
    inputs, outputs : list of ValueInfo
    quantization : dict of tensor name to Quantization
    nodes : list of Node, in execution order
    preprocessing : dict, optional
        See `runtime.picture.Preprocessing`.
    labels : list of str, optional
        Class labels of the first output.
    settings : dict
        How the converter was called; for the reader's eye only.
    producer : str
        Name and version of the program that made it, if known; for the reader's eye only.
    constants : dict of tensor name to array
        Constant inputs of ONNX operators.
    constant_words : dict of tensor name to ConstantWords
        What constants that are stored as words are made of; `constants` has their values.
    opset : int
        Version of the ONNX operators.
    """

    inputs: list[ValueInfo]
    outputs: list[ValueInfo]
    quantization: dict[str, Quantization]
    nodes: list[Node]
    preprocessing: dict[str, Any] | None = None
    labels: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    opset: int = NEWEST_OPSET
    producer: str = ""
    constant_words: dict[str, ConstantWords] = field(default_factory=dict)

    def is_code(self, tensor: str) -> bool:
        """Tell whether a tensor holds uint8 codes."""
        return tensor in self.quantization

    def on_codes(self, node: Node) -> bool:
        """Tell whether a node reads codes."""
        return any(self.is_code(name) for name in node.inputs)

    def nominal_inputs(self) -> dict[str, Shape]:
        """Nominal shapes of the inputs."""
        return {info.name: info.nominal for info in self.inputs}


@dataclass(frozen=True)
class Inference:
    """What is known of a graph's tensors before a run; see `infer`.

    Attributes
    ----------
    shapes : dict of tensor name to Shape
        (N, C, H, W) of packed operators' tensors. Tensors are missing if their shapes depend on
        values that only a run can tell.
    dtypes : dict of tensor name to dtype
        Of the same tensors; uint8 for codes.
    values : dict of tensor name to array
        Constants, and what follows from them and from shapes.
    """

    shapes: dict[str, Shape]
    dtypes: dict[str, np.dtype]
    values: dict[str, np.ndarray]
