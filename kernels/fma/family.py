"""The fma family: convolutions on float32, on the machine's fused multiply-add.

There is no im2col: a microkernel (`tiles`) reads what a row of taps covers where it lies, and
writes outputs where they belong. Pixels are taken in *panels*, whose inputs stay in the cache while
one *chunk* of weights after another serves them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numba import carray, njit

from logshift.kernels import records
from logshift.kernels.blocks import first_channels, runs_of_blocks
from logshift.kernels.fma import microkernels
from logshift.kernels.fma.tiles import FLOAT_SEGMENT, FLOAT_TILE, FLOAT_TILES, FloatTile
from logshift.kernels.layer import FloatLayer, Packed, PackedReads
from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.native import as_pointer, call_tile
from logshift.kernels.records import share
from logshift.kernels.registry import register, register_part
from logshift.kernels.walk import copy_bytes, places_of, position, single_pixels

# Blocks of channels that one call of a microkernel takes: the first one, how many, and the first
# input and output channel.
CHUNK = np.dtype([(n, np.int64) for n in ("block", "blocks", "x0", "o0")])

# Bytes of weights in a chunk: they stay in the cache while the pixels of a panel go by.
_CHUNK_WEIGHTS = 32768
# Bytes of inputs of a panel: they stay in the second-level cache while chunks go by.
_PANEL_INPUTS = 2**17
_PANEL = 64  # most strips of a panel


class _PackedTiles(PackedReads):
    """Reads are segments."""

    def offset(self, reads: np.ndarray, offsets: np.ndarray) -> None:
        reads["offset"] = 4 * offsets


def _supports(tile: FloatTile, layer: FloatLayer) -> bool:
    if layer.weights.size == 0 or layer.is_depthwise != (tile.kind != "dense"):
        return False
    if tile.window is not None:
        kernel, stride = tile.window
        if layer.weights.shape[1:3] != (kernel, kernel) or layer.strides != (stride, stride):
            return False
        if layer.dilations != (1, 1) or layer.weights.shape[0] < tile.channels:
            return False
    # Of a block that is not full, inputs and residuals are read to its end: at most 64 bytes.
    groups = 1 if layer.is_depthwise else layer.group
    return tile.channels <= max(16, layer.weights.shape[0] // groups)


def _cost(tile: FloatTile, layer: FloatLayer) -> float:
    """Channels computed per pixel, those beyond the last included, and how well the tile does."""
    channels = layer.weights.shape[0] // layer.group
    padded = -(-channels // tile.channels) * tile.channels
    if tile.kind != "dense":
        return -tile.channels if tile.window is None else -100
    if tile.pixels == 1:  # loads a vector of weights for each product
        return padded * (1.0 if layer.pixels <= 2 else 4.0)
    # Of one vector, loads are more than products; three share weights among fewer pixels.
    unused = max(1.0, tile.pixels / layer.pixels)
    return padded * unused * {1: 1.3, 3: 1.02}.get(tile.vectors, 1.0)


def _segments(tile: FloatTile, layer: FloatLayer) -> tuple[np.ndarray, np.ndarray]:
    """Segments, and the places that they read from, for the steps of every block."""
    _, kh, kw, in_group = layer.weights.shape
    taps = layer.run_taps if tile.kind == "dense" else 1
    tap = np.arange(0, kh * kw, taps)
    segments = np.zeros(len(tap), FLOAT_SEGMENT)
    segments["size"] = 4 * taps * in_group
    return segments, np.stack([tap // kw, tap % kw, 0 * tap], axis=1)


def _pack(tile: FloatTile, layer: FloatLayer) -> Packed:
    o, kh, kw, in_group = layer.weights.shape
    firsts = first_channels(tile.channels, layer)
    existing = min(tile.channels, o // len(firsts))
    steps = kh * kw * in_group
    weights = aligned((firsts.size, steps, tile.channels), np.float32)
    bias = aligned((firsts.size, tile.channels), np.float32)
    weights[:], bias[:] = 0, 0
    for block, first in enumerate(firsts.flat):
        rows = slice(first, first + existing)
        weights[block, :, :existing] = layer.weights[rows].reshape(existing, steps).T
        bias[block, :existing] = layer.bias[rows]

    segments, places = _segments(tile, layer)
    depthwise = layer.is_depthwise
    w_step = 4 * steps * tile.channels
    together = max(1, _CHUNK_WEIGHTS // w_step)
    chunks = [
        (block, blocks, o0 if depthwise else group * in_group, o0)
        for block, blocks, group, o0 in runs_of_blocks(firsts, tile.channels, together)
    ]
    pixel_bytes = 4 * layer.group * in_group * layer.strides[0] * layer.strides[1]
    panel = _PANEL_INPUTS // (pixel_bytes * tile.pixels)
    kind = "depthwise" if depthwise else "dense"
    single = FLOAT_TILES.get(replace(tile, kind=kind, window=None, pixels=1).name)
    return _PackedTiles(
        {
            "weights": weights,
            "b": bias,
            "block": tile.channels,
            "existing": existing,
            "tile": microkernels.address(tile),
            "single": microkernels.address(single) if single else 0,
            # A product takes four cycles, of which two begin in each.
            "few": (tile.pixels * tile.vectors - 1) // 8 if single and tile.window is None else 0,
            "pixels": tile.pixels,
            "x_step": 4 * tile.channels if depthwise else 0,
            "w_step": w_step,
            "segment_count": len(segments),
            "chunks": np.array(chunks, CHUNK),
            "chunk_count": len(chunks),
            "panel": max(8, min(panel, _PANEL)),
        },
        places,
        segments,
        "segments",
    )


_RECORD = 256  # bytes of a FLOAT_TILE
assert FLOAT_TILE.itemsize <= _RECORD


@njit(inline="always")
def _outputs(pixels, block):
    """Bytes of a tile of outputs and their addresses."""
    return 64 * ((4 * pixels * block + 8 * pixels + 63) // 64)


def _scratch(tile: FloatTile, record: np.ndarray) -> int:
    """Bytes for the largest panel."""
    outputs = _outputs.py_func(tile.pixels, tile.channels)
    return _RECORD + outputs + 3 * 8 * _PANEL * tile.pixels


@njit(error_model="numpy")
def _addresses(a, first, count, x, y, r):
    """Tabulate where the inputs, outputs and residuals of pixels lie, from the pixel `first` on.

    Those beyond the last repeat it.
    """
    n, i, j = position(a, first)
    total = a.n * a.height * a.width
    x_column = 4 * a.stride_w * a.x.c
    y_column, r_column = 4 * a.step_w * a.y.c, 4 * a.step_w * a.r.c
    x_next = y_next = r_next = 0
    begins = True  # a row of outputs, or the table
    for q in range(min(count, total - first)):
        if begins:
            x_next, y_next, r_next = places_of(a, n, i, j, 0, 0, 4, 4)
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
    """Run a tile into spare memory and copy out the channels that exist.

    The residual's channels beyond the last are whatever lies there; they affect no others.
    """
    y_table, y_offset = t.y, t.y_offset
    addresses = carray(as_pointer(y_table), a.pixels, np.int64)
    table = spare + np.uintp(4 * a.pixels * a.block)
    targets = carray(as_pointer(table), a.pixels, np.int64)
    for q in range(a.pixels):
        # The residual's address gets this offset as well.
        targets[q] = np.int64(spare) + 4 * q * a.block - y_offset
    t.y = table
    call_tile(a.tile, scratch)
    t.y = y_table
    for q in range(valid):
        copy_bytes(targets[q] + y_offset, addresses[q] + y_offset, 4 * a.existing)


def _conv(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    pixels = a.pixels
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, FLOAT_TILE)[0]
    spare = scratch + np.uintp(_RECORD)
    table = spare + np.uintp(_outputs(a.pixels, a.block))
    size = 8 * a.panel * pixels
    x = carray(as_pointer(table), a.panel * pixels, np.int64)
    y = carray(as_pointer(table + np.uintp(size)), a.panel * pixels, np.int64)
    r = carray(as_pointer(table + np.uintp(2 * size)), a.panel * pixels, np.int64)
    t.segments = a.segments
    t.segments_end = a.segments + np.uintp(16 * a.segment_count)
    t.x_step, t.w_step, t.has_residual, t.lo, t.hi = a.x_step, a.w_step, a.has_residual, a.lo, a.hi
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    total = a.n * a.height * a.width
    strips = (total + pixels - 1) // pixels
    panel_items = a.panel * a.chunk_count
    begin, end = share(strips * a.chunk_count, first_part, end_part, parts)
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
        t.weights = a.weights + np.uintp(chunk.block * a.w_step)
        for strip in range(first, last):
            t.x = table + np.uintp(8 * strip * pixels)
            t.y, t.r = t.x + np.uintp(size), t.x + np.uintp(2 * size)
            valid = min(pixels, total - (first_strip + strip) * pixels)
            if a.existing < a.block:
                _partial_block(a, t, spare, valid, scratch)
            elif valid <= a.few:
                single_pixels(a, t, valid, scratch)
            else:
                call_tile(a.tile, scratch)
        item += last - first


@njit(error_model="numpy")
def _small_picture(a, t, chunk, n, table, scratch):
    """Compute a picture that no rectangle fits into pixel by pixel."""
    addresses = carray(as_pointer(table), 3, np.int64)
    t.x, t.y, t.r = table, table + np.uintp(8), table + np.uintp(16)
    t.x_offset = t.y_offset = 0
    for i in range(a.height):
        for j in range(a.width):
            x, y, r = places_of(a, n, i, j, chunk.o0, chunk.o0, 4, 4)
            addresses[0], addresses[1], addresses[2] = x, y, r
            call_tile(a.single, scratch)


def _conv_window(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, FLOAT_TILE)[0]
    table = scratch + np.uintp(_RECORD)
    t.segments = a.segments
    t.segments_end = a.segments + np.uintp(16 * a.segment_count)
    t.x_step, t.w_step, t.has_residual, t.lo, t.hi = a.x_step, a.w_step, a.has_residual, a.lo, a.hi
    pixel = 4 * a.x.c
    t.x_row, t.x_column = pixel * a.x.w, pixel
    pixel = 4 * a.y.c
    t.y_row, t.y_column = pixel * a.y.w * a.step_h, pixel * a.step_w
    pixel = 4 * a.r.c
    t.r_row, t.r_column = pixel * a.r.w * a.step_h, pixel * a.step_w
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    rows, columns = 2, a.pixels // 2
    if a.height < rows or a.width < columns:
        begin, end = share(a.n * a.chunk_count, first_part, end_part, parts)
        for item in range(begin, end):
            chunk = chunks[item % a.chunk_count]
            t.blocks = chunk.blocks
            t.b = a.b + np.uintp(4 * chunk.block * a.block)
            t.weights = a.weights + np.uintp(chunk.block * a.w_step)
            _small_picture(a, t, chunk, item // a.chunk_count, table, scratch)
        return
    down, across = (a.height + rows - 1) // rows, (a.width + columns - 1) // columns
    begin, end = share(a.n * down * across, first_part, end_part, parts)
    for item in range(begin, end):
        n, tile = item // (down * across), item % (down * across)
        # The last ones overlap those before.
        i = min(tile // across * rows, a.height - rows)
        j = min(tile % across * columns, a.width - columns)
        for index in range(a.chunk_count):
            chunk = chunks[index]
            t.blocks = chunk.blocks
            t.b = a.b + np.uintp(4 * chunk.block * a.block)
            t.weights = a.weights + np.uintp(chunk.block * a.w_step)
            x, y, r = places_of(a, n, i, j, chunk.o0, chunk.o0, 4, 4)
            t.x, t.y, t.r = np.uintp(x), np.uintp(y), np.uintp(r)
            call_tile(a.tile, scratch)


for _tile in FLOAT_TILES.values():
    _available = partial(getattr, _tile, "available")
    register_part("fma", _tile.name, partial(microkernels.address, _tile), _available)
    if _tile.pixels > 1 or _tile.channels >= 64:
        register(
            "float_conv", "fma", records.FLOAT_CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=_available,
            scratch=partial(_scratch, _tile),
        )(_conv if _tile.window is None else _conv_window)  # fmt: skip
