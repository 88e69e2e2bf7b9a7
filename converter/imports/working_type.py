"""Models that work in float16, bfloat16 or float64, as the float32 models that they mean.

What they are given and give back keeps its type, with a Cast beside it. bfloat16 alone does not:
NumPy has no such type, and it becomes float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from logshift.converter.imports.editor import all_graphs, constants_of, inferred_types
from logshift.converter.onnx_writer import fresh
from logshift.kernels.errors import ConversionError

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_KEPT = {TensorProto.FLOAT16, TensorProto.DOUBLE}
# Attributes that say what type a result has.
_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")
# Where a model that works in float64 spends its time; float64 beside these has reasons of its own.
_WORK = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum", "BatchNormalization",
)  # fmt: skip


def to_float32(model: onnx.ModelProto) -> bool:
    """Let a model work in float32, in place; says whether it did not.

    float16 and bfloat16 are always only a way to save time. float64 is taken for one where weights
    of convolutions and the like have it.

    Raises
    ------
    ConversionError
        If an operator looks at the bits of such a number.
    """
    kinds: set[int] = {kind for kind in _HALVES if _uses(model.graph, kind)}
    if _works_in_double(model.graph):
        kinds.add(TensorProto.DOUBLE)
    if not kinds:
        return False
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type == "BitCast" and {a.i for a in node.attribute} & kinds:
                raise ConversionError(
                    f"BitCast {node.name or node.output[0]!r} makes numbers of bits in a model of"
                    " half precision; export the model in float32"
                )
    edges = (*model.graph.input, *model.graph.output)
    declared = {value.name: value.type.tensor_type.elem_type for value in edges}
    for graph in all_graphs(model.graph):
        _retype(graph, kinds)
    _keep_edges(model.graph, {n: k for n, k in declared.items() if k in kinds & _KEPT})
    return True


def _uses(graph: onnx.GraphProto, kind: int) -> bool:
    """Tell whether a type occurs: where it does, it is declared or made by a Cast."""
    return any(
        any(t.data_type == kind for t in g.initializer)
        or any(v.type.tensor_type.elem_type == kind for v in (*g.input, *g.output))
        or any(_names(a, kind) for node in g.node for a in node.attribute)
        for g in all_graphs(graph)
    )


def _names(attribute: onnx.AttributeProto, kind: int) -> bool:
    if attribute.HasField("t"):
        return attribute.t.data_type == kind
    return attribute.name in _TYPES and attribute.i == kind


def _works_in_double(graph: onnx.GraphProto) -> bool:
    doubles = {
        name
        for g in all_graphs(graph)
        for name, tensor in constants_of(g).items()
        if tensor.data_type == TensorProto.DOUBLE
    }
    return any(
        node.op_type in _WORK and not doubles.isdisjoint(node.input)
        for g in all_graphs(graph)
        for node in g.node
    )


def _retype(graph: onnx.GraphProto, kinds: set[int]) -> None:
    for tensor in graph.initializer:
        _retype_tensor(tensor, kinds)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in kinds:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _retype_tensor(attribute.t, kinds)
            elif attribute.name in _TYPES and attribute.i in kinds:
                attribute.i = TensorProto.FLOAT
            for tensor in attribute.tensors:
                _retype_tensor(tensor, kinds)
    del graph.value_info[:]


def _retype_tensor(tensor: onnx.TensorProto, kinds: set[int]) -> None:
    if tensor.data_type in kinds:
        # Beyond float32's range are only ways to say "none".
        ends = np.finfo(np.float32)
        array = numpy_helper.to_array(tensor)
        wide = array.astype(np.float64)
        finite = np.clip(wide, float(ends.min), float(ends.max))
        array = np.where(np.isfinite(wide), finite, wide).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _keep_edges(graph: onnx.GraphProto, declared: dict[str, int]) -> None:
    """Let inputs and outputs have the types that they had, with a Cast between them and the rest.

    Parameters
    ----------
    graph : onnx.GraphProto
    declared : dict of name to type
        Of those that had another type than float32.
    """
    made = {name for node in graph.node for name in node.output}
    initializers = {tensor.name for tensor in graph.initializer}
    names = {name: fresh(f"{name}/float32", made) for name in declared if name not in initializers}
    _rename(graph, names)
    before, after = [], []
    for value in graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = declared[value.name]
            before.append(_cast(value.name, names[value.name], TensorProto.FLOAT))
    given = {value.name for value in graph.input}
    for value in graph.output:
        if value.name in names:
            value.type.tensor_type.elem_type = declared[value.name]
            if value.name not in given:
                after.append(_cast(names[value.name], value.name, declared[value.name]))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])


def _cast(x: str, y: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [x], [y], f"{y}/Cast", to=kind)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors wherever nodes read or make them, and results of subgraphs."""
    for g in all_graphs(graph):
        for node in g.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for value in g.output if g is not graph else ():
            value.name = names.get(value.name, value.name)


def drop_idle_casts(model: onnx.ModelProto) -> None:
    """Let Casts to the type that a tensor has be Identity, in place."""
    types = inferred_types(model)
    for node in model.graph.node:
        if node.op_type != "Cast" or node.input[0] not in types:
            continue
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        if types[node.input[0]].elem_type == to:
            node.op_type = "Identity"
            del node.attribute[:]
