"""A network of the suite in PyTorch, from its ONNX file: the operators that the suite uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch.nn import functional


class Network(torch.nn.Module):
    """Walks the nodes of an ONNX graph; initializers are its buffers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.nodes = [
            (_OPERATORS[n.op_type], list(n.input), n.output[0], _attributes(n))
            for n in model.graph.node
        ]
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.settings: dict[str, Any] = {"": None}  # inputs that are plain numbers here
        scales = {n.input[2] for n in model.graph.node if n.op_type == "Resize"}
        for constant in model.graph.initializer:
            value = numpy_helper.to_array(constant)
            if value.ndim == 0 or constant.name in scales:
                self.settings[constant.name] = value.tolist()
            else:
                self.register_buffer(constant.name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run all nodes in order."""
        values = self.settings | dict(self.named_buffers()) | {self.input: x}
        for operator, inputs, output, attributes in self.nodes:
            values[output] = operator(attributes, *(values[name] for name in inputs))
        return values[self.output]


def frozen(network: Network, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Trace, freeze and optimise: activations join convolutions, oneDNN lays out the weights.

    Measured on AVX2, channels last is no faster after that.
    """
    with warnings.catch_warnings():  # sizes become constants, as they should
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, example)
    return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def compiled(network: Network, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile with the weights as constants, which lets oneDNN lay them out; needs a C++ compiler.

    Measured on AVX2, channels last is no faster.
    """
    from torch._inductor import config

    config.freezing = True
    program = torch.compile(network, dynamic=False)
    program(example)
    return program


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _padded(x: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Pad a tensor whose pads differ from side to side; returns it and what is left to pad."""
    if pads[:2] == pads[2:]:
        return x, pads[:2]
    top, left, bottom, right = pads
    return functional.pad(x, (left, right, top, bottom)), [0, 0]


def _conv(a: dict, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, pads = _padded(x, a["pads"])
    return functional.conv2d(x, w, b, a["strides"], pads, a["dilations"], a["group"])


def _max_pool(a: dict, x: torch.Tensor) -> torch.Tensor:
    pads = a.get("pads", [0] * 4)
    assert pads[:2] == pads[2:]
    return functional.max_pool2d(x, a["kernel_shape"], a["strides"], pads[:2])


def _gemm(a: dict, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a["transB"]
    return functional.linear(x, w, b)


def _resize(a: dict, x: torch.Tensor, roi: None, scales: list[float]) -> torch.Tensor:
    assert a["coordinate_transformation_mode"] == b"align_corners"
    height, width = (int(n * s) for n, s in zip(x.shape[2:], scales[2:], strict=True))
    return functional.interpolate(x, (height, width), mode="bilinear", align_corners=True)


def _depth_to_space(a: dict, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    r = a["blocksize"]  # mode DCR: pixel_shuffle's order is that of CRD
    x = x.view(n, r, r, c // r**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // r**2, h * r, w * r)


_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "Conv": _conv,
    "ConvTranspose": lambda a, x, w: functional.conv_transpose2d(x, w, stride=a["strides"]),
    "Relu": lambda a, x: functional.relu(x),
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a["alpha"]),
    "Clip": lambda a, x, low, high: functional.hardtanh(x, low, high),
    "Add": lambda a, x, y: x + y,
    "MaxPool": _max_pool,
    "GlobalAveragePool": lambda a, x: functional.adaptive_avg_pool2d(x, 1),
    "Flatten": lambda a, x: torch.flatten(x, 1),
    "Gemm": _gemm,
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
}
