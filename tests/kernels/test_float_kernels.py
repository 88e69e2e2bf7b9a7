"""Every kernel on float32: the bits of its slow twin, which is right within rounding."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from support import float_oracle as oracle
from support.float_driver import Picture, call, convolution, program, sizes

from logshift.kernels import functions, registry
from logshift.kernels.fma.tiles import FLOAT_TILES
from logshift.kernels.layer import FloatLayer
from logshift.kernels.machine.targets import has_features
from logshift.runtime import executor

EPSILON = 2.0**-23


@njit
def _fma(x, w, acc):
    return functions.fma(x, w, acc)


def kernels_of(op, layer=None):
    """All kernels for an operation that run here, the definition first."""
    found = [k for k in registry.kernels() if k.op == op and k.available()]
    found = [k for k in found if layer is None or k.supports(layer)]
    return sorted(found, key=lambda k: k.family != "reference")


def all_agree(op, make, layer=None):
    """Call `make(kernel, threads)` for every kernel; returns what all of them write."""
    expected = None
    for kernel in kernels_of(op, layer):
        for threads in (1, 2):
            buffer = make(kernel, threads)
            if expected is None:
                expected = buffer
            assert buffer.tobytes() == expected.tobytes(), (kernel.name, threads)
    return expected


def random(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


pads = st.tuples(*[st.integers(0, 2)] * 4)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def layers(draw):
    """A convolution, the input's height and width, and its padding."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (2, 3), (1, 4)]))
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
    strides = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
    if kind == "dense":
        group, in_group = 1, draw(st.integers(1, 20))
        out = draw(st.one_of(st.integers(1, 50), st.sampled_from([16, 24, 32, 64, 96, 130])))
    elif kind == "grouped":
        group, in_group = draw(st.integers(2, 4)), draw(st.integers(1, 6))
        out = group * draw(st.integers(2, 20))
    else:
        group, in_group = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 32]))), 1
        out = group
    weights = random(rng, (out, *kernel, in_group))
    around = draw(pads)
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - p), 12))
        for k, d, p in zip(
            kernel, dilations, (around[0] + around[2], around[1] + around[3]), strict=True
        )
    ]
    layer = FloatLayer(weights, group, strides, dilations, random(rng, out), 50)
    return layer, size, around, draw(st.integers(1, 3)), rng


def convolve(layer, x, pads, y, r, kernel, threads, lo=-np.inf, hi=np.inf):
    y.buffer[:] = 7
    arguments, keep = convolution(
        kernel, layer, x, y, r, at=(-pads[0], -pads[1]), lo=lo, hi=hi
    )  # fmt: skip
    steps, scratch = program(kernel, arguments, threads)
    executor.team(threads).run(steps)
    del keep, scratch
    return y.buffer.copy()


@settings(max_examples=150)
@given(layers(), st.booleans(), st.sampled_from([(-np.inf, np.inf), (0, 6), (0, np.inf)]))
def test_convolutions(case, has_residual, clamp):
    layer, size, pads, n, rng = case
    array = random(rng, (n, *size, layer.weights.shape[3] * layer.group))
    extra = [oracle.padded(array, pads).shape[1 + i] for i in (0, 1)]
    out = [
        (e - d * (k - 1) - 1) // s + 1
        for e, d, k, s in zip(
            extra, layer.dilations, layer.weights.shape[1:3], layer.strides, strict=True
        )
    ]
    # The borders are wider than they need be, and no tensor's is that of another.
    x = Picture(array, tuple(p + q for p, q in zip(pads, (1, 0, 0, 1), strict=True)))
    y = Picture(np.zeros((n, *out, layer.weights.shape[0]), np.float32), (1, 2, 0, 1))
    r = Picture(random(rng, y.inside.shape), (0, 1, 2, 0)) if has_residual else None
    lo, hi = clamp

    def make(kernel, threads):
        return convolve(layer, x, pads, y, r, kernel, threads, lo, hi)

    y.buffer[:] = result = all_agree("float_conv", make, layer)
    exact, magnitude = oracle.conv(
        array, layer.weights, layer.bias, layer.strides, layer.dilations, layer.group, pads,
        r.inside if r else None,
    )  # fmt: skip
    steps = layer.weights[0].size + 2
    assert np.all(abs(y.inside - np.clip(exact, lo, hi)) <= EPSILON * steps * magnitude)
    y.inside[:] = 7
    assert np.all(y.buffer == 7), "something was written outside of the picture"
    assert result.shape == y.buffer.shape


@pytest.mark.parametrize("pixels", [1, 2, 7, 49])
@pytest.mark.parametrize("channels", [64, 1000])
def test_fully_connected(pixels, channels):
    """Many steps, few pixels: they are shared among threads by channels."""
    rng = np.random.default_rng(pixels)
    weights = random(rng, (channels, 1, 1, 300))
    layer = FloatLayer(weights, 1, (1, 1), (1, 1), random(rng, channels), pixels)
    x = Picture(random(rng, (pixels, 1, 1, 300)))
    y = Picture(np.zeros((pixels, 1, 1, channels), np.float32))

    def make(kernel, threads):
        return convolve(layer, x, (0, 0), y, None, kernel, threads)

    result = all_agree("float_conv", make, layer)
    exact, magnitude = oracle.conv(x.inside, weights, layer.bias, (1, 1), (1, 1), 1, (0, 0, 0, 0))
    assert np.all(abs(result - exact) <= EPSILON * 300 * magnitude)


def test_panels_and_chunks():
    """More pixels than one panel holds, more weights than one chunk does."""
    rng = np.random.default_rng(1)
    layer = FloatLayer(random(rng, (80, 3, 3, 40)), 1, (1, 1), (1, 1), random(rng, 80), 5000)
    x = Picture(random(rng, (2, 52, 49, 40)), (1, 1, 1, 1))
    y = Picture(np.zeros((2, 52, 49, 80), np.float32))

    def make(kernel, threads):
        return convolve(layer, x, (1, 1), y, None, kernel, threads)

    all_agree("float_conv", make, layer)


def test_phases_of_a_transposed_convolution_write_between_each_other():
    rng = np.random.default_rng(2)
    layer = FloatLayer(random(rng, (20, 2, 2, 8)), 1, (1, 1), (1, 1), random(rng, 20), 50)
    x = Picture(random(rng, (1, 6, 6, 8)))
    y = Picture(np.zeros((1, 10, 15, 20), np.float32))

    def make(kernel, threads):
        y.buffer[:] = 7
        arguments, keep = convolution(kernel, layer, x, y)
        a = arguments[0]
        a["height"], a["width"], a["step_h"], a["step_w"] = 5, 5, 2, 3
        a["y"]["top"], a["y"]["left"] = 1, 2
        steps, scratch = program(kernel, arguments, threads)
        executor.team(threads).run(steps)
        del keep, scratch
        return y.buffer.copy()

    result = all_agree("float_conv", make, layer)
    exact, _ = oracle.conv(x.inside, layer.weights, layer.bias, (1, 1), (1, 1), 1, (0,) * 4)
    assert np.allclose(result[:, 1::2, 2::3], exact, atol=1e-4)
    result[:, 1::2, 2::3] = 7
    assert np.all(result == 7)


@pytest.mark.parametrize("group", [1, 20])
def test_no_taps_leave_the_bias(group):
    """As in some phases of a transposed convolution."""
    rng = np.random.default_rng(2)
    weights = np.zeros((20, 0, 2, 20 // group), np.float32)
    layer = FloatLayer(weights, group, (1, 1), (1, 1), random(rng, 20), 50)
    x = Picture(random(rng, (1, 6, 6, 20)))
    y = Picture(np.zeros((1, 5, 5, 20), np.float32))

    def make(kernel, threads):
        return convolve(layer, x, (0, 0), y, None, kernel, threads)

    result = all_agree("float_conv", make, layer)
    assert np.array_equal(result, np.broadcast_to(layer.bias, result.shape))


@pytest.mark.parametrize("name", [n for n, t in FLOAT_TILES.items() if t.isa.name == "neon"])
def test_tiles_of_plain_vectors_work_on_any_machine(name):
    """Those of a machine that is not here, from the same instructions to the compiler."""
    tile = FLOAT_TILES[name]
    if not has_features(("fma",)) or tile.pixels == 1:
        pytest.skip("needs a fused multiply-add; tiles of one pixel are part of others")
    kernel = next(k for k in registry.kernels() if k.op == "float_conv" and k.variant == name)
    rng = np.random.default_rng(3)
    size, stride = tile.window or (3, 1)
    out, depth, group = (37, 1, 37) if tile.kind != "dense" else (37, 5, 1)
    weights = random(rng, (out, size, size, depth))
    layer = FloatLayer(weights, group, (stride, stride), (1, 1), random(rng, out), 25)
    assert kernel.supports(layer)
    x = Picture(random(rng, (1, 15, 15, depth * group)))
    count = (15 - size) // stride + 1
    y = Picture(np.zeros((1, count, count, out), np.float32))
    expected = convolve(layer, x, (0, 0), y, None, kernels_of("float_conv")[0], 1)
    assert convolve(layer, x, (0, 0), y, None, kernel, 2).tobytes() == expected.tobytes()


def test_families_that_are_asked_for():
    rng = np.random.default_rng(0)
    layer = FloatLayer(random(rng, (16, 3, 3, 8)), 1, (1, 1), (1, 1), random(rng, 16), 50)
    fast = "fma" if any(k.family == "fma" for k in kernels_of("float_conv", layer)) else "portable"
    for family in ("auto", "dot", "shift"):
        assert registry.kernel("float_conv", family, layer).family == fast
    for family in ("portable", "reference"):
        assert registry.kernel("float_conv", family, layer).family == family
    if fast == "fma":  # channels that fill tiles, and many of them for a single pixel
        for out, pixels, channels in ((64, 50, 16), (24, 50, 24), (8, 50, 8), (100, 1, 64)):
            other = FloatLayer(
                random(rng, (out, 1, 1, 9)), 1, (1, 1), (1, 1), random(rng, out), pixels
            )
            name = registry.kernel("float_conv", "auto", other).variant
            isa = name.split("-")[0]
            if any(t.isa.name == isa and t.channels == channels for t in FLOAT_TILES.values()):
                assert name.endswith(f"x{channels}") or isa == "avx512", (out, name)
            else:  # on NEON not every tile: blocks of what there is, that leave no lane idle
                tile = FLOAT_TILES[name]
                assert out % tile.channels in (0, out % 4), (out, name)
    nothing = replace(layer, weights=layer.weights[:, :0])  # a phase without taps
    assert registry.kernel("float_conv", "auto", nothing).family == "portable"


# --- everything else ----------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 20), st.tuples(st.integers(1, 9), st.integers(1, 9)), pairs, pairs, pairs,
    pads, st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_pools(channels, size, kernel, strides, dilations, pads, count_pads, seed):
    extra = [size[i] + pads[i] + pads[2 + i] - dilations[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
    if min(extra) < 0:
        return
    rng = np.random.default_rng(seed)
    x = Picture(random(rng, (2, *size, channels)), pads)
    out = [e // s + 1 for e, s in zip(extra, strides, strict=True)]
    y = Picture(np.zeros((2, *out, channels), np.float32), (1, 0, 0, 1))
    counted = pads if count_pads else (0, 0, 0, 0)
    fields = {
        "kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": strides[0],
        "stride_w": strides[1], "dilation_h": dilations[0], "dilation_w": dilations[1],
        "low_h": pads[0], "high_h": pads[0] + size[0],
        "low_w": pads[1], "high_w": pads[1] + size[1],
        "count_low_h": pads[0] - counted[0], "count_high_h": pads[0] + size[0] + counted[2],
        "count_low_w": pads[1] - counted[1], "count_high_w": pads[1] + size[1] + counted[3],
        "lo": -1, "hi": 1,
    }  # fmt: skip

    def make(kernel, threads):
        call(kernel, threads, {"x": x, "y": y}, **sizes(y), **fields)
        return y.buffer.copy()

    all_agree("float_pool_max", make)
    expected = oracle.pool_max(x.inside, kernel, strides, dilations, pads)
    assert np.array_equal(y.inside, np.clip(expected, -1, 1))
    all_agree("float_pool_average", make)
    expected = oracle.pool_average(x.inside, kernel, strides, dilations, pads, count_pads)
    assert np.allclose(y.inside, np.clip(expected, -1, 1), atol=1e-6)


@settings(max_examples=80)
@given(
    st.sampled_from(["add", "sub", "mul"]), st.tuples(*[st.integers(1, 5)] * 4),
    st.integers(0, 15), st.integers(0, 15), st.integers(0, 2**32),
)  # fmt: skip
def test_broadcasting(name, shape, of_x, of_r, seed):
    rng = np.random.default_rng(seed)
    steps, pictures = {}, {}
    for key, mask, border in (("x", of_x, (1, 0, 2, 1)), ("r", of_r, (0, 2, 1, 0))):
        own = [1 if mask >> axis & 1 else size for axis, size in enumerate(shape)]
        pictures[key] = Picture(random(rng, own), border)
        for axis, letter in enumerate("nhwc"):
            steps[f"{key}_step_{letter}"] = int(own[axis] == shape[axis] and shape[axis] > 1)
    y = Picture(np.zeros(shape, np.float32), (1, 1, 0, 0))

    def make(kernel, threads):
        call(kernel, threads, pictures | {"y": y}, **sizes(y), **steps, lo=-1, hi=2)
        return y.buffer.copy()

    all_agree(f"float_{name}", make)
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    expected = np.clip(operation(pictures["x"].inside, pictures["r"].inside), -1, 2)
    assert np.array_equal(y.inside, np.broadcast_to(expected, shape).astype(np.float32))


def test_copy_and_fill():
    rng = np.random.default_rng(4)
    x = Picture(random(rng, (2, 9, 8, 12)), (1, 2, 0, 0))
    y = Picture(np.zeros((2, 6, 6, 9), np.float32), (1, 1, 1, 1))
    for step in (1, 2):
        fields = {
            "n": 2, "height": 4, "width": 3, "channels": 5, "row0": x.top + 1,
            "column0": x.left + 2, "channel0_x": 1, "stride_h": 2, "stride_w": 2,
            "stride_c": step, "row0_y": y.top + 1, "column0_y": y.left + 2, "channel0_y": 3,
        }  # fmt: skip

        def make(kernel, threads, fields=fields):
            y.buffer[:] = 7
            call(kernel, threads, {"x": x, "y": y}, **fields)
            return y.buffer.copy()

        all_agree("float_copy", make)
        expected = np.full((2, 6, 6, 9), 7, np.float32)
        expected[:, 1:5, 2:5, 3:8] = x.inside[:, 1:9:2, 2:8:2, 1 : 1 + 5 * step : step]
        assert np.array_equal(y.inside, expected)

    def fill(kernel, threads):
        y.buffer[:] = 7
        call(kernel, threads, {"y": y}, **sizes(y), value=-0.25)
        return y.buffer.copy()

    all_agree("float_fill", fill)
    assert np.all(y.inside == -0.25) and np.sum(y.buffer == 7) == 2 * 9 * (64 - 36)


@pytest.mark.parametrize("linear", [False, True])
def test_resize(linear):
    rng = np.random.default_rng(5)
    x = Picture(random(rng, (2, 5, 4, 7)), (1, 0, 0, 1))
    y = Picture(np.zeros((2, 9, 11, 7), np.float32), (0, 1, 1, 0))
    tables = {}
    for label, size, out in (("row", 5, 9), ("column", 4, 11)):
        first = np.sort(rng.integers(0, size, out))
        tables[f"{label}_index0"] = first
        tables[f"{label}_index1"] = np.minimum(first + 1, size - 1)
        tables[f"{label}_weight"] = rng.random(out, np.float32)

    def make(kernel, threads):
        call(kernel, threads, {"x": x, "y": y}, **sizes(y), linear=linear, **tables)
        return y.buffer.copy()

    all_agree("float_resize", make)
    rows = x.inside[:, tables["row_index0"]]
    expected = rows[:, :, tables["column_index0"]].astype(np.float64)
    if linear:
        v, u = tables["row_weight"][:, None, None], tables["column_weight"][:, None]
        other = x.inside[:, tables["row_index1"]]
        above = (1 - u) * expected + u * rows[:, :, tables["column_index1"]]
        below = (1 - u) * other[:, :, tables["column_index0"]]
        below = below + u * other[:, :, tables["column_index1"]]
        expected = (1 - v) * above + v * below
    assert np.allclose(y.inside, expected, atol=0 if not linear else 1e-6)


@pytest.mark.parametrize("block_first", [False, True])
def test_depth_to_space(block_first):
    rng = np.random.default_rng(6)
    x = Picture(random(rng, (2, 3, 4, 20)), (1, 0, 0, 1))
    y = Picture(np.zeros((2, 6, 8, 5), np.float32), (0, 1, 1, 0))

    def make(kernel, threads):
        fields = {"blocksize": 2, "block_first": block_first}
        call(kernel, threads, {"x": x, "y": y}, **sizes(y), **fields)
        return y.buffer.copy()

    all_agree("float_depth_to_space", make)
    shape, order = ((2, 3, 4, 2, 2, 5), (0, 1, 3, 2, 4, 5)) if block_first else (
        (2, 3, 4, 5, 2, 2), (0, 1, 4, 2, 5, 3)
    )  # fmt: skip
    assert np.array_equal(y.inside, x.inside.reshape(shape).transpose(order).reshape(2, 6, 8, 5))


@pytest.mark.parametrize(("width", "channels"), [(5, 3), (40, 33), (1, 130)])
def test_both_orders_of_channels(width, channels):
    rng = np.random.default_rng(7)
    first = random(rng, (2, channels, 4, width))
    flat = Picture(first.reshape(1, 1, 1, -1))
    last = Picture(np.zeros((2, 4, width, channels), np.float32), (1, 2, 1, 1))

    def make(kernel, threads):
        call(kernel, threads, {"x": flat, "y": last}, **sizes(last))
        return last.buffer.copy()

    all_agree("to_channels_last", make)
    assert np.array_equal(last.inside, first.transpose(0, 2, 3, 1))
    back = Picture(np.zeros_like(flat.buffer))

    def make_back(kernel, threads):
        call(kernel, threads, {"x": last, "y": back}, **sizes(last))
        return back.buffer.copy()

    all_agree("to_channels_first", make_back)
    assert np.array_equal(back.buffer, flat.buffer)


PARAMETERS = {
    "clip": (-1.5, 2.5), "leaky_relu": (0.1, 0), "hard_sigmoid": (0.2, 0.5),
    "hard_swish": (1 / 6, 0.5), "elu": (1.3, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", functions.UNARY_FUNCTIONS)
def test_functions(name):
    rng = np.random.default_rng(8)
    values = np.concatenate([
        random(rng, 40000) * np.exp2(rng.integers(-20, 8, 40000)).astype(np.float32),
        np.array([0, -0.0, 1, -1, 88, -88, 120, -120, 1e30, -1e30, np.inf, -np.inf], np.float32),
    ])  # fmt: skip
    values = values[: len(values) // 11 * 11].reshape(1, -1, 11, 1)
    x = Picture(values, (1, 1, 0, 0))
    y = Picture(np.zeros_like(values), (0, 0, 1, 1))
    alpha, beta = map(np.float32, PARAMETERS.get(name, (0, 0)))
    fields = {"function": [*functions.UNARY_FUNCTIONS].index(name), "alpha": alpha, "beta": beta}

    def make(kernel, threads):
        call(kernel, threads, {"x": x, "y": y}, **sizes(y), **fields)
        return y.buffer.copy()

    all_agree("float_unary", make)
    finite = np.isfinite(values)
    exact = oracle.unary(name, values, float(alpha), float(beta))
    error = abs(y.inside - exact)[finite]
    # In units of the last place; some functions cancel near 0, which float32 cannot see.
    unit = np.maximum(np.spacing(abs(exact[finite]).astype(np.float32)), 2.0**-126)
    cancels = name in ("hard_sigmoid", "hard_swish", "gelu")
    slack = 2.0**-22 / unit if cancels else 3
    if name in ("hard_swish", "gelu"):
        slack = slack * np.maximum(abs(values[finite]), 1)
    assert np.all(error <= np.maximum(slack, 3) * unit), float((error / unit).max())


@settings(max_examples=300)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 3)
def test_fused_multiply_add_is_rounded_once(x, w, acc):
    result = _fma(np.float32(x), np.float32(w), np.float32(acc))
    exact = Fraction(x) * Fraction(w) + Fraction(acc)
    if not np.isfinite(result):
        assert abs(exact) > Fraction(float(np.finfo(np.float32).max))
        return
    own = abs(Fraction(float(result)) - exact)
    for towards in (np.float32(np.inf), np.float32(-np.inf)):
        with np.errstate(over="ignore"):
            neighbour = np.nextafter(result, towards)
        if np.isfinite(neighbour):
            assert own <= abs(Fraction(float(neighbour)) - exact)
