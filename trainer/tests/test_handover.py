"""A trained network goes through converter and runtime: the same integers, the same codes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import trained_looking
from torch import nn

from logshift.trainer.activations import ActivationQuantizer
from logshift.trainer.config import Config, LayerConfig
from logshift.trainer.export import export_onnx, grid
from logshift.trainer.models import MODELS
from logshift.trainer.quantize import prepare, weight_quantizers
from logshift.trainer.reference import reference

converter = pytest.importorskip("logshift.converter", reason="needs the package logshift")
runtime = pytest.importorskip("logshift.runtime")


class Resizing(nn.Module):
    """Interpolates by a factor and to a size, with and without corners aligned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = F.interpolate(F.relu(self.a(x)), scale_factor=1.5, mode="bilinear", align_corners=True)
        return F.interpolate(self.b(x), size=(29, 23), mode="bilinear")


class Clamping(nn.Module):
    """Bounds of all kinds, pools to one pixel and to four, dropout."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.norm, self.pool = nn.BatchNorm2d(8, affine=False), nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.clamp(self.norm(self.a(x)), -0.2, max=0.7)
        x = F.hardtanh(self.b(x), -0.1, 0.4)
        x = F.dropout(self.c(x).clamp(min=0.05), 0.5, self.training)
        return self.fc(torch.flatten(self.pool(x), 1))


NETWORKS = {
    "resnet20_cifar": ((3, 32, 32), {"shortcut": "pad"}),
    "resnetb": ((3, 32, 32), {"classes": 20}),
    "resnetc": ((3, 32, 32), {"classes": 20}),
    "resnet34": ((3, 48, 64), {"classes": 20}),
    "resnet50": ((3, 48, 64), {"classes": 20}),
    "mobilenet_v2": ((3, 32, 32), {"classes": 20}),
    "shufflenet_v2": ((3, 64, 48), {"classes": 20}),
    "drn_d_54": ((3, 32, 48), {"classes": 20}),
    "deeplab_mobilenet_v2": ((3, 48, 64), {"classes": 11, "width": 16}),
    "deeplab_resnet101": ((3, 48, 64), {"classes": 11, "width": 16}),
    "deeplab_drn": ((3, 48, 64), {"classes": 11, "width": 16}),
    "sid_unet": ((4, 32, 32), {"width": 8}),
    "resizing": ((3, 22, 18), {}),
    "clamping": ((3, 16, 16), {}),
}


OTHERS = {"resizing": Resizing, "clamping": Clamping}


# Together they have every width of words, a residual shift, and codes of 5 and 8 bits.
CONFIGS = {
    "w4a8": Config(),
    "w3a5": Config(weight_bits=3, activation_bits=5),
    "w4a5-shift2": Config(activation_bits=5, residual_shift=2, residual_ratio=0.3),
    "w5a8": Config(weight_bits=5, residual_ratio=0.3),
}
# Those of packaged recipes that are none of these.
PAPER = {
    "w5a5": Config(weight_bits=5, activation_bits=5),
    "w3a6": Config(weight_bits=3, activation_bits=6, residual_ratio=0.5),
    "w4a8-tile": Config(residual_ratio=0.05, granularity="tile", tile=(16, 16)),
}


CASES = [(n, c) for n in ("resnet20_cifar", "sid_unet", "resizing") for c in CONFIGS]
CASES += [("clamping", "w4a8"), ("clamping", "w3a5")]
CASES += [("mobilenet_v2", "w4a8"), ("mobilenet_v2", "w4a5-shift2")]  # these take longer
CASES += [("deeplab_mobilenet_v2", "w4a8"), ("deeplab_mobilenet_v2", "w3a5")]
CASES += [("shufflenet_v2", "w3a6"), ("resnetb", "w4a8-tile")]
LARGE = [("resnetc", "w4a8-tile"), ("resnet34", "w5a5"), ("resnet50", "w5a5")]
LARGE += [(name, "w3a6") for name in ("drn_d_54", "deeplab_resnet101", "deeplab_drn")]


@pytest.fixture(
    scope="module",
    params=CASES + [pytest.param(case, marks=pytest.mark.slow) for case in LARGE],
    ids="-".join,
)
def handed_over(request, tmp_path_factory):
    """A network, its session in the runtime, inputs, and its configuration."""
    name, config = request.param
    torch.manual_seed(1)
    shape, options = NETWORKS[name]
    chosen = (CONFIGS | PAPER)[config]
    network = trained_looking(prepare((MODELS | OTHERS)[name](**options), chosen), shape)
    folder = tmp_path_factory.mktemp(name)
    export_onnx(network, folder / "a.onnx", torch.zeros(1, *shape))
    x = torch.randn(4, *shape)
    converter.convert(folder / "a.onnx", folder / "a.stlq", calibration=x.numpy(), progress=False)
    return network, runtime.load(folder / "a.stlq"), x, chosen


def differences(network, session, x):
    """Compare the codes of every quantizer, each computed from what the runtime computed before.

    In a network that is not trained a code that differs becomes many: so PyTorch goes on with the
    runtime's codes. Returns the differences and PyTorch's outputs.
    """
    theirs = {}
    for tensor, array in session.trace_codes(x.numpy()).items():
        if (q := session.graph.quantization.get(tensor)) is not None:
            theirs.setdefault((q.scale, array.shape), []).append(torch.from_numpy(array).int())
    found = []

    def compare(quantizer, _, y):
        code = (torch.round(y / quantizer.scale) + quantizer.zero_point).int()
        candidates = theirs[float(quantizer.scale), tuple(code.shape)]
        there = min(candidates, key=lambda c: (c - code).abs().sum())
        found.append((there - code).abs().flatten())
        return (there - quantizer.zero_point) * quantizer.scale

    hooks = [
        m.register_forward_hook(compare)
        for m in network.modules()
        if isinstance(m, ActivationQuantizer)
    ]
    with torch.no_grad():
        output = network(x)
    for hook in hooks:
        hook.remove()
    return torch.cat(found), output.numpy()


def test_codes_and_outputs_agree(handed_over):
    network, session, x, _ = handed_over
    difference, output = differences(network, session, x)
    assert (difference <= 1).float().mean() >= 0.999
    assert (difference == 0).float().mean() >= 0.99
    # Float outputs, or the last codes, of the same codes.
    there = session.run(x.numpy())
    assert np.abs(there - output).max() < 0.01 * np.abs(output).max()


def test_the_runtime_computes_the_reference_to_the_bit(handed_over):
    network, session, x, _ = handed_over
    with torch.no_grad():
        expected = reference(network)(x.double()).float().numpy()
    np.testing.assert_array_equal(session.run(x.numpy()), expected)


def test_inputs_are_divided_in_float32_by_both(tmp_path):
    # Between these and the middle of two codes there is less than float32 can tell.
    torch.manual_seed(1)
    network = trained_looking(prepare(MODELS["resneta"](classes=4)), (3, 32, 32))
    scale = network.get_submodule("activation_quantizers.x").scale.detach()
    x = torch.randn(100, 3, 32, 32, 10)
    near = x[(x / scale).round() != (x.double() / scale.double()).round()]
    assert len(near) > 0
    x = x[:4, ..., 0].clone()
    x.flatten()[: len(near)] = near
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 32, 32))
    converter.convert(
        tmp_path / "a.onnx", tmp_path / "a.stlq", calibration=x.numpy(), progress=False
    )
    with torch.no_grad():
        expected = reference(network)(x.double()).float().numpy()
    np.testing.assert_array_equal(runtime.load(tmp_path / "a.stlq").run(x.numpy()), expected)


def test_networks_are_packed_in_whole(handed_over):
    _, session, _, _ = handed_over
    graph = session.graph
    given = {info.name for info in graph.inputs}
    for node in graph.nodes:
        assert not node.is_onnx, node.name
        assert node.float_weights is None, node.name
        # Only what the network is given, and outputs, are float.
        assert graph.on_codes(node) or set(node.inputs) <= given or node.op == "Flatten", node.name


def test_integers_are_the_trainers(handed_over):
    network, session, _, config = handed_over
    found = {}
    for words in (n.weights for n in session.graph.nodes if n.weights is not None):
        assert (words.bits, words.residual_shift) == (config.weight_bits, config.residual_shift)
        found.setdefault(words.first.size, []).append(words.integers())
    # Batch norms may have turned signs and erased channels.
    for name, layer, _ in weight_quantizers(network):
        ours = grid(layer)[0].numpy()
        theirs = (w.reshape(len(ours), -1) for w in found[ours.size] if len(w) == len(ours))
        assert any(_same(ours, w) for w in theirs), name


def test_layers_that_are_kept_stay_float(tmp_path):
    torch.manual_seed(1)
    kept = LayerConfig(keep_float=True)
    network = prepare(MODELS["resnet20_cifar"](), Config(first=kept, layers={"layer2.0.*": kept}))
    network = trained_looking(network, (3, 32, 32))
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    converter.convert(
        tmp_path / "a.onnx", tmp_path / "a.stlq", calibration=x.numpy(), progress=False
    )
    session = runtime.load(tmp_path / "a.stlq")
    floats = [n for n in session.graph.nodes if n.op == "Conv" and n.weights is None]
    assert len(floats) == 4
    difference, output = differences(network, session, x)
    assert (difference <= 1).float().mean() >= 0.999
    assert np.abs(session.run(x.numpy()) - output).max() < 0.01 * np.abs(output).max()


def _same(ours, theirs):
    kept = np.abs(theirs).sum(1) > 0
    return kept.mean() > 0.8 and np.array_equal(np.abs(ours[kept]), np.abs(theirs[kept]))


def test_the_trainer_needs_nothing_of_the_other_packages():
    script = (
        "import sys, pkgutil, importlib, logshift.trainer as t\n"
        "for m in pkgutil.walk_packages(t.__path__, 'logshift.trainer.'):\n"
        "    if '.tests' not in m.name: importlib.import_module(m.name)\n"
        "sys.exit([m for m in sys.modules if m.startswith('logshift.')"
        " and not m.startswith('logshift.trainer')] or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
