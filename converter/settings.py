"""How a model is to be converted, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

from logshift.kernels import codec
from logshift.kernels.errors import InputError

ACTIVATION_RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Settings:
    """The settings of `convert` that decide about numbers; stored in the packed file."""

    weight_bits: int = 4
    residual_ratio: float = 0.15
    activation_bits: int = 8
    granularity: str = "element"
    tile: int = codec.MAX_TILE
    residual_shift: int = 0
    activation_range: str = "mse"
    bias_correction: bool = True
    error_feedback: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be done, naming the setting."""
        _check_integer("weight_bits", self.weight_bits, codec.MIN_BITS, codec.MAX_BITS)
        if self.activation_bits == 32:
            raise InputError(
                "activation_bits is 32: float activations are not supported yet; use 2 to 8"
            )
        _check_integer("activation_bits", self.activation_bits, 2, 8)
        _check_integer("tile", self.tile, 1, codec.MAX_TILE)
        _check_integer("residual_shift", self.residual_shift, 0, codec.MAX_RESIDUAL_SHIFT)
        if not 0.0 <= self.residual_ratio <= 1.0:
            raise InputError(f"residual_ratio is {self.residual_ratio}; it must be from 0 to 1")
        _check_choice("granularity", self.granularity, codec.GRANULARITIES)
        _check_choice("activation_range", self.activation_range, ACTIVATION_RANGES)


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; it must be an integer from {low} to {high}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
