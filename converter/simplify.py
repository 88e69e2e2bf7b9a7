"""Simplified models: constants folded, identities gone, batch normalization in its convolution."""

from __future__ import annotations

import onnx
import onnxslim
from onnx import helper, numpy_helper

# Simplifications that change weights.
RENAMING = (
    "FusionConvAdd", "FusionConvBN", "FusionConvMul", "FusionConvTransposeAdd",
    "FusionConvTransposeBN", "FusionConvTransposeMul", "FusionGemm", "FusionGemmAdd",
    "FusionGemmMul",
)  # fmt: skip
# Of integers ONNX compares which is greater since then.
_COMPARES_INTEGERS = 9


def simplified(model: onnx.ModelProto, skipped: tuple[str, ...]) -> onnx.ModelProto:
    """Simplify a model; where that fails it stays as it is, which costs nothing but speed.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    skipped : names of simplifications not to be made
    """
    # Inference of shapes may know less than the model says.
    for options in ({}, {"no_shape_infer": True}):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        hidden = _hide_comparisons(copy)
        try:
            proto = onnxslim.slim(copy, skip_fusion_patterns=skipped, **options)
        except Exception:  # a simplifier may fail in any way
            continue
        _show_comparisons(proto.graph, hidden)
        if _is_whole(proto.graph):
            return proto
    return model


def _hide_comparisons(model: onnx.ModelProto) -> set[str]:
    """Let Equal be said in other words, in place; returns what the results are called.

    Of a size that is not known the simplifier says that it differs from any number. That is right
    of -1 alone, which exporters ask for.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    hidden: set[str] = set()
    if opset < _COMPARES_INTEGERS:
        return hidden
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        known = [numpy_helper.to_array(constants[n]) for n in node.input if n in constants]
        if node.op_type != "Equal" or not any(
            a.dtype.kind == "i" and (a >= 0).any() for a in known
        ):
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        y = node.output[0]
        hidden.add(y)
        less, greater, either = (f"{y}/{part}" for part in ("less", "greater", "either"))
        nodes += [
            helper.make_node("Less", node.input, [less], f"{node.name}/Less"),
            helper.make_node("Greater", node.input, [greater], f"{node.name}/Greater"),
            helper.make_node("Or", [less, greater], [either], f"{node.name}/Or"),
            helper.make_node("Not", [either], [y], node.name),
        ]
    if hidden:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return hidden


def _show_comparisons(graph: onnx.GraphProto, hidden: set[str]) -> None:
    """Let comparisons that are left be Equal again, in place."""
    if not hidden:
        return
    producers = {name: node for node in graph.node for name in node.output}
    for y in hidden & producers.keys():
        node = producers[y]
        either = producers.get(node.input[0]) if node.op_type == "Not" else None
        less = producers.get(either.input[0]) if either and either.op_type == "Or" else None
        if less is not None and less.op_type == "Less":
            node.op_type = "Equal"
            node.input[:] = less.input
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        ours = node.op_type in ("Less", "Greater", "Or") and used.isdisjoint(node.output)
        if not ours:
            used.update(node.input)
            for attribute in node.attribute:
                used.update(name for inner in attribute.g.node for name in inner.input)
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(kept[::-1])


def _is_whole(graph: onnx.GraphProto) -> bool:
    """Tell whether all nodes' inputs come from somewhere."""
    known = {"", *(value.name for value in graph.input), *(t.name for t in graph.initializer)}
    for node in graph.node:
        if not known.issuperset(node.input):
            return False
        known.update(node.output)
    return known.issuperset(value.name for value in graph.output)
