"""Network definitions: shapes, torchvision's names, tracing, loading of weights."""

import pytest
import safetensors.torch
import torch
from torch import fx, nn

from logshift.trainer.models import MODELS, ModelError, load_weights

INPUTS = {
    "resnet20_cifar": (3, 32, 32),
    "resnet56_cifar": (3, 32, 32),
    "resneta": (3, 32, 32),
    "resnetb": (3, 32, 32),
    "resnetc": (3, 32, 32),
    "resnet18": (3, 64, 64),
    "resnet34": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "resnet101": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "shufflenet_v2": (3, 64, 64),
    "drn_d_54": (3, 64, 64),
    "deeplab_mobilenet_v2": (3, 64, 96),
    "deeplab_resnet50": (3, 64, 96),
    "deeplab_resnet101": (3, 64, 96),
    "deeplab_drn": (3, 64, 96),
    "sid_unet": (4, 32, 48),
}
CIFAR100 = ("resneta", "resnetb", "resnetc")


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
        classes = 10 if "cifar" in name else 100 if name in CIFAR100 else 1000
        assert y.shape == (2, classes)


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


def conv(name, channels_out, channels_in, kernel):
    return {f"{name}.weight": (channels_out, channels_in, kernel, kernel)}


def norm(name, channels):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{kind}": (channels,) for kind in kinds} | {f"{name}.num_batches_tracked": ()}


def linear(name, channels_out, channels_in):
    return {f"{name}.weight": (channels_out, channels_in), f"{name}.bias": (channels_out,)}


def shortcut(name, channels_out, channels_in):
    name = f"{name}.downsample"
    return conv(f"{name}.0", channels_out, channels_in, 1) | norm(f"{name}.1", channels_out)


def bottleneck(name, width, channels_in):
    found = conv(f"{name}.conv1", width, channels_in, 1) | norm(f"{name}.bn1", width)
    found |= conv(f"{name}.conv2", width, width, 3) | norm(f"{name}.bn2", width)
    return found | conv(f"{name}.conv3", 4 * width, width, 1) | norm(f"{name}.bn3", 4 * width)


def torchvision_resnet(blocks, expansion):
    """Return what torchvision/models/resnet.py has in its state dictionaries, 1000 classes."""
    found, channels = conv("conv1", 64, 3, 7) | norm("bn1", 64), 64
    for stage, count in enumerate(blocks, start=1):
        width = 32 * 2**stage
        for number in range(count):
            name = f"layer{stage}.{number}"
            if expansion == 4:
                found |= bottleneck(name, width, channels)
            else:
                found |= conv(f"{name}.conv1", width, channels, 3) | norm(f"{name}.bn1", width)
                found |= conv(f"{name}.conv2", width, width, 3) | norm(f"{name}.bn2", width)
            if number == 0 and (stage > 1 or expansion == 4):
                found |= shortcut(name, expansion * width, channels)
            channels = expansion * width
    return found | linear("fc", 1000, channels)


def torchvision_shufflenet(first, stages, last):
    """Return the same of torchvision/models/shufflenetv2.py."""
    found, channels = conv("conv1.0", first, 3, 3) | norm("conv1.1", first), first
    for stage, (channels_out, count) in enumerate(zip(stages, (4, 8, 4), strict=True), start=2):
        half = channels_out // 2
        for number in range(count):
            name = f"stage{stage}.{number}"
            if number == 0:
                branch = f"{name}.branch1"
                found |= conv(f"{branch}.0", channels, 1, 3) | norm(f"{branch}.1", channels)
                found |= conv(f"{branch}.2", half, channels, 1) | norm(f"{branch}.3", half)
            branch = f"{name}.branch2"
            found |= conv(f"{branch}.0", half, channels if number == 0 else half, 1)
            found |= norm(f"{branch}.1", half) | conv(f"{branch}.3", half, 1, 3)
            found |= norm(f"{branch}.4", half) | conv(f"{branch}.5", half, half, 1)
            found |= norm(f"{branch}.6", half)
        channels = channels_out
    found |= conv("conv5.0", last, channels, 1) | norm("conv5.1", last)
    return found | linear("fc", 1000, last)


def drn_d_54():
    """Return the same of drn_d_54 in fyu/drn's drn.py."""
    found = conv("layer0.0", 16, 3, 7) | norm("layer0.1", 16)
    found |= conv("layer1.0", 16, 16, 3) | norm("layer1.1", 16)
    found |= conv("layer2.0", 32, 16, 3) | norm("layer2.1", 32)
    channels = 32
    for layer, width, count in ((3, 64, 3), (4, 128, 4), (5, 256, 6), (6, 512, 3)):
        for number in range(count):
            found |= bottleneck(f"layer{layer}.{number}", width, channels)
            if number == 0:
                found |= shortcut(f"layer{layer}.{number}", 4 * width, channels)
            channels = 4 * width
    found |= conv("layer7.0", 512, 2048, 3) | norm("layer7.1", 512)
    found |= conv("layer8.0", 512, 512, 3) | norm("layer8.1", 512)
    return found | conv("fc", 1000, 512, 1) | {"fc.bias": (1000,)}


SHUFFLENETS = {  # width: channels, parameters that torchvision counts
    0.5: (24, (48, 96, 192), 1024, 1_366_792),
    1.0: (24, (116, 232, 464), 1024, 2_278_604),
    1.5: (24, (176, 352, 704), 1024, 3_503_624),
    2.0: (24, (244, 488, 976), 2048, 7_393_996),
}
PUBLISHED = [
    ("resnet18", {}, torchvision_resnet((2, 2, 2, 2), 1), 11_689_512),
    ("resnet34", {}, torchvision_resnet((3, 4, 6, 3), 1), 21_797_672),
    ("resnet50", {}, torchvision_resnet((3, 4, 6, 3), 4), 25_557_032),
    ("resnet101", {}, torchvision_resnet((3, 4, 23, 3), 4), 44_549_160),
    ("drn_d_54", {}, drn_d_54(), 35_809_176),
]
PUBLISHED += [
    ("shufflenet_v2", {"width": width}, torchvision_shufflenet(*channels), parameters)
    for width, (*channels, parameters) in SHUFFLENETS.items()
]


@pytest.mark.parametrize("name, options, tensors, parameters", PUBLISHED)
def test_every_name_and_shape_is_as_published(name, options, tensors, parameters, tmp_path):
    model = MODELS[name](**options)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    # A float state dictionary under those names, as it is published.
    state = {n: torch.full(shape, 3.0 if shape else 3) for n, shape in tensors.items()}
    torch.save(state, tmp_path / "float.pth")
    load_weights(model, tmp_path / "float.pth")
    assert all((t == 3).all() for t in model.state_dict().values())


def test_shuffled_channels_come_from_both_halves_by_turns():
    model = MODELS["shufflenet_v2"]().eval()
    unit = model.stage2[1]
    x = torch.randn(2, 116, 8, 6)
    with torch.no_grad():
        y = unit(x)
        assert torch.equal(y[:, ::2], x[:, :58])
        assert torch.equal(y[:, 1::2], unit.branch2(x[:, 58:]))


def test_drn_keeps_a_stride_of_eight():
    low, high = MODELS["drn_d_54"]().features(torch.randn(1, 3, 64, 48))
    assert low.shape == (1, 256, 16, 12)
    assert high.shape == (1, 512, 8, 6)


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
    ("resnet101", "deeplab_resnet101", ("fc.",)),
    ("drn_d_54", "deeplab_drn", ("fc.",)),
])  # fmt: skip
def test_the_backbone_has_published_names(whole, part, left_out):
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
