"""Back to standard ONNX: what a packed network computes, for any other engine to run and check.

Codes become real tensors by QuantizeLinear and DequantizeLinear with the packed scale and zero
point, words become float32 weights of exactly their values. What ONNX has no place for is in the
metadata, see `docs/qdq.md`; converting the model again gives the same network.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from logshift.converter.encode import tile_of
from logshift.converter.metadata import Metadata, WeightRecord
from logshift.kernels.activation import PIECES, Activation
from logshift.kernels.errors import ConversionError, InputError
from logshift.kernels.stlq.codec import MAX_TILE, LogWeights
from logshift.runtime.file import files, format
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.picture import Preprocessing
from logshift.runtime.validate import validate

try:
    import onnx
    from onnx import helper, numpy_helper
except ModuleNotFoundError:
    raise ConversionError("exporting needs onnx: pip install 'logshift[converter]'") from None

from logshift.converter.constant_words import weights_among
from logshift.converter.layout import onnx_weight
from logshift.converter.onnx_writer import BEFORE, AnyNode, OnnxWriter, Step, back
from logshift.converter.operators.registry import WRITINGS

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


_CONVS = ("Conv", "ConvTranspose")


class _Export(OnnxWriter):
    def __init__(self, graph: Graph) -> None:
        validate(graph)  # fills in what attributes are by default
        super().__init__(_opset(graph))
        self.graph = graph
        self.weights: dict[str, WeightRecord] = {}
        self.scales: dict[str, float] = {}
        self.keep_float: set[str] = set()
        # Names of weights and biases, by what these are.
        self.parameters_of: dict[tuple[Any, ...], str] = {}
        # By tensor of codes: the uint8 tensor, and the float32 tensor that others read.
        self.quantized: dict[str, str] = {}
        self.real: dict[str, str] = {}
        self.names = {name for node in graph.nodes for name in node.outputs}
        self.names |= {info.name for info in graph.inputs} | set(graph.constants)

    def model(self) -> onnx.ModelProto:
        inputs = [info.name for info in self.graph.inputs]
        weights = weights_among(self.graph.nodes, self.graph.constants, inputs)
        for name, array in self.graph.constants.items():
            self.initializers.append(numpy_helper.from_array(array, name))
            if name in self.graph.constant_words:
                words = self.graph.constant_words[name].weights
                self.weights[name] = self._record(words)
            elif name in weights:
                self.keep_float.add(name)
        for node in self.graph.nodes:
            inputs = [self.real.get(name, name) for name in node.inputs]
            (self._onnx if node.is_onnx else self._packed)(node, inputs)
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

    def _record(self, words: LogWeights) -> WeightRecord:
        """Describe the grid of words, and by what their second ones were chosen."""
        return WeightRecord.of(words, *_chosen_by(self.graph.settings))

    def _metadata(self) -> Metadata:
        preprocessing = self.graph.preprocessing
        return Metadata(
            self.weights,
            self.scales,
            frozenset(self.keep_float),
            None if preprocessing is None else Preprocessing.from_manifest(preprocessing),
            self.graph.labels,
        )

    def _onnx(self, node: Node, x: list[str]) -> None:
        self.nodes.append(helper.make_node(node.op, x, node.outputs, node.name))
        for key, value in node.attributes.items():
            kind = onnx.AttributeProto.INTS if value == [] else None
            self.nodes[-1].attribute.append(helper.make_attribute(key, value, attr_type=kind))

    def _packed(self, node: Node, x: list[str]) -> None:
        """Write a packed operator; if it makes codes, its result is rounded to them and back.

        What is rounded has the name of the tensor.
        """
        steps = WRITINGS[node.op](self, node, x)
        result = self.steps(node, steps, x[0])
        linear = steps and {op for op, _, _ in steps} <= {*_CONVS, "Clip"}
        if self.graph.is_code(node.outputs[0]) and linear:
            # A sum of one changes nothing, but without it onnxruntime takes a convolution between
            # codes for one that int8 was forgotten in, and rounds its weights anew.
            result = self.fresh(f"{result}/Sum")
            self.node("Sum", f"{node.name}/Sum", [node.outputs[0]], result)
        self._round(node.outputs[0], result)

    def _round(self, tensor: str, real: str) -> None:
        """Round what `real` holds to codes and back, if `tensor` holds codes."""
        q = self.graph.quantization.get(tensor)
        if q is None:
            return
        scale = self.constant(f"{tensor}/scale", q.scale)
        zero_point = self.constant(f"{tensor}/zero_point", q.zero_point, np.uint8)
        self.scales[scale] = q.scale
        if q.top < 255:
            bounds, inside = self._bounds(tensor, "range", (0, q.top)), self.fresh(f"{tensor}/Clip")
            self.node("Clip", f"{tensor}/Clip", [real, *bounds], inside)
            real = inside
        codes, back = self.fresh(f"{tensor}/quantized"), self.fresh(f"{tensor}/dequantized")
        for op, x, y in (("QuantizeLinear", real, codes), ("DequantizeLinear", codes, back)):
            self.node(op, f"{tensor}/{op}", [x, scale, zero_point], y)
        self.quantized[tensor], self.real[tensor] = codes, back

    def _bounds(self, tensor: str, what: str, clamp: Any) -> list[str]:
        """Return the inputs of a Clip, in real units, of a clamp in the units of `tensor`."""
        q = self.graph.quantization.get(tensor)
        return [
            self.constant(f"{tensor}/{what}/{side}", _real(bound, q)) if bound is not None else ""
            for side, bound in zip(("low", "high"), clamp, strict=True)
        ]

    # --- what packed operators ask for ----------------------------------------------------------

    def parameters(self, node: AnyNode) -> list[str]:
        assert isinstance(node, Node) and node.bias is not None
        out, values = node.outputs[0], node.float_weights
        if node.weights is not None:
            values = node.weights.values()
        assert values is not None
        array = onnx_weight(node.op, values, node.attributes["group"])
        weight = self._parameter(f"{out}/weight", array, kept=node.weights is None)
        if node.weights is not None:
            self.weights[weight] = self._record(node.weights)
        else:
            self.keep_float.add(weight)
        return [weight, self._parameter(f"{out}/bias", node.bias)]

    def _parameter(self, name: str, value: np.ndarray, kept: bool = False) -> str:
        """Return a constant of this value: one for all nodes that have it."""
        key = value.shape, kept, hashlib.sha256(value.tobytes()).digest()
        if key not in self.parameters_of:
            self.parameters_of[key] = self.constant(name, value)
        return self.parameters_of[key]

    def finish(self, node: AnyNode) -> list[Step]:
        assert isinstance(node, Node)
        steps = [] if node.activation is None else self._activation(node, node.activation)
        if node.attributes["clamp"] != [None, None]:
            steps.append(("Clip", [BEFORE, *self.bounds(node)], {}))
        return steps

    def _activation(self, node: Node, activation: Activation) -> list[Step]:
        """Return the steps of an activation function, in the order of its definition."""
        out = node.outputs[0]

        def constant(name: str, value: Any) -> str:
            return self.constant(f"{out}/{name}", value)

        if activation.op == "PRelu":
            slopes = constant("slope", activation.coefficients.reshape(-1, 1, 1))
            return [("PRelu", [BEFORE, slopes], {})]
        if activation.op == "HardSwish":
            bounds = [constant("gate/low", 0), constant("gate/high", 1)]
            return [
                ("Sub", [BEFORE, constant("origin", activation.origin)], {}),
                ("Div", [BEFORE, constant("unit", activation.unit)], {}),
                ("Clip", [BEFORE, *bounds], {}),
                ("Mul", [back(4), BEFORE], {}),
            ]
        q = self.graph.quantization[out]
        # In float32 all of it is exact, up to |c1| + |c2| of 2^13 - 1, which `convert` keeps to.
        c0, c1, c2 = (constant(f"c{i}", c) for i, c in enumerate(activation.coefficients))
        ends = [constant("least", -(2**15)), constant("most", 2**15 - 1)]
        width, half = constant("width", 2**12), constant("half", 2**11)
        quarter, middle = constant("quarter", 2**10), constant("middle", PIECES // 2)
        code, tie = constant("code", 2**7), constant("tie", 2**6)

        def times(f: str) -> list[Step]:
            """Return (x * f + 2^14) >> 15, of x from the step before and a sixteenth of f."""
            return [
                ("Mul", [BEFORE, f], {}),
                ("Add", [BEFORE, quarter], {}),
                ("Div", [BEFORE, half], {}),
                ("Floor", [BEFORE], {}),
            ]

        return [
            # -x, for scale and shift of x itself would go into the weights in the next conversion.
            ("Neg", [BEFORE], {}),
            ("Add", [BEFORE, constant("origin", activation.origin)], {}),
            ("Div", [BEFORE, constant("unit", -activation.unit)], {}),
            ("Clip", [BEFORE, *ends], {}),
            ("Round", [BEFORE], {}),
            ("Div", [BEFORE, width], {}),
            ("Floor", [BEFORE], {}),
            ("Mul", [BEFORE, width], {}),
            ("Sub", [back(4), BEFORE], {}),
            ("Sub", [BEFORE, half], {}),  # a sixteenth of f
            ("Add", [back(4), middle], {}),
            ("Cast", [BEFORE], {"to": onnx.TensorProto.INT32}),
            ("Gather", [c2, BEFORE], {"axis": 0}),
            *times(back(4)),
            ("Gather", [c1, back(6)], {"axis": 0}),
            ("Add", [back(2), BEFORE], {}),
            *times(back(10)),
            ("Gather", [c0, back(12)], {"axis": 0}),
            ("Add", [back(2), BEFORE], {}),
            ("Add", [BEFORE, tie], {}),
            ("Div", [BEFORE, code], {}),
            ("Floor", [BEFORE], {}),
            ("Sub", [BEFORE, constant("zero", q.zero_point)], {}),
            ("Mul", [BEFORE, constant("step", q.scale)], {}),
        ]

    def bounds(self, node: AnyNode) -> list[str]:
        return self._bounds(node.outputs[0], "clamp", node.attributes["clamp"])

    def codes(self, tensor: str) -> str:
        return self.quantized[tensor]

    def quantization(self, tensor: str) -> Quantization:
        return self.graph.quantization[tensor]


def _chosen_by(settings: dict[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """Return the granularity of a file's settings, which may be anything, and an array's tile."""
    granularity = settings.get("granularity", "element")
    try:
        tile = tile_of(granularity, settings.get("tile", MAX_TILE))
    except InputError:
        return granularity, None
    return granularity, tile if isinstance(tile, tuple) else None


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
