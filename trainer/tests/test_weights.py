"""Weight quantizers as parametrizations: layouts, methods, levels."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from logshift.trainer import stlq
from logshift.trainer.config import Config, LayerConfig, Method
from logshift.trainer.quantize import (
    PrepareError,
    non_zero_ratio,
    prepare,
    refresh,
    regulariser,
    weight_quantizers,
)
from logshift.trainer.weights import Layout, apot_levels, uniform_levels

LAYERS = [
    nn.Conv2d(6, 8, (3, 2)),
    nn.Conv2d(6, 8, 3, groups=2),
    nn.ConvTranspose2d(6, 8, (2, 3)),
    nn.ConvTranspose2d(6, 8, 2, groups=2),
    nn.Linear(6, 8),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_are_output_channels_in_the_order_kh_kw_c(layer):
    layout, weight = Layout(layer), layer.weight.detach()
    rows = layout.rows(weight)
    assert rows.shape[0] == 8
    assert torch.equal(layout.weight(rows), weight)
    w = weight.numpy()
    if isinstance(layer, nn.Linear):
        expected = w
    elif isinstance(layer, nn.ConvTranspose2d):
        expected = np.empty(rows.shape, np.float32)
        inputs, outputs = 6 // layer.groups, 8 // layer.groups
        for o in range(8):
            group = o // outputs
            part = w[group * inputs : (group + 1) * inputs, o % outputs]
            expected[o] = part.transpose(1, 2, 0).ravel()
    else:
        expected = w.transpose(0, 2, 3, 1).reshape(8, -1)
    np.testing.assert_array_equal(rows.numpy(), expected)


def small():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_trains(method, bits):
    network = prepare(small(), Config(method=method, weight_bits=bits, activation_bits=32))
    x = torch.randn(2, 3, 8, 8)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = network(x).square().mean() + 0.01 * regulariser(network)
    loss.backward()
    optimiser.step()
    moved = [n for n, p in network.named_parameters() if not torch.equal(p, before[n])]
    assert {n for n in before if "original" in n or "alpha" in n} <= set(moved)


@pytest.mark.parametrize(
    "config, ratio",
    [
        (Config(residual_ratio=0.3), 0.3),
        (Config(residual_ratio=0.3, granularity="tile", tile=8), 0.3),
        (Config(method="flightnn", residual_ratio=0.25), 0.25),
        (Config(method="without_select", residual_ratio=0.3), 1.0),
        (Config(method="log", residual_ratio=0.3), 0.0),
    ],
)
def test_second_words_are_where_the_method_allows_them(config, ratio):
    network = prepare(small(), config.model_copy(update={"activation_bits": 32}))
    network(torch.randn(1, 3, 8, 8))
    counted = total = 0
    for _, layer, quantizer in weight_quantizers(network):
        rows = quantizer.layout.rows(layer.parametrizations.weight.original)
        _, _, _, r1 = stlq.split(rows, quantizer.alpha, 4, 1, 0)
        second = (stlq.nearest_level(r1, 4) != 0) & quantizer.second
        counted, total = counted + int(second.sum()), total + rows.numel()
        assert quantizer.second.float().mean() <= ratio
    assert non_zero_ratio(network) == pytest.approx(counted / total)
    assert (float(regulariser(network).detach()) == 0) == (config.method == "log")


def test_refreshing_follows_the_weights():
    network = prepare(small(), Config(activation_bits=32))
    _, layer, quantizer = next(weight_quantizers(network))
    before = quantizer.second.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(8, 3, 3, 3))
    assert torch.equal(quantizer.second, before)
    refresh(network)
    assert not torch.equal(quantizer.second, before)
    assert quantizer.second.sum() == before.sum()


def test_levels_to_compare_with():
    assert uniform_levels(3) == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    # Li, Dong and Wang (2020): two bits of magnitude are 0, 1/4, 1/2, 1; three bits are the sums of
    # {0, 1/2, 1/4, 1/16} and {0, 1/8} over 5/8.
    assert [x for x in apot_levels(3) if x >= 0] == [0, 0.25, 0.5, 1]
    eighths = sorted({a + b for a in (0, 8, 4, 1) for b in (0, 2)})
    assert [x for x in apot_levels(4) if x >= 0] == [x / 10 for x in eighths]
    for bits in (3, 4, 5):
        assert len(apot_levels(bits)) == 2**bits - 1


@pytest.mark.parametrize("method", ["apot", "uniform"])
def test_other_levels_are_rounded_to(method):
    network = prepare(small(), Config(method=method, weight_bits=3, activation_bits=32))
    for _, layer, quantizer in weight_quantizers(network):
        rows = quantizer.layout.rows(layer.weight.detach()) / quantizer.alpha.detach()
        float_rows = quantizer.layout.rows(layer.parametrizations.weight.original.detach())
        distance = (rows[..., None] - quantizer.levels).abs().amin(-1)
        assert distance.max() < 1e-6
        wanted = float_rows / quantizer.alpha.detach()
        nearest = (wanted[..., None] - quantizer.levels).abs().amin(-1)
        torch.testing.assert_close((rows - wanted).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_layers_may_differ():
    config = Config(
        activation_bits=32,
        first=LayerConfig(weight_bits=5, residual_ratio=1),
        last=LayerConfig(keep_float=True),
        layers={"2": LayerConfig(weight_bits=3)},
    )
    network = prepare(small(), config)
    found = {name: (q.bits, q.ratio, q.clip) for name, _, q in weight_quantizers(network)}
    assert found == {"0": (5, 1.0, 1), "2": (3, 0.15, 2)}
    assert not parametrize.is_parametrized(network.get_submodule("6"))


@pytest.mark.parametrize(
    "model, config, message",
    [
        (nn.Sequential(nn.ReLU()), Config(), "no Conv2d"),
        (small(), Config(layers={"*": LayerConfig(keep_float=True)}), "leaves no layer"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False)),
            Config(),
            "1: a batch norm without",
        ),
        (small(), Config(layers={"conv*": LayerConfig(weight_bits=3)}), "matches no layer"),
    ],
)
def test_what_cannot_be_prepared(model, config, message):
    with pytest.raises(PrepareError, match=message):
        prepare(model, config)


def test_a_kept_layer_is_rounded_after_what_is_fused_to_it():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )  # fmt: skip
    kept = LayerConfig(keep_float=True)
    network = prepare(model, Config(first=kept, layers={"3": kept}))
    called = [str(n.target) for n in network.graph.nodes if n.op == "call_module"]
    # Nobody needs codes before the layer that computes on codes.
    assert [name.split(".")[0] for name in called] == [*"01234", "activation_quantizers", "5"]


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode(training):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 64, 1)

        def forward(self, x):
            return F.dropout(self.conv(x), 0.9, self.training)

    network = prepare(Dropping().train(training), Config(activation_bits=32))
    x = torch.ones(1, 1, 8, 8)
    assert (network.eval()(x) != 0).all()
    assert 0.8 < (network.train()(x) == 0).float().mean() < 0.97


def test_a_network_that_branches_on_values():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(PrepareError, match="Branch cannot be traced"):
        prepare(Branch())
