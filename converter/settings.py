"""How a model is to be converted, checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from logshift.converter.encode import GRANULARITIES
from logshift.kernels.errors import InputError
from logshift.kernels.stlq import codec

AUTO = "auto"  # as weight_bits
ACTIVATION_RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Settings:
    """The settings of `convert` that decide about numbers; stored in the packed file."""

    weight_bits: int = 4
    residual_ratio: float = 0.15
    activation_bits: int | Mapping[str, int] = 8
    granularity: str = "element"
    tile: int = codec.MAX_TILE
    residual_shift: int = 0
    activation_range: str = "mse"
    bias_correction: bool = True
    error_feedback: bool = True
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be done, naming the setting."""
        _check_integer("weight_bits", self.weight_bits, codec.MIN_BITS, codec.MAX_BITS)
        if isinstance(self.activation_bits, Mapping):
            for pattern, bits in self.activation_bits.items():
                _check_activation_bits(f"activation_bits[{pattern!r}]", bits)
        else:
            _check_activation_bits("activation_bits", self.activation_bits)
        _check_integer("tile", self.tile, 1, codec.MAX_TILE)
        _check_integer("residual_shift", self.residual_shift, 0, codec.MAX_RESIDUAL_SHIFT)
        if not 0.0 <= self.residual_ratio <= 1.0:
            raise InputError(f"residual_ratio is {self.residual_ratio}; it must be from 0 to 1")
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("activation_range", self.activation_range, ACTIVATION_RANGES)

    def activation_bits_of(self, name: str) -> int:
        """Bits of the activations of the node `name`: those of the first pattern that it fits."""
        if not isinstance(self.activation_bits, Mapping):
            return self.activation_bits
        fits = (bits for p, bits in self.activation_bits.items() if fnmatchcase(name, p))
        return next(fits, _ACTIVATION_BITS)

    def keeps_float(self, name: str) -> bool:
        """Tell whether the node `name` is to stay as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep_float)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse patterns that fit none of the model's nodes."""
        known = list(names)
        given = {"keep_float": self.keep_float}
        if isinstance(self.activation_bits, Mapping):
            given["activation_bits"] = tuple(self.activation_bits)
        for setting, patterns in given.items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise InputError(
                        f"{setting}: no node of the model is called {pattern!r}; there are"
                        f" {', '.join(map(repr, known[:5]))}{' ...' * (len(known) > 5)}"
                    )


@dataclass(frozen=True)
class Target:
    """What weights of `weight_bits="auto"` have to meet: exactly one of these.

    Attributes
    ----------
    max_bytes : int, optional
        Of the packed file.
    max_drop : float, optional
        Points of accuracy.
    min_snr : float, optional
        Signal-to-noise ratio of the outputs, in dB.
    """

    max_bytes: int | None = None
    max_drop: float | None = None
    min_snr: float | None = None

    @classmethod
    def of(
        cls,
        weight_bits: int | str,
        max_bytes: int | None,
        max_drop: float | None,
        min_snr: float | None,
    ) -> Target | None:
        """Return the target of `convert`'s arguments; None if bits are given."""
        given = {"max_bytes": max_bytes, "max_drop": max_drop, "min_snr": min_snr}
        names = [name for name, value in given.items() if value is not None]
        if weight_bits != AUTO:
            if names:
                raise InputError(f"{names[0]} needs weight_bits={AUTO!r}")
            return None
        if len(names) > 1:
            raise InputError(f"{' and '.join(names)}: give one of them")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InputError(f"max_bytes is {max_bytes!r}; it must be an integer, at least 1")
        if max_drop is not None and not 0.0 <= max_drop <= 100.0:
            raise InputError(f"max_drop is {max_drop}; it must be from 0 to 100 points")
        if min_snr is not None and not math.isfinite(min_snr):
            raise InputError(f"min_snr is {min_snr}; it must be a number of dB")
        return cls(max_bytes, max_drop, min_snr) if names else cls(max_drop=_MAX_DROP)

    def is_met(self, measured: float) -> bool:
        """Tell whether outputs are good enough that are off by so many points, or have this SNR."""
        if self.max_drop is not None:
            return measured <= self.max_drop
        assert self.min_snr is not None
        return measured >= self.min_snr

    def __str__(self) -> str:
        """Return the setting that was given."""
        return ", ".join(f"{k} {v}" for k, v in asdict(self).items() if v is not None)


_MAX_DROP = 0.5  # where nothing is said
_ACTIVATION_BITS = 8  # of nodes that no pattern fits


def _check_activation_bits(name: str, value: int) -> None:
    if value != 32:
        _check_integer(name, value, 2, 8, " or 32 (float32)")


def _check_integer(name: str, value: int, low: int, high: int, more: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name} is {value!r}; it must be an integer from {low} to {high}{more}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
