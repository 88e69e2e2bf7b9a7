"""How long converting takes, on all cores and in seconds of each, and the most memory it holds.

    python -m benchmarks.converting --model yolov8n --data imagenet-sample-500.parquet --samples 30

A model is a network of the suite or of a package, "light_detector" (some 100 layers at 800 x 608),
"kernels_of_31" (a depthwise layer of 31 x 31), or an ONNX file of one input. Pictures are scaled to
its size, values from 0 to 1.
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet
from PIL import Image

from benchmarks import machine
from benchmarks.models import PACKAGED, SUITE, Builder, Model
from logshift.converter import AccuracyWarning, convert

_WIDTHS = ((24, 4), (32, 8), (64, 12), (128, 12))  # of a stage, and its blocks


def light_detector(size: int) -> onnx.ModelProto:
    """Depthwise separable blocks with HardSwish, and heads for boxes and scores at three sizes."""
    b = Builder((3, size, size * 19 // 25))
    x, features = b.conv("input", 16, 3, 2), []
    for width, blocks in _WIDTHS:
        for block in range(blocks):
            before, channels = x, b.channels[x]
            x = b.conv(x, channels, 3 + 2 * (block % 2), 1 if block else 2, group=channels)
            x = b.conv(x, width, 1, act=None)
            x = b.op("HardSwish", b.op("Add", before, x) if block else x)
        features.append(x)
    heads = []
    for x in features[1:]:
        x = b.conv(b.conv(x, b.channels[x], 5, group=b.channels[x]), 64, 1)
        heads += [b.conv(x, 4, 1, act=None), b.op("Sigmoid", b.conv(x, 12, 1, act=None))]
    model = b.model(heads[0])
    for head in heads[1:]:
        shape = ["batch", None, None, None]
        model.graph.output.append(onnx.helper.make_tensor_value_info(head, 1, shape))
    return model


def kernels_of_31(size: int) -> onnx.ModelProto:
    """One depthwise layer of large kernels between two others."""
    b = Builder((3, size, size))
    x = b.conv(b.conv("input", 32), 32, 31, group=32)
    return b.model(b.conv(x, 16, 1))


NETWORKS = {
    **SUITE,
    **PACKAGED,
    "light_detector": Model(light_detector, 3, 800, width=608),
    "kernels_of_31": Model(kernels_of_31, 3, 64),
}


def pictures(path: Path, shape: tuple[int, int, int], count: int) -> np.ndarray:
    """Return pictures of a data set, float32 (count, C, H, W)."""
    channels, height, width = shape
    images = pyarrow.parquet.read_table(path)["image"].to_pylist()
    result = np.empty((count, channels, height, width), np.float32)
    for x, raw in zip(result, images[:: max(1, len(images) // count)], strict=False):
        image = Image.open(io.BytesIO(raw)).convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        x[...] = pixels.reshape(height, width, -1).transpose(2, 0, 1) / 255
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.model in NETWORKS:
        network = NETWORKS[arguments.model]
        model, shape = network.build(network.size), network.shape
    else:
        model = onnx.load(arguments.model)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        shape = tuple(dim.dim_value for dim in dims[1:])
    x = pictures(arguments.data, shape, arguments.samples)
    warnings.simplefilter("ignore", AccuracyWarning)
    start, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        report = convert(model, Path(directory) / "net.stlq", calibration=x)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(
        f"{arguments.model}, {arguments.samples} pictures of {' x '.join(map(str, shape[1:]))}:"
        f" {seconds:.1f} s, {used:.1f} s of all cores, peak {peak:.0f} MB,"
        f" {report.file_bytes / report.onnx_bytes:.3f} of the ONNX file"
    )
    print(machine.describe())


if __name__ == "__main__":
    main()
