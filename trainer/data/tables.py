"""Parquet files with pictures as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logshift.trainer.data.base import layout_error


def columns(path: Path, *names: str, layout: str) -> list[list[Any]]:
    """Read columns of a Parquet file.

    Parameters
    ----------
    path : Path
    *names : str
        Columns; one with pictures holds bytes, or structures with a field `bytes`.
    layout : str
        What is expected, for errors.

    Returns
    -------
    list of list
        Values of each column.

    Raises
    ------
    DataError
        If the file cannot be read, or a column or a value is missing.
    """
    folder = path.parent
    if not path.is_file():
        raise layout_error(folder, f"no {path.name}", layout)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise layout_error(folder, f"{path.name} cannot be read: {error}", layout) from error
    found = []
    for name in names:
        if name not in table.column_names:
            there = ", ".join(table.column_names)
            raise layout_error(folder, f"{path.name} has no column {name} but {there}", layout)
        values = table[name].to_pylist()
        values = [v.get("bytes") if isinstance(v, dict) else v for v in values]
        if None in values:
            fault = f"{path.name} has no {name} in row {values.index(None)}"
            raise layout_error(folder, fault, layout)
        found.append(values)
    return found
