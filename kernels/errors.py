"""The error types of logshift; all derive from `LogshiftError`."""


class LogshiftError(Exception):
    """Base of all errors that logshift raises on purpose."""


class InputError(LogshiftError, ValueError):
    """An argument (array, setting, picture) does not fit what is asked of it."""


class FormatError(LogshiftError, ValueError):
    """A packed file is damaged, of another version, or breaks a rule of `docs/format.md`."""


class ConversionError(LogshiftError):
    """A model cannot be converted as asked; the message says what would make it convertible."""


class CacheWarning(RuntimeWarning):
    """Compiled kernels can be kept nowhere; see `docs/deployment.md`."""


class AccuracyWarning(UserWarning):
    """A packed network does not do what its float model does; the message says where, and why."""
