"""Parquet files with pictures as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logshift.trainer.data.base import DataError


def columns(path: Path, *names: str) -> list[list[Any]]:
    """Read columns of a Parquet file.

    Parameters
    ----------
    path : Path
    *names : str
        Columns; one with pictures holds bytes, or structures with a field `bytes`.

    Returns
    -------
    list of list
        Values of each column.

    Raises
    ------
    DataError
        If the file cannot be read or a column is missing.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}") from error
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(table.column_names)}"
        )
    values = [table[name].to_pylist() for name in names]
    return [[v["bytes"] if isinstance(v, dict) else v for v in column] for column in values]
