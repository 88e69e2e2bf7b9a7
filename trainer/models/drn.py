"""Dilated residual networks (Yu, Koltun, Funkhouser, 2017), with the names of fyu/drn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logshift.trainer.models.resnet import Bottleneck

# Channels, blocks, stride, dilation of the stages of residual blocks, layer3 to layer6.
_STAGES = [(64, 3, 2, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)]


def _conv_bn_relu(
    channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    pad = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, pad, dilation, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Drn(nn.Module):
    """DRN-D-54: bottlenecks of ResNet-50 at stride 8, with plain convolutions around them.

    Parameters
    ----------
    classes : int
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.layer0 = _conv_bn_relu(3, 16, kernel=7)
        self.layer1 = _conv_bn_relu(16, 16)
        self.layer2 = _conv_bn_relu(16, 32, stride=2)
        channels = 32
        for number, (width, count, stride, dilation) in enumerate(_STAGES, start=3):
            blocks = nn.Sequential()
            for block in range(count):
                blocks.append(Bottleneck(channels, width, stride if block == 0 else 1, dilation))
                channels = Bottleneck.expansion * width
            setattr(self, f"layer{number}", blocks)
        self.layer7 = _conv_bn_relu(channels, 512, dilation=2)
        self.layer8 = _conv_bn_relu(512, 512)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(512, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return 256 channels of stride 4 and 512 of stride 8, for segmentation."""
        layers = [self.get_submodule(f"layer{number}") for number in range(9)]
        for layer in layers[:4]:
            x = layer(x)
        low = x
        for layer in layers[4:]:
            x = layer(x)
        return low, x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for ``x`` of shape (batch, 3, H, W)."""
        _, x = self.features(x)
        return torch.flatten(self.fc(self.avgpool(x)), 1)


def drn_d_54(classes: int = 1000) -> Drn:
    """Return an untrained DRN-D-54, 35.8 million parameters."""
    return Drn(classes)
