"""Fewer, larger nodes: what a convolution, an addition or one table can do at once.

Every rule keeps the function exactly; each looks back from a node to the producer of its input.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from logshift.converter.clamp import NO_CLAMP, clamp_twice, zero_side
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.function import Function
from logshift.converter.operators.functions import without_bounds
from logshift.converter.recognise import scaled
from logshift.runtime.operators import OPERATORS
from logshift.runtime.operators.conv import pads_fit

_CLAMPING = [op for op, operator in OPERATORS.items() if "clamp" in operator.attributes]
_ACTIVATING = [op for op, operator in OPERATORS.items() if operator.activates]


def fuse(graph: FloatGraph) -> None:
    """Fuse `graph` in place, leaving only packed operators.

    - Affine (batch normalization, arithmetic with constants) goes into the weights of the
      convolution before it, else becomes a table or a depthwise 1x1 convolution;
    - Relu and Clip become the clamp of the convolution or addition before them;
    - Add goes into a convolution that feeds nothing else and has no clamp yet;
    - all other element-wise nodes that depend on one tensor become one table of that tensor;
    - a Pad of height and width goes into the convolution after it.

    What else combines two tensors becomes an ONNX operator again.
    """
    _Fusion(graph).run()
    _drop_unused(graph)


class _Fusion:
    def __init__(self, graph: FloatGraph) -> None:
        self.graph = graph
        self.uses = graph.uses()
        self.nodes: list[FloatNode] = []
        self.producer: dict[str, FloatNode] = {}

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "Affine":
                self._affine(node)
            elif node.op == "Elementwise":
                self._elementwise(node)
            elif node.op == "Add" and not node.is_onnx:
                self._add(node)
            elif node.op == "Conv":
                self._absorb_pad(node)
                self._emit(node)
            else:
                self._emit(node)
        self.graph.nodes = self.nodes

    def _emit(self, node: FloatNode) -> None:
        self.nodes.append(node)
        for name in node.outputs:
            self.producer[name] = node

    def _sole_producer(self, tensor: str, *ops: str) -> FloatNode | None:
        """Return the producer of `tensor` if it is one of `ops` and nothing else reads it."""
        node = self.producer.get(tensor)
        usable = node and not node.is_onnx and node.op in ops
        return node if usable and self.uses[tensor] == 1 else None

    def _takes_in(self, conv: FloatNode) -> bool:
        """Tell whether a convolution may go on computing with its result.

        Not if the model rounds the result to codes that saturate at zero, nor if it comes with its
        words and so was trained just like this.
        """
        q = self.graph.quantization.get(conv.output)
        exact = q is None or (conv.words is None and zero_side(q) == NO_CLAMP)
        return exact and conv.clamp == NO_CLAMP and len(conv.inputs) == 1

    def _rename_output(self, node: FloatNode, tensor: str) -> None:
        del self.producer[node.output]
        node.output = tensor
        self.producer[tensor] = node

    def _affine(self, node: FloatNode) -> None:
        assert node.weight is not None and node.bias is not None
        conv = self._sole_producer(node.inputs[0], "Conv", "ConvTranspose")
        if conv and self._takes_in(conv):
            _scale(conv, node.weight.astype(np.float64), node.bias)
            self._rename_output(conv, node.output)
        elif node.function:
            self._elementwise(node)
        else:
            # One weight per channel is alpha itself, so quantization does not touch it.
            node.op = "Conv"
            node.attributes = {
                "strides": [1, 1],
                "pads": [0, 0, 0, 0],
                "dilations": [1, 1],
                "group": node.weight.size,
            }
            node.weight = node.weight.reshape(-1, 1, 1, 1)
            self._emit(node)

    def _elementwise(self, node: FloatNode) -> None:
        if node.clamp != NO_CLAMP:
            target = self._sole_producer(node.inputs[0], *_CLAMPING)
            if target:
                if q := self.graph.quantization.get(target.output):
                    target.clamp = clamp_twice(target.clamp, zero_side(q))
                    self.graph.quantization.setdefault(node.output, q)
                target.clamp = clamp_twice(target.clamp, node.clamp)
                self._rename_output(target, node.output)
                return
        sources = {self._source(name) for name in node.inputs}
        assert node.function is not None
        kind = node.function.nodes[0].op_type
        if len(sources) == 1:
            source = sources.pop()
            function = self._composed(node, source)
            if q := self.graph.quantization.get(node.output):
                function = function.bounded(zero_side(q))
            self._emit(FloatNode("Lookup", node.name, [source], node.output, function=function))
        elif kind == "Add":
            self._add(node)
        elif kind in OPERATORS:
            self._emit(FloatNode(kind, node.name, node.inputs, node.output))
        else:
            self._emit_as_onnx(node)

    def _emit_as_onnx(self, node: FloatNode) -> None:
        """Let an element-wise node of several tensors be the ONNX operator that it was."""
        assert node.function is not None
        for onnx_node in onnx_nodes(node.function, node.name, self.graph):
            self._emit(onnx_node)

    def _source(self, tensor: str) -> str:
        """Return the tensor of which `tensor` is an element-wise function, or itself."""
        node = self.producer.get(tensor)
        return node.inputs[0] if node and node.op == "Lookup" else tensor

    def _composed(self, node: FloatNode, source: str) -> Function:
        """Return the function of `node` as one of `source`: the tables it reads, then itself."""
        assert node.function is not None
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, np.ndarray] = {}
        for name in node.inputs:
            if name != source:
                inner = self.producer[name].function
                assert inner is not None
                nodes += [n for n in inner.nodes if n not in nodes]
                constants |= inner.constants
        return Function(
            source,
            node.output,
            nodes + node.function.nodes,
            constants | node.function.constants,
            node.function.opset,
        )

    def _add(self, node: FloatNode) -> None:
        shapes = self.graph.shapes
        convs = [
            conv
            for name in node.inputs
            if (conv := self._sole_producer(name, "Conv", "ConvTranspose"))
            and self._takes_in(conv)
            and len({shapes[n] for n in node.inputs}) == 1
        ]
        if not convs:
            self._emit(FloatNode("Add", node.name, node.inputs, node.output))
            return
        # Of two convolutions one that need not be rounded before, or the later one: the other
        # summand is complete by then.
        known = self.graph.quantization
        conv = max(convs, key=lambda conv: (conv.output not in known, self.nodes.index(conv)))
        residual = next(name for name in node.inputs if name != conv.output)
        self.nodes.remove(conv)
        conv.inputs.append(residual)
        self._rename_output(conv, node.output)
        self.nodes.append(conv)

    def _absorb_pad(self, conv: FloatNode) -> None:
        pad = self._sole_producer(conv.inputs[0], "Pad")
        if pad is None:
            return
        _, c0, top, left, _, c1, bottom, right = pad.attributes["pads"]
        own, weight = conv.attributes["pads"], conv.weight
        assert weight is not None
        pads = [p + q for p, q in zip(own, (top, left, bottom, right), strict=True)]
        if c0 == c1 == 0 and pads_fit(pads, weight.shape[1:3], conv.attributes["dilations"]):
            conv.attributes["pads"] = pads
            conv.inputs[0] = pad.inputs[0]
            self.nodes.remove(pad)


def fuse_functions(graph: FloatGraph, alike: Callable[[FloatNode, FloatNode], bool]) -> None:
    """Let functions of results be computed before these are rounded, in place; after `place`.

    A table of codes that nothing else reads becomes the activation function of the node that makes
    them. What only scales and shifts the result of a convolution goes into its weights, and bounds
    become its clamp, so HardSigmoid takes no function. Tables stay where the model itself rounds
    the tensor between.

    Parameters
    ----------
    graph : FloatGraph
    alike : callable(node, table) -> bool
        Whether the results of both are to be rounded alike.
    """
    uses = graph.uses()
    producers = {name: node for node in graph.nodes for name in node.outputs}
    nodes = []
    for node in graph.nodes:
        target = producers[node.inputs[0]] if node.op == "Lookup" else None
        if (
            target is not None
            and target.op in _ACTIVATING
            and uses[target.output] == 1
            and target.output not in graph.quantization
            and alike(target, node)
            and _take_function(target, node)
        ):
            graph.code_tensors.remove(target.output)
            target.output = node.output
            producers[node.output] = target
        else:
            nodes.append(node)
    graph.nodes = nodes


def _take_function(target: FloatNode, table: FloatNode) -> bool:
    """Let a node compute the function of a table as well, if it can."""
    assert table.function is not None
    if target.function is not None:
        return False
    function, bounds = without_bounds(table.function)
    if function is None:
        target.clamp = clamp_twice(target.clamp, bounds)
        return True
    if target.is_conv and len(target.inputs) == 1 and (line := _line(function)) is not None:
        scale, shift = line
        low, high = target.clamp
        if target.clamp != NO_CLAMP:
            if len(scale) > 1 or scale[0] <= 0:
                return False
            low, high = (
                None if bound is None else float(bound * scale[0] + shift[0])
                for bound in (low, high)
            )
        _scale(target, scale, shift)
        target.clamp = clamp_twice((low, high), bounds)
        return True
    if target.clamp != NO_CLAMP or (function.channels > 1 and not target.is_conv):
        return False
    target.function, target.clamp, target.table = function, bounds, table
    return True


# Where a function shows whether it is a line.
_POINTS = np.array([0.0, 1.0, -1.0, 0.5, 7.25, -7.25, 1e3, -1e3, 1e6, -1e6])


def _line(function: Function) -> tuple[np.ndarray, np.ndarray] | None:
    """Return scale and shift, one value or (C,), of a function that does no more."""
    y = np.atleast_2d(function.values(_POINTS))
    shift = y[:, 0]
    scale = y[:, 1] - shift
    expected = scale[:, None] * _POINTS + shift[:, None]
    size = np.abs(scale[:, None] * _POINTS) + np.abs(shift[:, None])
    is_line = np.isfinite(y).all() and (np.abs(y - expected) <= 1e-9 * size).all()
    return (scale, shift) if is_line else None


def _scale(conv: FloatNode, scale: np.ndarray, shift: np.ndarray) -> None:
    """Scale and shift the result of a convolution, by (O,) or (1,) in float64."""
    assert conv.weight is not None and conv.bias is not None
    scale = np.resize(scale, len(conv.bias))
    conv.weight = (conv.weight * scale[:, None, None, None]).astype(np.float32)
    conv.bias = (conv.bias * scale + shift).astype(np.float32)
    if conv.words is not None:
        conv.words = scaled(conv.words, scale)


def onnx_nodes(function: Function, name: str, graph: FloatGraph) -> list[FloatNode]:
    """Return an element-wise function as ONNX operators on float32; they get names of their own.

    Tensors inside of it are named after its output, for other functions may have the same nodes.
    """
    nodes = []
    names = {function.output: function.output}
    for node in function.nodes:
        inputs = []
        for source in node.input:
            if source in function.constants:
                constant = f"{function.output}/{source}"
                graph.constants[constant] = function.constants[source]
                source = constant
            inputs.append(names.get(source, source))
        output = names.setdefault(node.output[0], f"{function.output}/{node.output[0]}")
        graph.shapes.setdefault(output, graph.shapes[function.output])
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
        nodes.append(
            FloatNode(node.op_type, name, inputs, output, attributes, opset=function.opset)
        )
    return nodes


def _drop_unused(graph: FloatGraph) -> None:
    needed = set(graph.results.values())
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    graph.nodes = kept[::-1]
    graph.constants = {name: array for name, array in graph.constants.items() if name in needed}
    assert {node.op for node in kept if not node.is_onnx} <= set(OPERATORS)
