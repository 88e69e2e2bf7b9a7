"""Bit packing for the packed file: fixed-width codes, and the positions of second words.

Bit order is little-endian throughout: value i of width b occupies bits i*b ... i*b + b-1 of the
stream, and bit j of the stream is bit j % 8 of byte j // 8 (`docs/format.md`).
"""

from __future__ import annotations

import numpy as np

from logshift.kernels.errors import InputError


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack a 1-D uint8 array of values below 2**bits, `bits` bits each, into a uint8 array."""
    if values.size and int(values.max()) >> bits:
        raise InputError(f"value {int(values.max())} does not fit {bits} bits")
    planes = (values[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.astype(np.uint8), axis=None, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the first `count` values, uint8, of a stream made by `pack`.

    Raises
    ------
    InputError
        If the stream does not have exactly the size that `count` values take, or has bits set
        beyond the last value.
    """
    if packed.size != packed_size(count, bits):
        raise InputError(
            f"{packed.size} bytes given, {count} values of {bits} bits take"
            f" {packed_size(count, bits)}"
        )
    check_end(packed, bits, count)
    # Eight values fill a row of `bits` bytes.
    rows = np.zeros((-(-count // 8), bits), np.uint8)
    rows.reshape(-1)[: packed.size] = packed
    values = np.empty((len(rows), 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        values[:, i] = rows[:, byte] >> shift
        if shift + bits > 8:
            values[:, i] |= rows[:, byte + 1] << (8 - shift)
    values &= 2**bits - 1
    return values.reshape(-1)[:count]


def check_end(packed: np.ndarray, bits: int, count: int) -> None:
    """Raise InputError if a stream of the right size has bits set beyond the last value."""
    if count * bits % 8 and packed[-1] >> count * bits % 8:
        raise InputError("bits are set beyond the last value")


def tile_positions(mask: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Describe a 1-D bool mask as second-word counts per tile and positions inside their tile.

    Returns
    -------
    counts : uint16 array of shape (ceil(mask.size / tile),)
    positions : uint8 array of shape (mask.sum(),), ascending within each tile
    """
    index = np.flatnonzero(mask)
    tiles = -(-mask.size // tile)
    counts = np.bincount(index // tile, minlength=tiles).astype(np.uint16)
    return counts, (index % tile).astype(np.uint8)


def mask_from_positions(
    counts: np.ndarray, positions: np.ndarray, tile: int, size: int
) -> np.ndarray:
    """Rebuild the mask of `tile_positions`.

    Raises
    ------
    InputError
        If counts and positions disagree, a position lies outside its tile or beyond the last
        weight, or positions within a tile do not ascend.
    """
    tiles = -(-size // tile)
    if counts.size != tiles:
        raise InputError(f"{counts.size} counts for {tiles} tiles")
    if int(counts.sum(dtype=np.int64)) != positions.size:
        raise InputError(
            f"counts add up to {int(counts.sum(dtype=np.int64))}, there are"
            f" {positions.size} positions"
        )
    if positions.size and int(positions.max()) >= tile:
        raise InputError(f"position {int(positions.max())} lies outside a tile of {tile}")
    index = np.repeat(np.arange(tiles, dtype=np.int64), counts) * tile + positions
    if index.size and int(index[-1]) >= size:
        raise InputError("a position lies beyond the last weight")
    if (np.diff(index) <= 0).any():
        raise InputError("positions within a tile do not ascend")
    mask = np.zeros(size, bool)
    mask[index] = True
    return mask
