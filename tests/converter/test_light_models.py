"""The topologies of the package onnx's light models, with random weights, through packed files.

The light models have the nodes of well-known networks, and ConstantOfShape in place of weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="the tests convert models")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from logshift.converter import convert  # noqa: E402
from logshift.runtime import load  # noqa: E402

MODELS = Path(onnx.__file__).parent / "backend/test/data/light"
NAMES = [
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet",
    "squeezenet", "vgg19", "zfnet512",
]  # fmt: skip

pytestmark = pytest.mark.slow


def weight(shape, op, index, rng):
    """Draw a constant that is input number `index` of an operator."""
    if op in ("Conv", "Gemm") and index == 1:
        scaled = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif (op == "BatchNormalization" and index in (1, 4)) or op in ("Mul", "Unsqueeze"):
        scaled = rng.uniform(0.5, 1.5, shape)  # scales and variances
    else:
        scaled = 0.1 * rng.standard_normal(shape)
    return scaled.astype(np.float32)


def randomised(name, rng):
    """Return a light model with weights as He et al. draw them, and its logits as an output."""
    model = onnx.load(MODELS / f"light_{name}.onnx")
    graph = model.graph
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    uses = {}
    for node in graph.node:
        for index, tensor in enumerate(node.input):
            uses.setdefault(tensor, (node.op_type, index))
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == "ConstantOfShape":
            shape, result = sizes[node.input[0]].tolist(), node.output[0]
            values = weight(shape, *uses[result], rng)
            graph.initializer.append(numpy_helper.from_array(values, result))
            graph.input.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, shape))
        else:
            graph.node.append(node)
    last = graph.node[-1]
    if last.op_type == "Softmax":
        shape = [None] * len(graph.output[0].type.tensor_type.shape.dim)
        logits = helper.make_tensor_value_info(last.input[0], TensorProto.FLOAT, shape)
        graph.output.insert(0, logits)
    return model


@pytest.fixture(scope="module", params=NAMES)
def light(request):
    """A model, pictures, and what onnxruntime makes of the first of them."""
    rng = np.random.default_rng(0)
    model, x = randomised(request.param, rng), rng.standard_normal((4, 3, 224, 224), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, {session.get_inputs()[0].name: x[:1]})
    return model, x, expected


def outputs(path, x):
    session = load(path)
    found = session.run(x[:1])
    return list(found.values()) if isinstance(found, dict) else [found]


def test_float32(light, tmp_path):
    model, x, expected = light
    path = tmp_path / "light.stlq"
    convert(model, path, calibration=x, keep_float=["*"])
    for y, z in zip(expected, outputs(path, x), strict=True):
        np.testing.assert_allclose(z, y, atol=1e-3 * np.abs(y).max())


def test_quantized(light, tmp_path):
    model, x, expected = light
    path = tmp_path / "light.stlq"
    convert(model, path, calibration=x, weight_bits=5, residual_ratio=1.0, error_feedback=False)
    logits, found = expected[0], outputs(path, x)[0]
    noise = np.square(found - logits).sum()
    assert 10 * np.log10(np.square(logits).sum() / noise) > 30
