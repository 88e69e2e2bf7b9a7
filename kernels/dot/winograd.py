"""Exact integer Winograd convolution, F(2x2, 3x3), on byte dot products.

With the matrices of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR
2016), a tile of 2x2 outputs of a 3x3 convolution is

    acc = A^T [ sum over channels of (G W G^T) * (B^T x B) ] A

where x are the 4x4 codes that it reads and * is elementwise: 16 products per channel where the
direct way has 36. G has halves in its two middle rows. Twice these rows, all of it is integers, and
what comes back is divided again, exactly. Codes of at most T become numbers in [-2T, 2T], or
[0, 4T] where both axes add: with 2T added to the former they are uint8 up to T = 63, with 2T taken
from the latter, where products are signed, int8. Weights become
at most nine times the largest |W|, which at 3 bits is int8; `_supports` and `_supports_dot` look at
the integers themselves.

A call transforms the codes of a strip of tiles once; microkernels then take a few tiles at a time
through the 16 positions of the transform and one block of output channels, and back. There are
two kinds of them:

    winograd        sums pairs of products in int16; multiplies all rows of G by two
    winograd_dot    sums in int32, and takes one column of positions at a time
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from logshift.kernels import records
from logshift.kernels.blocks import first_channels, outputs_by_block
from logshift.kernels.dot import microkernels
from logshift.kernels.dot.emit_winograd import BOTH_ADD, POSITIONS, transform_half, transform_run
from logshift.kernels.dot.steps import cut, in_reading_order
from logshift.kernels.dot.tiles import (
    CHUNK,
    MICROKERNELS,
    RUN,
    SEGMENT,
    TILE,
    Microkernel,
    fill_in,
)
from logshift.kernels.layer import Layer, Packed
from logshift.kernels.machine.memory import placed
from logshift.kernels.machine.native import as_pointer, call_tile
from logshift.kernels.records import share
from logshift.kernels.registry import register
from logshift.kernels.walk import places_of

# G with its rows made integers. For "winograd_dot" rows that only take are not doubled, and the
# last one's sign is turned, so that all that is done with its products is to add them.
_G = {
    "winograd": np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32),
    "winograd_dot": np.array([[1, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, -1]], np.int32),
}

# Bytes of transformed codes in a strip: they share the second-level cache with a block's weights.
_STRIP = 2**18
_HEAD = 512  # bytes of a slot's scratch memory for a TILE record and addresses of codes
# Calls that a column's weights serve in a row, while they are in the first-level cache.
_TOGETHER = 4
_FEW = 4  # tiles of the smaller twin of a microkernel, which takes what would be left over
assert TILE.itemsize <= 256


def _transformed(tile: Microkernel, layer: Layer) -> np.ndarray:
    """Weights G W G^T, int32, (O, 16, C)."""
    kept = vars(layer).setdefault("transformed", {})  # for packing, which follows `_supports`
    if tile.kind not in kept:
        o, _, _, channels = layer.weights.shape
        g = _G[tile.kind]
        kept[tile.kind] = np.kron(g, g) @ layer.integers.reshape(o, 9, channels)
    return kept[tile.kind]


def _available(tile: Microkernel) -> bool:
    """Whether the machine has the instructions, but none that multiply and add in one.

    With those the direct way is faster, by how much `_cost` does not know.
    """
    better = any(k.available for k in MICROKERNELS.values() if k.kind == "dot")
    return tile.available and not better


def _largest(tile: Microkernel, layer: Layer) -> int:
    """Largest of the transformed weights; 0 of a layer that is none for Winograd."""
    fits = (
        layer.weights.shape[1:3] == (3, 3)
        and layer.weights.shape[0] >= tile.channels
        and layer.strides == layer.dilations == (1, 1)
        and layer.group == 1
        and layer.activation_bits <= 6
        and 32 * layer.accumulator_bound < 2**31  # with all that is added: see `_pack_dot`
        and layer.fits_int32
    )
    return int(np.abs(_transformed(tile, layer)).max()) if fits else 0


def _supports(tile: Microkernel, layer: Layer) -> bool:
    largest, top = _largest(tile, layer), 4 * (2**layer.activation_bits - 1)
    # Two products of neighbouring channels are added with saturation.
    return 0 < largest <= 127 and 2 * largest * top <= 32767


def _supports_dot(tile: Microkernel, layer: Layer) -> bool:
    return 0 < _largest(tile, layer) <= 127


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Cost in channels of the direct way, as in `family`, from what was measured.

    The products are less than half as many; what is done once per output counts the more the fewer
    input channels there are, and the transform of codes the more the fewer output channels.
    """
    computed = first_channels(tile.channels, layer).size * tile.channels
    return tile.price * (computed * (0.47 + 8 / layer.weights.shape[3]) + 3)


def _cost_dot(tile: Microkernel, layer: Layer) -> float:
    """Cost in channels of the direct way, from what was measured on AVX-512.

    As above; and tiles reach beyond the edges of pictures of odd sizes.
    """
    channels = layer.weights.shape[3]
    computed = first_channels(tile.channels, layer).size * tile.channels
    beyond = 1 + 2 / max(layer.pixels, 1) ** 0.5
    return tile.price * beyond * (computed * (0.47 + 2.4 / channels) + 1 + 130 / channels)


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    rows = first_channels(tile.channels, layer).reshape(-1, 1) + np.arange(tile.channels)
    channels = layer.weights.shape[3]
    steps = -(-channels // 4)
    top = 2**layer.activation_bits - 1
    transformed = _transformed(tile, layer)
    padded = np.zeros((len(transformed), POSITIONS, 4 * steps), np.int8)
    padded[:, :, :channels] = transformed
    # (blocks and positions, steps, channels, codes of a step)
    weights = np.ascontiguousarray(
        padded.reshape(-1, POSITIONS, steps, 4)[rows].transpose(0, 2, 3, 1, 4)
    ).reshape(-1, steps, tile.channels, 4)
    signed = tile.isa.taken > 0
    cuts, groups, initials, begun = cut(
        weights, steps, 4 * top, tile.lanes_of_channel, 2 * top if signed else 0
    )
    stream, begins = in_reading_order(tile, weights, groups, initials)

    segments = np.zeros(len(cuts), SEGMENT)
    segments["offset"] = 4 * cuts[:, 1]
    segments["second"], segments["then"] = cuts[:, 2], cuts[:, 3]
    first_segments = np.searchsorted(cuts[:, 0], np.arange(0, len(weights), POSITIONS))

    # Take away what was added to codes, initial values, and in all four outputs the zero point.
    start = -2 * top * transformed.sum(axis=2, dtype=np.int64)
    start[:, BOTH_ADD] = -4 * layer.offset
    start = start[rows].transpose(0, 2, 1).reshape(-1, tile.channels) - begun

    chunks = [
        (block, 1, first_segments[block], begins[POSITIONS * block] * stream.shape[1], 0, o0)
        for block, o0 in enumerate(rows[:, 0])
    ]

    return Packed(
        {
            "weights": stream,
            "offset": placed(start, np.int32),
            **outputs_by_block(layer, rows),
            "block": tile.channels,
            "tile": microkernels.address(tile, layer.is_activated),
            "pixels": tile.pixels,
            "segments": segments,
            "chunks": np.array(chunks, CHUNK),
            "chunk_count": len(chunks),
            "added": 0 if signed else 2 * top,
            "both": -2 * top if signed else 0,
        }
    )


def _pack_dot(tile: Microkernel, layer: Layer) -> Packed:
    rows = first_channels(tile.channels, layer).reshape(-1, 1) + np.arange(tile.channels)
    o, _, _, channels = layer.weights.shape
    steps = -(-channels // 4)
    top = 2**layer.activation_bits - 1
    twin = _twin(tile)
    transformed = _transformed(tile, layer)
    padded = np.zeros((o, POSITIONS, 4 * steps), np.int8)
    padded[:, :, :channels] = transformed
    # What a step takes of a channel is moved as one number: (O, row, column, step).
    words = padded.view(np.uint32).reshape(o, 4, 4, steps)
    # (blocks, columns, pairs of rows in the order of reading, steps, rows, channels)
    in_pairs = words[:, [[1, 2], [0, 3]]][rows].transpose(0, 4, 2, 5, 3, 1)

    # Take away what was added to codes, and in all four outputs the zero point. What rows 0 and 3
    # begin with is half the sum, and half the difference, of what is added to rows 1 and 2 for it.
    signed = tile.isa.taken > 0
    sums = 2 * top * transformed.sum(axis=2, dtype=np.int64)
    begin = 0 * sums if signed else -sums
    begin[:, BOTH_ADD] = (sums[:, BOTH_ADD] if signed else 0) - 4 * layer.offset
    first, second, third, fourth = begin.reshape(o, 4, 4).transpose(1, 2, 0)
    start = np.stack([second + first + fourth, third + first - fourth], axis=1)
    return Packed(
        {
            "weights": placed(in_pairs, np.uint32),
            "offset": placed(start[:, :, rows].transpose(2, 0, 1, 3), np.int32),
            **outputs_by_block(layer, rows),
            "block": tile.channels,
            "tile": microkernels.address(tile, layer.is_activated),
            "pixels": tile.pixels,
            "single": microkernels.address(twin, layer.is_activated) if twin else 0,
            "steps": steps,
            "chunks": np.array([(n, 1, 0, 0, 0, o0) for n, o0 in enumerate(rows[:, 0])], CHUNK),
            "chunk_count": len(rows),
            "added": 0 if signed else 2 * top,
            "both": -2 * top if signed else 0,
        }
    )


def _twin(tile: Microkernel) -> Microkernel | None:
    """Return the microkernel that takes fewer tiles."""
    twin = MICROKERNELS.get(replace(tile, pixels=_FEW).name)
    return twin if twin is not tile else None


@register_jitable
def _call_bytes(tiles, channels):
    """Return the bytes of the transformed codes of one call."""
    return POSITIONS * tiles * (-(-channels // RUN) * RUN)


@register_jitable
def _largest_strip(tiles, channels):
    """Return how many calls a strip has per block of channels, at most."""
    return max(1, _STRIP // _call_bytes(tiles, channels))


@register_jitable
def _strips(n, height, width, channels, tiles, has_twin):
    """Return how many calls there are per block of channels, of the twin too, and strips."""
    total = n * ((height + 1) // 2) * ((width + 1) // 2)
    full, rest, few = total // tiles, total % tiles, 0
    if has_twin and full > 0 and 0 < rest <= 2 * _FEW - tiles:
        full, few = full - 1, 2
    elif has_twin and 0 < rest <= _FEW:
        few = 1
    elif rest > 0:
        full += 1
    largest = _largest_strip(tiles, channels)
    return full, few, (full + few + largest - 1) // largest


def _pieces(tile: Microkernel, record: np.void) -> int:
    n, height, width = (int(record[key]) for key in ("n", "height", "width"))
    channels, has_twin = int(record["x"]["c"]), _twin(tile) is not None
    return _strips(n, height, width, channels, tile.pixels, has_twin)[2]


def _scratch(tile: Microkernel, record: np.void) -> int:
    """Bytes of what a call needs, of a strip, of sums, and of an output pixel beyond the edge."""
    channels = int(record["x"]["c"])
    per_call = _call_bytes(tile.pixels, channels) + 2 * _table_bytes(tile.pixels)
    strip = per_call * _largest_strip(tile.pixels, channels)
    sums = _sums_bytes(tile.pixels, tile.channels) if tile.kind == "winograd_dot" else 0
    return _HEAD + strip + sums + 4 * int(record["channels"])


@register_jitable
def _table_bytes(tiles):
    """Return the bytes of the addresses of a call's outputs, or residuals."""
    return 8 * 4 * tiles


@register_jitable
def _sums_bytes(tiles, block):
    """Return the bytes of what columns leave to each other."""
    return _TOGETHER * 4 * 4 * tiles * block


@njit(error_model="numpy")
def _prepare(a, first, count, tiles, steps, u, y, r, beyond, size):
    """Transform the tiles of some calls, and note the addresses of their outputs and residuals.

    Parameters
    ----------
    a : CONV record
    first, count : the first tile, and how many calls
    tiles : of a call
    steps : bytes from a tile, a position, and the first RUN channels of a call to the next
    u : where the transformed codes go
    y, r : tables (calls, tiles, 4) of addresses, for outputs beyond the edge `beyond`
    size : bytes of an output
    """
    tall, wide = (a.height + 1) // 2, (a.width + 1) // 2
    total = a.n * tall * wide
    row_bytes = a.x.w * a.x.c
    y_table = carray(as_pointer(y), (count * tiles, 4), np.int64)
    r_table = carray(as_pointer(r), (count * tiles, 4), np.int64)
    y_row, y_column = a.step_h * a.y.w * a.y.c * size, a.step_w * a.y.c * size
    r_row, r_column = a.step_h * a.r.w * a.r.c, a.step_w * a.r.c
    j, i, n = first % wide * 2, first // wide % tall * 2, first // (wide * tall)
    for call in range(count):
        for q in range(tiles):
            tile = first + call * tiles + q
            below, right = i + 1 < a.height, j + 1 < a.width
            x, y_first, r_first = places_of(a, n, i, j, 0, 0, 1, size)
            # Of codes that only outputs beyond the edge need there may be none.
            last_row, last_column = row_bytes if below else 0, a.x.c if right else 0
            codes = np.int64(u) + call * _call_bytes(tiles, a.x.c) + q * steps[0]
            for c in range(0, a.x.c, RUN):
                place = codes + c // RUN * steps[2]
                if a.x.c - c > RUN // 2:
                    transform_run(
                        x + c, row_bytes, last_row, a.x.c, last_column, a.added, a.both,
                        place, steps[1],
                    )  # fmt: skip
                else:
                    transform_half(
                        x + c, row_bytes, last_row, a.x.c, last_column, a.added, a.both,
                        place, steps[1],
                    )  # fmt: skip
            for p in range(4):
                exists = (below or p < 2) and (right or p % 2 == 0)
                y_place, r_place = (
                    p // 2 * y_row + p % 2 * y_column,
                    p // 2 * r_row + p % 2 * r_column,
                )
                y_table[tile - first, p] = y_first + y_place if exists else np.int64(beyond)
                r_table[tile - first, p] = r_first + r_place if exists else np.int64(beyond)
            # Tiles beyond the last repeat it.
            if tile + 1 < total:
                j += 2
                if j >= a.width:
                    j = 0
                    i += 2
                    if i >= a.height:
                        i = 0
                        n += 1


def _conv_winograd(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    size = fill_in(a, t)
    tiles, bytes_ = a.pixels, _call_bytes(a.pixels, a.x.c)
    largest = _largest_strip(tiles, a.x.c)
    t.blocks, t.x_step = POSITIONS, bytes_ // POSITIONS
    t.x = scratch + np.uintp(_HEAD // 2)
    x = carray(as_pointer(t.x), tiles, np.int64)
    u = scratch + np.uintp(_HEAD)
    y = u + np.uintp(largest * bytes_)
    r = y + np.uintp(largest * _table_bytes(tiles))
    beyond = r + np.uintp(largest * _table_bytes(tiles))
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    calls, _, strips = _strips(a.n, a.height, a.width, a.x.c, tiles, False)
    begin, end = share(strips * a.chunk_count, first_part, end_part, parts)
    prepared = -1
    for item in range(begin, end):
        strip, block = item // a.chunk_count, item % a.chunk_count
        first, last = share(calls, strip, strip + 1, strips)
        if strip != prepared:
            steps = (t.x_step // tiles, t.x_step, RUN)
            _prepare(a, first * tiles, last - first, tiles, steps, u, y, r, beyond, size)
            prepared = strip
        chunk = chunks[block]
        words = np.uintp(4 * block * a.block)
        t.segments = a.segments + np.uintp(16 * chunk.segment)
        t.weights = a.weights + np.uintp(chunk.weights)
        t.start, t.m, t.b = a.offset + np.uintp(POSITIONS) * words, a.m + words, a.b + words
        t.slopes = a.slopes + words
        t.channel = chunk.o0
        for call in range(last - first):
            for q in range(tiles):
                x[q] = np.int64(u) + call * bytes_ + q * (t.x_step // tiles)
            outputs = np.uintp(call * _table_bytes(tiles))
            t.y, t.r = y + outputs, r + outputs
            call_tile(a.tile, scratch)


def _conv_winograd_dot(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    size = fill_in(a, t)
    t.steps = a.steps
    tiles = a.pixels
    table = _table_bytes(tiles)
    largest = _largest_strip(tiles, a.x.c)
    u = scratch + np.uintp(_HEAD)
    y = u + np.uintp(largest * _call_bytes(tiles, a.x.c))
    r = y + np.uintp(largest * table)
    sums = r + np.uintp(largest * table)
    beyond = sums + np.uintp(_sums_bytes(tiles, a.block))
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    full, few, strips = _strips(a.n, a.height, a.width, a.x.c, tiles, a.single != 0)
    begin, end = share(strips * a.chunk_count, first_part, end_part, parts)
    prepared, own = -1, 0
    for item in range(begin, end):
        strip, block = item // a.chunk_count, item % a.chunk_count
        first, last = share(full + few, strip, strip + 1, strips)
        # Calls of the microkernel, then of its twin; where what belongs to the latter begins.
        own = max(min(last, full) - first, 0)
        others = last - first - own
        u_few = u + np.uintp(own * _call_bytes(tiles, a.x.c))
        y_few, r_few = y + np.uintp(own * table), r + np.uintp(own * table)
        if strip != prepared:
            steps = (RUN, tiles * RUN, POSITIONS * tiles * RUN)
            _prepare(a, first * tiles, own, tiles, steps, u, y, r, beyond, size)
            steps = (RUN, _FEW * RUN, POSITIONS * _FEW * RUN)
            tile = full * tiles + max(first - full, 0) * _FEW
            _prepare(a, tile, others, _FEW, steps, u_few, y_few, r_few, beyond, size)
            prepared = strip
        words = np.uintp(4 * block * a.block)
        t.m, t.b, t.slopes = a.m + words, a.b + words, a.slopes + words
        t.channel = chunks[block].o0
        _columns(a, t, a.tile, tiles, own, block, u, y, r, sums, scratch)
        _columns(a, t, a.single, _FEW, others, block, u_few, y_few, r_few, sums, scratch)


@njit(error_model="numpy")
def _columns(a, t, microkernel, tiles, calls, block, u, y, r, sums, scratch):
    """Take the transformed tiles of some calls through all columns, and one block of channels."""
    of_column, of_start = POSITIONS * a.steps * a.block, 2 * 4 * a.block
    t.x_step = _call_bytes(tiles, a.x.c)
    for call in range(0, calls, _TOGETHER):
        t.blocks = min(_TOGETHER, calls - call)
        for column in (1, 2, 3, 0):
            index = 4 * block + column
            right = 1 if column == 3 else 0
            outputs = np.uintp(8 * (4 * tiles * call + right))
            t.column = column
            t.x = u + np.uintp(call * t.x_step + column * tiles * RUN)
            t.weights = a.weights + np.uintp(index * of_column)
            t.start = a.offset + np.uintp(index * of_start)
            t.y, t.r = y + outputs, r + outputs
            t.sums = sums + np.uintp(4 * tiles * a.block * 2 * right)
            call_tile(microkernel, scratch)


for _tile in MICROKERNELS.values():
    if _tile.kind in _G and _tile.pixels != _FEW:
        _is_dot = _tile.kind == "winograd_dot"
        register(
            "conv", "dot", records.CONV, _tile.name,
            supports=partial(_supports_dot if _is_dot else _supports, _tile),
            pack=partial(_pack_dot if _is_dot else _pack, _tile),
            cost=partial(_cost_dot if _is_dot else _cost, _tile),
            available=partial(getattr, _tile, "available")
            if _is_dot else partial(_available, _tile),
            scratch=partial(_scratch, _tile), pieces=partial(_pieces, _tile), looks_up=True,
        )(_conv_winograd_dot if _is_dot else _conv_winograd)  # fmt: skip
