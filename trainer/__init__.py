"""Train networks with power-of-two weights: quantizers, recipes, export to ONNX."""

from logshift.trainer.config import Config, LayerConfig
from logshift.trainer.export import export_onnx
from logshift.trainer.quantize import PrepareError, calibrate, prepare, refresh, regulariser

__all__ = [
    "Config",
    "LayerConfig",
    "PrepareError",
    "calibrate",
    "export_onnx",
    "prepare",
    "refresh",
    "regulariser",
]
