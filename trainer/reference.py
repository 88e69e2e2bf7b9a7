"""What a trained network computes once it is packed: the arithmetic of the runtime, slowly.

A network in PyTorch rounds every sum to float32, so that now and then a value next to the middle
between two codes becomes the other one. Here convolutions and averages are exact integers, and what
follows, and what lies between pixels, is rounded as `docs/quantization.md` section 4 has it;
everything else is float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from logshift.trainer.config import Config
from logshift.trainer.export import Pair, deployed
from logshift.trainer.quantize import Placement
from logshift.trainer.stlq import exponent_levels
from logshift.trainer.weights import Layout


class Input(nn.Module):
    """What the network is given, in codes: section 4, QuantizeLinear, a float32 division.

    Parameters
    ----------
    pair : Pair
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the codes, float64."""
        y = (x.float() / torch.tensor(self.pair.scale).float()).round() + self.pair.zero_point
        return _coded(y, self.pair, (-torch.inf, torch.inf))


class Convolution(nn.Module):
    """A layer with what is fused to it: section 4, Convolution.

    Parameters
    ----------
    layer : nn.Module
        Plain, with bias or without.
    unit : float64 Tensor of shape (O,)
        Real value of W = 1.
    s_x : float
        Scale of the input.
    s_r : float or None
        Scale of what is added.
    pair : Pair or None
        Of the output; None if that is float32.
    clamp : tuple of float
        Real bounds of the result.
    """

    def __init__(
        self,
        layer: Any,
        unit: Tensor,
        s_x: float,
        s_r: float | None,
        pair: Pair | None,
        clamp: tuple[float, float],
    ) -> None:
        super().__init__()
        self.layer, self.s_x, self.s_r, self.pair, self.clamp = layer, s_x, s_r, pair, clamp
        bias = torch.zeros(len(unit)) if layer.bias is None else layer.bias.detach()
        layout = Layout(layer)
        integers = (layout.rows(layer.weight.detach().double()) / unit[:, None]).round()
        layer.weight = nn.Parameter(layout.weight(integers))
        layer.bias = None
        s_y, z_y = (1.0, 0) if pair is None else (pair.scale, pair.zero_point)
        ends = (-1, 1, 1) if layer.weight.ndim == 4 else (-1,)
        self.M = (s_x * unit / s_y).float().view(ends)
        self.B = (bias.double() / s_y + z_y).float().view(ends)

    def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        """Return the result for inputs that are codes' values, float64."""
        t = self.layer((x / self.s_x).round()).float()
        y = t * self.M + self.B
        if r is not None:
            assert self.s_r is not None
            s_y = 1.0 if self.pair is None else self.pair.scale
            y = y + (r / self.s_r).round().float() * torch.tensor(self.s_r / s_y).float()
        return _coded(y, self.pair, self.clamp)


class Average(nn.Module):
    """The mean of all pixels: section 4, AveragePool.

    Parameters
    ----------
    s_x : float
        Scale of the input.
    pair : Pair
        Of the output.
    """

    def __init__(self, s_x: float, pair: Pair) -> None:
        super().__init__()
        self.s_x, self.pair = s_x, pair

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, 1, 1)."""
        count = x.shape[2] * x.shape[3]
        acc = (x / self.s_x).round().sum((2, 3), keepdim=True).float()
        scale = torch.tensor(self.s_x / (count * self.pair.scale)).float()
        return _coded(acc * scale + self.pair.zero_point, self.pair, (-torch.inf, torch.inf))


class Bilinear(nn.Module):
    """Interpolation with integer weights: section 4, Resize, mode linear.

    Parameters
    ----------
    s_x : float
        Scale of the input and of the output.
    align_corners : bool
    """

    def __init__(self, s_x: float, align_corners: bool) -> None:
        super().__init__()
        self.s_x, self.align_corners = s_x, align_corners

    def forward(self, x: Tensor, size: Any, scale_factor: Any) -> Tensor:
        """Return what `torch.nn.functional.interpolate` would, in codes rounded half up."""
        c = (x / self.s_x).round()
        for axis in (2, 3):
            count = x.shape[axis]
            if size is not None:
                wanted = int(size if isinstance(size, int) else size[axis - 2])
                scale = wanted / count
            else:
                pair = isinstance(scale_factor, tuple | list)
                scale = float(scale_factor[axis - 2] if pair else scale_factor)
                wanted = int(count * scale)
            i = torch.arange(wanted, dtype=torch.float64)
            if self.align_corners:
                v = i * (count - 1) / max(wanted - 1, 1)
            else:
                v = (i + 0.5) / scale - 0.5
            v = v.clamp(0, count - 1)
            i0 = v.floor().long()
            w1 = ((v - i0) * 2048).round().view([-1 if a == axis else 1 for a in range(4)])
            i1 = (i0 + 1).clamp(max=count - 1)
            c = (2048 - w1) * c.index_select(axis, i0) + w1 * c.index_select(axis, i1)
        return (c / 2**22 + 0.5).floor() * self.s_x


def _coded(y: Tensor, pair: Pair | None, clamp: tuple[float, float]) -> Tensor:
    low, high = clamp
    if pair is None:
        return y.clamp(low, high).double()
    ends = (round(min(max(v / pair.scale + pair.zero_point, 0), pair.top)) for v in clamp)
    code = y.round().clamp(*ends).double()
    return (code - pair.zero_point) * pair.scale


def reference(network: nn.Module) -> nn.Module:
    """Return the network as it computes once it is packed.

    Parameters
    ----------
    network : nn.Module
        From `quantize.prepare`.

    Returns
    -------
    nn.Module
        Takes and returns float64.
    """
    plain, grids = deployed(network)
    plain = plain.double()
    if not isinstance(plain, fx.GraphModule):
        return plain
    kinds = Placement(plain, Config(), set())
    for node in list(plain.graph.nodes):
        if node.op == "call_module" and kinds.kind(node) == "layer":
            _replace_layer(plain, kinds, node, grids.get(f"{node.target}.weight"))
        elif node.op == "placeholder":
            _replace_input(plain, node)
        elif _is_global_average(plain, kinds, node):
            _replace_average(plain, kinds, node)
        elif kinds.target(node) is F.interpolate:
            _replace_interpolate(plain, kinds, node)
    plain.graph.eliminate_dead_code()
    plain.recompile()
    return plain


def _pair(network: fx.GraphModule, node: fx.Node) -> Pair | None:
    if node.op != "call_module":
        return None
    module = network.get_submodule(str(node.target))
    return module if isinstance(module, Pair) else None


def _source(network: fx.GraphModule, kinds: Placement, node: fx.Node) -> float | None:
    """Return the scale of a tensor, None if it is no codes'."""
    while kinds.kind(node) == "move":
        node = node.all_input_nodes[0]
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, Input | Convolution | Average) and module.pair is not None:
            return module.pair.scale
    pair = _pair(network, node)
    return None if pair is None else pair.scale


def _replace_input(network: fx.GraphModule, node: fx.Node) -> None:
    for user in list(node.users):
        if (pair := _pair(network, user)) is not None:
            name = f"{node.name}_packed"
            network.add_module(name, Input(pair))
            with network.graph.inserting_after(user):
                call = network.graph.call_module(name, (node,))
            user.replace_all_uses_with(call)


def _replace_layer(
    network: fx.GraphModule, kinds: Placement, node: fx.Node, grid: dict[str, Any] | None
) -> None:
    s_x = _source(network, kinds, node.all_input_nodes[0])
    if grid is None or s_x is None:
        return
    last, added, clamp, s_r = node, None, (-torch.inf, torch.inf), None
    while len(last.users) == 1:
        user = next(iter(last.users))
        kind = kinds.kind(user)
        if kind == "add" and added is None and clamp[0] == -torch.inf:
            (added,) = (n for n in user.all_input_nodes if n is not last)
            s_r = _source(network, kinds, added)
            if s_r is None:
                return
        elif kind == "relu":
            clamp = _bounds(network, kinds, user)
        else:
            break
        last = user
    pair = None
    if len(last.users) == 1 and (pair := _pair(network, next(iter(last.users)))) is not None:
        last = next(iter(last.users))
    levels = exponent_levels(grid["bits"]) - 1 + grid["residual_shift"]
    unit = torch.tensor(grid["alpha"], dtype=torch.float64) / 2.0**levels
    layer = network.get_submodule(str(node.target))
    name = f"{str(node.target).replace('.', '_')}_packed"
    network.add_module(name, Convolution(layer, unit, s_x, s_r, pair, clamp))
    with network.graph.inserting_after(last):
        inputs = (node.args[0],) if added is None else (node.args[0], added)
        call = network.graph.call_module(name, inputs)
    last.replace_all_uses_with(call)


def _bounds(network: fx.GraphModule, kinds: Placement, node: fx.Node) -> tuple[float, float]:
    if node.op == "call_module":
        module: Any = network.get_submodule(str(node.target))
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val, module.max_val
    target = kinds.target(node)
    if target is F.relu6:
        return 0.0, 6.0
    defaults: dict[object, list[Any]] = {
        F.hardtanh: [-1.0, 1.0],
        torch.clamp: [None, None],
        "clamp": [None, None],
    }
    if target not in defaults:
        return 0.0, torch.inf
    given: list[Any] = list(node.args[1:3])
    low, high = given + defaults[target][len(given) :]
    low = node.kwargs.get("min_val", node.kwargs.get("min", low))
    high = node.kwargs.get("max_val", node.kwargs.get("max", high))
    return -torch.inf if low is None else low, torch.inf if high is None else high


def _is_global_average(network: fx.GraphModule, kinds: Placement, node: fx.Node) -> bool:
    size: Any = None
    if kinds.target(node) is nn.AdaptiveAvgPool2d:
        size = network.get_submodule(str(node.target)).output_size
    elif kinds.target(node) is F.adaptive_avg_pool2d:
        size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    return size in (1, (1, 1), [1, 1])


def _replace_average(network: fx.GraphModule, kinds: Placement, node: fx.Node) -> None:
    s_x = _source(network, kinds, node.all_input_nodes[0])
    user = next(iter(node.users))
    pair = _pair(network, user)
    if s_x is None or pair is None or len(node.users) != 1:
        return
    name = f"{node.name}_packed"
    network.add_module(name, Average(s_x, pair))
    with network.graph.inserting_after(user):
        call = network.graph.call_module(name, (node.args[0],))
    user.replace_all_uses_with(call)


def _replace_interpolate(network: fx.GraphModule, kinds: Placement, node: fx.Node) -> None:
    s_x = _source(network, kinds, node.all_input_nodes[0])
    if s_x is None or node.kwargs.get("mode") != "bilinear":
        return
    name = f"{node.name}_packed"
    network.add_module(name, Bilinear(s_x, bool(node.kwargs["align_corners"])))
    with network.graph.inserting_after(node):
        inputs = (node.args[0], node.kwargs["size"], node.kwargs["scale_factor"])
        call = network.graph.call_module(name, inputs)
    node.replace_all_uses_with(call)
