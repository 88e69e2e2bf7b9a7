"""Accuracy with uniform weights: what onnxruntime's own quantizer makes of the same network.

    python -m benchmarks.uniform --model resnet20-cifar10.onnx --data DIRECTORY
    python -m benchmarks.uniform --model efficientnet_lite0 --data imagenet-sample-500.parquet

Static quantization (`quantize_static`, QDQ) to int8 and int4 weights, per channel, uint8
activations, each of its ways to calibrate; and weights rounded plainly, symmetrically, per channel,
to the scale of the smallest squared error, with the same activations. The models run with their
QuantizeLinear and DequantizeLinear nodes as they are and convolutions in float32: so int4, for
which onnxruntime has no convolution, runs like int8, and int8 does not suffer from 16-bit sums that
saturate in onnxruntime's kernels for AVX2. What these make of int8 is printed besides.

Model and data are those of `benchmarks.accuracy`.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks import accuracy
from benchmarks.accuracy import Data
from benchmarks.quantizer import METHODS, quantized
from logshift.kernels.stlq.bitpack import pack

CALIBRATION = 512
PLAIN_BITS = (3, 4, 8)
_FRACTIONS = np.linspace(0.2, 1.0, 81)  # of the scale that reaches the largest weight
_SUFFIX = "_quantized"  # of the initializer that onnxruntime makes of one


def _weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, np.ndarray]]:
    """Yield the DequantizeLinear nodes of weights, and their codes with output channels first."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes = numpy_helper.to_array(constants[node.input[0]])
            if codes.ndim > 1:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                yield node, np.moveaxis(codes, axis, 0).astype(np.int8)


def bits_per_weight(codes: list[np.ndarray], bits: int) -> tuple[float, float]:
    """Return bits per weight, with 32 for scale and bias each of a channel: packed, and deflated.

    codes : int8 arrays, output channels first
    """
    weights = sum(layer.size for layer in codes)
    channels = 64 * sum(len(layer) for layer in codes)
    packed = [pack(layer.ravel().view(np.uint8) & (2**bits - 1), bits) for layer in codes]
    sizes = [(len(p), min(_deflated(p.tobytes()), len(p))) for p in packed]
    plain, deflated = (8 * sum(column) for column in zip(*sizes, strict=True))
    return (plain + channels) / weights, (deflated + channels) / weights


def _deflated(raw: bytes) -> int:
    """Bytes of what the packed file would make of `raw`."""

    def size(strategy: int) -> int:
        compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
        return len(compressor.compress(raw) + compressor.flush())

    return min(size(zlib.Z_HUFFMAN_ONLY), size(zlib.Z_DEFAULT_STRATEGY))


def rounded(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to the scale per output channel that leaves the smallest squared error.

    weight : float32 array (O, ...)

    Returns codes, int8, within ±(2^(bits - 1) - 1), and the weights that they stand for.
    """
    top = 2 ** (bits - 1) - 1
    matrix = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    largest[largest == 0] = 1
    best, codes = np.full(len(matrix), np.inf), np.zeros(matrix.shape)
    values = np.zeros(matrix.shape)
    for fraction in _FRACTIONS:
        scale = fraction * largest / top
        candidate = np.clip(np.rint(matrix / scale), -top, top)
        error = np.square(candidate * scale - matrix).sum(axis=1)
        better = error < best
        best[better] = error[better]
        codes[better], values[better] = candidate[better], (candidate * scale)[better]
    return codes.astype(np.int8).reshape(weight.shape), values.astype(np.float32).reshape(
        weight.shape
    )


def plain(
    network: onnx.ModelProto, activations: onnx.ModelProto, data: Data, bits: int
) -> tuple[float, float, float]:
    """Round the weights of `network`; its activations are quantized as those of a QDQ model.

    Returns bits per weight, packed and deflated, and the accuracy.
    """
    model = onnx.ModelProto()
    model.CopyFrom(activations)
    exact = {t.name: numpy_helper.to_array(t) for t in network.graph.initializer}
    layers: list[np.ndarray] = []
    unused: set[str] = set()
    for node, codes in list(_weights(model)):
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        weight = np.moveaxis(exact[node.input[0].removesuffix(_SUFFIX)], axis, 0)
        assert weight.shape == codes.shape
        layer, values = rounded(weight, bits)
        layers.append(layer)
        values = np.ascontiguousarray(np.moveaxis(values, 0, axis))
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
        unused |= set(node.input)
    for tensor in [t for t in model.graph.initializer if t.name in unused]:
        model.graph.initializer.remove(tensor)
    return *bits_per_weight(layers, bits), accuracy.onnx_top1(model, data)


def main() -> None:
    """Print a row per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    network = accuracy.network(arguments.model)
    data = accuracy.load(arguments.data, arguments.calibration)
    print(f"float32: top-1 {accuracy.onnx_top1(network, data):.2f}")
    for bits in (4, 8):
        for method in METHODS:
            model = quantized(network, data.calibration, bits, method)
            packed, deflated = bits_per_weight([codes for _, codes in _weights(model)], bits)
            line = f"onnxruntime int{bits}, {method}: top-1 {accuracy.onnx_top1(model, data):.2f}"
            if bits == 8:
                line += f" ({accuracy.onnx_top1(model, data, exact=False):.2f} in its int8 kernels)"
            print(f"{line}, {packed:.2f} bits per weight, deflated {deflated:.2f}", flush=True)
    activations = quantized(network, data.calibration)
    for bits in PLAIN_BITS:
        packed, deflated, result = plain(network, activations, data, bits)
        print(
            f"rounded to {bits} bits: top-1 {result:.2f}, {packed:.2f} bits per weight, deflated"
            f" {deflated:.2f}"
        )


if __name__ == "__main__":
    main()
