"""QuantizeLinear and DequantizeLinear that make no pair, as arithmetic.

Such are those of inputs and outputs that are codes themselves, and pairs that 8-bit codes cannot
express.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx
from onnx import TensorProto, helper

from logshift.converter.imports.editor import Editor, Stays, Use

_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.int32)


def write_out(model: onnx.ModelProto, kept: Container[str]) -> None:
    """Replace all QuantizeLinear and DequantizeLinear of constant parameters, in place.

    Parameters
    ----------
    model : onnx.ModelProto
    kept : names of QuantizeLinear to be left
    """

    def quantize(n: Use) -> None:
        if n.node.name in kept:
            raise Stays("a table is read at its codes")
        _quantize(n)

    rules = {("", "QuantizeLinear"): quantize, ("", "DequantizeLinear"): _dequantize}
    if any(("", node.op_type) in rules for node in model.graph.node):
        Editor(model).apply(rules)


def _parameters(n: Use) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and the zero point, float32, of shapes that go with the tensor."""
    scale, axis = n.weight(1), n.get("axis", 1)
    zero = n.weight(2) if n.x(2) else np.zeros(scale.shape, np.uint8)
    if scale.dtype != np.float32 or zero.dtype not in _INTEGERS or n.get("block_size", 0):
        raise Stays("its codes are of another kind")
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(()).astype(np.float32)
    rank = n.rank(n.x(0))
    along = [-1 if i == axis % rank else 1 for i in range(rank)]
    return scale.reshape(along), zero.reshape(along).astype(np.float32)


def _dequantize(n: Use) -> None:
    scale, zero = _parameters(n)
    y = n.emit("Cast", [n.x(0)], to=TensorProto.FLOAT)
    if zero.any():
        y = n.emit("Sub", [y, n.constant("zero", zero)])
    n.emit("Mul", [y, n.constant("scale", scale)], n.y(), name=n.name)


def _quantize(n: Use) -> None:
    if n.edit.opset < 12:
        raise Stays("Clip has its bounds as inputs since operator set 11, of all types since 12")
    scale, zero = _parameters(n)
    kind = n.weight(2).dtype if n.x(2) else np.dtype(np.uint8)
    if n.get("output_dtype", 0):
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(n.get("output_dtype", 0)))
    if kind.type not in _INTEGERS or kind == np.int32:
        raise Stays("its codes are of another kind")
    y = n.emit("Round", [n.emit("Div", [n.x(0), n.constant("scale", scale)])])
    if zero.any():
        y = n.emit("Add", [y, n.constant("zero", zero)])
    ends = np.iinfo(kind)
    bounds = [n.constant("least", ends.min), n.constant("most", ends.max)]
    y = n.emit("Clip", [y, *bounds], name=n.name)
    n.emit("Cast", [y], n.y(), to=helper.np_dtype_to_tensor_dtype(kind))
