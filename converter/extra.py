"""Packages of the extras: what needs them says so."""

from __future__ import annotations

import importlib.util

from logshift.kernels.errors import ConversionError


def require(what: str, *packages: str, extra: str = "converter") -> None:
    """Raise `ConversionError` if `what` cannot go on for want of packages; says how to get them."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConversionError(f"{what} needs {', '.join(missing)}: pip install 'logshift[{extra}]'")
