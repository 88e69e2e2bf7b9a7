"""ONNX operators in NumPy, against onnxruntime and onnx.reference."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("onnxruntime", reason="results are compared with those of onnxruntime")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from logshift.kernels.errors import InputError  # noqa: E402
from logshift.runtime.onnx_ops import numpy_ops  # noqa: E402
from logshift.runtime.onnx_ops.numpy_ops import compute  # noqa: E402

# Nothing warns, whatever the inputs are.
pytestmark = pytest.mark.filterwarnings("error")

F = np.float32
NEWEST = 18  # where nothing else is said
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
AXES = st.integers(-4, 3)


def ints(*values):
    return np.array(values, np.int64)


def values(shape, seed=0, dtype=F, scale=3.0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return np.asarray(scale * rng.standard_normal(shape), dtype)
    if np.dtype(dtype) == bool:
        return np.asarray(rng.integers(0, 2, shape), bool)
    low = 0 if np.dtype(dtype).kind == "u" else -9
    return np.asarray(rng.integers(low, 10, shape), dtype)


@cache
def evaluator(op, attributes, opset, dtypes, ranks, outputs, reference):
    kinds = [None if d is None else helper.np_dtype_to_tensor_dtype(np.dtype(d)) for d in dtypes]
    names = [f"x{i}" if kind else "" for i, kind in enumerate(kinds)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, **{k: _listed(v) for k, v in attributes})
    graph = helper.make_graph(
        [node],
        op,
        [
            helper.make_tensor_value_info(name, kind, [None] * rank)
            for name, kind, rank in zip(names, kinds, ranks, strict=True)
            if kind
        ],
        [onnx.ValueInfoProto(name=name) for name in results],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if reference:
        return ReferenceEvaluator(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def expected(op, inputs, opset=NEWEST, outputs=1, reference=False, **attributes):
    """Return what onnxruntime or onnx.reference makes of it."""
    key = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in attributes.items())
    dtypes = tuple(None if x is None else x.dtype.name for x in inputs)
    ranks = tuple(0 if x is None else x.ndim for x in inputs)
    run = evaluator(op, key, opset, dtypes, ranks, outputs, reference).run
    return run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})


def compare(
    op, *inputs, rtol=1e-5, atol=1e-6, opset=NEWEST, outputs=1, reference=False, **attributes
):
    """Compare with another implementation; inputs must stay what they are."""
    inputs = [None if x is None else np.asarray(x) for x in inputs]
    before = [None if x is None else x.copy() for x in inputs]
    found = compute(op, attributes, opset, inputs, outputs)
    for x, y in zip(before, inputs, strict=True):
        np.testing.assert_array_equal(x, y)
    wanted = expected(op, inputs, opset, outputs, reference, **attributes)
    assert len(found) == outputs
    for y, e in zip(found, wanted, strict=True):
        assert type(y) is np.ndarray and y.dtype == e.dtype and y.shape == e.shape
        np.testing.assert_allclose(y, e, rtol, atol)
    return found


def refused(message, op, *inputs, opset=NEWEST, outputs=1, **attributes):
    with pytest.raises(InputError, match=message):
        compute(op, attributes, opset, inputs, outputs)


# --- element-wise ---------------------------------------------------------------------------------

BETWEEN = {"Acos": (-1, 1), "Asin": (-1, 1), "Atanh": (-0.9, 0.9), "Acosh": (1, 50),
           "Log": (0.01, 50), "Sqrt": (0, 50), "Sinh": (-9, 9), "Cosh": (-9, 9),
           "Tan": (-1.5, 1.5)}  # fmt: skip
FLOAT_UNARY = sorted(set(numpy_ops.elementwise._UNARY) - {"BitwiseNot", "Not", "Identity"})
# Operators that are compared with onnx.reference, and their version.
OF_REFERENCE = {"Swish": 24}


@pytest.mark.parametrize("op", FLOAT_UNARY)
@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=15)
def test_unary(op, shape, seed):
    low, high = BETWEEN.get(op, (-30, 30))
    x = np.asarray(np.random.default_rng(seed).uniform(low, high, shape), F)
    compare(op, x, opset=20)


@pytest.mark.parametrize("op", sorted(numpy_ops.elementwise._PARAMETRIC))
@given(shape=SHAPES, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=15)
def test_unary_with_attributes(op, shape, seed, data):
    defaults = numpy_ops.elementwise._PARAMETRIC[op][1]
    attributes = {}
    for name, default in defaults.items():
        if data.draw(st.booleans()):
            attributes[name] = data.draw(
                st.floats(0.125, 2, width=16) if isinstance(default, float)
                else st.sampled_from(["none", "tanh"]) if isinstance(default, str)
                else st.integers(0, 1)
            )  # fmt: skip
    opset = OF_REFERENCE.get(op, 20)
    compare(op, values(shape, seed), opset=opset, reference=op in OF_REFERENCE, **attributes)


@pytest.mark.parametrize("op", ["Sigmoid", "Erf", "Tanh", "Softplus", "Relu", "HardSigmoid", "Elu"])
def test_infinite(op):
    x = np.array([np.inf, -np.inf, 88, 89, -88, -89, -104, 500, -500, 0], F)
    compare(op, x, atol=1e-37)
    assert np.isnan(compute(op, {}, NEWEST, [np.array(np.nan, F)], 1)[0])


def test_erf_is_relatively_exact():
    from math import erf

    x = np.concatenate([-np.logspace(-30, 1, 500), [0], np.logspace(-30, 1, 500)])
    exact = np.array([erf(v) for v in x.astype(F).astype(float)])
    for dtype in (F, np.float64):
        (y,) = compute("Erf", {}, NEWEST, [x.astype(dtype)], 1)
        np.testing.assert_allclose(y, exact if dtype == F else [erf(v) for v in x], 5e-7, 1e-37)
        assert np.abs(y).max() == 1


@pytest.mark.parametrize("op", ["Sigmoid", "Erf", "Gelu", "Softmax", "Mish"])
def test_half_precision(op):
    x = np.linspace(-14, 14, 57, dtype=np.float16)
    (y,) = compute(op, {}, 20, [x], 1)
    (exact,) = compute(op, {}, 20, [x.astype(np.float64)], 1)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, exact, 4e-3, 1e-3 if op in ("Gelu", "Mish") else 1e-6)


FLOATS, INTEGERS = [F, np.float64], [np.int32, np.int64]
BINARY = {
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Pow"], [*FLOATS, *INTEGERS]),
    **dict.fromkeys(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"], [F, np.int64]),
    **dict.fromkeys(["And", "Or", "Xor"], [bool]),
    **dict.fromkeys(["BitwiseAnd", "BitwiseOr", "BitwiseXor"], [np.int32, np.uint8]),
    "Mod": INTEGERS,
}  # fmt: skip


@pytest.mark.parametrize("op, dtype", [(op, d) for op, dtypes in BINARY.items() for d in dtypes])
@given(
    shapes=arrays.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_binary(op, dtype, shapes, seed):
    x, y = (values(s, seed + i, dtype) for i, s in enumerate(shapes.input_shapes))
    if op == "Pow":
        x, y = np.abs(x), np.abs(y) % 4
    elif op in ("Div", "Mod"):
        y = np.where(y == 0, 1, y).astype(dtype)
    compare(op, x, y)


def test_integer_division_goes_towards_zero():
    x = np.array([7, -7, 7, -7, 2**62 + 1], np.int64)
    y = np.array([2, 2, -2, -2, 1], np.int64)
    assert compute("Div", {}, NEWEST, [x, y], 1)[0].tolist() == [3, -3, -3, 3, 2**62 + 1]


@given(shapes=arrays.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=4))
@settings(max_examples=20)
def test_remainders_and_shifts(shapes):
    x, y = (values(s, i) for i, s in enumerate(shapes.input_shapes))
    compare("Mod", x, y, fmod=1, rtol=1e-3)
    x, y = (
        np.abs(values(s, i, np.int64)).astype(np.uint32) for i, s in enumerate(shapes.input_shapes)
    )
    for direction in ("LEFT", "RIGHT"):
        compare("BitShift", x, y, direction=direction)


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
@given(
    shapes=st.integers(1, 4).flatmap(
        lambda n: arrays.mutually_broadcastable_shapes(num_shapes=n, max_dims=3, max_side=4)
    )
)
@settings(max_examples=15)
def test_variadic(op, shapes):
    compare(op, *(values(s, i) for i, s in enumerate(shapes.input_shapes)))


@given(
    shapes=arrays.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, min_side=0, max_side=4)
)
def test_where(shapes):
    condition, x, y = (values(s, i) for i, s in enumerate(shapes.input_shapes))
    compare("Where", condition > 0, x, y)


@given(shape=SHAPES, low=st.none() | st.floats(-3, 3), high=st.none() | st.floats(-3, 3))
def test_clip(shape, low, high):
    x = values(shape)
    bounds = [None if v is None else np.array(v, F) for v in (low, high)]
    compare("Clip", x, *bounds)
    attributes = {k: float(F(v)) for k, v in (("min", low), ("max", high)) if v is not None}
    if low is None or high is None or F(low) <= F(high):  # else onnxruntime refuses it
        compare("Clip", x, opset=7, **attributes)


def test_prelu():
    x = values((2, 3, 4))
    for shape in ((), (1,), (4,), (3, 1), (2, 3, 4)):
        compare("PRelu", x, np.abs(values(shape, 1)))
    refused("more dimensions", "PRelu", x, values((4, 2, 3, 4)))


def test_dropout():
    x = values((2, 3))
    y, mask = compute("Dropout", {}, 13, [x], 2)
    assert np.array_equal(y, x) and mask.dtype == bool and mask.all()
    compare("Dropout", x, opset=7, ratio=0.25)
    refused("training", "Dropout", x, np.array(0.5, F), np.array(True))


@pytest.mark.parametrize("source", ["float32", "float64", "int8", "uint8", "int64", "bool"])
@pytest.mark.parametrize("number", sorted(numpy_ops.types._DTYPES))
def test_cast(source, number):
    x = np.arange(6) - (2 if source != "uint8" and numpy_ops.types._DTYPES[number][0] != "u" else 0)
    x = x.reshape(2, 3).astype(source)
    compare("Cast", x, opset=13, to=number)
    compare("CastLike", x, np.zeros(2, numpy_ops.types._DTYPES[number]), opset=15)


# --- shapes ---------------------------------------------------------------------------------------


@given(shape=arrays.array_shapes(min_dims=1, max_dims=4, min_side=0), axis=AXES)
def test_flatten(shape, axis):
    assume(-len(shape) <= axis <= len(shape))
    compare("Flatten", values(shape), axis=axis)


@pytest.mark.parametrize(
    "shape, sizes, attributes",
    [
        ((2, 3, 4), [4, 6], {}), ((2, 3, 4), [0, -1], {}), ((2, 3, 4), [-1, 2], {}),
        ((2, 0, 4), [0, 0, 2, 2], {}), ((2, 0, 4), [3, 0, 5], {"allowzero": 1}), ((1,), [], {}),
        ((), [1, -1], {}),
    ],
)  # fmt: skip
def test_reshape(shape, sizes, attributes):
    compare("Reshape", values(shape), ints(*sizes), **attributes)


def test_squeeze_and_unsqueeze():
    x = values((1, 3, 1, 2))
    for opset, axes in ((11, [0, 2]), (11, [2]), (13, [-2]), (13, [0, -2])):
        given = {"axes": axes} if opset < 13 else {}
        more = [] if opset < 13 else [ints(*axes)]
        compare("Squeeze", x, *more, opset=opset, **given)
        compare("Unsqueeze", x, *more, opset=opset, **given)
    compare("Squeeze", x)
    refused("repeated", "Unsqueeze", x, ints(0, 0))
    refused("not equal to one", "Squeeze", x, ints(1))


@given(data=st.data(), shape=arrays.array_shapes(max_dims=4, min_side=0, max_side=4))
def test_transpose_tile_and_expand(data, shape):
    x = values(shape)
    compare("Transpose", x)
    compare("Transpose", x, perm=data.draw(st.permutations(range(len(shape)))))
    compare(
        "Tile",
        x,
        ints(*data.draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))),
    )
    wanted = data.draw(arrays.broadcastable_shapes(shape, max_dims=5, min_side=0, max_side=4))
    assume(0 not in shape)
    compare("Expand", x, ints(*wanted))


@given(data=st.data(), shape=arrays.array_shapes(max_dims=3, min_side=0, max_side=5))
def test_concat_and_split(data, shape):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    parts = []
    for i, size in enumerate(sizes):
        own = list(shape)
        own[axis] = size
        parts.append(values(own, i))
    (x,) = compare("Concat", *parts, axis=axis)
    compare("Split", x, ints(*sizes), opset=13, outputs=len(sizes), axis=axis)
    compare("Split", x, opset=11, outputs=len(sizes), axis=axis, split=sizes)
    size = x.shape[axis]
    for count in range(1, size + 1):
        if -(-size // count) * (count - 1) < size:
            compare("Split", x, outputs=count, axis=axis, num_outputs=count)
        if size % count == 0:
            compare("Split", x, opset=13, outputs=count, axis=axis)


EXTREMES = st.integers(-7, 7) | st.sampled_from([-(2**63), 2**63 - 1, -(2**31), 2**31 - 1])


@given(data=st.data(), shape=arrays.array_shapes(max_dims=3, min_side=0, max_side=5))
@settings(max_examples=300)
def test_slice(data, shape):
    x = values(shape)
    rank = len(shape)
    axes = data.draw(st.lists(st.integers(0, rank - 1), unique=True, min_size=1))
    count = len(axes)
    axes = [axis - rank * data.draw(st.booleans()) for axis in axes]
    starts, ends = (data.draw(st.lists(EXTREMES, min_size=count, max_size=count)) for _ in "se")
    nonzero = st.integers(-3, 3).filter(bool) | st.sampled_from([-(2**62), 2**62])
    steps = data.draw(st.lists(nonzero, min_size=count, max_size=count))
    # That far back is to the first element for onnxruntime, but not as ONNX says.
    far = 2**31 - 1
    ends = [min(end, far - 1) if step < 0 else end for end, step in zip(ends, steps, strict=True)]
    compare("Slice", x, ints(*starts), ints(*ends), ints(*axes), ints(*steps))
    compare("Slice", x, ints(*starts), ints(*ends), ints(*axes))
    compare("Slice", x, opset=9, starts=starts, ends=ends, axes=axes)


@given(data=st.data(), shape=arrays.array_shapes(max_dims=4, min_side=3, max_side=5))
@settings(max_examples=150)
def test_pad(data, shape):
    x, rank = values(shape), len(shape)
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    pads = data.draw(
        st.lists(
            st.integers(-1 if mode == "constant" else 0, 2), min_size=2 * rank, max_size=2 * rank
        )
    )
    value = np.array(1.5, F) if mode == "constant" else None
    compare("Pad", x, ints(*pads), value, opset=19, mode=mode)
    if mode != "wrap":
        more = {} if value is None else {"value": 1.5}
        compare("Pad", x, opset=7, mode=mode, pads=pads, **more)
    axis = data.draw(st.integers(-rank, rank - 1))
    compare("Pad", x, ints(1, 2), value, ints(axis), opset=19, mode=mode)


def test_shape_and_size():
    x = values((2, 3, 4))
    compare("Size", x)
    for attributes in (
        {},
        {"start": 1},
        {"end": -1},
        {"start": -9, "end": 9},
        {"start": 2, "end": 1},
    ):
        compare("Shape", x, **attributes)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode):
    x = values((2, 12, 4, 6))
    compare("DepthToSpace", x, opset=13, blocksize=2, mode=mode)
    compare("SpaceToDepth", x, opset=13, blocksize=2)
    refused(None, "DepthToSpace", x, blocksize=0)


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("k", [None, 0, 1, -2, 9, -9, 2**62, -(2**63)])
def test_trilu(upper, k):
    (y,) = compute(
        "Trilu", {"upper": upper}, 14, [values((2, 3, 4)), *([] if k is None else [np.array(k)])], 1
    )
    clamped = max(min(k or 0, 5), -5)
    np.testing.assert_array_equal(y, (np.triu if upper else np.tril)(values((2, 3, 4)), clamped))
    refused("matrices", "Trilu", values(3))


# --- indices --------------------------------------------------------------------------------------


@given(data=st.data(), shape=arrays.array_shapes(max_dims=4, max_side=4), more=SHAPES)
def test_gather(data, shape, more):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    assume(len(more) < 3)
    indices = np.random.default_rng(0).integers(-size, size, more)
    compare("Gather", values(shape), indices, axis=axis)


@given(data=st.data(), shape=arrays.array_shapes(max_dims=3, max_side=4))
def test_gather_and_scatter_elements(data, shape):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    # Indices may be of fewer elements than the data.
    part = [data.draw(st.integers(1, size)) for size in shape]
    part[axis] = data.draw(st.integers(1, 4))
    size, rng = shape[axis], np.random.default_rng(0)
    indices = rng.integers(-size, size, part)
    compare("GatherElements", values(shape), indices, axis=axis)
    for reduction in ("none", "add", "mul", "max", "min"):
        if reduction == "none":  # the order of assignments is no matter of the operator
            indices = np.broadcast_to(
                ints(0).reshape([1] * len(shape)),
                [1 if i == axis % len(shape) else n for i, n in enumerate(part)],
            )
            indices = np.ascontiguousarray(indices)
        else:
            indices = rng.integers(-size, size, part)
        updates = values(indices.shape, 1)
        compare("ScatterElements", values(shape), indices, updates, axis=axis, reduction=reduction)


@given(data=st.data(), shape=arrays.array_shapes(min_dims=1, max_dims=4, max_side=4))
def test_gather_and_scatter_nd(data, shape):
    x, rng = values(shape), np.random.default_rng(0)
    batch = data.draw(st.integers(0, len(shape) - 1))
    depth = data.draw(st.integers(1, len(shape) - batch))
    count = data.draw(st.integers(1, 3))
    sizes = shape[batch : batch + depth]

    def drawn(*own):
        columns = [rng.integers(-n, n, own) for n in sizes]
        return np.stack(columns, -1)

    compare("GatherND", x, drawn(*shape[:batch], count), opset=13, batch_dims=batch)
    if batch == 0:
        for reduction in ("add", "mul", "max", "min"):
            indices = drawn(count)
            updates = values((count, *shape[depth:]), 1)
            compare("ScatterND", x, indices, updates, reduction=reduction)
        compare("ScatterND", x, drawn(1), values((1, *shape[depth:]), 1), opset=13)


def test_gathering_nothing():
    x = values((0, 3))
    assert compute("GatherND", {}, 13, [x, np.zeros((0, 1), np.int64)], 1)[0].shape == (0, 3)
    empty = np.zeros((0, 3), np.int64)
    assert compute("GatherElements", {}, 13, [values((2, 3)), empty], 1)[0].shape == (0, 3)


def test_indices_are_checked():
    x = values((2, 3))
    refused("bounds", "Gather", x, ints(2))
    refused("bounds", "GatherElements", x, ints(2).reshape(1, 1))
    refused("bounds", "GatherND", x, ints(0, 3).reshape(1, 2))
    refused("bounds", "ScatterElements", x, ints(-3).reshape(1, 1), values((1, 1)))
    refused("updates", "ScatterElements", x, np.zeros((1, 2), np.int64), values((1, 1)))
    refused("updates", "ScatterND", x, ints(0).reshape(1, 1), values((1,)))
    refused("reduction", "ScatterND", x, ints(0).reshape(1, 1), values((1, 3)), reduction="most")
    refused("rank", "GatherElements", x, ints(0))
    refused("batch_dims", "GatherND", x, ints(0).reshape(1, 1), batch_dims=1)


@given(shape=arrays.array_shapes(max_dims=3, max_side=6), data=st.data())
def test_top_k(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(0, shape[axis]))
    # With equal values among them.
    x = values(shape, data.draw(st.integers(0, 9)), np.int64).astype(F)
    for largest in (0, 1):
        compare("TopK", x, ints(k), outputs=2, axis=axis, largest=largest)
    if k:
        compare("TopK", x, opset=9, outputs=2, axis=axis, k=k)
    refused("k is", "TopK", x, ints(shape[axis] + 1), axis=axis)


@given(shape=arrays.array_shapes(max_dims=3, min_side=1, max_side=5), data=st.data())
def test_cumulative(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    modes = {"exclusive": data.draw(st.integers(0, 1)), "reverse": data.draw(st.integers(0, 1))}
    for x in (values(shape), values(shape, 0, np.int64)):
        compare("CumSum", x, np.array(axis), **modes)
        compare("CumProd", x, np.array(axis), opset=26, reference=True, rtol=1e-4, **modes)


def test_exclusive_sums_stay_finite_before_infinity():
    (y,) = compute("CumSum", {"exclusive": 1}, 14, [np.array([1, np.inf, 2], F), ints(0)], 1)
    assert y.tolist() == [0, 1, np.inf]
    assert compute("CumSum", {"exclusive": 1}, 14, [values((0,)), ints(0)], 1)[0].shape == (0,)


def test_one_hot():
    indices = ints(0, 2, -1, 5, -9).reshape(5, 1)
    for axis in (-1, 0, 1, 2, -3):
        compare("OneHot", indices, np.array(3), np.array([0.5, 2], F), axis=axis)
    refused(None, "OneHot", indices, np.array(3), np.array([0.5, 2], F), axis=5)
    refused("shape", "OneHot", indices, np.array(2**40), np.array([0.5, 2], F))


@given(shape=SHAPES, data=st.data())
def test_what_depends_on_data(shape, data):
    x = values(shape, 0, np.int64).astype(F)
    assume(shape)
    compare("NonZero", x)
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    size = x.size if axis is None else shape[axis]
    condition = np.array(data.draw(st.lists(st.booleans(), max_size=size)), bool)
    assume(condition.any())
    compare("Compress", x, condition, **({} if axis is None else {"axis": axis}))


@pytest.mark.parametrize("dtype", [F, np.float64, np.int32, np.int64])
@pytest.mark.parametrize(
    "start, limit, delta", [(0, 5, 1), (10, 3, -2), (3, 3, 1), (3, 0, 1), (1, 8, 3)]
)
def test_range(dtype, start, limit, delta):
    compare("Range", *(np.array(v, dtype) for v in (start, limit, delta)))


# --- reductions -----------------------------------------------------------------------------------

REDUCTIONS = [f"Reduce{kind}" for kind in numpy_ops.reductions._REDUCE]


@pytest.mark.parametrize("op", REDUCTIONS)
@given(shape=arrays.array_shapes(max_dims=4, max_side=4), data=st.data())
@settings(max_examples=25)
def test_reduce(op, shape, data):
    rank = len(shape)
    axes = data.draw(st.lists(st.integers(0, rank - 1), unique=True))
    axes = [axis - rank * data.draw(st.booleans()) for axis in axes]
    keep = data.draw(st.integers(0, 1))
    x = values(shape)
    x = np.abs(x) + F(0.1) if op == "ReduceLogSum" else x
    # Without axes versions of onnxruntime differ.
    noop = data.draw(st.integers(0, 1)) if axes else 0
    compare(op, x, ints(*axes), rtol=1e-4, keepdims=keep, noop_with_empty_axes=noop)
    compare(op, x, rtol=1e-4, keepdims=keep)
    if axes:
        compare(op, x, opset=11, rtol=1e-4, keepdims=keep, axes=axes)
    if op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"):
        compare(op, values(shape, 0, np.int32), keepdims=keep)
    refused("axes", op, x, ints(rank))


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reducing_no_axes(op):
    x = np.abs(values((2, 3)))
    for axes in ([ints()], []):
        compare(op, x, *axes, reference=True, rtol=1e-4, noop_with_empty_axes=1)


@pytest.mark.parametrize("op", sorted(set(REDUCTIONS) - {"ReduceMean"}))
def test_reducing_nothing(op):
    compare(op, values((2, 0, 3)), ints(1), opset=20, reference=True)


def test_means_of_nothing():
    assert np.isnan(compute("ReduceMean", {}, NEWEST, [values((2, 0)), ints(1)], 1)[0]).all()
    assert np.isnan(compute("GlobalAveragePool", {}, NEWEST, [values((1, 2, 0, 3))], 1)[0]).all()


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@given(shape=arrays.array_shapes(max_dims=3, max_side=5), data=st.data())
@settings(max_examples=40)
def test_arg(op, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = values(shape, 0, np.int64).astype(F)
    for last in (0, 1):
        compare(op, x, axis=axis, keepdims=data.draw(st.integers(0, 1)), select_last_index=last)


# --- products and normalisations ------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@given(shape=arrays.array_shapes(max_dims=4, min_side=0, max_side=4), data=st.data())
@settings(max_examples=40)
def test_softmax(op, shape, data):
    x = values(shape, scale=20)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    for opset in (7, 11, 13):
        if opset > 7 or axis >= 0:
            compare(op, x, opset=opset, axis=axis)
    compare(op, x)
    if len(shape) > 1:
        compare(op, x, opset=11)
    for opset in (11, 13):
        refused("axis", op, x, opset=opset, axis=len(shape) + 1)


@pytest.mark.parametrize("shapes", [
    ((2, 3), (3, 4)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (3,)), ((5, 1, 2, 3), (4, 3, 2)),
    ((2, 0), (0, 3)), ((0, 2), (2, 3)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [F, np.float64, np.int32])
def test_matmul(shapes, dtype):
    compare("MatMul", values(shapes[0], 0, dtype), values(shapes[1], 1, dtype))


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    transposed=st.tuples(st.booleans(), st.booleans()),
    factors=st.tuples(*[st.sampled_from([1.0, 0.5, -2.0, 0.0])] * 2),
    bias=st.sampled_from([None, "()", "n", "m1", "mn"]),
)
def test_gemm(sizes, transposed, factors, bias):
    m, k, n = sizes
    a = values((k, m) if transposed[0] else (m, k))
    b = values((n, k) if transposed[1] else (k, n), 1)
    shapes = {"()": (), "n": (n,), "m1": (m, 1), "mn": (m, n)}
    c = [] if bias is None else [values(shapes[bias], 2)]
    attributes = {"transA": int(transposed[0]), "transB": int(transposed[1])}
    compare("Gemm", a, b, *c, alpha=factors[0], beta=factors[1], atol=1e-5, **attributes)


@pytest.mark.parametrize("equation, shapes", [
    ("ij,jk->ik", ((2, 3), (3, 4))), ("ij, jk", ((2, 3), (3, 4))), ("ii->i", ((3, 3),)),
    ("...ij,...jk->...ik", ((5, 2, 3), (3, 4))), ("bhid,bhjd->bhij", ((1, 2, 3, 4), (1, 2, 5, 4))),
    ("i,j->ij", ((2,), (3,))), ("ij->", ((2, 3),)), ("i...->...", ((2, 3),)),
])  # fmt: skip
def test_einsum(equation, shapes):
    compare(
        "Einsum", *(values(s, i) for i, s in enumerate(shapes)), reference=True, equation=equation
    )


@given(shape=arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), data=st.data())
@settings(max_examples=60)
def test_normalisations(shape, data):
    x, channels, rank = values(shape), shape[1], len(shape)
    scale, bias = values(channels, 1), values(channels, 2)
    mean, variance = values(channels, 3), np.abs(values(channels, 4)) + F(0.1)
    for opset in (7, 9, 14, 15):
        compare(
            "BatchNormalization",
            x,
            scale,
            bias,
            mean,
            variance,
            opset=opset,
            epsilon=1e-3,
            atol=1e-5,
        )
    if rank > 2:
        compare("InstanceNormalization", x, scale, bias, atol=1e-4, rtol=1e-4)
        compare("GlobalAveragePool", x)
        compare("GlobalMaxPool", x)
        size = data.draw(st.integers(1, 7))
        near = [
            np.square(x[:, max(c - (size - 1) // 2, 0) : c + size // 2 + 1]).sum(1)
            for c in range(channels)
        ]
        (y,) = compute("LRN", {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}, 13, [x], 1)
        np.testing.assert_allclose(y, x / (1.5 + 0.5 / size * np.stack(near, 1)) ** 0.6, 1e-5)
        if rank == 4:
            compare("MeanVarianceNormalization", x, opset=13, reference=True, atol=1e-4)
        for groups in range(1, channels + 1):
            if channels % groups == 0:
                each = values(groups, 5), values(groups, 6)
                compare(
                    "GroupNormalization", x, *each, reference=True, num_groups=groups, atol=1e-4
                )
                compare(
                    "GroupNormalization",
                    x,
                    scale,
                    bias,
                    opset=21,
                    reference=True,
                    num_groups=groups,
                    atol=1e-4,
                )
    axis = data.draw(st.integers(-rank, rank - 1))
    scale, bias = values(shape[axis % rank :], 7), values(shape[axis % rank :], 8)
    compare(
        "LayerNormalization",
        x,
        scale,
        bias,
        outputs=3,
        reference=True,
        axis=axis,
        atol=1e-3,
        rtol=1e-3,
    )
    if scale.size > 1:  # onnxruntime 1.23 refuses single elements
        compare("LayerNormalization", x, scale, axis=axis, atol=1e-3, rtol=1e-3)
    compare("RMSNormalization", x, scale, opset=23, reference=True, axis=axis)
    compare("LpNormalization", x, axis=axis, p=data.draw(st.integers(1, 2)))


def test_normalisation_of_half_precision():
    x = (8 + np.arange(4096) / 4096).astype(np.float16)[None]
    y, mean, inverse = compute("LayerNormalization", {}, 17, [x, np.ones(4096, np.float16)], 3)
    exact = x.astype(float)
    np.testing.assert_allclose(y, (exact - exact.mean()) / exact.std(), 1e-2, 2e-3)
    assert y.dtype == np.float16 and mean.dtype == inverse.dtype == F


def test_parameters_must_fit():
    x, four = values((1, 1, 2, 2)), np.ones(4, F)
    refused("channels", "BatchNormalization", x, four, four, four, four, opset=7, spatial=0)
    refused("training", "BatchNormalization", x, *[np.ones(1, F)] * 4, training_mode=1)
    refused("channels", "InstanceNormalization", x, four, four)
    refused("groups", "GroupNormalization", values((1, 3, 2)), four, four, num_groups=2)
    refused("broadcast", "Gemm", values((1, 2)), values((2, 1)), values((3, 4)))
    refused("matrices", "Gemm", values((1, 1, 2)), values((2, 1)))
    refused("channels", "LRN", x, size=0)


# --- pooling --------------------------------------------------------------------------------------


@st.composite
def pools(draw):
    rank = draw(st.integers(1, 3))

    def drawn(low, high):
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    attributes = {"kernel_shape": drawn(1, 3), "strides": drawn(1, 3)}
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        pads = [draw(st.integers(0, k - 1)) for k in attributes["kernel_shape"] * 2]
        attributes |= {"pads": pads, "ceil_mode": draw(st.integers(0, 1))}
    else:
        attributes["auto_pad"] = mode
        # Where windows skip elements, onnxruntime pads by less than nothing.
        pairs = zip(attributes["strides"], attributes["kernel_shape"], strict=True)
        attributes["strides"] = [min(pair) for pair in pairs]
    if mode != "SAME_LOWER" and mode != "SAME_UPPER":
        attributes["dilations"] = drawn(1, 2)
    return attributes, (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *drawn(5, 7))


@given(pool=pools(), order=st.integers(0, 1))
@settings(max_examples=200)
def test_max_pool(pool, order):
    attributes, shape = pool
    x = values(shape, 0, np.int64).astype(F)  # with equal values among them
    compare("MaxPool", x, opset=12, **attributes)
    compare("MaxPool", x, opset=12, outputs=2, storage_order=order, **attributes)
    compare("MaxPool", values(shape, 0, np.int8), opset=12, **attributes)


@given(pool=pools(), counted=st.integers(0, 1))
@settings(max_examples=200)
def test_average_pool(pool, counted):
    attributes, shape = pool
    compare("AveragePool", values(shape), opset=19, **attributes)
    if "pads" in attributes and not attributes["ceil_mode"]:
        # Versions of onnxruntime differ in what they count; zeros are counted whatever they are.
        given = {k: v for k, v in attributes.items() if k != "pads"}
        rank = len(shape) - 2
        ends = zip(attributes["pads"][:rank], attributes["pads"][rank:], strict=True)
        x = np.pad(values(shape), [(0, 0), (0, 0), *ends])
        (y,) = compute(
            "AveragePool", {**attributes, "count_include_pad": 1}, 19, [values(shape)], 1
        )
        (wanted,) = expected("AveragePool", [x], 19, **given)
        np.testing.assert_allclose(y, wanted, 1e-5, 1e-6)
    if attributes.get("auto_pad", "")[:4] == "SAME":
        counted = 0  # here too
    del attributes["strides"]
    attributes.pop("dilations", None)
    attributes.pop("ceil_mode", None)
    compare("AveragePool", values(shape), opset=7, count_include_pad=counted, **attributes)
    compare("LpPool", values(shape), opset=11, p=2 - counted, **attributes)


@pytest.mark.parametrize("mode, pads", [("SAME_UPPER", [0, 0, 1, 1]), ("SAME_LOWER", [1, 1, 0, 0])])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_same_padding(op, mode, pads):
    x, given = values((1, 2, 4, 5)), {"kernel_shape": [2, 2], "count_include_pad": 1}
    (y,) = compute(op, {**given, "auto_pad": mode}, NEWEST, [x], 1)
    np.testing.assert_array_equal(y, compute(op, {**given, "pads": pads}, NEWEST, [x], 1)[0])
    # Windows that skip elements need no padding.
    skipping = {"kernel_shape": [1, 1], "strides": [2, 3], "auto_pad": mode}
    np.testing.assert_array_equal(compute(op, skipping, NEWEST, [x], 1)[0], x[:, :, ::2, ::3])


def test_windows_must_fit():
    x = values((1, 2, 3, 3))
    for op in ("MaxPool", "AveragePool", "LpPool"):
        refused("on a size of 3", op, x, kernel_shape=[4, 4])
        refused("windows", op, x, kernel_shape=[2, 2], strides=[0, 1])
        refused("windows", op, x, kernel_shape=[2, 2], pads=[-1, 0, 0, 0])
        refused(None, op, x, kernel_shape=[2])
        refused("windows", op, values((2, 3)), kernel_shape=[])
        refused("would have the shape", op, x, kernel_shape=[2, 2], pads=[2**40, 0, 0, 0])


# --- other operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resizing_as_older_versions_do(mode):
    x, scales = values((1, 2, 3, 4)), np.array([1, 1, 2, 1.5], F)
    compare("Upsample", x, opset=7, mode=mode, scales=[1.0, 1.0, 2.0, 2.0])
    compare("Upsample", x, scales, opset=9, mode=mode)
    compare("Resize", x, scales, opset=10, mode=mode)


def test_newest_operators():
    x, y = values((2, 3)), values((2, 3), 1)
    compare("SwiGLU", x, y, opset=28, reference=True, alpha=0.5)
    compare("BitCast", x, opset=26, reference=True, to=6)
    refused("float32 for float64", "BitCast", x, opset=26, to=11)
    refused("multiplies", "SwiGLU", x, y[:1], opset=28)


def test_through_reference():
    x, w = values((1, 2, 9)), values((3, 2, 3), 1)
    compare("Conv", x, w, atol=1e-5, pads=[1, 1])
    before = numpy_ops.reference._evaluator.cache_info()
    compute("Conv", {"pads": [1, 1]}, NEWEST, [x, w], 1)
    after = numpy_ops.reference._evaluator.cache_info()
    assert after.hits == before.hits + 1 and after.misses == before.misses


def test_without_the_package_onnx():
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import numpy as np\n"
        "from logshift.runtime.onnx_ops.numpy_ops import compute, InputError\n"
        "x = np.ones((1, 1, 5), np.float32)\n"
        "assert compute('MaxPool', {'kernel_shape': [2]}, 18, [x], 1)[0].shape == (1, 1, 4)\n"
        "try:\n    compute('Conv', {}, 18, [x, x], 1)\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install onnx" in done.stdout


# --- recurrent networks ---------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def recurrent(op, *, length=5, batch=3, inputs=7, hidden=6, directions=1, layout=0, states=False,
              lengths=None, bias=True, peepholes=False):  # fmt: skip
    """Inputs of a recurrent operator."""
    rng, gates = np.random.default_rng(0), GATES[op]
    state = (batch, directions, hidden) if layout else (directions, batch, hidden)
    shapes = [
        (batch, length, inputs) if layout else (length, batch, inputs),
        (directions, gates * hidden, inputs), (directions, gates * hidden, hidden),
        (directions, 2 * gates * hidden) if bias else None, None, state if states else None,
    ]  # fmt: skip
    if op == "LSTM":
        shapes += [state if states else None, (directions, 3 * hidden) if peepholes else None]
    given = [None if s is None else rng.standard_normal(s).astype(F) / 2 for s in shapes]
    given[4] = None if lengths is None else np.array(lengths, np.int32)
    return given


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("clip", [{}, {"clip": 0.4}])
def test_recurrent(op, direction, clip):
    outputs, directions = 3 if op == "LSTM" else 2, 2 if direction == "bidirectional" else 1
    more = {"LSTM": [{"input_forget": 1}], "GRU": [{"linear_before_reset": 1}]}.get(op, [])
    for attributes in ({}, *more):
        for how in ({}, {"states": True, "bias": False}, {"lengths": [5, 1, 3]}):
            compare(
                op, *recurrent(op, directions=directions, **how), opset=17, outputs=outputs,
                direction=direction, hidden_size=6, rtol=1e-4, atol=1e-5, **attributes, **clip,
            )  # fmt: skip
    if op == "LSTM":
        given = recurrent(op, directions=directions, peepholes=True, states=True)
        compare(op, *given, opset=17, outputs=3, direction=direction, hidden_size=6, rtol=1e-4,
                atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("op", GATES)
def test_recurrent_with_the_batch_first(op):
    """It is what comes of time first, with axes swapped."""
    outputs = 3 if op == "LSTM" else 2
    first = recurrent(op, layout=1, states=True)
    for direction in ("forward", "reverse"):
        attributes = {"direction": direction, "hidden_size": 6}
        found = compute(op, {"layout": 1, **attributes}, 17, first, outputs)
        turned = [x.swapaxes(0, 1) if i in (0, 5, 6) and x is not None else x
                  for i, x in enumerate(first)]  # fmt: skip
        y, *states = compute(op, attributes, 17, turned, outputs)
        np.testing.assert_array_equal(found[0], y.transpose(2, 0, 1, 3))
        for state, other in zip(found[1:], states, strict=True):
            np.testing.assert_array_equal(state, other.swapaxes(0, 1))


@pytest.mark.parametrize(
    ("functions", "alpha", "beta"),
    [
        (["HardSigmoid", "ScaledTanh", "Affine"], [0.3, 0.7, 0.9], [0.4, 0.6, 0.1]),
        (["Sigmoid", "LeakyRelu", "Softsign"], [0.2], []),
        (["sigmoid", "Elu", "TANH"], [0.7], []),
        (["Sigmoid", "ThresholdedRelu", "Relu"], [0.3], []),
    ],
)
def test_activation_functions_of_recurrent_networks(functions, alpha, beta):
    given = {"activations": functions, "hidden_size": 6, "activation_alpha": alpha}
    if beta:
        given["activation_beta"] = beta
    compare("LSTM", *recurrent("LSTM"), opset=17, outputs=3, rtol=1e-4, atol=1e-5, **given)


def test_recurrent_networks_that_are_refused():
    given = recurrent("LSTM")
    refused("activation functions", "LSTM", *given, activations=["Tanh"])
    refused("activation functions", "LSTM", *given, activations=["Sigmoid", "Tanh", "None"])
    refused("direction", "LSTM", *given, direction="sideways")
    refused("weights", "LSTM", given[0], given[2], given[1])
    refused("sequence_lens", "LSTM", *given[:4], np.array([1, 2], np.int32))
    refused("B has shape", "LSTM", *given[:3], given[3][:, :5])


# --- what is refused ------------------------------------------------------------------------------


def test_sets_are_consistent():
    assert numpy_ops.SLOW <= numpy_ops.OPERATORS
    assert numpy_ops.DATA_DEPENDENT <= numpy_ops.OPERATORS
    assert set(numpy_ops.reference._SIZES) <= numpy_ops.SLOW
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    assert numpy_ops.OPERATORS - known <= {"BitCast", "CumProd", "SwiGLU"}  # of the newest versions


@pytest.mark.parametrize("op", sorted(numpy_ops.OPERATORS))
def test_missing_inputs(op):
    refused(None, op)
    refused(None, op, None)


def test_wrong_attributes():
    x = values((2, 3))
    refused("attribute axis must be of the type int, not 'a'", "Softmax", x, axis="a")
    refused("attribute axis must be of the type int", "Concat", x, x, axis=1.5)
    refused("attribute alpha must be of the type float", "Elu", x, alpha="much")
    refused(None, "Transpose", x, perm="ab")
    refused(None, "Cast", x)
    refused("the type number 99", "Cast", x, to=99)
    refused("approximate", "Gelu", x, approximate="roughly")
    refused("no ONNX operator", "Convolve", x)
    refused("num_outputs", "Split", x, num_outputs=2**40)
    refused("has 65537 numbers", "ReduceSum", x, np.zeros(2**16 + 1, np.int64))
    refused("2 are asked for", "Relu", x, outputs=2)


HUGE = 2**40


@pytest.mark.parametrize(
    "op, inputs, attributes",
    [
        ("Expand", [values(1), ints(HUGE)], {}),
        ("Expand", [values(1), ints(2**16, 2**16)], {}),
        ("Expand", [values(1), ints(-1)], {}),
        ("Tile", [values(1), ints(HUGE)], {}),
        ("Tile", [values(2), ints(-1)], {}),
        ("Range", [ints(0)[0], ints(HUGE)[0], ints(1)[0]], {}),
        ("Range", [F(0), F(np.inf), F(1)], {}),
        ("Range", [F(0), F(1), F(0)], {}),
        ("Pad", [values(2), ints(0, HUGE)], {}),
        ("Pad", [values(2), ints(0, -3)], {}),
        ("Add", [np.broadcast_to(F(0), (2**16, 1)), np.broadcast_to(F(0), (1, 2**16))], {}),
        ("Max", [np.broadcast_to(F(0), (2**16, 1)), np.broadcast_to(F(0), (1, 2**16))], {}),
        ("Where", [np.array(True), np.broadcast_to(F(0), (2**16, 1)),
                   np.broadcast_to(F(0), (1, 2**16))], {}),
        ("MatMul", [np.broadcast_to(F(0), (2**16, 1)), np.broadcast_to(F(0), (1, 2**16))], {}),
        ("Gemm", [np.broadcast_to(F(0), (2**16, 1)), np.broadcast_to(F(0), (1, 2**16))], {}),
        ("Einsum", [np.broadcast_to(F(0), 2**16)] * 2, {"equation": "i,j->ij"}),
        ("Einsum", [np.broadcast_to(F(0), 2**16)] * 2, {"equation": "i,j"}),
        ("Einsum", [np.broadcast_to(F(0), (2**16, 1)), np.broadcast_to(F(0), (2**16, 1))],
         {"equation": "i...,j...->ij..."}),
        ("Concat", [np.broadcast_to(F(0), 2**30)] * 3, {"axis": 0}),
        ("Gather", [np.broadcast_to(F(0), (1, 2**16)), np.broadcast_to(ints(0)[0], 2**16)], {}),
        ("GatherND", [np.broadcast_to(F(0), (1, 2**16)),
                      np.broadcast_to(ints(0)[0], (2**16, 1))], {}),
        ("HannWindow", [ints(HUGE)[0]], {}),
        ("EyeLike", [np.broadcast_to(F(0), 2**16)], {}),
        ("CenterCropPad", [values((2, 2)), ints(HUGE, 1)], {}),
        ("Resize", [values((1, 1, 2, 2)), None, np.array([1, 1, 1e5, 1e5], F)], {}),
        ("Resize", [values((1, 1, 2, 2)), None, None, ints(1, 1, 2**17, 2**17)], {}),
        ("Upsample", [values((1, 1, 2, 2)), np.array([1, 1, 1e5, 1e5], F)], {}),
        ("Conv", [values((1, 1, 4)), values((1, 1, 3))], {"pads": [HUGE, 0]}),
        ("Conv", [values((1, 1, 4)), values((1, 1, 3))], {"dilations": [HUGE]}),
        ("ConvTranspose", [values((1, 1, 4)), values((1, 1, 3))], {"strides": [HUGE]}),
        ("ConvTranspose", [values((1, 1, 4)), values((1, 1, 3))], {"output_shape": [HUGE]}),
        ("MaxUnpool", [values((1, 1, 2)), ints(0, 1).reshape(1, 1, 2), ints(1, 1, HUGE)],
         {"kernel_shape": [2]}),
        ("RoiAlign", [values((1, 1, 4, 4)), values((1, 4)), ints(0)], {"output_height": HUGE}),
        ("RoiAlign", [values((1, 1, 4, 4)), values((1, 4)), ints(0)], {"sampling_ratio": 2**20}),
        ("MelWeightMatrix", [ints(HUGE)[0], ints(8)[0], ints(8)[0], F(0), F(1)], {}),
        ("AffineGrid", [values((1, 2, 3)), ints(1, 1, HUGE, 2)], {}),
        ("DFT", [values((1, 4, 1)), ints(HUGE)[0]], {}),
        ("Col2Im", [values((1, 4, 4)), ints(HUGE, 4), ints(2, 2)], {}),
    ],
)  # fmt: skip
def test_sizes_that_no_memory_holds(op, inputs, attributes):
    opset = 9 if op == "Upsample" else NEWEST
    inputs = [np.asarray(x) if isinstance(x, np.generic) else x for x in inputs]
    refused(
        "shape|elements|negative|infinity|delta|cut off", op, *inputs, opset=opset, **attributes
    )


NUMBERS = st.integers(-4, 6) | st.sampled_from([2**31, -(2**31), 2**40, 2**63 - 1, -(2**63)])
ARRAYS = st.none() | st.one_of(
    arrays.arrays(F, SHAPES, elements=st.floats(width=32)),
    arrays.arrays(np.int64, st.integers(0, 4), elements=NUMBERS),
    arrays.arrays(np.int64, arrays.array_shapes(max_dims=3, max_side=3), elements=NUMBERS),
    arrays.arrays(bool, SHAPES), arrays.arrays(np.uint8, SHAPES),
)  # fmt: skip
NAMES = [
    "alpha", "allowzero", "axes", "axis", "batch_dims", "beta", "blocksize", "ceil_mode",
    "dilations", "direction", "end", "ends", "epsilon", "equation", "k", "keepdims",
    "kernel_shape", "max", "min", "mode", "num_groups", "num_outputs", "p", "pads", "perm",
    "reduction", "scales", "size", "split", "start", "starts", "strides", "to", "upper", "value",
]  # fmt: skip
TEXTS = st.sampled_from(
    ["", "add", "reflect", "wrap", "LEFT", "SAME_UPPER", "i,j->ij", "...i,i", "x"]
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(NAMES),
    NUMBERS | st.floats() | TEXTS | st.lists(NUMBERS, max_size=4),
    max_size=4,
)


@pytest.mark.parametrize("op", sorted(numpy_ops.OPERATORS - numpy_ops.SLOW))
@given(attributes=ATTRIBUTES, opset=st.integers(7, 28), inputs=st.lists(ARRAYS, max_size=5))
@settings(max_examples=25)
def test_whatever_is_given(op, attributes, opset, inputs):
    """Nothing but results and InputError."""
    try:
        outputs = compute(op, attributes, opset, inputs, 1)
    except InputError as error:
        assert str(error)
    else:
        assert isinstance(outputs[0], np.ndarray)
