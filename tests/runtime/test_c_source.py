"""Exported C: the runtime's bits, by every compiler, for every core that can be emulated here."""

import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.graphs import (
    concatenations,
    convolutions,
    joins,
    pools,
    rearrangements,
    resizes,
)
from support.packed_nets import small_network

from benchmarks.microcontrollers import keyword_spotter
from benchmarks.targets import TARGETS, build, run
from logshift.kernels.activation import Activation, target
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime import Session
from logshift.runtime.c_source import export_c
from logshift.runtime.c_source.curves import curve, span
from logshift.runtime.c_source.fixed import fixed
from logshift.runtime.c_source.words import END, FLUSH, Words, programs
from logshift.runtime.file import format
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.validate import validate

FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
WAYS = [{}, {"layout": "small"}, {"multiply": True}]
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover")


def compiler(name="gcc"):
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    return name


def inputs_of(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {
        info.name: rng.standard_normal(
            [1 if isinstance(dim, str) and axis == 0 else size
             for axis, (dim, size) in enumerate(zip(info.shape, info.nominal, strict=True))]
        ).astype(np.float32) * 3
        for info in graph.inputs
    }  # fmt: skip


def expected(graph, inputs):
    found = Session(graph, threads=1, kernels="reference").run(inputs)
    found = found if isinstance(found, dict) else {graph.outputs[0].name: found}
    return b"".join(found[info.name].tobytes() for info in graph.outputs)


def native(directory, given, *command):
    """Compile and run an exported program of this machine's."""
    sources = [directory / "net.c", directory / "net_main.c"]
    subprocess.run([*command, *FLAGS, *sources, "-o", directory / "net"], check=True)
    return subprocess.run([directory / "net"], input=given, capture_output=True, check=True).stdout


def check(graph, directory, options, *command):
    inputs = inputs_of(graph)
    file = directory / "net.stlq"
    format.write(graph, file)
    export_c(file, directory, name="net", main=True, **options)
    given = b"".join(x.tobytes() for x in inputs.values())
    assert native(directory, given, *command) == expected(graph, inputs)


@pytest.fixture(scope="module")
def demo(repository):
    return format.read(repository / "converter" / "demo" / "resnet20-cifar10-w4.stlq")


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compilers_and_levels_give_the_same_bits(tmp_path, name, level):
    for options in WAYS:
        check(small_network(), tmp_path, options, compiler(name), level)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_demo_network(tmp_path, demo, options):
    check(demo, tmp_path, options, compiler(), *SANITIZED)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_depthwise_network(tmp_path, options):
    check(keyword_spotter(1, 5), tmp_path, options, compiler(), *SANITIZED)


def of_one_batch(graph):
    return len({info.nominal[0] for info in graph.inputs}) == 1


@pytest.mark.parametrize(
    "graphs",
    [convolutions("Conv"), convolutions("ConvTranspose"), pools(), resizes(), rearrangements(),
     joins().filter(of_one_batch), concatenations()],
    ids=["conv", "transposed", "pools", "resizes", "moves", "joins", "concatenations"],
)  # fmt: skip
def test_random_graphs(tmp_path, graphs):
    compiler()

    @settings(max_examples=10, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(graphs, st.sampled_from(WAYS))
    def same(graph, options):
        check(graph, tmp_path, options, "gcc", *SANITIZED)

    same()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_emulated_cores_give_the_same_bits(tmp_path, demo, target, options):
    if missing := TARGETS[target].missing:
        pytest.skip(f"needs {missing}")
    # The demo takes seconds where each product is a call.
    slow = "multiply" in options and target in ("rv32e", "rv32i")
    for graph in [small_network(), keyword_spotter(1, 9)] + [demo] * (not slow):
        inputs = inputs_of(graph)
        export_c(graph, tmp_path, name="net", **options)
        built = build(TARGETS[target], tmp_path, ("float", "float"))
        (x,) = inputs.values()
        assert run(built, x.tobytes()) == expected(graph, inputs)
        if "multiply" not in options:
            assert not {"__mulsi3", "__muldi3", "__divsi3", "__udivsi3"} & built.undefined


@pytest.mark.parametrize("end", ["Clip", "Sigmoid", "Softmax"])
def test_functions_behind_the_codes(tmp_path, end):
    graph = small_network()
    if end == "Softmax":
        last = Node(end, "end", ["logits"], ["end"], {"axis": -1}, domain="ai.onnx")
        graph.outputs = [ValueInfo("end", ("batch", 5), (1, 5))]
    else:
        graph.nodes.pop()  # Flatten
        last = Node(end, "end", ["l"], ["end"], {"clamp": [-0.5, 0.25]} if end == "Clip" else {})
        graph.outputs = [ValueInfo("end", ("batch", 5, 1, 1), (1, 5, 1, 1))]
    graph.nodes.append(last)
    validate(graph)
    check(graph, tmp_path, {}, compiler(), *SANITIZED)


def test_moves_of_float32_around_the_codes(tmp_path):
    """As converters from TensorFlow have them: pixels come channels last; parts are joined."""
    graph = small_network()
    (info,) = graph.inputs
    n, c, h, w = info.nominal
    graph.inputs = [ValueInfo(info.name, ("batch", h, w, c), (n, h, w, c))]
    given = Node(
        "Transpose", "move", [info.name], ["moved"], {"perm": [0, 3, 1, 2]}, domain="ai.onnx"
    )
    for node in graph.nodes:
        node.inputs = ["moved" if name == info.name else name for name in node.inputs]
    soft = Node("Softmax", "soft", ["logits"], ["soft"], {"axis": -1}, domain="ai.onnx")
    joined = Node("Concat", "join", ["soft", "logits"], ["both"], {"axis": -1}, domain="ai.onnx")
    back = Node("Transpose", "turn", ["both"], ["turned"], {"perm": [0, 1]}, domain="ai.onnx")
    graph.nodes = [given, *graph.nodes, soft, joined, back]
    graph.outputs = [ValueInfo("turned", ("batch", 10), (1, 10))]
    validate(graph)
    check(graph, tmp_path, {}, compiler(), *SANITIZED)


@pytest.mark.parametrize(
    ("shape", "perm", "axis"), [((2, 3, 4), (0, 2, 3, 1), 2), ((5, 1, 3), (0, 3, 1, 2), 1),
                                ((2, 2, 3, 2), (0, 4, 1, 3, 2), -1), ((7,), (0, 1), 1)]
)  # fmt: skip
def test_transposed_and_joined(tmp_path, shape, perm, axis):
    turned = [shape[i - 1] for i in perm[1:]]
    joined = list(turned)
    joined[axis - 1 if axis > 0 else axis] *= 2
    nodes = [
        Node("Transpose", "t", ["x"], ["turned"], {"perm": list(perm)}, domain="ai.onnx"),
        Node("Concat", "c", ["turned", "turned"], ["y"], {"axis": axis}, domain="ai.onnx"),
    ]
    graph = Graph(
        [ValueInfo("x", (1, *shape), (1, *shape))], [ValueInfo("y", (1, *joined), (1, *joined))],
        {}, nodes,
    )  # fmt: skip
    validate(graph)
    check(graph, tmp_path, {}, compiler(), *SANITIZED)


def test_codes_go_in_and_out(tmp_path):
    compiler()
    q_x, q_y = Quantization(0.1, 7, 8), Quantization(0.2, 3, 6)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Lookup", "l", ["x"], ["y"], table=np.arange(256, dtype=np.uint8) >> 2),
        Node("DequantizeLinear", "d", ["y"], ["output"]),
    ]
    info = (1, 3, 4, 5), (1, 3, 4, 5)
    graph = Graph(
        [ValueInfo("input", *info)], [ValueInfo("output", *info)], {"x": q_x, "y": q_y}, nodes
    )  # fmt: skip
    validate(graph)
    made = export_c(graph, tmp_path, name="net", codes=True, main=True)
    header = made.files[0].read_text()
    assert "const uint8_t *x, uint8_t *y" in header and "NET_Y_ZERO_POINT 3" in header
    codes = np.arange(60, dtype=np.uint8) * 4
    assert native(tmp_path, codes.tobytes(), "gcc") == (codes >> 2).tobytes()


def test_what_cannot_be_written_is_named(tmp_path):
    graph = small_network()
    with pytest.raises(InputError, match="layout"):
        export_c(graph, tmp_path, layout="large")
    with pytest.raises(InputError, match="identifier"):
        export_c(graph, tmp_path, name="int")
    graph.nodes.append(Node("Erf", "odd one", ["logits"], ["erf"], domain="ai.onnx"))
    graph.outputs = [ValueInfo("erf", ("batch", 5), (1, 5))]
    with pytest.raises(ConversionError, match=r"'odd one' \(Erf\).*convert with"):
        export_c(graph, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("products", [False, True])
def test_requantization_is_the_definition_outside_of_doubt(products):
    rng = np.random.default_rng(3)
    count = 40
    m = np.exp(rng.uniform(-9, 0, count)).astype(np.float32)
    b = rng.uniform(-300, 300, count).astype(np.float32)
    offset = rng.integers(-3000, 3000, count)
    reach = np.full(count, 100000)
    form = fixed(m, b, offset, -reach, reach, 0, 255, products=products)
    assert form.fraction
    doubted = 0
    for row in form.rows:
        centre = round((127 - row.b) / row.m) + row.offset
        acc = np.clip(centre + rng.integers(-3000, 3000, 5000), -reach[0], reach[0])
        scaled = acc << form.grow
        if products:
            u = row.bias + ((scaled * row.factor) >> 31)
        else:
            u = row.bias + sum(scaled >> s for s in row.plus) - sum(scaled >> s for s in row.minus)
        y = (acc - row.offset).astype(np.float32) * np.float32(row.m) + np.float32(row.b)
        code = np.clip(np.rint(y), 0, 255)
        rest = u & ((1 << form.fraction) - 1)
        doubt = (rest < form.doubt) | (rest >= (1 << form.fraction) - form.doubt)
        clear = (u < form.low) | (u >= form.high) | ~doubt
        settled = np.where(u < form.low, 0, np.where(u >= form.high, 255, u >> form.fraction))
        assert (settled == code)[clear].all()
        doubted += int((~clear).sum())
    assert doubted < 0.02 * 5000 * count


def swish(v, to):
    factor, added, zero = to.coefficients
    inside = np.clip(v, np.float32(0), np.float32(1))
    return (v * factor + added) * inside + zero


def pieces(v, to):
    c = to.coefficients.astype(np.int64)
    k = np.rint(v.clip(-32768, 32767)).astype(np.int64)
    i, f = k >> 12 & 15, ((k & 4095) << 4) - 32768
    p = c[1][i] + (c[2][i] * f + 16384 >> 15)
    y = (c[0][i] + (p * f + 16384 >> 15)).clip(-32768, 32767)
    return (y + 64 >> 7).astype(np.float32)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize(("function", "doubts"), [(swish, 0.3), (pieces, 0.02)])
def test_activations_are_the_definition_outside_of_doubt(function, doubts, products):
    rng = np.random.default_rng(6)
    for _ in range(10):
        scale = float(rng.uniform(0.01, 0.1))
        if function is swish:
            made = Activation("HardSwish", -3.0, 6.0, np.zeros(0, np.float32))
        else:
            c = np.zeros((3, 16), np.int16)
            c[0] = np.cumsum(rng.integers(-600, 2000, 16)).clip(0, 32767)
            c[1] = rng.integers(-500, 1000, 16)
            made = Activation("Piecewise", 0.0, 5e-4, c)
        to = target(made, scale, int(rng.integers(0, 40)))
        reach = 50000
        m, b = np.float32([5 / reach / to.unit]), np.float32([to.zero])
        none, ends = np.zeros(1, np.int64), span(to, 255)
        if ends is None:  # it touches the middle between two codes
            continue
        form = fixed(m, b, none, none - reach, none + reach, *ends, products=products)
        found = curve(to, form, 0, 255)
        acc = np.arange(-reach, reach)
        (row,) = form.rows
        scaled = acc << form.grow
        if products:
            u = row.bias + ((scaled * row.factor) >> 31)
        else:
            u = row.bias + sum(scaled >> s for s in row.plus) - sum(scaled >> s for s in row.minus)
        y = function(acc.astype(np.float32) * m + b, to)
        code = np.rint(y).clip(0, 255)
        at = np.searchsorted(found.edges, u, side="right")
        near = np.abs(u[:, None] - found.edges).min(1) <= found.doubt
        assert (found.codes[at] == code)[~near].all()
        assert near.mean() < doubts and len(found.edges) > 50


def test_programs_stay_within_their_lanes():
    rng = np.random.default_rng(5)
    k, top = 700, 255
    words = Words(
        np.zeros(k, np.int64), np.arange(k), rng.integers(0, 7, k), rng.random(k) < 0.3
    )  # fmt: skip
    (line,) = programs(words, 1, top, 1)
    x = rng.integers(0, top + 1, k)
    at = total = lanes = 0
    while True:
        plus, minus, operation = line[at] & 255, line[at] >> 8, line[at + 1]
        at += 2
        lanes += int(x[line[at : at + plus]].sum())
        lanes -= int(x[line[at + plus : at + plus + minus]].sum())
        at += plus + minus
        assert abs(lanes) < 2**15
        if operation < FLUSH:
            lanes <<= operation
        else:
            total, lanes = (total << operation % FLUSH) + lanes, 0
        if operation >= END:
            break
    assert at == len(line)
    assert total == int((np.where(words.negative, -1, 1) * x << words.exponent).sum())
