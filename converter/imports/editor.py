"""A graph whose nodes are replaced by others: what a rule can ask of it, and add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from logshift.converter.onnx_writer import fresh

STANDARD = ("", "ai.onnx")


class Stays(Exception):
    """Why a node stays as it is; no text if it is plain already."""


# Adds the nodes that do what a node does; raises `Stays` if there are none, whatever it has
# added by then.
Rule = Callable[["Use"], None]


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set."""
    return next((o.version for o in model.opset_import if o.domain in STANDARD), 1)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node has as attributes."""
    alone = [a.g for a in node.attribute if a.HasField("g")]
    return alone + [graph for a in node.attribute for graph in a.graphs]


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def reads(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, those names included that only its subgraphs read."""
    names = set(filter(None, node.input))
    for graph in subgraphs(node):
        made = {value.name for value in graph.input} | {t.name for t in graph.initializer}
        inside: set[str] = {value.name for value in graph.output}
        for inner in graph.node:
            inside |= reads(inner)
            made.update(inner.output)
        names |= inside - made
    return names


def value_of(attribute: onnx.AttributeProto) -> Any:
    """Return what an attribute holds; texts as str."""
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return initializers and the tensors of Constant nodes."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            if (tensor := _constant(node.attribute[0])) is not None:
                tensors[node.output[0]] = tensor
    return tensors


def _constant(attribute: onnx.AttributeProto) -> onnx.TensorProto | None:
    if attribute.name == "value":
        return attribute.t
    kind = np.float32 if attribute.name.startswith("value_float") else np.int64
    if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
        return numpy_helper.from_array(np.array(value_of(attribute), kind))
    return None


class Editor:
    """The graph of a model, and what is known of it.

    Attributes
    ----------
    model : onnx.ModelProto
        Changed in place.
    opset : int
    nodes : list of onnx.NodeProto
        What the graph becomes, as far as it has been walked.
    producers : dict of tensor name to the node that makes it
        Nodes that were added among them.
    readers : dict of tensor name to the nodes that read it, of the graph as it was
    left : dict of the first output of a node to str
        Why nodes stayed that a rule had been for.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph, self.opset = model, model.graph, opset_of(model)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors = constants_of(self.graph)
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.outputs = {value.name for value in self.graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)
        self.left: dict[str, str] = {}
        self._names = {*self.tensors, *self.producers, *(v.name for v in self.graph.input)}
        self._node_names = {node.name for node in self.graph.node}
        self._shapes: dict[str, onnx.TypeProto.Tensor] | None = None
        self._dropped: dict[str, None] = {}
        self._real: dict[tuple[str, ...], str] = {}

    def apply(self, rules: Mapping[tuple[str, str], Rule]) -> bool:
        """Replace all nodes for which there are rules, by domain and operator; says whether any."""
        self.nodes, changed = [], False
        for node in self.graph.node:
            if not self._dropped.keys().isdisjoint(node.output):
                continue
            rule = rules.get(("" if node.domain in STANDARD else node.domain, node.op_type))
            if rule is None:
                self.nodes.append(node)
                continue
            start, real, dropped = len(self.nodes), len(self._real), len(self._dropped)
            try:
                rule(Use(self, node))
            except Stays as reason:
                if str(reason):
                    self.left[next(filter(None, node.output))] = str(reason)
                self.nodes[start:] = [node]
                self.producers.update({name: node for name in node.output if name})
                for held, count in ((self._real, real), (self._dropped, dropped)):
                    while len(held) > count:
                        held.popitem()
            else:
                changed |= self.nodes[start:] != [node]
        self.commit()
        return changed

    def commit(self) -> None:
        """Let the graph be what it has become."""
        nodes = [_copied(node) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def drop(self, node: onnx.NodeProto) -> None:
        """Leave out a node that is still to come: what it makes is made already."""
        self._dropped.update(dict.fromkeys(node.output))

    def array(self, name: str) -> np.ndarray | None:
        """Return a constant, None if it is none."""
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def note_constant(self, node: onnx.NodeProto) -> None:
        """Know of a Constant node that was added."""
        if node.attribute and (tensor := _constant(node.attribute[0])) is not None:
            self.tensors[node.output[0]] = tensor

    def constant(self, base: str, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant; returns its name."""
        name = self.fresh(base)
        self.tensors[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        self.graph.initializer.append(self.tensors[name])
        return name

    def fresh(self, base: str) -> str:
        """Return a name that no tensor has."""
        return fresh(base, self._names)

    def fresh_node(self, base: str) -> str:
        """Return a name that no node has."""
        return fresh(base, self._node_names)

    def shape(self, name: str) -> list[int | None] | None:
        """Return what shape inference says of a tensor, None where it says nothing."""
        if name in self.tensors:
            return list(self.tensors[name].dims)
        if self._shapes is None:
            self._shapes = inferred_types(self.model)
        found = self._shapes.get(name)
        if found is None or not found.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in found.shape.dim]


def inferred_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Return the types of inputs and of all tensors of which inference can tell them."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # it fails at what it does not know, in many ways
        graph = model.graph
    values = [*graph.value_info, *graph.output, *graph.input]
    return {value.name: value.type.tensor_type for value in values}


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


class Use:
    """A node to be replaced, for its rule."""

    def __init__(self, edit: Editor, node: onnx.NodeProto) -> None:
        self.edit, self.node = edit, node
        self.name = node.name or next(filter(None, node.output))
        self.attributes = {a.name: value_of(a) for a in node.attribute}

    def get(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def kept(self, *names: str) -> dict[str, Any]:
        """Return those of these attributes that are given."""
        return {k: v for k, v in self.attributes.items() if k in names}

    def x(self, index: int) -> str:
        """Return the name of an input, "" if it is not given."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def y(self, index: int = 0) -> str:
        """Return the name of an output, "" if nobody asks for it."""
        return self.node.output[index] if index < len(self.node.output) else ""

    def asked(self, index: int) -> bool:
        """Tell whether an output is read by anyone."""
        name = self.y(index)
        return bool(name) and (name in self.edit.outputs or name in self.edit.readers)

    def refuse_outputs(self, *indices: int) -> None:
        """Refuse a node whose outputs of these positions are asked for."""
        for index in indices:
            if self.asked(index):
                raise Stays(f"its output {self.y(index)!r} is asked for")

    def refuse_inputs(self, *indices: int) -> None:
        """Refuse a node whose inputs of these positions are given."""
        for index in indices:
            if self.x(index):
                raise Stays(f"its input {self.x(index)!r} is given")

    def array(self, index: int) -> np.ndarray | None:
        """Return an input that is a constant, None if it is none."""
        return self.edit.array(self.x(index))

    def weight(self, index: int) -> np.ndarray:
        """Return an input that must be a constant."""
        if (found := self.array(index)) is None:
            raise Stays(f"its input {self.x(index)!r} is not a constant")
        return found

    def number(self, index: int, default: float) -> float:
        """Return an input that must be a constant of one value, if it is given."""
        if not self.x(index):
            return default
        if (found := self.weight(index)).size != 1:
            raise Stays(f"its input {self.x(index)!r} is not one number")
        return float(found.reshape(-1)[0])

    def rank(self, name: str) -> int:
        """Return how many axes a tensor has, which must be known."""
        if (shape := self.edit.shape(name)) is None:
            raise Stays(f"the rank of its input {name!r} is not known")
        return len(shape)

    def constant(self, what: str, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant; returns its name."""
        return self.edit.constant(f"{self.name}/{what}", value, dtype)

    def emit(
        self, op: str, inputs: Sequence[str], output: str | None = None, *, name: str = "",
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Add a node of one output; returns its name.

        Parameters
        ----------
        op : str
        inputs : tensor names
        output : str, optional
            By default a new name.
        name : str
            Of the node; by default one that is made of the replaced node's and `op`.
        attributes : the node's
        """
        result = output or self.edit.fresh(f"{self.name}/{op}")
        self.emit_all(op, inputs, [result], name=name, **attributes)
        return result

    def emit_all(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, name: str = "",
        **attributes: Any,
    ) -> None:  # fmt: skip
        """Add a node of any number of outputs."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        named = name or self.edit.fresh_node(f"{self.name}/{op}")
        node = helper.make_node(op, given, list(outputs), named, **attributes)
        self.edit.nodes.append(node)
        self.edit.producers.update({y: node for y in outputs if y})

    def move(self, op: str, x: str, axes: Sequence[int], output: str | None = None) -> str:
        """Add a Squeeze or Unsqueeze."""
        if self.edit.opset < 13:
            return self.emit(op, [x], output, axes=list(axes))
        return self.emit(op, [x, self.constant("axes", axes, np.int64)], output)

    def mean(self, x: str, axes: Sequence[int]) -> str:
        """Add a ReduceMean that keeps its axes."""
        if self.edit.opset < 18:
            return self.emit("ReduceMean", [x], axes=list(axes), keepdims=1)
        return self.emit("ReduceMean", [x, self.constant("axes", axes, np.int64)], keepdims=1)

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Add a Split."""
        outputs = [self.edit.fresh(f"{self.name}/part{i}") for i in range(len(sizes))]
        if self.edit.opset < 13:
            self.emit_all("Split", [x], outputs, axis=axis, split=list(sizes))
        else:
            self.emit_all("Split", [x, self.constant("split", sizes, np.int64)], outputs, axis=axis)
        return outputs

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        """Add a Reshape."""
        return self.emit("Reshape", [x, self.constant("shape", shape, np.int64)], output)

    def scaled(self, x: str, factor: float, output: str | None = None) -> str:
        """Add a Mul by a constant."""
        return self.emit("Mul", [x, self.constant("factor", factor)], output)

    def biased(self, x: str, bias: str) -> str:
        """Add an Add if there is something to add."""
        return self.emit("Add", [x, bias]) if bias else x

    def real(self, codes: str, scale: str, zero: str, axis: int = 1) -> str:
        """Return the float tensor that codes stand for.

        That is what was quantized, if its quantization was dynamic; the constant, if they are one;
        else what DequantizeLinear makes of them.

        Parameters
        ----------
        codes, scale, zero : tensor names
            `zero` may be "".
        axis : int
            Along which scales and zero points differ, if they do.
        """
        edit = self.edit
        producer = edit.producers.get(codes)
        if producer is not None and producer.op_type == "DynamicQuantizeLinear":
            if [codes, scale, zero] != list(producer.output):
                raise Stays(f"its scale {scale!r} is not that of {codes!r}")
            return producer.input[0]
        key = (codes, scale, zero)
        if key not in edit._real:
            if (array := edit.array(codes)) is not None:
                edit._real[key] = edit.constant(f"{codes}/real", self._real(array, *key[1:], axis))
            else:
                self._check_parameters(scale, zero)
                edit._real[key] = self.emit("DequantizeLinear", [codes, scale, zero])
        return edit._real[key]

    def _check_parameters(self, scale: str, zero: str) -> None:
        for name in filter(None, (scale, zero)):
            if (array := self.edit.array(name)) is None or array.size != 1:
                raise Stays(f"{name!r} is not a constant of one value")

    def _real(self, codes: np.ndarray, scale: str, zero: str, axis: int) -> np.ndarray:
        parameters = [self.edit.array(scale), self.edit.array(zero) if zero else np.zeros(())]
        if parameters[0] is None or parameters[1] is None:
            raise Stays(f"its scale {scale!r} or zero point {zero!r} is not a constant")
        return dequantized(codes, parameters[0], parameters[1], axis)


def dequantized(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int = 1
) -> np.ndarray:
    """Return the float32 values of codes.

    Parameters
    ----------
    codes : integer array
    scale, zero : arrays of one value, or of one for each position along `axis`
    axis : int
    """
    along = [-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]
    scale, zero = (p.reshape(along if p.size > 1 else ()).astype(np.float32) for p in (scale, zero))
    return (codes.astype(np.float32) - zero) * scale
