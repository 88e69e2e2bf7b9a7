"""Back to standard ONNX: what a packed network computes, for any other engine to run and check.

Codes become real tensors by QuantizeLinear and DequantizeLinear with the packed scale and zero
point, words become float32 weights of exactly their values. What ONNX has no place for is in the
metadata, see `docs/qdq.md`; converting the model again gives the same network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from logshift.converter.layout import onnx_weight
from logshift.converter.metadata import KEY, WeightRecord
from logshift.kernels.errors import ConversionError
from logshift.runtime import files, format
from logshift.runtime.graph import Graph, Node, Quantization, Shape, ValueInfo

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ModuleNotFoundError:
    raise ConversionError("exporting needs onnx: pip install 'logshift[converter]'") from None

# Version 19 of ONNX's operators has pools with dilations, and 22 has them drop the last window of
# ceil_mode that starts in the padding. Each with the version of the container that it needs.
_OPSET, _IR_VERSION = 19, 9
_OPSET_CEIL, _IR_VERSION_CEIL = 22, 10
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


class _Export:
    def __init__(self, graph: Graph) -> None:
        graph.validate()  # fills in what attributes are by default
        self.graph = graph
        self.shapes = graph.nominal_shapes()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: dict[str, WeightRecord] = {}
        self.scales: dict[str, float] = {}
        # By tensor of codes: the uint8 tensor, and the float32 tensor that others read.
        self.quantized: dict[str, str] = {}
        self.real: dict[str, str] = {}
        self.names = {name for node in graph.nodes for name in node.outputs}
        self.names |= {info.name for info in graph.inputs}

    def model(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            _EMITTERS[node.op](self, node, [self.real.get(name, name) for name in node.inputs])
        graph = helper.make_graph(
            self.nodes,
            "logshift",
            [_value_info(info) for info in self.graph.inputs],
            [_value_info(info) for info in self.graph.outputs],
            self.initializers,
        )
        ceil = any(node.attributes.get("ceil_mode") for node in self.graph.nodes)
        model = helper.make_model(
            graph,
            producer_name="logshift",
            opset_imports=[helper.make_opsetid("", _OPSET_CEIL if ceil else _OPSET)],
            ir_version=_IR_VERSION_CEIL if ceil else _IR_VERSION,
        )
        helper.set_model_props(model, {KEY: json.dumps(self._metadata(), allow_nan=False)})
        return model

    def _metadata(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "weights": {name: weight.to_json() for name, weight in self.weights.items()},
            "scales": self.scales,
        }
        if self.graph.preprocessing is not None:
            record["preprocessing"] = self.graph.preprocessing
        if self.graph.labels is not None:
            record["labels"] = self.graph.labels
        return record

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

    def operation(self, node: Node, steps: list[tuple[str, list[str], dict[str, Any]]]) -> None:
        """Emit steps that each take the result of the one before; the last makes the output.

        steps : (operator, its inputs, "" standing for the result before it, attributes)
        """
        result = ""
        for index, (op, inputs, attributes) in enumerate(steps):
            last = index == len(steps) - 1
            inputs = [result if index and i == 0 else name for i, name in enumerate(inputs)]
            result = node.outputs[0] if last else self.fresh(f"{node.outputs[0]}/{op}")
            name = node.name if index == 0 else f"{node.name}/{op}"
            self.node(op, name, inputs, result, **attributes)
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
            inside = self.fresh(f"{tensor}/inside")
            bounds = self.bounds(tensor, "range", (0, q.top))
            self.node("Clip", f"{tensor}/Clip", [real, *bounds], inside)
            real = inside
        codes, back = self.fresh(f"{tensor}/quantized"), self.fresh(f"{tensor}/dequantized")
        self.node("QuantizeLinear", f"{tensor}/QuantizeLinear", [real, scale, zero_point], codes)
        self.node("DequantizeLinear", f"{tensor}/DequantizeLinear", [codes, scale, zero_point], back)
        self.quantized[tensor], self.real[tensor] = codes, back

    def bounds(self, tensor: str, what: str, clamp: Any) -> list[str]:
        """Return the inputs of a Clip, in real units, of a clamp in the units of `tensor`."""
        q = self.graph.quantization.get(tensor)
        return [
            self.constant(f"{tensor}/{what}/{side}", _real(bound, q)) if bound is not None else ""
            for side, bound in zip(("low", "high"), clamp, strict=True)
        ]

    def clamp(self, node: Node) -> list[tuple[str, list[str], dict[str, Any]]]:
        clamp = node.attributes["clamp"]
        if clamp == [None, None]:
            return []
        return [("Clip", ["", *self.bounds(node.outputs[0], "clamp", clamp)], {})]


def _real(code: float, q: Quantization | None) -> float:
    return code if q is None else (code - q.zero_point) * q.scale


def _value_info(info: ValueInfo) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(info.name, TensorProto.FLOAT, info.shape)


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
    assert node.weights is not None and node.bias is not None
    out, weights = node.outputs[0], node.weights
    attributes = {k: v for k, v in node.attributes.items() if k != "clamp"}
    values = onnx_weight(node.op, weights.values(), attributes["group"])
    weight = ctx.constant(f"{out}/weight", values)
    ctx.weights[weight] = WeightRecord.of(
        weights, ctx.graph.settings.get("granularity", "element")
    )
    inputs = [x[0], weight, ctx.constant(f"{out}/bias", node.bias)]
    steps = [(node.op, inputs, {"kernel_shape": list(weights.shape[1:3]), **attributes})]
    if len(x) == 2:
        steps.append(("Add", ["", x[1]], {}))
    elif ctx.graph.is_code(out):
        # A sum of nothing else changes nothing, but without it onnxruntime takes the layer for one
        # that int8 was forgotten in, and rounds the weights anew.
        steps.append(("Sum", [""], {}))
    ctx.operation(node, steps + ctx.clamp(node))


def _add(ctx: _Export, node: Node, x: list[str]) -> None:
    ctx.operation(node, [(node.op, x, {}), *ctx.clamp(node)])


def _lookup(ctx: _Export, node: Node, x: list[str]) -> None:
    """Emit a table of real values, read at the integer codes: exact in any engine."""
    assert node.table is not None
    out = node.outputs[0]
    q = ctx.graph.quantization[out]
    table = (node.table.astype(np.float32) - np.float32(q.zero_point)) * np.float32(q.scale)
    codes = ctx.fresh(f"{out}/codes")
    ctx.node("Cast", f"{node.name}/Cast", [ctx.quantized[node.inputs[0]]], codes, to=TensorProto.INT32)
    ctx.operation(node, [("Gather", [ctx.constant(f"{out}/table", table), codes], {"axis": 0})])


def _average_pool(ctx: _Export, node: Node, x: list[str]) -> None:
    # onnxruntime's quantized pool does not know the attribute, whatever its value.
    attributes = {k: v for k, v in node.attributes.items() if (k, v) != ("dilations", [1, 1])}
    ctx.operation(node, [(node.op, x, attributes)])


def _resize(ctx: _Export, node: Node, x: list[str]) -> None:
    a = dict(node.attributes)
    scales, sizes, out = a.pop("scales"), a.pop("sizes"), node.outputs[0]
    if scales is not None:
        inputs = [*x, "", ctx.constant(f"{out}/scales", scales)]
    else:
        inputs = [*x, "", "", ctx.constant(f"{out}/sizes", sizes, np.int64)]
    ctx.operation(node, [("Resize", inputs, {"axes": [2, 3], **a})])


def _slice(ctx: _Export, node: Node, x: list[str]) -> None:
    inputs = [
        ctx.constant(f"{node.outputs[0]}/{key}", node.attributes[key], np.int64)
        for key in ("starts", "ends", "axes", "steps")
    ]
    ctx.operation(node, [("Slice", x + inputs, {})])


def _pad(ctx: _Export, node: Node, x: list[str]) -> None:
    pads = ctx.constant(f"{node.outputs[0]}/pads", node.attributes["pads"], np.int64)
    ctx.operation(node, [("Pad", [*x, pads], {})])


_EMITTERS: dict[str, _Emitter] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "MaxPool": _same,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _same,
    "Add": _add,
    "Concat": _same,
    "Lookup": _lookup,
    "Resize": _resize,
    "DepthToSpace": _same,
    "Slice": _slice,
    "Pad": _pad,
    "Flatten": _same,
}
