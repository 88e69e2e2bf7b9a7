"""MobileNetV2 (Sandler et al., 2018), with torchvision's state-dict names."""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, channels, blocks, stride of each group of blocks.
_GROUPS = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
]  # fmt: skip
LOW_LEVEL = 4  # features of stride 4 and 24 channels end before this block


def conv_bn_relu6(
    channels_in: int, channels_out: int, kernel: int, stride: int, groups: int, dilation: int = 1
) -> nn.Sequential:
    """Return convolution, batch norm and ReLU6 that keep the size but for the stride."""
    pad = dilation * (kernel - 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, pad, dilation, groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by channel, project by 1x1; a shortcut where shapes agree.

    Parameters
    ----------
    channels_in, channels_out : int
    expansion : int
        Channels in the middle over `channels_in`.
    stride, dilation : int
        Of the depthwise convolution.
    """

    def __init__(
        self, channels_in: int, channels_out: int, expansion: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        self.shortcut = stride == 1 and channels_in == channels_out
        middle = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn_relu6(channels_in, middle, 1, 1, 1))
        layers += [
            conv_bn_relu6(middle, middle, 3, stride, middle, dilation),
            nn.Conv2d(middle, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` of shape (batch, channels_in, height, width)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.

    Parameters
    ----------
    classes : int
    output_stride : int
        32; or 16 or 8: later strides become dilations, for segmentation.
    stem_stride : int
        Of the first convolution: 2; or 1 for pictures as small as those of CIFAR.
    """

    def __init__(self, classes: int = 1000, output_stride: int = 32, stem_stride: int = 2) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is {stem_stride}; it must be 1 or 2")
        blocks: list[nn.Module] = [conv_bn_relu6(3, 32, 3, stem_stride, 1)]
        channels, reached, dilation = 32, stem_stride, 1
        for expansion, channels_out, count, group_stride in _GROUPS:
            for number in range(count):
                stride = group_stride if number == 0 else 1
                used = dilation
                if stride == 2 and reached == output_stride:
                    # This block still sees the undilated input.
                    stride, dilation = 1, 2 * dilation
                reached *= stride
                blocks.append(InvertedResidual(channels, channels_out, expansion, stride, used))
                channels = channels_out
        blocks.append(conv_bn_relu6(channels, 1280, 1, 1, 1))
        self.features = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for ``x`` of shape (batch, 3, H, W)."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v2(classes: int = 1000, output_stride: int = 32, stem_stride: int = 2) -> MobileNetV2:
    """Return an untrained MobileNetV2, 3.5 million parameters; see `MobileNetV2`."""
    return MobileNetV2(classes, output_stride, stem_stride)
