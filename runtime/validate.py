"""The rules that a packed graph must keep: all that a kernel will trust, before any kernel runs."""

from __future__ import annotations

import math

import numpy as np

from logshift.kernels.errors import FormatError, InputError
from logshift.runtime.graph import (
    DTYPES,
    MAX_ELEMENTS,
    MAX_RANK,
    NEWEST_OPSET,
    ConstantWords,
    Graph,
    Node,
    ValueInfo,
)
from logshift.runtime.infer import infer_nominal
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.operators import OPERATORS
from logshift.runtime.operators.base import REQUIRED, NodeError
from logshift.runtime.operators.conv import check_grid

_MOST_UNIT = 1e15  # of the words of a constant: their values stay far from float32 infinity


def validate(graph: Graph) -> None:
    """Check everything that a kernel will trust, except the input of a particular run.

    Fills in what attributes are by default, and lays arrays out as kernels read them.

    Raises
    ------
    FormatError
        Names the node or tensor and the rule that it breaks.
    """
    if not graph.inputs or not graph.outputs or not graph.nodes:
        raise FormatError("the graph needs at least one input, one output and one node")
    _check_quantization(graph)
    if not 1 <= graph.opset <= NEWEST_OPSET:
        raise FormatError(f"opset {graph.opset} is not known; known are 1 to {NEWEST_OPSET}")
    known: set[str] = set()
    for info in graph.inputs:
        if info.name in known or graph.is_code(info.name):
            raise FormatError(f"input {info.name!r} is given twice or holds codes")
        _check_value_info("input", info)
        known.add(info.name)
    for name, array in graph.constants.items():
        if name in known or graph.is_code(name) or not name:
            raise FormatError(f"constant {name!r} has the name of another tensor")
        if array.dtype.name not in DTYPES or array.ndim > MAX_RANK:
            raise FormatError(f"constant {name!r} is {array.dtype} of rank {array.ndim}")
        known.add(name)
    for name, words in graph.constant_words.items():
        check_words(name, words)
        values = graph.constants.get(name)
        if values is None or values.dtype != np.float32 or values.shape != words.shape:
            raise FormatError(f"words are given for {name!r}, which is no constant like them")
    for node in graph.nodes:
        label = f"node {node.name!r} ({node.op})"
        for name in node.inputs:
            if name not in known and not (node.is_onnx and name == ""):
                raise FormatError(f"{label}: input {name!r} is produced by no earlier node")
        for name in node.outputs:
            if name in known:
                raise FormatError(f"{label}: output {name!r} is produced twice")
            if name:
                known.add(name)
        try:
            if node.is_onnx:
                _check_onnx_node(graph, node)
            else:
                _check_packed_node(graph, node)
        except NodeError as error:
            raise FormatError(f"{label}: {error}") from None
        _lay_out(node)
    if unused := set(graph.quantization) - known:
        raise FormatError(f"quantization given for unknown tensor {min(unused)!r}")
    for info in graph.outputs:
        if info.name not in known or graph.is_code(info.name):
            raise FormatError(f"output {info.name!r} is produced by no node or holds codes")
        _check_value_info("output", info)
    if len({info.name for info in graph.outputs}) != len(graph.outputs):
        raise FormatError("an output is given twice")
    _check_outputs(graph)


def check_words(name: str, words: ConstantWords) -> None:
    """Check the words of a constant, which its values are computed of.

    Raises
    ------
    FormatError
    """
    shape, axes = words.shape, words.axes
    if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1:
        raise FormatError(f"constant {name!r}: shape {list(shape)} is none that words can have")
    if len(set(axes)) < len(axes) or not set(axes) <= set(range(len(shape))):
        raise FormatError(f"constant {name!r}: axes {list(axes)} are not axes of {list(shape)}")
    rows = math.prod(shape[axis] for axis in axes)
    if words.weights.shape != (rows, 1, 1, math.prod(shape) // rows):
        raise FormatError(
            f"constant {name!r}: words of shape {list(words.weights.shape)} do not make up"
            f" {list(shape)} with axes {list(axes)} in front"
        )
    try:
        check_grid(words.weights)
    except NodeError as error:
        raise FormatError(f"constant {name!r}: {error}") from None
    if float(words.weights.unit().max()) > _MOST_UNIT:
        raise FormatError(f"constant {name!r}: alpha is absurdly large")


def _lay_out(node: Node) -> None:
    """Let arrays that kernels get by their address have their values one after the other."""
    for name in ("bias", "table", "float_weights"):
        if (array := getattr(node, name)) is not None:
            setattr(node, name, np.ascontiguousarray(array))


def _check_quantization(graph: Graph) -> None:
    for tensor, q in graph.quantization.items():
        # Ratios of scales, times any sum of codes, stay far from float32 infinity.
        if not 1e-15 < q.scale < 1e15:
            raise FormatError(f"tensor {tensor!r}: scale {q.scale} is not in (1e-15, 1e15)")
        if not 2 <= q.bits <= 8:
            raise FormatError(f"tensor {tensor!r}: {q.bits} bits; codes have 2 to 8")
        if not 0 <= q.zero_point <= q.top:
            raise FormatError(f"tensor {tensor!r}: zero point {q.zero_point} is not a code")


def _check_value_info(kind: str, info: ValueInfo) -> None:
    if not info.name:
        raise FormatError(f"an {kind} has no name")
    if info.dtype not in DTYPES:
        raise FormatError(f"{kind} {info.name!r}: dtype {info.dtype!r} is not known")
    if len(info.shape) != len(info.nominal) or len(info.shape) > MAX_RANK:
        raise FormatError(
            f"{kind} {info.name!r}: shape and nominal shape must have one rank, at most {MAX_RANK}"
        )
    for dim, size in zip(info.shape, info.nominal, strict=True):
        if not 0 <= size <= MAX_ELEMENTS or (isinstance(dim, int) and dim != size):
            raise FormatError(
                f"{kind} {info.name!r}: nominal shape {info.nominal} does not fit {info.shape}"
            )


def _check_packed_node(graph: Graph, node: Node) -> None:
    if node.domain or node.op not in OPERATORS:
        raise NodeError(f"unknown operator{f' of domain {node.domain!r}' * bool(node.domain)}")
    operator = OPERATORS[node.op]
    low, high = operator.arity
    if not low <= len(node.inputs) <= high:
        raise NodeError(f"has {len(node.inputs)} inputs, takes {low} to {high}")
    if len(node.outputs) != 1 or not node.outputs[0]:
        raise NodeError("has one output")
    first = "c" if graph.is_code(node.inputs[0]) else "f"
    choices = operator.codes.split()
    kind_in, kind_out = tuple(next((c for c in choices if c[0] == first), choices[0]))
    for name in node.inputs:
        if graph.is_code(name) != (kind_in == "c"):
            expected = "codes" if kind_in == "c" else "float32"
            raise NodeError(f"input {name!r} must hold {expected}")
    out = node.outputs[0]
    if kind_out != "?" and graph.is_code(out) != (kind_out == "c"):
        raise NodeError(f"output {out!r} must hold {'codes' if kind_out == 'c' else 'float32'}")
    if node.activation is not None and not operator.activates:
        raise NodeError("takes no activation function")
    if unknown := set(node.attributes) - set(operator.attributes):
        raise NodeError(f"unknown attribute {min(unknown)!r}")
    for key, (default, check) in operator.attributes.items():
        if key not in node.attributes:
            if default is REQUIRED:
                raise NodeError(f"attribute {key!r} is missing")
            node.attributes[key] = default
        if not check(node.attributes[key]):
            raise NodeError(f"attribute {key} = {node.attributes[key]!r} is not allowed")
    if (
        operator.keeps_quantization
        and kind_out == "c"
        and graph.quantization[out] != graph.quantization[node.inputs[0]]
    ):
        raise NodeError(f"output {out!r} must have the quantization of its input")
    if operator.check is not None:
        operator.check(graph, node)


def _check_onnx_node(graph: Graph, node: Node) -> None:
    if node.op not in numpy_ops.OPERATORS:
        raise NodeError("unknown ONNX operator")
    if node.weight_shape is not None or node.table is not None or node.bias is not None:
        raise NodeError("ONNX operators have no weights of their own")
    if node.activation is not None:
        raise NodeError("ONNX operators have no fused activation function")
    if not any(node.outputs):
        raise NodeError("has no output")
    for name in (*node.inputs, *node.outputs):
        if graph.is_code(name):
            raise NodeError(f"{name!r} holds codes, which ONNX operators do not know")
    for key, value in node.attributes.items():
        items = value if isinstance(value, list) else [value]
        if not all(type(item) in (int, float, str) for item in items):
            raise NodeError(f"attribute {key} must be a number, a string or a list of those")


def _check_outputs(graph: Graph) -> None:
    """Check that outputs are what they are declared to be, at the nominal input size."""
    try:
        found = infer_nominal(graph)
    except InputError as error:
        raise FormatError(str(error)) from None
    for info in graph.outputs:
        # What only a run can tell is checked by nobody.
        shape = found.shapes.get(info.name, info.nominal)
        dtype = found.dtypes.get(info.name, np.dtype(info.dtype))
        if shape != info.nominal or dtype != info.dtype:
            raise FormatError(
                f"output {info.name!r} is declared {info.dtype} {info.nominal} but the graph"
                f" produces {dtype} {shape}"
            )
