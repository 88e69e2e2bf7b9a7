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
SIZE_KEY = "manifest_bytes"  # of the metadata: what the manifest inflates to
INDEX_KEY = "index"  # of the manifest

# Of a manifest: JSON in memory takes tens of times the space of its text.
_MAX_MANIFEST = 2**26

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


def pack_manifest(text: str) -> tuple[np.ndarray, int]:
    """Return a manifest as it is stored, and the size of its text."""
    raw = text.encode()
    if len(raw) > _MAX_MANIFEST:
        raise FormatError(f"the manifest has {len(raw)} bytes, {_MAX_MANIFEST} are the most")
    return np.frombuffer(deflate(raw), np.uint8), len(raw)


def unpack_manifest(stored: bytes, size: Any) -> str:
    """Return the text of a manifest that is stored in so few bytes.

    Raises
    ------
    FormatError
    """
    if type(size) is not int or not 0 <= size <= _MAX_MANIFEST:
        raise FormatError(f"{SIZE_KEY!r} is {json.dumps(size)}; it must be from 0 to 2^26")
    try:
        return inflate(stored, size, "the manifest").decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"the manifest is not UTF-8 ({error})") from error
