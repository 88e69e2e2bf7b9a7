"""Runs: logs, checkpoints, going on, accumulation, two processes, the command."""

import csv
import json
import os
import subprocess
import sys
import warnings

import onnx
import pytest
import torch
from conftest import Blobs, small
from test_data import (
    make_camvid,
    make_cifar10,
    make_imagenet,
    make_sony,
    make_voc,
    read_long,
    read_short,
)
from typer.testing import CliRunner

from logshift.trainer import cli
from logshift.trainer.data import DataError, open_data
from logshift.trainer.fit import RunError, fading_rate, fit, step_all
from logshift.trainer.settings import RECIPES, Settings, SettingsError, read, recipes


def settings(**changes):
    training = {"epochs": 3, "batch": 16, "lr": 0.05, "calibration": 16, "threads": 1}
    quantization = {"weight_bits": 3, "activation_bits": 4}
    values = {"task": "classification", "model": "small", "data": "blobs"}
    values |= {
        "training": training | changes.pop("training", {}),
        "quantization": quantization | changes.pop("quantization", {}),
    }
    return Settings.model_validate(values | changes)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parameters(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["network"]


def test_a_run_learns_and_leaves_everything(blobs, models, tmp_path):
    # In so few steps the rate of v is high; a higher lambda makes it less.
    chosen = settings(quantization={"regularisation": 0.1})
    summary = fit(chosen, blobs, tmp_path)
    assert summary["top1"] > 0.8
    iterations, epochs = rows(tmp_path / "iterations.csv"), rows(tmp_path / "epochs.csv")
    assert [int(r["iteration"]) for r in iterations] == list(range(1, 13))
    assert [int(r["epoch"]) for r in epochs] == [1, 2, 3]
    assert float(epochs[-1]["top1"]) == pytest.approx(summary["top1"])
    ours = {"regulariser", "nzr", *(f"v_{part}" for part in ("mean", 5, 25, 50, 75, 95))}
    assert set(iterations[0]) == {"iteration", "loss", "top1", "lr", *ours}
    nzr = [float(r["nzr"]) for r in iterations]
    assert nzr[0] > 0.2 and 0.05 < nzr[-1] <= 0.15
    assert 0.05 < summary["nzr"] <= 0.15
    assert 0.5 < float(iterations[0]["v_5"]) <= float(iterations[0]["v_95"]) <= 1
    assert float(iterations[-1]["v_mean"]) < 0.01
    assert float(iterations[-1]["loss"]) < float(iterations[0]["loss"])
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary["layers"]) == {"0", "3", "8"}
    assert Settings.model_validate_json((tmp_path / "settings.json").read_text()) == chosen
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


def test_without_quantization_a_float_network_is_trained(blobs, models, tmp_path):
    chosen = settings().model_copy(update={"quantization": None})
    summary = fit(chosen, blobs, tmp_path)
    assert summary["top1"] > 0.8
    assert set(rows(tmp_path / "iterations.csv")[0]) == {"iteration", "loss", "top1", "lr"}
    model = onnx.load(tmp_path / "model.onnx")
    assert not [n for n in model.graph.node if n.op_type == "QuantizeLinear"]


def test_mixed_precision_is_for_training_alone(blobs, monkeypatch, tmp_path):
    seen = set()

    class Looking(torch.nn.Sequential):
        def forward(self, x):
            seen.add((self.training, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    monkeypatch.setattr("logshift.trainer.fit.MODELS", {"small": lambda **o: Looking(*small(**o))})
    chosen = settings(training={"precision": "bf16-mixed"})
    summary = fit(chosen.model_copy(update={"quantization": None}), blobs, tmp_path)
    assert seen - {(False, False)} == {(True, True)}  # the first is exported, too
    assert summary["top1"] > 0.8


def test_measured_now_and_then_and_at_the_end(blobs, models, tmp_path):
    summary = fit(settings(training={"measure_every": 2}), blobs, tmp_path)
    assert [int(r["epoch"]) for r in rows(tmp_path / "epochs.csv")] == [2, 3]
    assert float(rows(tmp_path / "epochs.csv")[1]["top1"]) == pytest.approx(summary["top1"])


def test_classes_are_weighed_by_their_shares(tmp_path):
    options = make_camvid(tmp_path)
    data = open_data("camvid", tmp_path, options)
    labels = torch.cat([target for _, target in (data.example(i, None) for i in data.train_items)])
    shares = torch.stack([(labels == c).sum() for c in range(11)]) / (labels < 11).sum()
    torch.testing.assert_close(data.class_shares(), shares.double())

    chosen = read("deeplab-camvid-float", ["training.epochs=1", "training.batch=4"])
    chosen = chosen.model_copy(update={"data_options": options})
    losses = []
    for balance in (True, False):
        training = chosen.training.model_copy(update={"balance_classes": balance, "threads": 1})
        out = tmp_path / str(balance)
        fit(chosen.model_copy(update={"training": training}), data, out)
        losses.append(float(rows(out / "iterations.csv")[0]["loss"]))
    assert losses[0] != losses[1]
    with pytest.raises(DataError, match="shares of its classes"):
        Blobs().class_shares()


class Stopped(Exception):
    pass


def test_lambda_pulls_errors_to_the_grid(blobs, models, tmp_path):
    left = []
    for strength in (0, 0.1):
        penalty = {"method": "residual_penalty", "regularisation": strength, "refresh": 3}
        fit(settings(quantization=penalty), blobs, tmp_path / str(strength))
        left.append(float(rows(tmp_path / str(strength) / "iterations.csv")[-1]["regulariser"]))
    assert left[1] < 0.5 * left[0]


def test_the_penalty_selects_anew(blobs, models, tmp_path):
    found = []
    for refresh in (1, 100):
        penalty = {"method": "residual_penalty", "refresh": refresh}
        fit(settings(quantization=penalty), blobs, tmp_path / str(refresh))
        state = parameters(tmp_path / str(refresh))
        found.append([value for name, value in state.items() if name.endswith(".selected")])
    assert found[0] and not all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_network_that_was_not_trained_before_is_told_of(blobs, models, tmp_path):
    chosen = settings(training={"epochs": 1})
    with pytest.warns(UserWarning, match="small is quantized before it was trained"):
        fit(chosen, blobs, tmp_path / "untrained")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "small is quantized")
        fit(chosen, blobs, tmp_path / "untrained", resume=True)
        fit(chosen.model_copy(update={"quantization": None}), blobs, tmp_path / "float")
        weights = {"weights": tmp_path / "float/checkpoint.pt"}
        fit(chosen.model_copy(update=weights), blobs, tmp_path / "trained")


def test_v_is_never_more_than_one_and_does_not_explode(blobs, models, tmp_path):
    summary = fit(settings(quantization={"regularisation": 1e-7}), blobs, tmp_path)
    assert all(float(row["v_95"]) <= 1 for row in rows(tmp_path / "iterations.csv"))
    assert summary["top1"] > 0.5
    with pytest.raises(ValueError, match="regularisation is 0: .* give v_lr"):
        settings(quantization={"regularisation": 0})
    kept = settings(quantization={"regularisation": 0, "v_lr": 0.1})
    assert fit(kept, blobs, tmp_path / "kept")["nzr"] <= 0.15
    with pytest.raises(RunError, match="nothing would fade"):
        fading_rate(0.0, [1.0])


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 10.0])
def test_the_ratio_asked_for_is_reached_whatever_lambda(blobs, models, tmp_path, strength):
    wanted = {"weight_bits": 5, "residual_ratio": 0.2, "regularisation": strength, "v_lr": 0.05}
    summary = fit(settings(quantization=wanted), blobs, tmp_path)
    assert 0.17 < summary["nzr"] <= 0.2
    left = float(rows(tmp_path / "iterations.csv")[-1]["v_mean"])
    assert (left > 0.5) == (strength < 10)


@pytest.mark.parametrize("after, every", [(2, 1), (5, 1), (7, 3), (7, 100)])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(blobs, models, tmp_path, after, every):
    chosen = settings(training={"checkpoint_every": every})
    fit(chosen, blobs, tmp_path / "whole")

    class Stopping(type(blobs)):
        def train(self, epoch, *arguments):
            for number, batch in enumerate(super().train(epoch, *arguments)):
                if epoch * 4 + number == after:
                    raise Stopped
                yield batch

    with pytest.raises(Stopped):
        fit(chosen, Stopping(), tmp_path / "parts")
    # A row of a step that no checkpoint has, as after a crash.
    with (tmp_path / "parts/iterations.csv").open("a") as file:
        file.write(f"{after + 1}{11 * ',9'}\r\n{after + 2},9")
    with pytest.raises(RunError, match="--resume"):
        fit(chosen, blobs, tmp_path / "parts")
    fit(chosen, blobs, tmp_path / "parts", resume=True)
    whole, parts = parameters(tmp_path / "whole"), parameters(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [tmp_path / folder / "iterations.csv" for folder in ("whole", "parts")]
    assert logs[0].read_text() == logs[1].read_text()


def test_a_run_that_begins_again_has_new_logs(blobs, models, tmp_path):
    fit(settings(), blobs, tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    fit(settings().model_copy(update={"quantization": None}), blobs, tmp_path)
    found = rows(tmp_path / "iterations.csv")
    assert len(found) == 12 and set(found[0]) == {"iteration", "loss", "top1", "lr"}


def test_a_checkpoint_that_cannot_be_read(blobs, models, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match="checkpoint.pt cannot be read"):
        fit(settings(), blobs, tmp_path, resume=True)


def test_other_settings_are_another_run(blobs, models, tmp_path):
    fit(settings(training={"epochs": 1}), blobs, tmp_path)
    with pytest.raises(RunError, match=r"other settings \(training.lr\)"):
        fit(settings(training={"epochs": 1, "lr": 0.01}), blobs, tmp_path, resume=True)


@pytest.mark.parametrize("method", [None, "uniform", "stlq"])
def test_checkpoints_of_older_versions(blobs, models, method, tmp_path):
    quantization = None if method is None else {"method": method}
    chosen = settings(training={"epochs": 1}, **({"quantization": quantization} if method else {}))
    if method is None:
        chosen = chosen.model_copy(update={"quantization": None})
    fit(chosen, blobs, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    said = json.loads(saved["settings"])
    for name in ("nesterov", "schedule", "threads", "checkpoint_every", "devices"):
        del said["training"][name]
    if method is not None:
        del said["quantization"]["scale"], said["quantization"]["v_lr"]
        said["quantization"]["tile"] = 16
    saved["optimiser"] = saved.pop("optimisers")[0]
    names = {name: name.replace(".selected", ".second") for name in saved["network"]}
    saved["network"] = {names[n]: v for n, v in saved["network"].items() if not n.endswith(".v")}
    torch.save(saved | {"settings": json.dumps(said)}, checkpoint)
    if method == "stlq":
        with pytest.raises(RunError, match="another version of logshift-trainer, with other net"):
            fit(chosen, blobs, tmp_path, resume=True)
    else:
        assert fit(chosen, blobs, tmp_path, resume=True)["iterations"] == 4
    torch.save(saved | {"settings": json.dumps(said | {"colour": "red"})}, checkpoint)
    with pytest.raises(RunError, match="another version of logshift-trainer, with other settings"):
        fit(chosen, blobs, tmp_path, resume=True)


def test_optimisers_share_a_scale():
    """On an overflow nobody makes a step; a scale that grows does so once for all."""
    parameters = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]

    class SetUp:  # as Fabric wraps them
        def __init__(self, parameter):
            self.optimizer = torch.optim.SGD([parameter], 1.0)

    both = [SetUp(parameter) for parameter in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    for gradients, expected, scale in (
        ((1.0, 1.0), (-1.0, -1.0), 4.0),
        ((1.0, 1.0), (-2.0, -2.0), 8.0),
        ((torch.inf, torch.inf), (-2.0, -2.0), 4.0),
        ((1.0, 2.0), (-3.0, -4.0), 4.0),
    ):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = scaler.scale(torch.tensor(gradient))
        step_all(both, scaler)
        assert tuple(float(p.detach()) for p in parameters) == expected
        assert scaler.get_scale() == scale


def test_accumulation_makes_the_same_steps(blobs, models, tmp_path):
    frozen = {"freeze_batch_norm": True, "epochs": 1}
    fit(settings(training=frozen), blobs, tmp_path / "1")
    fit(settings(training=frozen | {"accumulate": 2}), blobs, tmp_path / "2")
    one, two = parameters(tmp_path / "1"), parameters(tmp_path / "2")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training": {"batch": 15, "accumulate": 2}}, "multiple of accumulate"),
        ({"training": {"batch": 128}}, "there are 64 examples"),
        ({"model": "large"}, "'large' is none of small"),
        ({"model_options": {"depth": 3}}, "model_options of small"),
        ({"training": {"accelerator": "nothing"}}, "accelerator 'nothing'"),
    ],
)
def test_runs_that_cannot_start(blobs, models, tmp_path, changes, message):
    with pytest.raises(RunError, match=message):
        fit(settings(**changes), blobs, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_loss_that_is_no_number(blobs, models, tmp_path):
    blobs.x[:64] = torch.nan
    with pytest.raises(RunError, match="loss is nan at step 1"):
        fit(settings().model_copy(update={"quantization": None}), blobs, tmp_path)


def command(*arguments, processes=1):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "logshift.trainer.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_two_processes_train_the_same_network_as_one(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_cifar10(data)
    common = ["resnet20-cifar10", "--data", str(data)]
    # Statistics of a batch are those of each process, so batch norms keep theirs.
    for change in ("epochs=2", "batch=4", "freeze_batch_norm=true", "accelerator='cpu'"):
        common += ["--set", f"training.{change}"]
    for devices in (1, 2):
        out = str(tmp_path / str(devices))
        done = command(*common, "--out", out, "--set", f"training.devices={devices}")
        assert done.returncode == 0, done.stderr
    one, two = parameters(tmp_path / "1"), parameters(tmp_path / "2")
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    assert rows(tmp_path / "1/epochs.csv")[1]["top1"] == rows(tmp_path / "2/epochs.csv")[1]["top1"]


def test_the_command(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    make_cifar10(data)
    run = CliRunner().invoke
    short = ["--set", "training.epochs=1", "--set", "training.batch=4"]
    arguments = ["resnet20-cifar10", "--data", str(data), "--out", str(tmp_path / "out"), *short]
    done = run(cli.app, [*arguments, "--set", "quantization.weight_bits=3"])
    assert done.exit_code == 0, done.output
    assert "bits_per_weight" in done.output and "layer3.2.conv2" in done.output
    written = json.loads((tmp_path / "out/settings.json").read_text())
    assert written["quantization"]["weight_bits"] == 3

    for changed, message in (
        (arguments, "--resume"),
        (["nothing", *arguments[1:]], "packaged recipes are"),
        ([*arguments[:2], str(tmp_path), *arguments[3:]], "cifar10-train.parquet"),
        ([*arguments, "--set", "quantization.weight_bits=7"], "quantization.weight_bits"),
        ([*arguments, "--set", "quantization.depth=7"], "quantization.depth"),
        ([*arguments, "--out", str(tmp_path / "b"), "--weights", "no.pth"], "no.pth: cannot be"),
    ):
        failed = run(cli.app, changed)
        assert failed.exit_code == 1
        assert message in failed.output
        assert "Traceback" not in failed.output
    assert "resnet20-cifar10" in run(cli.app, ["--list"]).output


@pytest.mark.parametrize("name", recipes())
def test_packaged_recipes_are_valid(name):
    assert read(name)
    assert (RECIPES / f"{name}.toml").read_text().startswith("# ")


def test_settings_that_cannot_be_read(tmp_path):
    (tmp_path / "a.toml").write_text("task = ")
    dotted = 'quantization.layers."layer1.0.conv1".weight_bits=5'
    chosen = read("resnet20-cifar10", [dotted, "data=other data"])
    assert chosen.quantization.layers["layer1.0.conv1"].weight_bits == 5
    assert chosen.data == "other data"
    for recipe, changes, message in (
        ("resnet20-cifar10", ["a b=1"], "a b is no key"),
        ("resnet20-cifar10", ["training.seed=-1"], "training.seed"),
        (str(tmp_path / "a.toml"), [], "a.toml"),
        ("resnet20-cifar10", ["lr"], "key=value"),
        ("resnet20-cifar10", ["model.depth=1"], "model is a value"),
    ):
        with pytest.raises(SettingsError, match=message):
            read(recipe, changes)


SQUARES = {  # which the U-Net can halve four times
    "crop": 16,
    "short": lambda path: read_short(path)[:, :32],
    "long": lambda path: read_long(path)[:, :32],
}


@pytest.mark.parametrize(
    "recipe, make, options",
    [
        ("resnet18-imagenet", make_imagenet, {}),
        pytest.param("deeplab-voc", make_voc, {}, marks=pytest.mark.slow),
        ("sid-sony", make_sony, SQUARES),
    ],
)
def test_recipes_for_sets_that_are_not_here_take_a_step(recipe, make, options, tmp_path):
    options = make(tmp_path) | options
    changes = ["epochs=1", "batch=4", "calibration=4", "precision='32-true'", "accumulate=1"]
    chosen = read(recipe, [f"training.{change}" for change in changes])
    summary = fit(chosen, open_data(chosen.data, tmp_path, options), tmp_path / "out")
    assert summary["iterations"] >= 1 and summary["nzr"] > 0.05
    onnx.checker.check_model(onnx.load(tmp_path / "out/model.onnx"), full_check=True)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet20_cifar", {"shortcut": "padd"}, "shortcut"),
        ("mobilenet_v2", {"output_stride": 4}, "output_stride"),
        ("resnet50", {"output_stride": 4}, "output_stride"),
        ("deeplab_mobilenet_v2", {"output_stride": 32}, "output_stride"),
    ],
)
def test_options_that_a_model_does_not_take(blobs, name, options, message, tmp_path):
    chosen = settings(model=name, model_options=options)
    with pytest.raises(RunError, match=f"model_options of {name}: {message}"):
        fit(chosen, blobs, tmp_path)
