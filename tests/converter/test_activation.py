"""Activation functions: fits and what they are recognised as, when they fuse, and back to ONNX."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import oracle
from support.onnx_nets import Net, noise, operations, reference

onnx = pytest.importorskip("onnx", reason="needs the extra `converter`")
pytest.importorskip("onnxruntime", reason="needs the extra `converter`")
from onnx import helper  # noqa: E402

from logshift.converter import convert  # noqa: E402
from logshift.converter.activation import activation, codes  # noqa: E402
from logshift.converter.calibrate import choose_quantization  # noqa: E402
from logshift.converter.export import export  # noqa: E402
from logshift.converter.function import Function  # noqa: E402
from logshift.runtime import Session  # noqa: E402
from logshift.runtime.file import format as packed_format  # noqa: E402
from logshift.runtime.graph import Quantization  # noqa: E402

RANGES = [(-0.5, 0.5), (-2, 1), (-3, 3), (-8, 8), (-1, 12), (-40, 20), (-100, 100), (-1000, 500)]


def function(*steps, opset=20):
    """The function that some operators compute one after the other; "x" stands for its input.

    steps : (operator, other inputs, attributes); inputs are numbers, or "x"
    """
    nodes, constants, name = [], {}, "x"
    for index, (op, others, attributes) in enumerate(steps):
        inputs = [name]
        for other in others:
            if other != "x":
                other, value = f"c{len(constants)}", np.array(other, np.float32)
                constants[other] = value if value.ndim == 0 else value.reshape(-1, 1, 1)
            inputs.append(other)
        name = f"y{index}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
    return Function("x", name, nodes, constants, opset)


def single(op, *others, **attributes):
    return function((op, others, attributes))


def range_of(f, low, high, bits=8):
    """The quantization of a function's values in a range."""
    y = f.values(np.linspace(low, high, 4001)).astype(np.float32)
    return choose_quantization(y, bits, "minmax", 100.0)


def error(found, f, q, x):
    """By how many codes it is wrong before it is rounded."""
    expected = f.values(x) / q.scale + q.zero_point
    return np.abs(np.clip(codes(found, x), 0, q.top) - np.clip(expected, 0, q.top)).max()


# --- fits ---------------------------------------------------------------------------------------

SILU = function(("Sigmoid", (), {}), ("Mul", ("x",), {}))
# With the most codes that they are wrong by: in ranges of usual layers, and in any.
FITTED = {
    "SiLU": (SILU, 0.13, 0.3),
    "Gelu": (single("Gelu"), 0.16, 0.16),
    "Gelu by Tanh": (single("Gelu", approximate="tanh"), 0.16, 0.16),
    "Mish": (single("Mish"), 0.22, 0.33),
    "Sigmoid": (single("Sigmoid"), 0.14, 0.14),
    "Tanh": (single("Tanh"), 0.12, 0.12),
    "Erf": (single("Erf"), 0.06, 0.06),
    "Elu": (single("Elu"), 0.16, 0.35),
    "Elu, alpha": (single("Elu", alpha=0.5), 0.08, 0.14),
    "Selu": (single("Selu"), 0.22, 0.36),
    "Celu": (single("Celu", alpha=2.0), 0.1, 0.3),
    "Softplus": (single("Softplus"), 0.06, 0.2),
    "square": (single("Mul", "x"), 0.02, 0.02),
}


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("name", FITTED)
def test_fits(name, span):
    f, usual, most = FITTED[name]
    low, high = span
    worst = most if max(-low, high) > 40 else usual
    q = range_of(f, low, high)
    found = activation(f, q, low, high)
    assert found.op == "Piecewise"
    margin = (high - low) / 5
    assert error(found, f, q, np.linspace(low - margin, high + margin, 20011)) <= worst
    # However far it goes on, codes stay what they are at the ends, if these have been seen.
    far = np.geomspace(20 * max(-low, high, 8), 1e6, 50)
    if min(-low, high) >= 8:
        assert error(found, f, q, np.concatenate([-far, far])) <= 0.5


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_codes_take_less(bits):
    q = range_of(SILU, -8, 8, bits)
    assert error(activation(SILU, q, -8, 8), SILU, q, np.linspace(-8, 8, 999)) <= 0.05


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("round", single("Round")),
        ("sign", single("Sign")),
        ("floor", single("Floor")),
        ("many waves", single("Sin")),
        ("two bends", function(("Abs", (), {}), ("Sub", (2.3,), {}), ("Abs", (), {}))),
        ("not finite", single("Log")),
        ("by channels", single("Pow", [2.0, 3.0])),
    ],
)
def test_what_has_no_fit(name, f):
    y = f.values(np.linspace(-12.0, 9.0, 999)).astype(np.float32)
    q = choose_quantization(y[np.isfinite(y)], 8, "minmax", 100.0)
    assert activation(f, q, -12.0, 9.0) is None


# --- formulas -----------------------------------------------------------------------------------


def hard_swish(origin, unit):
    gate = [("Sub", (origin,), {}), ("Div", (unit,), {}), ("Clip", (0.0, 1.0), {})]
    return function(*gate, ("Mul", ("x",), {}))


@pytest.mark.parametrize("size", [0.3, 5.0, 300.0])
@pytest.mark.parametrize(
    ("f", "slopes"),
    [
        (single("LeakyRelu", alpha=0.1), [0.1]),
        (single("PRelu", 0.25), [0.25]),
        (single("PRelu", [0.25, -0.5, 2.0]), [0.25, -0.5, 2.0]),
        (single("PRelu", [0.25, 0.25]), [0.25]),
        (single("Abs"), [-1.0]),
        (function(("Mul", (0.2,), {}), ("Max", ("x",), {})), [0.2]),
    ],
)
def test_slopes_are_recognised(f, slopes, size):
    q = range_of(single("LeakyRelu", alpha=0.1), -size, size)
    found = activation(f, q, -size, size)
    assert found.op == "PRelu"
    assert np.array_equal(found.coefficients, np.float32(slopes))


@pytest.mark.parametrize("size", [0.3, 5.0, 300.0])
@pytest.mark.parametrize(
    ("f", "origin", "unit"),
    [
        (single("HardSwish"), -3.0, 6.0),
        (function(("HardSigmoid", (), {"alpha": 1 / 6}), ("Mul", ("x",), {})), -3.0, 6.0),
        (function(("HardSigmoid", (), {}), ("Mul", ("x",), {})), -2.5, 5.0),
        (function(("Add", (3.0,), {}), ("Clip", (0.0, 6.0), {}), ("Mul", ("x",), {}),
                  ("Div", (6.0,), {})), -3.0, 6.0),
        (hard_swish(-1.7, 0.31), np.float32(-1.7), np.float32(0.31)),
    ],
)  # fmt: skip
def test_hard_swish_is_recognised(f, origin, unit, size):
    found = activation(f, range_of(f, -size, size), -size, size)
    assert found.op == "HardSwish" and found.coefficients.shape == (0,)
    np.testing.assert_allclose([found.origin, found.unit], [origin, unit], rtol=1e-7)


@pytest.mark.parametrize("unit", [1e-5, 1e-3, 30.0])
def test_what_bends_only_within_a_code_is_not_taken_for_a_relu(unit):
    """Where inputs are far larger than the codes of the result."""
    found = activation(hard_swish(0.0, unit), Quantization(1.5e-6, 0, 2), -0.2, 0.2)
    assert (found.op, found.origin) == ("HardSwish", 0.0)
    np.testing.assert_allclose(found.unit, unit, rtol=1e-6)


# --- any function -------------------------------------------------------------------------------

STEPS = [
    ("Sigmoid", (), {}), ("Tanh", (), {}), ("Elu", (), {}), ("Softplus", (), {}), ("Relu", (), {}),
    ("LeakyRelu", (), {"alpha": 0.3}), ("HardSigmoid", (), {}), ("Abs", (), {}), ("Exp", (), {}),
    ("Mul", (-1.7,), {}), ("Add", (0.4,), {}), ("Max", (-0.2,), {}), ("Sin", (), {}),
    ("Mul", ("x",), {}), ("Add", ("x",), {}), ("Min", ("x",), {}), ("Round", (), {}),
]  # fmt: skip


@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    low=st.floats(-50, 0.0),
    width=st.floats(0.01, 80),
    bits=st.integers(2, 8),
    seed=st.integers(0, 1000),
)
def test_any_composition(steps, low, width, bits, seed):
    """What is computed is the function, to half a code; and if not, it is not computed."""
    f, high = function(*steps), low + width
    y = f.values(np.linspace(low, high, 999))
    assume(np.isfinite(y).all() and 1e-3 < np.abs(y).max() < 1e6)
    q = choose_quantization(y.astype(np.float32), bits, "mse", 100.0)
    found = activation(f, q, low, high)
    if found is None:
        return
    x = np.random.default_rng(seed).uniform(low, high, 500)
    y = f.values(x)
    if found.op == "Piecewise":
        assert np.isfinite(found.coefficients).all()
        assert error(found, f, q, x) <= 0.51
    elif found.op == "PRelu":
        np.testing.assert_allclose(np.where(x < 0, found.coefficients * x, x), y, rtol=1e-5)
    else:
        gate = np.clip((x - found.origin) / found.unit, 0, 1)
        np.testing.assert_allclose(x * gate, y, rtol=1e-5, atol=1e-5 * np.abs(x).max())


# --- which nodes take a function ----------------------------------------------------------------

SHAPE = (4, 8, 8)


def swish(net, x):
    return net.node("Mul", x, net.node("Sigmoid", x))


def clipped(net, x, low, high):
    return net.node("Clip", x, net.constant(low), net.constant(high))


def converted(model, path, **settings):
    settings = {"weight_bits": 5, "residual_ratio": 1.0} | settings
    convert(model, path, calibration=noise(16, SHAPE), **settings)
    return packed_format.read(path)


def found_in(graph):
    """Packed operators between the ends, with the activation functions that they have."""
    names = [f"{n.op} {n.activation.op}" if n.activation else n.op for n in graph.nodes]
    return [n for n in names if n not in ("QuantizeLinear", "DequantizeLinear", "Flatten")]


def _transposed(net, x):
    return net.node("ConvTranspose", x, net.random(4, 4, 3, 3), net.random(4))


def _pooled(net, x):
    return net.node("MaxPool", x, kernel_shape=[1, 1])


FUSED = {
    "convolution": (lambda n: swish(n, n.conv("x")), ["Conv Piecewise"]),
    "transposed convolution": (lambda n: n.node("Elu", _transposed(n, "x")),
                               ["ConvTranspose Piecewise"]),
    "sum": (lambda n: n.node("Tanh", n.node("Add", _pooled(n, "x"), "x")),
            ["MaxPool", "Add Piecewise"]),
    "difference": (lambda n: n.node("LeakyRelu", n.node("Sub", n.conv("x"), "x")),
                   ["Conv", "Sub PRelu"]),
    "product": (lambda n: n.node("HardSwish", n.node("Mul", n.conv("x"), "x")),
                ["Conv", "Mul HardSwish"]),
    "residual, then function": (lambda n: swish(n, n.node("Add", n.conv("x"), "x")),
                                ["Conv Piecewise"]),
    "function, then residual": (lambda n: n.node("Add", swish(n, n.conv("x")), "x"),
                                ["Conv Piecewise", "Add"]),
    "gate": (lambda n: n.node("Mul", "x", n.node("Sigmoid", n.conv(_pooled(n, "x"), kernel=1))),
             ["MaxPool", "Conv Piecewise", "Mul"]),
    "function, then clamp": (lambda n: clipped(n, swish(n, n.conv("x")), -0.1, 2.0),
                             ["Conv Piecewise"]),
    "clamp, then function": (lambda n: n.node("Tanh", n.node("Relu", n.conv("x"))),
                             ["Conv", "Lookup"]),
    "slopes by channels": (lambda n: n.node("PRelu", n.conv("x"), n.random(4, 1, 1)),
                           ["Conv PRelu"]),
    "slopes by channels of a sum": (
        lambda n: n.node("PRelu", n.node("Sub", n.conv("x"), "x"), n.random(4, 1, 1)),
        ["Conv", "Sub", "Lookup"]),
    "two readers": (lambda n: (lambda x: n.node("Add", x, n.node("Tanh", x)))(
        _pooled(n, n.conv("x"))), ["Conv", "MaxPool", "Lookup"]),
    "also an output": (lambda n: (lambda x: (x, n.node("Tanh", x)))(n.conv("x")),
                       ["Conv", "Lookup"]),
    "jumps": (lambda n: n.node("Floor", n.conv("x")), ["Conv", "Lookup"]),
    "jumps, and a clamp": (lambda n: n.node("Relu", n.node("Floor", n.conv("x"))),
                           ["Conv", "Lookup"]),
    "nothing to fuse with": (lambda n: n.node("Tanh", "x"), ["Lookup"]),
    "HardSigmoid is a clamp": (lambda n: n.node("HardSigmoid", n.conv("x")), ["Conv"]),
    "HardSigmoid of a difference is a line": (
        lambda n: n.node("HardSigmoid", n.node("Sub", n.conv("x"), "x")),
        ["Conv", "Sub Piecewise"]),
    "line between clamps": (lambda n: clipped(n, n.node("Sub", n.constant(1.0), n.node(
        "Div", clipped(n, n.conv("x"), -3.0, 3.0), n.constant(-6.0))), 0.0, 1.2), ["Conv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fusion_and_export(name, tmp_path):
    build, expected = FUSED[name]
    net = Net()
    outputs = build(net)
    model = net.model(*(outputs if isinstance(outputs, tuple) else (outputs,)))
    graph = converted(model, tmp_path / "net.stlq")
    assert found_in(graph) == expected
    x = {"x": noise(3, SHAPE, seed=1)}
    found = oracle.evaluate(graph, x)
    run = Session(graph).trace(x)
    export(graph, tmp_path / "net.onnx")
    again = converted(tmp_path / "net.onnx", tmp_path / "again.stlq")
    assert found_in(again) == expected
    other = oracle.evaluate(again, x)
    written = reference(onnx.load(tmp_path / "net.onnx"), x)
    for output, y in reference(model, x).items():
        np.testing.assert_allclose(run[output], found[output], rtol=1e-6)
        jumps = name.startswith("jumps")
        assert (
            np.square(found[output] - y).sum() < 10 ** (-1.5 if jumps else -2) * np.square(y).sum()
        )
        np.testing.assert_array_equal(other[output], found[output])
        last = next(n for n in graph.nodes if n.outputs[0] == output)
        step = graph.quantization[last.inputs[0]].scale
        # Engines sum in different orders, so a value between two codes may become either.
        apart = np.abs(written[output] - found[output]) / step
        assert apart.max() < 1.001 and (apart > 0.01).mean() < 0.05


@pytest.mark.parametrize("name", ["convolution", "residual, then function", "sum", "product"])
def test_rounded_once(name, tmp_path):
    """Codes are those of the function of what the codes before say, rounded."""
    build, _ = FUSED[name]
    net = Net()
    graph = converted(net.model(build(net)), tmp_path / "net.stlq")
    x = noise(3, SHAPE, seed=1)
    found = oracle.evaluate(graph, {"x": x})
    node = next(node for node in graph.nodes if node.activation)
    q = graph.quantization[node.outputs[0]]
    a, *others = (
        graph.quantization[n].dequantize(found[n]).astype(np.float64) for n in node.inputs
    )
    if node.op == "Conv":
        padded = np.pad(a, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        y = np.einsum("nchwij,oijc->nohw", windows, node.weights.values().astype(np.float64))
        y += node.bias[:, None, None] + (others[0] if others else 0)
    else:
        y = a + others[0] if node.op == "Add" else a * others[0]
    function = {"Add": np.tanh, "Mul": lambda y: y * np.clip(y / 6 + 0.5, 0, 1)}
    y = function.get(node.op, lambda y: y / (1 + np.exp(-y)))(y) / q.scale + q.zero_point
    apart = np.abs(found[node.outputs[0]] - np.clip(y, 0, q.top))
    assert apart.max() < 0.5 + (0.001 if node.activation.op == "HardSwish" else 0.2)


def test_bits_and_float32_are_kept_apart(tmp_path):
    net = Net()
    model = net.model(net.conv(swish(net, net.conv("x"))))
    ops = {
        "same bits": {"activation_bits": 6},
        "other bits": {"activation_bits": {"n_Mul2": 5}},
        "function in float32": {"keep_float": ["n_Mul2"]},
        "convolution in float32": {"activation_bits": {"n_Conv0": 32}},
        "weights alone": {"activation_bits": 32},
    }
    found = {}
    for name, settings in ops.items():
        graph = converted(model, tmp_path / "net.stlq", **settings)
        found[name] = found_in(graph)
        (y,) = reference(model, {"x": noise(3, SHAPE, seed=1)}).values()
        z = Session(graph).run(noise(3, SHAPE, seed=1))
        assert np.square(z - y).sum() < 10**-1.5 * np.square(y).sum()
    assert found["same bits"] == ["Conv Piecewise", "Conv"]
    assert found["other bits"] == ["Conv", "Lookup", "Conv"]
    assert found["function in float32"] == ["Conv", "Swish", "Conv"]
    assert found["convolution in float32"] == ["Conv", "Swish", "Conv"]
    assert found["weights alone"] == ["Conv", "Swish", "Conv"]


def test_where_the_model_rounds_it_is_rounded(tmp_path):
    net = Net(opset=13)
    scale, zero = net.constant(0.05), net.constant(128, np.uint8)

    def rounded(x):
        return net.node("DequantizeLinear", net.node("QuantizeLinear", x, scale, zero), scale, zero)

    once, twice = swish(net, net.conv("x")), swish(net, rounded(net.conv("x")))
    graph = converted(net.model(rounded(once), twice), tmp_path / "net.stlq")
    assert sorted(found_in(graph)) == ["Conv", "Conv Piecewise", "Lookup"]
    assert operations(graph).count("Lookup") == 1
