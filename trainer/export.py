"""From a trained network to ONNX in QDQ form, as `docs/qdq.md` describes it.

Batch norms go into the convolutions before them: into alpha, the signs of W and the bias, so that
the weights in the file lie on the grid exactly.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from logshift.trainer.activations import ActivationQuantizer
from logshift.trainer.quantize import cut, non_zero_ratio, quantizable, remaining, weight_quantizers
from logshift.trainer.stlq import NEGLIGIBLE, exponent_levels
from logshift.trainer.weights import Layout, LogQuantizer, WeightQuantizer

OPSET = 17


class Pair(nn.Module):
    """An activation quantizer in the file: a pair on 8-bit codes, clipped to 2^A of them."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.scale = float(quantizer.positive_scale().detach())
        self.zero_point = int(quantizer.zero_point)
        self.top = int(quantizer.top)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded; float64 as `reference` needs it."""
        if x.dtype == torch.float64:
            code = (x / self.scale).round() + self.zero_point
            return (code.clamp(0, self.top) - self.zero_point) * self.scale
        if self.top < 255:
            low, high = -self.zero_point * self.scale, (self.top - self.zero_point) * self.scale
            x = x.clamp(low, high)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)


def export_onnx(
    network: nn.Module,
    path: Path | str,
    example: Tensor,
    *,
    labels: tuple[str, ...] = (),
    preprocessing: dict[str, Any] | None = None,
) -> None:
    """Write a network as ONNX.

    Parameters
    ----------
    network : nn.Module
        From `prepare`, trained; or a float network.
    path : Path or str
        Where to write.
    example : Tensor of shape (1, C, H, W)
        An input; only the batch size stays free in the file.
    labels : tuple of str
        Class names for the metadata.
    preprocessing : dict, optional
        How a picture becomes the input, for the metadata.
    """
    kept = [] if not isinstance(network, fx.GraphModule) else _kept(network)
    if (left := remaining(network)) > 0:
        warnings.warn(
            f"{left:.1%} of the weights that were not selected still have part of a second word, "
            "which the file has not: it computes something else than the network does. Train longer"
            ", or with a higher regularisation or learning rate of v, and call fade after each step"
            " and cut at the end.",
            stacklevel=2,
        )
    quantizers = [m for m in network.modules() if isinstance(m, ActivationQuantizer)]
    if waiting := sum(not quantizer.ready for quantizer in quantizers):
        warnings.warn(
            f"{waiting} of {len(quantizers)} activation quantizers were never calibrated; these "
            "activations are float32 in the file. Call calibrate before training.",
            stacklevel=2,
        )
    network, grids = deployed(network)
    path = Path(path)
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(partial),
            input_names=["image"],
            output_names=["output"],
            dynamic_axes={"image": {0: "batch"}, "output": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(partial))
    names = {i.name for i in model.graph.initializer}
    for node in model.graph.node:
        # torch.fx calls layers without the modules around them, so that their names lack these.
        if len(node.input) > 1 and node.input[1] in names and node.input[1].endswith(".weight"):
            node.name = f"/{node.input[1].removesuffix('.weight').replace('.', '/')}/{node.op_type}"
    _keep_weights(model.graph)
    metadata: dict[str, Any] = {"weights": {k: v for k, v in grids.items() if k in names}}
    if kept:
        metadata["keep_float"] = [f"{name}.weight" for name in kept]
    if labels:
        metadata["labels"] = list(labels)
    if preprocessing:
        metadata["preprocessing"] = preprocessing
    entry = model.metadata_props.add()
    entry.key, entry.value = "logshift", json.dumps(metadata)
    onnx.save(model, str(partial))
    partial.replace(path)


def _keep_weights(graph: onnx.GraphProto) -> None:
    """Put a Sum of one tensor after layers whose results are rounded.

    It changes nothing, but without it onnxruntime takes a layer between codes for one that int8 was
    forgotten in, and rounds its weights anew; also where what only moves values lies between.
    """
    passing = {"Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Slice"}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def is_rounded(name: str) -> bool:
        return any(
            node.op_type == "QuantizeLinear"
            or (node.op_type in passing and is_rounded(node.output[0]))
            for node in readers.get(name, [])
        )

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and is_rounded(node.output[0]):
            (name,) = node.output
            total = f"{name}/Sum"
            for reader in readers[name]:
                for i, read in enumerate(reader.input):
                    reader.input[i] = total if read == name else read
            nodes.append(onnx.helper.make_node("Sum", [name], [total], f"{node.name}/Sum"))
    del graph.node[:]
    graph.node.extend(nodes)


def deployed(network: nn.Module) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Return the network as it is written, and the grids by name of the weight.

    Parameters
    ----------
    network : nn.Module
        As for `export_onnx`.

    Returns
    -------
    network : nn.Module
        Without parametrizations, with batch norms folded and a `Pair` for each quantizer.
    grids : dict of str to dict
        What the metadata hold of each weight.
    """
    network = copy.deepcopy(network).cpu().eval()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if not isinstance(network, fx.GraphModule):
        return network, {}
    cut(network)
    grids = _fold(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, ActivationQuantizer):
            parent, _, attribute = name.rpartition(".")
            pair = Pair(module) if module.ready else nn.Identity()
            setattr(network.get_submodule(parent), attribute, pair)
    return network, grids


def grid(layer: Any) -> tuple[Tensor, Tensor]:
    """Return integers W and alpha of a layer with a `LogQuantizer`.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
        From `weight_quantizers`.

    Returns
    -------
    W : int32 Tensor of shape (O, K)
        K runs over kh, kw, C / group.
    alpha : float32 Tensor of shape (O,)
        Positive.
    """
    quantizer = layer.parametrizations["weight"][0]
    assert isinstance(quantizer, LogQuantizer)
    with torch.no_grad():
        rows = quantizer.layout.rows(layer.weight).double()
        alpha = quantizer.magnitude()
        integers = torch.round(rows / (alpha.double() / _scale(quantizer))).int()
    return integers, alpha.flatten()


def _scale(quantizer: LogQuantizer) -> float:
    """Return 2^(L-1+s)."""
    return 2.0 ** (exponent_levels(quantizer.bits) - 1 + quantizer.words.shift)


@torch.no_grad()
def _fold(network: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """Make weights plain and fold batch norms; returns the grids by name of the weight."""
    grids: dict[str, dict[str, Any]] = {}
    after = _norms(network)
    quantizers = {name: quantizer for name, _, quantizer in weight_quantizers(network)}
    for name in quantizable(network):
        layer: Any = network.get_submodule(name)
        quantizer = quantizers.get(name)
        layout = Layout(layer)
        if isinstance(quantizer, LogQuantizer):
            integers, alpha = grid(layer)
            integers, alpha = integers.double(), alpha.double()[:, None]
        else:
            integers = layout.rows(layer.weight).double()
            alpha = torch.ones(len(integers), 1, dtype=torch.float64)
        bias = None if layer.bias is None else layer.bias.double()
        if name in after:
            norm: Any = network.get_submodule(after[name])
            gain, offset = norm.weight, norm.bias
            if gain is None:  # not affine
                gain, offset = torch.ones(len(alpha)), torch.zeros(len(alpha))
            factor = (gain.double() / (norm.running_var.double() + norm.eps).sqrt())[:, None]
            integers = integers * factor.sign()
            alpha = alpha * factor.abs()
            shifted = (0.0 if bias is None else bias) - norm.running_mean.double()
            bias = shifted * factor[:, 0] + offset.double()
            _remove(network, after[name])
        negligible = alpha < NEGLIGIBLE
        integers = torch.where(negligible, 0.0, integers)
        alpha = torch.where(negligible, 1.0, alpha).float()
        if isinstance(quantizer, LogQuantizer):
            words, unit = quantizer.words, alpha.double() / _scale(quantizer)
            grids[f"{name}.weight"] = {
                "bits": words.bits,
                "residual_shift": words.shift,
                "clip": words.clip,
                "alpha": [float(a) for a in alpha.flatten()],
                "granularity": words.granularity,
            }
            if words.array_tile is not None:
                grids[f"{name}.weight"]["tile"] = list(words.array_tile)
        else:
            unit = alpha.double()
        plain = _plain(layer, layout.weight((integers * unit).float()), bias)
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, plain)
    network.recompile()
    return grids


def _kept(network: fx.GraphModule) -> list[str]:
    """Return the layers whose weights stay float, of a network that has quantized ones."""
    quantized = {name for name, _, _ in weight_quantizers(network)}
    return [name for name in quantizable(network) if name not in quantized] if quantized else []


def _plain(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer without parametrization: removing it would remove it from the original too."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    names = "in_features out_features".split()
    if kind is not nn.Linear:
        names = "in_channels out_channels kernel_size stride padding dilation groups".split()
        names += ["padding_mode"] + ["output_padding"] * (kind is nn.ConvTranspose2d)
    plain = kind(**{name: getattr(layer, name) for name in names}, bias=bias is not None)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain


def _norms(network: fx.GraphModule) -> dict[str, str]:
    """Return the batch norm right after each layer, where nothing else reads between them."""
    calls: dict[str, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    found = {}
    for node in network.graph.nodes:
        if node.op != "call_module" or len(node.users) != 1 or calls[node.target] > 1:
            continue
        user = next(iter(node.users))
        if user.op == "call_module" and calls[user.target] == 1:
            if isinstance(network.get_submodule(user.target), nn.BatchNorm2d):
                found[node.target] = user.target
    return found


def _remove(network: fx.GraphModule, name: str) -> None:
    for node in list(network.graph.nodes):
        if node.op == "call_module" and node.target == name:
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


def stored_bits(quantizer: WeightQuantizer) -> float:
    """Return bits per weight of a layer as a packed file stores it (`docs/quantization.md` 5).

    Positions take the fewer of 8 bits for each second word and one bit for each weight; or one bit
    for each tile, with words for all weights of the tiles that are selected.
    """
    channels, size = len(quantizer.magnitude()), quantizer.layout.shape.numel()
    nzr = float(quantizer.second_words) / size
    words = nzr * quantizer.bits + min(8 * nzr, 1.0)
    if isinstance(quantizer, LogQuantizer) and quantizer.words.array_tile is not None:
        inside = float(quantizer.blocks.spread(quantizer.share() != 0).sum())
        words = min(words, (inside * quantizer.bits + quantizer.selected.numel()) / size)
    return quantizer.bits + words + 32 * channels / size


@torch.no_grad()
def report(network: nn.Module) -> dict[str, Any]:
    """Return what quantization came to: NZR, bits per weight, and both for each layer.

    Parameters
    ----------
    network : nn.Module
        A network from `prepare`, or a float one, for which there is nothing to say.
    """
    layers = {}
    bits = size = 0.0
    for name, layer, quantizer in weight_quantizers(network):
        quantizer(layer.parametrizations["weight"].original)
        weights = quantizer.layout.shape.numel()
        stored = stored_bits(quantizer)
        bits, size = bits + stored * weights, size + weights
        layers[name] = {
            "weights": weights,
            "nzr": float(quantizer.second_words) / weights,
            "bits_per_weight": round(stored, 3),
        }
    if not layers:
        return {}
    return {
        "nzr": non_zero_ratio(network),
        "bits_per_weight": round(bits / size, 3),
        "layers": layers,
    }
