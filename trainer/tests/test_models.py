"""Network definitions: shapes, torchvision's names, tracing, loading of weights."""

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from logshift.trainer.models import MODELS, ModelError, load_weights

INPUTS = {
    "resnet20_cifar": (3, 32, 32),
    "resnet56_cifar": (3, 32, 32),
    "resnet18": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "deeplab_mobilenet_v2": (3, 64, 96),
    "deeplab_resnet50": (3, 64, 96),
    "sid_unet": (4, 32, 48),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_tracing(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    x = torch.randn(2, *INPUTS[name])
    with torch.no_grad():
        y = model(x)
        traced = fx.symbolic_trace(model)(x)
    assert torch.equal(y, traced)
    _, h, w = INPUTS[name]
    if name.startswith("deeplab"):
        assert y.shape == (2, 21, h, w)
    elif name == "sid_unet":
        assert y.shape == (2, 3, 2 * h, 2 * w)
    else:
        assert y.shape == (2, 10 if "cifar" in name else 1000)


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("resnet18", 11_689_512, {"layer2.0.downsample.1.running_var": (128,), "fc.bias": (1000,)}),
        (
            "resnet50",
            25_557_032,
            {"layer4.2.conv3.weight": (2048, 512, 1, 1), "layer1.0.bn3.weight": (256,)},
        ),
        (
            "mobilenet_v2",
            3_504_872,
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.0.0.weight": (32, 1, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.17.conv.1.0.weight": (960, 1, 3, 3),
                "features.17.conv.3.running_mean": (320,),
                "features.18.0.weight": (1280, 320, 1, 1),
                "classifier.1.weight": (1000, 1280),
            },
        ),
    ],
)
def test_names_and_sizes_are_those_of_torchvision(name, parameters, tensors):
    model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    assert {n: tuple(state[n].shape) for n in tensors} == tensors


def test_dilation_keeps_the_weights_and_the_size():
    torch.manual_seed(1)
    plain, dilated = MODELS["mobilenet_v2"](), MODELS["mobilenet_v2"](output_stride=16)
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert plain.features(x).shape[-2:] == (2, 2)
    assert dilated.features(x).shape[-2:] == (4, 4)


def test_the_two_shortcuts():
    padded = MODELS["resnet20_cifar"](shortcut="pad")
    block = padded.layer2[0].downsample
    x = torch.randn(1, 16, 8, 8)
    y = block(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()
    assert sum(p.numel() for p in padded.parameters()) == 269_722


def test_weights_are_loaded_from_usual_files(tmp_path):
    torch.manual_seed(1)
    model = MODELS["resnet20_cifar"]()
    state = {
        name: torch.randn_like(t.float()).to(t.dtype) for name, t in model.state_dict().items()
    }
    renamed = {"module." + n.replace("fc.", "linear."): t for n, t in state.items()}
    torch.save({"state_dict": renamed}, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        model = MODELS["resnet20_cifar"]()
        load_weights(model, tmp_path / name)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())


def test_weights_of_a_part(tmp_path):
    backbone = MODELS["mobilenet_v2"](classes=7)
    torch.save(backbone.state_dict(), tmp_path / "b.pth")
    model = MODELS["deeplab_mobilenet_v2"](classes=5, width=8)
    load_weights(model, tmp_path / "b.pth", part="backbone")
    loaded = model.state_dict()["backbone.features.3.conv.0.0.weight"]
    assert torch.equal(loaded, backbone.features[3].conv[0][0].weight)


def test_weights_that_do_not_fit(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "odd": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"nothing")
    torch.save(nn.Linear(1, 1), tmp_path / "c.pth")
    model = MODELS["resnet20_cifar"]()
    with pytest.raises(ModelError, match=r"missing bn1.*unexpected odd; shape conv1.weight \(1,\)"):
        load_weights(model, tmp_path / "a.pth")
    for name in ("b.pth", "c.pth", "none.pth"):
        with pytest.raises(ModelError, match=f"{name}: cannot be read"):
            load_weights(model, tmp_path / name)
