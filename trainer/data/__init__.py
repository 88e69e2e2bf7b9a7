"""Data sets, all of one interface. Nothing is downloaded; each says what layout it expects."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from logshift.trainer.data.base import DataError, DataSet

__all__ = ["DATA_SETS", "DataError", "DataSet", "open_data"]

# Name -> module and class; imported when used, as Sony needs a package that others do not.
DATA_SETS = {
    "cifar10": "cifar10:Cifar10",
    "cifar100": "cifar100:Cifar100",
    "imagenet": "imagenet:ImageNet",
    "voc": "voc:Voc",
    "camvid": "camvid:CamVid",
    "sony": "sony:Sony",
    "low_light": "low_light:LowLight",
}


def open_data(name: str, root: Path | str, options: dict[str, Any] | None = None) -> DataSet:
    """Open a data set.

    Parameters
    ----------
    name : str
        One of `DATA_SETS`.
    root : Path or str
        Its folder, or its file.
    options : dict, optional
        What its constructor takes besides.

    Raises
    ------
    DataError
        If there is no such data set, it is not at `root`, an option is unknown, or a package that
        it needs is not installed.
    """
    if name not in DATA_SETS:
        raise DataError(f"data set {name!r} is none of {', '.join(DATA_SETS)}")
    module, _, attribute = DATA_SETS[name].partition(":")
    try:
        constructor = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return constructor(Path(root), **(options or {}))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise DataError(
            f"data set {name} needs a package that is not installed: pip install {package}"
        ) from error
    except TypeError as error:
        raise DataError(f"data_options of {name}: {error}") from error
