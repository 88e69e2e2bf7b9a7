"""Back to standard ONNX: what a packed network computes, for any other engine to run and check.

Codes become real tensors by QuantizeLinear and DequantizeLinear with the packed scale and zero
point, words become float32 weights of exactly their values. What ONNX has no place for is in the
metadata, see `docs/qdq.md`; converting the model again gives the same network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from logshift.converter.layout import onnx_weight
from logshift.converter.metadata import Metadata, WeightRecord
from logshift.kernels.errors import ConversionError
from logshift.runtime.file import files, format
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.picture import Preprocessing

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ModuleNotFoundError:
    raise ConversionError("exporting needs onnx: pip install 'logshift[converter]'") from None

# Version 19 of ONNX's operators has pools with dilations, and 22 has them drop the last window of
# ceil_mode that starts in the padding.
_OPSET, _OPSET_CEIL = 19, 22
# The oldest in which packed operators are written here: bounds of Clip are inputs.
_MIN_OPSET = 11
_MIN_IR_VERSION = 4  # initializers need not be inputs
_MAX_BYTES = 2**31 - 1  # of a protobuf message


def export(packed: Graph | str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a packed network as an ONNX model.

    Parameters
    ----------
    packed : Graph or path of a packed file
    out : path-like
        The `.onnx` file to write; replaced only once the new one is complete.

    Raises
    ------
    ConversionError
        If the model would be larger than an ONNX file can be.
    FormatError
        If the packed file is damaged.
    OSError
        If a file cannot be read or written.
    """
    graph = packed if isinstance(packed, Graph) else format.read(packed)
    model = _Export(graph).model()
    if (size := model.ByteSize()) > _MAX_BYTES:
        raise ConversionError(f"the ONNX model would have {size} bytes; 2 GiB is the most")
    files.replace(out, model.SerializeToString(deterministic=True))


# Operator, inputs (one may be what the step before makes), attributes.
Step = tuple[str, list[str], dict[str, Any]]
_BEFORE = "<before>"
_CONVS = ("Conv", "ConvTranspose")


class _Export:
    def __init__(self, graph: Graph) -> None:
        graph.validate()  # fills in what attributes are by default
        self.graph = graph
        self.shapes = graph.nominal_shapes()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: dict[str, WeightRecord] = {}
        self.scales: dict[str, float] = {}
        self.keep_float: set[str] = set()
        self.opset = _opset(graph)
        # By tensor of codes: the uint8 tensor, and the float32 tensor that others read.
        self.quantized: dict[str, str] = {}
        self.real: dict[str, str] = {}
        self.names = {name for node in graph.nodes for name in node.outputs}
        self.names |= {info.name for info in graph.inputs} | set(graph.constants)

    def model(self) -> onnx.ModelProto:
        for name, array in self.graph.constants.items():
            self.initializers.append(numpy_helper.from_array(array, name))
        for node in self.graph.nodes:
            emit = _onnx if node.is_onnx else _EMITTERS[node.op]
            emit(self, node, [self.real.get(name, name) for name in node.inputs])
        graph = helper.make_graph(
            self.nodes,
            "logshift",
            [_value_info(info) for info in self.graph.inputs],
            [_value_info(info) for info in self.graph.outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            producer_name="logshift",
            opset_imports=opsets,
            ir_version=max(helper.find_min_ir_version_for(opsets), _MIN_IR_VERSION),
        )
        self._metadata().write(model)
        return model

    def _metadata(self) -> Metadata:
        preprocessing = self.graph.preprocessing
        return Metadata(
            self.weights,
            self.scales,
            frozenset(self.keep_float),
            None if preprocessing is None else Preprocessing.from_manifest(preprocessing),
            self.graph.labels,
        )

    # --- what emitters ask for -----------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """Return a tensor name that nothing has yet: `name`, if it can be had."""
        chosen, number = name, 1
        while chosen in self.names:
            chosen, number = f"{name}_{number}", number + 1
        self.names.add(chosen)
        return chosen

    def constant(self, name: str, value: Any, dtype: type[np.generic] = np.float32) -> str:
        name = self.fresh(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))

    def operation(self, node: Node, steps: list[Step]) -> None:
        """Emit steps that each take the result of the one before; the last makes the output.

        Of a tensor of codes that is what is rounded, and it has the tensor's name.
        """
        result = ""
        for index, (op, inputs, attributes) in enumerate(steps):
            last = index == len(steps) - 1
            inputs = [result if name == _BEFORE else name for name in inputs]
            result = node.outputs[0] if last else self.fresh(f"{node.outputs[0]}/{op}")
            name = node.name if index == 0 else f"{node.name}/{op}"
            self.node(op, name, inputs, result, **attributes)
        if self.graph.is_code(result) and not {op for op, _, _ in steps} - {*_CONVS, "Clip"}:
            # A sum of one changes nothing, but without it onnxruntime takes a convolution between
            # codes for one that int8 was forgotten in, and rounds its weights anew.
            result = self.fresh(f"{result}/Sum")
            self.node("Sum", f"{node.name}/Sum", [node.outputs[0]], result)
        self.quantize(node.outputs[0], result)

    def quantize(self, tensor: str, real: str) -> None:
        """Round what `real` holds to codes and back, if `tensor` holds codes."""
        q = self.graph.quantization.get(tensor)
        if q is None:
            return
        scale = self.constant(f"{tensor}/scale", q.scale)
        zero_point = self.constant(f"{tensor}/zero_point", q.zero_point, np.uint8)
        self.scales[scale] = q.scale
        if q.top < 255:
            bounds, inside = self.bounds(tensor, "range", (0, q.top)), self.fresh(f"{tensor}/Clip")
            self.node("Clip", f"{tensor}/Clip", [real, *bounds], inside)
            real = inside
        codes, back = self.fresh(f"{tensor}/quantized"), self.fresh(f"{tensor}/dequantized")
        for op, x, y in (("QuantizeLinear", real, codes), ("DequantizeLinear", codes, back)):
            self.node(op, f"{tensor}/{op}", [x, scale, zero_point], y)
        self.quantized[tensor], self.real[tensor] = codes, back

    def bounds(self, tensor: str, what: str, clamp: Any) -> list[str]:
        """Return the inputs of a Clip, in real units, of a clamp in the units of `tensor`."""
        q = self.graph.quantization.get(tensor)
        return [
            self.constant(f"{tensor}/{what}/{side}", _real(bound, q)) if bound is not None else ""
            for side, bound in zip(("low", "high"), clamp, strict=True)
        ]

    def clamp(self, node: Node) -> list[Step]:
        clamp = node.attributes["clamp"]
        if clamp == [None, None]:
            return []
        return [("Clip", [_BEFORE, *self.bounds(node.outputs[0], "clamp", clamp)], {})]


def _opset(graph: Graph) -> int:
    """Return the version of ONNX's operators: that of the ONNX operators inside, if there are."""
    if any(node.is_onnx for node in graph.nodes):
        if graph.opset < _MIN_OPSET:
            raise ConversionError(
                f"the packed file has ONNX operators of version {graph.opset}, and export writes"
                f" {_MIN_OPSET} at the lowest; onnx.version_converter.convert_version makes the"
                " model newer before it is packed"
            )
        return graph.opset
    ceil = any(node.attributes.get("ceil_mode") for node in graph.nodes)
    return _OPSET_CEIL if ceil else _OPSET


def _real(code: float, q: Quantization | None) -> float:
    return code if q is None else (code - q.zero_point) * q.scale


def _value_info(info: ValueInfo) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype))
    return helper.make_tensor_value_info(info.name, kind, info.shape)


# --- operators ----------------------------------------------------------------------------------

_Emitter = Callable[[_Export, Node, list[str]], None]


def _same(ctx: _Export, node: Node, x: list[str]) -> None:
    """Emit an operator that has the same attributes in ONNX."""
    ctx.operation(node, [(node.op, x, node.attributes)])


def _quantize(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.quantize(node.outputs[0], x[0])


def _dequantize(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.operation(node, [("Identity", x, {})])


def _conv(ctx: _Export, node: Node, x: list[str]) -> None:
    assert node.weight_shape is not None and node.bias is not None
    out, values = node.outputs[0], node.float_weights
    if node.weights is not None:
        values = node.weights.values()
    assert values is not None
    attributes = {k: v for k, v in node.attributes.items() if k != "clamp"}
    weight = ctx.constant(f"{out}/weight", onnx_weight(node.op, values, attributes["group"]))
    if node.weights is not None:
        granularity = ctx.graph.settings.get("granularity", "element")
        ctx.weights[weight] = WeightRecord.of(node.weights, granularity)
    else:
        ctx.keep_float.add(weight)
    inputs = [x[0], weight, ctx.constant(f"{out}/bias", node.bias)]
    attributes["kernel_shape"] = list(node.weight_shape[1:3])
    residual: list[Step] = [("Add", [_BEFORE, name], {}) for name in x[1:]]
    ctx.operation(node, [(node.op, inputs, attributes), *residual, *ctx.clamp(node)])


def _arithmetic(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.operation(node, [(node.op, x, {}), *ctx.clamp(node)])


def _lookup(ctx: _Export, node: Node, x: list[str]) -> None:
    """Emit a table of real values, read at the integer codes: exact in any engine."""
    assert node.table is not None
    out = node.outputs[0]
    q = ctx.graph.quantization[out]
    table = (node.table.astype(np.float32) - np.float32(q.zero_point)) * np.float32(q.scale)
    steps: list[Step] = [("Cast", [ctx.quantized[node.inputs[0]]], {"to": TensorProto.INT32})]
    if table.ndim == 2:
        begin = (table.shape[1] * np.arange(len(table))).reshape(1, -1, 1, 1)
        steps.append(("Add", [_BEFORE, ctx.constant(f"{out}/begin", begin, np.int32)], {}))
    flat = ctx.constant(f"{out}/table", table.ravel())
    ctx.operation(node, [*steps, ("Gather", [flat, _BEFORE], {"axis": 0})])


def _average_pool(ctx: _Export, node: Node, x: list[str]) -> None:
    # onnxruntime's quantized pool does not know the attribute, whatever its value.
    attributes = {k: v for k, v in node.attributes.items() if (k, v) != ("dilations", [1, 1])}
    ctx.operation(node, [(node.op, x, attributes)])


def _resize(ctx: _Export, node: Node, x: list[str]) -> None:
    a = dict(node.attributes)
    scales, sizes, out = a.pop("scales"), a.pop("sizes"), node.outputs[0]
    # Before version 13 an input that is not given is an empty one.
    roi = "" if ctx.opset >= 13 else ctx.constant(f"{out}/roi", [])
    if scales is not None:
        inputs = [x[0], roi, ctx.constant(f"{out}/scales", [1.0, 1.0, *scales])]
        ctx.operation(node, [("Resize", inputs, a)])
        return
    wanted = (
        ctx.constant(f"{out}/last", sizes, np.int64)
        if sizes is not None
        else _dimensions(ctx, node, x[1], [2, 3])
    )
    none = ""
    if ctx.opset >= 18:
        a["axes"] = [2, 3]
    else:
        # Without axes, sizes of batch and channels are wanted too.
        none = "" if ctx.opset >= 13 else ctx.constant(f"{out}/none", [])
        first, last = _dimensions(ctx, node, x[0], [0, 1]), wanted
        wanted = ctx.fresh(f"{out}/sizes")
        ctx.node("Concat", f"{node.name}/Concat", [first, last], wanted, axis=0)
    ctx.operation(node, [("Resize", [x[0], roi, none, wanted], a)])


def _dimensions(ctx: _Export, node: Node, x: str, axes: list[int]) -> str:
    """Return the sizes of a tensor along some axes."""
    shape, found = ctx.fresh(f"{x}/shape"), ctx.fresh(f"{x}/dimensions")
    ctx.node("Shape", f"{node.name}/Shape", [x], shape)
    indices = ctx.constant(f"{found}/axes", axes, np.int64)
    ctx.node("Gather", f"{node.name}/Gather", [shape, indices], found)
    return found


def _slice(ctx: _Export, node: Node, x: list[str]) -> None:
    inputs = [
        ctx.constant(f"{node.outputs[0]}/{key}", node.attributes[key], np.int64)
        for key in ("starts", "ends", "axes", "steps")
    ]
    ctx.operation(node, [("Slice", x + inputs, {})])


def _gather(ctx: _Export, node: Node, x: list[str]) -> None:
    indices = ctx.constant(f"{node.outputs[0]}/indices", node.attributes["indices"], np.int64)
    ctx.operation(node, [("Gather", [*x, indices], {"axis": 1})])


def _pad(ctx: _Export, node: Node, x: list[str]) -> None:
    pads = ctx.constant(f"{node.outputs[0]}/pads", node.attributes["pads"], np.int64)
    ctx.operation(node, [("Pad", [*x, pads], {})])


def _clip(ctx: _Export, node: Node, x: list[str]) -> None:
    bounds = ctx.bounds(node.outputs[0], "clamp", node.attributes["clamp"])
    ctx.operation(node, [("Clip", x + bounds, {})])


def _hard_swish(ctx: _Export, node: Node, x: list[str]) -> None:
    # An operator of its own only from version 14 on.
    attributes = {"alpha": 1 / 6, "beta": 0.5}
    ctx.operation(node, [("HardSigmoid", x, attributes), ("Mul", [*x, _BEFORE], {})])


def _swish(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.operation(node, [("Sigmoid", x, {}), ("Mul", [*x, _BEFORE], {})])


def _onnx(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.nodes.append(helper.make_node(node.op, x, node.outputs, node.name))
    for key, value in node.attributes.items():
        kind = onnx.AttributeProto.INTS if value == [] else None
        ctx.nodes[-1].attribute.append(helper.make_attribute(key, value, attr_type=kind))


_EMITTERS: dict[str, _Emitter] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "MaxPool": _same,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _same,
    "GlobalMaxPool": _same,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Concat": _same,
    "Gather": _gather,
    "Lookup": _lookup,
    "Resize": _resize,
    "DepthToSpace": _same,
    "Slice": _slice,
    "Pad": _pad,
    "Flatten": _same,
    "Clip": _clip,
    "LeakyRelu": _same,
    "Elu": _same,
    "Sigmoid": _same,
    "Tanh": _same,
    "HardSigmoid": _same,
    "HardSwish": _hard_swish,
    "Swish": _swish,
}
