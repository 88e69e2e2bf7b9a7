"""Why a node cannot be converted, and what would help."""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx

from logshift.converter.float_graph import Problems
from logshift.converter.imports.branches import CONTROL
from logshift.runtime.onnx_ops import numpy_ops

RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
)  # fmt: skip
_TEXT = (
    "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer",
    "LabelEncoder", "Tokenizer",
)  # fmt: skip
# What is as good as an ONNX operator of the runtime's.
_REPLACED = ("Constant", "ConstantOfShape")


def why_not(node: onnx.NodeProto, left: Mapping[str, str]) -> str | None:
    """Return why a node cannot be an ONNX operator of the runtime's, and what would help.

    None if it can be one, or if nothing but its inputs speaks against it.

    Parameters
    ----------
    node : onnx.NodeProto
    left : dict of the first output of a node to str
        See `onnx_model.Model`.
    """
    op, reason = node.op_type, left.get(next(filter(None, node.output), ""))
    if op in _TEXT:
        return "it works on text; leave that to what comes before the model"
    if node.domain == "com.microsoft.nchwc":
        return (
            "ONNX Runtime laid it out for one CPU; save the model at its level"
            " ORT_ENABLE_EXTENDED, or give the one that it was made of"
        )
    if node.domain not in ("", "ai.onnx"):
        known = f"operator of the domain {node.domain!r}"
        if reason:
            return f"{known}: {reason}"
        return f"{known}, which is not known; export the model with ONNX's own operators"
    if op in numpy_ops.OPERATORS or op in _REPLACED:
        return None
    if op in CONTROL:
        return reason or "what is in it is only known when it runs"
    if op in RANDOM:
        return "it draws random numbers; export the model as it is evaluated, not trained"
    return "not supported; export the model with operators that docs/operators.md lists"


def refuse(graph: onnx.GraphProto, left: Mapping[str, str], lowered: Container[str]) -> None:
    """Refuse a graph with nodes that cannot be converted whatever they are given.

    Parameters
    ----------
    graph : onnx.GraphProto
    left : as of `why_not`
    lowered : ONNX operators that there are packed ones for

    Raises
    ------
    ConversionError
        Lists every such node.
    """
    problems = Problems()
    for node in graph.node:
        packed = node.domain in ("", "ai.onnx") and node.op_type in lowered
        if not packed and (reason := why_not(node, left)):
            problems.add(node.op_type, node.name or next(filter(None, node.output)), reason)
    problems.raise_if_any()
