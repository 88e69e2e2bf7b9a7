"""`verify` reads a model as `convert` does: what the one mends or is told, the other knows."""

import random

import numpy as np
import onnx
import pytest
from support.onnx_nets import Net

from logshift import converter
from logshift.converter.verify import verify
from logshift.kernels.errors import ConversionError

SHAPE = (1, 4, 16, 12)
FREE = {"x": (None, 4, None, None)}
CASES = (
    "declared-output-shape-is-wrong", "dynamic-quantization", "fixed-shape", "float16-unsorted",
    "if-on-the-batch", "qoperator",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def network(shape=SHAPE):
    net = Net(shape)
    return net.model(net.conv(net.node("Relu", net.conv("x"))))


def feed_of(*shape):
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def check(model, path, feed=None, calibration=None, **settings):
    calibration = feed_of(*SHAPE) if calibration is None else calibration
    converter.convert(model, path, calibration=[calibration], weight_bits=5, **settings)
    found = verify(model, path, [calibration if feed is None else feed])
    assert found.tensors[-1].name == found.output and found.tensors[-1].snr_db > 20
    return found


def test_freed_sizes(path):
    found = check(network(), path, feed_of(2, 4, 24, 8), input_shapes=FREE)
    assert found.samples == 2 and len(found.tensors) >= 2


def test_fixed_sizes(path):
    shape = ("n", 4, "h", "w")
    check(network(shape), path, feed_of(1, 4, 16, 16), input_shapes={"x": (1, 4, 16, "w")})


def test_free_sizes_without_a_name(path):
    model = network(("n", 4, "h", "w"))
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        if dim.dim_param:
            dim.Clear()
    check(model, path, feed_of(3, 4, 10, 18))


@pytest.mark.parametrize("kind", ["type", "rank", "size"])
def test_what_is_declared_wrongly(path, kind):
    model = network()
    (value,) = model.graph.output
    tensor = value.type.tensor_type
    if kind == "type":
        tensor.elem_type = onnx.TensorProto.INT64
    else:
        sizes = (1, 4) if kind == "rank" else (1, 9, 9, 9)
        made = onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, sizes)
        value.CopyFrom(made)
    check(model, path)


def test_nodes_out_of_order(path):
    model = network()
    nodes = list(model.graph.node)
    random.Random(0).shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    check(model, path)


@pytest.mark.parametrize("shape", [(1, 3, 16, 12), (1, 4, 16)])
def test_inputs_of_another_model(path, shape):
    converter.convert(network(), path, calibration=[feed_of(*SHAPE)])
    other = Net(shape)
    with pytest.raises(ConversionError):
        verify(other.model(other.node("Relu", "x")), path, [feed_of(*SHAPE)])


@pytest.mark.parametrize("case", CASES)
def test_files_as_people_have_them(shared, path, case):
    kept = np.load(shared / f"cases/{case}.npz")
    feed = {name: kept[name] for name in kept.files if not name.startswith("out_")}
    model = shared / f"cases/{case}.onnx"
    check(model, path, calibration=feed)
    if case == "fixed-shape":
        twice = {name: np.concatenate([x, x]) for name, x in feed.items()}
        check(model, path, twice, feed, input_shapes=FREE | {"x": (None, *feed["x"].shape[1:])})
