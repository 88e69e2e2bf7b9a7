"""The runs behind docs/training.md: their list, what is measured of one, and the report."""

import json
import shutil

import pytest
from test_data import make_cifar10

from logshift.trainer import settings
from logshift.trainer.data import open_data
from logshift.trainer.fit import fit

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
    for name, changes in (("table/w4a8", []), ("table/w4a8-0", ["quantization.residual_ratio=0"])):
        fit(settings.read("resnet20-cifar10", small + changes), pictures, out / name)
    training_runtime.ROUNDS, training_runtime.SECONDS = 2, 0.01
    result = training_runtime.measure(out / "table/w4a8", data)
    (out / "table/w4a8/runtime.json").write_text(json.dumps(result))
    return out, result


def test_a_run_is_measured_in_the_runtime(finished):
    out, result = finished
    assert (out / "table/w4a8/model.stlq").stat().st_size == result["bytes"]
    assert result["furthest_from_reference"] == 0
    assert result["other_class_than_reference"] == 0
    assert result["classes_compared"] == 5
    assert result["codes_within_one"] > 0.99
    assert result["speed_1"]["ratio"] > 0
    assert result["runtime"]["top1"] == pytest.approx(result["pytorch"]["top1"], abs=0.21)


def test_the_report_is_made_of_the_logs(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks import training_report

    out, result = finished
    shutil.copy(training_report.PAGE, tmp_path / "training.md")
    monkeypatch.setattr(training_report, "LOGS", tmp_path / "training")
    monkeypatch.setattr(training_report, "PAGE", tmp_path / "training.md")
    training_report.archive(out)
    monkeypatch.setattr("sys.argv", ["training_report"])
    training_report.main()
    text = (tmp_path / "training.md").read_text()
    lines = text[text.index("<!-- bits -->") :].splitlines()
    line = next(x for x in lines if x.startswith("| W4A8 + 15 %"))
    (other,) = (x for x in lines if x.startswith("| W4A8 + 0 %"))
    assert f"{result['bytes']:,}" in line and "0 / 0" in line
    assert other.split("|")[3].strip() == "0.00"
    training_report.main()
    assert (tmp_path / "training.md").read_text() == text
    assert "weights" in (tmp_path / "training/table/w4a8/settings.json").read_text()
