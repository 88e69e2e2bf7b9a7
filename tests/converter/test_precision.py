"""What settings leave to be chosen: ranges, float32 tensors, second words."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_nets import Net, network, noise, reference

from logshift import converter, runtime
from logshift.converter.calibrate import choose_quantization
from logshift.converter.settings import Settings
from logshift.kernels.errors import InputError

pytest.importorskip("onnxruntime")

SIZE = (3, 16, 16)


def packed(model, path, x, **settings):
    """Convert and return the session."""
    converter.convert(model, path, calibration=x, **settings)
    return runtime.load(path)


def snr_db(exact, found):
    return 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())


def uneven(scale=3000.0):
    """A convolution reads channels of which one is much larger than those that decide."""
    net = Net(shape=("batch", *SIZE))
    first = net.rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    first[0] *= scale
    second = net.rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    second[:, 0] = 0.01 / scale
    x = net.node("Relu", net.node("Conv", "x", net.constant(first), pads=[1] * 4))
    y = net.node("Relu", net.node("Conv", x, net.constant(second), pads=[1] * 4))
    # What takes most of the time comes after it.
    for _ in range(6):
        y = net.node("Relu", net.conv(y, 8 if _ == 0 else 64, 64))
    return net.model(net.conv(y, 64, 4))


def test_a_tensor_that_codes_would_ruin_stays_float32(tmp_path):
    model, x = uneven(), noise(12, SIZE)
    exact = reference(model, {"x": x})["Conv16"]
    chosen = packed(model, tmp_path / "auto.stlq", x)
    assert chosen.graph.settings["float_tensors"]
    assert not chosen.graph.is_code(chosen.graph.nodes[1].outputs[0])
    eight = packed(model, tmp_path / "eight.stlq", x, activation_bits=8)
    fast = packed(model, tmp_path / "fast.stlq", x, prefer="speed")
    assert eight.graph.settings["float_tensors"] == fast.graph.settings["float_tensors"] == []
    assert snr_db(exact, chosen.run(x)) > snr_db(exact, eight.run(x)) + 6


def test_what_is_given_for_nodes_stays(tmp_path):
    bits = {"n_Conv2": 8, "*": "auto"}
    session = packed(uneven(), tmp_path / "net.stlq", noise(12, SIZE), activation_bits=bits)
    assert session.graph.settings["float_tensors"] == []  # that node would have to be float32
    assert session.graph.settings["activation_bits"] == bits


def test_nothing_is_float32_that_costs_nothing_as_codes(tmp_path):
    session = packed(network(), tmp_path / "net.stlq", noise(12))
    assert session.graph.settings["float_tensors"] == []


def bits_of_tensors(path, **settings):
    """Bits of the codes that 3x3 convolutions of 32 channels read, and of all others."""
    net = Net(shape=("batch", *SIZE))
    x = "x"
    for channels, out in ((3, 32), (32, 32), (32, 16), (16, 32)):
        x = net.node("Relu", net.conv(x, channels, out))
    graph = packed(net.model(net.conv(x, 32, 4)), path, noise(12, SIZE), **settings).graph
    read = {
        node.inputs[0] for node in graph.nodes
        if node.weights is not None and min(node.weights.shape[0], node.weights.shape[3]) == 32
    }  # fmt: skip
    bits = {name: q.bits for name, q in graph.quantization.items()}
    return {bits[name] for name in read}, {bits[name] for name in bits.keys() - read}


def test_six_bits_where_they_are_faster_and_cost_nothing(tmp_path):
    given = {"weight_bits": 3, "prefer": "speed"}
    assert bits_of_tensors(tmp_path / "net.stlq", **given) == ({6}, {8})
    for other in (
        {"weight_bits": 4}, {"prefer": "accuracy"}, {"activation_bits": 8}, {"residual_shift": 1}
    ):  # fmt: skip
        read, others = bits_of_tensors(tmp_path / "net.stlq", **(given | other))
        assert 6 not in read | others, other


def boxes_and_scores():
    """Boxes of hundreds of pixels beside logits of which a sigmoid makes scores."""
    net = Net(shape=("batch", *SIZE))
    x = net.node("Relu", net.conv("x", 3, 16))
    boxes = net.node("Mul", net.node("Relu", net.conv(x, 16, 4)), net.constant(40.0))
    scores = net.node("Sub", net.conv(x, 16, 6), net.constant(8.0))
    both = net.node("Concat", boxes, scores, axis=1)
    flat = net.node("Reshape", both, net.constant([0, 10, -1], np.int64))
    first, last = net.node("Split", flat, net.constant([4, 6], np.int64), outputs=2, axis=1)
    return net.model(net.node("Concat", first, net.node("Sigmoid", last), axis=1))


def test_boxes_do_not_hide_scores(tmp_path):
    model, x = boxes_and_scores(), noise(12, SIZE)
    session = packed(model, tmp_path / "net.stlq", x, weight_bits=5, residual_ratio=1.0)
    exact, found = reference(model, {"x": x})["Concat11"], session.run(x)
    a, b = exact[:, 4:].ravel(), found[:, 4:].ravel()
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.99
    joined = next(node for node in session.graph.nodes if node.op == "Concat")
    assert not session.graph.is_code(joined.outputs[0])  # nobody reads codes of it


@pytest.mark.parametrize("method", ["minmax", "cubic", "mse"])
def test_ranges(method):
    x = np.random.default_rng(0).laplace(size=2**15).astype(np.float32)
    q = choose_quantization(x, 8, method, 99.99)
    low, high = q.dequantize(np.array([0, q.top]))
    power = {"minmax": 8, "cubic": 3, "mse": 2}[method]
    error = np.abs(q.dequantize(q.quantize(x)) - x).astype(np.float64)
    for factor in (0.8, 1.25):  # neither smaller nor larger ends are better
        scale = q.scale * factor
        codes = np.clip(np.rint(x / scale) + q.zero_point, 0, q.top)
        other = np.abs((codes - q.zero_point) * scale - x)
        assert (error**power).sum() <= (other.astype(np.float64) ** power).sum() * 1.001
    assert (low <= x.min() + q.scale and high >= x.max() - q.scale) == (method == "minmax")


def test_peaks_that_decide_are_not_clipped(tmp_path):
    net = Net(shape=("batch", 1, 16, 16))
    one = net.constant(np.ones((4, 1, 1, 1)))
    x = net.node("Relu", net.node("Conv", "x", one))
    y = net.node("Relu", net.node("Sub", x, net.constant(30.0)))  # of peaks alone
    model = net.model(net.node("GlobalMaxPool", net.conv(y, 4, 4, kernel=1)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 1, 16, 16)).astype(np.float32)
    x[:, 0, 3, 5] = rng.uniform(35, 60, 20)
    (exact,) = reference(model, {"x": x}).values()
    settings = {"activation_bits": 8, "weight_bits": 5, "residual_ratio": 1.0}
    chosen = packed(model, tmp_path / "auto.stlq", x, **settings).run(x)
    assert snr_db(exact, chosen) > 25


def test_second_words_by_what_is_preferred(tmp_path):
    ratios = {}
    for prefer in ("size", None, "accuracy"):
        session = packed(network(width=32), tmp_path / "net.stlq", noise(12), prefer=prefer)
        words = [node.weights for node in session.graph.nodes if node.weights is not None]
        second = sum(np.count_nonzero(w.second) for w in words)
        ratios[prefer] = second / sum(w.first.size for w in words)
        assert session.graph.settings["prefer"] == prefer
    assert ratios["size"] <= ratios[None] <= 0.5
    assert ratios["size"] <= 0.15 and ratios[None] < ratios["accuracy"]


def test_layers_make_up_for_what_parabolas_are_wrong_by(tmp_path):
    net = Net(shape=("batch", *SIZE))
    weight = 40 * net.rng.standard_normal((16, 3, 1, 1)).astype(np.float32)
    x = net.node("Conv", "x", net.constant(weight))
    x = net.node("Mul", x, net.node("Sigmoid", x))
    model = net.model(net.conv(x, 16, 8, kernel=1))
    calibration = noise(16, SIZE)
    settings = {"activation_bits": 8, "weight_bits": 5, "residual_ratio": 1.0}
    session = packed(model, tmp_path / "net.stlq", calibration, **settings)
    assert session.graph.nodes[1].activation.op == "Piecewise"
    exact = reference(model, {"x": calibration})["Conv3"]
    lost = (session.run(calibration) - exact).mean(axis=(0, 2, 3))
    spread = (session.run(calibration) - exact).std(axis=(0, 2, 3))
    assert (np.abs(lost) < 0.1 * spread).all()


def test_the_same_network_is_chosen_again(tmp_path):
    for name in ("a", "b"):
        packed(uneven(), tmp_path / f"{name}.stlq", noise(12, SIZE))
    assert (tmp_path / "a.stlq").read_bytes() == (tmp_path / "b.stlq").read_bytes()


@pytest.mark.parametrize(
    "given",
    [{"residual_ratio": "many"}, {"activation_bits": "few"}, {"activation_range": "best"},
     {"prefer": "beauty"}],
)  # fmt: skip
def test_what_cannot_be_chosen(given):
    with pytest.raises(InputError, match=next(iter(given))):
        Settings(**given)
