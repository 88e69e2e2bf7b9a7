"""The fma family: convolutions on float32, on the machine's fused multiply-add.

There is no im2col: a microkernel (`float_tiles`) reads what a row of taps covers where it lies, and
writes outputs where they belong. What decides how fast that is, is which weights lie in which cache:
pixels are taken in *panels*, of which every *chunk* of weights serves one after another; a chunk
whose weights are too many for the first-level cache does so in *parts*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numba import carray, njit

from logshift.kernels import abi, float_tiles
from logshift.kernels.abi import register, share
from logshift.kernels.dot import address_of
from logshift.kernels.float_tiles import FLOAT_SEGMENT, FLOAT_TILE, FLOAT_TILES, FloatTile
from logshift.kernels.layer import FloatLayer, Packed, reading_offsets
from logshift.kernels.memory import aligned
from logshift.kernels.native import as_pointer, call_tile

# Blocks of channels that one call of a microkernel takes: the first one, how many, and the first
# input and output channel.
CHUNK = np.dtype([(n, np.int64) for n in ("block", "blocks", "x0", "o0")])
# Segments of a part, their first and end, and bytes of a block's weights that come before it.
PART = np.dtype([(n, np.int64) for n in ("segment", "segments_end", "weights")])

# Bytes of weights in a chunk, or in a part of one: they stay in the first-level cache while the
# pixels of a panel go by.
_CHUNK_WEIGHTS = 16384
# Bytes of inputs of a panel: they stay in the second-level cache while chunks go by.
_PANEL_INPUTS = 2**17
_PANEL = 64  # most strips of a panel


@dataclass(frozen=True, eq=False)
class _PackedTiles(Packed):
    """`places`, int64 (segments, 3): kernel row, kernel column and channel of what is read."""

    places: np.ndarray
    segments: np.ndarray

    def place(self, arguments: np.ndarray) -> list[np.ndarray]:
        segments = self.segments.copy()
        segments["offset"] = 4 * reading_offsets(arguments[0], self.places)
        arguments[0]["segments"] = segments.ctypes.data
        return [segments, *super().place(arguments)]


def _supports(tile: FloatTile, layer: FloatLayer) -> bool:
    if layer.weights.size == 0 or layer.is_depthwise != (tile.kind == "depthwise"):
        return False
    # Of a block that is not full, inputs and residuals are read to its end: at most 64 bytes.
    groups = 1 if layer.is_depthwise else layer.group
    return tile.channels <= max(16, layer.weights.shape[0] // groups)


def _cost(tile: FloatTile, layer: FloatLayer) -> float:
    """Channels computed per pixel, those beyond the last included, and how well the tile does."""
    channels = layer.weights.shape[0] // layer.group
    padded = -(-channels // tile.channels) * tile.channels
    if tile.kind == "depthwise":
        return -tile.channels
    # One load for each product, but no weights that many pixels have to share.
    if tile.pixels == 1:
        return padded * (1.0 if layer.pixels <= 2 else 4.0)
    waste = -(-layer.pixels // tile.pixels) * tile.pixels / layer.pixels
    return padded * waste * (1.05 if tile.vectors == 1 else 1.0)


def _first_channels(tile: FloatTile, layer: FloatLayer) -> np.ndarray:
    """First output channels of all blocks, (groups, blocks); the last one overlaps if need be."""
    groups = 1 if layer.is_depthwise else layer.group
    size = layer.weights.shape[0] // groups
    firsts = np.minimum(np.arange(0, size, tile.channels), max(size - tile.channels, 0))
    return firsts + size * np.arange(groups)[:, None]


def _segments(tile: FloatTile, layer: FloatLayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments, the places that they read from, and the parts, for the steps of every block."""
    _, kh, kw, in_group = layer.weights.shape
    run = layer.run_taps * in_group
    steps = kh * kw * in_group
    parts = 1
    if tile.kind == "dense" and tile.pixels > 1:
        parts = -(-steps * tile.channels * 4 // (2 * _CHUNK_WEIGHTS))
    cuts = np.union1d(np.arange(0, steps, run), np.arange(parts) * steps // parts)
    sizes = np.diff(np.append(cuts, steps))
    row, within = np.divmod(cuts, run)
    ky, kx = np.divmod(row * layer.run_taps, kw)
    places = np.stack([ky, kx, within], axis=1)
    segments = np.zeros(len(cuts), FLOAT_SEGMENT)
    segments["size"] = 4 * sizes
    table = np.zeros(parts, PART)
    firsts = np.searchsorted(cuts, np.arange(parts + 1) * steps // parts)
    table["segment"], table["segments_end"] = firsts[:-1], firsts[1:]
    table["weights"] = 4 * tile.channels * cuts[firsts[:-1]]
    return segments, places, table


def _pack(tile: FloatTile, layer: FloatLayer) -> Packed:
    o, kh, kw, in_group = layer.weights.shape
    firsts = _first_channels(tile, layer)
    blocks_of_group = firsts.shape[1]
    existing = min(tile.channels, o // len(firsts))
    steps = kh * kw * in_group
    weights = aligned((firsts.size, steps, tile.channels), np.float32)
    bias = aligned((firsts.size, tile.channels), np.float32)
    weights[:], bias[:] = 0, 0
    for block, first in enumerate(firsts.flat):
        rows = slice(first, first + existing)
        weights[block, :, :existing] = layer.weights[rows].reshape(existing, steps).T
        bias[block, :existing] = layer.bias[rows]

    segments, places, parts = _segments(tile, layer)
    depthwise = tile.kind == "depthwise"
    w_step = 4 * steps * tile.channels
    together = 1 if len(parts) > 1 else max(1, _CHUNK_WEIGHTS // w_step)
    chunks: list[list[int]] = []
    for block in range(firsts.size):
        g, i = divmod(block, blocks_of_group)
        o0 = firsts[g, i]
        in_line = o0 == firsts[g, 0] + i * tile.channels
        if i and in_line and chunks[-1][1] < together:
            chunks[-1][1] += 1
        else:
            chunks.append([block, 1, o0 if depthwise else g * in_group, o0])
    pixel_bytes = 4 * layer.group * in_group * layer.strides[0] * layer.strides[1]
    panel = _PANEL_INPUTS // (pixel_bytes * tile.pixels)
    single = FLOAT_TILES.get(replace(tile, pixels=1).name) if tile.pixels > 1 else None
    return _PackedTiles(
        {
            "weights": weights,
            "b": bias,
            "block": tile.channels,
            "existing": existing,
            "tile": float_tiles.address(tile),
            "single": float_tiles.address(single) if single else 0,
            # A product takes four cycles, of which two begin in each.
            "few": (tile.pixels * tile.vectors - 1) // 8 if single else 0,
            "pixels": tile.pixels,
            "x_step": 4 * tile.channels if depthwise else 0,
            "w_step": w_step,
            "parts": parts,
            "part_count": len(parts),
            "chunks": np.array([tuple(chunk) for chunk in chunks], CHUNK),
            "chunk_count": len(chunks),
            "panel": max(8, min(panel, _PANEL)),
        },
        places,
        segments,
    )


_RECORD = 256  # bytes of a FLOAT_TILE
assert FLOAT_TILE.itemsize <= _RECORD


@njit(inline="always")
def _outputs(pixels, block):
    """Bytes of a tile of outputs and their addresses."""
    return 64 * ((4 * pixels * block + 8 * pixels + 63) // 64)


@njit(inline="always")
def _sums(part_count, panel, pixels, block):
    """Bytes of the sums of a panel that rest between parts."""
    return 4 * panel * pixels * block if part_count > 1 else 0


def _scratch(tile: FloatTile, record: np.ndarray) -> int:
    """Bytes for the largest panel."""
    sums = _sums.py_func(2, _PANEL, tile.pixels, tile.channels)
    outputs = _outputs.py_func(tile.pixels, tile.channels)
    return _RECORD + outputs + sums + 3 * 8 * _PANEL * tile.pixels


@njit(error_model="numpy")
def _addresses(a, first, count, x, y, r):
    """Tabulate where the inputs, outputs and residuals of pixels lie, from the pixel `first` on.

    Those beyond the last repeat it.
    """
    j, i, n = first % a.width, first // a.width % a.height, first // (a.width * a.height)
    total = a.n * a.height * a.width
    x_column = 4 * a.stride_w * a.x.c
    y_column, r_column = 4 * a.step_w * a.y.c, 4 * a.step_w * a.r.c
    x_next = y_next = r_next = 0
    begins = True  # a row of outputs, or the table
    for q in range(min(count, total - first)):
        if begins:
            row, column = a.row0 + i * a.stride_h, a.column0 + j * a.stride_w
            x_next = address_of(a.x, n, row, column, 0, 4)
            row, column = i * a.step_h, j * a.step_w
            y_next = address_of(a.y, n, a.y.top + row, a.y.left + column, 0, 4)
            r_next = address_of(a.r, n, a.r.top + row, a.r.left + column, 0, 4)
        x[q], y[q], r[q] = x_next, y_next, r_next
        x_next, y_next, r_next = x_next + x_column, y_next + y_column, r_next + r_column
        j += 1
        begins = j == a.width
        if begins:
            j = 0
            i += 1
            if i == a.height:
                i = 0
                n += 1
    last = min(count, total - first) - 1
    for q in range(last + 1, count):
        x[q], y[q], r[q] = x[last], y[last], r[last]


@njit(error_model="numpy")
def _partial_block(a, t, spare, valid, scratch):
    """Run the last part of a tile into spare memory and copy out the channels that exist.

    The residual's channels beyond the last are whatever lies there; they affect no others.
    """
    y_table, y_offset = t.y, t.y_offset
    addresses = carray(as_pointer(y_table), a.pixels, np.int64)
    outputs = carray(as_pointer(spare), a.pixels * a.block, np.float32)
    table = spare + np.uintp(4 * a.pixels * a.block)
    targets = carray(as_pointer(table), a.pixels, np.int64)
    for q in range(a.pixels):
        # The residual's address gets this offset as well.
        targets[q] = np.int64(spare) + 4 * q * a.block - y_offset
    t.y = table
    call_tile(a.tile, scratch)
    t.y = y_table
    for q in range(valid):
        y = carray(as_pointer(np.uintp(addresses[q] + y_offset)), a.existing, np.float32)
        for c in range(np.uintp(a.existing)):
            y[c] = outputs[np.uintp(q * a.block) + c]


@njit(error_model="numpy")
def _single_pixels(a, t, valid, scratch):
    """Run the tile of one pixel for each of the few that are left."""
    x, y, r, sums = t.x, t.y, t.r, t.sums
    for _ in range(valid):
        call_tile(a.single, scratch)
        t.x, t.y, t.r = t.x + np.uintp(8), t.y + np.uintp(8), t.r + np.uintp(8)
        t.sums += np.uintp(4 * a.block)  # there are sums only where a chunk is one block
    t.x, t.y, t.r, t.sums = x, y, r, sums


def _conv(arguments, thread, threads):
    a = carray(arguments, 1)[0]
    pixels = a.pixels
    scratch = a.scratch + np.uintp(thread * a.scratch_size)
    t = carray(as_pointer(scratch), 1, FLOAT_TILE)[0]
    spare = scratch + np.uintp(_RECORD)
    sums = spare + np.uintp(_outputs(a.pixels, a.block))
    table = sums + np.uintp(_sums(a.part_count, a.panel, a.pixels, a.block))
    size = 8 * a.panel * pixels
    x = carray(as_pointer(table), a.panel * pixels, np.int64)
    y = carray(as_pointer(table + np.uintp(size)), a.panel * pixels, np.int64)
    r = carray(as_pointer(table + np.uintp(2 * size)), a.panel * pixels, np.int64)
    t.x_step, t.w_step, t.has_residual, t.lo, t.hi = a.x_step, a.w_step, a.has_residual, a.lo, a.hi
    parts = carray(as_pointer(a.parts), a.part_count, PART)
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    total = a.n * a.height * a.width
    strips = (total + pixels - 1) // pixels
    panel_items = a.panel * a.chunk_count
    begin, end = share(strips * a.chunk_count, thread, threads)
    item, tabulated = begin, -1
    while item < end:
        panel = item // panel_items
        first_strip = panel * a.panel
        count = min(a.panel, strips - first_strip)
        within = item - panel * panel_items
        chunk, first = chunks[within // count], within % count
        last = min(count, first + end - item)
        if panel != tabulated:
            _addresses(a, first_strip * pixels, count * pixels, x, y, r)
            tabulated = panel
        t.x_offset, t.y_offset = 4 * chunk.x0, 4 * chunk.o0
        t.blocks = chunk.blocks
        t.b = a.b + np.uintp(4 * chunk.block * a.block)
        for part in range(a.part_count):
            p = parts[part]
            t.segments = a.segments + np.uintp(16 * p.segment)
            t.segments_end = a.segments + np.uintp(16 * p.segments_end)
            t.weights = a.weights + np.uintp(chunk.block * a.w_step + p.weights)
            t.first, t.last = part == 0, part == a.part_count - 1
            for strip in range(first, last):
                place = np.uintp(8 * strip * pixels)
                t.x = table + place
                t.y, t.r = t.x + np.uintp(size), t.x + np.uintp(2 * size)
                if a.part_count > 1:
                    t.sums = sums + np.uintp(4 * strip * pixels * a.block)
                valid = min(pixels, total - (first_strip + strip) * pixels)
                if t.last and a.existing < a.block:
                    _partial_block(a, t, spare, valid, scratch)
                elif valid <= a.few and a.existing == a.block:
                    _single_pixels(a, t, valid, scratch)
                else:
                    call_tile(a.tile, scratch)
        item += last - first


for _tile in FLOAT_TILES.values():
    if _tile.pixels > 1 or _tile.channels >= 64:
        register(
            "float_conv", "fma", abi.FLOAT_CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=partial(getattr, _tile, "available"),
            scratch=partial(_scratch, _tile),
        )(_conv)  # fmt: skip
