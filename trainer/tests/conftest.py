"""What several tests use: a small data set in memory and a small network."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from logshift.trainer.data.base import DataSet, order
from logshift.trainer.quantize import calibrate, cut

# The command prints the same wherever the tests run; some CIs ask for colours.
for _name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)


class Blobs(DataSet):
    """Pictures 8x8 whose class is the quadrant that is bright."""

    labels = ("a", "b", "c", "d")
    shape = (3, 8, 8)
    size = 64

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(96, 3, 8, 8, generator=random)
        self.target = torch.arange(96) % 4
        for i, k in enumerate(self.target.tolist()):
            self.x[i, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1.5

    def train(self, epoch, batch, seed, rank=0, ranks=1, start=0):
        indices = order(self.size, epoch, seed)
        for step in range(start, self.steps(batch)):
            pick = indices[step * batch : (step + 1) * batch][rank::ranks]
            yield self.x[pick], self.target[pick]

    def test(self, batch, rank=0, ranks=1):
        x, target = self.x[64 + rank :: ranks], self.target[64 + rank :: ranks]
        yield from zip(x.split(batch), target.split(batch), strict=True)

    def calibration(self, count):
        return self.x[:count]


def small(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, classes),
    )


def trained_looking(network, shape):
    """Give batch norms statistics, signs and zeros that training might give them."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
            if not module.affine:
                continue
            size = module.weight.shape
            with torch.no_grad():
                sign = torch.randn(size, generator=random).sign()
                module.weight.copy_(sign * (0.5 + torch.rand(size, generator=random)))
                module.weight[0] = 0
                module.bias.copy_(torch.randn(size, generator=random) * 0.3)
    x = torch.randn(4, *shape, generator=random)
    network.train()
    for _ in range(5):
        network(x)
    calibrate(network, [x])
    cut(network)
    return network.eval()


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def models(monkeypatch):
    """Make the small network a model that settings can name."""
    from logshift.trainer import fit

    monkeypatch.setattr(fit, "MODELS", {"small": small})
