"""ResNet for 32x32 pictures: three stages of 16, 32 and 64 channels.

The layout is that of He et al. (2015), section 4.2. Where a stage changes the shape, the shortcut
is either a 1x1 convolution with batch norm, or without parameters: every other pixel, and channels
of zeros. State-dict names follow torchvision (``layer2.0.downsample.0.weight`` and so on).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding 1 and no bias.

    Parameters
    ----------
    channels_in, channels_out : int
        Numbers of channels.
    stride : int
        Step in both directions.

    Returns
    -------
    nn.Conv2d
        The layer.
    """
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class PaddedShortcut(nn.Module):
    """Every other pixel, with as many channels of zeros before and after: no parameters.

    Parameters
    ----------
    added : int
        Channels of zeros, even.
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels + added, height / 2, width / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Parameters
    ----------
    channels_in, channels_out : int
        Numbers of channels.
    stride : int
        Stride of the first convolution and of the shortcut.
    shortcut : {"conv", "pad"}
        What the shortcut is where the shape changes.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, shortcut: str = "conv"
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if (stride != 1 or channels_in != channels_out) and shortcut == "pad":
            self.downsample = PaddedShortcut(channels_out - channels_in)
        elif stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to ``x`` of shape (batch, channels_in, height, width)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class ResNetCifar(nn.Module):
    """ResNet of depth ``6 * blocks + 2`` for 32x32 pictures.

    Parameters
    ----------
    blocks : int
        Residual blocks per stage; 3 makes ResNet-20.
    classes : int
        Number of classes.
    shortcut : {"conv", "pad"}
        What shortcuts are where the shape changes.
    """

    def __init__(self, blocks: int = 3, classes: int = 10, shortcut: str = "conv") -> None:
        super().__init__()
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"shortcut is {shortcut!r}; it must be 'conv' or 'pad'")
        self.shortcut = shortcut
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, channels_in: int, channels_out: int, blocks: int, stride: int
    ) -> nn.Sequential:
        first = BasicBlock(channels_in, channels_out, stride, self.shortcut)
        rest = [BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for ``x`` of shape (batch, 3, 32, 32)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(classes: int = 10, shortcut: str = "conv") -> ResNetCifar:
    """Return an untrained ResNet-20.

    Parameters
    ----------
    classes : int
        Number of classes.
    shortcut : {"conv", "pad"}
        What shortcuts are where the shape changes.

    Returns
    -------
    ResNetCifar
        The network, about 0.27 million parameters.
    """
    return ResNetCifar(blocks=3, classes=classes, shortcut=shortcut)


def resnet56(classes: int = 10, shortcut: str = "conv") -> ResNetCifar:
    """Return an untrained ResNet-56, about 0.85 million parameters; see `ResNetCifar`."""
    return ResNetCifar(blocks=9, classes=classes, shortcut=shortcut)


def resneta(classes: int = 100) -> ResNetCifar:
    """Return ResNetA of the comparison with FLightNN; untrained.

    The paper of STLQ names the networks ResNetA, ResNetB and ResNetC and gives float accuracies
    on CIFAR-100 of 69.15 % for A and 71.20 % for B; their structures are those of FLightNN (Ding
    et al., 2019), whose table of them was not at hand, and no code of it is public. The nearest
    networks with published figures are used: on CIFAR-100 ResNet-20 reaches 69.06 %, ResNet-32
    71.14 % and ResNet-56 72.34 % (Tian et al., "Contrastive Representation Distillation", 2020,
    table 1). That ResNetC is ResNet-56 is a guess, as there is no figure of it to go by.

    Parameters
    ----------
    classes : int

    Returns
    -------
    ResNetCifar
        ResNet-20.
    """
    return ResNetCifar(blocks=3, classes=classes)


def resnetb(classes: int = 100) -> ResNetCifar:
    """Return ResNetB, taken to be ResNet-32; untrained; see `resneta`."""
    return ResNetCifar(blocks=5, classes=classes)


def resnetc(classes: int = 100) -> ResNetCifar:
    """Return ResNetC, taken to be ResNet-56; untrained; see `resneta`."""
    return ResNetCifar(blocks=9, classes=classes)
