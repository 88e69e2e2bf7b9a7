"""Depthwise convolutions in rows of outputs, on byte dot products of four taps of a channel.

The taps of a kernel are covered by *windows*, some rows high and some columns wide, as far as they
go; a microkernel interleaves a column of inputs once for all pixels of a row that read it. What is
left, or all of a kernel that has no window, is taken four taps at a time. Pictures narrower than a
tile, and the last pixels of a row, are computed pixel by pixel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numba import carray

from logshift.kernels import records
from logshift.kernels.blocks import block_channels, blocked, by_block, outputs_by_block
from logshift.kernels.dot import microkernels
from logshift.kernels.dot.tiles import (
    CHUNK,
    CHUNK_WEIGHTS,
    MICROKERNELS,
    READS,
    TILE,
    Microkernel,
    fill_in,
)
from logshift.kernels.layer import Layer, Packed, PackedReads
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import placed
from logshift.kernels.machine.native import as_pointer, call_tile
from logshift.kernels.records import share
from logshift.kernels.registry import register
from logshift.kernels.walk import copy_bytes, places_of

_HEAD = 256  # bytes of a slot's scratch memory for a TILE record
assert TILE.itemsize <= _HEAD


def _windows(tile: Microkernel, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Cover the kernel's taps.

    Returns
    -------
    windows : int64 (windows, columns, 4)
        Taps, row by row, of the columns of windows; -1 for those that do not exist.
    others : int64 (reads, 4)
        All taps that are in no window.
    """
    _, kh, kw, _ = layer.weights.shape
    taps = np.arange(kh * kw).reshape(kh, kw)
    rows, columns, _ = tile.window or (kh + 1, kw + 1, 1)
    free = np.ones(taps.shape, bool)
    found = []
    # A window of a single row would waste more than it saves.
    for top in range(0, kh - (kh % rows == 1), rows):
        for left in range(0, kw - columns + 1, columns):
            inside = slice(top, top + rows), slice(left, left + columns)
            window = np.full((columns, 4), -1)
            window[:, : len(taps[inside])] = taps[inside].T
            found.append(window)
            free[inside] = False
    left_over = taps[free]
    others = np.full((-(-len(left_over) // 4), 4), -1)
    others.ravel()[: len(left_over)] = left_over
    return np.array(found, np.int64).reshape(len(found), columns, 4), others


def _supports(tile: Microkernel, layer: Layer) -> bool:
    fits = (
        layer.is_depthwise
        and 0 < layer.largest <= 127
        and layer.accumulator_bound < 2**31
        and layer.fits_int32
    )
    if not fits or tile.window is None:
        return fits
    rows, columns, stride = tile.window
    _, kh, kw, _ = layer.weights.shape
    return (
        kh >= min(rows, 3)
        and kw >= columns
        and (layer.strides[1], layer.dilations[1]) == (stride, 1)
    )


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Instructions for a pixel of two vectors; so scaled that AVX2's kernel always costs more."""
    windows, others = _windows(tile, layer)
    instructions = 6.0 * len(others)
    if tile.window is not None:
        rows, columns, stride = tile.window
        loaded = (tile.pixels - 1) * stride + columns
        # As many shuffles for a column as there are rows.
        instructions += len(windows) * (rows * loaded / tile.pixels + 2 * columns)
    return instructions / 1e6


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    channels, kh, kw, _ = layer.weights.shape
    windows, others = _windows(tile, layer)
    # Steps, in the order in which their weights are read.
    taps = np.concatenate([windows.reshape(-1, 4), others])
    integers = np.zeros((channels + 1, kh * kw + 1), np.int8)
    integers[:-1, :-1] = layer.integers.reshape(channels, -1)
    rows = block_channels(tile.channels, layer)
    words = np.ascontiguousarray(integers[:, taps]).view(np.uint32)[..., 0]
    weights = placed(by_block(words, rows), np.uint32)

    # Where taps do not exist, what the first one reads meets weights of 0.
    reads = np.concatenate([windows[:, 0], others])
    reads = np.where(reads < 0, reads[:, :1], reads)
    together = max(1, CHUNK_WEIGHTS // (4 * len(taps) * tile.channels))
    chunks = [
        (block, min(together, len(rows) - block), 0, block * weights[0].nbytes, first, first)
        for block, first in list(enumerate(rows[:, 0]))[::together]
    ]

    window = tile.window and (*tile.window[:2], 1)
    single = MICROKERNELS[replace(tile, pixels=1, window=window).name]
    return PackedReads(
        {
            "weights": weights,
            "offset": blocked(-layer.offset, rows, np.int32),
            **outputs_by_block(layer, rows),
            "block": tile.channels,
            "existing": np.count_nonzero(rows[0] >= 0),
            "tile": microkernels.address(tile, layer.is_activated),
            "single": microkernels.address(single, layer.is_activated),
            "pixels": tile.pixels,
            "chunks": np.array(chunks, CHUNK),
            "chunk_count": len(chunks),
            "window_count": len(windows),
            "segment_count": len(reads),
        },
        np.stack([reads // kw, reads % kw, 0 * reads], axis=-1),
        np.zeros(len(reads), READS),
        "segments",
    )


def _scratch(tile: Microkernel, record: np.void) -> int:
    """Bytes of a TILE, and of outputs of a block that is not full."""
    return _HEAD + 4 * tile.pixels * tile.channels


@njit(error_model="numpy")
def _partial_block(a, t, tile, pixels, size, scratch):
    """Run a tile into spare memory and copy out the channels that exist.

    The residual's channels beyond the last are whatever lies there; they affect no others.
    """
    y, y_pixel = t.y, t.y_pixel
    spare = scratch + np.uintp(_HEAD)
    t.y, t.y_pixel = spare, a.block * size
    call_tile(tile, scratch)
    for q in range(pixels):
        copy_bytes(spare + np.uintp(q * t.y_pixel), y + np.uintp(q * y_pixel), a.existing * size)
    t.y, t.y_pixel = y, y_pixel


def _conv_rows(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    size = fill_in(a, t)
    t.segments = a.segments
    t.windows_end = a.segments + np.uintp(16 * a.window_count)
    t.segments_end = a.segments + np.uintp(16 * a.segment_count)
    t.x_column, t.x_pixel = a.x.c, a.stride_w * a.x.c
    t.y_pixel, t.r_pixel = a.step_w * a.y.c * size, a.step_w * a.r.c
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    across = (a.width + a.pixels - 1) // a.pixels
    strips = a.n * a.height * across
    begin, end = share(a.chunk_count * strips, first_part, end_part, parts)
    item = begin
    while item < end:
        chunk = chunks[item // strips]
        row, first = item % strips // across, item % across
        last = min(across, first + end - item)
        words = np.uintp(4 * chunk.block * a.block)
        t.blocks, t.last = chunk.blocks, max(a.channels - a.block - chunk.o0, 0)
        t.weights = a.weights + np.uintp(chunk.weights)
        t.start, t.m, t.b = a.offset + words, a.m + words, a.b + words
        t.slopes = a.slopes + words
        n, i = row // a.height, row % a.height
        for strip in range(first, last):
            j = strip * a.pixels
            left = a.width - j
            tile, pixels, calls = a.tile, a.pixels, 1
            if left < a.pixels:
                if 2 * left <= a.pixels or a.width < a.pixels:
                    tile, pixels, calls = a.single, 1, left
                else:  # overlaps the one before
                    j = a.width - a.pixels
            for q in range(j, j + calls):
                x, y, r = places_of(a, n, i, q, chunk.o0, chunk.o0, 1, size)
                t.x, t.y, t.r = np.uintp(x), np.uintp(y), np.uintp(r)
                if a.existing == a.block:
                    call_tile(tile, scratch)
                else:
                    _partial_block(a, t, tile, pixels, size, scratch)
        item += last - first


for _tile in MICROKERNELS.values():
    if _tile.kind == "rows" and _tile.pixels > 1:
        register(
            "conv", "dot", records.CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=partial(getattr, _tile, "available"),
            scratch=partial(_scratch, _tile), looks_up=True,
        )(_conv_rows)  # fmt: skip
