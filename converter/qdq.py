"""Models that are quantized already, with pairs of QuantizeLinear and DequantizeLinear (QDQ).

`strip` takes the pairs out of a model and says what they said: the float network goes on to be
simplified and lowered like any other, and the quantization of its tensors is fixed. Saturation at
zero, which often stands for a Relu that was left out, stays as a bound; at the far ends codes
saturate anyway.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from logshift.converter.clamp import clamp_twice, zero_side
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.function import Function, identity
from logshift.converter.metadata import Metadata
from logshift.converter.onnx_writer import fresh
from logshift.kernels.errors import ConversionError
from logshift.runtime.graph import Quantization
from logshift.runtime.operators import OPERATORS

_PAIR = ("QuantizeLinear", "DequantizeLinear")
# Integer types of codes: bits, and what makes them codes that start from 0.
_TYPES: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (8, 0),
    TensorProto.INT8: (8, 128),
    TensorProto.UINT4: (4, 0),
    TensorProto.INT4: (4, 8),
}
_STEP = 1e-3  # a bound this near to a code, in codes, is that code
_TABLE = 256
_REFERENCE_OPSET = 19


def strip(
    model: onnx.ModelProto, metadata: Metadata
) -> tuple[onnx.ModelProto, dict[str, Quantization]]:
    """Take QuantizeLinear and DequantizeLinear out of a model.

    Quantized constants become float32 constants. Of a pair on an activation, and a Clip before it
    that does no more than select fewer codes, a single Clip is left: it has the pair's output, and
    bounds only where codes saturate at zero. Pairs that codes of 8 bits cannot express stay.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    metadata : Metadata

    Returns
    -------
    onnx.ModelProto
        The same object if there was nothing to do.
    dict of node name to Quantization
        Of these Clips; and of QuantizeLinear that makes codes to read a table at, see `table_of`.
        Names of nodes, because simplifying changes those of tensors.
    """
    if not any(node.op_type in _PAIR for node in model.graph.node):
        return model, {}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    strip = _Strip(copy, metadata)
    strip.run()
    return copy, strip.quantization


class _Strip:
    def __init__(self, model: onnx.ModelProto, metadata: Metadata) -> None:
        self.metadata, self.graph = metadata, model.graph
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.quantization: dict[str, Quantization] = {}
        self.constants = {t.name: t for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.names = {*self.constants, *self.producers, *(v.name for v in self.graph.input)}
        self.node_names = {node.name for node in self.graph.node}

    def run(self) -> None:
        nodes = [kept for node in self.graph.node for kept in self._node(node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self._drop_unused()

    def _node(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what becomes of a node."""
        if node.op_type == "Gather":
            self._table(node)
        if node.op_type not in _PAIR:
            return [node]
        if all(name in self.constants for name in node.input if name):
            self._fold(node)
            return []
        if node.op_type == "DequantizeLinear":
            quantize = self.producers.get(node.input[0])
            if quantize is not None and (found := self._pair(quantize, node)):
                return [self._clip(node, *found)]
        return [node]

    def _array(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Return a constant input."""
        name = node.input[index] if index < len(node.input) else ""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def _fold(self, node: onnx.NodeProto) -> None:
        """Replace a node by the constant that it computes."""
        inputs = [self.constants[name] if name else None for name in node.input]
        graph = helper.make_graph(
            [node], "constant", [], [onnx.ValueInfoProto(name=node.output[0])],
            [_named(t, name) for t, name in zip(inputs, node.input, strict=True) if t],
        )  # fmt: skip
        # Both operators mean the same in all versions; older ones have no reference.
        single = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", max(self.opset, _REFERENCE_OPSET))]
        )
        (value,) = ReferenceEvaluator(single).run(None, {})
        tensor = numpy_helper.from_array(np.asarray(value), node.output[0])
        self.constants[node.output[0]] = tensor
        self.graph.initializer.append(tensor)

    def _pair(
        self, quantize: onnx.NodeProto, dequantize: onnx.NodeProto
    ) -> tuple[str, Quantization] | None:
        """Return the tensor that a pair rounds, and how; None if it is no plain pair."""
        if quantize.op_type != "QuantizeLinear" or not self._same_parameters(quantize, dequantize):
            return None
        return self._quantization(quantize)

    def _same_parameters(self, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
        for index in (1, 2):
            a, b = self._array(one, index), self._array(other, index)
            if (a is None) != (b is None):
                return False
            if a is not None and b is not None and not np.array_equal(a, b):
                return False
        return True

    def _quantization(self, node: onnx.NodeProto) -> tuple[str, Quantization] | None:
        """Return the tensor that a QuantizeLinear rounds, and how; None if not to codes."""
        scale, zero_point = self._array(node, 1), self._array(node, 2)
        if scale is None or scale.size != 1 or scale.dtype != np.float32:
            return None
        if zero_point is None:
            if len(node.input) > 2 and node.input[2]:
                return None
            given = {a.name: a.i for a in node.attribute}.get("output_dtype")
            kind, zero = given or TensorProto.UINT8, 0
        else:
            kind, zero = self.constants[node.input[2]].data_type, int(zero_point.reshape(-1)[0])
        if kind not in _TYPES:
            return None
        bits, offset = _TYPES[kind]
        step = float(scale.reshape(-1)[0])
        if not 1e-15 < step < 1e15:
            raise ConversionError(
                f"{node.op_type} {node.name or node.output[0]!r}: scale {step} is not in"
                " (1e-15, 1e15)"
            )
        exact = self.metadata.scales.get(node.input[1], step)
        q = Quantization(exact if np.float32(exact) == scale else step, zero + offset, bits)
        clip = self.producers.get(node.input[0])
        if clip is not None and clip.op_type == "Clip" and (narrow := self._narrowed(clip, q)):
            return clip.input[0], narrow
        return node.input[0], q

    def _narrowed(self, clip: onnx.NodeProto, q: Quantization) -> Quantization | None:
        """Return the quantization with as many codes as a Clip leaves, if that is a power of 2."""
        given = {a.name: a.f for a in clip.attribute}
        codes = []
        for index, side in ((1, "min"), (2, "max")):
            array = self._array(clip, index)
            bound = given.get(side) if array is None else float(array.reshape(-1)[0])
            code = np.inf if bound is None else bound / q.scale + q.zero_point
            if not (-_STEP <= code <= q.top + _STEP and abs(code - round(code)) <= _STEP):
                return None
            codes.append(round(code))
        low, high = codes
        bits = (high - low + 1).bit_length() - 1
        if not (high - low + 1 == 2**bits and 2 <= bits < q.bits and low <= q.zero_point <= high):
            return None
        return Quantization(q.scale, q.zero_point - low, bits)

    def _clip(self, node: onnx.NodeProto, tensor: str, q: Quantization) -> onnx.NodeProto:
        name = self._note(node, q)
        ends = np.finfo(np.float32)
        low, high = zero_side(q)
        bounds = [ends.min if low is None else low, ends.max if high is None else high]
        if self.opset < 11:
            return helper.make_node(
                "Clip", [tensor], node.output, name, min=float(bounds[0]), max=float(bounds[1])
            )
        inputs = [tensor]
        for bound, side in zip(bounds, ("low", "high"), strict=True):
            inputs.append(fresh(f"{node.output[0]}/{side}", self.names))
            self.graph.initializer.append(
                numpy_helper.from_array(np.array(bound, np.float32), inputs[-1])
            )
        return helper.make_node("Clip", inputs, node.output, name)

    def _note(self, node: onnx.NodeProto, q: Quantization) -> str:
        """Note the quantization of a node; returns the name that only this node is to have."""
        name = fresh(node.name or node.output[0], self.node_names)
        self.quantization[name] = q
        return name

    def _table(self, gather: onnx.NodeProto) -> None:
        """Make a table that is read at codes independent of a Clip before these."""
        table = self._array(gather, 0)
        axis = next((a.i for a in gather.attribute if a.name == "axis"), 0)
        if table is None or table.dtype != np.float32 or table.ndim != 1 or axis != 0:
            return
        if (parts := _reading(gather, self.producers)) is None:
            return
        quantize, offset = parts
        channels = len(table) // _TABLE
        if offset:
            offsets = self._array(self.producers[gather.input[1]], 1)
            if offsets is None or not np.array_equal(offsets, _offsets(channels, offsets.dtype)):
                return
        zero = self._array(quantize, 2)
        if (
            len(table) != channels * _TABLE
            or (channels > 1 and not offset)
            or (zero is not None and zero.dtype != np.uint8)
            or (found := self._quantization(quantize)) is None
        ):
            return
        tensor, q = found
        low = (0 if zero is None else int(zero.reshape(-1)[0])) - q.zero_point
        table = table.reshape(channels, _TABLE)[:, np.clip(np.arange(_TABLE), low, low + q.top)]
        quantize.input[0] = tensor
        gather.input[0] = fresh(f"{gather.output[0]}/table", self.names)
        tensor_proto = numpy_helper.from_array(table.reshape(-1), gather.input[0])
        self.constants[gather.input[0]] = tensor_proto
        self.graph.initializer.append(tensor_proto)
        quantize.name = self._note(quantize, q)

    def _drop_unused(self) -> None:
        needed = {value.name for value in self.graph.output}
        kept = []
        for node in reversed(self.graph.node):
            # Subgraphs may read anything.
            if needed.intersection(node.output) or any(a.HasField("g") for a in node.attribute):
                needed.update(node.input)
                kept.append(node)
        if any(a.HasField("g") for node in kept for a in node.attribute):
            return
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))


def _reading(
    gather: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, bool] | None:
    """Return what makes the codes at which a table is read, and whether each channel has its own.

    None if it is no such thing: QuantizeLinear, Cast, Add of a constant if channels differ, Gather.
    """
    if gather.op_type != "Gather":
        return None
    node = producers.get(gather.input[1])
    offset = node is not None and node.op_type == "Add"
    if node is not None and offset:
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Cast":
        return None
    node = producers.get(node.input[0])
    return None if node is None or node.op_type != "QuantizeLinear" else (node, offset)


def _offsets(channels: int, dtype: np.dtype) -> np.ndarray:
    """Return where the tables of channels begin."""
    return (_TABLE * np.arange(channels, dtype=dtype)).reshape(1, -1, 1, 1)


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def table_of(
    gather: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    quantization: dict[str, Quantization],
) -> tuple[onnx.NodeProto, Quantization] | None:
    """Return what makes the codes at which a Gather reads a table, and their quantization.

    Parameters
    ----------
    gather : onnx.NodeProto
    producers : dict of tensor name to the node that makes it
    quantization : dict of node name to Quantization
        From `strip`.

    Returns
    -------
    (QuantizeLinear, Quantization), or None if the node is anything else.
    """
    if (parts := _reading(gather, producers)) is None:
        return None
    quantize, _ = parts
    q = quantization.get(quantize.name)
    return None if q is None else (quantize, q)


def table_function(
    x: str, y: str, table: np.ndarray, zero_point: int, scale: float, opset: int
) -> Function:
    """Return the function y of x that a table is, or tables of channels, at codes 0 to 255."""
    channels = len(table) // _TABLE
    begins = _offsets(channels, np.dtype(np.float32))[0]
    constants = {
        f"{y}/scale": np.array(scale, np.float32),
        f"{y}/zero": np.array(zero_point, np.float32),
        f"{y}/first": np.array(0, np.float32),
        f"{y}/last": np.array(_TABLE - 1, np.float32),
        f"{y}/table": table,
        f"{y}/begin": begins if channels > 1 else np.zeros((), np.float32),
    }
    step, zero, first, last, values, begin = constants
    nodes = [
        helper.make_node("Div", [x, step], [f"{y}/ratio"]),
        helper.make_node("Round", [f"{y}/ratio"], [f"{y}/rounded"]),
        helper.make_node("Add", [f"{y}/rounded", zero], [f"{y}/shifted"]),
        helper.make_node("Max", [f"{y}/shifted", first], [f"{y}/above"]),
        helper.make_node("Min", [f"{y}/above", last], [f"{y}/inside"]),
        helper.make_node("Add", [f"{y}/inside", begin], [f"{y}/position"]),
        helper.make_node("Cast", [f"{y}/position"], [f"{y}/place"], to=TensorProto.INT64),
        helper.make_node("Gather", [values, f"{y}/place"], [y]),
    ]
    return Function(x, y, nodes, constants, opset)


# --- the lowered network ------------------------------------------------------------------------


def settle(graph: FloatGraph) -> None:
    """Let operators that only move codes have one quantization, in place; after `fuse`.

    What is known of an output holds for an input of which nothing is known. If both are known, and
    different, codes go through a table. A Concat of tensors that agree only moves codes as well.
    """
    known = graph.quantization
    for node in reversed(graph.nodes):
        if _moves(node) and node.output in known:
            known.setdefault(node.inputs[0], known[node.output])
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op == "Concat" and not node.is_onnx:
            first, *others = (known.get(name) for name in node.inputs)
            if first is not None and all(q == first for q in others):
                known.setdefault(node.output, first)
        if not _moves(node) or (q := known.get(node.inputs[0])) is None:
            continue
        if known.setdefault(node.output, q) != q:
            moved = f"{node.output}/moved"
            function = identity(moved, node.output)
            nodes.append(FloatNode("Lookup", f"{node.name}/requantized", [moved], node.output,
                                   function=function))  # fmt: skip
            graph.shapes[moved] = graph.shapes[node.output]
            node.output = moved
            known[moved] = q
    graph.nodes = nodes


def _moves(node: FloatNode) -> bool:
    return not node.is_onnx and OPERATORS[node.op].keeps_quantization


def saturate(graph: FloatGraph) -> None:
    """Bound all nodes whose codes saturate at zero, in place; after `place`."""
    for node in graph.nodes:
        if node.is_onnx or (q := graph.quantization.get(node.output)) is None:
            continue
        if node.output in graph.code_tensors or "clamp" in OPERATORS[node.op].attributes:
            node.clamp = clamp_twice(node.clamp, zero_side(q))
