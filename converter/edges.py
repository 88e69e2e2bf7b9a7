"""The ends of the lowered network: float32 tensors in, codes inside, float32 tensors out."""

from __future__ import annotations

from logshift.converter.float_graph import FloatGraph, FloatNode


def add_edges(graph: FloatGraph) -> None:
    """Insert QuantizeLinear, DequantizeLinear and Flatten, in place.

    A convolution that only makes an output makes it in float32 itself. Tensors of codes whose ONNX
    name is an input's or output's are called `<name>/codes`; a float32 output of rank 2 is called
    `<name>/NC11` until Flatten takes its height and width of 1 away.
    """
    names = [info.name for info in (*graph.inputs, *graph.outputs)]
    _rename(graph, {name: f"{name}/codes" for name in names})
    uses = graph.uses()
    producer = {node.output: node for node in graph.nodes}
    endings: list[FloatNode] = []
    for info in graph.outputs:
        tensor = graph.results[info.name]
        flat = len(info.shape) == 2
        result = f"{info.name}/NC11" if flat else info.name
        conv = producer.get(tensor)
        if conv and conv.is_conv and uses[tensor] == 1:
            conv.output = result
        else:
            name = f"{info.name}/DequantizeLinear"
            endings.append(FloatNode("DequantizeLinear", name, [tensor], result))
        if flat:
            endings.append(FloatNode("Flatten", f"{info.name}/Flatten", [result], info.name))
        graph.shapes[result] = graph.shapes[info.name] = graph.shapes[tensor]
        graph.float_tensors |= {result, info.name}
        graph.results[info.name] = info.name
    beginnings = []
    for info in graph.inputs:
        name, codes = f"{info.name}/QuantizeLinear", f"{info.name}/codes"
        beginnings.append(FloatNode("QuantizeLinear", name, [info.name], codes))
        graph.shapes[info.name] = graph.shapes[codes]
        graph.float_tensors.add(info.name)
    graph.nodes = beginnings + graph.nodes + endings


def _rename(graph: FloatGraph, names: dict[str, str]) -> None:
    for node in graph.nodes:
        node.inputs = [names.get(name, name) for name in node.inputs]
        node.output = names.get(node.output, node.output)
    graph.results = {k: names.get(name, name) for k, name in graph.results.items()}
    graph.shapes = {names.get(name, name): shape for name, shape in graph.shapes.items()}
