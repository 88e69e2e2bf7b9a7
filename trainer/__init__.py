"""Train networks with power-of-two weights: quantizers, recipes, export to ONNX."""

from logshift.trainer.config import Config, LayerConfig
from logshift.trainer.export import export_onnx
from logshift.trainer.fit import fading_rate, parameter_groups
from logshift.trainer.quantize import (
    PrepareError,
    calibrate,
    cut,
    fade,
    prepare,
    refresh,
    regulariser,
)

__all__ = [
    "Config",
    "LayerConfig",
    "PrepareError",
    "calibrate",
    "cut",
    "export_onnx",
    "fade",
    "fading_rate",
    "parameter_groups",
    "prepare",
    "refresh",
    "regulariser",
]
