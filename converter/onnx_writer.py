"""An ONNX graph that is being written: what `export`, `evaluate` and `stretches` have in common.

Packed operators become *steps*, see `operators.registry.writes`; the two differ in what they write
around these: weights, bounds and the rounding to codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from logshift.converter.float_graph import FloatNode
from logshift.runtime.graph import Node, Quantization

AnyNode = Node | FloatNode

# In which nodes of the float network are written, where nothing asks for another version.
OPSET = 19
_IR_VERSION = 8

# Operator, inputs (which may be what steps before make), attributes.
Step = tuple[str, list[str], dict[str, Any]]
BEFORE = "<1>"


def back(steps: int) -> str:
    """Return what stands for the result of so many steps before; of one it is `BEFORE`."""
    return f"<{steps}>"


def fresh(name: str, taken: set[str]) -> str:
    """Return a name that is not taken: `name`, if it can be had; it is taken from then on."""
    chosen, number = name, 1
    while chosen in taken:
        chosen, number = f"{name}_{number}", number + 1
    taken.add(chosen)
    return chosen


class OnnxWriter:
    """Nodes and initializers of an ONNX graph.

    Attributes
    ----------
    opset : int
        Version of ONNX's operators.
    nodes, initializers : list
    names : set of str
        Of tensors that are there already.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.names: set[str] = set()

    def fresh(self, name: str) -> str:
        """Return a tensor name that nothing has yet: `name`, if it can be had."""
        return fresh(name, self.names)

    def constant(self, name: str, value: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add an initializer; returns its name."""
        name = self.fresh(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Add a node."""
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))

    def steps(self, node: AnyNode, steps: list[Step], x: str) -> str:
        """Add steps that each take the result of the one before; the last makes the output.

        Returns the name of the result: that of the node's output, or `x` if there are no steps.
        """
        result = x
        made: dict[str, str] = {}
        for index, (op, inputs, attributes) in enumerate(steps):
            last = index == len(steps) - 1
            inputs = [made.get(name, name) for name in inputs]
            result = node.outputs[0] if last else self.fresh(f"{node.outputs[0]}/{op}")
            name = node.name if index == 0 else f"{node.name}/{op}"
            if op in (before for before, _, _ in steps[1:index]):
                name += f"_{index}"
            self.node(op, name, inputs, result, **attributes)
            made = {back(n + 1): name for n, name in enumerate([result, *made.values()])}
        return result

    # --- what the two write in their own way ----------------------------------------------------

    def parameters(self, node: AnyNode) -> list[str]:
        """Return the names of weight and bias of a convolution."""
        raise NotImplementedError

    def finish(self, node: AnyNode) -> list[Step]:
        """Return the steps of a node's activation function and of its clamp, if it has them."""
        raise NotImplementedError

    def bounds(self, node: AnyNode) -> list[str]:
        """Return the bounds of a result, as inputs of Clip."""
        raise NotImplementedError

    def codes(self, tensor: str) -> str:
        """Return the uint8 tensor of the codes of a tensor."""
        raise NotImplementedError

    def quantization(self, tensor: str) -> Quantization:
        """Return the quantization of a tensor of codes."""
        raise NotImplementedError


class FloatWriter(OnnxWriter):
    """Nodes of the float network, for onnxruntime: without functions and clamps of their own."""

    def finish(self, node: AnyNode) -> list[Step]:
        """Return no steps: whoever runs the model does these."""
        return []

    def model(self, inputs: Iterable[str], outputs: Iterable[str]) -> onnx.ModelProto:
        """Return what has been written, as a model on float32 tensors."""
        reads, makes = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
            for names in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, "nodes", reads, makes, self.initializers)
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
