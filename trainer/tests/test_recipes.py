"""Packaged recipes: the paper's figures and settings, the list, a step of each on tiny sets."""

import json
import re
from pathlib import Path

import onnx
import pytest
from test_data import make_cifar100, make_imagenet, make_voc
from typer.testing import CliRunner

from logshift.trainer import cli
from logshift.trainer.data import open_data
from logshift.trainer.fit import fit, learning_rate
from logshift.trainer.settings import (
    RECIPES,
    Settings,
    SettingsError,
    Training,
    expected,
    read,
    recipes,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DESIGN = REPOSITORY.parent / "shared/design/training.md"
MEASURED = REPOSITORY / "docs/training"

TABLE = {  # of the paper: recipe, its network there
    "resnet18-imagenet": "ResNet-18",
    "resnet34-imagenet": "ResNet-34",
    "resnet50-imagenet": "ResNet-50",
    "mobilenetv2-imagenet": "MobileNetV2",
    "shufflenetv2-imagenet": "ShuffleNetV2",
    "sid-sony": "SID U-Net",
    "deeplab-resnet101-voc": "DeepLabV3+ ResNet-101",
    "deeplab-mobilenetv2-voc": "DeepLabV3+ MobileNetV2",
    "deeplab-drn-voc": "DeepLabV3+ DRN",
}
FLIGHTNN = [f"resnet{letter}-cifar100" for letter in "abc"]


@pytest.mark.skipif(not DESIGN.exists(), reason="needs the paper's table in ../shared")
@pytest.mark.parametrize("name", TABLE)
def test_figures_are_those_of_the_paper(name):
    rows = re.findall(r"^\| (.+?) \(([\d.]+)(?: dB)?\) \| (.*) \|$", DESIGN.read_text(), re.M)
    (row,) = (row for row in rows if row[0] == TABLE[name])
    text = (RECIPES / f"{name}.toml").read_text()
    stated = [row[1], *re.findall(r"\d\d\.\d\d", row[2])]
    assert len(stated) >= 5
    assert sorted(re.findall(r"\b\d\d\.\d\d\b", text)) == sorted(stated)
    # The figure that is expected is the one of the bits and the ratio that the recipe has.
    q = read(name).quantization
    bits = f"{q.weight_bits}-{q.activation_bits}: "
    assert bits in row[2]
    ratios, figures = re.search(rf"(?:{bits})?((?:\d+/?)+): ((?:[\d.]+/?)+)[^:]*$", row[2]).groups()
    if name in ("resnet18-imagenet", "resnet34-imagenet", "resnet50-imagenet"):
        ratios, figures = re.search(rf"{bits}(\d+): ([\d.]+) ", row[2]).groups()
    by_ratio = dict(zip(ratios.split("/"), figures.split("/"), strict=True))
    assert expected(name).startswith(by_ratio[f"{100 * q.residual_ratio:g}"] + " ")
    assert expected(name).endswith(", paper")


@pytest.mark.parametrize("name", [*TABLE, *FLIGHTNN])
def test_settings_are_those_of_the_paper(name):
    chosen = read(name)
    training = chosen.training
    assert training.epochs == 10
    assert training.warmup == 0
    if chosen.data == "sony":
        assert (training.optimiser, training.lr) == ("adam", 1e-5)
        assert chosen.data_options["crop"] == 512
        return
    assert (training.optimiser, training.momentum) == ("sgd", 0.9)
    assert not training.nesterov
    assert training.weight_decay == 1e-6
    if chosen.data == "voc":
        assert (training.schedule, training.lr) == ("poly", 7e-4)
        assert chosen.data_options["crop"] == 513
    else:
        assert (training.schedule, training.lr) == ("cosine", 1e-4)
    if name in FLIGHTNN:
        assert chosen.quantization.residual_ratio == 0.05
        assert chosen.quantization.granularity == "tile"
        assert chosen.quantization.tile == (16, 16)


def test_measured_figures_are_those_of_a_run_with_the_settings_of_the_recipe():
    measured = [n for n in recipes() if expected(n).endswith(", measured")]
    assert measured
    runs = []
    for path in MEASURED.glob("**/settings.json"):
        runs.append((Settings.model_validate_json(path.read_text()), path.parent))

    def about(chosen):
        training = chosen.training
        return (
            chosen.task, chosen.model, chosen.model_options, chosen.data, chosen.quantization,
            training.epochs, training.batch, training.optimiser, training.lr, training.schedule,
        )  # fmt: skip

    for name in measured:
        found = [folder for chosen, folder in runs if about(chosen) == about(read(name))]
        figures = set()
        for folder in found:
            summary = json.loads((folder / "summary.json").read_text())
            for measure, factor in (("top1", 100), ("miou", 100), ("psnr", 1)):
                figures |= {f"{factor * summary[m]:.2f}" for m in [measure] if m in summary}
        assert expected(name).split()[0] in figures, (name, found)


def test_the_list_shows_every_recipe_on_one_line():
    output = CliRunner().invoke(cli.app, ["--list"]).output
    lines = {
        line.split()[0]: " ".join(line.split()) for line in output.splitlines() if line.strip()
    }
    for name in recipes():
        assert expected(name), name
        assert lines[name].startswith(f"{name} {read(name).data} "), output
        assert lines[name].endswith(f" {expected(name)}"), output
    assert lines["mobilenetv2-imagenet"] == (
        "mobilenetv2-imagenet imagenet W3A6 + 50 % 68.92 % top-1, paper"
    )
    assert " W4A8 + 5 % of tiles " in lines["resneta-cifar100"]
    assert " W4A8 + 11.5, 100 % " in lines["deeplab-camvid"]
    assert " float " in lines["resnet20-cifar10-float"]
    order = list(lines)
    for task in ("classification", "segmentation", "enhancement"):
        below = order[order.index(task) + 1 :]
        assert read(below[0]).task == task


def test_what_is_expected_is_no_setting(tmp_path):
    recipe = tmp_path / "a.toml"
    text = (RECIPES / "resnet20-cifar10.toml").read_text()
    recipe.write_text(text)
    assert expected(str(recipe)) == expected("resnet20-cifar10")
    without = re.sub("^expected = .*\n", "", text, flags=re.M)
    recipe.write_text(without)
    assert read(str(recipe)) == read("resnet20-cifar10") and expected(str(recipe)) == ""
    recipe.write_text("expected = 88.7\n" + without)
    with pytest.raises(SettingsError, match=r"a\.toml: expected is 88\.7; it must be a text"):
        expected(str(recipe))
    with pytest.raises(SettingsError, match="expected"):
        read("resnet20-cifar10", ["expected=more"])


def test_learning_rates_rise_and_fall():
    cosine, poly = (Training(lr=0.2, warmup=0.2, schedule=name) for name in ("cosine", "poly"))
    for training in (cosine, poly):
        assert learning_rate(0, training) == pytest.approx(0.002)
        assert learning_rate(0.1, training) == pytest.approx(0.2 * (0.5 * 0.99 + 0.01))
        assert learning_rate(0.2, training) == pytest.approx(0.2)
        assert learning_rate(1, training) == pytest.approx(0)
    assert learning_rate(0.6, cosine) == pytest.approx(0.1)
    assert learning_rate(0.6, poly) == pytest.approx(0.2 * 0.5**0.9)
    assert learning_rate(0.75, Training(lr=1, warmup=0, schedule="poly")) == pytest.approx(
        0.25**0.9
    )


STEPS = [
    ("resneta-cifar100-float", make_cifar100),
    ("resneta-cifar100", make_cifar100),
    ("resnetb-cifar100", make_cifar100),
    ("shufflenetv2-imagenet", make_imagenet),
    ("mobilenetv2-imagenet", make_imagenet),
]
LARGE = [("resnetc-cifar100", make_cifar100)]
LARGE += [(f"resnet{depth}-imagenet", make_imagenet) for depth in (34, 50)]
LARGE += [(f"deeplab-{over}-voc", make_voc) for over in ("resnet101", "mobilenetv2", "drn")]


@pytest.mark.parametrize(
    "recipe, make", STEPS + [pytest.param(*step, marks=pytest.mark.slow) for step in LARGE]
)
def test_recipes_take_a_step(recipe, make, tmp_path):
    options = make(tmp_path)
    changes = ["epochs=1", "batch=4", "calibration=4", "precision='32-true'"]
    chosen = read(recipe, [f"training.{change}" for change in changes])
    summary = fit(chosen, open_data(chosen.data, tmp_path, options), tmp_path / "out")
    assert summary["iterations"] >= 1
    if chosen.quantization is not None:
        ratio = chosen.quantization.residual_ratio
        assert 0.3 * ratio < summary["nzr"] <= ratio  # some second words are zero
    onnx.checker.check_model(onnx.load(tmp_path / "out/model.onnx"), full_check=True)
