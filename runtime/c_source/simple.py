"""All operators but convolutions: edges, moves, tables, arithmetic, pools, resizing."""

from __future__ import annotations

import math

import numpy as np

from logshift.kernels.activation import target
from logshift.runtime import geometry
from logshift.runtime.c_source.fixed import fixed
from logshift.runtime.c_source.requantize import (
    activated,
    clamp_of,
    pointers,
    scale,
    scaling,
    slopes_of,
)
from logshift.runtime.c_source.site import Site, emits, refused
from logshift.runtime.c_source.source import nest, number
from logshift.runtime.c_source.tensors import Tensor
from logshift.runtime.operators.moves import between
from logshift.runtime.operators.pool import window_of
from logshift.runtime.operators.resize import ONE, positions

# --- edges ----------------------------------------------------------------------------------------


@emits("QuantizeLinear")
def _quantize(site: Site) -> None:
    x, y, q = site.inputs[0], site.output, site.output.quantization
    assert q is not None
    site.helper("quantized")
    value = f"quantized(x[s], {number(np.float32(q.scale))}, {q.zero_point}, {q.top})"
    body = nest(y.shape, {"s": (x.first, *x.steps), "t": (y.first, *y.steps)}, f"y[t] = {value};")
    site.write(body, "const float *x, uint8_t *restrict y", lambda: x.pointer, lambda: y.pointer)


@emits("DequantizeLinear")
def _dequantize(site: Site) -> None:
    x, y, q = site.inputs[0], site.output, site.inputs[0].quantization
    assert q is not None
    value = f"(float)((int32_t)x[s] - {q.zero_point}) * {number(np.float32(q.scale))}"
    body = nest(y.shape, {"s": (x.first, *x.steps), "t": (y.first, *y.steps)}, f"y[t] = {value};")
    site.write(body, "const uint8_t *x, float *restrict y", lambda: x.pointer, lambda: y.pointer)


# --- moves ----------------------------------------------------------------------------------------


def _moved(
    site: Site, name: str, x: Tensor, start: int, steps: tuple[int, ...], at: int,
    to: tuple[int, ...], counts: tuple[int, ...], value: str = "x[s]",
) -> None:  # fmt: skip
    """Write a function that copies elements, through a table if `value` says so."""
    if x.quantization is None:
        raise refused(site.node, "moves float32", "nothing in keep_float")
    body = nest(counts, {"s": (start, *steps), "t": (at, *to)}, f"y[t] = {value};")
    text = f"static void {name}({pointers(['x'])})\n{{\n{body}\n}}\n"
    site.source.function(f"/* {site.title} */\n{text}")
    y = site.output
    site.source.call(lambda: f"{name}({x.pointer}, {y.pointer});")


@emits("Concat")
def _concat(site: Site) -> None:
    y, axis, position = site.output, site.node.attributes["axis"], 0
    for i, x in enumerate(site.inputs):
        table = between(x.quantization, y.quantization)
        value = "x[s]"
        if table is not None:
            value = f"{site.source.table(table, f'{site.name}_table{i}')}[x[s]]"
        at = y.first + position * y.steps[axis - 1]
        _moved(site, f"{site.name}_{i}", x, x.first, x.steps, at, y.steps, x.shape, value)
        position += x.shape[axis - 1]


@emits("Slice")
def _slice(site: Site) -> None:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    start, steps = x.first, list(x.steps)
    for axis, begin, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        taken = geometry.slice_range(x.shape[axis - 1], begin, end, step)
        start += taken.start * steps[axis - 1]
        steps[axis - 1] *= taken.step
    _moved(site, site.name, x, start, tuple(steps), y.first, y.steps, y.shape)


@emits("Pad")
def _pad(site: Site) -> None:
    x, y, pads = site.inputs[0], site.output, site.node.attributes["pads"]
    q = y.quantization
    zero = 0 if q is None else q.zero_point
    site.source.call(lambda: f"memset({y.pointer}, {zero}, {y.size});")
    at = y.first + sum(pad * step for pad, step in zip(pads[1:4], y.steps, strict=True))
    _moved(site, site.name, x, x.first, x.steps, at, y.steps, x.shape)


@emits("Gather")
def _gather(site: Site) -> None:
    x, y = site.inputs[0], site.output
    starts = x.first + np.array(site.node.attributes["indices"], np.int32) * x.plane
    table = site.source.table(starts.astype(np.int32), f"{site.name}_channels")
    inner = nest(
        y.shape[1:], {"s": (0, *x.steps[1:]), "t": (y.first, *y.steps[1:])}, "y[t] = from[s];"
    )
    inner = "\n".join("    " + line for line in inner.splitlines())
    body = (
        f"    int32_t c;\n    for (c = 0; c < {y.shape[0]}; c++, y += {y.plane}) {{\n"
        f"        const uint8_t *from = x + {table}[c];\n{inner}\n    }}"
    )
    site.quantizations()
    site.write(body, pointers(["x"]), lambda: x.pointer, lambda: y.pointer)


@emits("DepthToSpace")
def _depth_to_space(site: Site) -> None:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    b, c = a["blocksize"], y.shape[0]
    # Input channels are (row, column, channel) or (channel, row, column).
    rows, columns, channels = (b * c, c, 1) if a["mode"] == "DCR" else (b, 1, b * b)
    plane, row, column = x.steps
    _moved(
        site, site.name, x, x.first, (channels * plane, row, rows * plane, column, columns * plane),
        y.first, (y.plane, b * y.row, y.row, b, 1), (c, x.shape[1], b, x.shape[2], b),
    )  # fmt: skip


@emits("Lookup")
def _lookup(site: Site) -> None:
    x, y, table = site.inputs[0], site.output, site.node.table
    assert table is not None
    name = site.source.table(table, f"{site.name}_table")
    if table.ndim == 1:
        _moved(site, site.name, x, x.first, x.steps, y.first, y.steps, y.shape, f"{name}[x[s]]")
        return
    body = nest(
        y.shape, {"s": (x.first, *x.steps), "t": (y.first, *y.steps), "k": (0, 256, 0, 0)},
        f"y[t] = {name}[k + x[s]];",
    )  # fmt: skip
    site.write(body, pointers(["x"]), lambda: x.pointer, lambda: y.pointer)


# --- two tensors ----------------------------------------------------------------------------------


def _repeated(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Return the offsets of a tensor that is repeated to another's shape."""
    return x.first, *(step if size > 1 else 0 for size, step in zip(x.shape, x.steps, strict=True))


def _binary(site: Site, value: str) -> None:
    (x, r), y = site.inputs, site.output
    offsets = {"s": _repeated(x, y), "i": _repeated(r, y), "t": (y.first, *y.steps)}
    site.write(
        nest(y.shape, offsets, value), pointers(["x", "r"]), lambda: x.pointer, lambda: r.pointer,
        lambda: y.pointer,
    )  # fmt: skip


@emits("Add", "Sub")
def _add(site: Site) -> None:
    q_x, q_r, q_y = site.quantizations()
    to = target(site.node.activation, q_y.scale, q_y.zero_point)
    m, m_r = np.float32(q_x.scale / to.unit), np.float32(q_r.scale / to.unit)
    m_r = -m_r if site.node.op == "Sub" else m_r
    lo, hi = clamp_of(site)
    if to.kind:
        slope = f"{slopes_of(site, to, 1)}[0]" if to.slopes is not None else ""
        site.helper("linear")
        v = (
            f"linear((float)((int32_t)r[i] - {q_r.zero_point}), {number(m_r)},"
            f" linear((float)((int32_t)x[s] - {q_x.zero_point}), {number(m)},"
            f" {number(np.float32(to.zero))}))"
        )
        _binary(site, f"y[t] = {activated(site, to, v, lo, hi, slope)};")
        return
    # The sum of the first tensor's table and of the second one's: as of one code by itself, with
    # the other's as its residual.
    one = np.ones(1, np.int64)
    form = fixed(
        np.array([m]), np.array([to.zero], np.float32), q_x.zero_point * one, 0 * one,
        q_x.top * one, lo, hi, (np.arange(256) - q_r.zero_point) * float(m_r),
    )  # fmt: skip
    scales = scale(site, form, q_r.zero_point, float(m_r))
    row, first = form.rows[0], np.zeros(256)
    if form.fraction:
        exact = (np.arange(256) - row.offset) * row.m + row.b
        first = np.rint((exact + 0.5) * (1 << form.fraction))
    table = site.source.table(first.astype(np.int32), f"{site.name}_first")
    site.helper("settle_residual")
    _binary(
        site,
        f"y[t] = settle_residual(&{scales.scale}, {scales.rows}, x[s],"
        f" (uint32_t){table}[x[s]], r[i]);",
    )


@emits("Mul")
def _multiply(site: Site) -> None:
    q_x, q_r, q_y = site.quantizations()
    to = target(site.node.activation, q_y.scale, q_y.zero_point)
    m = np.float32(q_x.scale * q_r.scale / to.unit)
    lo, hi = clamp_of(site)
    site.helper("times_products" if site.options.multiply else "times")
    lines = [
        f"int32_t a = (int32_t)x[s] - {q_x.zero_point}, b = (int32_t)r[i] - {q_r.zero_point};",
        "uint32_t size = times((uint32_t)(a < 0 ? -a : a), (uint32_t)(b < 0 ? -b : b));",
        "int32_t product = (a < 0) != (b < 0) ? -(int32_t)size : (int32_t)size;",
    ]
    if to.kind:
        slope = f"{slopes_of(site, to, 1)}[0]" if to.slopes is not None else ""
        site.helper("linear")
        v = f"linear((float)product, {number(m)}, {number(np.float32(to.zero))})"
        lines.append(f"y[t] = {activated(site, to, v, lo, hi, slope)};")
    else:
        one, most = np.ones(1, np.int64), 255 * 255
        form = fixed(
            np.array([m]), np.array([to.zero], np.float32), 0 * one, -most * one, most * one,
            lo, hi, products=site.options.multiply,
        )  # fmt: skip
        scales = scale(site, form)
        scaling(site, "scale1")
        site.helper("settle")
        both = f"&{scales.scale}, {scales.rows}, product"
        lines.append(f"y[t] = settle({both}, scale1({both}));")
    _binary(site, "\n".join(lines))


# --- windows --------------------------------------------------------------------------------------


def _pool(site: Site, begin: str, take: str, end: str) -> None:
    """Write a pool, whose statements see a window's positions inside the picture."""
    site.quantizations()
    x, y, a = site.inputs[0], site.output, window_of(site.node, (1, *site.inputs[0].shape))
    (kh, kw), (sh, sw), (dh, dw) = a["kernel_shape"], a["strides"], a["dilations"]
    top, left = a["pads"][:2]
    _, h, w = x.shape
    body = f"""\
    int32_t c, i, j, k, l, top, left, s, t;
    for (c = 0; c < {x.shape[0]}; c++, x += {x.plane}, y += {y.plane}) {{
        int32_t to = {y.first}, of = {x.first - top * x.row - left};
        for (i = 0, top = {-top}; i < {y.shape[1]}; i++, top += {sh},
             of += {sh * x.row}, to += {y.row}) {{
            int32_t begin = of;
            for (j = 0, left = {-left}; j < {y.shape[2]}; j++, left += {sw}, begin += {sw}) {{
                {begin}
                for (k = 0, s = begin, t = top; k < {kh}; k++, s += {dh * x.row}, t += {dh}) {{
                    int32_t at = s, column = left;
                    if (t < 0 || t >= {h})
                        continue;
                    for (l = 0; l < {kw}; l++, at += {dw}, column += {dw})
                        if (column >= 0 && column < {w}) {{
                            {take}
                        }}
                }}
                {end}
            }}
        }}
    }}"""
    site.write(body, pointers(["x"]), lambda: x.pointer, lambda: y.pointer)


@emits("MaxPool", "GlobalMaxPool")
def _max_pool(site: Site) -> None:
    _pool(site, "uint8_t most = 0;", "if (x[at] > most)\n    most = x[at];", "y[to + j] = most;")


@emits("AveragePool", "GlobalAveragePool")
def _average_pool(site: Site) -> None:
    q_x, q_y = site.quantizations()
    x, a = site.inputs[0], window_of(site.node, (1, *site.inputs[0].shape))
    counted = a["pads"] if a.get("count_include_pad") else [0, 0, 0, 0]
    rows, columns = (
        _counts(a, axis, x.shape[1 + axis], site.output.shape[1 + axis], counted) for axis in (0, 1)
    )
    # One row of a layer's records for each number of positions that count.
    counts = sorted({i * j for i in rows for j in columns} | {0})
    m = (q_x.scale / (np.maximum(counts, 1) * q_y.scale)).astype(np.float32)
    b = np.full(len(counts), q_y.zero_point, np.float32)
    size = math.prod(a["kernel_shape"])
    least = np.full(len(counts), -q_x.zero_point * size, np.int64)
    most = np.full(len(counts), (q_x.top - q_x.zero_point) * size, np.int64)
    form = fixed(
        m, b, np.zeros(len(counts), np.int64), least, most, 0, q_y.top,
        products=site.options.multiply,
    )  # fmt: skip
    scales = scale(site, form)
    scaling(site, "scale1")
    site.helper("settle")
    index = np.array([[counts.index(i * j) for j in columns] for i in rows], np.uint16)
    if len(np.unique(index)) == 1:
        row = f"{scales.rows} + {int(index.flat[0])}"
    else:
        down, downs = np.unique(rows, return_inverse=True)
        right, rights = np.unique(columns, return_inverse=True)
        table = site.source.table(
            np.array([[counts.index(i * j) for j in right] for i in down], np.uint16),
            f"{site.name}_counts",
        )
        starts = site.source.table((downs * len(right)).astype(np.int32), f"{site.name}_down")
        places = site.source.table(rights.astype(np.int32), f"{site.name}_right")
        row = f"{scales.rows} + {table}[{starts}[i] + {places}[j]]"
    both = f"&{scales.scale}, w, sum"
    _pool(
        site, "int32_t sum = 0;", f"sum += (int32_t)x[at] - {q_x.zero_point};",
        f"{{\nconst struct row *w = {row};\ny[to + j] = settle({both}, scale1({both}));\n}}",
    )  # fmt: skip


def _counts(a: dict, axis: int, size: int, out: int, counted: list[int]) -> list[int]:
    """Return how many positions along an axis count, of each window."""
    found = []
    for i in range(out):
        first = i * a["strides"][axis] - a["pads"][axis]
        places = [first + k * a["dilations"][axis] for k in range(a["kernel_shape"][axis])]
        found.append(sum(-counted[axis] <= p < size + counted[2 + axis] for p in places))
    return found


# --- resizing -------------------------------------------------------------------------------------


@emits("Resize")
def _resize(site: Site) -> None:
    x, y, a = site.inputs[0], site.output, site.node.attributes
    if x.quantization is None:
        raise refused(site.node, "works on float32", "nothing in keep_float")
    tables = []
    for axis, label, step in ((0, "row", x.row), (1, "column", 1)):
        first, second, weight = positions(a, axis, x.shape[1 + axis], y.shape[1 + axis])
        found = {"first": first * step}
        if a["mode"] == "linear":
            found |= {"second": second * step, "weight": np.rint(weight * ONE)}
        for part, values in found.items():
            name = f"{site.name}_{label}_{part}"
            tables.append(site.source.table(values.astype(np.int32), name))
    if a["mode"] == "nearest":
        up, left = tables
        value = f"y[to + j] = x[{x.first} + {up}[i] + {left}[j]];"
    else:
        up, down, share, left, right, part = tables
        site.helper("times_products" if site.options.multiply else "times")
        value = f"""\
const uint8_t *p = x + {x.first} + {up}[i], *q = x + {x.first} + {down}[i];
uint32_t v = (uint32_t){part}[j], w = (uint32_t){share}[i];
uint32_t a = times(p[{left}[j]], {ONE} - v) + times(p[{right}[j]], v);
uint32_t b = times(q[{left}[j]], {ONE} - v) + times(q[{right}[j]], v);
y[to + j] = (uint8_t)((times(a, {ONE} - w) + times(b, w) + {2**21}) >> 22);"""
    value = value.replace("\n", "\n                ")
    body = f"""\
    int32_t c, i, j;
    for (c = 0; c < {y.shape[0]}; c++, x += {x.plane}, y += {y.plane}) {{
        int32_t to = {y.first};
        for (i = 0; i < {y.shape[1]}; i++, to += {y.row})
            for (j = 0; j < {y.shape[2]}; j++) {{
                {value}
            }}
    }}"""
    # Of a second input only the size counts.
    site.write(body, pointers(["x"]), lambda: x.pointer, lambda: y.pointer)
