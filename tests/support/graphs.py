"""Small random packed graphs, one operation each, for tests that compare kernels."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from logshift.converter.encode import encode
from logshift.kernels.activation import ACTIVATIONS, Activation
from logshift.kernels.errors import FormatError
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.infer import infer_nominal, nominal_shapes
from logshift.runtime.validate import validate


def build(nodes, quantization, inputs, output, settings=None):
    """Graph from float inputs {name: shape} through `nodes` to the float tensor `output`."""
    infos = [ValueInfo(name, tuple(shape), tuple(shape)) for name, shape in inputs.items()]
    graph = Graph(infos, [], quantization, nodes, settings=settings or {})
    for node in nodes:
        if node.op in ("Conv", "ConvTranspose") and node.bias is None:
            node.bias = np.zeros(node.weights.shape[0], np.float32)
    # Attribute defaults are filled in by validation, which shape inference relies on.
    graph.outputs = [ValueInfo(output, (1,), (1,))]
    try:
        validate(graph)
    except Exception as error:
        if "is declared" not in str(error):
            raise
    shape = nominal_shapes(graph)[output]
    graph.outputs = [ValueInfo(output, shape, shape)]
    validate(graph)
    return graph


def node(op, inputs, *outputs, **attributes):
    """An ONNX operator as it is."""
    return Node(op, outputs[0], list(inputs), list(outputs), attributes, domain="ai.onnx")


def network(nodes, inputs, outputs, constants=None, opset=18, quantization=None):
    """A graph from arrays to outputs whose shapes and types are found out."""
    infos = [ValueInfo(name, x.shape, x.shape, x.dtype.name) for name, x in inputs.items()]
    graph = Graph(infos, [], quantization or {}, nodes, constants=constants or {}, opset=opset)
    for each in nodes:
        if each.op == "Conv":
            each.bias = np.zeros(each.weights.shape[0], np.float32)
    graph.outputs = [ValueInfo(name, (), ()) for name in outputs]
    with contextlib.suppress(FormatError):  # it fills in attributes, and shapes are not told yet
        validate(graph)
    found = infer_nominal(graph)
    graph.outputs = [
        ValueInfo(name, found.shapes[name], found.shapes[name], found.dtypes[name].name)
        for name in outputs
    ]
    validate(graph)
    return graph


@st.composite
def quantizations(draw):
    """Activation quantization of any width and zero point."""
    width = draw(st.integers(2, 8))
    zero_point = draw(st.one_of(st.just(0), st.integers(0, 2**width - 1)))
    return Quantization(draw(st.sampled_from([0.01, 0.0235, 0.5, 1.75])), zero_point, width)


@st.composite
def tables(draw, top, channels):
    """Codes up to `top` for Lookup: one table, or one for each channel."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    shape = (channels, 256) if channels > 1 and draw(st.booleans()) else (256,)
    return rng.integers(0, top + 1, shape).astype(np.uint8)


@st.composite
def activations(draw, scale, channels=1):
    """A fused function of results of about `scale`, or none; slopes of one channel or of all."""
    op = draw(st.sampled_from([None, None, None, *ACTIVATIONS]))
    if op is None:
        return None
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    unit = scale * draw(st.sampled_from([0.3, 8.0, 100.0]))
    origin = unit * draw(st.sampled_from([0.0, -0.5, -8.3]))
    origin, unit = float(np.float32(origin)), float(np.float32(unit))  # as ONNX keeps them
    dtype = np.float32
    if op == "PRelu":
        coefficients = rng.normal(0, 1, draw(st.sampled_from([1, channels])))
    elif op == "HardSwish":
        coefficients = np.zeros(0)
    else:
        largest = draw(st.sampled_from([[9000, 2000, 2000], [32767, 16383, 16383]]))
        coefficients = rng.uniform(-1, 1, (3, 16)) * np.reshape(largest, (3, 1))
        unit, dtype = unit / 4096, np.int16
    return Activation(op, origin, unit, coefficients.astype(dtype))


def random_weights(rng, shape, bits, ratio, residual_shift, clip=None):
    """Codes of normally distributed weights, a few of them zero."""
    w = rng.standard_normal(shape).astype(np.float32) * (rng.random(shape) > 0.05)
    return encode(w, bits, ratio, residual_shift=residual_shift, clip=clip)


@st.composite
def convolutions(draw, op="Conv"):
    """A graph of one Conv or ConvTranspose with everything that may vary about it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
    if kind == "depthwise":
        group, in_group, out_group = draw(st.integers(1, 70)), 1, 1
    else:
        group = 1 if kind == "dense" else draw(st.integers(2, 4))
        in_group, out_group = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    dilations = [draw(st.integers(1, 3)) for _ in range(2)]
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = [draw(st.integers(0, max(extent[i % 2], 2) - 1)) for i in range(4)]
    size = [draw(st.integers(1, 9)) for _ in range(2)]
    attributes = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    if op == "Conv":
        for i in range(2):
            assume(size[i] + pads[i] + pads[i + 2] >= extent[i])
    else:
        extra = [
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)
        ]
        attributes["output_padding"] = extra
        for i in range(2):
            assume(strides[i] * (size[i] - 1) + extra[i] + extent[i] - pads[i] - pads[i + 2] >= 1)
    bits = draw(st.integers(2, 5))
    residual_shift = draw(st.integers(0, 2))
    weights = random_weights(
        rng, (group * out_group, *kernel, in_group), bits,
        draw(st.sampled_from([0.0, 0.15, 1.0])), residual_shift,
    )  # fmt: skip
    q = {"x": draw(quantizations())}
    is_float = draw(st.booleans())
    scale = float(weights.unit().mean() * q["x"].scale * 20 * np.sqrt(weights.first[0].size))
    if not is_float:
        width = draw(st.integers(2, 8))
        q["y"] = Quantization(scale, draw(st.integers(0, 2**width - 1)), width)
        top = 2**width - 1
        lo, hi = sorted(draw(st.tuples(st.integers(0, top), st.integers(0, top))))
    else:
        lo, hi = 0.0, 6.0
    clamp = draw(st.sampled_from([[None, None], [lo, None], [lo, hi]]))
    n = draw(st.integers(1, 3))
    inputs = {"input": (n, group * in_group, *size)}
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"])]
    conv = Node(op, "conv", ["x"], ["y"], attributes | {"clamp": clamp}, weights)
    conv.bias = (rng.standard_normal(group * out_group) * scale).astype(np.float32)
    if not is_float:
        conv.activation = draw(activations(scale, group * out_group))
    if draw(st.booleans()):
        probe = build(
            [nodes[0], conv] + ([] if is_float else [Node("DequantizeLinear", "d", ["y"], ["z"])]),
            q, inputs, "y" if is_float else "z",
        )  # fmt: skip
        inputs["other"] = probe.outputs[0].nominal
        q["r"] = draw(quantizations())
        nodes.append(Node("QuantizeLinear", "q_r", ["other"], ["r"]))
        conv.inputs.append("r")
    nodes.append(conv)
    if is_float:
        return build(nodes, q, inputs, "y")
    last = "y"
    if draw(st.booleans()):  # which kernels of convolutions may do themselves
        q["t"], last = draw(quantizations()), "t"
        nodes.append(Node("Lookup", "lookup", ["y"], ["t"]))
        nodes[-1].table = draw(tables(q["t"].top, group * out_group))
    nodes.append(Node("DequantizeLinear", "d", [last], ["z"]))
    return build(nodes, q, inputs, "z")


def _unary(draw, op, attributes, q_y, channels=None, size=None):
    q = {"x": draw(quantizations())}
    q["y"] = q["x"] if q_y is None else q_y
    shape = (
        draw(st.integers(1, 2)), channels or draw(st.integers(1, 40)),
        *(size or [draw(st.integers(1, 9)) for _ in range(2)]),
    )  # fmt: skip
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node(op, "node", ["x"], ["y"], attributes),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
    ]
    return nodes, q, {"input": shape}


@st.composite
def pools(draw):
    """MaxPool, AveragePool or their global twins."""
    op = draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"]))
    q_y = None if "Max" in op else draw(quantizations())
    if "Global" in op:
        return build(*_unary(draw, op, {}, q_y), "z")
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    attributes = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(2)],
        "pads": [draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(2)],
        "ceil_mode": draw(st.integers(0, 1)),
    }
    size = [draw(st.integers(1, 9)) for _ in range(2)]
    for i in range(2):
        extent = attributes["dilations"][i] * (kernel[i] - 1) + 1
        assume(size[i] + attributes["pads"][i] + attributes["pads"][i + 2] >= extent)
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    return build(*_unary(draw, op, attributes, q_y, size=size), "z")


@st.composite
def resizes(draw):
    """Resize by scales or to sizes."""
    attributes = {
        "mode": draw(st.sampled_from(["nearest", "linear"])),
        "coordinate_transformation_mode": draw(
            st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
        ),
        "nearest_mode": draw(
            st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
        ),
    }
    if draw(st.booleans()):
        # Float32 holds them and most quotients: where one is rounded, other engines break ties
        # between two pixels otherwise.
        scales = st.sampled_from([1.0, 1.5, 2.0, 3.25])
        attributes["scales"] = [draw(scales) for _ in range(2)]
    else:
        attributes["sizes"] = [draw(st.integers(1, 20)) for _ in range(2)]
    return build(*_unary(draw, "Resize", attributes, None), "z")


@st.composite
def rearrangements(draw):
    """DepthToSpace, Slice, Pad, Gather or Lookup."""
    op = draw(st.sampled_from(["DepthToSpace", "Slice", "Pad", "Gather", "Lookup"]))
    if op == "DepthToSpace":
        blocksize = draw(st.integers(1, 3))
        attributes = {"blocksize": blocksize, "mode": draw(st.sampled_from(["DCR", "CRD"]))}
        channels = blocksize**2 * draw(st.integers(1, 5))
        return build(*_unary(draw, op, attributes, None, channels=channels), "z")
    if op == "Slice":
        axes = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, unique=True))
        each = st.lists(st.integers(-3, 9), min_size=len(axes), max_size=len(axes))
        steps = st.lists(st.integers(1, 3), min_size=len(axes), max_size=len(axes))
        attributes = {
            "axes": axes, "starts": draw(each), "ends": draw(each), "steps": draw(steps)
        }  # fmt: skip
        nodes, q, inputs = _unary(draw, op, attributes, None)
        for axis, start, end, step in zip(*attributes.values(), strict=True):
            assume(len(range(*slice(start, end, step).indices(inputs["input"][axis]))) > 0)
        return build(nodes, q, inputs, "z")
    if op == "Pad":
        pads = [0, *(draw(st.integers(0, 3)) for _ in range(3))]
        pads += [0, *(draw(st.integers(0, 3)) for _ in range(3))]
        return build(*_unary(draw, op, {"pads": pads}, None), "z")
    if op == "Gather":
        channels = draw(st.integers(1, 90))
        any_order = st.lists(st.integers(0, channels - 1), min_size=1, max_size=90)
        groups = draw(st.integers(1, 4))  # of a channel shuffle
        shuffled = [c for g in range(groups) for c in range(g, channels, groups)]
        inverse = [int(i) for i in np.argsort(shuffled)]
        indices = draw(st.one_of(any_order, st.sampled_from([shuffled, inverse])))
        nodes, q, inputs = _unary(draw, op, {"indices": indices}, None, channels=channels)
        return build(nodes, q, inputs, "z")
    q_y = draw(quantizations())
    nodes, q, inputs = _unary(draw, op, {}, q_y, channels=draw(st.integers(1, 150)))
    nodes[1].table = draw(tables(q_y.top, inputs["input"][1]))
    return build(nodes, q, inputs, "z")


@st.composite
def joins(draw):
    """Add, Sub or Mul of two tensors, broadcast or not, or Concat of one to four."""
    op = draw(st.sampled_from(["Add", "Sub", "Mul", "Concat"]))
    q = {"y": draw(quantizations())}
    shape = [draw(st.integers(1, 2)), *(draw(st.integers(1, 9)) for _ in range(3))]
    count = draw(st.integers(1, 4)) if op == "Concat" else 2
    axis = draw(st.integers(1, 3))
    inputs, nodes = {}, []
    for i in range(count):
        own = list(shape)
        if op == "Concat":
            own[axis] = draw(st.integers(1, 9))
        elif draw(st.booleans()):
            own = [size if draw(st.booleans()) else 1 for size in shape]
        inputs[f"input{i}"] = tuple(own)
        # Inputs that share the output's quantization are copied without a table.
        q[f"x{i}"] = draw(st.one_of(st.just(q["y"]), quantizations()))
        nodes.append(Node("QuantizeLinear", f"q{i}", [f"input{i}"], [f"x{i}"]))
    top = q["y"].top
    lo, hi = sorted((draw(st.integers(0, top)), draw(st.integers(0, top))))
    clamp = {"clamp": draw(st.sampled_from([[None, None], [lo, None], [lo, hi]]))}
    attributes = {"axis": axis} if op == "Concat" else clamp
    nodes.append(Node(op, "node", [f"x{i}" for i in range(count)], ["y"], attributes))
    if op != "Concat":
        nodes[-1].activation = draw(activations(q["y"].scale))
    nodes.append(Node("DequantizeLinear", "d", ["y"], ["z"]))
    return build(nodes, q, inputs, "z")


@st.composite
def concatenations(draw):
    """Concats of what Concats and others make of pictures, of which some are read otherwise too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shared = draw(quantizations())
    q = {"x": draw(st.one_of(st.just(shared), quantizations()))}
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"])]
    inputs = {"input": (draw(st.integers(1, 2)), draw(st.integers(1, 9)), 2 * height, 2 * width)}
    channels, halved = {"x": inputs["input"][1]}, []

    def add(op, sources, own, count, attributes, **stored):
        out = f"t{len(nodes)}"
        nodes.append(Node(op, out, list(sources), [out], attributes, **stored))
        q[out], channels[out] = own, count
        return out

    def target():
        return draw(st.one_of(st.just(shared), quantizations()))

    def convolve(x, kernel, stride):
        count = draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
        attributes = {"pads": [kernel // 2] * 4, "strides": [stride] * 2}
        weights = random_weights(rng, (count, kernel, kernel, channels[x]), 4, 0.2, 0)
        out = add("Conv", [x], target(), count, attributes, weights=weights)
        nodes[-1].bias = (rng.standard_normal(count) * q[out].scale * 9).astype(np.float32)
        return out

    def look_up(x):
        own = target()
        table = draw(tables(own.top, channels[x]))
        return add("Lookup", [x], own, channels[x], {}, table=table)

    def take(x, steps):
        first = draw(st.integers(0, channels[x] - 1))
        last, step = draw(st.integers(first, channels[x] - 1)), draw(st.integers(1, 2))
        starts = [first, *(draw(st.integers(0, each - 1)) for each in steps)]
        attributes = {
            "axes": [1, 2, 3], "starts": starts, "ends": [last + 1, 99, 99], "steps": [step, *steps]
        }  # fmt: skip
        return add("Slice", [x], q[x], len(range(first, last + 1, step)), attributes)

    def shrink(x):
        return add("MaxPool", [x], q[x], channels[x], {"kernel_shape": [2, 2], "strides": [2, 2]})

    for _ in range(draw(st.integers(1, 4))):
        halved.append(
            draw(
                st.sampled_from(
                    [lambda: convolve("x", 3, 2), lambda: take("x", [2, 2]), lambda: shrink("x")]
                )
            )()
        )
    for _ in range(draw(st.integers(1, 6))):
        x = draw(st.sampled_from(halved))
        kind = draw(st.sampled_from(["Conv", "Lookup", "Slice", "MaxPool", "Resize", "Concat"]))
        if kind == "Conv":
            out = convolve(x, draw(st.sampled_from([1, 3])), 1)
        elif kind == "Lookup":
            out = look_up(x)
        elif kind == "Slice":
            out = take(x, [1, 1])
        elif kind == "Resize":
            attributes = {"mode": "nearest", "sizes": [height, width]}
            out = add("Resize", [x], q[x], channels[x], attributes)
        elif kind == "MaxPool":
            attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
            out = add("MaxPool", [x], q[x], channels[x], attributes)
        else:
            parts = draw(st.lists(st.sampled_from(halved), min_size=1, max_size=3))
            out = add("Concat", parts, target(), sum(channels[x] for x in parts), {"axis": 1})
        halved.append(out)
    read = {name for each in nodes for name in each.inputs}
    parts = [name for name in halved if name not in read]
    out = add("Concat", parts, target(), sum(channels[x] for x in parts), {"axis": 1})
    if draw(st.booleans()):
        out = convolve(out, draw(st.sampled_from([1, 3])), 1)
    nodes.append(Node("DequantizeLinear", "d", [out], ["z"]))
    return build(nodes, q, inputs, "z")


GRAPHS = {
    "Conv": convolutions(),
    "ConvTranspose": convolutions("ConvTranspose"),
    "pool": pools(),
    "Resize": resizes(),
    "rearrange": rearrangements(),
    "join": joins(),
}


def random_inputs(graph, seed=0):
    """Inputs that reach all codes of the first quantization and beyond, NaN among them."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for node in graph.nodes:
        if node.op == "QuantizeLinear":
            q = graph.quantization[node.outputs[0]]
            info = next(i for i in graph.inputs if i.name == node.inputs[0])
            codes = rng.uniform(-0.1 * q.top, 1.1 * q.top, info.nominal)
            x = ((codes - q.zero_point) * q.scale).astype(np.float32)
            special = rng.random(x.shape) < 0.02
            x[special] = rng.choice([np.nan, np.inf, -np.inf], int(special.sum()))
            inputs[info.name] = x
    return inputs


def with_ending(draw, rng, conv, q, inputs, scale, output):
    """A graph of a convolution of codes "x" with a bias, and, as drawn, what else may be about it.

    That is a residual, outputs in float32, a fused function, a lookup behind it. `output` is the
    convolution's shape, `scale` that of its codes; `q` and `inputs` have those of "x" and "input".
    """
    is_float = draw(st.booleans())
    if not is_float:
        q["y"] = Quantization(scale, draw(st.integers(0, 255)), 8)
        conv.activation = draw(activations(scale, output[1]))
    conv.bias = (rng.standard_normal(output[1]) * scale).astype(np.float32)
    nodes = [Node("QuantizeLinear", "q", ["input"], ["x"])]
    if draw(st.booleans()):
        inputs["other"], q["r"] = output, draw(quantizations())
        nodes.append(Node("QuantizeLinear", "q_r", ["other"], ["r"]))
        conv.inputs.append("r")
    nodes.append(conv)
    if is_float:
        return build(nodes, q, inputs, "y")
    last = "y"
    if draw(st.booleans()):
        q["t"], last = draw(quantizations()), "t"
        nodes.append(Node("Lookup", "lookup", ["y"], ["t"]))
        nodes[-1].table = rng.integers(0, q["t"].top + 1, 256).astype(np.uint8)
    nodes.append(Node("DequantizeLinear", "d", [last], ["z"]))
    return build(nodes, q, inputs, "z")


def assume_small_output_padding(node):
    """Because onnxruntime has it below the stride only."""
    if "output_padding" in node.attributes:
        a = node.attributes
        assume(all(e < s for e, s in zip(a["output_padding"], a["strides"], strict=True)))
