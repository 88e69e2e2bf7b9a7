"""Convert ONNX models to packed power-of-two networks: `convert(model, out, calibration=...)`."""

from logshift.converter.compare import GroupError, OutputError
from logshift.converter.pipeline import convert
from logshift.converter.report import LayerReport, Report
from logshift.converter.verdict import Verdict
from logshift.kernels.errors import AccuracyWarning, ConversionError, InputError
from logshift.runtime.picture import Preprocessing

__all__ = [
    "AccuracyWarning",
    "ConversionError",
    "GroupError",
    "InputError",
    "LayerReport",
    "OutputError",
    "Preprocessing",
    "Report",
    "Verdict",
    "convert",
]
