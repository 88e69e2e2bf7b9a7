"""The networks that engines are compared on, built as ONNX with random weights.

Weights are drawn from a Laplace distribution, whose tails are like those of trained weights, scaled
as He et al. do; batch norm is taken as folded into biases. Speed does not depend on the values,
with one exception: logshift's AVX2 kernels leave 16-bit sums the sooner the more large weights
there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


@dataclass(frozen=True)
class Model:
    """A network of the suite; `shape` is that of one input, without the batch."""

    build: Callable[[], onnx.ModelProto]
    shape: tuple[int, int, int]


class Builder:
    """Appends nodes to a graph; tensors are named by strings, shapes tracked for channels only."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.channels = {"input": shape[0]}
        self.shape = shape

    def constant(self, value: np.ndarray) -> str:
        """Add an initializer."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, *inputs: str, channels: int | None = None, **attributes: object) -> str:
        """Add a node of one output; its channels are those of the first input unless given."""
        out = f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [out], name=f"/{out}", **attributes)
        self.nodes.append(node)
        self.channels[out] = channels or self.channels[inputs[0]]
        return out

    def _weights(self, shape: tuple[int, ...], fan_in: int) -> str:
        scale = np.sqrt(2.0 / fan_in) / np.sqrt(2.0)  # a Laplace of scale b has variance 2 b^2
        return self.constant(self.rng.laplace(0, scale, shape).astype(np.float32))

    def conv(
        self,
        x: str,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        group: int = 1,
        dilation: int = 1,
        act: str | None = "relu",
    ) -> str:
        """Convolution of "same" padding with bias, then "relu", "relu6" or nothing."""
        c = self.channels[x]
        w = self._weights((out, c // group, kernel, kernel), c // group * kernel * kernel)
        bias = self.constant((0.1 * self.rng.standard_normal(out)).astype(np.float32))
        pad = dilation * (kernel // 2)
        y = self.op(
            "Conv", x, w, bias, channels=out, kernel_shape=[kernel] * 2, strides=[stride] * 2,
            pads=[pad] * 4, dilations=[dilation] * 2, group=group,
        )  # fmt: skip
        return self.act(y, act)

    def act(self, x: str, act: str | None) -> str:
        """Apply "relu" or "relu6"."""
        if act == "relu":
            return self.op("Relu", x)
        if act == "relu6":
            zero, six = (self.constant(np.array(v, np.float32)) for v in (0, 6))
            return self.op("Clip", x, zero, six)
        return x

    def upsample(self, x: str, factor: int) -> str:
        """Bilinear, half-pixel."""
        scales = self.constant(np.array([1, 1, factor, factor], np.float32))
        return self.op(
            "Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel"
        )

    def classifier(self, x: str, classes: int) -> str:
        """Global average pooling and a fully connected layer."""
        x = self.op("Flatten", self.op("GlobalAveragePool", x))
        w = self._weights((classes, self.channels[x]), self.channels[x])
        bias = self.constant(np.zeros(classes, np.float32))
        return self.op("Gemm", x, w, bias, channels=classes, transB=1)

    def model(self, output: str) -> onnx.ModelProto:
        """Finish the graph; the batch is free."""
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )  # fmt: skip
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def resnet(depths: tuple[int, ...], bottleneck: bool) -> onnx.ModelProto:
    """ResNet for 224x224 pictures."""
    b = Builder((3, 224, 224))
    x = b.conv("input", 64, 7, 2)
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, depth in enumerate(depths):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if stage and not block else 1
            if bottleneck:
                y = b.conv(b.conv(x, width, 1), width, 3, stride)
                y = b.conv(y, out, 1, act=None)
            else:
                y = b.conv(b.conv(x, width, 3, stride), out, 3, act=None)
            if stride > 1 or b.channels[x] != out:
                x = b.conv(x, out, 1, stride, act=None)
            x = b.op("Relu", b.op("Add", y, x))
    return b.model(b.classifier(x, 1000))


def resnet20() -> onnx.ModelProto:
    """ResNet-20 for 32x32 pictures."""
    b = Builder((3, 32, 32))
    x = b.conv("input", 16)
    for stage in range(3):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = b.conv(b.conv(x, 16 << stage, 3, stride), 16 << stage, act=None)
            if stride > 1:
                x = b.conv(x, 16 << stage, 1, stride, act=None)
            x = b.op("Relu", b.op("Add", y, x))
    return b.model(b.classifier(x, 10))


_MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def _inverted(
    b: Builder, x: str, expand: int, out: int, kernel: int, stride: int, rate: int
) -> str:
    c = b.channels[x]
    y = b.conv(x, c * expand, 1, act="relu6") if expand > 1 else x
    y = b.conv(y, c * expand, kernel, stride, group=c * expand, dilation=rate, act="relu6")
    y = b.conv(y, out, 1, act=None)
    return b.op("Add", x, y) if stride == 1 and c == out else y


def _mobilenet_features(b: Builder, output_stride: int) -> tuple[str, str]:
    """Return the last features, and those at a quarter of the size."""
    x = b.conv("input", 32, 3, 2, act="relu6")
    reached, rate, low = 2, 1, x
    for expand, out, repeat, stride in _MOBILENET_V2:
        for block in range(repeat):
            step = stride if block == 0 else 1
            if step == 2 and reached == output_stride:
                rate, step = 2 * rate, 1
            reached *= step
            x = _inverted(b, x, expand, out, 3, step, rate)
        if out == 24:
            low = x
    return x, low


def mobilenet_v2() -> onnx.ModelProto:
    """MobileNetV2 for 224x224 pictures."""
    b = Builder((3, 224, 224))
    x, _ = _mobilenet_features(b, 32)
    return b.model(b.classifier(b.conv(x, 1280, 1, act="relu6"), 1000))


def efficientnet_lite0() -> onnx.ModelProto:
    """EfficientNet-Lite0 for 224x224 pictures."""
    b = Builder((3, 224, 224))
    x = b.conv("input", 32, 3, 2, act="relu6")
    for expand, out, repeat, stride, kernel in (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    ):  # fmt: skip
        for block in range(repeat):
            x = _inverted(b, x, expand, out, kernel, stride if block == 0 else 1, 1)
    return b.model(b.classifier(b.conv(x, 1280, 1, act="relu6"), 1000))


def sid_unet() -> onnx.ModelProto:
    """See-in-the-Dark U-Net: packed Bayer in, twice as high and wide RGB out."""
    b = Builder((4, 512, 512))

    def double(x: str, out: int) -> str:
        for _ in range(2):
            x = b.op("LeakyRelu", b.conv(x, out, act=None), alpha=0.2)
        return x

    x, skips = "input", []
    for out in (32, 64, 128, 256):
        skips.append(double(x, out))
        x = b.op("MaxPool", skips[-1], kernel_shape=[2, 2], strides=[2, 2])
    x = double(x, 512)
    for skip in reversed(skips):
        c = b.channels[skip]
        w = b._weights((b.channels[x], c, 2, 2), b.channels[x])
        up = b.op("ConvTranspose", x, w, channels=c, kernel_shape=[2, 2], strides=[2, 2])
        x = double(b.op("Concat", up, skip, channels=2 * c, axis=1), c)
    x = b.conv(x, 12, 1, act=None)
    return b.model(b.op("DepthToSpace", x, channels=3, blocksize=2, mode="DCR"))


SUITE: dict[str, Model] = {
    "resnet18": Model(partial(resnet, (2, 2, 2, 2), False), (3, 224, 224)),
    "resnet50": Model(partial(resnet, (3, 4, 6, 3), True), (3, 224, 224)),
    "mobilenet_v2": Model(mobilenet_v2, (3, 224, 224)),
    "efficientnet_lite0": Model(efficientnet_lite0, (3, 224, 224)),
    "sid_unet": Model(sid_unet, (4, 512, 512)),
    "resnet20": Model(resnet20, (3, 32, 32)),
}
