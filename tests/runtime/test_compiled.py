"""Compiled ONNX operators in ONNX's form: what NumPy makes of them, in one native program."""

from __future__ import annotations

import contextlib
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.graphs import network, node, random_weights

from logshift.kernels import functions
from logshift.kernels.errors import InputError
from logshift.runtime import Session
from logshift.runtime.graph import Node, Quantization, ValueInfo
from logshift.runtime.onnx_ops import compiled, numpy_ops
from logshift.runtime.plan.schedule import NumpyStep
from logshift.runtime.validate import validate

SHAPES = arrays.array_shapes(min_dims=1, max_dims=5, min_side=1, max_side=7)
SEEDS = st.integers(0, 2**32)
SPECIAL = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-40], np.float32)


def floats(shape, seed=0, special=False):
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal(shape)).astype(np.float32)
    if special:
        x = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), x)
    return x


def steps_in_numpy(session, inputs):
    """Operators that run in NumPy."""
    return [p.node.op for p in session._plan(inputs).parts if isinstance(p, NumpyStep)]


def bits(x):
    """Bytes of an array; which NaN it is does not count."""
    return np.where(np.isnan(x), np.float32(np.nan), x).tobytes()


def run(graph, inputs):
    """Outputs, the same bits for every kernel and number of threads, without NumPy."""
    found = []
    for kernels, threads in (("reference", 1), ("portable", 1), ("portable", 2), ("auto", 2)):
        session = Session(graph, threads=threads, kernels=kernels)
        assert steps_in_numpy(session, inputs) == []
        result = session.run(inputs)
        if len(graph.outputs) == 1:
            result = {graph.outputs[0].name: result}
        found.append({name: np.array(y) for name, y in result.items()})
        traced = session.trace_codes(inputs)
        assert all(bits(traced[name]) == bits(y) for name, y in found[-1].items())
    for other in found[1:]:
        for name, y in found[0].items():
            assert y.shape == other[name].shape and bits(y) == bits(other[name]), name
    return found[0]


def check(op, *inputs, opset=18, outputs=1, compare=np.testing.assert_array_equal, **attributes):
    """Compare with NumPy; inputs that are no float32 are constants."""
    names = [f"x{i}" for i in range(len(inputs))]
    given = {n: x for n, x in zip(names, inputs, strict=True) if x.dtype == np.float32}
    constants = {n: x for n, x in zip(names, inputs, strict=True) if n not in given}
    results = [f"y{i}" for i in range(outputs)]
    graph = network([node(op, names, *results, **attributes)], given, results, constants, opset)
    found = run(graph, given)
    expected = numpy_ops.compute(op, attributes, opset, inputs, outputs)
    for name, y in zip(results, expected, strict=True):
        assert found[name].shape == y.shape and found[name].dtype == y.dtype
        compare(found[name], y)


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def ints(*values):
    return np.array(values, np.int64)


# --- moves ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(SHAPES, SEEDS, st.data())
def test_transpose(shape, seed, data):
    order = data.draw(st.permutations(range(len(shape))))
    check("Transpose", floats(shape, seed), perm=order)


@pytest.mark.parametrize("shape", [(1, 70, 33), (130, 3, 65), (4, 2100)])
def test_transpose_of_many(shape):
    check("Transpose", floats(shape), perm=list(range(len(shape)))[::-1])


@settings(max_examples=40)
@given(SHAPES, SEEDS, st.data())
def test_slice(shape, seed, data):
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in shape]
    bounds = [sorted((data.draw(st.integers(0, size - 1)), size)) for size in shape]
    bounds = [
        (a, b) if step > 0 else (b - 1, a - size - 1)
        for (a, b), step, size in zip(bounds, steps, shape, strict=True)
    ]
    starts, ends = zip(*bounds, strict=True)
    check("Slice", floats(shape, seed), ints(*starts), ints(*ends), ints(*range(len(shape))),
          ints(*steps))  # fmt: skip


@settings(max_examples=30)
@given(SHAPES, SEEDS, st.data())
def test_expand(shape, seed, data):
    x = floats([data.draw(st.sampled_from([1, size])) for size in shape], seed)
    check("Expand", x, ints(data.draw(st.integers(1, 2)), *shape))


@settings(max_examples=30)
@given(SHAPES, SEEDS, st.data())
def test_split_and_concat(shape, seed, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    whole = (*shape[:axis], sum(sizes), *shape[axis + 1 :])
    x = floats(whole, seed)
    check("Split", x, ints(*sizes), outputs=len(sizes), axis=axis)
    parts = np.split(x, np.cumsum(sizes)[:-1], axis)
    check("Concat", *map(np.ascontiguousarray, parts), axis=axis)


def test_names_of_the_same_bytes():
    x = floats((2, 3, 4, 5))
    check("Reshape", x, ints(0, -1))
    check("Flatten", x, axis=3)
    check("Unsqueeze", x, ints(0, 3))
    check("Squeeze", floats((1, 3, 1, 4)), ints(0, 2))
    check("Identity", x)
    check("Transpose", floats((1, 3, 1, 4)), perm=[1, 0, 3, 2])
    graph = network([node("Flatten", ["x"], "y")], {"x": x}, ["y"])
    session = Session(graph)
    assert len(session._plan({"x": x}).program) == 0
    assert not np.may_share_memory(session.run(x), x)


def test_outputs_that_are_views_of_each_other():
    x = floats((2, 3, 4))
    nodes = [node("Neg", ["x"], "a"), node("Reshape", ["a", "s"], "b"), node("Abs", ["b"], "c")]
    graph = network(nodes, {"x": x}, ["a", "b", "c"], {"s": ints(4, 6)})
    found = run(graph, {"x": x})
    np.testing.assert_array_equal(found["a"], -x)
    np.testing.assert_array_equal(found["b"], -x.reshape(4, 6))
    np.testing.assert_array_equal(found["c"], abs(x).reshape(4, 6))


@pytest.mark.parametrize("outputs", [["a", "b", "c", "d"], ["d", "c", "b", "a"]])
def test_outputs_are_the_callers_own(outputs):
    x = floats((2, 3, 4))
    nodes = [
        node("Neg", ["x"], "a"), node("Reshape", ["a", "s"], "b"), node("Cast", ["a"], "c", to=1),
        node("Flatten", ["x"], "d"),
    ]  # fmt: skip
    graph = network(nodes, {"x": x}, outputs, {"s": ints(4, 6)})
    session = Session(graph)
    found = [x, *session.run({"x": x}).values(), *session.run({"x": x}).values()]
    for i, y in enumerate(found):
        assert not any(np.may_share_memory(y, other) for other in found[:i])
    for name, y in session.run({"x": x}).items():
        np.testing.assert_array_equal(y.ravel(), (x if name == "d" else -x).ravel())


# --- element by element ---------------------------------------------------------------------------

BINARY = ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum"]


@pytest.mark.parametrize("op", BINARY)
@settings(max_examples=30)
@given(arrays.mutually_broadcastable_shapes(num_shapes=2, min_side=1, max_side=6, max_dims=5),
       SEEDS)  # fmt: skip
def test_broadcasting(op, shapes, seed):
    x, r = (floats(shape, seed + i, special=True) for i, shape in enumerate(shapes.input_shapes))
    check(op, x, r)


@settings(max_examples=30)
@given(SHAPES, SEEDS, st.data())
def test_slopes(shape, seed, data):
    slope = floats([data.draw(st.sampled_from([1, size])) for size in shape], seed + 1)
    check("PRelu", floats(shape, seed, special=True), slope)


@pytest.mark.parametrize("shape", [(9000,), (2, 3, 8192), (37 * 1024,)])
def test_long_axes_are_shared(shape):
    check("Add", floats(shape), floats(shape, 1))
    check("Mul", floats(shape), floats((1,), 1))
    check("Sigmoid", floats(shape), compare=near)


def test_powers():
    x = floats((3, 4), special=True)
    check("Pow", x, np.array([2.0], np.float64), compare=near)
    check("Pow", x, np.array(3, np.int64), compare=near)
    check("Pow", abs(x), np.array(0.5, np.float64), compare=near)
    graph = network([node("Pow", ["x", "n"], "y")], {"x": x}, ["y"], {"n": np.array(5, np.int64)})
    session = Session(graph)
    assert steps_in_numpy(session, {"x": x}) == ["Pow"]


EXACT = [
    "Abs", "Ceil", "Floor", "HardSigmoid", "HardSwish", "LeakyRelu", "Neg", "Reciprocal", "Relu",
    "Round", "Softsign", "Sqrt", "ThresholdedRelu",
]  # fmt: skip
FUNCTIONS = {
    "Elu": {"alpha": 1.25}, "Erf": {}, "Exp": {}, "Sigmoid": {}, "Swish": {"alpha": 0.75},
    "Tanh": {}, "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "LeakyRelu": {"alpha": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("op", sorted({*EXACT, *FUNCTIONS}))
def test_functions(op):
    x = floats((3, 1000, 7), special=True)
    x[0] *= np.float32(20)
    check(op, x, compare=np.testing.assert_array_equal if op in EXACT else near, opset=24,
          **FUNCTIONS.get(op, {}))  # fmt: skip


def test_every_function_is_asked_for():
    asked = {
        name
        for name in compiled.OPERATORS
        if name in numpy_ops.elementwise._UNARY | numpy_ops.elementwise._PARAMETRIC
    }
    assert asked - {"Gelu", "Identity"} == {*EXACT, *FUNCTIONS}
    others = {"Clip", "cube", "gelu", "gelu_tanh"}
    named = asked - {"Gelu", "Identity", "Relu"} | others
    assert len(named) == len(functions.ONNX_UNARY_FUNCTIONS)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    x = floats((3, 1000, 7), special=True)
    check("Gelu", x, opset=20, approximate=approximate, compare=close)


@pytest.mark.parametrize("low", [None, -1, math.inf])
@pytest.mark.parametrize("high", [None, 0.5, 1e300])
def test_clip(low, high):
    x = floats((5, 6), special=True)
    bounds = {name: v for name, v in (("min", low), ("max", high)) if v is not None}
    check("Clip", x, opset=6, **bounds)


def test_bounds_that_only_a_run_tells():
    inputs = {"x": floats((5, 6)), "low": np.float32(-1).reshape(())}
    graph = network([node("Clip", ["x", "low"], "y")], inputs, ["y"])
    session = Session(graph)
    assert steps_in_numpy(session, inputs) == ["Clip"]
    np.testing.assert_array_equal(session.run(inputs), np.maximum(inputs["x"], -1))


# --- products -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 90)),
    batch=arrays.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3),
    vectors=st.sampled_from([(False, False)] * 5 + [(True, False), (False, True), (True, True)]),
    seed=SEEDS,
)
def test_matmul(sizes, batch, vectors, seed):
    rows, count, columns = sizes
    first, second = batch.input_shapes
    shapes = [
        (count,) if vectors[0] else (*first, rows, count),
        (count,) if vectors[1] else (*second, count, columns),
    ]
    first, second = (floats(shape, seed + i) for i, shape in enumerate(shapes))
    check(
        "MatMul", first, second, compare=partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    )


def test_matmul_of_what_is_not_a_number():
    first, second = (floats((2, 9, 20), seed, special=True) for seed in (0, 1))
    graph = network(
        [node("MatMul", ["a", "b"], "y")], {"a": first, "b": second.swapaxes(1, 2).copy()}, ["y"]
    )
    run(graph, {"a": first, "b": second.swapaxes(1, 2).copy()})


# --- along axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "ReduceSumSquare",
    ],
)
@settings(max_examples=40)
@given(SHAPES, SEEDS, st.data())
def test_reductions(op, shape, seed, data):
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    axes = [axis - data.draw(st.sampled_from([0, len(shape)])) for axis in axes]
    exact = op in ("ReduceMax", "ReduceMin")
    check(
        op, floats(shape, seed, special=exact), ints(*axes),
        keepdims=data.draw(st.integers(0, 1)),
        compare=np.testing.assert_array_equal if exact else lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5
        ),
    )  # fmt: skip


@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_sums_are_rounded_once(axes):
    x = floats((65, 33, 70))
    (exact,) = numpy_ops.compute("ReduceSum", {}, 18, [x.astype(np.float64), ints(*axes)], 1)
    graph = network([node("ReduceSum", ["x", "a"], "y")], {"x": x}, ["y"], {"a": ints(*axes)})
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], exact.astype(np.float32))


@settings(max_examples=60)
@given(SHAPES, SEEDS, st.data())
def test_softmax(shape, seed, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    opset = data.draw(st.sampled_from([11, 13]))
    check("Softmax", floats(shape, seed, special=seed % 3 == 0), opset=opset, axis=axis,
          compare=near)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1000), (1, 16, 4, 130), (3, 6, 200)])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax_of_many(shape, axis):
    check("Softmax", 10 * floats(shape), axis=axis, compare=near)


# --- in networks ----------------------------------------------------------------------------------


def test_other_types_and_empty_tensors_stay_with_numpy():
    empty = np.zeros((0, 3), np.float32)
    for x in (empty, np.ones((2, 3), np.float64), np.ones((2, 3), np.int32)):
        graph = network([node("Add", ["x", "x"], "y")], {"x": x}, ["y"])
        session = Session(graph)
        assert steps_in_numpy(session, {"x": x}) == ["Add"]


def backbone(rng):
    """Codes and a convolution, whose output is float32."""
    weights = random_weights(rng, (8, 3, 3, 4), 4, 0.15, 0)
    nodes = [
        Node("QuantizeLinear", "q", ["x"], ["c"]),
        Node("Conv", "conv", ["c"], ["features"], {"pads": [1] * 4}, weights),
    ]
    return nodes, {"c": Quantization(0.05, 120, 8)}


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("reader", ["Neg", "Cast", "Identity", "Add"])
@pytest.mark.parametrize("first_too", [False, True])
def test_a_transpose_of_what_lies_channels_last_costs_nothing(width, reader, first_too):
    nodes, quantization = backbone(np.random.default_rng(0))
    x, perm, constants = "features", [0, 2, 3, 1], {"i": ints(1)}
    if width == 1:
        nodes.append(node("Squeeze", ["features", "axis"], "s"))
        x, perm, constants = "s", [0, 2, 1], {"axis": ints(3)}
    nodes.append(node("Transpose", [x], "t", perm=perm))
    attributes = {"to": 1} if reader == "Cast" else {}  # which NumPy does
    nodes.append(node(reader, ["t", "t"] if reader == "Add" else ["t"], "y", **attributes))
    inputs = {"x": floats((2, 4, 6, width))}
    outputs = ["y", "t", x] if first_too else ["y"]
    graph = network(nodes, inputs, outputs, constants, quantization=quantization)
    session = Session(graph, threads=1)
    for _ in range(2):
        found = session.run(inputs) if first_too else {"y": session.run(inputs)}
        traced = session.trace_codes(inputs)
        turned = traced[x].transpose(perm)
        expected = {"Neg": -turned, "Add": turned + turned}.get(reader, turned)
        for name, y in zip(outputs, (expected, turned, traced[x]), strict=False):
            np.testing.assert_array_equal(found[name], y)
    ops = [step.kernel.op for step in session._plan(inputs).steps]
    assert "onnx_move" not in ops
    assert ("to_channels_first" in ops) == first_too
    if reader != "Cast":
        run(graph, inputs)


def test_a_classifier_is_one_program():
    rng = np.random.default_rng(0)
    nodes, quantization = backbone(rng)
    fc = random_weights(rng, (5, 1, 1, 8), 4, 0.15, 0)
    nodes += [
        Node("GlobalAveragePool", "pool", ["features"], ["pooled"]),
        Node("QuantizeLinear", "q2", ["pooled"], ["c2"]),
        Node("Conv", "fc", ["c2"], ["scores"], {}, fc),
        node("Flatten", ["scores"], "flat"),
        node("Softmax", ["flat"], "y", axis=-1),
    ]
    quantization["c2"] = Quantization(0.05, 120, 8)
    inputs = {"x": floats((2, 4, 6, 6))}
    graph = network(nodes, inputs, ["y", "flat"], quantization=quantization)
    session = Session(graph, threads=1)
    assert len(session._plan(inputs).parts) == 1
    found = run(graph, inputs)
    near(found["y"], numpy_ops.compute("Softmax", {"axis": -1}, 18, [found["flat"]], 1)[0])
    kernels = {layer.name: layer.kernel for layer in session.summary().layers}
    assert kernels["flat"] == "" and kernels["y"] == "portable-onnx_softmax"
    assert "portable-onnx_softmax" in [time.kernel for time in session.profile(inputs, 1)]


def detector(rng):
    """The end of a detector such as YOLOv8, after a convolution."""
    nodes, quantization = backbone(rng)
    nodes += [
        node("Reshape", ["features", "rows"], "all"),
        node("Split", ["all", "sizes"], "boxes", "scores", axis=1),
        node("Reshape", ["boxes", "bins"], "binned"),
        node("Transpose", ["binned"], "turned", perm=[0, 2, 1, 3]),
        node("Softmax", ["turned"], "shares", axis=1),
        node("Mul", ["shares", "weights"], "weighted"),
        node("ReduceSum", ["weighted", "one"], "distances", keepdims=0),
        node("Slice", ["distances", "zero", "one", "one"], "first"),
        node("Slice", ["distances", "one", "two", "one"], "second"),
        node("Sub", ["anchors", "first"], "low"),
        node("Add", ["anchors", "second"], "high"),
        node("Add", ["low", "high"], "sum"),
        node("Div", ["sum", "half"], "centre"),
        node("Sub", ["high", "low"], "size"),
        node("Concat", ["centre", "size"], "box", axis=1),
        node("Mul", ["box", "strides"], "scaled"),
        node("Sigmoid", ["scores"], "shown"),
        node("Concat", ["scaled", "shown"], "y", axis=1),
    ]
    constants = {
        "rows": ints(0, 8, 36), "sizes": ints(4, 4), "bins": ints(0, 2, 2, 36),
        "weights": np.arange(2, dtype=np.float32).reshape(1, 2, 1, 1),
        "zero": ints(0), "one": ints(1), "two": ints(2),
        "anchors": floats((1, 1, 36)), "half": np.float32(2).reshape(()),
        "strides": abs(floats((36,))),
    }  # fmt: skip
    return nodes, quantization, constants


def test_the_end_of_a_detector_is_one_program():
    nodes, quantization, constants = detector(np.random.default_rng(1))
    inputs = {"x": floats((2, 4, 6, 6))}
    graph = network(nodes, inputs, ["y", "features"], constants, quantization=quantization)
    assert len(Session(graph, threads=1)._plan(inputs).parts) == 1
    found = run(graph, inputs)
    values = constants | {"features": found["features"]}
    for each in nodes[2:]:
        results = numpy_ops.compute(
            each.op, each.attributes, 18, [values[name] for name in each.inputs], len(each.outputs)
        )
        values |= dict(zip(each.outputs, results, strict=True))
    np.testing.assert_allclose(found["y"], values["y"], rtol=1e-5, atol=1e-6)
    traced = Session(graph, threads=2).trace(inputs)
    for name in values.keys() - constants.keys():
        assert traced[name].shape == values[name].shape
        np.testing.assert_allclose(traced[name], values[name], rtol=1e-5, atol=1e-6)


def test_packed_operators_read_what_is_compiled():
    rng = np.random.default_rng(2)
    nodes, quantization = backbone(rng)
    nodes += [
        node("Reshape", ["features", "s"], "view"),
        Node("Tanh", "tanh", ["view"], ["t"]),
        node("Mul", ["view", "t"], "product"),
        Node("QuantizeLinear", "q2", ["product"], ["c2"]),
        Node("DequantizeLinear", "d", ["c2"], ["y"]),
        Node("Tanh", "tanh2", ["product"], ["z"]),
    ]
    quantization["c2"] = Quantization(0.05, 120, 8)
    inputs = {"x": floats((2, 4, 6, 6))}
    graph = network(
        nodes, inputs, ["y", "z", "features"], {"s": ints(2, 9, 4, 8)}, quantization=quantization
    )
    assert len(Session(graph, threads=1)._plan(inputs).parts) == 1
    found = run(graph, inputs)
    view = found["features"].reshape(2, 9, 4, 8)
    product = view * np.tanh(view)
    np.testing.assert_allclose(found["z"], np.tanh(product), rtol=1e-5, atol=1e-6)
    assert abs(found["y"] - np.clip(product, -6, 6.75)).max() < 0.03


def test_numpy_between_programs():
    x = floats((3, 4))
    nodes = [
        node("Neg", ["x"], "a"), node("Reshape", ["a", "s"], "view"), node("Sin", ["view"], "b"),
        node("Reshape", ["b", "t"], "c"), node("Abs", ["c"], "d"), node("NonZero", ["d"], "where"),
        node("Transpose", ["where"], "turned"), node("Exp", ["c"], "e"),
    ]  # fmt: skip
    inputs = {"x": x}
    graph = network(nodes, inputs, ["d", "e"], {"s": ints(2, 6), "t": ints(12)})
    graph.outputs.append(ValueInfo("turned", ("n", 1), (12, 1), "int64"))
    validate(graph)
    session = Session(graph, threads=2)
    assert steps_in_numpy(session, inputs) == ["Sin", "NonZero", "Transpose"]
    found = session.run(inputs)
    expected = np.sin(-x).reshape(12)
    near(found["d"], abs(expected))
    near(found["e"], np.exp(expected))
    np.testing.assert_array_equal(found["turned"], np.argwhere(expected))


def test_axes_that_are_given_twice():
    """The rule of shapes takes the attribute, the operator the input; nothing tells at 3 x 3."""
    nodes = [node("ReduceSum", ["x", "a"], "t", axes=[0]), node("Neg", ["t"], "y")]
    graph = network(nodes, {"x": floats((3, 3))}, ["y"], {"a": ints(1)})
    graph.inputs = [ValueInfo("x", ("n", "m"), (3, 3))]
    graph.outputs = [ValueInfo("y", ("p", "q"), (3, 1))]
    session = Session(graph)
    for shape in ((3, 3), (400, 3), (3, 400)):
        x = floats(shape)
        with contextlib.suppress(InputError):
            near(session.run(x), -x.sum(1, keepdims=True))


def test_another_size():
    """A session's outline serves other sizes, whose calls are others."""
    nodes = [node("Transpose", ["x"], "t", perm=[1, 0]), node("Softmax", ["t"], "y", axis=0)]
    x = floats((3, 4))
    graph = network(nodes, {"x": x}, ["y"])
    graph.inputs = [ValueInfo("x", ("n", 4), (3, 4))]
    graph.outputs = [ValueInfo("y", (4, "n"), (4, 3))]
    session = Session(graph)
    for n in (3, 1, 50, 3):
        x = floats((n, 4), n)
        near(session.run(x), numpy_ops.compute("Softmax", {"axis": 0}, 18, [x.T], 1)[0])


def test_values_that_numpy_refuses_are_still_refused():
    x = floats((4, 6))
    nodes = [node("Abs", ["x"], "a"), node("Gather", ["a", "i"], "y")]
    inputs = {"x": x, "i": ints(9)}
    graph = network(nodes, inputs, ["y"])
    with pytest.raises(InputError, match="'y' .Gather"):
        Session(graph).run(inputs)


# --- recurrent networks ---------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(op, length, batch, inputs, hidden, seed, *, direction="forward", layout=0,
              lengths=None, states=True, bias=True, peepholes=False):  # fmt: skip
    """Inputs of a recurrent operator, None for those that are not given."""
    directions, gates = 2 if direction == "bidirectional" else 1, GATES[op]
    state = (batch, directions, hidden) if layout else (directions, batch, hidden)
    values = [
        floats((batch, length, inputs) if layout else (length, batch, inputs), seed),
        floats((directions, gates * hidden, inputs), seed + 1) / 4,
        floats((directions, gates * hidden, hidden), seed + 2) / 4,
        floats((directions, 2 * gates * hidden), seed + 3) if bias else None,
        lengths, floats(state, seed + 4) if states else None,
    ]  # fmt: skip
    if op == "LSTM":
        values.append(floats(state, seed + 5) if states else None)
        values.append(floats((directions, 3 * hidden), seed + 6) if peepholes else None)
    return values


def check_recurrent(op, values, outputs, **attributes):
    """Compare with NumPy: weights are constants; inputs and states, and lengths, are given."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(values)]
    tensors = {name: x for name, x in zip(names, values, strict=True) if name}
    given = {name: tensors.pop(name) for name in ("x0", "x4", "x5", "x6") if name in tensors}
    graph = network(
        [node(op, names, *outputs, **attributes)], given, [n for n in outputs if n], tensors, 22
    )
    found = run(graph, given)
    expected = numpy_ops.compute(op, attributes, 22, values, 3 if op == "LSTM" else 2)
    for name, y in zip(outputs, expected, strict=False):
        if name:
            assert found[name].shape == y.shape and found[name].dtype == y.dtype
            np.testing.assert_allclose(found[name], y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", GATES)
@settings(max_examples=12)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (5, 11, 20, 35)]), seed=SEEDS,
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]), data=st.data(),
)  # fmt: skip
def test_recurrent(op, sizes, seed, direction, data):
    length, batch, inputs, hidden = sizes
    flags = [data.draw(st.booleans()) for _ in range(6)]
    layout, states, bias, peepholes, coupled, linear = flags
    attributes = {"hidden_size": hidden, "direction": direction, "layout": int(layout)}
    if data.draw(st.booleans()):
        attributes["clip"] = 1.5
    attributes |= {"input_forget": int(coupled)} if op == "LSTM" else {}
    attributes |= {"linear_before_reset": int(linear)} if op == "GRU" else {}
    lengths = None
    if data.draw(st.booleans()):
        lengths = np.array(
            data.draw(st.lists(st.integers(-1, length + 2), min_size=batch, max_size=batch)),
            np.int32,
        )
    values = recurrent(op, length, batch, inputs, hidden, seed % 1000, direction=direction,
                       layout=layout, lengths=lengths, states=states, bias=bias,
                       peepholes=peepholes and op == "LSTM")  # fmt: skip
    wanted = data.draw(st.sampled_from([("y", "h", "c"), ("y",), ("", "h"), ("", "", "c")]))
    outputs = wanted if op == "LSTM" else [n for n in wanted if n != "c"]
    check_recurrent(op, values, outputs if any(outputs) else ["y"], **attributes)


@pytest.mark.parametrize("name", functions.RECURRENT_FUNCTIONS)
def test_activation_functions_of_recurrent_networks(name):
    attributes = {"hidden_size": 5, "direction": "bidirectional"}
    for op, count in (("RNN", 2), ("GRU", 4), ("LSTM", 6)):
        values = recurrent(op, 3, 2, 4, 5, 1, direction="bidirectional")
        # Small: without bounds, errors grow as numbers do.
        values[:4] = [v / 4 for v in values[:4]]
        check_recurrent(
            op, values, ["y"], **attributes,
            activations=[name.upper()] * (count - 1) + ["Tanh"],
            activation_alpha=[0.3, 0.6], activation_beta=[0.4],
        )  # fmt: skip


def test_recurrent_networks_that_numpy_runs():
    """What has no kernel: a function without one, and weights that only a run tells."""
    values = recurrent("LSTM", 3, 2, 4, 5, 1)
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(values)]
    tensors = {name: x for name, x in zip(names, values, strict=True) if name}
    softplus = {"activations": ["Sigmoid", "Softplus", "Tanh"]}
    for names_given, attributes in ((["x0", "x1"], {}), (["x0"], softplus)):
        inputs = {name: tensors[name] for name in names_given}
        others = {name: x for name, x in tensors.items() if name not in names_given}
        graph = network([node("LSTM", names, "y", **attributes)], inputs, ["y"], others)
        session = Session(graph)
        assert steps_in_numpy(session, inputs) == ["LSTM"]
        (expected,) = numpy_ops.compute("LSTM", attributes, 18, values, 1)
        np.testing.assert_array_equal(session.run(inputs), expected)


def test_weights_of_recurrent_networks_are_laid_out_once():
    values = recurrent("GRU", 3, 2, 4, 5, 1, states=False)
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(values)]
    constants = dict(zip(names[1:4], values[1:4], strict=True))
    graph = network([node("GRU", names, "y")], {"x0": values[0]}, ["y"], constants)
    graph.inputs[0] = ValueInfo("x0", ("length", 2, 4), (3, 2, 4))
    session = Session(graph)
    for length in (3, 1, 8):
        x = floats((length, 2, 4), length)
        (expected,) = numpy_ops.compute("GRU", {}, 18, [x, *values[1:]], 1)
        np.testing.assert_allclose(session.run(x), expected, rtol=1e-5, atol=1e-5)
    held = session._planner._prepared
    assert sum(array.nbytes for array in held.values()) == 4 * (4 * 48 + 5 * 48 + 64)


# --- of several tensors, of channels, and other moves ---------------------------------------------


@pytest.mark.parametrize("op", ["Max", "Min", "Sum"])
def test_of_three(op):
    check(op, floats((2, 3, 4)), floats((3, 1), 1), floats((4,), 2))
    shapes = [(4,), (3, 1), (2, 3, 4)]  # the first two do not make the whole
    given = {f"x{i}": floats(shape, i) for i, shape in enumerate(shapes)}
    session = Session(network([node(op, [*given], "y")], given, ["y"]))
    assert steps_in_numpy(session, given) == [op]


@settings(max_examples=20)
@given(arrays.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=7), SEEDS)
def test_batch_normalization(shape, seed):
    factors = floats((4, shape[1]), seed)
    names = ["scale", "bias", "mean", "variance"]
    constants = dict(zip(names, [*factors[:3], abs(factors[3])], strict=True))
    x = {"x": floats(shape, seed + 1)}
    graph = network([node("BatchNormalization", ["x", *names], "y")], x, ["y"], constants)
    given = [x["x"], *constants.values()]
    (expected,) = numpy_ops.compute("BatchNormalization", {}, 18, given, 1)
    np.testing.assert_allclose(run(graph, x)["y"], expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=20)
@given(SHAPES, SEEDS, st.data())
def test_tile(shape, seed, data):
    check("Tile", floats(shape[:4], seed), ints(*(data.draw(st.integers(1, 3)) for _ in shape[:4])))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depths_and_spaces(mode):
    check("DepthToSpace", floats((2, 12, 3, 5)), blocksize=2, mode=mode)
    check("SpaceToDepth", floats((2, 3, 6, 4)), blocksize=2, mode=mode)


@settings(max_examples=30)
@given(SHAPES, SEEDS, st.data())
def test_pad(shape, seed, data):
    pads = [data.draw(st.integers(-((n - 1) // 2), 3)) for n in (*shape, *shape)]
    check("Pad", floats(shape, seed), ints(*pads), mode="constant")
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    chosen = [pads[axis + more] for more in (0, len(shape)) for axis in axes]
    graph = network(
        [node("Pad", ["x", "pads", "value", "axes"], "y")], {"x": floats(shape, seed)}, ["y"],
        {"pads": ints(*chosen), "value": np.array(2.5, np.float32), "axes": ints(*axes)},
    )  # fmt: skip
    inputs = [floats(shape, seed), ints(*chosen), np.array(2.5, np.float32), ints(*axes)]
    (expected,) = numpy_ops.compute("Pad", {}, 18, inputs, 1)
    np.testing.assert_array_equal(run(graph, {"x": inputs[0]})["y"], expected)


def test_global_pools():
    for shape in ((2, 3, 4, 5, 6), (2, 3, 7)):
        check("GlobalAveragePool", floats(shape), compare=close)
        check("GlobalMaxPool", floats(shape))


@pytest.mark.parametrize("shape", [(1, 40, 16), (2, 17, 33), (3, 16, 15), (1, 100, 64)])
def test_transposes_by_tiles(shape):
    check("Transpose", floats(shape), perm=[0, 2, 1])
    x, part = floats(shape), (slice(None), slice(1, None), slice(None))
    nodes = [node("Slice", ["x", "one", "all", "one"], "s"), node("Transpose", ["s"], "y")]
    constants = {"one": ints(1), "all": ints(2**31)}
    found = run(network(nodes, {"x": x}, ["y"], constants), {"x": x})["y"]
    np.testing.assert_array_equal(found, x[part].T)


def test_chains_of_views_are_one_move():
    x = floats((6, 4, 24))
    nodes = [
        node("Reshape", ["x", "heads"], "a"), node("Transpose", ["a"], "b", perm=[3, 1, 2, 0, 4]),
        node("Squeeze", ["b", "third"], "c"), node("Gather", ["c", "last"], "d"),
        node("Concat", ["d", "d"], "y", axis=1),
    ]  # fmt: skip
    constants = {"heads": ints(6, 4, 1, 3, 8), "third": ints(2), "last": np.array(-1, np.int64)}
    graph = network(nodes, {"x": x}, ["y"], constants)
    part = x.reshape(6, 4, 3, 8).transpose(2, 1, 0, 3)[-1]
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], np.concatenate([part, part], 1))
    assert [s.node.op for s in Session(graph)._plan({"x": x}).steps] == ["Concat", "Concat"]


# --- normalizations -------------------------------------------------------------------------------


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@settings(max_examples=40)
@given(SHAPES, SEEDS, st.data())
def test_layer_normalization(shape, seed, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis:] if axis < 0 else shape[axis % len(shape) :]
    outputs = data.draw(st.integers(1, 3))
    given = [floats(shape, seed), floats(size, seed + 1)]
    if data.draw(st.booleans()):
        given.append(floats(size, seed + 2))
    check("LayerNormalization", *given, outputs=outputs, axis=axis, epsilon=1e-3, compare=close)
    check("RMSNormalization", *given[:2], opset=23, axis=axis, epsilon=1e-3, compare=close)


def test_scale_of_a_layer_normalization_that_is_repeated():
    x, scale = floats((5, 3, 4)), floats((4,), 1)
    graph = network(
        [node("LayerNormalization", ["x", "scale"], "y", axis=1)], {"x": x}, ["y"], {"scale": scale}
    )
    (expected,) = numpy_ops.compute("LayerNormalization", {"axis": 1}, 18, [x, scale], 1)
    close(run(graph, {"x": x})["y"], expected)


@settings(max_examples=30)
@given(
    arrays.array_shapes(min_dims=3, max_dims=5, min_side=1, max_side=9), SEEDS, st.integers(1, 4)
)
def test_normalizations_of_channels(shape, seed, groups):
    count, size, *rest = shape
    x, few = floats((count, groups * size, *rest), seed), floats((2, groups), seed + 1)
    many = floats((2, groups * size), seed + 2)
    check("InstanceNormalization", x, *many, epsilon=1e-3, compare=close)
    for opset, values in ((18, few), (21, many)):
        check("GroupNormalization", x, *values, opset=opset, num_groups=groups, epsilon=1e-3,
              compare=close)  # fmt: skip


@settings(max_examples=30)
@given(arrays.array_shapes(min_dims=4, max_dims=4, min_side=2, max_side=9), SEEDS, st.data())
def test_other_normalizations(shape, seed, data):
    check("LpNormalization", floats(shape, seed), axis=data.draw(st.integers(-4, 3)), compare=close)
    axes = data.draw(st.sampled_from([[0, 2, 3], [2, 3], [1, 2, 3], [0, 1, 2, 3], [-1], [0]]))
    check("MeanVarianceNormalization", floats(shape, seed), axes=axes, compare=close)


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization", "LpNormalization"])
def test_normalization_of_what_is_the_same_everywhere(op):
    for value in (0.0, 1e4, -3e-5):
        x = np.full((3, 40), value, np.float32)
        factors = [] if op == "LpNormalization" else [np.ones(40, np.float32)]
        check(op, x, *factors, opset=23, compare=partial(np.testing.assert_allclose, atol=1e-3))


# --- moves by indices -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(SHAPES, SEEDS, st.data())
def test_gather(shape, seed, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    index = st.integers(-shape[axis], shape[axis] - 1)
    indices = data.draw(st.one_of(index, st.lists(index, min_size=1, max_size=9)))
    check("Gather", floats(shape, seed), np.array(indices, np.int64), axis=axis)


def test_gather_that_numpy_runs():
    """Indices that only a run tells, and such as are spread too far."""
    x = floats((900, 2))
    graph = network([node("Gather", ["x", "i"], "y")], {"x": x, "i": ints(3, -1)}, ["y"])
    session = Session(graph)
    np.testing.assert_array_equal(session.run({"x": x, "i": ints(3, -1)}), x[[3, -1]])
    indices = np.random.default_rng(0).integers(0, 900, 400)
    graph = network([node("Gather", ["x", "i"], "y")], {"x": x}, ["y"], {"i": indices})
    assert steps_in_numpy(Session(graph), {"x": x}) == ["Gather"]
