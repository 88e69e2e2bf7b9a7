"""Element-wise functions of one tensor, as the ONNX nodes that compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from logshift.converter.clamp import Clamp
from logshift.kernels.errors import ConversionError

_IR_VERSION = 8


@dataclass
class Function:
    """An element-wise function of one tensor.

    Attributes
    ----------
    input, output : str
        Tensor names inside `nodes`.
    nodes : list of onnx.NodeProto, in execution order
    constants : dict of name to array
        Scalars, or (C, 1, 1) of functions that differ by channels.
    opset : int
        Version of the ONNX operators in `nodes`.
    """

    input: str
    output: str
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    opset: int

    @property
    def channels(self) -> int:
        """For how many channels it says what it is there; 1 if that is the same for all."""
        return max((len(c) for c in self.constants.values() if c.ndim == 3), default=1)

    def model(self, dtype: type[np.generic]) -> onnx.ModelProto:
        """Return the function as an ONNX model on tensors of this type."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        graph = helper.make_graph(
            self.nodes,
            "function",
            [helper.make_tensor_value_info(self.input, kind, None)],
            [helper.make_tensor_value_info(self.output, kind, None)],
            [
                onnx.numpy_helper.from_array(value.astype(dtype), name)
                for name, value in self.constants.items()
            ],
        )
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)

    def values(self, x: np.ndarray) -> np.ndarray:
        """Evaluate it at x, one-dimensional, in float64: what is not finite stays so.

        Returns an array of the shape of x, or (C, x.size) if channels differ.
        """
        channels = self.channels
        x = np.broadcast_to(x.astype(np.float64), (1, channels, 1, x.size))
        with np.errstate(all="ignore"):
            (y,) = ReferenceEvaluator(self.model(np.float64)).run(None, {self.input: x})
        y = np.broadcast_to(y, x.shape)
        return np.asarray(y[0, :, 0] if channels > 1 else y.ravel(), np.float64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Evaluate it as `values` does.

        Raises
        ------
        ConversionError
            If it is not finite everywhere on `x`.
        """
        y = self.values(x)
        if not np.isfinite(y).all():
            worst = float(np.broadcast_to(x, y.shape)[~np.isfinite(y)][0])
            raise ConversionError(
                f"the element-wise function of {self.output!r} is not finite at x = {worst:g},"
                " which its input can reach; keep_float leaves its node in float32"
            )
        return y

    def renamed(self, source: str, result: str) -> Function:
        """Return the function with other names of its input and output."""
        names = {self.input: source, self.output: result}
        nodes = []
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            nodes.append(copy)
        return Function(source, result, nodes, self.constants, self.opset)

    def bounded(self, bounds: Clamp) -> Function:
        """Return the function with bounds on its result."""
        nodes, constants = list(self.nodes), dict(self.constants)
        for op, bound in zip(("Max", "Min"), bounds, strict=True):
            if bound is not None:
                free, constant = f"{self.output}/free", f"{self.output}/{op}"
                constants[constant] = np.array(bound, np.float32)
                last = onnx.NodeProto()
                last.CopyFrom(nodes[-1])
                last.output[0] = free
                nodes[-1:] = [last, helper.make_node(op, [free, constant], [self.output])]
        return Function(self.input, self.output, nodes, constants, self.opset)


def identity(source: str, result: str) -> Function:
    """Return the function that changes nothing but, as a table, the quantization."""
    return Function(source, result, [helper.make_node("Identity", [source], [result])], {}, 13)
