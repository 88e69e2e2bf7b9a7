"""Run packed power-of-two networks: `load(path).run(x)`."""

from logshift.kernels.errors import CacheWarning, FormatError, InputError, LogshiftError
from logshift.runtime.picture import Preprocessing
from logshift.runtime.session import LayerTime, Session, Summary, load
from logshift.runtime.warm import Warmed, warmup

__all__ = [
    "CacheWarning",
    "FormatError",
    "InputError",
    "LayerTime",
    "LogshiftError",
    "Preprocessing",
    "Session",
    "Summary",
    "Warmed",
    "load",
    "warmup",
]
