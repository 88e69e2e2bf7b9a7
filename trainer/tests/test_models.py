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
    "resnet34": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "resnet101": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "deeplab_mobilenet_v2": (3, 64, 96),
    "deeplab_resnet50": (3, 64, 96),
    "deeplab_resnet101": (3, 64, 96),
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
    "name, parameters, names, tensors",
    [
        (
            "resnet18",
            11_689_512,
            122,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.1.bn2.num_batches_tracked": (),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer2.0.downsample.1.running_var": (128,),
                "layer4.1.conv2.weight": (512, 512, 3, 3),
                "fc.weight": (1000, 512),
                "fc.bias": (1000,),
            },
        ),
        ("resnet34", 21_797_672, 218, {"layer3.5.conv2.weight": (256, 256, 3, 3)}),
        ("resnet101", 44_549_160, 626, {"layer3.22.conv3.weight": (1024, 256, 1, 1)}),
        (
            "resnet50",
            25_557_032,
            320,
            {"layer4.2.conv3.weight": (2048, 512, 1, 1), "layer1.0.bn3.weight": (256,)},
        ),
        (
            "mobilenet_v2",
            3_504_872,
            314,
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
def test_names_and_sizes_are_those_of_torchvision(name, parameters, names, tensors):
    model = MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == names
    assert {n: tuple(state[n].shape) for n in tensors} == tensors


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("stride", [16, 8])
def test_dilation_computes_the_same_features_more_densely(name, stride):
    torch.manual_seed(1)
    plain, dilated = MODELS[name]().eval(), MODELS[name](output_stride=stride).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        coarse, fine = (
            m.features(x) if name == "mobilenet_v2" else m.features(x)[1] for m in (plain, dilated)
        )
    assert coarse.shape[-2:] == (2, 2)
    assert fine.shape[-2:] == (64 // stride, 64 // stride)
    step = 32 // stride
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-3, atol=1e-4)


def test_the_pyramid_dilates_by_the_output_stride():
    for stride, rates in ((16, [6, 12, 18]), (8, [12, 24, 36])):
        model = MODELS["deeplab_mobilenet_v2"](classes=5, width=8, output_stride=stride).eval()
        assert [branch[0].dilation[0] for branch in model.aspp.atrous] == rates
        x = torch.randn(1, 3, 64, 96)
        low, high = model.features(x)
        assert low.shape[-2:] == (16, 24)
        assert high.shape[-2:] == (64 // stride, 96 // stride)
        assert model(x).shape == (1, 5, 64, 96)


@pytest.mark.parametrize("whole, part, left_out", [
    ("mobilenet_v2", "deeplab_mobilenet_v2", ("features.18.", "classifier.")),
    ("resnet50", "deeplab_resnet50", ("fc.",)),
])  # fmt: skip
def test_the_backbone_has_torchvisions_names(whole, part, left_out):
    expected = MODELS[whole]().state_dict()
    found = MODELS[part]().backbone.state_dict()
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in expected.items() if not n.startswith(left_out)
    }


def test_names_and_sizes_of_the_unet():
    state = MODELS["sid_unet"]().state_dict()
    names = [f"conv{i}_{j}" for i in range(1, 10) for j in (1, 2)] + ["conv10_1"]
    names += [f"upv{i}" for i in range(6, 10)]
    assert set(state) == {f"{n}.{kind}" for n in names for kind in ("weight", "bias")}
    assert state["conv5_1.weight"].shape == (512, 256, 3, 3)
    assert state["upv6.weight"].shape == (512, 256, 2, 2)
    assert state["conv6_1.weight"].shape == (256, 512, 3, 3)
    assert state["conv10_1.weight"].shape == (12, 32, 1, 1)


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
    torch.save([torch.zeros(1)], tmp_path / "d.pth")
    torch.save({"state_dict": torch.zeros(1)}, tmp_path / "e.pth")
    for name in ("b.pth", "c.pth", "d.pth", "e.pth", "none.pth"):
        with pytest.raises(ModelError, match=f"{name}: cannot be read"):
            load_weights(model, tmp_path / name)
    with pytest.raises(ModelError, match="'body' is no part of the model, such as conv1, bn1"):
        load_weights(model, tmp_path / "a.pth", part="body")
