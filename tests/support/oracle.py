"""Evaluation of packed graphs in plain NumPy: slow, obvious, and shares no code with the kernels.

Follows `docs/quantization.md`, section 4: sums of int64, then float32 products and sums, each
rounded by itself. Nothing but `LogWeights` and the graph's own description is used.
"""

from __future__ import annotations

import math

import numpy as np

f32 = np.float32


def evaluate(graph, inputs):
    """Return all tensors of `graph` by name: uint8 codes (N, C, H, W) or float32."""
    dtypes = {info.name: info.dtype for info in graph.inputs}
    values = {name: np.asarray(x, dtypes[name]) for name, x in inputs.items()}
    values |= graph.constants
    for node in graph.nodes:
        if node.is_onnx:
            values |= _onnx(graph, node, values)
            continue
        arguments = [values[name] for name in node.inputs]
        quantizations = [graph.quantization.get(name) for name in node.inputs]
        q_y = graph.quantization.get(node.outputs[0])
        values[node.outputs[0]] = _OPERATIONS[node.op](node, arguments, quantizations, q_y)
    return values


def _onnx(graph, node, values):
    """Outputs of an ONNX operator, by name."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    onnx_node = helper.make_node(node.op, node.inputs, node.outputs, **node.attributes)
    given = {name: values[name] for name in node.inputs if name}
    infos = [
        [helper.make_tensor_value_info(name, kind(name), None) for name in names]
        for names, kind in (
            (given, lambda name: helper.np_dtype_to_tensor_dtype(given[name].dtype)),
            (filter(None, node.outputs), lambda name: 0),
        )
    ]
    model = helper.make_model(
        helper.make_graph([onnx_node], "node", *infos),
        opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=10,
    )  # fmt: skip
    names = [name for name in node.outputs if name]
    return dict(zip(names, ReferenceEvaluator(model).run(names, given), strict=True))


def _centred(codes, q):
    """c - z, int64."""
    return codes.astype(np.int64) - q.zero_point


def _finish(y, q_y, clamp=(None, None)):
    """Round, clamp and store float32 y; float32 outputs are only clamped, in real units."""
    lo, hi = clamp
    if q_y is None:
        y = y if lo is None else np.maximum(y, f32(lo))
        return y if hi is None else np.minimum(y, f32(hi))
    lo = 0 if lo is None else lo
    hi = q_y.top if hi is None else hi
    return np.minimum(np.maximum(np.rint(y), lo), hi).astype(np.uint8)


def _target(node, q_y):
    """The unit of y before it is rounded, and where zero is in it."""
    if q_y is None:
        return 1.0, 0
    if node.activation is None:
        return q_y.scale, q_y.zero_point
    if node.activation.op == "PRelu":
        return q_y.scale, 0.0
    return node.activation.unit, -node.activation.origin / node.activation.unit


def _activated(v, activation, q_y):
    """The fused function of v (N, C, H, W), float32, not rounded yet."""
    if activation is None:
        return v
    zero, s_y, z_y = f32(0), q_y.scale, f32(q_y.zero_point)
    if activation.op == "PRelu":
        slopes = activation.coefficients[:, None, None]
        return (np.maximum(v, zero) + np.minimum(v, zero) * slopes) + z_y
    if activation.op == "HardSwish":
        x = v * f32(activation.unit / s_y) + f32(activation.origin / s_y)
        return x * np.clip(v, zero, f32(1)) + z_y
    k = np.clip(np.rint(v), -32768, 32767).astype(np.int64)
    c0, c1, c2 = activation.coefficients[:, k // 4096 + 8].astype(np.int64)
    f = 16 * (k % 4096) - 32768
    p = c1 + ((c2 * f + 2**14) >> 15)
    y = np.clip(c0 + ((p * f + 2**14) >> 15), -32768, 32767)
    return ((y + 64) >> 7).astype(f32)


# --- float32 and codes --------------------------------------------------------------------------


def _quantize(node, arguments, quantizations, q_y):
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.rint(arguments[0] / f32(q_y.scale)) + f32(q_y.zero_point)
    return np.clip(np.where(np.isnan(y), f32(0), y), 0, q_y.top).astype(np.uint8)


def _dequantize(node, arguments, quantizations, q_y):
    return _centred(arguments[0], quantizations[0]).astype(f32) * f32(quantizations[0].scale)


def _flatten(node, arguments, quantizations, q_y):
    return arguments[0].reshape(arguments[0].shape[:2])


# --- convolutions -------------------------------------------------------------------------------


def _requantized(node, acc, arguments, quantizations, q_y):
    """From acc, the sum of W * (c - z_x), to the output; a second argument is a residual."""
    unit, zero = _target(node, q_y)
    weights = node.weights
    s_x = quantizations[0].scale
    m = (s_x * weights.unit() / unit).astype(f32)
    b = (node.bias.astype(np.float64) / unit + zero).astype(f32)
    y = acc.astype(f32) * m[:, None, None] + b[:, None, None]
    if len(arguments) == 2:
        m_r = f32(quantizations[1].scale / unit)
        y = y + _centred(arguments[1], quantizations[1]).astype(f32) * m_r
    return _finish(_activated(y, node.activation, q_y), q_y, node.attributes["clamp"])


def _conv(node, arguments, quantizations, q_y):
    a = node.attributes
    w = node.weights.integers().astype(np.int64)
    o, kh, kw, in_group = w.shape
    top, left, bottom, right = a["pads"]
    # Padding is real zero: the code z_x, which is 0 once z_x is taken away.
    x = np.pad(
        _centred(arguments[0], quantizations[0]), ((0, 0), (0, 0), (top, bottom), (left, right))
    )
    n, _, height, width = x.shape
    (sy, sx), (dy, dx) = a["strides"], a["dilations"]
    out_h = (height - dy * (kh - 1) - 1) // sy + 1
    out_w = (width - dx * (kw - 1) - 1) // sx + 1
    acc = np.zeros((n, o, out_h, out_w), np.int64)
    per_group = o // a["group"]
    for g in range(a["group"]):
        out = slice(g * per_group, (g + 1) * per_group)
        channels = x[:, g * in_group : (g + 1) * in_group]
        for ky in range(kh):
            for kx in range(kw):
                rows = slice(ky * dy, ky * dy + sy * (out_h - 1) + 1, sy)
                columns = slice(kx * dx, kx * dx + sx * (out_w - 1) + 1, sx)
                tap = channels[:, :, rows, columns]
                acc[:, out] += np.einsum("nchw,oc->nohw", tap, w[out, ky, kx])
    return _requantized(node, acc, arguments, quantizations, q_y)


def _conv_transpose(node, arguments, quantizations, q_y):
    a = node.attributes
    w = node.weights.integers().astype(np.int64)
    o, kh, kw, in_group = w.shape
    x = _centred(arguments[0], quantizations[0])
    n, _, height, width = x.shape
    (sy, sx), (dy, dx), (ey, ex) = a["strides"], a["dilations"], a["output_padding"]
    full_h = sy * (height - 1) + dy * (kh - 1) + 1 + ey
    full_w = sx * (width - 1) + dx * (kw - 1) + 1 + ex
    acc = np.zeros((n, o, full_h, full_w), np.int64)
    per_group = o // a["group"]
    for g in range(a["group"]):
        out = slice(g * per_group, (g + 1) * per_group)
        channels = x[:, g * in_group : (g + 1) * in_group]
        for ky in range(kh):
            for kx in range(kw):
                rows = slice(ky * dy, ky * dy + sy * (height - 1) + 1, sy)
                columns = slice(kx * dx, kx * dx + sx * (width - 1) + 1, sx)
                acc[:, out, rows, columns] += np.einsum("nchw,oc->nohw", channels, w[out, ky, kx])
    top, left, bottom, right = a["pads"]
    acc = acc[:, :, top : full_h - bottom, left : full_w - right]
    return _requantized(node, acc, arguments, quantizations, q_y)


# --- pooling ------------------------------------------------------------------------------------


def _windows(size, kernel, stride, dilation, begin, end, ceil_mode):
    """Per output position, the positions that its window covers, counted in the input."""
    span = size + begin + end - dilation * (kernel - 1) - 1
    count = span // stride + 1
    if ceil_mode:
        count = -(-span // stride) + 1
        if (count - 1) * stride >= size + begin:
            count -= 1
    return [[i * stride - begin + k * dilation for k in range(kernel)] for i in range(count)]


def _pool_windows(node, x):
    a = node.attributes
    pads = a["pads"]
    return [
        _windows(
            x.shape[2 + i], a["kernel_shape"][i], a["strides"][i], a["dilations"][i],
            pads[i], pads[i + 2], a["ceil_mode"],
        )
        for i in range(2)
    ]  # fmt: skip


def _inside(positions, size):
    return [p for p in positions if 0 <= p < size]


def _max_pool(node, arguments, quantizations, q_y):
    x = arguments[0]
    rows, columns = _pool_windows(node, x)
    y = np.zeros((*x.shape[:2], len(rows), len(columns)), x.dtype)
    for i, ys in enumerate(rows):
        for j, xs in enumerate(columns):
            window = x[:, :, _inside(ys, x.shape[2])][:, :, :, _inside(xs, x.shape[3])]
            if window.size:
                y[:, :, i, j] = window.max(axis=(2, 3))
    return y


def _mean(total, n, q_x, q_y):
    m = f32(q_x.scale / (n * q_y.scale))
    return total.astype(f32) * m + f32(q_y.zero_point)


def _average_pool(node, arguments, quantizations, q_y):
    a = node.attributes
    x = _centred(arguments[0], quantizations[0])
    height, width = x.shape[2:]
    top, left, bottom, right = a["pads"]
    rows, columns = _pool_windows(node, x)
    y = np.zeros((*x.shape[:2], len(rows), len(columns)), f32)
    for i, ys in enumerate(rows):
        for j, xs in enumerate(columns):
            inside = x[:, :, _inside(ys, height)][:, :, :, _inside(xs, width)]
            n = inside.shape[2] * inside.shape[3]
            if a["count_include_pad"]:
                n = sum(-top <= p < height + bottom for p in ys) * sum(
                    -left <= p < width + right for p in xs
                )
            y[:, :, i, j] = _mean(inside.sum(axis=(2, 3)), max(n, 1), quantizations[0], q_y)
    return _finish(y, q_y)


def _global_max_pool(node, arguments, quantizations, q_y):
    return arguments[0].max(axis=(2, 3), keepdims=True)


def _global_average_pool(node, arguments, quantizations, q_y):
    x = _centred(arguments[0], quantizations[0])
    total = x.sum(axis=(2, 3), keepdims=True)
    return _finish(_mean(total, x.shape[2] * x.shape[3], quantizations[0], q_y), q_y)


# --- sums, joins, tables ------------------------------------------------------------------------


def _add(node, arguments, quantizations, q_y):
    unit, zero = _target(node, q_y)
    first, second = (
        _centred(c, q).astype(f32) * f32(q.scale / unit)
        for c, q in zip(arguments, quantizations, strict=True)
    )
    second = -second if node.op == "Sub" else second
    y = _activated((first + f32(zero)) + second, node.activation, q_y)
    return _finish(y, q_y, node.attributes["clamp"])


def _mul(node, arguments, quantizations, q_y):
    first, second = map(_centred, arguments, quantizations)
    unit, zero = _target(node, q_y)
    m = f32(quantizations[0].scale * quantizations[1].scale / unit)
    y = _activated((first * second).astype(f32) * m + f32(zero), node.activation, q_y)
    return _finish(y, q_y, node.attributes["clamp"])


def _concat(node, arguments, quantizations, q_y):
    parts = []
    for codes, q in zip(arguments, quantizations, strict=True):
        if q != q_y:
            y = _centred(codes, q).astype(f32) * f32(q.scale / q_y.scale) + f32(q_y.zero_point)
            codes = _finish(y, q_y)
        parts.append(codes)
    return np.concatenate(parts, axis=node.attributes["axis"])


def _lookup(node, arguments, quantizations, q_y):
    if node.table.ndim == 1:
        return node.table[arguments[0]]
    channels = np.moveaxis(arguments[0], 1, 0)
    looked_up = [table[codes] for table, codes in zip(node.table, channels, strict=True)]
    return np.stack(looked_up, axis=1)


# --- moving values ------------------------------------------------------------------------------


def _coordinates(size, length, scale, mode):
    """Source coordinate of each output position, float64."""
    i = np.arange(length, dtype=np.float64)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        return i * (size - 1) / (length - 1) if length > 1 else i * 0
    if mode == "pytorch_half_pixel" and length == 1:
        return i * 0
    return (i + 0.5) / scale - 0.5


def _resize(node, arguments, quantizations, q_y):
    a = node.attributes
    coordinates = []
    for i in range(2):
        size = arguments[0].shape[2 + i]
        if len(arguments) == 2:
            length = arguments[1].shape[2 + i]
        else:
            length = math.floor(size * a["scales"][i]) if a["sizes"] is None else a["sizes"][i]
        scale = length / size if a["scales"] is None else a["scales"][i]
        mode = a["coordinate_transformation_mode"]
        coordinates.append(_coordinates(size, length, scale, mode))
    x_h, x_w = coordinates
    if a["mode"] == "nearest":
        rows = _nearest(x_h, arguments[0].shape[2], a["nearest_mode"])
        columns = _nearest(x_w, arguments[0].shape[3], a["nearest_mode"])
        return arguments[0][:, :, rows][:, :, :, columns]
    codes = arguments[0].astype(np.int64)
    total = 0
    for rows, wy in _neighbours(x_h, codes.shape[2]):
        for columns, wx in _neighbours(x_w, codes.shape[3]):
            total = total + wy[:, None] * wx[None, :] * codes[:, :, rows][:, :, :, columns]
    return ((total + 2**21) >> 22).astype(np.uint8)


def _nearest(x, size, mode):
    index = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }[mode](x)
    return np.clip(index, 0, size - 1).astype(int)


def _neighbours(x, size):
    """Both neighbours of each coordinate and their weights, of 2048."""
    x = np.clip(x, 0, size - 1)
    i0 = np.floor(x).astype(int)
    w1 = np.rint((x - i0) * 2048).astype(np.int64)
    return (i0, 2048 - w1), (np.minimum(i0 + 1, size - 1), w1)


def _depth_to_space(node, arguments, quantizations, q_y):
    b = node.attributes["blocksize"]
    n, c, h, w = arguments[0].shape
    if node.attributes["mode"] == "DCR":
        blocks = arguments[0].reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = arguments[0].reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


def _slice(node, arguments, quantizations, q_y):
    a = node.attributes
    index = [slice(None)] * 4
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        index[axis] = slice(start, end, step)
    return arguments[0][tuple(index)]


def _gather(node, arguments, quantizations, q_y):
    return np.take(arguments[0], node.attributes["indices"], axis=node.attributes["axis"])


def _pad(node, arguments, quantizations, q_y):
    pads = node.attributes["pads"]
    widths = list(zip(pads[:4], pads[4:], strict=True))
    return np.pad(arguments[0], widths, constant_values=quantizations[0].zero_point)


_OPERATIONS = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Flatten": _flatten,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "Add": _add,
    "Sub": _add,
    "Mul": _mul,
    "Concat": _concat,
    "Gather": _gather,
    "Lookup": _lookup,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "Slice": _slice,
    "Pad": _pad,
}
