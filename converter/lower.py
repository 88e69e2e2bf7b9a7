"""From ONNX to packed operations, node by node; weights stay float and nothing is fused yet.

Packed operators know (N, C, H, W) only. An ONNX tensor (N, F) of theirs is either stored as
(N, F, 1, 1), or it is a flattened (N, C, H, W), which only a Gemm (as a convolution with a kernel
of H x W) and element-wise functions can read.

Whatever has no packed counterpart stays an ONNX operator, on tensors as ONNX has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from logshift.converter.float_graph import (
    NO_CLAMP,
    Clamp,
    FloatGraph,
    FloatNode,
    Function,
    Problems,
    ordered,
)
from logshift.converter.layout import packed_weight
from logshift.converter.onnx_model import Model, Trace, dim_name
from logshift.converter.qdq import identity, table_function, table_of
from logshift.converter.recognise import recognise
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime import geometry
from logshift.runtime.graph import DTYPES, Dim, Quantization, Shape, ValueInfo
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.operators import conv as conv_ops
from logshift.runtime.operators import pool as pool_ops

# Clip bounds beyond this are float32's way to say "none".
_NO_BOUND = 1e30

_BROADCASTING = {"Add", "Sub", "Mul"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
ELEMENTWISE = _ARITHMETIC | {
    "Abs", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Neg", "PRelu", "Pow", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh",
    "ThresholdedRelu",
}  # fmt: skip
_VARIADIC = ELEMENTWISE | {"Concat", "MatMul", "Sum"}


def _name(node: onnx.NodeProto) -> str:
    """Return the node's name; nodes without one are known by their output."""
    return node.name or node.output[0]


class _Unsupported(Exception):
    """Why a node has no packed counterpart."""


def lower(model: Model, trace: Trace, problems: Problems) -> FloatGraph:
    """Translate every ONNX node that the outputs depend on.

    Parameters
    ----------
    model : Model
    trace : Trace
        Of a sample of the nominal size.
    problems : Problems
        Nodes that cannot be translated are added to it.

    Returns
    -------
    FloatGraph
        With "Affine" and "Elementwise" nodes, which `fuse` resolves.
    """
    return _Lowering(model, trace, problems).run()


class _Lowering:
    def __init__(self, model: Model, trace: Trace, problems: Problems) -> None:
        self.model = model
        self.constants = trace.constants
        self.trace = trace
        self.problems = problems
        self.nodes: list[FloatNode] = []
        self.alias: dict[str, str] = {}
        # Of tensors that packed operators can read, (N, C, H, W).
        self.shapes: dict[str, Shape] = {}
        # Tensors as ONNX has them: names that ONNX operators find them under.
        self.plain_names: dict[str, str] = {}
        self.used_constants: dict[str, np.ndarray] = {}
        self.done: set[str] = set()  # nodes that became ONNX operators, by their first outputs
        # Of stored tensors, as the model has it.
        self.quantization: dict[str, Quantization] = {}
        # Set once a node's translation holds for the nominal height and width only.
        self.fixed_size = False

    def run(self) -> FloatGraph:
        graph = self.model.proto.graph
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.joined = _joined(graph)
        for info in self.model.inputs:
            self.plain_names[info.name] = info.name
            if len(info.shape) == 4 and info.dtype == "float32":
                self.shapes[info.name] = self.trace.shapes[info.name]
        for node in self._needed(graph):
            try:
                self._lower(node)
            except _Unsupported as reason:
                self.problems.add(node.op_type, _name(node), str(reason))
        results = {}
        for value in graph.output:
            try:
                results[value.name] = self._result(value.name)
            except _Unsupported as reason:
                self.problems.add("output", value.name, str(reason))
        shapes = dict(self.trace.shapes) | self.shapes
        return FloatGraph(
            self.nodes,
            self._inputs(),
            self._outputs(graph, results),
            results,
            shapes,
            self.used_constants,
            self.quantization,
        )

    def _needed(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Nodes that compute data, in execution order: not those that only compute sizes."""
        needed = {value.name for value in graph.output}
        kept = []
        for node in reversed(graph.node):
            if node.op_type != "Constant" and needed.intersection(node.output):
                # Handlers look up sizes themselves; ONNX operators ask for their inputs.
                if table := self.table(node):
                    needed.add(table[0].input[0])
                else:
                    needed.update(node.input if node.op_type in _VARIADIC else node.input[:1])
                kept.append(node)
        return _resized_late(kept[::-1], self.joined)

    def _lower(self, node: onnx.NodeProto) -> None:
        if node.output[0] in self.done:
            return
        for name in node.output:
            if len(shape := self.trace.shapes.get(name, ())) in (2, 4):
                self.shapes[name] = shape if len(shape) == 4 else (*shape, 1, 1)
        handler = _HANDLERS.get(node.op_type)
        if not self.trace.mixed.isdisjoint(node.output):
            handler = None
        if node.op_type == "Clip" and node.name in self.model.quantization:
            handler = _round
        if handler is not None and node.domain in ("", "ai.onnx"):
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            texts = {k: v.decode() for k, v in attributes.items() if isinstance(v, bytes)}
            try:
                handler(self, node, attributes | texts)
                return
            except _Unsupported:
                outputs = set(node.output)
                self.nodes = [n for n in self.nodes if n.output not in outputs]
        for name in node.output:
            self.shapes.pop(name, None)
        self._keep(node)

    def _keep(self, node: onnx.NodeProto) -> None:
        """Let a node be the ONNX operator that it is."""
        if node.output[0] in self.done:
            return
        self.done.add(node.output[0])
        for name in filter(None, node.output):
            # Also of a node that fails: its consumers shall be judged on their own.
            self.plain_names[name] = name
        if node.domain not in ("", "ai.onnx"):
            raise _Unsupported(f"operator of the domain {node.domain!r}")
        if node.op_type not in numpy_ops.OPERATORS | {"ConstantOfShape"}:
            raise _Unsupported("not supported")
        for name in filter(None, node.output):
            if (dtype := self.trace.dtypes.get(name)) is None or dtype.name not in DTYPES:
                raise _Unsupported(f"its output {name!r} is no tensor of numbers")
        op, inputs = node.op_type, [self.plain(n) if n else "" for n in node.input]
        attributes: dict[str, Any] = {}
        if op == "ConstantOfShape":
            op = "Expand"  # which takes its value as an input
            values = [onnx.numpy_helper.to_array(a.t) for a in node.attribute]
            value = values[0].reshape(()) if values else np.zeros((), np.float32)
            inputs.insert(0, self._constant(f"{node.output[0]}/value", value))
        for attribute in node.attribute if op == node.op_type else ():
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, (int, float, bytes)):
                attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
            elif isinstance(value, list) and all(isinstance(v, (int, float, bytes)) for v in value):
                attributes[attribute.name] = [
                    v.decode() if isinstance(v, bytes) else v for v in value
                ]
            else:
                raise _Unsupported(f"its attribute {attribute.name!r} is no number and no text")
        while inputs and not inputs[-1]:
            inputs.pop()
        self.emit_onnx(op, _name(node), inputs, list(node.output), attributes)

    def emit_onnx(
        self,
        op: str,
        name: str,
        inputs: list[str],
        outputs: list[str],
        attributes: dict[str, Any] | None = None,
    ) -> None:
        self.nodes.append(
            FloatNode(
                op,
                name,
                inputs,
                outputs[0],
                attributes or {},
                opset=self.model.opset,
                more_outputs=outputs[1:],
            )
        )

    def _constant(self, name: str, value: np.ndarray) -> str:
        """Make a constant input of ONNX operators; returns its name."""
        self.used_constants[name] = value
        return name

    def plain(self, name: str) -> str:
        """Return the tensor that ONNX operators can read for `name`."""
        if name in self.constants:
            array = self.constants[name]
            if array.dtype.name not in DTYPES:
                raise _Unsupported(f"its input {name!r} is {array.dtype}")
            return self._constant(name, array)
        if name in self.plain_names:
            return self.plain_names[name]
        stored = self.alias.get(name, name)
        if stored in self.shapes:
            shape = self.trace.shapes[name]
            if shape == self.shapes[stored]:
                return stored
            # Only (N, F), however it is stored, has another shape.
            flat = f"{name}/NC"
            self.emit_onnx("Flatten", flat, [stored], [flat])
            self.trace.shapes[flat] = shape
            self.plain_names[name] = flat
            return flat
        if name not in self.producers:
            raise _Unsupported(f"its input {name!r} is produced by no node")
        producer = self.producers[name]  # which only computes sizes
        try:
            self._keep(producer)
        except _Unsupported as reason:
            raise _Unsupported(
                f"its input {name!r} comes of {producer.op_type} {_name(producer)!r}: {reason}"
            ) from None
        return name

    def _result(self, name: str) -> str:
        """Return the tensor that holds an output of the network."""
        if name in self.plain_names:
            return self.plain_names[name]
        try:
            return self.tensor(name)
        except _Unsupported:
            return self.plain(name)

    # --- what handlers ask for -----------------------------------------------------------------

    def source(self, name: str) -> str:
        """Return the stored tensor that `name` is, or is a flattened view of."""
        if name in self.constants:
            raise _Unsupported(f"its input {name!r} is a constant")
        name = self.alias.get(name, name)
        if name not in self.shapes and name in self.plain_names:
            return self._stored(name)
        if name not in self.shapes:
            shape = self.trace.shapes.get(name, ())
            raise _Unsupported(f"its input has shape {shape}; only (N, C, H, W) is supported")
        return name

    def _stored(self, name: str) -> str:
        """Return a tensor as packed operators have it, of one as ONNX has it."""
        shape = self.trace.shapes[name]
        if name in self.trace.mixed:
            raise _Unsupported(f"its input of shape {shape} has no batch of pictures in front")
        if self.trace.dtypes[name] != np.float32 or len(shape) not in (2, 4):
            raise _Unsupported(f"its input is {self.trace.dtypes[name]} of shape {shape}")
        if len(shape) == 4:
            self.shapes[name] = shape
            return name
        stored = f"{name}/NC11"
        if stored not in self.shapes:
            self.unsqueeze(self.plain_names[name], stored, [2, 3])
            self.shapes[stored] = (*shape, 1, 1)
        return stored

    def unsqueeze(self, name: str, result: str, axes: list[int], op: str = "Unsqueeze") -> None:
        """Insert (or with op "Squeeze" remove) axes of size 1."""
        if self.model.opset < 13:
            self.emit_onnx(op, result, [name], [result], {"axes": axes})
        else:
            where = self._constant(f"{result}/axes", np.array(axes, np.int64))
            self.emit_onnx(op, result, [name, where], [result])

    def tensor(self, name: str) -> str:
        """Return the stored tensor that `name` is; not one of which it is a flattened view."""
        source = self.source(name)
        if name in self.trace.shapes and self.shapes[source][:2] != self.trace.shapes[name][:2]:
            raise _Unsupported(f"reads a flattened tensor of shape {self.shapes[source]}")
        return source

    def constant(self, name: str) -> np.ndarray:
        """Return a weight as float32."""
        if name not in self.constants:
            raise _Unsupported(f"its weight {name!r} is not a constant")
        array = self.constants[name]
        if array.dtype not in (np.float32, np.float64):
            raise _Unsupported(f"its weight {name!r} is {array.dtype}, not float32")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise _Unsupported(f"its weight {name!r} holds NaN or infinity")
        return array

    def integers(self, node: onnx.NodeProto, index: int) -> list[int] | None:
        """Return an input that gives sizes or positions; None if it is absent."""
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name in self.constants:
            return [int(v) for v in self.constants[name].ravel()]
        if name not in self.trace.integers:
            raise _Unsupported(f"its input {name!r} must be a constant")
        self.fixed_size = True
        return [int(v) for v in self.trace.integers[name].ravel()]

    def table(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, Quantization] | None:
        """Return what makes the codes at which a Gather reads a table, see `qdq.table_of`."""
        return table_of(node, self.producers, self.model.quantization)

    def words(self, node: onnx.NodeProto, weight: np.ndarray) -> LogWeights | None:
        """Return the words of a weight, (O, kh, kw, C / group), that lies on a grid already."""
        return recognise(weight, self.model.metadata.weights.get(node.input[1]))

    def emit(self, op: str, node: onnx.NodeProto, inputs: list[str], **fields: Any) -> None:
        self.nodes.append(FloatNode(op, _name(node), inputs, node.output[0], **fields))

    # --- inputs and outputs --------------------------------------------------------------------

    def _inputs(self) -> list[ValueInfo]:
        infos = []
        for info in self.model.inputs:
            nominal = self.trace.shapes[info.name]
            shape: tuple[Dim, ...] = info.shape
            if self.fixed_size and len(shape) == 4:
                shape = (shape[0], *nominal[1:])
            # An empty sample is no accident.
            shape = tuple(size and dim for dim, size in zip(shape, nominal, strict=True))
            infos.append(ValueInfo(info.name, shape, nominal, info.dtype))
        return infos

    def _outputs(self, graph: onnx.GraphProto, results: dict[str, str]) -> list[ValueInfo]:
        batch = self.model.inputs[0].shape[0]
        pictures = self.trace.shapes[self.model.inputs[0].name][0]
        sizes = [dim for info in self._inputs() for dim in info.shape[1:]]
        dynamic = any(isinstance(dim, str) for dim in sizes)
        infos = []
        for value in graph.output:
            if value.name not in results or value.name not in self.trace.shapes:
                continue  # `problems` knows why
            nominal = self.trace.shapes[value.name]
            declared = list(value.type.tensor_type.shape.dim)
            packed = results[value.name] not in self.plain_names
            shape: list[Dim] = []
            if packed:  # its first dimension is the batch, unless it has been summed up
                shape = [batch if nominal[0] == pictures else nominal[0], nominal[1]]
            for axis in range(len(shape), len(nominal)):
                dim = declared[axis] if axis < len(declared) else None
                fixed = not dynamic and (packed or isinstance(batch, int))
                if fixed or (dim and dim.dim_value == nominal[axis] > 0):
                    shape.append(nominal[axis])
                else:
                    shape.append((dim and dim_name(dim)) or f"{value.name}_dim_{axis}")
            dtype = self.trace.dtypes[value.name].name
            infos.append(ValueInfo(value.name, tuple(shape), nominal, dtype))
        return infos


def _resized_late(
    nodes: list[onnx.NodeProto], joined: dict[str, list[str]]
) -> list[onnx.NodeProto]:
    """Let a Resize come just before its reader: what it is joined with is there by then."""
    waiting: dict[str, onnx.NodeProto] = {}
    ordered: list[onnx.NodeProto] = []

    def emit(node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in waiting:
                emit(waiting.pop(name))
        ordered.append(node)

    for node in nodes:
        if node.op_type == "Resize" and node.output[0] in joined:
            waiting[node.output[0]] = node
        else:
            emit(node)
    return ordered + list(waiting.values())


_Handler = Callable[[_Lowering, onnx.NodeProto, dict[str, Any]], None]
_HANDLERS: dict[str, _Handler] = {}


def _lowers(*ops: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


# --- convolutions -------------------------------------------------------------------------------


# Attributes with a value per axis, and what they are for an axis of length 1.
_LEAST = {
    "strides": 1, "dilations": 1, "kernel_shape": 1, "output_padding": 0, "output_shape": 1
}  # fmt: skip


def _on_a_line(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
    """Run an operator on (N, C, L) as one on (N, C, 1, L); False if it is on something else."""
    x, y = node.input[0], node.output[0]
    if len(ctx.trace.shapes.get(x, ())) != 3 or (len(node.output) > 1 and node.output[1]):
        return False
    flat = onnx.NodeProto()
    flat.CopyFrom(node)
    flat.input[0], flat.output[0] = f"{y}/NC1L", f"{y}/NC1M"
    (n, c, length), (_, d, result) = ctx.trace.shapes[x], ctx.trace.shapes[y]
    ctx.shapes[flat.input[0]] = ctx.trace.shapes[flat.input[0]] = (n, c, 1, length)
    ctx.shapes[flat.output[0]] = ctx.trace.shapes[flat.output[0]] = (n, d, 1, result)
    if len(node.input) > 1:
        weight = f"{node.input[1]}/OI1K"
        ctx.constants[weight] = ctx.constant(node.input[1])[:, :, None]
        flat.input[1] = weight
    wide = dict(a)
    for key, least in _LEAST.items():
        if key in a:
            wide[key] = [least, *a[key]]
    if "pads" in a:
        begin, end = a["pads"]
        wide["pads"] = [0, begin, 0, end]
    ctx.unsqueeze(ctx.plain(x), flat.input[0], [2])
    _HANDLERS[node.op_type](ctx, flat, wide)
    ctx.unsqueeze(flat.output[0], y, [2], "Squeeze")
    ctx.plain_names[y] = y
    return True


@_lowers("Conv")
def _conv(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if _on_a_line(ctx, node, a):
        return
    weight = ctx.constant(node.input[1])
    if weight.ndim != 4:
        raise _Unsupported(f"is {weight.ndim - 2}-dimensional; only 2-D is supported")
    x = ctx.tensor(node.input[0])
    attributes = _window_attributes(ctx, a, ctx.shapes[x], weight.shape[2:])
    attributes["group"] = a.get("group", 1)
    _emit_conv(ctx, node, x, weight, attributes)


@_lowers("ConvTranspose")
def _conv_transpose(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if _on_a_line(ctx, node, a):
        return
    weight = ctx.constant(node.input[1])
    if weight.ndim != 4:
        raise _Unsupported(f"is {weight.ndim - 2}-dimensional; only 2-D is supported")
    x = ctx.tensor(node.input[0])
    group = a.get("group", 1)
    attributes = {
        "strides": list(a.get("strides", [1, 1])),
        "dilations": list(a.get("dilations", [1, 1])),
        "output_padding": list(a.get("output_padding", [0, 0])),
        "group": group,
    }
    attributes["pads"] = _transposed_pads(ctx, node, a, attributes, ctx.shapes[x], weight.shape[2:])
    _emit_conv(ctx, node, x, weight, attributes)


# Of a convolution that only multiplies.
_POINTWISE = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1}


@_lowers("Gemm")
def _gemm(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if a.get("transA", 0):
        raise _Unsupported("transA = 1 mixes the pictures of a batch")
    weight = ctx.constant(node.input[1])
    weight = weight if a.get("transB", 0) else weight.T
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = ctx.constant(node.input[2])
        if bias.size not in (1, weight.shape[0]):
            raise _Unsupported(f"its bias has shape {bias.shape}")
        bias = np.float32(a.get("beta", 1.0)) * np.resize(bias, weight.shape[0])
    _emit_matrix(ctx, node, weight * np.float32(a.get("alpha", 1.0)), bias)


@_lowers("MatMul")
def _matmul(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    weight = ctx.constant(node.input[1])
    rank = len(ctx.trace.shapes.get(node.input[0], ()))
    if weight.ndim != 2 or rank not in (2, 3):
        raise _Unsupported("only (N, F) or (N, T, F) times a constant (F, O) is supported")
    if rank == 2:
        _emit_matrix(ctx, node, weight.T, None)
        return
    # (N, T, F) is stored as (N, F, T, 1) for the time of the product.
    name, x = node.output[0], ctx.plain(node.input[0])
    n, t, f = ctx.trace.shapes[node.input[0]]
    swap = {"perm": [0, 2, 1]}
    ctx.emit_onnx("Transpose", f"{name}/NFT", [x], [f"{name}/NFT"], swap)
    ctx.unsqueeze(f"{name}/NFT", f"{name}/NFT1", [3])
    ctx.shapes[f"{name}/NFT1"], ctx.shapes[f"{name}/NOT1"] = (
        (n, f, t, 1),
        (n, weight.shape[1], t, 1),
    )
    ctx.trace.shapes |= {f"{name}/NFT": (n, f, t), f"{name}/NOT": (n, weight.shape[1], t)}
    weight = np.ascontiguousarray(weight.T[:, None, None, :])
    ctx.nodes.append(
        FloatNode(
            "Conv", _name(node), [f"{name}/NFT1"], f"{name}/NOT1", dict(_POINTWISE), weight,
            np.zeros(len(weight), np.float32), ctx.words(node, weight),
        )
    )  # fmt: skip
    ctx.unsqueeze(f"{name}/NOT1", f"{name}/NOT", [3], "Squeeze")
    ctx.emit_onnx("Transpose", _name(node), [f"{name}/NOT"], [name], swap)
    ctx.plain_names[name] = name


def _emit_matrix(
    ctx: _Lowering, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray | None
) -> None:
    """Emit x @ weight.T, (O, F): a convolution whose kernel covers what was flattened."""
    x = ctx.source(node.input[0])
    _, c, h, w = ctx.shapes[x]
    if c * h * w != weight.shape[1]:
        raise _Unsupported(f"multiplies {weight.shape[1]} features, reads shape {ctx.shapes[x]}")
    if h * w > 1:
        ctx.fixed_size = True
    weight = np.ascontiguousarray(weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1))
    ctx.emit(
        "Conv",
        node,
        [x],
        weight=weight,
        attributes=dict(_POINTWISE),
        bias=np.zeros(len(weight), np.float32) if bias is None else bias,
        words=ctx.words(node, weight),
    )


def _emit_conv(
    ctx: _Lowering, node: onnx.NodeProto, x: str, weight: np.ndarray, attributes: dict[str, Any]
) -> None:
    weight = packed_weight(node.op_type, weight, attributes["group"])
    if len(node.input) > 2 and node.input[2]:
        bias = ctx.constant(node.input[2])
    else:
        bias = np.zeros(weight.shape[0], np.float32)
    pads = attributes["pads"]
    if min(pads) < 0:
        raise _Unsupported(f"pads {pads} are negative")
    conv = FloatNode(
        node.op_type,
        _name(node),
        [x],
        node.output[0],
        attributes,
        weight,
        bias,
        ctx.words(node, weight),
    )
    if not conv_ops.pads_fit(pads, weight.shape[1:3], attributes["dilations"]):
        if node.op_type == "ConvTranspose":
            raise _Unsupported(f"pads {pads} reach beyond the kernel's extent")
        conv.inputs = [_emit_pad(ctx, conv, pads)]
        conv.attributes["pads"] = [0, 0, 0, 0]
    ctx.nodes.append(conv)


def _emit_pad(ctx: _Lowering, conv: FloatNode, pads: list[int]) -> str:
    """Emit a Pad before `conv` with all of its pads, and return the padded tensor."""
    x, padded = conv.inputs[0], f"{conv.inputs[0]}/padded for {conv.output}"
    top, left, bottom, right = pads
    n, c, h, w = ctx.shapes[x]
    ctx.shapes[padded] = (n, c, h + top + bottom, w + left + right)
    attributes = {"pads": [0, 0, top, left, 0, 0, bottom, right]}
    ctx.nodes.append(FloatNode("Pad", f"{conv.name}/Pad", [x], padded, attributes))
    return padded


def _window_attributes(
    ctx: _Lowering, a: dict[str, Any], shape: Shape, kernel: tuple[int, ...]
) -> dict[str, Any]:
    """Strides, dilations and explicit pads of a convolution or pooling."""
    strides = list(a.get("strides", [1, 1]))
    dilations = list(a.get("dilations", [1, 1]))
    mode = a.get("auto_pad", "NOTSET")
    pads = list(a.get("pads", [0, 0, 0, 0])) if mode == "NOTSET" else [0, 0, 0, 0]
    if mode.startswith("SAME"):
        ctx.fixed_size |= strides != [1, 1]
        for i in range(2):
            extent = geometry.extent(kernel[i], dilations[i])
            pads[i], pads[i + 2] = geometry.same_pads(shape[2 + i], extent, strides[i], mode)
    return {"strides": strides, "pads": pads, "dilations": dilations}


def _transposed_pads(
    ctx: _Lowering,
    node: onnx.NodeProto,
    a: dict[str, Any],
    attributes: dict[str, Any],
    shape: Shape,
    kernel: tuple[int, ...],
) -> list[int]:
    """Return explicit pads of a ConvTranspose; its output's size is known from the trace."""
    mode = a.get("auto_pad", "NOTSET")
    if mode == "NOTSET" and "output_shape" not in a:
        return list(a.get("pads", [0, 0, 0, 0]))
    pads = [0, 0, 0, 0]
    if mode == "VALID":
        return pads
    ctx.fixed_size |= "output_shape" in a
    out = ctx.trace.shapes[node.output[0]]
    for i in range(2):
        extent = geometry.extent(kernel[i], attributes["dilations"][i])
        full = attributes["strides"][i] * (shape[2 + i] - 1) + extent
        total = full + attributes["output_padding"][i] - out[2 + i]
        pads[i], pads[i + 2] = geometry.split_pads(total, mode)
    return pads


# --- pooling ------------------------------------------------------------------------------------


@_lowers("MaxPool", "AveragePool")
def _pool(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if len(node.output) > 1 and node.output[1]:
        raise _Unsupported("its indices are used")
    if _on_a_line(ctx, node, a):
        return
    x = ctx.tensor(node.input[0])
    kernel = list(a["kernel_shape"])
    if len(kernel) != 2:
        raise _Unsupported(f"is {len(kernel)}-dimensional; only 2-D is supported")
    attributes = _window_attributes(ctx, a, ctx.shapes[x], tuple(kernel))
    attributes |= {"kernel_shape": kernel, "ceil_mode": a.get("ceil_mode", 0)}
    if node.op_type == "AveragePool":
        attributes["count_include_pad"] = a.get("count_include_pad", 0)
    if not pool_ops.pads_fit(attributes["pads"], kernel):
        raise _Unsupported(f"pads {attributes['pads']} must be below the kernel's size {kernel}")
    ctx.emit(node.op_type, node, [x], attributes=attributes)


@_lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    ctx.emit(node.op_type, node, [ctx.tensor(node.input[0])])


@_lowers("ReduceMean")
def _reduce_mean(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    axes = a.get("axes") or ctx.integers(node, 1) or []
    x = ctx.tensor(node.input[0])
    if len(ctx.trace.shapes[node.input[0]]) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise _Unsupported(f"axes {list(axes)}; only the mean over height and width is supported")
    ctx.emit("GlobalAveragePool", node, [x])


# --- element-wise -------------------------------------------------------------------------------


def _elementwise(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    tensors = [ctx.source(name) for name in node.input if name and name not in ctx.constants]
    if not tensors:
        raise _Unsupported("all its inputs are constants")
    shapes = {ctx.trace.shapes[name] for name in node.input if name and name not in ctx.constants}
    stored = {ctx.shapes[t] for t in tensors}
    if len(stored) > 1 and node.op_type in _BROADCASTING and all(len(s) == 4 for s in shapes):
        ctx.emit(node.op_type, node, [ctx.tensor(name) for name in node.input])
        return
    if len(shapes) > 1 or len(stored) > 1:
        raise _Unsupported(f"combines tensors of different shapes {sorted(shapes)}")
    constants = {n: ctx.constants[n] for n in node.input if n in ctx.constants}
    # Onto itself: a view of a tensor becomes an element-wise function of that tensor.
    ctx.shapes[node.output[0]] = ctx.shapes[tensors[0]]
    function = None
    rank = len(ctx.trace.shapes[node.output[0]])
    if all(_is_scalar(a) or _is_per_channel(a, ctx, tensors[0], rank) for a in constants.values()):
        function = _function(ctx, node, constants)
    if node.op_type in _ARITHMETIC and len(tensors) == len(constants) == 1:
        if affine := _affine(ctx, node, tensors[0], next(iter(constants.values()))):
            ctx.emit("Affine", node, tensors, weight=affine[0], bias=affine[1], function=function)
            return
    if function is None:
        raise _Unsupported("its constant is neither one value nor one per channel")
    ctx.emit(
        "Elementwise",
        node,
        list(dict.fromkeys(tensors)),
        clamp=_clamp(node, a, constants),
        function=function,
    )


_HANDLERS.update(dict.fromkeys(ELEMENTWISE, _elementwise))


@_lowers("Sum")
def _sum(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if len(node.input) == 1:
        _view(ctx, node, a)
        return
    if len(node.input) != 2:
        raise _Unsupported(f"has {len(node.input)} inputs, not 2")
    add = onnx.helper.make_node("Add", node.input, node.output, name=node.name)
    _elementwise(ctx, add, a)


@_lowers("BatchNormalization")
def _batch_normalization(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if a.get("training_mode", 0):
        raise _Unsupported("is in training mode; export the model for inference")
    gamma, beta, mean, variance = (ctx.constant(n).astype(np.float64) for n in node.input[1:5])
    scale = gamma / np.sqrt(variance + a.get("epsilon", 1e-5))
    shift = beta - mean * scale
    ctx.emit(
        "Affine",
        node,
        [ctx.tensor(node.input[0])],
        weight=scale.astype(np.float32),
        bias=shift.astype(np.float32),
    )


def _is_per_channel(array: np.ndarray, ctx: _Lowering, tensor: str, rank: int) -> bool:
    """Tell whether a constant holds a value for every channel of a stored tensor."""
    shape = (1,) * (rank - array.ndim) + array.shape
    return len(shape) == rank and array.size == shape[1] == ctx.shapes[tensor][1]


def _is_scalar(array: np.ndarray) -> bool:
    return array.size > 0 and bool((array == array.flat[0]).all())


def _function(ctx: _Lowering, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> Function:
    """Return the node as a function of its stored inputs; constants are scalars or (C, 1, 1)."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(n if n in constants or not n else ctx.source(n) for n in node.input)
    scalars = {
        name: array.flat[0].reshape(()) if _is_scalar(array) else array.reshape(-1, 1, 1)
        for name, array in constants.items()
    }
    source = next(n for n in copy.input if n and n not in constants)
    return Function(source, node.output[0], [copy], scalars, ctx.model.opset)


def _affine(
    ctx: _Lowering, node: onnx.NodeProto, tensor: str, constant: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift per channel of arithmetic with a constant, or None if it is no such thing."""
    channels = ctx.shapes[tensor][1]
    first = node.input[0] in ctx.constants
    if constant.size != 1:
        rank = 4 if len(ctx.trace.shapes[node.output[0]]) == 4 else 2
        shape = (1,) * (rank - constant.ndim) + constant.shape
        if len(shape) != rank or shape[1] != constant.size or constant.size != channels:
            return None
    value = np.resize(constant.astype(np.float64).ravel(), channels)
    if not np.isfinite(value).all():
        raise _Unsupported("its constant holds NaN or infinity")
    one, zero = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Add":
            scale, shift = one, value
        case "Sub":
            scale, shift = (-one, value) if first else (one, -value)
        case "Mul":
            scale, shift = value, zero
        case _:
            if first or not value.all():
                return None
            scale, shift = one / value, zero
    return scale.astype(np.float32), shift.astype(np.float32)


def _clamp(node: onnx.NodeProto, a: dict[str, Any], constants: dict[str, np.ndarray]) -> Clamp:
    """Return the bounds if the node is nothing but a clamp."""
    if any(array.size != 1 for array in constants.values()):
        return NO_CLAMP

    def bound(index: int, attribute: str = "") -> float | None:
        name = node.input[index] if index < len(node.input) else ""
        value = float(constants[name].flat[0]) if name in constants else a.get(attribute)
        return None if value is None or abs(value) > _NO_BOUND else value

    match node.op_type:
        case "Relu":
            return 0.0, None
        case "Clip":
            return ordered(bound(1, "min"), bound(2, "max"))
        case "Max" | "Min" if len(node.input) == 2 and len(constants) == 1:
            value = bound(0 if node.input[0] in constants else 1)
            return (value, None) if node.op_type == "Max" else (None, value)
    return NO_CLAMP


# --- quantization -------------------------------------------------------------------------------


def _round(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Note the quantization of a tensor; if it has another one, it gets a table."""
    x, y = ctx.source(node.input[0]), node.output[0]
    q = ctx.model.quantization[node.name]
    if ctx.quantization.setdefault(x, q) == q:
        ctx.alias[y] = x
        ctx.shapes.pop(y, None)
    else:
        ctx.quantization[y] = q
        ctx.shapes[y] = ctx.shapes[x]
        ctx.emit("Elementwise", node, [x], function=identity(x, y))


@_lowers("Gather")
def _gather(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if (table := ctx.table(node)) is None:
        _gather_channels(ctx, node, a)
        return
    quantize, q = table
    x, y = ctx.source(quantize.input[0]), node.output[0]
    if ctx.quantization.setdefault(x, q) != q:
        raise _Unsupported("reads codes of another quantization than others")
    zero_point = int(ctx.constants[quantize.input[2]].item()) if len(quantize.input) > 2 else 0
    values = ctx.constants[node.input[0]]
    ctx.shapes[y] = ctx.shapes[x]
    function = table_function(x, y, values, zero_point, q.scale, ctx.model.opset)
    ctx.emit("Elementwise", node, [x], function=function)


def _gather_channels(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x, indices = ctx.tensor(node.input[0]), ctx.constants.get(node.input[1])
    channels = ctx.shapes[x][1]
    if indices is None or indices.ndim != 1 or a.get("axis", 0) % 4 != 1 or not indices.size:
        raise _Unsupported("does not select channels by constants")
    indices = np.where(indices < 0, indices + channels, indices)
    ctx.emit("Gather", node, [x], attributes={"axis": 1, "indices": [int(i) for i in indices]})


# --- moving values ------------------------------------------------------------------------------


@_lowers("Concat")
def _concat(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    rank = len(ctx.trace.shapes[node.output[0]])
    axis = a["axis"] % rank
    if axis == 0:
        raise _Unsupported("joins pictures of a batch")
    ctx.emit("Concat", node, [ctx.tensor(n) for n in node.input], attributes={"axis": axis})


@_lowers("Slice")
def _slice(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    starts = a.get("starts") or ctx.integers(node, 1) or []
    ends = a.get("ends") or ctx.integers(node, 2) or []
    axes = a.get("axes") or ctx.integers(node, 3) or range(len(starts))
    steps = ctx.integers(node, 4) or [1] * len(starts)
    rank = len(ctx.trace.shapes[node.input[0]])
    attributes: dict[str, list[int]] = {"axes": [], "starts": [], "ends": [], "steps": []}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise _Unsupported(f"step {step}; only positive steps are supported")
        if axis % rank == 0:
            raise _Unsupported("takes pictures out of a batch")
        # The largest int64 is a usual way to say "to the end"; the format wants |end| < 2^63.
        values = (axis % rank, start, min(end, 2**31 - 1), step)
        for key, value in zip(attributes, values, strict=True):
            attributes[key].append(int(value))
    ctx.emit("Slice", node, [x], attributes=attributes)


@_lowers("Split")
def _split(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    axis = a.get("axis", 0) % len(ctx.trace.shapes[node.input[0]])
    if axis == 0:
        raise _Unsupported("takes pictures out of a batch")
    start = 0
    for name in node.output:
        end = start + ctx.shapes[name][axis]
        attributes = {"axes": [axis], "starts": [start], "ends": [end], "steps": [1]}
        ctx.nodes.append(FloatNode("Slice", f"{_name(node)}/{name}", [x], name, attributes))
        start = end
    ctx.fixed_size |= axis > 1


@_lowers("Pad")
def _pad(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    if (mode := a.get("mode", "constant")) != "constant":
        raise _Unsupported(f"mode {mode!r}; only constant zero is supported")
    value = a.get("value", 0.0)
    if len(node.input) > 2 and node.input[2]:
        value = float(ctx.constant(node.input[2]).item())
    if value != 0.0:
        raise _Unsupported(f"pads with {value}; only zero is supported")
    given = a.get("pads") or ctx.integers(node, 1) or []
    axes = ctx.integers(node, 3) or list(range(len(ctx.trace.shapes[node.input[0]])))
    pads = [0] * 8
    for i, axis in enumerate(axes):
        pads[axis % 4], pads[axis % 4 + 4] = given[i], given[i + len(axes)]
    if min(pads) < 0 or pads[0] or pads[4]:
        raise _Unsupported(f"pads {list(given)}; only adding to C, H and W is supported")
    ctx.emit("Pad", node, [x], attributes={"pads": pads})


@_lowers("Resize", "Upsample")
def _resize(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x = ctx.tensor(node.input[0])
    modern = node.op_type == "Resize" and ctx.model.opset >= 11
    mode = a.get("mode", "nearest")
    coordinates = a.get("coordinate_transformation_mode", "half_pixel") if modern else "asymmetric"
    nearest = a.get("nearest_mode", "round_prefer_floor") if modern else "floor"
    if mode not in ("nearest", "linear"):
        raise _Unsupported(f"mode {mode!r}; only nearest and linear are supported")
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        raise _Unsupported(f"coordinate_transformation_mode {coordinates!r} is not supported")
    if a.get("antialias", 0) or a.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise _Unsupported("antialias and keep_aspect_ratio_policy are not supported")
    before, after = ctx.shapes[x], ctx.trace.shapes[node.output[0]]
    if before[:2] != after[:2]:
        raise _Unsupported("resizes batch or channels")
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        attributes["nearest_mode"] = nearest
    scales, inputs = _scales(ctx, node, a, modern), [x]
    if scales is not None:
        attributes["scales"] = scales
    elif (other := _sized_like(ctx, node)) is not None:
        inputs.append(other)
    else:
        ctx.integers(node, 3)  # sizes computed from the input's size hold for that size only
        attributes["sizes"] = list(after[2:])
    ctx.emit("Resize", node, inputs, attributes=attributes)


# What passes sizes on without computing with them.
_PASSING = {"Cast", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze"}


def _joined(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Return, for every tensor, those that must have its height and width: it is joined to them."""
    joined: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "Concat" and any(a.name == "axis" and a.i == 1 for a in node.attribute):
            for name in node.input:
                joined.setdefault(name, []).extend(n for n in node.input if n != name)
    return joined


def _sized_like(ctx: _Lowering, node: onnx.NodeProto) -> str | None:
    """Return the stored tensor whose height and width a Resize is to make, if there is one."""
    after = ctx.trace.shapes[node.output[0]][2:]
    for name in ctx.joined.get(node.output[0], ()):
        other = ctx.alias.get(name, name)
        if other in ctx.shapes and ctx.shapes[other][2:] == after:
            return other
    if len(node.input) < 4 or not node.input[3]:
        return None
    found = set()
    for name in _last_two(ctx, node.input[3]):
        producer = ctx.producers.get(name)
        while producer is not None and producer.op_type in _PASSING:
            producer = ctx.producers.get(producer.input[0])
        if producer is None or producer.op_type != "Shape":
            return None
        found.add(ctx.alias.get(producer.input[0], producer.input[0]))
    sized = [t for t in found if t in ctx.shapes and ctx.shapes[t][2:] == after]
    return sized[0] if len(sized) == len(found) == 1 else None


def _last_two(ctx: _Lowering, name: str) -> list[str]:
    """Return the tensors that make up the last two of some sizes."""
    producer = ctx.producers.get(name)
    if producer is None or producer.op_type != "Concat":
        return [name]
    parts: list[str] = []
    count = 0
    for part in reversed(producer.input):
        if count < 2:
            parts.append(part)
            count += ctx.trace.shapes[part][0]
    return parts


def _scales(
    ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any], modern: bool
) -> list[float] | None:
    """Scales of height and width; None if a Resize gives sizes instead."""
    if "scales" in a:  # Upsample before opset 9
        return [float(v) for v in a["scales"][-2:]]
    index = 2 if modern else 1
    name = node.input[index] if index < len(node.input) else ""
    if not name or (name in ctx.constants and ctx.constants[name].size == 0):
        return None
    if name not in ctx.constants:
        raise _Unsupported("its scales must be constants")
    values = [1.0] * 4
    given = ctx.constants[name].ravel()
    axes = a.get("axes") or list(range(4 - len(given), 4))
    for axis, value in zip(axes, given, strict=True):
        values[axis % 4] = float(value)
    return values[2:]


@_lowers("DepthToSpace")
def _depth_to_space(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    attributes = {"blocksize": a["blocksize"], "mode": a.get("mode", "DCR")}
    ctx.emit("DepthToSpace", node, [ctx.tensor(node.input[0])], attributes=attributes)


@_lowers("SpaceToDepth")
def _space_to_depth(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    x, y, k = ctx.tensor(node.input[0]), node.output[0], a["blocksize"]
    (n, c, _, _), (_, _, h, w) = ctx.shapes[x], ctx.shapes[y]
    parts = []
    for i, j in np.ndindex(k, k):
        parts.append(f"{y}/{i},{j}")
        ctx.shapes[parts[-1]] = (n, c, h, w)
        attributes = {"axes": [2, 3], "starts": [i, j], "ends": [2**31 - 1] * 2, "steps": [k, k]}
        ctx.nodes.append(FloatNode("Slice", parts[-1], [x], parts[-1], attributes))
    if a.get("mode", "DCR") == "DCR":
        ctx.emit("Concat", node, parts, attributes={"axis": 1})
        return
    blocks = f"{y}/blocks"
    ctx.shapes[blocks] = ctx.shapes[y]
    ctx.nodes.append(FloatNode("Concat", blocks, parts, blocks, {"axis": 1}))
    indices = np.arange(c * k * k).reshape(k * k, c).T.ravel().tolist()
    ctx.emit("Gather", node, [blocks], attributes={"axis": 1, "indices": indices})


@_lowers("Identity", "Dropout", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
def _view(ctx: _Lowering, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Give a tensor a second name, as long as its pictures stay apart and in order."""
    x = ctx.source(node.input[0])
    if node.op_type == "Cast" and a["to"] != onnx.TensorProto.FLOAT:
        raise _Unsupported("casts to a type other than float32")
    n, c, h, w = ctx.shapes[x]
    shape = ctx.trace.shapes[node.output[0]]
    if shape not in ((n, c, h, w), (n, c * h * w)):
        raise _Unsupported(f"makes shape {shape} of {(n, c, h, w)}; only flattening is supported")
    ctx.alias[node.output[0]] = x
    ctx.shapes.pop(node.output[0], None)
