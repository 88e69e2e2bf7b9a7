"""How a model is to be converted, checked before any work starts.

What is said of a setting is said here, once: the command line makes its options of it, and a test
holds the signature of `convert`, which editors show, to it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from logshift.converter.encode import GRANULARITIES, Tile, tile_of
from logshift.kernels.errors import InputError
from logshift.kernels.stlq import codec

if TYPE_CHECKING:
    from logshift.runtime.session import Session

    # Says how good a session is, or is where labelled pictures are.
    Validate = Callable[[Session], float] | str | os.PathLike[str]

AUTO = "auto"  # chosen by measured effect on the outputs

_MAX_DROP = 0.5  # where nothing is said
_AUTOMATIC = ("residual_ratio", "activation_bits", "activation_range")
_ACTIVATION_BITS = 8  # of nodes that no pattern fits
_OF_CONSTANTS = 0.3


@dataclass(frozen=True)
class Declaration:
    """What is to be said of a setting: everything that checks, shows or asks for it has it of here.

    Attributes
    ----------
    help : str
        On the command line; the docstring of `convert` says more.
    range : (low, high), optional
        Of numbers.
    choices : tuple of str, optional
    flags : tuple of str
        Names on the command line, if others than the setting's own.
    metavar, shown_default : str, optional
        On the command line.
    kind : type
        What the command line asks for, if another type than the setting's.
    """

    help: str
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    shown_default: str | bool = True
    kind: Any = None

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is out of range, or no choice, naming the setting."""
        if value is None or (value == AUTO and name in _AUTOMATIC):
            return
        if self.choices is not None and value not in self.choices:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(self.choices)}")
        if self.range is not None:
            low, high = self.range
            if type(low) is int:
                _check_integer(name, value, low, int(high))
            elif not isinstance(value, (int, float)) or not low <= value <= high:
                more = f" or {AUTO!r}" if name in _AUTOMATIC else ""
                raise InputError(f"{name} is {value}; it must be from {low:g} to {high:g}{more}")


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"declaration": Declaration(help, **more)})


@dataclass(frozen=True)
class Settings:
    """The settings of `convert` that decide about numbers; stored in the packed file."""

    weight_bits: int = _setting(
        4,
        "Bits of a weight word, 2 to 5; or 'auto': for every layer what is best.",
        range=(codec.MIN_BITS, codec.MAX_BITS),
        flags=("--bits", "--weight-bits"),
        metavar="N|auto",
        shown_default="4, or auto with one of --max-bytes, --max-drop, --min-snr, --validate",
        kind=str,
    )
    residual_ratio: float | str = _setting(
        AUTO,
        "Share of weights that get a second word, 0 to 1; or 'auto': as many as the outputs need.",
        range=(0.0, 1.0),
        metavar="X|auto",
        kind=str,
    )
    activation_bits: int | str | Mapping[str, int | str] = _setting(
        AUTO,
        "Bits of activations, 2 to 8; 32 quantizes weights alone; 'auto': 8, float32 for those that"
        " need it, and 6 where that is faster and costs nothing. NAME=N is for nodes, by names or"
        " patterns; may be given several times, and the first that fits counts.",
        metavar="N|auto|NAME=N",
        shown_default=AUTO,
        kind=list[str],
    )
    granularity: str = _setting(
        "element",
        "What gets second words: weights, tiles or whole filters.",
        choices=GRANULARITIES,
    )
    tile: Tile | None = _setting(
        None,
        "Tiles of --granularity tile: input by output channels at one kernel position; or N"
        " consecutive weights, 1 to 256.",
        metavar="TnxTm|N",
        shown_default="16x16",
        kind=str,
    )
    residual_shift: int = _setting(
        0,
        "Second words on a grid 2^N times finer, 0 to 4.",
        range=(0, codec.MAX_RESIDUAL_SHIFT),
    )
    activation_range: str = _setting(
        AUTO,
        "How activation ranges are chosen.",
        choices=(AUTO, "mse", "minmax", "percentile"),
    )
    percentile: float = _setting(
        99.99,
        "With --activation-range percentile: of the values at each end, codes cover all up to this"
        " one, 50 to 100.",
        range=(50.0, 100.0),
    )
    bias_correction: bool = _setting(
        True, "Let biases make up for the mean error of quantized layers."
    )
    error_feedback: bool = _setting(
        True, "Let weights make up for the rounding of those before them."
    )
    prefer: str | None = _setting(
        None,
        "What 'auto' is to spend least of: time, bytes, or accuracy.",
        choices=("speed", "size", "accuracy"),
        shown_default="a balance",
    )
    keep_float: tuple[str, ...] = _setting(
        (),
        "An ONNX node, or a pattern of names like 'head/*', that is not quantized at all; may be"
        " given several times.",
        metavar="NAME",
        shown_default="none",
        kind=list[str],
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be done, naming the setting."""
        for name, declaration in declared(Settings).items():
            declaration.check(name, getattr(self, name))
        object.__setattr__(self, "tile", tile_of(self.granularity, self.tile))
        if isinstance(self.activation_bits, Mapping):
            for pattern, bits in self.activation_bits.items():
                _check_activation_bits(f"activation_bits[{pattern!r}]", bits)
        else:
            _check_activation_bits("activation_bits", self.activation_bits)

    def activation_bits_of(self, name: str) -> int | str:
        """Bits of the activations of the node `name`: those of the first pattern that it fits."""
        if not isinstance(self.activation_bits, Mapping):
            return self.activation_bits
        fits = (bits for p, bits in self.activation_bits.items() if fnmatchcase(name, p))
        return next(fits, _ACTIVATION_BITS)

    def code_bits_of(self, name: str) -> int:
        """Bits of the codes of the node `name`; of float32, those for neighbours that want some."""
        bits = self.activation_bits_of(name)
        return bits if isinstance(bits, int) and bits < 32 else _ACTIVATION_BITS

    @property
    def chooses_precision(self) -> bool:
        """Whether bits or ranges of activations are to be chosen by their effect."""
        bits = self.activation_bits
        given = bits.values() if isinstance(bits, Mapping) else (bits,)
        return AUTO in given or self.activation_range == AUTO

    @property
    def ratio_of_constants(self) -> float:
        """`residual_ratio` of constants of ONNX operators, whose errors are not measured."""
        ratio = self.residual_ratio
        return _OF_CONSTANTS if isinstance(ratio, str) else float(ratio)

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
    """What a network whose weights or second words are searched has to meet: one of these.

    Attributes
    ----------
    max_bytes : int, optional
        Of the packed file.
    max_drop : float, optional
        Points of accuracy; with `validate`, in the unit of the score.
    min_snr : float, optional
        Signal-to-noise ratio of the outputs, in dB.
    """

    max_bytes: int | None = _setting(None, "The best file of at most this size.")
    max_drop: float | None = _setting(
        None,
        "The smallest file that costs at most so many points of accuracy: measured with --validate,"
        " else bounded with 95 % confidence on samples that do not calibrate.",
        shown_default=f"{_MAX_DROP} with --bits auto or --validate",
    )
    min_snr: float | None = _setting(
        None,
        "The smallest file whose outputs have this signal-to-noise ratio in dB; for networks that"
        " do not classify.",
    )

    @classmethod
    def of(
        cls,
        weight_bits: int | str | None,
        max_bytes: int | None,
        max_drop: float | None,
        min_snr: float | None,
        validate: Validate | None = None,
    ) -> Target | None:
        """Return the target of `convert`'s arguments; None if nothing is to be searched."""
        given = {"max_bytes": max_bytes, "max_drop": max_drop, "min_snr": min_snr}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(f"{' and '.join(names)}: give one of them")
        if validate is not None:
            _check_validate(validate, max_drop, names)
        elif not names and weight_bits != AUTO:
            return None
        elif weight_bits not in (None, AUTO):
            raise InputError(f"{names[0]} needs weight_bits={AUTO!r}, or validate")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InputError(f"max_bytes is {max_bytes!r}; it must be an integer, at least 1")
        if max_drop is not None:
            most, unit = (math.inf, "") if callable(validate) else (100.0, " points")
            if not 0.0 <= max_drop <= most or math.isinf(max_drop):
                limits = f"from 0 to {most:g}" if unit else "a number, at least 0"
                raise InputError(f"max_drop is {max_drop}; it must be {limits}{unit}")
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


def declared(kind: type[Settings] | type[Target]) -> dict[str, Declaration]:
    """Return what is declared of each setting, in order."""
    return {f.name: f.metadata["declaration"] for f in fields(kind)}


def _check_validate(validate: Any, max_drop: float | None, targets: list[str]) -> None:
    if not callable(validate) and not isinstance(validate, (str, os.PathLike)):
        raise InputError(
            f"validate is {type(validate).__name__}; give a function of a session that returns a"
            " score, a folder with a folder of pictures for each class, or a file with a picture"
            " and its class on each line"
        )
    if others := [name for name in targets if name != "max_drop"]:
        raise InputError(f"validate goes with max_drop, not with {others[0]}")
    if callable(validate) and max_drop is None:
        raise InputError("validate needs max_drop: by how much the score may fall, in its own unit")


def _check_activation_bits(name: str, value: int | str) -> None:
    if value not in (32, AUTO):
        _check_integer(name, value, 2, 8, f", 32 (float32) or {AUTO!r}")


def _check_integer(name: str, value: Any, low: int, high: int, more: str = "") -> None:
    if type(value) is not int or not low <= float(value) <= high:
        raise InputError(f"{name} is {value!r}; it must be an integer from {low} to {high}{more}")
