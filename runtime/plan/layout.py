"""Where the fields of a kernel's argument record are, in a flat list of values and in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from struct import Struct
from typing import Any

import numpy as np

from logshift.kernels import records
from logshift.kernels.machine.memory import ALIGNMENT
from logshift.kernels.registry import Kernel

_CODES = {np.dtype(np.uintp): "Q", np.dtype(np.int64): "q", np.dtype(np.float32): "f"}
_TENSOR_FIELDS = {name: index for index, name in enumerate(records.TENSOR.names or ())}


class TensorValues(tuple):
    """Values of a `records.TENSOR`, for hooks that look one up by its name."""

    def __getitem__(self, key: Any) -> Any:
        """Return the value of a field."""
        return super().__getitem__(_TENSOR_FIELDS[key])


class Layout:
    """The fields of one type of records.

    They are packed; those of a tensor follow each other in the order of `records.TENSOR`.

    Attributes
    ----------
    index : dict of field to its place, or its first one, in a list of values
    word : dict of tensor's field to the 8-byte word of the record that is its address
    struct : Struct of all values
    empty : list of values that are all zero
    stride : int
        Bytes from a record to one behind it.
    """

    def __init__(self, record: np.dtype) -> None:
        self.index: dict[str, int] = {}
        self.word: dict[str, int] = {}
        codes = "="
        assert record.names is not None and record.fields is not None
        for name in record.names:
            dtype, offset = record.fields[name][:2]
            self.index[name] = len(codes) - 1
            if dtype == records.TENSOR:
                self.word[name] = offset // 8
            parts = [dtype[part] for part in dtype.names] if dtype.names else [dtype]
            codes += "".join(_CODES[part] for part in parts)
        self.struct = Struct(codes)
        assert self.struct.size == record.itemsize
        self.empty = [0] * (len(codes) - 1)
        self.stride = -(-self.struct.size // ALIGNMENT) * ALIGNMENT

    def filled(self, fields: Mapping[str, Any]) -> list[Any]:
        """Return a list of values with some fields."""
        values = self.empty.copy()
        for key, value in fields.items():
            values[self.index[key]] = value
        return values


@cache
def layout(kernel: Kernel) -> Layout:
    """Return the layout of the records that a kernel reads."""
    return Layout(kernel.record)
