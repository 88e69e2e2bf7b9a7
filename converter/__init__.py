"""Convert ONNX models to packed power-of-two networks: `convert(model, out, calibration=...)`."""

from logshift.converter.pipeline import convert
from logshift.converter.report import LayerReport, Report
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.picture import Preprocessing

__all__ = [
    "ConversionError",
    "InputError",
    "LayerReport",
    "Preprocessing",
    "Report",
    "convert",
]
