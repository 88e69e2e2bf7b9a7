"""The demo's float network: that of docs/training.md, its shortcuts made convolutions.

    python -m benchmarks.demo_network --data DIRECTORY --weights runs/cifar10-float/checkpoint.pt \
        --out demo.pt --onnx converter/demo/resnet20-cifar10.onnx

Where the shape changes, that network takes every other pixel and adds channels of zeros, which are
four operators in a file. A 1x1 convolution of ones and zeros does the same, and can be trained
further. Its batch norm gets the mean and variance that its outputs have over training pictures, and
the factor and bias with which it changes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from logshift.trainer.data.cifar10 import Cifar10
from logshift.trainer.export import export_onnx
from logshift.trainer.models import MODELS

PICTURES = 2000


@torch.no_grad()
def with_convolutions(padded: nn.Module, x: Tensor) -> nn.Module:
    """Return the network with convolutions for shortcuts, in `eval` mode.

    Parameters
    ----------
    padded : nn.Module
        `resnet20_cifar` with `shortcut="pad"`, trained.
    x : Tensor of shape (N, 3, 32, 32)
        Inputs that statistics are of.
    """
    network = MODELS["resnet20_cifar"](shortcut="conv").eval()
    network.load_state_dict(padded.state_dict(), strict=False)
    for stage in (network.layer2, network.layer3):
        block = stage[0]
        convolution, norm = block.downsample
        channels = convolution.in_channels
        before = (convolution.out_channels - channels) // 2
        convolution.weight.zero_()
        convolution.weight[before : before + channels, :, 0, 0] = torch.eye(channels)
        outputs: list[Tensor] = []
        hook = convolution.register_forward_hook(lambda _, __, y, to=outputs: to.append(y.double()))
        network(x)
        hook.remove()
        norm.running_mean.copy_(outputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(outputs[0].var((0, 2, 3)))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
    return network


def main() -> None:
    """Write the network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of the network")
    parser.add_argument("--out", type=Path, required=True, help="to train further")
    parser.add_argument("--onnx", type=Path, required=True)
    options = parser.parse_args()
    padded = MODELS["resnet20_cifar"](shortcut="pad")
    padded.load_state_dict(torch.load(options.weights, weights_only=True)["network"])
    data = Cifar10(options.data)
    network = with_convolutions(padded.eval(), data.calibration(PICTURES))
    torch.save(network.state_dict(), options.out)
    export_onnx(
        network, options.onnx, torch.zeros(1, *data.shape),
        labels=data.labels, preprocessing=data.preprocessing,
    )  # fmt: skip


if __name__ == "__main__":
    main()
