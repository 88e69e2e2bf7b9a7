"""The demo's float network as one that can be trained further: batch norms put back.

    python -m benchmarks.demo_network --data DIRECTORY --out demo.pt

Batch norms were folded when it was exported. Each gets the mean and variance that its convolution's
outputs have over training pictures, and the factor and bias with which it changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from logshift.trainer.data.cifar10 import Cifar10
from logshift.trainer.models import MODELS

DEMO = Path(__file__).parents[1] / "converter" / "demo" / "resnet20-cifar10.onnx"
PICTURES = 2000
NORMS = {"conv1": "bn1", "conv2": "bn2", "0": "1"}  # of layers; the last in shortcuts


@torch.no_grad()
def unfolded(model: onnx.ModelProto, network: nn.Module, x: Tensor) -> None:
    """Give a network the weights of its ONNX file.

    Parameters
    ----------
    model : ModelProto
        Nodes have the names of the modules, as exported.
    network : nn.Module
        The same with a batch norm after each convolution, as yet untrained.
    x : Tensor of shape (N, C, H, W)
        Inputs that statistics are of.
    """
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    pairs: list[tuple[Any, Any]] = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight, bias = (torch.from_numpy(constants[name].copy()) for name in node.input[1:])
        # /layer1/layer1.0/conv1/Conv is layer1.0.conv1, /layer2/layer2.0/downsample/downsample.0
        # is layer2.0.downsample.0.
        parts = node.name.strip("/").split("/")[:-1]
        kept = [p for p, after in zip(parts, [*parts[1:], ""], strict=True) if p not in after]
        layer: Any = network.get_submodule(".".join(kept))
        layer.weight.copy_(weight)
        if node.op_type == "Gemm":
            layer.bias.copy_(bias)
            continue
        *path, last = ".".join(kept).split(".")
        norm: Any = network.get_submodule(".".join([*path, NORMS[last]]))
        norm.running_var.fill_(1 - norm.eps)
        norm.bias.copy_(bias)
        pairs.append((layer, norm))
    found: dict[Any, Tensor] = {}

    def look(norm: Any) -> Callable[..., None]:
        def hook(_layer: Any, _x: Any, y: Tensor) -> None:
            found[norm] = y.double()

        return hook

    hooks = [layer.register_forward_hook(look(norm)) for layer, norm in pairs]
    network.eval()(x)
    for hook in hooks:
        hook.remove()
    for norm, y in found.items():
        norm.running_mean.copy_(y.mean((0, 2, 3)))
        norm.running_var.copy_(y.var((0, 2, 3)))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.add_(norm.running_mean)


def main() -> None:
    """Write the network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    network = MODELS["resnet20_cifar"]()
    unfolded(onnx.load(DEMO), network, Cifar10(options.data).calibration(PICTURES))
    torch.save(network.state_dict(), options.out)


if __name__ == "__main__":
    main()
