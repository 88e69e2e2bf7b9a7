"""Sums, differences and products of two tensors, and arithmetic with constants per channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step
from logshift.converter.operators.context import Context
from logshift.converter.operators.functions import ARITHMETIC, check_shape, elementwise, function_of
from logshift.converter.operators.moves import view
from logshift.converter.operators.registry import Unsupported, lowers, writes

_BROADCASTING = {"Add", "Sub", "Mul"}  # packed operators, of two tensors


@lowers(*ARITHMETIC, variadic=True)
def _arithmetic(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    data = [name for name in node.input if name not in ctx.constants]
    tensors = [ctx.source(name) for name in data]
    ranks = {len(ctx.onnx_shapes[name]) for name in data}
    if len({ctx.shapes[t] for t in tensors}) > 1:
        if node.op_type in _BROADCASTING and ranks == {4}:
            ctx.add(node.op_type, node, [ctx.tensor(name) for name in node.input])
            return
    elif len(tensors) == 1 and len(node.input) == 2:
        check_shape(ctx, node, data[0])
        # Onto itself: a view of a tensor becomes an element-wise function of that tensor.
        ctx.shapes[node.output[0]] = ctx.shapes[tensors[0]]
        constant = next(ctx.constants[n] for n in node.input if n in ctx.constants)
        if affine := _affine(ctx, node, tensors[0], constant):
            function = function_of(ctx, node, tensors[0])
            ctx.add("Affine", node, tensors, weight=affine[0], bias=affine[1], function=function)
            return
    elementwise(ctx, node, a)


@lowers("Sum", variadic=True)
def _sum(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if len(node.input) == 1:
        view(ctx, node, a)
        return
    if len(node.input) != 2:
        raise Unsupported(f"has {len(node.input)} inputs, not 2")
    add = onnx.helper.make_node("Add", node.input, node.output, name=node.name)
    _arithmetic(ctx, add, a)


@lowers("BatchNormalization")
def _batch_normalization(ctx: Context, node: onnx.NodeProto, a: dict[str, Any]) -> None:
    if a.get("training_mode", 0):
        raise Unsupported("is in training mode; export the model for inference")
    gamma, beta, mean, variance = (ctx.constant(n).astype(np.float64) for n in node.input[1:5])
    scale = gamma / np.sqrt(variance + a.get("epsilon", 1e-5))
    shift = beta - mean * scale
    ctx.add(
        "Affine",
        node,
        [ctx.tensor(node.input[0])],
        weight=scale.astype(np.float32),
        bias=shift.astype(np.float32),
    )


def _affine(
    ctx: Context, node: onnx.NodeProto, tensor: str, constant: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift per channel of arithmetic with a constant, or None if it is no such thing."""
    channels = ctx.shapes[tensor][1]
    first = node.input[0] in ctx.constants
    if constant.size != 1:
        rank = 4 if len(ctx.onnx_shapes[node.output[0]]) == 4 else 2
        shape = (1,) * (rank - constant.ndim) + constant.shape
        if len(shape) != rank or shape[1] != constant.size or constant.size != channels:
            return None
    value = np.resize(constant.astype(np.float64).ravel(), channels)
    if not np.isfinite(value).all():
        raise Unsupported("its constant holds NaN or infinity")
    one, zero = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Add":
            scale, shift = one, value
        case "Sub":
            scale, shift = (-one, value) if first else (one, -value)
        case "Mul":
            scale, shift = value, zero
        case _:
            if first or not value.all():
                return None
            scale, shift = one / value, zero
    return scale.astype(np.float32), shift.astype(np.float32)


@writes("Add", "Sub", "Mul")
def _write(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    return [(node.op, x, {}), *to.finish(node)]
