"""The runs behind docs/training.md: their list, what is measured of one, and the report."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_camvid, make_cifar10, make_low_light
from torch import nn

from logshift.trainer import settings
from logshift.trainer.data import open_data
from logshift.trainer.fit import fit
from logshift.trainer.models import MODELS

pytest.importorskip("logshift.converter", reason="needs the package logshift")
runs = pytest.importorskip("benchmarks.training_runs", reason="run from the repository's root")


def test_all_runs_have_settings_and_a_beginning():
    found = runs.cases()
    names = [run.name for run in found]
    assert len(set(names)) == len(names) > 30
    for number, run in enumerate(found):
        settings.read(run.recipe, run.changes)
        assert run.begins in ("", "resnet20-cifar10.safetensors", *names[:number])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two small runs, as `training_runs` leaves them, one of them measured."""
    from benchmarks import training_runtime

    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    make_cifar10(data)
    small = ["training.epochs=1", "training.batch=4", "training.threads=1"]
    pictures = open_data("cifar10", data)
    none = "quantization.residual_ratio=0"
    for name, changes in (("longer/w4a8-3", []), ("table/w4a8-0/seed1", [none])):
        chosen = settings.read("resnet20-cifar10", small + changes)
        torch.save(MODELS[chosen.model](shortcut="pad").state_dict(), out / "float.pt")
        chosen = chosen.model_copy(update={"weights": out / "float.pt"})
        fit(chosen, pictures, out / name)
    training_runtime.ROUNDS, training_runtime.SECONDS = 2, 0.01
    result = training_runtime.measure(out / "longer/w4a8-3", data)
    result |= training_runtime.speeds(out / "longer/w4a8-3", data)
    (out / "longer/w4a8-3/runtime.json").write_text(json.dumps(result))
    return out, result


def test_a_run_is_measured_in_the_runtime(finished):
    out, result = finished
    assert (out / "longer/w4a8-3/model.stlq").stat().st_size == result["bytes"]
    assert result["furthest_from_reference"] == 0
    assert result["other_class_than_reference"] == 0
    assert result["classes_compared"] == 5
    assert result["codes_within_one"] > 0.99
    assert result["codes_within_one_of_float64"] > 0.99
    assert result["speed_1"]["ratio"] > 0
    assert result["runtime"]["top1"] == pytest.approx(result["pytorch"]["top1"], abs=0.21)


def test_the_report_is_made_of_the_logs(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import training_report

    out, result = finished
    shutil.copy(training_report.PAGE, tmp_path / "training.md")
    monkeypatch.setattr(training_report, "LOGS", tmp_path / "training")
    monkeypatch.setattr(training_report, "PAGE", tmp_path / "training.md")
    monkeypatch.setattr("sys.argv", ["training_report", "--archive", str(out)])
    training_report.main()
    text = (tmp_path / "training.md").read_text()
    table = text[text.index("<!-- longer -->") : text.index("<!-- bits -->")]
    line = next(x for x in table.splitlines() if x.startswith("| W4A8 + 15 %"))
    assert f"{result['bytes']:,}" in line and "0 of 5" in line
    assert "W4A8 + 5 %" not in text  # of which there is no run
    (line,) = (x for x in text.splitlines() if x.startswith("| W4A8 + 0 %"))
    assert "±" not in line
    shutil.copytree(out / "longer/w4a8-3", out / "cifar10-float")
    for seed in (2, 3):
        shutil.copytree(out / "table/w4a8-0/seed1", out / f"table/w4a8-0/seed{seed}")
    training_report.main()
    text = (tmp_path / "training.md").read_text()
    (line,) = (x for x in text.splitlines() if x.startswith("| W4A8 + 0 %"))
    assert "| residual penalty, W4A8 + 15 % below float | at most 0.2 | 0.00 | 1 | " in text
    assert "| `table` | 3 | " in text
    top1, nzr = (cell.strip() for cell in line.split("|")[2:4])
    assert top1.endswith("0 ± 0.00") and nzr == "0.00"
    training_report.main()
    assert (tmp_path / "training.md").read_text() == text
    archived = json.loads((tmp_path / "training/longer/w4a8-3/settings.json").read_text())
    assert archived["weights"] is None


@pytest.mark.parametrize("name, make", [("camvid", make_camvid), ("low_light", make_low_light)])
def test_panels_show_inputs_truth_and_outputs(name, make, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import training_panels

    (tmp_path / "data").mkdir()
    options = make(tmp_path / "data")
    data = open_data(name, tmp_path / "data", options)
    x, truth = data.example(data.test_items[1], None)

    def right(_):  # a network that makes no mistakes
        if data.labels:
            return (truth == torch.arange(len(data.labels))[:, None, None]).float()[None].numpy()
        return truth[None].numpy()

    runs = {"float": tmp_path / "a", "W4": tmp_path / "b"}
    for folder in runs.values():
        folder.mkdir()
        training_panels.save(folder, data, (1,), right)
    (shown,) = (tmp_path / "a/panels").glob("1-input.*")
    (expected,) = (tmp_path / "a/panels").glob("1-truth.*")
    (output,) = (tmp_path / "a/panels").glob("1-output.*")
    assert Image.open(shown).size == Image.open(output).size == tuple(truth.shape[:-3:-1])
    counted = np.asarray(Image.open(expected)) < 255
    same = np.asarray(Image.open(output)) == np.asarray(Image.open(expected))
    assert same[counted].all() and counted.any()
    training_panels.draw(tmp_path / "figure.jpg", runs, data.labels)
    width, height = Image.open(tmp_path / "figure.jpg").size
    assert width > 2 * height  # four columns, one row


@torch.no_grad()
def test_demo_network_computes_what_the_padded_one_does():
    from benchmarks.demo_network import with_convolutions

    torch.manual_seed(0)
    padded, x = MODELS["resnet20_cifar"](shortcut="pad"), torch.randn(8, 3, 32, 32)
    for norm in (module for module in padded.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    padded(x)
    network = with_convolutions(padded.eval(), x)
    torch.testing.assert_close(network(x), padded(x))
    # In training, too; but variances of a batch divide by n, running ones by n - 1.
    torch.testing.assert_close(network.train()(x), padded.train()(x), rtol=0.02, atol=0.02)
