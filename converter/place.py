"""Where codes end and float32 begins: inside, and at the inputs and outputs of the network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.fuse import onnx_nodes
from logshift.converter.operators.functions import packed_function
from logshift.runtime.graph import NEWEST_OPSET
from logshift.runtime.operators import OPERATORS

# Packed operators that work on float32 rather than on codes if nobody wants codes of them.
_AS_WANTED = {"Add", "Concat", "Lookup", "Mul", "Sub"}


def place(graph: FloatGraph, wants_float: Callable[[FloatNode], bool]) -> None:
    """Decide which nodes work on codes, and convert tensors where both are needed; in place.

    ONNX operators work on float32, and so does what `wants_float`. Of the other packed operators,
    those with weights work on codes, the rest on whatever their inputs are, and element-wise ones
    and Concat also on float32 if nobody wants codes of them. A convolution of codes whose result is
    only wanted as float32 makes it so itself.

    Tensors keep their ONNX names in the form in which they are produced; in the other one they are
    called `<name>/float` or `<name>/codes`. Inputs and outputs have their names as float32 in any
    case. A float32 output of rank 2 is called `<name>/NC11` until Flatten takes its height and
    width of 1 away.
    """
    _Placement(graph, wants_float).run()


class _Placement:
    def __init__(self, graph: FloatGraph, wants_float: Callable[[FloatNode], bool]) -> None:
        self.graph = graph
        self.nodes: list[FloatNode] = []
        self._decide(wants_float)
        # Names of tensors that exist as float32, and of those that exist as codes.
        given = (*(info.name for info in graph.inputs), *graph.constants)
        self.floats = {name: name for name in given}
        self.codes: dict[str, str] = {}
        # Inputs that the model itself rounds, whoever reads them.
        self.rounded = {info.name for info in graph.inputs}.intersection(graph.quantization)
        if graph.nodes and all(map(wants_float, graph.nodes)):
            self.rounded.clear()
        # Names that results are to have as float32.
        self.wanted: dict[str, str] = {}
        for info in graph.outputs:
            tensor = graph.results[info.name]
            if tensor not in self.floats:
                self.wanted.setdefault(tensor, self._result_name(info.name))

    def _decide(self, wants_float: Callable[[FloatNode], bool]) -> None:
        from_float = set(self.graph.constants)
        for node in self.graph.nodes:
            inherits = not node.is_conv and set(node.inputs) <= from_float
            node.is_float = node.is_onnx or inherits or wants_float(node)
            if node.is_float:
                from_float.update(set(node.outputs) - set(self.graph.quantization))
        # What only float32 nodes read is not worth rounding.
        results = set(self.graph.results.values())
        exact = {x for node in self.graph.nodes for x in node.inputs if node.is_float}
        coded = {x for node in self.graph.nodes for x in node.inputs if not node.is_float} | results
        for node in reversed(self.graph.nodes):
            wanted = coded.union(self.graph.quantization)
            if node.op in _AS_WANTED and node.output in exact - wanted:
                node.is_float = True
                exact.update(node.inputs)
                coded = {x for n in self.graph.nodes for x in n.inputs if not n.is_float} | results

    def run(self) -> None:
        graph = self.graph
        # Of networks that have no ONNX operators yet: those that it may get do not change.
        self.opset = max((node.opset for node in graph.nodes), default=0) or NEWEST_OPSET
        names = {info.name for info in graph.outputs} | set(self.floats)
        as_codes = {x for node in graph.nodes if not node.is_float for x in node.inputs}
        as_codes.update(graph.quantization)
        for node in graph.nodes:
            find = self._as_float if node.is_float else self._as_codes
            node.inputs = [find(name) if name else "" for name in node.inputs]
            result = node.output
            if node.is_float or (node.is_conv and result not in as_codes):
                tensors = node.outputs
                node.output, *node.more_outputs = map(self._float_name, tensors)
                for tensor, name in zip(tensors, node.outputs, strict=True):
                    if tensor:
                        self._name(self.floats, tensor, name)
            else:
                node.output = f"{result}/codes" if result in names else result
                self._name(self.codes, result, node.output)
            self.nodes += self._float_forms(node) if node.is_float else [node]
        for info in graph.outputs:
            self._finish(info.name)
        graph.nodes = self.nodes
        graph.code_tensors = set(self.codes.values())

    def _float_name(self, tensor: str) -> str:
        """Return the name of a tensor that is produced as float32."""
        if tensor in self.wanted:
            return self.wanted[tensor]
        # An output of this name is held by another tensor, of rank 2.
        return f"{tensor}/NC11" if tensor in self.graph.results else tensor

    def _name(self, names: dict[str, str], tensor: str, name: str) -> None:
        names[tensor] = name
        self.graph.shapes[name] = self.graph.shapes[tensor]
        if tensor in self.graph.quantization:
            self.graph.quantization[name] = self.graph.quantization[tensor]

    def _as_float(self, tensor: str) -> str:
        if tensor in self.rounded:
            self.rounded.remove(tensor)
            self._as_codes(tensor)
            self._dequantize(tensor, f"{tensor}/float")
        if tensor not in self.floats:
            self._dequantize(tensor, self.wanted.get(tensor, f"{tensor}/float"))
        return self.floats[tensor]

    def _dequantize(self, tensor: str, name: str) -> None:
        x = self.codes[tensor]
        self.nodes.append(FloatNode("DequantizeLinear", f"{name}/DequantizeLinear", [x], name))
        self._name(self.floats, tensor, name)

    def _as_codes(self, tensor: str) -> str:
        if tensor not in self.codes:
            name, x = f"{tensor}/codes", self.floats[tensor]
            self.nodes.append(FloatNode("QuantizeLinear", f"{tensor}/QuantizeLinear", [x], name))
            self._name(self.codes, tensor, name)
        return self.codes[tensor]

    # --- results --------------------------------------------------------------------------------

    def _is_flat(self, output: str) -> bool:
        """Tell whether an output of rank 2 is held by a tensor of rank 4."""
        rank = next(len(info.nominal) for info in self.graph.outputs if info.name == output)
        return rank == 2 and len(self.graph.shapes[self.graph.results[output]]) == 4

    def _result_name(self, output: str) -> str:
        return f"{output}/NC11" if self._is_flat(output) else output

    def _finish(self, output: str) -> None:
        """Make an output from the tensor that holds it."""
        graph, tensor, name = self.graph, self.graph.results[output], self._result_name(output)
        if tensor in self.codes and tensor not in self.floats:
            self._dequantize(tensor, name)
        elif self.floats[tensor] != name:  # an input, a constant, or another output as well
            x = self._as_float(tensor)
            self.nodes.append(
                FloatNode("Identity", f"{name}/Identity", [x], name, opset=self.opset)
            )
            graph.shapes[name] = graph.shapes[tensor]
        if self._is_flat(output):
            self.nodes.append(FloatNode("Flatten", f"{output}/Flatten", [name], output))
            graph.shapes[output] = graph.shapes[tensor]
        graph.results[output] = output

    # --- float32 --------------------------------------------------------------------------------

    def _float_forms(self, node: FloatNode) -> list[FloatNode]:
        """Return what computes a packed operator on float32."""
        if node.is_onnx:
            return [node]
        if node.function is not None:
            function = node.function.renamed(node.inputs[0], node.output)
            if found := packed_function(function):
                op, attributes, clamp = found
                node = FloatNode(op, node.name, node.inputs, node.output, attributes, clamp=clamp)
                node.is_float = True
                return [node]
            return onnx_nodes(function, node.name, self.graph)
        if node.op == "Gather":
            indices = f"{node.output}/indices"
            self.graph.constants[indices] = np.array(node.attributes["indices"], np.int64)
            node.inputs.append(indices)
            node.attributes = {"axis": 1}
            node.opset = self.opset
            return [node]
        assert "ff" in OPERATORS[node.op].codes
        return [node]
