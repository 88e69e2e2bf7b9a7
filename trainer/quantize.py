"""From a float network to one that is trained with quantized weights and activations.

The network is traced with `torch.fx`. Weights of Conv2d, ConvTranspose2d and Linear get a
parametrization; activations are rounded where the runtime holds codes:

- after a convolution with what is fused to it, BatchNorm, Add and ReLU, and after any other
  operator with a kernel on codes (pools, Add, Mul, pointwise functions);
- operators that only move values (Flatten, Concat, MaxPool ...) are not rounded, and all tensors
  that are joined by them share one quantizer;
- the outputs of the network are not rounded, unless pixels are moved on the way (Resize,
  PixelShuffle ...): the runtime does that on codes, which have at least 8 bits here.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from logshift.trainer import stlq
from logshift.trainer.activations import ActivationQuantizer
from logshift.trainer.config import Config, LayerConfig
from logshift.trainer.weights import (
    LAYERS,
    FadingQuantizer,
    Layer,
    Layout,
    LevelQuantizer,
    LogQuantizer,
    PenaltyQuantizer,
    WeightQuantizer,
    Words,
    apot_levels,
    uniform_levels,
)

QUANTIZERS = "activation_quantizers"


class PrepareError(ValueError):
    """A network that cannot be prepared as it was asked for."""


NORMS = (nn.BatchNorm2d,)
_DROPOUTS: dict[Any, Any] = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}
RELUS = {nn.ReLU, nn.ReLU6, nn.Hardtanh, F.relu, F.relu6, F.hardtanh, torch.relu, torch.clamp}
RELUS |= {"relu", "relu_", "clamp"}
ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
POINTS = {  # one rounding after each
    *(operator.mul, operator.sub, torch.mul, torch.sub, "mul", "sub", "mean", torch.mean),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU),
    *(F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.silu, torch.sigmoid, torch.tanh),
    *("sigmoid", "tanh"),
}
RESHAPES = {  # those of the moves that leave every value in its place in memory
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, torch.flatten, torch.reshape),
    *(torch.squeeze, torch.unsqueeze, "flatten", "reshape", "view", "squeeze", "unsqueeze"),
    "contiguous",
}
MOVES = RESHAPES | {
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d),
    *(nn.ChannelShuffle, F.max_pool2d, F.adaptive_max_pool2d, F.pixel_shuffle, F.pixel_unshuffle),
    *(F.pad, torch.permute, torch.transpose, torch.cat, torch.concat, torch.chunk, torch.split),
    *(operator.getitem, "permute", "transpose", "chunk", "split"),
}
RESIZES = {nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, F.interpolate}
SHAPES = {getattr, "size", "dim"}  # what follows is no activation


def prepare(model: nn.Module, config: Config = Config()) -> fx.GraphModule:  # noqa: B008 (frozen)
    """Return a copy of the network with quantizers in it.

    Activations pass unchanged until `calibrate` has seen some inputs.

    Parameters
    ----------
    model : nn.Module
        A float network that `torch.fx.symbolic_trace` can trace.
    config : Config
        How to quantize.

    Returns
    -------
    fx.GraphModule
        With the state-dict names of `model`; a quantized weight is found as
        `<layer>.parametrizations.weight.original`.

    Raises
    ------
    PrepareError
        If the network cannot be traced, has no layer to quantize, or a pattern of `config.layers`
        matches none.
    """
    try:
        network = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:
        raise PrepareError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error}; its forward must not "
            "branch on values or shapes of tensors (torch.fx.wrap keeps a function whole)"
        ) from error
    _check_norms(network)
    _dropouts(network)
    layers = quantizable(network)
    if not layers:
        raise PrepareError(
            f"{type(model).__name__} has no Conv2d, ConvTranspose2d or Linear called as a module"
        )
    _match_patterns(config, layers)
    kept = set()
    for number, name in enumerate(layers):
        special = config.of_layer(name, number, len(layers))
        if special.keep_float:
            kept.add(name)
        else:
            layer: Any = network.get_submodule(name)
            quantizer = _weight_quantizer(layer, config, special)
            parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    if len(kept) == len(layers):
        raise PrepareError(f"keep_float leaves no layer to quantize of {', '.join(layers)}")
    if config.activation_bits != 32:
        Placement(network, config, kept).insert()
        network.recompile()
    return network


def calibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set scales and zero points of all activation quantizers from what they see.

    Parameters
    ----------
    network : nn.Module
        From `prepare`.
    batches : iterable of Tensor
        Inputs, as in training.
    """
    quantizers = [m for m in network.modules() if isinstance(m, ActivationQuantizer)]
    training = network.training
    network.eval()
    for quantizer in quantizers:
        quantizer.observe()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for quantizer in track(quantizers, "calibrating", transient=True):
        quantizer.calibrate()
    network.train(training)


def refresh(network: nn.Module) -> None:
    """Choose anew, in all layers of method "residual_penalty", which weights have second words."""
    for _, layer, quantizer in weight_quantizers(network):
        if isinstance(quantizer, PenaltyQuantizer):
            quantizer.refresh(layer.parametrizations["weight"].original)


def fade(network: nn.Module) -> None:
    """Keep v within [0.001, 1] or 0, after each step of the optimiser (method "stlq")."""
    for quantizer in _fading(network):
        quantizer.fade()


def cut(network: nn.Module) -> None:
    """Set to 0 what is left of v at the end of training (method "stlq").

    `export_onnx` does so by itself with its copy of the network.
    """
    for quantizer in _fading(network):
        quantizer.cut()


def fading(network: nn.Module) -> Tensor:
    """Return how much of their second words blocks have that are not selected (method "stlq").

    Parameters
    ----------
    network : nn.Module
        From `prepare`.

    Returns
    -------
    float32 Tensor, one-dimensional
        v of all layers, one after the other; empty for other methods.
    """
    found = [q.fading() for q in _fading(network)]
    return torch.cat(found) if found else torch.empty(0)


def remaining(network: nn.Module) -> float:
    """Return the share of all v that `cut` would set to 0, of blocks that are not selected."""
    v = [q.fading() for q in _fading(network) if q.cuts]
    return float(torch.cat(v).count_nonzero()) / max(sum(map(len, v)), 1) if v else 0.0


def _fading(network: nn.Module) -> list[FadingQuantizer]:
    return [q for _, _, q in weight_quantizers(network) if isinstance(q, FadingQuantizer)]


def regulariser(network: nn.Module) -> Tensor:
    """Return what lambda multiplies in the loss, after a forward pass.

    ||v||^2; for method "residual_penalty" the sum over layers of the l2 norms of r1.
    """
    return torch.stack([q.regulariser for _, _, q in weight_quantizers(network)]).sum()


def non_zero_ratio(network: nn.Module) -> float:
    """Return NZR in the last forward pass: second words that are not zero over all weights."""
    quantizers = [q for _, _, q in weight_quantizers(network)]
    count = torch.stack([q.second_words for q in quantizers]).sum()
    return float(count) / sum(q.layout.shape.numel() for q in quantizers)


def weight_quantizers(network: nn.Module) -> Iterator[tuple[str, Any, WeightQuantizer]]:
    """Yield the quantized layers: name, layer, quantizer."""
    for name, module in network.named_modules():
        if isinstance(module, LAYERS) and parametrize.is_parametrized(module, "weight"):
            layer: Any = module  # of a class that parametrization has made
            yield name, layer, layer.parametrizations["weight"][0]


def quantizable(network: fx.GraphModule) -> list[str]:
    """Return the names of layers with weights, each once, in the order of their first call."""
    calls = (n.target for n in network.graph.nodes if n.op == "call_module")
    return list(dict.fromkeys(n for n in calls if isinstance(network.get_submodule(n), LAYERS)))


def _check_norms(network: fx.GraphModule) -> None:
    for name, module in network.named_modules():
        if isinstance(module, NORMS) and module.running_mean is None:
            raise PrepareError(f"{name}: a batch norm without running statistics cannot be packed")


def _dropouts(network: fx.GraphModule) -> None:
    """Make modules of functional dropouts, of which tracing keeps the mode of that moment."""
    for node in list(network.graph.nodes):
        if (kind := _DROPOUTS.get(node.target)) is not None:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            name = f"{node.name}_module"
            network.add_module(name, kind(p))
            with network.graph.inserting_after(node):
                call = network.graph.call_module(name, node.args[:1])
            node.replace_all_uses_with(call)
            network.graph.erase_node(node)
    network.recompile()


def _match_patterns(config: Config, layers: list[str]) -> None:
    for pattern, special in config.layers.items():
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise PrepareError(
                f"layers: {pattern!r} ({special!r}) matches no layer; there are {', '.join(layers)}"
            )


def _weight_quantizer(layer: Layer, config: Config, special: LayerConfig) -> WeightQuantizer:
    bits, ratio = special.weight_bits, special.residual_ratio
    assert bits is not None and ratio is not None
    if config.method == "uniform":
        return LevelQuantizer(layer, bits, uniform_levels(bits))
    if config.method == "apot":
        return LevelQuantizer(layer, bits, apot_levels(bits))
    granularity = "filter" if config.method == "flightnn" else config.granularity
    select = not config.method.endswith("without_select")
    chosen = Layout(layer).blocks(granularity, config.tile).chosen(ratio)
    single = config.method == "log" or (select and not chosen)
    if single:
        ratio = 0.0  # and nothing reaches past alpha in the end
    clip = config.clip or (1 if single else stlq.default_clip(bits))
    words = Words(bits, ratio, granularity, config.tile, clip, config.residual_shift, config.scale)
    if config.method in ("stlq", "without_select"):
        return FadingQuantizer(layer, words, select)
    if config.method == "log":
        return LogQuantizer(layer, words)
    return PenaltyQuantizer(layer, words, select)


class Placement:
    """Where activations are rounded."""

    def __init__(self, network: fx.GraphModule, config: Config, kept: set[str]) -> None:
        self.network, self.config, self.kept = network, config, kept
        self.nodes = list(network.graph.nodes)
        self.claimed: set[fx.Node] = set()
        self.float_ends: set[fx.Node] = set()  # what is fused to kept layers
        self.kinds: dict[fx.Node, str] = {}
        self.found: dict[fx.Node, set[str]] = {}
        for node in self.nodes:  # in order, so that `_kind` finds those of its inputs
            self.kind(node)

    def kind(self, node: fx.Node) -> str:
        """Return what an operator is: layer, kept, norm, add, relu, point, move, resize or other.

        A kept layer is one with float weights.
        """
        if node not in self.kinds:
            self.kinds[node] = self._kind(node)
        return self.kinds[node]

    def _kind(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output", "get_attr"):
            return node.op
        if node.op == "call_module":
            module = self.network.get_submodule(str(node.target))
            if isinstance(module, LAYERS):
                return "kept" if node.target in self.kept else "layer"
            if isinstance(module, NORMS):
                return "norm"
        target = self.target(node)
        tensors = [n for n in node.all_input_nodes if self.is_tensor(n)]
        if not tensors:
            return "shape"
        if target in ADDS:
            return "add" if len(tensors) == 2 else "point"
        for name, members in (("relu", RELUS), ("point", POINTS), ("move", MOVES)):
            if target in members:
                return name
        return "resize" if target in RESIZES else "shape" if target in SHAPES else "float"

    def target(self, node: fx.Node) -> object:
        """Return the function that a node calls, the name of the method, or the type of module."""
        if node.op == "call_module":
            return type(self.network.get_submodule(str(node.target)))
        return node.target

    def is_tensor(self, node: fx.Node) -> bool:
        """Return whether a node's result is an activation rather than a shape or a parameter."""
        return node.op != "get_attr" and self.kind(node) != "shape"

    def fused_end(self, node: fx.Node) -> fx.Node:
        """Return the last operator that is fused to this one."""
        after = {"layer": ("norm", "add", "relu"), "norm": ("add", "relu"), "add": ("relu",)}
        after["kept"] = after["layer"]
        kind = self.kind(node)
        is_float = kind == "kept"
        while len(node.users) == 1:
            user = next(iter(node.users))
            then = self.kind(user)
            if then not in after.get(kind, ()) or user in self.claimed:
                break
            self.claimed.add(user)
            if is_float:
                self.float_ends.add(user)
            node, kind = user, then
        return node

    def rounded(self) -> list[fx.Node]:
        """Return the operators whose results are codes, if codes are needed there."""
        ends = []
        # Of two convolutions that are added the later one is fused with the Add.
        for node in reversed(self.nodes):
            if self.kind(node) in ("layer", "kept"):
                ends.append(self.fused_end(node))
        for node in self.nodes:
            kind = self.kind(node)
            if kind in ("norm", "add", "relu", "point") and node not in self.claimed:
                ends.append(self.fused_end(node) if kind in ("norm", "add") else node)
            elif kind in ("placeholder", "float"):
                ends.append(node)
        return [node for node in ends if self.uses(node) & {"codes", "moved output"}]

    def uses(self, node: fx.Node) -> set[str]:
        """Return what becomes of a result: "codes", "output", "moved output", or nothing of that.

        Codes are wanted by an operator on codes, or one behind moves.
        """
        if node not in self.found:
            self.found[node] = set()
            for user in node.users:
                if user in self.float_ends:
                    continue
                kind = self.kind(user)
                if kind in ("layer", "norm", "add", "relu", "point"):
                    self.found[node].add("codes")
                elif kind == "output":
                    self.found[node].add("output")
                elif kind in ("move", "resize"):
                    further = set(self.uses(user))
                    if "output" in further and self.target(user) not in RESHAPES:
                        further = further - {"output"} | {"moved output"}
                    self.found[node] |= further
        return self.found[node]

    def insert(self) -> None:
        """Put the quantizers into the graph, one for each set of tensors joined by moves."""
        parent = {node: node for node in self.nodes}

        def root(node: fx.Node) -> fx.Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        moves = [n for n in self.nodes if self.kind(n) in ("move", "resize")]
        for node in moves:
            for source in node.all_input_nodes:
                if self.is_tensor(source):
                    parent[root(node)] = root(source)
        rounded = self.rounded() + [n for n in moves if self.interpolates(n) and self.uses(n)]
        names: dict[fx.Node, str] = {}
        if hasattr(self.network, QUANTIZERS):
            raise PrepareError(f"the network has a {QUANTIZERS!r} of its own; rename it")
        quantizers = nn.ModuleDict()
        device = next(self.network.parameters()).device
        self.network.add_module(QUANTIZERS, quantizers)
        for node in sorted(rounded, key=self.nodes.index):
            origin = root(node)
            if origin not in names:
                names[origin] = node.name
                bits: int = self.config.activation_bits
                if node.op == "placeholder" or "codes" not in self.uses(node):
                    bits = max(bits, self.config.input_bits)
                quantizers[node.name] = ActivationQuantizer(bits).to(device)
            with self.network.graph.inserting_after(node):
                call = self.network.graph.call_module(f"{QUANTIZERS}.{names[origin]}", (node,))
            node.replace_all_uses_with(call, lambda user, call=call: user is not call)

    def interpolates(self, node: fx.Node) -> bool:
        """Return whether a Resize makes values that its input has not."""
        if self.kind(node) != "resize":
            return False
        if node.op == "call_module":
            return self.network.get_submodule(str(node.target)).mode != "nearest"
        return node.kwargs.get("mode", "nearest") != "nearest"
