"""Small ONNX models, inputs for them, and what comes out of their conversion."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import oracle

from logshift import converter, runtime
from logshift.runtime.file import format as packed_format

SHAPE = (2, 4, 8, 8)


class Net:
    """Builds a small ONNX model: each call appends a node and returns its output's name."""

    def __init__(self, shape=("batch", *SHAPE[1:]), opset=18):
        self.rng = np.random.default_rng(3)
        self.opset = opset
        self.inputs = {"x": shape}
        self.nodes, self.initializers = [], []

    def constant(self, value, dtype=np.float32):
        name = f"c{len(self.initializers)}"
        array = np.asarray(value, dtype)
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def random(self, *shape):
        return self.constant(self.rng.standard_normal(shape))

    def node(self, op, *inputs, outputs=1, **attributes):
        index = len(self.nodes)
        names = [f"{op}{index}" if i == 0 else f"{op}{index}_{i}" for i in range(outputs)]
        node = helper.make_node(op, list(inputs), names, name=f"n_{op}{index}", **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def conv(self, x, channels=4, out=4, kernel=3, **attributes):
        attributes.setdefault("pads", [kernel // 2] * 4)
        weight = self.random(out, channels // attributes.get("group", 1), kernel, kernel)
        return self.node("Conv", x, weight, self.random(out), **attributes)

    def model(self, *outputs):
        graph = helper.make_graph(
            self.nodes,
            "net",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in self.inputs.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.initializers,
        )
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def samples(model, count=6, seed=0):
    rng = np.random.default_rng(seed)
    data = {}
    for value in model.graph.input:
        shape = [d.dim_value or 8 for d in value.type.tensor_type.shape.dim]
        data[value.name] = rng.standard_normal((count, *shape[1:])).astype(np.float32)
    return data


def convert(model, path, **settings):
    """Convert with weights as good as can be and return the packed graph as read back."""
    settings = {"weight_bits": 5, "residual_ratio": 1.0} | settings
    converter.convert(model, path, calibration=[samples(model)], **settings)
    return packed_format.read(path)


def reference(model, inputs):
    """What a model says, by name: onnxruntime would round weights between codes to int8."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def operations(graph):
    """Packed operators between QuantizeLinear and DequantizeLinear or Flatten."""
    ends = ("QuantizeLinear", "DequantizeLinear", "Flatten")
    return [node.op for node in graph.nodes if node.op not in ends]


def check(model, path, expected, snr=26.0, count=2):
    """Compare with onnxruntime by signal-to-noise ratio, and the operators with `expected`."""
    graph = convert(model, path)
    assert operations(graph) == expected
    inputs = {name: x[:count] for name, x in samples(model).items()}
    found = oracle.evaluate(graph, inputs)
    run = runtime.Session(graph).trace(inputs)
    for name, y in reference(model, inputs).items():
        assert found[name].shape == run[name].shape == y.shape
        assert found[name].dtype == run[name].dtype == y.dtype
        np.testing.assert_allclose(run[name], found[name], rtol=1e-5, atol=1e-6)
        noise = np.square(found[name] - y).sum() / np.square(y).sum()
        assert noise < 10 ** (-snr / 10), f"{-10 * np.log10(noise):.1f} dB"
    return graph


def network(shape=("batch", 3, 16, 16), width=8, classes=5):
    """Two convolutions with a residual, pooling and a classifier."""
    net = Net(shape=shape)
    x = net.node("Relu", net.conv("x", 3, width))
    x = net.node("Relu", net.node("Add", net.conv(x, width, width), x))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("Gemm", x, net.random(width, classes), net.random(classes)))


def one_called(name, size):
    """A convolution of this name, as is its output."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, size, size))
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4, size - 2, size - 2))
    weight = onnx.numpy_helper.from_array(noise(4, (3, 3, 3)), "w")
    node = helper.make_node("Conv", ["x", "w"], [name], name=name)
    graph = helper.make_graph([node], "net", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def noise(n=32, shape=(3, 16, 16), seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)
