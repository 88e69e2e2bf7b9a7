"""Weight quantizers as parametrizations: layouts, methods, levels."""

import warnings
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from logshift.trainer import stlq
from logshift.trainer.config import Config, LayerConfig, Method
from logshift.trainer.export import export_onnx, grid, stored_bits
from logshift.trainer.fit import fading_rate, learning_rate, make_optimisers, parameter_groups
from logshift.trainer.quantize import (
    PrepareError,
    calibrate,
    cut,
    fade,
    fading,
    non_zero_ratio,
    prepare,
    refresh,
    regulariser,
    weight_quantizers,
)
from logshift.trainer.settings import Training
from logshift.trainer.weights import (
    FadingQuantizer,
    Layout,
    LogQuantizer,
    Words,
    apot_levels,
    uniform_levels,
)

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
        (Config(residual_ratio=0.3, granularity="tile", tile=(4, 2)), 0.3),
        (Config(residual_ratio=0.3, granularity="filter"), 0.3),
        (Config(method="residual_penalty", residual_ratio=0.3), 0.3),
        (Config(method="residual_penalty", residual_ratio=0.3, granularity="tile", tile=8), 0.3),
        (Config(method="flightnn", residual_ratio=0.25), 0.25),
        (Config(method="residual_penalty_without_select", residual_ratio=0.3), 1.0),
        (Config(method="without_select", residual_ratio=0.3), 0.0),
        (Config(method="log", residual_ratio=0.3), 0.0),
    ],
)
def test_second_words_are_where_the_method_allows_them(config, ratio):
    network = prepare(small(), config.model_copy(update={"activation_bits": 32}))
    for _, _, quantizer in weight_quantizers(network):
        if isinstance(quantizer, FadingQuantizer):
            with torch.no_grad():
                quantizer.v.zero_()
    network(torch.randn(1, 3, 8, 8))
    counted = total = 0
    for _, layer, quantizer in weight_quantizers(network):
        rows = quantizer.layout.rows(layer.parametrizations.weight.original)
        _, _, _, r1 = stlq.split(rows, quantizer.magnitude(), 4, 1, 0)
        allowed = quantizer.blocks.spread(quantizer.selected)
        second = (stlq.nearest_level(r1, 4) != 0) & allowed
        counted, total = counted + int(second.sum()), total + rows.numel()
        blocks = quantizer.selected.numel()
        assert int(quantizer.selected.sum()) == int(ratio * blocks + 1e-9)
    assert non_zero_ratio(network) == pytest.approx(counted / total)
    penalised = config.method in ("residual_penalty", "flightnn", "residual_penalty_without_select")
    assert (float(regulariser(network).detach()) > 0) == penalised


@pytest.mark.parametrize("granularity, tile", [("element", 16), ("tile", (2, 4)), ("filter", 16)])
@pytest.mark.parametrize("bits", [3, 4])
def test_v_begins_as_published(granularity, tile, bits):
    config = Config(
        weight_bits=bits, residual_ratio=0.2, granularity=granularity, tile=tile, activation_bits=32
    )
    network = prepare(small(), config)
    for _, layer, quantizer in weight_quantizers(network):
        rows = quantizer.layout.rows(layer.parametrizations.weight.original.detach())
        alpha = quantizer.alpha.detach()
        _, r0, q0, _ = stlq.split(rows, alpha, bits, quantizer.words.clip, 0)
        r1 = (r0 - q0) * alpha / 2 ** (stlq.exponent_levels(bits) - 1)
        norms = quantizer.blocks.sum((r1 / alpha.square().mean().sqrt()).square()).sqrt()
        rest = ~quantizer.selected
        v = quantizer.v.detach()
        softmax = norms[rest].softmax(0)
        torch.testing.assert_close(v[rest], softmax / softmax.max())
        assert v.max() == 1 and v[rest].min() > 0 and not v[quantizer.selected].any()
        if granularity == "element" and alpha.max() < 1.5 * alpha.min():
            assert v[rest].min() > 0.7  # small ones only a little below


def test_v_fades_is_set_to_zero_below_epsilon_and_is_cut():
    network = prepare(small(), Config(residual_ratio=0.25, activation_bits=32))
    x = torch.randn(1, 3, 8, 8)
    groups, v = parameter_groups(network)
    assert sum(len(group["params"]) for group in groups) + len(v) == len([*network.parameters()])
    optimiser = torch.optim.SGD(v, lr=0.1)
    ratios, total = [], 1 - 0.25
    network(x)
    ratios.append(non_zero_ratio(network))
    for _ in range(60):
        optimiser.zero_grad()
        (network(x).sum() * 1e-6 + regulariser(network)).backward()
        optimiser.step()
        fade(network)
        ratios.append(non_zero_ratio(network))
        v = fading(network)
        assert ((v == 0) | (v >= 0.001)).all()
    # Each step takes 2 * lambda * lr = 0.2 of it: 0.8^31 is 0.001.
    assert not v.any() and ratios[0] > ratios[5] > ratios[-1]
    assert ratios[0] > 0.5 and ratios[-1] <= 0.25
    for _, _, quantizer in weight_quantizers(network):
        assert quantizer.selected.float().mean() == pytest.approx(0.25, abs=0.02)
        with torch.no_grad():
            quantizer.v.copy_(torch.where(quantizer.selected, 0.0, 0.5))
    network(x)
    assert non_zero_ratio(network) > ratios[-1]
    cut(network)
    network(x)
    assert not fading(network).any() and non_zero_ratio(network) == ratios[-1]
    assert len(v) == pytest.approx(total * (27 * 8 + 72 * 8 + 32), abs=3)


@pytest.mark.parametrize("strength", [1e-5, 1e-3, 0.1])
def test_without_select_lambda_decides_how_far_v_falls(strength):
    quantization = Config(method="without_select", regularisation=strength, activation_bits=32)
    *_, made = make_optimisers(prepare(small(), quantization), Training(), quantization, 100)
    factors = [learning_rate(step / 100, Training()) / Training().lr for step in range(100)]
    assert made.param_groups[0]["lr"] == fading_rate(Config().regularisation, factors)


@pytest.mark.parametrize("clip", [None, 1, 2])
@pytest.mark.parametrize("words", [{"method": "log"}, {"granularity": "tile"}, {}])
def test_weights_are_clipped_as_asked(clip, words):
    config = Config(weight_bits=3, residual_ratio=0.05, clip=clip, activation_bits=32, **words)
    found = {name: q.words.clip for name, _, q in weight_quantizers(prepare(small(), config))}
    # Where nothing has a second word, nothing reaches past alpha.
    assert set(found.values()) == {clip or (1 if words else 2)}


def test_tiles_need_their_granularity():
    assert Config(granularity="tile", tile=(8, 8)).tile == (8, 8)
    assert Config(tile=16).granularity == "element"  # as settings of the first version have it
    with pytest.raises(ValueError, match=r"tile is \(8, 8\), which needs granularity 'tile'"):
        Config(tile=(8, 8))


@pytest.mark.parametrize("granularity", ["element", "tile"])
def test_layers_without_a_block_to_select_have_one_word(granularity):
    config = Config(weight_bits=3, residual_ratio=0.05, granularity=granularity, activation_bits=32)
    network = prepare(small(), config)
    found = {name: q for name, _, q in weight_quantizers(network)}
    assert found["2"].words.clip == (2 if granularity == "element" else 1)
    rows = found["2"].layout.rows(network.get_submodule("2").parametrizations.weight.original)
    if granularity == "tile":  # nine of them, of which 5 % are none
        assert found["2"].selected.numel() == 9 and not found["2"].selected.any()
        assert torch.equal(found["2"].alpha, stlq.search_alpha(rows.detach(), 3, 1, 0, 0.0))


def test_what_is_left_when_a_network_is_exported_is_said(tmp_path):
    network = prepare(small(), Config(activation_bits=32))
    with pytest.warns(UserWarning, match=r"100.0% of the weights .* call fade"):
        export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8))
    cut(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8))


def test_activations_that_were_not_calibrated_are_said(tmp_path):
    network = prepare(small(), Config(method="log"))
    with pytest.warns(
        UserWarning, match=r"(\d+) of \1 activation quantizers were never calibrated"
    ):
        export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8))
    calibrate(network, [torch.randn(4, 3, 8, 8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8))


def test_bits_of_tiles_are_those_of_all_words_inside():
    for method in ("stlq", "without_select"):
        config = Config(method=method, granularity="tile", tile=(4, 4), activation_bits=32)
        network = prepare(small(), config)
        for name, layer, quantizer in weight_quantizers(network):
            quantizer(layer.parametrizations.weight.original)  # counts the second words
            inside = quantizer.blocks.spread(quantizer.share() != 0).float().mean()
            tiles = quantizer.selected.numel() / quantizer.layout.shape.numel()
            least = 4 + 32 * len(quantizer.alpha) / quantizer.layout.shape.numel()
            nzr = float(quantizer.second_words) / quantizer.layout.shape.numel()
            expected = least + min(4 * nzr + min(8 * nzr, 1), 4 * inside + tiles)
            assert stored_bits(quantizer) == pytest.approx(float(expected)), name


def test_without_select_nothing_is_selected_and_nothing_cut():
    network = prepare(small(), Config(method="without_select", activation_bits=32))
    before = fading(network)
    cut(network)
    assert len(before) == 27 * 8 + 72 * 8 + 32 and torch.equal(fading(network), before)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("strength, steps, lr", [(1e-4, 500, 0.01), (0.1, 300, 1e-5)])
def test_v_fades_in_sixty_percent_of_any_run(optimiser, strength, steps, lr):
    training = Training(optimiser=optimiser, lr=lr)
    quantization = Config(regularisation=strength, activation_bits=32)
    network = prepare(small(), quantization)
    *_, made = make_optimisers(network, training, quantization, steps)
    (group,) = made.param_groups
    highest, ended = group["lr"], 0
    for step in range(steps):
        group["lr"] = highest * learning_rate(step / steps, training) / lr
        made.zero_grad()
        network(torch.ones(1, 3, 8, 8))
        (quantization.regularisation * regulariser(network)).backward()
        made.step()
        fade(network)
        ended = step if fading(network).any() else ended
    assert 0.5 * steps < ended < 0.66 * steps


def test_selection_of_the_published_method_is_never_changed():
    network = prepare(small(), Config(activation_bits=32))
    before = [q.selected.clone() for _, _, q in weight_quantizers(network)]
    with torch.no_grad():
        for _, layer, _ in weight_quantizers(network):
            layer.parametrizations.weight.original.normal_()
    refresh(network)
    network(torch.randn(1, 3, 8, 8))
    found = [q.selected for _, _, q in weight_quantizers(network)]
    assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))


def test_refreshing_follows_the_weights():
    network = prepare(small(), Config(method="residual_penalty", activation_bits=32))
    _, layer, quantizer = next(weight_quantizers(network))
    before = quantizer.selected.clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(8, 3, 3, 3))
    assert torch.equal(quantizer.selected, before)
    refresh(network)
    assert not torch.equal(quantizer.selected, before)
    assert quantizer.selected.sum() == before.sum()


def test_a_layer_may_have_one_scale():
    network = prepare(small(), Config(scale="layer", activation_bits=32))
    for _, layer, quantizer in weight_quantizers(network):
        assert quantizer.alpha.shape == (1, 1)
        original = layer.parametrizations.weight.original
        rows = quantizer.layout.rows(original.detach()).reshape(1, -1)
        searched = stlq.search_alpha(rows, 4, 1, 0, 0.15)
        assert torch.equal(quantizer.alpha, searched)
        layer.weight.sum().backward()
        assert quantizer.alpha.grad.shape == (1, 1)
        integers, alpha = grid(layer)
        assert (alpha == alpha[0]).all() and len(alpha) == len(integers)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("blocks", [{"granularity": "tile"}, {"granularity": "filter"}])
def test_second_words_of_blocks_lose_nothing(blocks, bits):
    """A channel's alpha does not count on second words that other channels' blocks have."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 40, 3)
    with torch.no_grad():
        layer.weight.pow_(3)  # a few are much larger than the others
    errors = []
    for ratio in (0.0, 0.05):
        words = Words(bits, ratio, **blocks, clip=2 if bits < 4 else 1)
        quantizer = LogQuantizer(layer, words)
        errors.append((quantizer(layer.weight) - layer.weight).square().sum())
    assert errors[1] < errors[0]


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
    found = {
        name: (q.bits, q.words.ratio, q.words.clip) for name, _, q in weight_quantizers(network)
    }
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
