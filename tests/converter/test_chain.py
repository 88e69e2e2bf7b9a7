"""The whole chain on real input: ONNX file, converter, packed file, runtime."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from support import oracle

from logshift import converter, runtime
from logshift.runtime import Preprocessing
from logshift.runtime.file import format as packed_format

PICTURES = 112


def cifar10(path, count):
    """Pictures (N, 32, 32, 3) uint8 and labels."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path).slice(0, count)
    pictures = [Image.open(io.BytesIO(b)).convert("RGB") for b in table["image"].to_pylist()]
    return np.stack([np.asarray(p) for p in pictures]), table["label"].to_numpy()


@pytest.fixture(scope="module")
def packed_resnet20(shared, tmp_path_factory):
    """ResNet-20 at 4 bits + 15 %, and its conversion report."""
    path = tmp_path_factory.mktemp("chain") / "resnet20.stlq"
    pictures, _ = cifar10(shared / "data/cifar10-train.parquet", 128)
    report = converter.convert(
        shared / "models/resnet20-cifar10.onnx", path,
        calibration=pictures, preprocessing=Preprocessing(), residual_ratio=0.15,
    )  # fmt: skip
    return path, report


@pytest.fixture(scope="module")
def expected_tensors(shared, packed_resnet20):
    """Prepared test pictures and the NumPy int64 evaluation of the packed graph on them."""
    pictures, _ = cifar10(shared / "data/cifar10-test.parquet", PICTURES)
    x = np.stack([Preprocessing().apply(p, (32, 32)) for p in pictures])
    graph = packed_format.read(packed_resnet20[0])
    return x, oracle.evaluate(graph, {graph.inputs[0].name: x})


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("kernels", "count"),
    [
        ("auto", PICTURES),
        ("reference", 16),
        pytest.param("reference", PICTURES, marks=pytest.mark.slow),
    ],
)
def test_every_code_equals_numpy(packed_resnet20, expected_tensors, kernels, count, threads, batch):
    x, expected = expected_tensors
    x = x[:count]
    session = runtime.load(packed_resnet20[0], threads=threads, kernels=kernels)
    for i in range(0, len(x), batch):
        tensors = session.trace_codes(x[i : i + batch])
        for name in session.graph.quantization:
            assert tensors[name].tobytes() == expected[name][i : i + batch].tobytes(), name
        logits = session.run(x[i : i + batch])
        assert np.array_equal(logits, expected[session.outputs[0].name][i : i + batch])


def test_packed_file_is_a_sixth_of_the_onnx_file(shared, packed_resnet20):
    onnx_size = (shared / "models/resnet20-cifar10.onnx").stat().st_size
    assert packed_resnet20[0].stat().st_size <= onnx_size / 6


def test_packed_network_agrees_with_onnxruntime(shared, packed_resnet20):
    onnxruntime = pytest.importorskip("onnxruntime")
    pictures, labels = cifar10(shared / "data/cifar10-test.parquet", 1000)
    x = np.stack([Preprocessing().apply(p, (32, 32)) for p in pictures])
    peer = onnxruntime.InferenceSession(shared / "models/resnet20-cifar10.onnx")
    theirs = peer.run(None, {peer.get_inputs()[0].name: x})[0].argmax(axis=1)
    ours = runtime.load(packed_resnet20[0]).run(list(pictures)).argmax(axis=1)
    assert (ours == theirs).mean() > 0.9
    assert (ours == labels).mean() > (theirs == labels).mean() - 0.03
