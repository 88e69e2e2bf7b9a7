"""ResNet for ImageNet (He et al., 2015), with torchvision's state-dict names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logshift.trainer.models.resnet_cifar import BasicBlock


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is the 3x3's.

    Parameters
    ----------
    channels_in, channels : int
        Channels of the input and of the 3x3 convolution; the output has four times as many.
    stride, dilation : int
    """

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(
            channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != 4 * channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * channels, 1, stride, bias=False),
                nn.BatchNorm2d(4 * channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` of shape (batch, channels_in, height, width)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNet(nn.Module):
    """ResNet for pictures of about 224x224.

    Parameters
    ----------
    block : type
        `BasicBlock` or `Bottleneck`.
    blocks : list of int
        Blocks of each of the four stages.
    classes : int
    output_stride : int
        32; or with `Bottleneck` 16 or 8: later strides become dilations, for segmentation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: list[int],
        classes: int = 1000,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, reached, dilation = 64, 4, 1
        for stage, count in enumerate(blocks):
            width, layers = 64 * 2**stage, nn.Sequential()
            for number in range(count):
                stride = 2 if number == 0 and stage > 0 else 1
                used = dilation
                if stride == 2 and reached == output_stride:
                    # This block still sees the undilated input.
                    stride, dilation = 1, 2 * dilation
                reached *= stride
                if block is Bottleneck:
                    layers.append(Bottleneck(channels, width, stride, used))
                    channels = 4 * width
                else:
                    layers.append(BasicBlock(channels, width, stride))
                    channels = width
            setattr(self, f"layer{stage + 1}", layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of the first and the last stage, for segmentation."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = [self.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)]
        low = x = stages[0](x)
        for stage in stages[1:]:
            x = stage(x)
        return low, x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for ``x`` of shape (batch, 3, H, W)."""
        _, x = self.features(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(classes: int = 1000) -> ResNet:
    """Return an untrained ResNet-18, 11.7 million parameters."""
    return ResNet(BasicBlock, [2, 2, 2, 2], classes)


def resnet34(classes: int = 1000) -> ResNet:
    """Return an untrained ResNet-34, 21.8 million parameters."""
    return ResNet(BasicBlock, [3, 4, 6, 3], classes)


def resnet50(classes: int = 1000, output_stride: int = 32) -> ResNet:
    """Return an untrained ResNet-50, 25.6 million parameters; see `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], classes, output_stride)


def resnet101(classes: int = 1000, output_stride: int = 32) -> ResNet:
    """Return an untrained ResNet-101, 44.5 million parameters; see `ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], classes, output_stride)
