"""Element-wise functions: of one tensor a table of codes, or a packed operator on float32.

The list of all of them is here; whatever else goes by it (`rearrange`, the conformance page) takes
it from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from logshift.converter.clamp import NO_CLAMP, Clamp, clamp_twice, ordered
from logshift.converter.function import Function
from logshift.converter.onnx_writer import BEFORE, AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.registry import Unsupported, lowers, write_same, writes
from logshift.kernels.errors import ConversionError
from logshift.runtime.operators import OPERATORS

ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_OTHERS = (
    "Abs", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Neg", "PRelu", "Pow", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh",
    "ThresholdedRelu",
)  # fmt: skip
ELEMENTWISE = {*ARITHMETIC, *_OTHERS, "Swish"}

# Bounds of Clip beyond this are float32's way to say "none".
_NO_BOUND = 1e30


@lowers(*_OTHERS, variadic=True)
def elementwise(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Lower to a function of stored tensors, which `fuse` resolves."""
    data = [name for name in node.input if name and name not in ctx.constants]
    tensors = [ctx.source(name) for name in data]
    if not tensors:
        raise Unsupported("all its inputs are constants")
    shapes = {ctx.onnx_shapes[name] for name in data}
    if len(shapes) > 1 or len({ctx.shapes[t] for t in tensors}) > 1:
        raise Unsupported(f"combines tensors of different shapes {sorted(shapes)}")
    check_shape(ctx, node, data[0])
    # Onto itself: a view of a tensor becomes an element-wise function of that tensor.
    ctx.shapes[node.output[0]] = ctx.shapes[tensors[0]]
    if (function := function_of(ctx, node, tensors[0])) is None:
        raise Unsupported("its constant is neither one value nor one per channel")
    ctx.add(
        "Elementwise",
        node,
        list(dict.fromkeys(tensors)),
        clamp=_clamp(node, ctx.constants),
        function=function,
    )


def check_shape(ctx: Context, node: onnx.NodeProto, name: str) -> None:
    """Refuse a function that repeats its input to the shape of a constant."""
    x, y = ctx.onnx_shapes[name], ctx.onnx_shapes[node.output[0]]
    if x != y:
        raise Unsupported(f"repeats its input of shape {x} to {y}")


@lowers("Swish", variadic=True)
def _swish(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    """Lower to operators that are older than Swish: x * Sigmoid(alpha * x)."""
    x, y = ctx.source(node.input[0]), node.output[0]
    ctx.shapes[y] = ctx.shapes[x]
    nodes, constants, inner = [], {}, x
    if (alpha := a.get("alpha", 1.0)) != 1.0:
        constants[f"{y}/alpha"] = np.array(alpha, np.float32)
        inner = f"{y}/scaled"
        nodes.append(helper.make_node("Mul", [x, f"{y}/alpha"], [inner]))
    nodes.append(helper.make_node("Sigmoid", [inner], [f"{y}/gate"]))
    nodes.append(helper.make_node("Mul", [x, f"{y}/gate"], [y]))
    function = Function(x, y, nodes, constants, ctx.model.opset)
    ctx.add("Elementwise", node, [x], function=function)


def function_of(ctx: Context, node: onnx.NodeProto, tensor: str) -> Function | None:
    """Return the node as a function of its stored inputs; constants are scalars or (C, 1, 1).

    None if there is a constant that is neither one value nor one per channel of `tensor`.
    """
    rank, channels = len(ctx.onnx_shapes[node.output[0]]), ctx.shapes[tensor][1]
    constants = {}
    for name in node.input:
        if (array := ctx.constants.get(name)) is None:
            continue
        if _is_scalar(array):
            constants[name] = array.flat[0].reshape(())
        elif _is_per_channel(array, channels, rank):
            constants[name] = array.reshape(-1, 1, 1)
        else:
            return None
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [n if n in constants or not n else ctx.source(n) for n in node.input]
    source = next(n for n in copy.input if n and n not in constants)
    return Function(source, node.output[0], [copy], constants, ctx.model.opset)


def _is_per_channel(array: np.ndarray, channels: int, rank: int) -> bool:
    """Tell whether a constant holds a value for every channel of a stored tensor."""
    shape = (1,) * (rank - array.ndim) + array.shape
    return len(shape) == rank and array.size == shape[1] == channels


def _is_scalar(array: np.ndarray) -> bool:
    return array.size > 0 and bool((array == array.flat[0]).all())


def _clamp(node: onnx.NodeProto, known: Mapping[str, np.ndarray]) -> Clamp:
    """Return the bounds if the node is nothing but a clamp."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    constants = {name: known[name] for name in node.input if name in known}
    if any(array.size != 1 for array in constants.values()):
        return NO_CLAMP

    def bound(index: int, attribute: str = "") -> float | None:
        name = node.input[index] if index < len(node.input) else ""
        value = float(constants[name].flat[0]) if name in constants else attributes.get(attribute)
        return None if value is None or abs(value) > _NO_BOUND else value

    match node.op_type:
        case "Relu":
            return 0.0, None
        case "Clip":
            return ordered(bound(1, "min"), bound(2, "max"))
        case "Max" | "Min" if len(node.input) == 2 and len(constants) == 1:
            value = bound(0 if node.input[0] in constants else 1)
            return (value, None) if node.op_type == "Max" else (None, value)
    return NO_CLAMP


def without_bounds(function: Function) -> tuple[Function | None, Clamp]:
    """Return a function without the clamps that end it, None if nothing is left, and its bounds."""
    *nodes, last = function.nodes
    constants, bounds = dict(function.constants), _clamp(last, function.constants)
    source = next(name for name in last.input if name not in constants)
    if last.op_type == "HardSigmoid":
        a = {"alpha": 0.2, "beta": 0.5}
        a |= {attribute.name: attribute.f for attribute in last.attribute}
        alpha, beta, scaled, line = (f"{function.output}/{name}" for name in (*a, "scaled", "line"))
        constants |= {alpha: np.array(a["alpha"], np.float32)}
        constants |= {beta: np.array(a["beta"], np.float32)}
        nodes.append(helper.make_node("Mul", [source, alpha], [scaled]))
        nodes.append(helper.make_node("Add", [scaled, beta], [line]))
        source, bounds = line, (0.0, 1.0)
    if bounds == NO_CLAMP:
        return function, NO_CLAMP
    if source == function.input:
        return None, bounds
    inner, before = without_bounds(
        Function(function.input, source, nodes, constants, function.opset)
    )
    return inner, clamp_twice(before, bounds)


# --- on float32 ---------------------------------------------------------------------------------

# Packed operators that mean what ONNX's of the same name do.
_SAME = ("Elu", "HardSigmoid", "LeakyRelu", "Sigmoid", "Tanh")

writes(*_SAME)(write_same)


@writes("HardSwish")
def _write_hard_swish(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    # An operator of its own only from version 14 on.
    attributes = {"alpha": 1 / 6, "beta": 0.5}
    return [("HardSigmoid", x, attributes), ("Mul", [*x, BEFORE], {})]


@writes("Swish")
def _write_swish(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    return [("Sigmoid", x, {}), ("Mul", [*x, BEFORE], {})]


@writes("Gelu")
def _write_gelu(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    # An operator of its own only from version 20 on.
    half, root, one = (
        to.constant(f"{node.outputs[0]}/{name}", value)
        for name, value in (("half", 0.5), ("root", math.sqrt(0.5)), ("one", 1.0))
    )
    steps: list[Step] = [("Mul", [*x, root], {}), ("Erf", [BEFORE], {}), ("Add", [BEFORE, one], {})]
    return [*steps, ("Mul", [*x, BEFORE], {}), ("Mul", [BEFORE, half], {})]


@writes("Clip")
def _write_clip(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    return [("Clip", x + to.bounds(node), {})]


def packed_function(function: Function) -> tuple[str, dict[str, Any], Clamp] | None:
    """Return the packed operator on float32 that computes a function, with attributes and bounds.

    None if it takes ONNX operators to compute it.
    """
    first = function.nodes[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in first.attribute}
    if len(function.nodes) > 1:
        found = _recognised(function)
        return found and (*found, NO_CLAMP)
    if first.op_type in (*_SAME, "HardSwish"):
        known = OPERATORS[first.op_type].attributes
        return first.op_type, {k: v for k, v in attributes.items() if k in known}, NO_CLAMP
    if first.op_type == "Gelu" and attributes.get("approximate", b"none") == b"none":
        return "Gelu", {}, NO_CLAMP
    if first.op_type in ("Clip", "Relu") and all(a.size == 1 for a in function.constants.values()):
        return "Clip", {}, _clamp(first, function.constants)
    return None


# Around what bends, and far beyond.
_POINTS = np.concatenate([np.linspace(-10, 10, 321), [-1e6, -1e3, 1e3, 1e6]])


def _recognised(function: Function) -> tuple[str, dict[str, float]] | None:
    """Return the activation that a function is, written in whatever nodes, and its attributes."""
    x, zero, one = _POINTS, 160, 176  # where x is 0 and 1
    try:
        y = function(x)
    except ConversionError:
        return None
    if y.ndim > 1:
        return None
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
    beta, slope = float(y[zero]), float(y[zero + 1] - y[zero]) * (one - zero)
    leak = float(-y[zero - (one - zero)])
    candidates: list[tuple[str, dict[str, float], np.ndarray]] = [
        ("HardSwish", {}, x * np.clip(x / 6 + 0.5, 0, 1)),
        ("Swish", {}, x * sigmoid),
        ("Gelu", {}, x / 2 * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5)))),
        ("Sigmoid", {}, sigmoid),
        ("HardSigmoid", {"alpha": slope, "beta": beta}, np.clip(slope * x + beta, 0, 1)),
        ("LeakyRelu", {"alpha": leak}, np.where(x < 0, leak * x, x)),
    ]
    for op, attributes, expected in candidates:
        if np.allclose(y, expected, rtol=1e-5, atol=1e-6):
            return op, attributes
    return None
