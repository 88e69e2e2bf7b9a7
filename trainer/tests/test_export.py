"""Exported files: the grid to the bit, batch norms folded, outputs as in PyTorch."""

import copy
import json
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import trained_looking
from onnx import numpy_helper
from torch import nn

from logshift.trainer.config import Config, LayerConfig, Method
from logshift.trainer.export import export_onnx, grid
from logshift.trainer.models import MODELS
from logshift.trainer.quantize import cut, prepare, weight_quantizers

VECTORS = Path(__file__).parents[2] / "tests/vectors/metadata.json"


def metadata(model):
    return json.loads({p.key: p.value for p in model.metadata_props}["logshift"])


@pytest.mark.parametrize("bits, activation_bits", [(3, 5), (4, 8), (5, 32)])
def test_weights_lie_on_the_grid_exactly(tmp_path, bits, activation_bits):
    torch.manual_seed(1)
    config = Config(weight_bits=bits, activation_bits=activation_bits, residual_shift=bits - 3)
    network = trained_looking(prepare(MODELS["resnet20_cifar"](), config), (3, 32, 32))
    path = tmp_path / "a.onnx"
    export_onnx(network, path, torch.zeros(1, 3, 32, 32), labels=("x", "y"))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"/layer2/0/downsample/0/Conv", "/fc/Gemm"} <= set(names)
    written = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    about = metadata(model)
    assert about["labels"] == ["x", "y"]
    layers = dict((name, (layer, q)) for name, layer, q in weight_quantizers(network))
    assert set(about["weights"]) == {f"{name}.weight" for name in layers}
    for name, (layer, quantizer) in layers.items():
        record = about["weights"][f"{name}.weight"]
        assert (record["bits"], record["residual_shift"]) == (bits, bits - 3)
        scale = 2.0 ** (2 ** (bits - 1) - 2 + bits - 3)
        alpha = np.array(record["alpha"])
        assert (alpha > 0).all() and (alpha == alpha.astype(np.float32)).all()
        w = written[f"{name}.weight"].astype(np.float64)
        integers = w / (alpha / scale).reshape(-1, *[1] * (w.ndim - 1))
        rounded = np.rint(integers)
        np.testing.assert_array_equal(
            (rounded * (alpha / scale).reshape(-1, *[1] * (w.ndim - 1))).astype(np.float32),
            written[f"{name}.weight"],
        )
        # What PyTorch computes with, but for the signs of batch norms and channels they erase.
        trained, _ = grid(layer)
        ours = quantizer.layout.rows(torch.from_numpy(rounded)).int()
        kept = ours.abs().sum(1) > 0
        assert torch.equal(ours[kept].abs(), trained[kept].abs())
        assert kept.float().mean() > 0.8


def test_metadata_are_those_of_the_shared_vectors(tmp_path):
    """The converter reads the same vectors, and writes metadata by them."""
    expected = json.loads(VECTORS.read_text())["trainer"]
    layers = [nn.Conv2d(c, 2, 1) for c in (3, 2, 2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    config = Config(
        residual_ratio=1, residual_shift=1, granularity="tile", activation_bits=32,
        first=LayerConfig(keep_float=True), last=LayerConfig(weight_bits=3),
    )  # fmt: skip
    network = prepare(model, config)
    for name, _, quantizer in weight_quantizers(network):
        with torch.no_grad():
            quantizer.alpha[:, 0] = torch.tensor(expected["weights"][f"{name}.weight"]["alpha"])
    export_onnx(
        network, tmp_path / "a.onnx", torch.zeros(1, 3, 8, 8),
        labels=tuple(expected["labels"]), preprocessing=expected["preprocessing"],
    )  # fmt: skip
    assert metadata(onnx.load(tmp_path / "a.onnx")) == expected


@pytest.mark.parametrize("name, shape", [
    ("resnet20_cifar", (3, 32, 32)), ("mobilenet_v2", (3, 64, 64)),
    ("deeplab_mobilenet_v2", (3, 64, 64)), ("sid_unet", (4, 32, 32)),
])  # fmt: skip
@pytest.mark.parametrize("activation_bits", [5, 8, 32])
def test_the_file_computes_what_pytorch_does(tmp_path, name, shape, activation_bits):
    torch.manual_seed(1)
    small = {"mobilenet_v2": {"classes": 20}, "resnet20_cifar": {}}
    options = small.get(name, {"width": 8})
    network = prepare(MODELS[name](**options), Config(activation_bits=activation_bits))
    network = trained_looking(network, shape)
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, *shape))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    x = torch.randn(3, *shape)
    (there,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        here = network(x).numpy()
    spread = here.std()
    # Codes near a tie may be the other one, and what follows from that.
    limit = 1e-4 if activation_bits == 32 else 0.015
    assert np.sqrt(np.mean((there - here) ** 2)) < limit * spread


def test_an_alpha_that_went_past_zero(tmp_path):
    torch.manual_seed(1)
    network = prepare(MODELS["resnet20_cifar"](), Config(activation_bits=32)).eval()
    _, layer, quantizer = next(weight_quantizers(network))
    with torch.no_grad():
        before = layer.weight.clone()
        quantizer.alpha[3] *= -1
        assert torch.equal(layer.weight, before)
        quantizer.alpha[4] = 0
        assert torch.isfinite(layer.weight).all()
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 32, 32))
    record = metadata(onnx.load(tmp_path / "a.onnx"))["weights"]["conv1.weight"]
    assert all(alpha > 0 for alpha in record["alpha"])


def test_a_batch_norm_that_takes_a_channel_to_next_to_nothing(tmp_path):
    torch.manual_seed(1)
    network = prepare(MODELS["resnet20_cifar"](), Config(activation_bits=32)).eval()
    with torch.no_grad():
        network.get_submodule("bn1").weight[2] = 1e-36
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 32, 32))
    model = onnx.load(tmp_path / "a.onnx")
    alpha = metadata(model)["weights"]["conv1.weight"]["alpha"]
    (w,) = (
        onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "conv1.weight"
    )
    assert alpha[2] == 1 and not w[2].any() and w[1].any()


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_is_exported_and_the_original_still_trains(tmp_path, method):
    torch.manual_seed(1)
    network = prepare(MODELS["resnet20_cifar"](), Config(method=method, activation_bits=32))
    x = torch.randn(2, 3, 32, 32)
    before = network.eval()(x).detach()
    if method == "stlq":  # the file has what is left after cutting, the network keeps its v
        cut(closed := copy.deepcopy(network))
        assert not torch.equal(cut_output := closed(x).detach(), before)
    export_onnx(network, tmp_path / "a.onnx", torch.zeros(1, 3, 32, 32))
    assert torch.equal(network(x), before)
    network.train()(x).sum().backward()
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (there,) = session.run(None, {"image": x.numpy()})
    expected = cut_output if method == "stlq" else before
    np.testing.assert_allclose(there, expected.numpy(), rtol=1e-3, atol=1e-3)
    recorded = metadata(onnx.load(tmp_path / "a.onnx"))["weights"]
    assert bool(recorded) == (method not in ("apot", "uniform"))
