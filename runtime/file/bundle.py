"""All tensors of a file in one, with an index: what files of version 4 are made of.

A safetensors header spends about 70 bytes on a tensor and cannot let two names share one. An index
in the deflated manifest spends a tenth of that, and tensors of equal content lie there once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from logshift.kernels.errors import FormatError
from logshift.runtime.file.deflate import deflate, inflate
from logshift.runtime.graph import DTYPES, MAX_ELEMENTS, MAX_RANK

MANIFEST, DATA = "manifest", "data"  # the two tensors of a bundled file
# Of the metadata: what the manifest inflates to, and the data, if they are deflated.
MANIFEST_SIZE, DATA_SIZE = "manifest_bytes", "data_bytes"
INDEX_KEY = "index"  # of the manifest

# Of a manifest: JSON in memory takes tens of times the space of its text.
_MAX_MANIFEST = 2**26

_LEAST_SHARE = 1 / 16  # that data must shrink by to be deflated: most are streams that are already

# Where each tensor lies: dtype, first byte, shape.
Index = dict[str, list[Any]]


def bundle(tensors: Mapping[str, np.ndarray]) -> tuple[Index, np.ndarray]:
    """Return the index of tensors and the bytes of all of them."""
    places: dict[tuple[str, bytes], int] = {}
    parts: list[bytes] = []
    index: Index = {}
    end = 0
    # In this order all of them are aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        array = tensors[name]
        content = array.dtype.name, array.tobytes()
        if content not in places:
            places[content] = end
            parts.append(content[1])
            end += len(content[1])
        index[name] = [content[0], places[content], list(array.shape)]
    return index, np.frombuffer(b"".join(parts), np.uint8)


def ranges(index: Any, size: int) -> dict[str, tuple[int, int]]:
    """Return the first byte of each tensor and the one behind it.

    Raises
    ------
    FormatError
        Unless they lie side by side, from the first of `size` bytes to the last, or are the same.
    """
    if not isinstance(index, dict):
        raise FormatError(f"the manifest's {INDEX_KEY!r} must be an object")
    found = {name: _range(name, record) for name, record in index.items()}
    last = 0
    for begin, end in sorted(set(found.values())):
        if begin != last:
            raise FormatError(f"tensors of the index overlap or leave gaps at byte {last}")
        last = end
    if last != size:
        raise FormatError(f"tensors of the index end at byte {last} of {size}")
    return found


def _range(name: str, record: Any) -> tuple[int, int]:
    if not (isinstance(record, list) and len(record) == 3 and isinstance(record[2], list)):
        raise FormatError(f"tensor {name!r}: the index must have its dtype, first byte and shape")
    dtype, begin, shape = record
    if dtype not in DTYPES or len(shape) > MAX_RANK:
        raise FormatError(f"tensor {name!r} is {dtype} of rank {len(shape)}")
    if not all(type(value) is int and value >= 0 for value in (begin, *shape)):
        raise FormatError(f"tensor {name!r}: the index must hold positions and sizes")
    # Python integers: no product of claimed sizes can overflow before it is judged.
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise FormatError(f"tensor {name!r} of shape {shape} is too large")
    itemsize = np.dtype(dtype).itemsize
    if begin % itemsize:
        raise FormatError(f"tensor {name!r} is not aligned")
    return begin, begin + itemsize * math.prod(shape)


def unbundle(index: Any, data: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of an index; those that lie in one place are one array.

    Raises
    ------
    FormatError
    """
    arrays: dict[tuple[str, int, int, tuple[int, ...]], np.ndarray] = {}
    result = {}
    for name, (begin, end) in ranges(index, data.size).items():
        dtype, _, shape = index[name]
        key = dtype, begin, end, tuple(shape)
        if key not in arrays:
            array = data[begin:end].view(dtype).reshape(shape)
            arrays[key] = np.require(array, requirements="A")
        result[name] = arrays[key]
    return result


def pack(text: str, data: np.ndarray) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Return what the metadata say of a manifest and of the data, and the tensors of the file.

    Raises
    ------
    FormatError
        If the manifest is larger than readers accept.
    """
    raw = text.encode()
    if len(raw) > _MAX_MANIFEST:
        raise FormatError(f"the manifest has {len(raw)} bytes, {_MAX_MANIFEST} are the most")
    sizes = {MANIFEST_SIZE: len(raw)}
    smaller = deflate(data.tobytes())
    if len(smaller) <= (1 - _LEAST_SHARE) * data.size:
        sizes[DATA_SIZE], data = data.size, np.frombuffer(smaller, np.uint8)
    return sizes, {MANIFEST: np.frombuffer(deflate(raw), np.uint8), DATA: data}


def unpack_manifest(stored: bytes, sizes: dict[str, Any]) -> str:
    """Return the text of a manifest that is stored in these bytes.

    Parameters
    ----------
    stored : bytes
    sizes : dict
        What the metadata say.

    Raises
    ------
    FormatError
    """
    size = sizes.get(MANIFEST_SIZE)
    if type(size) is not int or not 0 <= size <= _MAX_MANIFEST:
        raise FormatError(f"{MANIFEST_SIZE!r} is {json.dumps(size)}; it must be from 0 to 2^26")
    try:
        return inflate(stored, size, "the manifest").decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"the manifest is not UTF-8 ({error})") from error


def unpack_data(stored: np.ndarray, sizes: dict[str, Any]) -> np.ndarray:
    """Return the data that are stored in these bytes; see `unpack_manifest`."""
    if DATA_SIZE not in sizes:
        return stored
    size = sizes[DATA_SIZE]
    if type(size) is not int or size < 0:
        raise FormatError(f"{DATA_SIZE!r} is {json.dumps(size)}; it must be a size")
    return np.frombuffer(inflate(stored.tobytes(), size, "the data"), np.uint8)
