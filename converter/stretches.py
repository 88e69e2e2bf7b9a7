"""Stretches of the float network: packed nodes that follow each other, as one ONNX model.

onnxruntime runs them faster than one by one: weights are constants that it lays out once,
functions and clamps are fused, and values between need no copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.function import Function
from logshift.converter.layout import onnx_weight
from logshift.converter.onnx_writer import OPSET, AnyNode, FloatWriter
from logshift.converter.operators.registry import WRITINGS
from logshift.converter.ort import session

_OLDEST_OPSET = 11  # in which operators have their inputs as they are written here
_MOST_NODES = 6
_PASSED = ("QuantizeLinear", "DequantizeLinear", "Clip", "Lookup")  # all that they do comes after


class Stretch:
    """Nodes of a network that run together.

    Parameters
    ----------
    nodes : list of FloatNode
    is_written : bool
        Whether they can be written as one model; what cannot is alone.
    threads : int, optional
        By default as many as a session of logshift would have.

    Attributes
    ----------
    sources : dict of tensor name to set of tensor names
        For each that it makes, those from elsewhere that it depends on.
    inputs : set of tensor names
        All of these.
    """

    def __init__(
        self, nodes: Sequence[FloatNode], is_written: bool, threads: int | None = None
    ) -> None:
        self.nodes, self.is_written = list(nodes), is_written
        self.sources: dict[str, set[str]] = {}
        for node in nodes:
            own: set[str] = set()
            for name in node.inputs:
                own |= self.sources.get(name, {name})
            self.sources.update(dict.fromkeys(node.outputs, own))
        self.inputs: set[str] = set().union(*self.sources.values())
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = None

    def run(self, values: Mapping[str, np.ndarray], wanted: Sequence[str]) -> list[np.ndarray]:
        """Return tensors that the nodes make of `values`."""
        opened = self._session
        if opened is None:
            # Of many sessions each would keep as much as it once took.
            model = _Writer(self).model(sorted(self.inputs), self.sources)
            opened = self._session = session(model, self._threads, keeps_memory=False)
        return list(opened.run(wanted, {name: values[name] for name in self.inputs}))


def stretches(graph: FloatGraph, threads: int | None = None) -> list[Stretch]:
    """Divide a network into stretches, in order of execution.

    What cannot be written is alone, and each node but the first of a stretch reads what another one
    of it makes: those that do not depend on each other, like the heads of a detector, are apart.
    """
    opset = _opset(graph)
    parts: list[list[FloatNode]] = []
    made: set[str] = set()
    for node in graph.nodes:
        if made.isdisjoint(node.inputs) or not _is_written(node, opset) or len(made) == _MOST_NODES:
            parts.append([])
            made = set()
        parts[-1].append(node)
        if _is_written(node, opset):
            made.add(node.output)
    return [Stretch(nodes, _is_written(nodes[0], opset), threads) for nodes in parts]


def _opset(graph: FloatGraph) -> int:
    """Return the version of operators in which the functions of a network are written."""
    found = [node.function.opset for node in graph.nodes if node.function is not None]
    return max((n for n in found if n >= _OLDEST_OPSET), default=OPSET)


def _is_written(node: FloatNode, opset: int) -> bool:
    if node.is_onnx:
        return False
    return node.function is None or node.function.opset == opset


class _Writer(FloatWriter):
    """Writes a stretch as a model whose inputs and outputs are all that it reads and makes."""

    def __init__(self, stretch: Stretch) -> None:
        functions = [node.function for node in stretch.nodes if node.function is not None]
        super().__init__(functions[0].opset if functions else OPSET)
        self.names.update(stretch.inputs, stretch.sources)
        for node in stretch.nodes:
            self._write(node)

    def _write(self, node: FloatNode) -> None:
        result = node.inputs[0]
        if node.op not in _PASSED:
            own = replace(node, output=self.fresh(node.output))
            result = self.steps(own, WRITINGS[node.op](self, own, list(node.inputs)), result)
        if node.function is not None and (node.table is not None or node.op == "Lookup"):
            result = self._function(node.function, result)
        low, high = node.clamp
        if (low, high) == (0.0, None):
            self.node("Relu", "", [result], node.output)
        elif low is not None or high is not None:
            bounds = ["" if b is None else self.constant("bound", b) for b in (low, high)]
            self.node("Clip", "", [result, *bounds], node.output)
        else:
            self.node("Identity", "", [result], node.output)

    def _function(self, function: Function, x: str) -> str:
        names = {name: self.constant(name, value) for name, value in function.constants.items()}
        names[function.input] = x
        for node in function.nodes:
            names.update((name, self.fresh(name)) for name in node.output)
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.name = ""
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names[name] for name in node.output]
            self.nodes.append(copy)
        return names[function.output]

    def node(self, op: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Add a node without a name: several nodes here may be of one of the model."""
        super().node(op, "", inputs, output, **attributes)

    def parameters(self, node: AnyNode) -> list[str]:
        assert isinstance(node, FloatNode) and node.weight is not None
        weight = onnx_weight(node.op, node.weight, node.attributes["group"])
        return [self.constant("weight", weight), self.constant("bias", node.bias)]
