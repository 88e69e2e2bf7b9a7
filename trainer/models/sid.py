"""The U-Net of See-in-the-Dark (Chen et al., 2018): raw Bayer planes in, a picture out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SidUNet(nn.Module):
    """Five levels of two 3x3 convolutions and LeakyReLU each, down and up again.

    Parameters
    ----------
    width : int
        Channels of the first level; each further one has twice as many. 32 in the paper.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = 4
        for level in range(5):
            wider = width * 2**level
            self._pair(level + 1, channels, wider)
            channels = wider
        for level in range(4):
            narrower = channels // 2
            up = nn.ConvTranspose2d(channels, narrower, 2, 2)
            setattr(self, f"upv{level + 6}", up)
            self._pair(level + 6, channels, narrower)
            channels = narrower
        self.conv10_1 = nn.Conv2d(channels, 12, 1)

    def _pair(self, number: int, channels_in: int, channels_out: int) -> None:
        setattr(self, f"conv{number}_1", nn.Conv2d(channels_in, channels_out, 3, padding=1))
        setattr(self, f"conv{number}_2", nn.Conv2d(channels_out, channels_out, 3, padding=1))

    def _level(self, number: int, x: Tensor) -> Tensor:
        for part in (1, 2):
            x = F.leaky_relu(getattr(self, f"conv{number}_{part}")(x), 0.2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures (batch, 3, 2 * H, 2 * W) for ``x`` (batch, 4, H, W), H and W / 16."""
        skipped = []
        for number in range(1, 5):
            x = self._level(number, x)
            skipped.append(x)
            x = F.max_pool2d(x, 2)
        x = self._level(5, x)
        for number in range(6, 10):
            x = torch.cat([getattr(self, f"upv{number}")(x), skipped.pop()], 1)
            x = self._level(number, x)
        return F.pixel_shuffle(self.conv10_1(x), 2)


def sid_unet(width: int = 32) -> SidUNet:
    """Return an untrained See-in-the-Dark U-Net, 7.8 million parameters at width 32."""
    return SidUNet(width)
