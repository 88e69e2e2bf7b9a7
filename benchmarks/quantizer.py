"""onnxruntime's own static quantization: the int8 that others run, and its int4."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = ("MinMax", "Entropy", "Percentile")
_TYPES = {4: QuantType.QInt4, 8: QuantType.QInt8}
_AT_ONCE = 32  # pictures whose tensors a calibrator holds, at most


class _Reader(CalibrationDataReader):
    """Calibration pictures, one at a time."""

    def __init__(self, name: str, pictures: np.ndarray) -> None:
        self.name, self.pictures = name, pictures
        self.set_range(0, len(pictures))

    def __len__(self) -> int:
        return len(self.pictures)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.pictures[start_index:end_index, None])

    def get_next(self) -> dict[str, np.ndarray] | None:
        picture = next(self.left, None)
        return None if picture is None else {self.name: picture}


def quantized(
    network: onnx.ModelProto, pictures: np.ndarray, bits: int = 8, method: str = METHODS[0]
) -> onnx.ModelProto:
    """Quantize as onnxruntime does: QDQ, static, uint8 activations, weights per channel.

    Parameters
    ----------
    network : onnx.ModelProto
        With one input.
    pictures : float32 array (N, C, H, W), for calibration
    bits : {8, 4}
    method : str
        How ranges of activations are chosen, one of `METHODS`.
    """
    count = len(pictures)
    stride = max(n for n in range(1, _AT_ONCE + 1) if count % n == 0)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        original = Path(folder) / "network.onnx"
        onnx.save(network, original)
        quant_pre_process(original, source, skip_symbolic_shape=True)
        quantize_static(
            source, target, _Reader(network.graph.input[0].name, pictures),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=_TYPES[bits],
            calibrate_method=CalibrationMethod[method],
            extra_options={"CalibStridedMinMax": stride},
        )  # fmt: skip
        return onnx.load(target)
