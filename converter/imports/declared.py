"""What a model declares of its tensors and outputs, where the graph says it itself.

Exporters write down shapes and types that are wrong, and whoever changes a graph leaves old ones
behind. Inputs are what they are declared to be; all else follows.
"""

from __future__ import annotations

import onnx

from logshift.converter.imports.editor import all_graphs, inferred_types


def complete(model: onnx.ModelProto) -> None:
    """Let outputs have a type and shape, as ONNX's checker asks for, in place, until `forget`."""
    for value in model.graph.output:
        if value.type.WhichOneof("value") is None:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()


def forget(model: onnx.ModelProto) -> None:
    """Take out what is declared of tensors and outputs, in place, but for what nobody else knows.

    Types of outputs are those that inference finds; where it finds none, they stay.
    """
    declared = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    for graph in all_graphs(model.graph):
        del graph.value_info[:]
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.ClearField("type")
    found = inferred_types(model)
    for value in model.graph.output:
        kind = found[value.name].elem_type if value.name in found else 0
        if kind or declared[value.name]:
            value.type.tensor_type.elem_type = kind or declared[value.name]
