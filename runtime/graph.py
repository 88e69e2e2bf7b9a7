"""The packed graph: nodes, quantization and shape inference, as stored in a `.stlq` file.

Shapes and axes are ONNX's (N, C, H, W); how tensors lie in memory is the executor's business.
A tensor named in `Graph.quantization` holds uint8 codes. Packed operators work on codes or on
float32; nodes of the domain "ai.onnx" are ONNX operators in ONNX's own form, on tensors of any type
and rank but codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logshift.kernels.errors import FormatError, InputError
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.onnx_ops import numpy_ops

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
        A key of `OPERATORS`, or an ONNX operator.
    name : str
        Name of the ONNX node it came from.
    inputs, outputs : tensor names
        Packed operators have one output; "" stands for what an ONNX operator can do without.
    attributes : dict
        ONNX names and meanings; defaults of `OPERATORS` filled in.
    weights : LogWeights, optional
        Conv and ConvTranspose; shape (O, kh, kw, C / group).
    float_weights : float32 array (O, kh, kw, C / group), optional
        Instead of `weights`, of a Conv or ConvTranspose on float32 that is not quantized.
    bias : float32 array of shape (O,), optional
        With weights of either kind.
    table : uint8 array of shape (256,) or (C, 256), optional
        Lookup: one table, or one for each channel.
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

    def weight_uses(self, shapes: Mapping[str, Shape]) -> int:
        """How often each weight is used: once per output position, or input one if transposed."""
        used = self.inputs[0] if self.op == "ConvTranspose" else self.outputs[0]
        n, _, height, width = shapes[used]
        return n * height * width


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
    constants : dict of tensor name to array
        Constant inputs of ONNX operators.
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

    def is_code(self, tensor: str) -> bool:
        """Tell whether a tensor holds uint8 codes."""
        return tensor in self.quantization

    def on_codes(self, node: Node) -> bool:
        """Tell whether a node reads codes."""
        return any(self.is_code(name) for name in node.inputs)

    def infer(
        self, inputs: Mapping[str, Shape], seen: dict[int, np.dtype | None] | None = None
    ) -> Inference:
        """Infer what can be known of all tensors from input shapes alone.

        Parameters
        ----------
        inputs : dict of input name to Shape
        seen : dict, optional
            What was learnt of ONNX operators of this graph, for the next time; empty at first.

        Raises
        ------
        InputError
            If the inputs do not fit the graph's declared shapes or a node cannot take them.
        """
        found = Inference({}, {}, dict(self.constants))
        for name, array in self.constants.items():
            found.shapes[name], found.dtypes[name] = array.shape, array.dtype
        bound: dict[str, int] = {}
        for info in self.inputs:
            shape = tuple(int(d) for d in inputs[info.name])
            declared = "(" + ", ".join(str(d) for d in info.shape) + ")"
            if len(shape) != len(info.shape):
                raise InputError(f"input {info.name!r} has shape {shape}, expected {declared}")
            for size, dim in zip(shape, info.shape, strict=True):
                expected = bound.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected or size < (dim != 0):
                    raise InputError(f"input {info.name!r} has shape {shape}, expected {declared}")
            found.shapes[info.name], found.dtypes[info.name] = shape, np.dtype(info.dtype)
        for index, node in enumerate(self.nodes):
            try:
                if node.is_onnx:
                    if seen is None or not _infer_quickly(index, node, found, seen):
                        _infer_onnx(self, node, found)
                        _learn(index, node, found, seen)
                else:
                    _infer_packed(self, node, found)
            except (_ShapeError, InputError) as error:
                raise InputError(f"node {node.name!r} ({node.op}): {error}") from None
        return found

    def nominal(self) -> Inference:
        """Infer at the nominal input size."""
        return self.infer(self.nominal_inputs())

    def nominal_inputs(self) -> dict[str, Shape]:
        """Nominal shapes of the inputs."""
        return {info.name: info.nominal for info in self.inputs}

    def nominal_shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors at the nominal input size."""
        return self.nominal().shapes

    def validate(self) -> None:
        """Check everything that a kernel will trust, except the input of a particular run.

        Raises
        ------
        FormatError
            Names the node or tensor and the rule that it breaks.
        """
        if not self.inputs or not self.outputs or not self.nodes:
            raise FormatError("the graph needs at least one input, one output and one node")
        for tensor, q in self.quantization.items():
            # Ratios of scales, times any sum of codes, stay far from float32 infinity.
            if not 1e-15 < q.scale < 1e15:
                raise FormatError(f"tensor {tensor!r}: scale {q.scale} is not in (1e-15, 1e15)")
            if not 2 <= q.bits <= 8:
                raise FormatError(f"tensor {tensor!r}: {q.bits} bits; codes have 2 to 8")
            if not 0 <= q.zero_point <= q.top:
                raise FormatError(f"tensor {tensor!r}: zero point {q.zero_point} is not a code")
        if not 1 <= self.opset <= NEWEST_OPSET:
            raise FormatError(f"opset {self.opset} is not known; known are 1 to {NEWEST_OPSET}")
        known: set[str] = set()
        for info in self.inputs:
            if info.name in known or self.is_code(info.name):
                raise FormatError(f"input {info.name!r} is given twice or holds codes")
            _check_value_info("input", info)
            known.add(info.name)
        for name, array in self.constants.items():
            if name in known or self.is_code(name) or not name:
                raise FormatError(f"constant {name!r} has the name of another tensor")
            if array.dtype.name not in DTYPES or array.ndim > MAX_RANK:
                raise FormatError(f"constant {name!r} is {array.dtype} of rank {array.ndim}")
            known.add(name)
        for node in self.nodes:
            label = f"node {node.name!r} ({node.op})"
            for name in node.inputs:
                if name not in known and not (node.is_onnx and name == ""):
                    raise FormatError(f"{label}: input {name!r} is produced by no earlier node")
            for name in node.outputs:
                if name in known:
                    raise FormatError(f"{label}: output {name!r} is produced twice")
                if name:
                    known.add(name)
            try:
                if node.is_onnx:
                    _check_onnx_node(self, node)
                else:
                    _check_node(self, node)
            except _ShapeError as error:
                raise FormatError(f"{label}: {error}") from None
        if unused := set(self.quantization) - known:
            raise FormatError(f"quantization given for unknown tensor {min(unused)!r}")
        for info in self.outputs:
            if info.name not in known or self.is_code(info.name):
                raise FormatError(f"output {info.name!r} is produced by no node or holds codes")
            _check_value_info("output", info)
        if len({info.name for info in self.outputs}) != len(self.outputs):
            raise FormatError("an output is given twice")
        try:
            found = self.nominal()
        except InputError as error:
            raise FormatError(str(error)) from None
        for info in self.outputs:
            # What only a run can tell is checked by nobody.
            shape = found.shapes.get(info.name, info.nominal)
            dtype = found.dtypes.get(info.name, np.dtype(info.dtype))
            if shape != info.nominal or dtype != info.dtype:
                raise FormatError(
                    f"output {info.name!r} is declared {info.dtype} {info.nominal} but the graph"
                    f" produces {dtype} {shape}"
                )


@dataclass(frozen=True)
class Inference:
    """What is known before a run.

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


class _ShapeError(Exception):
    """Inputs or attributes that an operator cannot take; wrapped with the node's name."""


def _check_value_info(kind: str, info: ValueInfo) -> None:
    if not info.name:
        raise FormatError(f"an {kind} has no name")
    if info.dtype not in DTYPES:
        raise FormatError(f"{kind} {info.name!r}: dtype {info.dtype!r} is not known")
    if len(info.shape) != len(info.nominal) or len(info.shape) > MAX_RANK:
        raise FormatError(
            f"{kind} {info.name!r}: shape and nominal shape must have one rank, at most {MAX_RANK}"
        )
    for dim, size in zip(info.shape, info.nominal, strict=True):
        if not 0 <= size <= MAX_ELEMENTS or (isinstance(dim, int) and dim != size):
            raise FormatError(
                f"{kind} {info.name!r}: nominal shape {info.nominal} does not fit {info.shape}"
            )


# --- inference ----------------------------------------------------------------------------------


def _infer_packed(graph: Graph, node: Node, found: Inference) -> None:
    out = node.outputs[0]
    for name in node.inputs:
        if name not in found.shapes:
            raise _ShapeError(f"the shape of its input {name!r} depends on values")
        expected = np.dtype(np.uint8 if graph.is_code(name) else np.float32)
        if found.dtypes[name] != expected:
            raise _ShapeError(f"its input {name!r} is {found.dtypes[name]}, not {expected}")
    shape = OPERATORS[node.op].shape(node, [found.shapes[name] for name in node.inputs])
    if min(shape, default=0) < 1 or math.prod(shape) > MAX_ELEMENTS:
        raise _ShapeError(
            f"would produce shape {shape}; the input is too small or too large for this network"
        )
    found.shapes[out] = shape
    found.dtypes[out] = np.dtype(np.uint8 if graph.is_code(out) else np.float32)


# Inputs of ONNX operators whose values decide about the output's shape.
_SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1, 2),
    "DFT": (1,), "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1), "OneHot": (1,), "Pad": (1, 3), "Range": (0, 1, 2), "Reshape": (1,),
    "Resize": (1, 2, 3), "STFT": (1, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,),
    "Tile": (1,), "TopK": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **dict.fromkeys(
        (f"Reduce{kind}" for kind in (
            "L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"
        )), (1,),
    ),
}  # fmt: skip
# Values up to this size are computed from shapes before a run, and kept.
_KEPT_ELEMENTS = 2**20


def _infer_onnx(graph: Graph, node: Node, found: Inference) -> None:
    """Run an ONNX operator: on what is known, else on zeros, whose result has the right shape."""
    names = [name for name in node.inputs if name]
    if any(name not in found.shapes for name in names):
        return
    if node.op in ("Shape", "Size"):
        known = True
        arguments = [_zeros(found, name) for name in node.inputs]
    else:
        known = all(name in found.values for name in names)
        if not known and node.op in numpy_ops.DATA_DEPENDENT:
            return
        for index in _SHAPE_INPUTS.get(node.op, ()):
            name = node.inputs[index] if index < len(node.inputs) else ""
            if name and name not in found.values:
                return
        arguments = [
            found.values[name] if name in found.values else _zeros(found, name)
            for name in node.inputs
        ]
    results = numpy_ops.compute(node.op, node.attributes, graph.opset, arguments, len(node.outputs))
    for name, y in zip(node.outputs, results, strict=True):
        if not name:
            continue
        if y.size > MAX_ELEMENTS or y.ndim > MAX_RANK:
            raise _ShapeError(f"would produce shape {y.shape}; the input is too large")
        found.shapes[name], found.dtypes[name] = y.shape, y.dtype
        if known and y.size <= _KEPT_ELEMENTS:
            found.values[name] = y


def _infer_quickly(
    index: int, node: Node, found: Inference, seen: dict[int, np.dtype | None]
) -> bool:
    """Infer by a rule, if one has proved right before; says whether it did."""
    dtype = seen.get(index)
    if dtype is None or all(name in found.values for name in node.inputs if name):
        return False
    shape = _rule(node, found)
    if shape is None or math.prod(shape) > MAX_ELEMENTS or len(shape) > MAX_RANK:
        return False
    found.shapes[node.outputs[0]], found.dtypes[node.outputs[0]] = shape, dtype
    return True


def _learn(
    index: int, node: Node, found: Inference, seen: dict[int, np.dtype | None] | None
) -> None:
    """Note the type of an operator's output, or that no rule tells its shape."""
    out = node.outputs[0]
    if seen is None or index in seen or out in found.values:
        return
    shape = found.shapes.get(out)
    right = shape is not None and len(node.outputs) == 1 and _rule(node, found) == shape
    seen[index] = found.dtypes[out] if right else None


def _rule(node: Node, found: Inference) -> Shape | None:
    """Shape of the output of an ONNX operator, where that is easily told."""
    rule = _ONNX_SHAPES.get(node.op)
    shapes = [found.shapes.get(name) for name in node.inputs if name]
    if rule is None or not shapes or None in shapes:
        return None
    try:
        return rule(node, shapes, found)
    except (ValueError, IndexError):  # what does not fit, computing on zeros will name
        return None


def _onnx_same(node: Node, shapes: list, found: Inference) -> Shape:
    return shapes[0]


def _onnx_broadcast(node: Node, shapes: list, found: Inference) -> Shape:
    return np.broadcast_shapes(*shapes)


def _onnx_matmul(node: Node, shapes: list, found: Inference) -> Shape | None:
    a, b = shapes
    if min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        return None
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _axes(node: Node, rank: int, found: Inference) -> set[int] | None:
    """Axes that an attribute or a known input names; None for the operator's own choice."""
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] in found.values:
        axes = found.values[node.inputs[1]].ravel().tolist()
    if not isinstance(axes, list) or not axes or not all(-rank <= a < rank for a in axes):
        return None
    return {a % rank for a in axes}


def _onnx_reduce(node: Node, shapes: list, found: Inference) -> Shape | None:
    axes, keep = _axes(node, len(shapes[0]), found), node.attributes.get("keepdims", 1)
    if axes is None:
        return None
    return tuple(1 if i in axes else d for i, d in enumerate(shapes[0]) if keep or i not in axes)


def _onnx_squeeze(node: Node, shapes: list, found: Inference) -> Shape | None:
    axes = _axes(node, len(shapes[0]), found)
    if axes is None or any(shapes[0][axis] != 1 for axis in axes):
        return None
    return tuple(d for i, d in enumerate(shapes[0]) if i not in axes)


def _onnx_unsqueeze(node: Node, shapes: list, found: Inference) -> Shape | None:
    given = node.attributes.get("axes")
    count = len(given) if isinstance(given, list) else math.prod(shapes[-1])
    axes = _axes(node, len(shapes[0]) + count, found)
    if axes is None or len(axes) != count:
        return None
    rest = iter(shapes[0])
    return tuple(1 if i in axes else next(rest) for i in range(len(shapes[0]) + count))


def _onnx_transpose(node: Node, shapes: list, found: Inference) -> Shape | None:
    order = node.attributes.get("perm")
    if not isinstance(order, list) or sorted(order) != list(range(len(shapes[0]))):
        return None
    return tuple(shapes[0][i] for i in order)


# Operators that are common, and costly to run on zeros.
_ONNX_SHAPES: dict[str, Callable[[Node, list, Inference], Shape | None]] = {
    **dict.fromkeys(
        ("Abs", "Ceil", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
         "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish",
         "Neg", "Reciprocal", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Tanh"),
        _onnx_same,
    ),
    **dict.fromkeys(
        ("Add", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "PRelu", "Pow", "Sub",
         "Where"), _onnx_broadcast,
    ),
    **dict.fromkeys(
        (f"Reduce{kind}" for kind in ("L2", "Max", "Mean", "Min", "Sum", "SumSquare")),
        _onnx_reduce,
    ),
    "MatMul": _onnx_matmul, "Squeeze": _onnx_squeeze, "Transpose": _onnx_transpose,
    "Unsqueeze": _onnx_unsqueeze,
}  # fmt: skip


def _zeros(found: Inference, name: str) -> np.ndarray | None:
    """Return zeros that take no memory; None for an input that is not given."""
    if not name:
        return None
    return np.broadcast_to(np.zeros((), found.dtypes[name]), found.shapes[name])


# --- shape functions: node, input shapes -> output shape --------------------------------------


def _window(size: int, kernel: int, stride: int, dilation: int, pads: int) -> int:
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


def _rank4(shape: Shape) -> Shape:
    if len(shape) != 4:
        raise _ShapeError(f"needs a tensor of rank 4, got shape {shape}")
    return shape


def _shape_same(node: Node, inputs: list[Shape]) -> Shape:
    return inputs[0]


def _shape_unary(node: Node, inputs: list[Shape]) -> Shape:
    return _rank4(inputs[0])


def _shape_residual(node: Node, inputs: list[Shape], out: Shape) -> Shape:
    if len(inputs) == 2 and inputs[1] != out:
        raise _ShapeError(f"adds a tensor of shape {inputs[1]} to its result of shape {out}")
    return out


def _shape_conv(node: Node, inputs: list[Shape]) -> Shape:
    assert node.weight_shape is not None
    n, c, h, w = _rank4(inputs[0])
    o, kh, kw, cg = node.weight_shape
    a = node.attributes
    if c != cg * a["group"]:
        raise _ShapeError(f"takes {cg * a['group']} channels, its input has {c}")
    top, left, bottom, right = a["pads"]
    oh = _window(h, kh, a["strides"][0], a["dilations"][0], top + bottom)
    ow = _window(w, kw, a["strides"][1], a["dilations"][1], left + right)
    return _shape_residual(node, inputs, (n, o, oh, ow))


def _shape_conv_transpose(node: Node, inputs: list[Shape]) -> Shape:
    assert node.weight_shape is not None
    n, c, h, w = _rank4(inputs[0])
    o, kh, kw, cg = node.weight_shape
    a = node.attributes
    if c != cg * a["group"]:
        raise _ShapeError(f"takes {cg * a['group']} channels, its input has {c}")
    top, left, bottom, right = a["pads"]
    size = [
        stride * (length - 1) + extra + dilation * (kernel - 1) + 1 - pads
        for length, kernel, stride, dilation, extra, pads in zip(
            (h, w),
            (kh, kw),
            a["strides"],
            a["dilations"],
            a["output_padding"],
            (top + bottom, left + right),
            strict=True,
        )
    ]
    return _shape_residual(node, inputs, (n, o, size[0], size[1]))


def _shape_pool(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = _rank4(inputs[0])
    a = node.attributes
    top, left, bottom, right = a["pads"]
    out = []
    for size, kernel, stride, dilation, begin, end in zip(
        (h, w),
        a["kernel_shape"],
        a["strides"],
        a["dilations"],
        (top, left),
        (bottom, right),
        strict=True,
    ):
        count = _window(size, kernel, stride, dilation, begin + end)
        if a["ceil_mode"]:
            count = -(-(size + begin + end - dilation * (kernel - 1) - 1) // stride) + 1
            if (count - 1) * stride >= size + begin:  # a window must start inside the picture
                count -= 1
        out.append(count)
    return (n, c, out[0], out[1])


def _shape_global_pool(node: Node, inputs: list[Shape]) -> Shape:
    n, c, _, _ = _rank4(inputs[0])
    return (n, c, 1, 1)


def _shape_broadcast(node: Node, inputs: list[Shape]) -> Shape:
    first, second = (_rank4(shape) for shape in inputs)
    if any(1 not in pair and len(set(pair)) > 1 for pair in zip(first, second, strict=True)):
        raise _ShapeError(f"cannot broadcast shapes {first} and {second} to each other")
    return tuple(map(max, first, second))


def _shape_lookup(node: Node, inputs: list[Shape]) -> Shape:
    assert node.table is not None
    if node.table.ndim == 2 and node.table.shape[:1] != inputs[0][1:2]:
        raise _ShapeError(
            f"has tables for {len(node.table)} channels, its input has shape {inputs[0]}"
        )
    return inputs[0]


def _shape_gather(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = _rank4(inputs[0])
    indices = node.attributes["indices"]
    if max(indices) >= c:
        raise _ShapeError(f"takes channel {max(indices)}, its input has {c}")
    return (n, len(indices), h, w)


def _shape_concat(node: Node, inputs: list[Shape]) -> Shape:
    first = _rank4(inputs[0])
    axis = node.attributes["axis"]
    for shape in inputs[1:]:
        if len(shape) != 4 or any(
            i != axis and s != f for i, (s, f) in enumerate(zip(shape, first, strict=True))
        ):
            raise _ShapeError(f"cannot concatenate shapes {first} and {shape} along axis {axis}")
    return tuple(sum(s[i] for s in inputs) if i == axis else size for i, size in enumerate(first))


def _shape_resize(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = _rank4(inputs[0])
    a = node.attributes
    if len(inputs) == 2:
        return (n, c, *_rank4(inputs[1])[2:])
    if a["sizes"] is not None:
        return (n, c, a["sizes"][0], a["sizes"][1])
    return (n, c, math.floor(h * a["scales"][0]), math.floor(w * a["scales"][1]))


def _shape_depth_to_space(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = _rank4(inputs[0])
    b = node.attributes["blocksize"]
    if c % (b * b):
        raise _ShapeError(f"{c} channels are not a multiple of blocksize^2 = {b * b}")
    return (n, c // (b * b), h * b, w * b)


def slice_range(size: int, start: int, end: int, step: int) -> range:
    """Return the indices that ONNX's Slice takes of a dimension of `size` (positive steps)."""
    return range(*slice(start, end, step).indices(size))


def _shape_slice(node: Node, inputs: list[Shape]) -> Shape:
    shape = list(_rank4(inputs[0]))
    a = node.attributes
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        shape[axis] = len(slice_range(shape[axis], start, end, step))
    return tuple(shape)


def _shape_pad(node: Node, inputs: list[Shape]) -> Shape:
    pads = node.attributes["pads"]
    return tuple(size + pads[i] + pads[i + 4] for i, size in enumerate(_rank4(inputs[0])))


def _shape_flatten(node: Node, inputs: list[Shape]) -> Shape:
    n, c, h, w = _rank4(inputs[0])
    if h != 1 or w != 1:
        raise _ShapeError(f"flattens only tensors of height and width 1, got {inputs[0]}")
    return (n, c)


# --- attributes: name -> (default, check) ------------------------------------------------------

Check = Callable[[Any], bool]
_REQUIRED = object()


def _integers(count: int, low: int, high: int = MAX_ATTRIBUTE) -> Check:
    return lambda v: (
        isinstance(v, list)
        and len(v) == count
        and all(type(i) is int and low <= i <= high for i in v)
    )


def _positive_numbers(count: int) -> Check:
    return lambda v: (
        isinstance(v, list)
        and len(v) == count
        and all(type(i) in (int, float) and 1e-4 < i < 1e4 for i in v)
    )


def _one_of(*choices: Any) -> Check:
    return lambda v: any(type(v) is type(c) and v == c for c in choices)


def _clamp(v: Any) -> bool:
    """[lo, hi] in output codes, or in real units for a float32 output; None for no bound."""
    return (
        isinstance(v, list)
        and len(v) == 2
        and all(b is None or (type(b) in (int, float) and abs(b) < 1e30) for b in v)
        and (v[0] is None or v[1] is None or v[0] <= v[1])
    )


def _number(v: Any) -> bool:
    return type(v) in (int, float) and abs(v) < 1e30


def _optional(check: Check) -> Check:
    return lambda v: v is None or check(v)


def _slices(v: Any) -> bool:
    return isinstance(v, list) and len(v) <= 4 and all(type(i) is int and abs(i) < 2**63 for i in v)


def _channels(v: Any) -> bool:
    return (
        isinstance(v, list)
        and 1 <= len(v) <= MAX_ATTRIBUTE
        and all(type(i) is int and 0 <= i < MAX_ATTRIBUTE for i in v)
    )


_CONV_ATTRIBUTES: dict[str, tuple[Any, Check]] = {
    "strides": ([1, 1], _integers(2, 1)),
    "pads": ([0, 0, 0, 0], _integers(4, 0)),
    "dilations": ([1, 1], _integers(2, 1)),
    "group": (1, lambda v: type(v) is int and 1 <= v <= MAX_ATTRIBUTE),
    "clamp": ([None, None], _clamp),
}
_POOL_ATTRIBUTES: dict[str, tuple[Any, Check]] = {
    "kernel_shape": (_REQUIRED, _integers(2, 1)),
    "strides": ([1, 1], _integers(2, 1)),
    "pads": ([0, 0, 0, 0], _integers(4, 0)),
    "dilations": ([1, 1], _integers(2, 1)),
    "ceil_mode": (0, _one_of(0, 1)),
}


@dataclass(frozen=True)
class Operator:
    """What a packed node of this kind may look like.

    `arity` bounds the number of inputs; `codes` says which of (inputs, output) hold codes:
    "c" codes, "f" float32, "?" either for the output; several pairs are alternatives.
    """

    shape: Callable[[Node, list[Shape]], Shape]
    arity: tuple[int, int]
    codes: str
    attributes: dict[str, tuple[Any, Check]] = field(default_factory=dict)


OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": Operator(_shape_same, (1, 1), "fc"),
    "DequantizeLinear": Operator(_shape_same, (1, 1), "cf"),
    "Conv": Operator(_shape_conv, (1, 2), "c? ff", _CONV_ATTRIBUTES),
    "ConvTranspose": Operator(
        _shape_conv_transpose, (1, 2), "c? ff",
        # It runs as one convolution per phase of the output: strides[0] * strides[1] of them.
        {**_CONV_ATTRIBUTES, "strides": ([1, 1], _integers(2, 1, 32)),
         "output_padding": ([0, 0], _integers(2, 0))},
    ),
    "MaxPool": Operator(_shape_pool, (1, 1), "cc ff", _POOL_ATTRIBUTES),
    "AveragePool": Operator(
        _shape_pool, (1, 1), "cc ff", {**_POOL_ATTRIBUTES, "count_include_pad": (0, _one_of(0, 1))}
    ),
    "GlobalAveragePool": Operator(_shape_global_pool, (1, 1), "cc ff"),
    "GlobalMaxPool": Operator(_shape_global_pool, (1, 1), "cc ff"),
    "Add": Operator(_shape_broadcast, (2, 2), "cc ff", {"clamp": ([None, None], _clamp)}),
    "Sub": Operator(_shape_broadcast, (2, 2), "cc ff", {"clamp": ([None, None], _clamp)}),
    "Mul": Operator(_shape_broadcast, (2, 2), "cc ff", {"clamp": ([None, None], _clamp)}),
    "Concat": Operator(_shape_concat, (1, 4096), "cc ff", {"axis": (1, _one_of(1, 2, 3))}),
    "Gather": Operator(
        _shape_gather, (1, 1), "cc", {"axis": (1, _one_of(1)), "indices": (_REQUIRED, _channels)}
    ),
    "Lookup": Operator(_shape_lookup, (1, 1), "cc"),
    "Resize": Operator(
        _shape_resize, (1, 2), "cc ff",
        {
            "mode": (_REQUIRED, _one_of("nearest", "linear")),
            "coordinate_transformation_mode": (
                "half_pixel",
                _one_of("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"),
            ),
            "nearest_mode": (
                "round_prefer_floor",
                _one_of("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
            ),
            "scales": (None, _optional(_positive_numbers(2))),
            "sizes": (None, _optional(_integers(2, 1))),
        },
    ),
    "DepthToSpace": Operator(
        _shape_depth_to_space, (1, 1), "cc ff",
        {"blocksize": (_REQUIRED, lambda v: type(v) is int and 1 <= v <= 64),
         "mode": ("DCR", _one_of("DCR", "CRD"))},
    ),
    "Slice": Operator(
        _shape_slice, (1, 1), "cc ff",
        {"axes": (_REQUIRED, lambda v: _slices(v) and set(v) <= {1, 2, 3}),
         "starts": (_REQUIRED, _slices), "ends": (_REQUIRED, _slices),
         "steps": (_REQUIRED, lambda v: _slices(v) and all(1 <= i <= MAX_ATTRIBUTE for i in v))},
    ),
    "Pad": Operator(
        _shape_pad, (1, 1), "cc ff",
        {"pads": (_REQUIRED, lambda v: _integers(8, 0)(v) and v[0] == v[4] == 0)},
    ),
    "Flatten": Operator(_shape_flatten, (1, 1), "ff"),
    "Clip": Operator(_shape_unary, (1, 1), "ff", {"clamp": ([None, None], _clamp)}),
    "LeakyRelu": Operator(_shape_unary, (1, 1), "ff", {"alpha": (0.01, _number)}),
    "Elu": Operator(_shape_unary, (1, 1), "ff", {"alpha": (1.0, _number)}),
    "Sigmoid": Operator(_shape_unary, (1, 1), "ff"),
    "Tanh": Operator(_shape_unary, (1, 1), "ff"),
    "HardSigmoid": Operator(
        _shape_unary, (1, 1), "ff", {"alpha": (0.2, _number), "beta": (0.5, _number)}
    ),
    "HardSwish": Operator(_shape_unary, (1, 1), "ff"),
    "Swish": Operator(_shape_unary, (1, 1), "ff"),
}  # fmt: skip

# Operators whose output codes mean what their input codes mean, so both share one quantization.
SAME_QUANTIZATION = {
    "MaxPool", "GlobalMaxPool", "Resize", "DepthToSpace", "Slice", "Pad", "Gather"
}  # fmt: skip


def _check_node(graph: Graph, node: Node) -> None:
    if node.domain or node.op not in OPERATORS:
        raise _ShapeError(f"unknown operator{f' of domain {node.domain!r}' * bool(node.domain)}")
    operator = OPERATORS[node.op]
    low, high = operator.arity
    if not low <= len(node.inputs) <= high:
        raise _ShapeError(f"has {len(node.inputs)} inputs, takes {low} to {high}")
    if len(node.outputs) != 1 or not node.outputs[0]:
        raise _ShapeError("has one output")
    first = "c" if graph.is_code(node.inputs[0]) else "f"
    choices = operator.codes.split()
    kind_in, kind_out = tuple(next((c for c in choices if c[0] == first), choices[0]))
    for name in node.inputs:
        if graph.is_code(name) != (kind_in == "c"):
            expected = "codes" if kind_in == "c" else "float32"
            raise _ShapeError(f"input {name!r} must hold {expected}")
    out = node.outputs[0]
    if kind_out != "?" and graph.is_code(out) != (kind_out == "c"):
        raise _ShapeError(f"output {out!r} must hold {'codes' if kind_out == 'c' else 'float32'}")
    if unknown := set(node.attributes) - set(operator.attributes):
        raise _ShapeError(f"unknown attribute {min(unknown)!r}")
    for key, (default, check) in operator.attributes.items():
        if key not in node.attributes:
            if default is _REQUIRED:
                raise _ShapeError(f"attribute {key!r} is missing")
            node.attributes[key] = default
        if not check(node.attributes[key]):
            raise _ShapeError(f"attribute {key} = {node.attributes[key]!r} is not allowed")
    if (
        node.op in SAME_QUANTIZATION
        and kind_out == "c"
        and graph.quantization[out] != graph.quantization[node.inputs[0]]
    ):
        raise _ShapeError(f"output {out!r} must have the quantization of its input")
    _OWN_CHECKS.get(node.op, lambda graph, node: None)(graph, node)


def _check_onnx_node(graph: Graph, node: Node) -> None:
    if node.op not in numpy_ops.OPERATORS:
        raise _ShapeError("unknown ONNX operator")
    if node.weight_shape is not None or node.table is not None or node.bias is not None:
        raise _ShapeError("ONNX operators have no weights of their own")
    if not any(node.outputs):
        raise _ShapeError("has no output")
    for name in (*node.inputs, *node.outputs):
        if graph.is_code(name):
            raise _ShapeError(f"{name!r} holds codes, which ONNX operators do not know")
    for key, value in node.attributes.items():
        items = value if isinstance(value, list) else [value]
        if not all(type(item) in (int, float, str) for item in items):
            raise _ShapeError(f"attribute {key} must be a number, a string or a list of those")


def _check_clamp(graph: Graph, node: Node) -> None:
    q = graph.quantization.get(node.outputs[0])
    if q is not None:
        for bound in node.attributes["clamp"]:
            if bound is not None and not (type(bound) is int and 0 <= bound <= q.top):
                raise _ShapeError(f"clamp bound {bound!r} is not an output code")


def _check_conv(graph: Graph, node: Node) -> None:
    _check_clamp(graph, node)
    shape, bias, a = node.weight_shape, node.bias, node.attributes
    if shape is None or bias is None:
        raise _ShapeError("weights are missing")
    o, kh, kw, _ = shape
    if min(shape) < 1 or max(kh, kw) > 4096:
        raise _ShapeError(f"weight shape {shape} is not allowed")
    if o % a["group"]:
        raise _ShapeError(f"{o} output channels do not divide into {a['group']} groups")
    extent = [d * (k - 1) + 1 for d, k in zip(a["dilations"], (kh, kw), strict=True)]
    for side, pad in enumerate(a["pads"]):
        if pad >= max(extent[side % 2], 2):
            raise _ShapeError(f"pads {a['pads']} reach beyond the kernel's extent {extent}")
    if not np.isfinite(bias).all():
        raise _ShapeError("bias must be finite")
    if node.float_weights is not None:
        if graph.is_code(node.inputs[0]):
            raise _ShapeError("weights of a convolution of codes must be words")
        if not np.isfinite(node.float_weights).all():
            raise _ShapeError("weights must be finite")
        return
    weights = node.weights
    assert weights is not None
    if not (np.isfinite(weights.alpha).all() and (weights.alpha > 0).all()):
        raise _ShapeError("alpha must be finite and positive")
    largest = weights.largest
    if largest > weights.limit:
        raise _ShapeError(f"|W| reaches {largest}, beyond clip * 2^(L-1+s) = {weights.limit}")
    q_x = graph.quantization.get(node.inputs[0])
    scale_x = q_x.scale if q_x else 1.0
    q = graph.quantization.get(node.outputs[0])
    scale_y = q.scale if q else 1.0
    # Keeps |t * M + B| far from float32 infinity for any codes.
    if (
        float(weights.unit().max()) * scale_x / scale_y > 1e15
        or float(np.abs(bias).max()) / scale_y > 1e30
    ):
        raise _ShapeError("alpha or bias is absurdly large against the output scale")


def _check_conv_transpose(graph: Graph, node: Node) -> None:
    _check_conv(graph, node)
    a = node.attributes
    for extra, stride, dilation in zip(
        a["output_padding"], a["strides"], a["dilations"], strict=True
    ):
        if extra >= max(stride, dilation):
            raise _ShapeError("output_padding must be below stride or dilation")


def _check_pool(graph: Graph, node: Node) -> None:
    a = node.attributes
    for side, pad in enumerate(a["pads"]):
        if pad >= a["kernel_shape"][side % 2]:
            raise _ShapeError(f"pads {a['pads']} must be below kernel_shape {a['kernel_shape']}")


def _check_mul(graph: Graph, node: Node) -> None:
    if not graph.on_codes(node):
        return
    _check_clamp(graph, node)
    first, second, q = (graph.quantization[name] for name in (*node.inputs, *node.outputs))
    # Keeps t * M + B far from float32 infinity for any codes.
    if first.scale * second.scale / q.scale > 1e15:
        raise _ShapeError("the input scales are absurdly large against the output scale")


def _check_lookup(graph: Graph, node: Node) -> None:
    if node.table is None:
        raise _ShapeError("table is missing")
    shape, dtype = node.table.shape, node.table.dtype
    if dtype != np.uint8 or not 1 <= len(shape) <= 2 or shape[-1] != 256 or shape[0] < 1:
        raise _ShapeError(
            f"the table is {dtype} of shape {shape}, expected uint8 of shape (256,) or (C, 256)"
        )
    if int(node.table.max()) > graph.quantization[node.outputs[0]].top:
        raise _ShapeError("the table holds values that are no output codes")


def _check_resize(graph: Graph, node: Node) -> None:
    given = [node.attributes[key] is not None for key in ("scales", "sizes")]
    if sum([*given, len(node.inputs) == 2]) != 1:
        raise _ShapeError("needs scales, sizes or a tensor whose size it takes")


def _check_slice(graph: Graph, node: Node) -> None:
    a = node.attributes
    if len({len(a[k]) for k in ("axes", "starts", "ends", "steps")}) != 1:
        raise _ShapeError("axes, starts, ends and steps must have one length")
    if len(set(a["axes"])) != len(a["axes"]):
        raise _ShapeError("an axis is given twice")


_OWN_CHECKS: dict[str, Callable[[Graph, Node], None]] = {
    "Conv": _check_conv,
    "ConvTranspose": _check_conv_transpose,
    "MaxPool": _check_pool,
    "AveragePool": _check_pool,
    "Add": _check_clamp,
    "Sub": _check_clamp,
    "Mul": _check_mul,
    "Lookup": _check_lookup,
    "Resize": _check_resize,
    "Slice": _check_slice,
}
