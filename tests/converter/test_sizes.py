"""`input_shapes`: sizes that an export has fixed are freed, or others fixed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from support.onnx_nets import Net, reference

from logshift import converter, runtime
from logshift.converter import ConversionError
from logshift.kernels.errors import InputError

SHAPE = (1, 4, 16, 12)
FREE = {"x": (None, 4, None, None)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def net_of(shape=SHAPE, **options):
    return Net(shape=shape, **options)


def freed(model):
    """The model with free sizes, as far as only its input says what they are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for axis, dim in enumerate(copy.graph.input[0].type.tensor_type.shape.dim):
        if axis != 1:
            dim.Clear()
            dim.dim_param = f"d{axis}"
    for value in (*copy.graph.output, *copy.graph.value_info):
        value.type.tensor_type.ClearField("shape")
    return copy


def feed_of(*shape, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def check(model, path, free_model=None, input_shapes=FREE, sizes=((1, 16, 12), (3, 24, 8))):
    """Convert in float32, and compare at other sizes with a model that was free from the first."""
    settings = {"keep_float": ["*"], "input_shapes": input_shapes}
    converter.convert(model, path, calibration=[feed_of(*SHAPE)], **settings)
    session = runtime.load(path, threads=1)
    for batch, height, width in sizes:
        feed = feed_of(batch, SHAPE[1], height, width)
        found = session.run(feed)
        (expected,) = reference(free_model or freed(model), feed).values()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    return session


def test_convolutions(path):
    net = net_of()
    x = net.node("Relu", net.conv("x"))
    y = net.conv(x, strides=[2, 2])
    session = check(net.model(net.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])), path)
    assert session.inputs[0].shape == ("x_dim_0", 4, "x_dim_2", "x_dim_3")
    assert session.inputs[0].nominal == SHAPE
    assert not [dim for dim in session.outputs[0].shape[2:] if isinstance(dim, int)]


def test_codes_of_freed_sizes(path):
    net = net_of()
    model = net.model(net.conv(net.node("Relu", net.conv("x"))))
    feeds = [feed_of(*SHAPE, seed=seed) for seed in range(8)]  # that reach what others do
    converter.convert(
        model, path, calibration=feeds, input_shapes=FREE, weight_bits=5, residual_ratio=1.0
    )
    other = feed_of(2, 4, 32, 20)
    (expected,) = reference(freed(model), other).values()
    found = runtime.load(path).run(other)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_size_that_is_not_the_fixed_one_names_the_setting_that_frees_it(path):
    net = net_of()
    converter.convert(net.model(net.conv("x")), path, calibration=feed_of(*SHAPE)["x"])
    with pytest.raises(InputError, match=r"expected \(1, 4, 16, 12\); .*input_shapes"):
        runtime.load(path).run(feed_of(2, *SHAPE[1:]))


def build(net, op):
    """A network in which a size of 16 x 12 is written down, and one in which it is asked for."""
    y = net.conv("x")
    fixed = SHAPE[2:] if net.inputs["x"] == SHAPE else None
    if op == "flat":  # (N, C, H W)
        return net.node("Reshape", y, net.constant([1, 4, 192] if fixed else [0, 4, -1], np.int64))
    if op == "batch":
        return net.node("Reshape", y, net.constant([1, -1] if fixed else [0, -1], np.int64))
    if op == "heads":  # (N, 2, C / 2, H, W), as detectors have it
        if fixed:
            return net.node("Reshape", y, net.constant([1, 2, 2, 16, 12], np.int64))
        parts = net.node("Split", y, outputs=2, axis=1, num_outputs=2)
        axis = net.constant([1], np.int64)
        return net.node("Concat", *(net.node("Unsqueeze", p, axis) for p in parts), axis=1)
    if op == "resize":
        small = net.conv(y, strides=[2, 2])
        if fixed:
            big = net.node("Resize", small, "", "", net.constant([1, 4, 16, 12], np.int64))
        else:
            big = net.node("Resize", small, "", net.constant([1, 1, 2, 2]))
        return net.node("Add", big, y)
    if op == "slice":
        ends = fixed or [2**31, 2**31]
        starts, axes = net.constant([1, 2], np.int64), net.constant([2, 3], np.int64)
        return net.node("Slice", y, starts, net.constant(ends, np.int64), axes)
    assert op == "expand"
    shape = [1, 4, 16, 12] if fixed else [1, 4, 1, 1]
    return net.node("Expand", y, net.constant(shape, np.int64))


@pytest.mark.parametrize("op", ["flat", "batch", "heads", "resize", "slice", "expand"])
def test_sizes_in_the_graph(path, op):
    net, free = net_of(), net_of(("n", 4, "h", "w"))
    model, free_model = (n.model(build(n, op)) for n in (net, free))
    check(model, path, free_model)


@pytest.mark.parametrize("op", ["pads", "split", "ends"])
def test_what_packed_operators_would_fix(path, op):
    net = net_of()
    y = net.conv("x")
    if op == "pads":  # of which there are none, one or two, by the size
        weight = net.random(4, 4, 3, 3)
        y = net.node("Conv", y, weight, auto_pad="SAME_UPPER", strides=[2, 2])
    elif op == "split":
        y = net.node("Mul", *net.node("Split", y, outputs=2, axis=2, num_outputs=2))
    else:
        half = net.node("Div", net.node("Shape", y, start=2), net.constant([2, 3], np.int64))
        axes = net.constant([2, 3], np.int64)
        y = net.node("Slice", y, net.constant([0, 0], np.int64), half, axes)
    sizes = ((1, 16, 12), (3, 18, 9) if op == "split" else (2, 15, 11))
    check(net.model(net.conv(y)), path, sizes=sizes)


def test_batch_alone(path):
    net = net_of()
    y = net.node("Reshape", net.conv("x"), net.constant([1, 768], np.int64))
    weight = net.random(768, 5)
    model = net.model(net.node("MatMul", y, weight))
    free = net_of(("n", *SHAPE[1:]))
    z = free.node("Reshape", free.conv("x"), free.constant([0, 768], np.int64))
    free_model = free.model(free.node("MatMul", z, free.random(768, 5)))
    shapes = {"x": ("n", 4, 16, 12)}
    session = check(model, path, free_model, shapes, ((1, 16, 12), (4, 16, 12)))
    assert session.inputs[0].shape == ("n", 4, 16, 12)
    with pytest.raises(InputError, match="expected"):
        session.run(np.zeros((1, 4, 8, 8), np.float32))


def attention(shape, *targets, **attributes):
    """Scores of two heads, which share an axis with the batch in between."""
    net = net_of(shape)
    rows, heads, scores = (net.constant(target, np.int64) for target in targets)
    x = net.node("Transpose", net.node("Reshape", net.conv("x"), rows), perm=[2, 0, 1])
    x = net.node("Reshape", x, heads, **attributes)
    query, key = (net.node("Transpose", x, perm=perm) for perm in ([1, 0, 2], [1, 2, 0]))
    return net.model(net.node("Reshape", net.node("MatMul", query, key), scores))


def test_batch_that_heads_share_an_axis_with(path):
    fixed = [1, 4, 192], [192, 2, 2], [1, 2, 192, 192]
    free = [0, 4, -1], [192, -1, 2], [-1, 2, 192, 192]
    free_model = attention(("n", *SHAPE[1:]), *free)
    shapes, sizes = {"x": ("n", 4, 16, 12)}, ((1, 16, 12), (3, 16, 12))
    check(attention(SHAPE, *fixed), path, free_model, shapes, sizes)
    check(attention(SHAPE, *fixed, allowzero=1), path, free_model, shapes, sizes)


def test_initial_states_of_the_batch(path):
    def build(shape, states):
        net = Net(shape=shape)
        weights = [net.random(1, 16, 3), net.random(1, 16, 4), net.random(1, 32)]
        start = [net.constant(np.zeros((1, 2, 4))) for _ in range(states)]
        return net.model(net.node("LSTM", "x", *weights, "", *start, hidden_size=4))

    model, free_model = build((5, 2, 3), 2), build(("t", "n", 3), 0)
    settings = {"keep_float": ["*"], "input_shapes": {"x": (None, "n", 3)}}
    feeds = [feed_of(5, 2, 3), feed_of(7, 6, 3)]
    converter.convert(model, path, calibration=feeds[:1], **settings)
    for feed in feeds:
        (expected,) = reference(free_model, feed).values()
        np.testing.assert_allclose(runtime.load(path).run(feed), expected, 1e-4, 1e-5)


def test_other_sizes_may_be_fixed(path):
    net = net_of(("n", 4, "h", "w"))
    model = net.model(net.conv("x"))
    session = check(model, path, model, {"x": SHAPE}, ((1, 16, 12),))
    assert session.inputs[0].shape == SHAPE
    net = net_of((1, 4, 8, 8))
    model = net.model(build(net_of((1, 4, 8, 8)), "flat") and net.conv("x"))
    session = check(model, path, freed(model), {"": SHAPE}, ((1, 16, 12),))
    assert session.inputs[0].shape == SHAPE


def test_what_cannot_be_freed_is_named(path):
    net = net_of()
    y = net.node("Add", net.conv("x"), net.random(1, 4, 16, 12))
    with pytest.raises(ConversionError, match=r"because of Add 'n_Add1'.*export"):
        check(net.model(y), path)
    net = net_of()
    flat = net.node("Flatten", net.conv("x"))
    model = net.model(net.node("Gemm", flat, net.random(768, 5)))
    with pytest.raises(ConversionError, match=r"because of Gemm 'n_Gemm2'"):
        check(model, path)
    assert not path.exists()


def test_samples_that_would_be_mixed(path):
    net = net_of()
    rows = net.node("Transpose", net.conv("x"), perm=[2, 0, 1, 3])
    flat = net.node("Reshape", rows, net.constant([16, 48], np.int64))
    total = net.node("ReduceSum", flat, net.constant([0], np.int64), keepdims=0)
    with pytest.raises(ConversionError, match=r"'ReduceSum3' mixes the samples of a batch"):
        check(net.model(total), path, input_shapes={"x": (None, 4, 16, 12)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": SHAPE}, "no input 'z'; it has 'x'"),
        ({"x": (1, 4, 16)}, "has 3 sizes; the input has 4"),
        ({"x": "1,4,16,12"}, "a size for every axis"),
        ({"x": (1, 4, 16, 0)}, "0 is neither a size"),
        ({"x": (1, 4, 16, 2.5)}, "2.5 is neither a size"),
    ],
)
def test_sizes_that_are_none(path, shapes, message):
    net = net_of()
    with pytest.raises(InputError, match=message):
        check(net.model(net.conv("x")), path, input_shapes=shapes)


def test_sizes_that_do_not_fit_the_weights(path):
    net = net_of()
    with pytest.raises(ConversionError, match="because of Conv 'n_Conv0'"):
        check(net.model(net.conv("x")), path, input_shapes={"x": (1, 3, 16, 12)})
