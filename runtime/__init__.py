"""Run packed power-of-two networks: `load(path).run(x)`."""

from logshift.kernels.errors import FormatError, InputError, LogshiftError
from logshift.runtime.picture import Preprocessing
from logshift.runtime.session import LayerTime, Session, Summary, load, warmup

__all__ = [
    "FormatError",
    "InputError",
    "LayerTime",
    "LogshiftError",
    "Preprocessing",
    "Session",
    "Summary",
    "load",
    "warmup",
]
