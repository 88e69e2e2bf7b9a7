"""DeepLabV3+ (Chen et al., 2018): atrous separable convolutions and a decoder over a backbone.

Tensors of the backbone are named as torchvision names them, those of DRN as fyu/drn does, after
`backbone.`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logshift.trainer.models.drn import drn_d_54
from logshift.trainer.models.mobilenet_v2 import LOW_LEVEL, mobilenet_v2
from logshift.trainer.models.resnet import ResNet, resnet50, resnet101

# Dilations of the pyramid's 3x3 branches by output stride.
_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}


def conv_bn_relu(channels_in: int, channels_out: int, kernel: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU that keep the size."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def separable(channels_in: int, channels_out: int, dilation: int = 1) -> nn.Sequential:
    """Return a dilated 3x3 depthwise and a 1x1 convolution, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(
        channels_in, channels_in, 3, padding=dilation, dilation=dilation, groups=channels_in,
        bias=False,
    )  # fmt: skip
    return nn.Sequential(
        depthwise,
        nn.BatchNorm2d(channels_in),
        nn.ReLU(inplace=True),
        *conv_bn_relu(channels_in, channels_out),
    )


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling.

    Parameters
    ----------
    channels_in, channels_out : int
    rates : tuple of int
        Dilations of the 3x3 branches.
    """

    def __init__(self, channels_in: int, channels_out: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.one = conv_bn_relu(channels_in, channels_out)
        self.atrous = nn.ModuleList(separable(channels_in, channels_out, r) for r in rates)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(channels_in, channels_out))
        self.project = conv_bn_relu((2 + len(rates)) * channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels_out, height, width)."""
        # One value a channel: nearest repeats it, as bilinear would.
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="nearest")
        branches = [self.one(x), *(branch(x) for branch in self.atrous), pooled]
        return self.project(torch.cat(branches, 1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+.

    Parameters
    ----------
    backbone : nn.Module
        A dilated `MobileNetV2` or `ResNet`, or `Drn`; its classifier is not used and removed.
    channels_low, channels_high : int
        Channels of its features of stride 4 and of `output_stride`.
    classes : int
    width : int
        Channels of the pyramid and the decoder.
    output_stride : int
        16 or 8, that of the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels_low: int,
        channels_high: int,
        classes: int,
        width: int,
        output_stride: int,
    ) -> None:
        super().__init__()
        if output_stride not in _RATES:
            raise ValueError(f"output_stride is {output_stride}; it must be 8 or 16")
        self.backbone = backbone
        self.aspp = Aspp(channels_high, width, _RATES[output_stride])
        self.low = conv_bn_relu(channels_low, 48)
        self.decoder = nn.Sequential(separable(width + 48, width), separable(width, width))
        self.classifier = nn.Conv2d(width, classes, 1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backbone's features of stride 4 and of the output stride."""
        backbone: Any = self.backbone
        return backbone.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes, H, W) for ``x`` of shape (batch, 3, H, W)."""
        low, high = self.features(x)
        high = F.interpolate(
            self.aspp(high), size=low.shape[-2:], mode="bilinear", align_corners=False
        )
        logits = self.classifier(self.decoder(torch.cat([high, self.low(low)], 1)))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class _OverMobileNet(DeepLabV3Plus):
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = list(self.backbone.get_submodule("features").children())
        for block in blocks[:LOW_LEVEL]:
            x = block(x)
        low = x
        for block in blocks[LOW_LEVEL:]:
            x = block(x)
        return low, x


def deeplab_mobilenet_v2(
    classes: int = 21, width: int = 256, output_stride: int = 16
) -> DeepLabV3Plus:
    """Return DeepLabV3+ over MobileNetV2, without its last convolution; untrained."""
    backbone = mobilenet_v2(output_stride=output_stride)
    del backbone.features[-1], backbone.classifier, backbone.avgpool
    return _OverMobileNet(backbone, 24, 320, classes, width, output_stride)


def deeplab_resnet50(classes: int = 21, width: int = 256, output_stride: int = 16) -> DeepLabV3Plus:
    """Return DeepLabV3+ over ResNet-50; untrained."""
    return _over_resnet(resnet50(output_stride=output_stride), classes, width, output_stride)


def deeplab_resnet101(
    classes: int = 21, width: int = 256, output_stride: int = 16
) -> DeepLabV3Plus:
    """Return DeepLabV3+ over ResNet-101; untrained."""
    return _over_resnet(resnet101(output_stride=output_stride), classes, width, output_stride)


def deeplab_drn(classes: int = 21, width: int = 256) -> DeepLabV3Plus:
    """Return DeepLabV3+ over DRN-D-54, of output stride 8; untrained.

    The paper says no more than "DRN". DRN-D-54 is the one of jfzhang95/pytorch-deeplab-xception,
    which has all three backbones of the paper and much the same mIoUs: 78.43 % with ResNet-101,
    70.81 % with MobileNetV2 and 78.87 % with DRN, in the paper 78.37, 71.24 and 79.16 %.
    """
    backbone = drn_d_54()
    del backbone.fc, backbone.avgpool
    return DeepLabV3Plus(backbone, 256, 512, classes, width, 8)


def _over_resnet(backbone: ResNet, classes: int, width: int, output_stride: int) -> DeepLabV3Plus:
    del backbone.fc, backbone.avgpool
    return DeepLabV3Plus(backbone, 256, 2048, classes, width, output_stride)
