"""ShuffleNetV2 (Ma et al., 2018), with torchvision's state-dict names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of the first convolution, the three stages and the last convolution, by width.
_CHANNELS = {
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}
_BLOCKS = (4, 8, 4)  # of each stage


def _conv_bn_relu(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


def _depthwise_bn(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


class ShuffleUnit(nn.Module):
    """Two branches side by side, their channels shuffled.

    Without a stride one branch is the first half of the input as it is, and the other the second
    half, filtered; with a stride both filter the whole input.

    Parameters
    ----------
    channels_in, channels_out : int
        Even; the same without a stride.
    stride : int
        Of the depthwise convolutions.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.halves = stride == 1
        half = channels_out // 2
        self.branch1 = nn.Sequential()
        if not self.halves:
            self.branch1.extend(
                [*_depthwise_bn(channels_in, stride), *_conv_bn_relu(channels_in, half)]
            )
        self.branch2 = nn.Sequential(
            *_conv_bn_relu(half if self.halves else channels_in, half),
            *_depthwise_bn(half, stride),
            *_conv_bn_relu(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit to ``x`` of shape (batch, channels_in, height, width)."""
        if self.halves:
            kept, filtered = x.chunk(2, 1)
            return _shuffled(torch.cat([kept, self.branch2(filtered)], 1))
        return _shuffled(torch.cat([self.branch1(x), self.branch2(x)], 1))


def _shuffled(x: Tensor) -> Tensor:
    """Return the channels of both halves by turns; ONNX has no operator for nn.ChannelShuffle."""
    batch, channels, height, width = x.size()
    pairs = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
    return pairs.contiguous().view(batch, channels, height, width)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2.

    Parameters
    ----------
    classes : int
    width : {0.5, 1.0, 1.5, 2.0}
        Factor of the channels of the stages; those are the ones that were published.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0) -> None:
        super().__init__()
        if width not in _CHANNELS:
            there = ", ".join(map(str, _CHANNELS))
            raise ValueError(f"width is {width}; it must be one of {there}")
        first, *stages, last = _CHANNELS[width]
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, first, 3, 2))
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = first
        for number, (channels_out, count) in enumerate(zip(stages, _BLOCKS, strict=True), start=2):
            units = [ShuffleUnit(channels, channels_out, 2)]
            units += [ShuffleUnit(channels_out, channels_out, 1) for _ in range(count - 1)]
            setattr(self, f"stage{number}", nn.Sequential(*units))
            channels = channels_out
        self.conv5 = nn.Sequential(*_conv_bn_relu(channels, last))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for ``x`` of shape (batch, 3, H, W)."""
        x = self.maxpool(self.conv1(x))
        for number in (2, 3, 4):
            x = self.get_submodule(f"stage{number}")(x)
        return self.fc(torch.flatten(self.avgpool(self.conv5(x)), 1))


def shufflenet_v2(classes: int = 1000, width: float = 1.0) -> ShuffleNetV2:
    """Return an untrained ShuffleNetV2, 2.3 million parameters at width 1; see `ShuffleNetV2`."""
    return ShuffleNetV2(classes, width)
