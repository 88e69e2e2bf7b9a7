"""Activation quantizers: codes, gradients, calibration, and where `prepare` puts them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from logshift.trainer.activations import ActivationQuantizer
from logshift.trainer.config import Config
from logshift.trainer.quantize import QUANTIZERS, calibrate, prepare


def quantizer(bits=4, scale=0.1, zero_point=0):
    made = ActivationQuantizer(bits)
    with torch.no_grad():
        made.scale.fill_(scale)
        made.zero_point.fill_(zero_point)
        made.ready.fill_(True)
    return made


@pytest.mark.parametrize("bits, zero_point", [(2, 0), (4, 0), (4, 7), (8, 128)])
def test_values_are_codes_times_scale(bits, zero_point):
    x = torch.linspace(-3, 3, 1001)[None]
    y = quantizer(bits, 0.1, zero_point)(x).detach()
    code = torch.round(x / torch.tensor(0.1)) + zero_point
    expected = (code.clamp(0, 2**bits - 1) - zero_point) * torch.tensor(0.1)
    assert torch.equal(y, expected)


def test_gradients_are_those_of_lsq():
    made = quantizer(4, 0.1, 3)
    x = (torch.randn(2, 300) * 0.7).requires_grad_()
    weights = torch.randn(2, 300)
    (made(x) * weights).sum().backward()
    code = torch.round(x.detach() / 0.1) + 3
    inside = (code >= 0) & (code <= 15)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, torch.where(inside, weights, 0.0))
    slope = code.clamp(0, 15) - 3 - torch.where(inside, x.detach() / 0.1, 0.0)
    expected = (weights * slope).sum() / (300 * 15) ** 0.5
    torch.testing.assert_close(made.scale.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
def test_calibration_finds_a_range_of_small_error(bits, signed):
    x = torch.randn(4, 5000)
    x = x if signed else x.relu()
    made = ActivationQuantizer(bits)
    made.observe()
    assert torch.equal(made(x), x)
    made.calibrate()
    assert (made.zero_point > 0) == signed
    error = (made(x) - x).square().mean()
    low, high = float(x.min()), float(x.max())
    step = (high - low) / (2**bits - 1)
    plain = (torch.round((x - low) / step) * step + low - x).square().mean()
    assert error <= plain * 1.05
    if bits == 3:
        assert error < 0.8 * plain  # outliers are cut off


def points(network):
    """Return, for each call of a quantizer, its name and the operator before it."""
    found = []
    for node in network.graph.nodes:
        if str(node.target).startswith(QUANTIZERS):
            found.append((str(node.target).removeprefix(QUANTIZERS + "."), node.args[0].name))
    return found


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.short, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        short = self.bn3(self.short(x))
        x = F.relu(self.bn2(self.conv2(x)) + short)
        x = F.max_pool2d(x, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_fused_operators_are_rounded_once():
    network = prepare(Residual(), Config(activation_bits=4))
    found = [before for _, before in points(network)]
    # Not bn2: it is fused into the Add; not the maximum, which only moves values; not the output.
    assert sorted(found) == sorted(["x", "relu", "bn3", "relu_1", "adaptive_avg_pool2d"])
    bits = {name: q.bits for name, q in network.get_submodule(QUANTIZERS).items()}
    assert bits == {"x": 8, "relu": 4, "bn3": 4, "relu_1": 4, "adaptive_avg_pool2d": 4}


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.c = nn.ConvTranspose2d(8, 4, 2, 2)
        self.d = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        y = torch.cat([F.relu(self.a(x)), F.leaky_relu(self.b(x), 0.2)], 1)
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        y = self.c(F.max_pool2d(y, 2))
        y = torch.cat([F.interpolate(y, size=x.shape[-2:], mode="nearest"), x], 1)
        return F.interpolate(self.d(y), scale_factor=2, mode="bilinear", align_corners=False)


def test_tensors_joined_by_moves_share_a_quantizer():
    network = prepare(Joined(), Config(activation_bits=6))
    owner = {before: name for name, before in points(network)}
    assert set(owner) == {"x", "relu", "b", "leaky_relu", "interpolate", "c", "d", "interpolate_2"}
    assert owner["relu"] == owner["leaky_relu"] == owner["interpolate"]
    assert owner["x"] == owner["c"]  # concatenated
    assert owner["d"] == owner["interpolate_2"]  # on the way to the output, but resized
    assert len({owner["x"], owner["relu"], owner["b"], owner["d"]}) == 4
    bits = {name: q.bits for name, q in network.get_submodule(QUANTIZERS).items()}
    assert (bits[owner["relu"]], bits[owner["d"]], bits[owner["x"]]) == (6, 8, 8)
    calibrate(network, [torch.randn(2, 3, 8, 8) for _ in range(2)])
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 2, 16, 16)
    assert all(q.ready for q in network.get_submodule(QUANTIZERS).values())


def test_deep_networks_are_prepared_in_no_time():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(80))

        def forward(self, x):
            for layer in self.layers:
                x = F.relu(layer(x) + x)
            return x

    # Each Add has two ways back to the input: looked at one by one, there are 2^80.
    network = prepare(Deep(), Config())
    assert len(points(network)) == 80  # but for the last sum, which is the output


def test_activations_can_stay_float():
    network = prepare(Residual(), Config(activation_bits=32))
    assert points(network) == []


def test_the_original_is_left_alone():
    model = Residual()
    names = set(model.state_dict())
    prepare(model)
    assert set(model.state_dict()) == names
    assert isinstance(model, Residual)
