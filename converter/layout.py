"""Weights of convolutions: ONNX's layout and the packed one, (O, kh, kw, C / group)."""

from __future__ import annotations

import numpy as np


def packed_weight(op: str, weight: np.ndarray, group: int) -> np.ndarray:
    """From ONNX's layout, (O, C / group, kh, kw) or transposed (C, O / group, kh, kw)."""
    if op == "ConvTranspose":
        channels, per_group, kh, kw = weight.shape
        grouped = weight.reshape(group, channels // group, per_group, kh, kw)
        weight = grouped.transpose(0, 2, 1, 3, 4).reshape(
            group * per_group, channels // group, kh, kw
        )
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))


def onnx_weight(op: str, weight: np.ndarray, group: int) -> np.ndarray:
    """To ONNX's layout; see `packed_weight`."""
    weight = weight.transpose(0, 3, 1, 2)
    if op == "ConvTranspose":
        o, in_group, kh, kw = weight.shape
        grouped = weight.reshape(group, o // group, in_group, kh, kw).transpose(0, 2, 1, 3, 4)
        weight = grouped.reshape(group * in_group, o // group, kh, kw)
    return np.ascontiguousarray(weight)
