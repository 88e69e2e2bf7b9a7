"""The byte-dot family: convolutions on the machine's products of uint8 codes and int8 weights.

Weights are the integers W of `docs/quantization.md` section 2, which fit an int8 at 3 and 4 bits
whatever is selected; second words cost nothing. There is no im2col: a microkernel reads the runs of
bytes that a row of taps covers where they lie.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from logshift.kernels import records
from logshift.kernels.blocks import (
    block_channels,
    first_channels,
    outputs_by_block,
    runs_of_blocks,
)
from logshift.kernels.dot import microkernels
from logshift.kernels.dot.steps import by_step, cut, in_reading_order, uncut
from logshift.kernels.dot.tiles import (
    CHUNK,
    CHUNK_WEIGHTS,
    MICROKERNELS,
    SEGMENT,
    TILE,
    Microkernel,
    fill_in,
)
from logshift.kernels.layer import Layer, Packed, PackedReads
from logshift.kernels.machine.emit import Emitter, i64
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import placed
from logshift.kernels.machine.native import as_pointer, call_tile
from logshift.kernels.records import share
from logshift.kernels.registry import register, register_part
from logshift.kernels.walk import places_of, position, scatter_bytes, single_pixels

# Per slot: a TILE record, tables of addresses, and a tile of outputs for a block not full.
_TABLE = 8 * 40
_SCRATCH = 256 + 4 * _TABLE + 4 * 28 * 64
# Of addresses that go in one vector; a table has room for one vector more than it has pixels.
_ADDRESSES = 4
assert TILE.itemsize <= 256 and all(
    8 * (k.pixels + _ADDRESSES) <= _TABLE for k in MICROKERNELS.values()
)


# Of |W|, by the kind of microkernel: two products of 255 and 64 fit an int16, no pair saturates.
_LARGEST = {"pair": 64, "depthwise": 64, "dot": 127, "matrix": 127, "wide": 32767}


class _PackedTiles(PackedReads):
    """`places` are (segments, 1 or 2, 3): a depthwise segment reads two taps."""

    def offset(self, reads: np.ndarray, offsets: np.ndarray) -> None:
        for key, column in zip(("offset", "second"), offsets.T, strict=False):
            reads[key] = column


def _supports(tile: Microkernel, layer: Layer) -> bool:
    fits = (
        0 < layer.largest <= _LARGEST[tile.kind]
        and layer.accumulator_bound < 2**31
        and layer.fits_int32
    )
    return fits and layer.is_depthwise == (tile.kind == "depthwise")


def _single(tile: Microkernel) -> Microkernel | None:
    """Return the twin of a microkernel that takes a single pixel, if there is one."""
    return MICROKERNELS.get(replace(tile, pixels=1).name)


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Channels of the widest byte dot products that take as long, for a pixel; from measurements.

    Channels and pixels that are computed beyond the last count as others do. Single pixels wait for
    the latency of products where these are few; what goes through spare memory costs more.
    """
    channels, pixels = layer.weights.shape[0] // layer.group, max(layer.pixels, 1)
    full, left = divmod(pixels, tile.pixels)
    slots = float(tile.pixels * (full + (left > 0)))
    if channels < tile.channels:
        slots *= 1.5
    elif 3 * left <= tile.pixels and _single(tile) is not None:
        waits = tile.kind == "dot" and tile.vectors < 4
        slots = tile.pixels * full + left * (4 / tile.vectors if waits else 1)
    padded = -(-channels // tile.channels) * tile.channels
    # The larger a block, the fewer loads.
    return padded * tile.price * slots / pixels * (1 + 0.05 / tile.vectors)


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    firsts, rows = (f(tile.channels, layer) for f in (first_channels, block_channels))
    weights, places = by_step(tile, layer, rows)
    steps = weights.shape[1]
    depthwise = tile.kind == "depthwise"
    top = 2**layer.activation_bits - 1
    run_steps = 1 if depthwise else -(-layer.run_taps * layer.weights.shape[3] // tile.codes)
    if tile.sums_in_int16:
        cuts, groups, initials, begun = cut(
            weights, run_steps, top, tile.lanes_of_channel, tile.isa.taken
        )
    else:
        cuts = uncut(firsts.size, steps, run_steps)
        groups, initials = np.empty((0, 0), np.int64), np.empty((0, 0, 0), np.int16)
        begun = np.zeros(rows.shape, np.int64)
    stream, begins = in_reading_order(tile, weights, groups, initials)

    segments = np.zeros(len(cuts), SEGMENT)
    segments["second"], segments["then"] = cuts[:, 2], cuts[:, 3]
    first_segments = np.searchsorted(cuts[:, 0], np.arange(firsts.size))

    together = max(1, CHUNK_WEIGHTS // (steps * stream.shape[1]))
    chunks = [
        (
            block, blocks, first_segments[block], begins[block] * stream.shape[1],
            o0 if depthwise else group * layer.weights.shape[3], o0,
        )
        for block, blocks, group, o0 in runs_of_blocks(firsts, tile.channels, together)
    ]  # fmt: skip

    start = np.where(rows < 0, 0, -layer.offset[rows] - begun)
    if tile.kind == "dot":  # sums in int16 began with what was taken
        start += np.where(rows < 0, 0, tile.isa.taken * layer.sums[rows, 0])
    single = _single(tile)
    return _PackedTiles(
        {
            "weights": stream,
            "offset": placed(start, np.int32),
            **outputs_by_block(layer, rows),
            "block": tile.channels,
            "existing": np.count_nonzero(rows[0] >= 0),
            "tile": microkernels.address(tile, layer.is_activated),
            "single": microkernels.address(single, layer.is_activated) if single else 0,
            "pixels": tile.pixels,
            "x_step": tile.channels if depthwise else 0,
            "chunks": np.array(chunks, CHUNK),
            "chunk_count": len(chunks),
        },
        places[cuts[:, 1]],
        segments,
        "segments",
    )


@njit(error_model="numpy")
def _partial_block(a, t, y, spare, valid, size, scratch):
    """Run a tile into spare memory and copy out the channels that exist.

    The residual's channels beyond the last are whatever lies there; they affect no others.
    """
    y_table = t.y
    t.y = spare
    block_bytes = a.block * size
    targets = carray(as_pointer(spare), a.pixels, np.int64)
    outputs = spare + np.uintp(_TABLE)
    for q in range(a.pixels):
        targets[q] = np.int64(outputs) + q * block_bytes
    call_tile(a.tile, scratch)
    t.y = y_table
    scatter_bytes(outputs, block_bytes, t.y, valid, a.existing * size)


@intrinsic
def _line_up(typingctx, table, first, step, count):
    """Write int64 to a table's address: first, first + step, ...; `count`, or a few more."""

    def codegen(context, builder, signature, args):
        table, first, step, count = args
        e, kind = Emitter(builder), ir.VectorType(i64, _ADDRESSES)
        steps = builder.mul(e.splat(step, kind), ir.Constant(kind, [*range(_ADDRESSES)]))
        begin = builder.add(e.splat(first, kind), steps)
        stride = builder.mul(step, e.word(_ADDRESSES))
        before, loop = builder.block, builder.append_basic_block("addresses")
        after = builder.append_basic_block("lined_up")
        builder.branch(loop)
        builder.position_at_end(loop)
        q, values = builder.phi(i64), builder.phi(kind)
        e.store(values, builder.add(table, builder.mul(q, e.word(8))), 8)
        q_next = builder.add(q, e.word(_ADDRESSES))
        e.incoming(q, (before, e.word(0)), (loop, q_next))
        following = builder.add(values, e.splat(stride, kind))
        e.incoming(values, (before, begin), (loop, following))
        builder.cbranch(builder.icmp_signed("<", q_next, count), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(table, first, step, count), codegen


def _conv_tiles(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    block, pixels = a.block, a.pixels
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    t.x = scratch + np.uintp(256)
    t.y, t.r = t.x + np.uintp(_TABLE), t.x + np.uintp(2 * _TABLE)
    spare = t.x + np.uintp(3 * _TABLE)
    x = carray(as_pointer(t.x), pixels, np.int64)
    y = carray(as_pointer(t.y), pixels, np.int64)
    r = carray(as_pointer(t.r), pixels, np.int64)
    size = fill_in(a, t)
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    total = a.n * a.height * a.width
    strips = (total + pixels - 1) // pixels
    x_column = a.stride_w * a.x.c
    y_column, r_column = a.step_w * a.y.c * size, a.step_w * a.r.c
    begin, end = share(a.chunk_count * strips, first_part, end_part, parts)
    item = begin
    while item < end:
        chunk = chunks[item // strips]
        last = min(end, (item // strips + 1) * strips)
        words = np.uintp(4 * chunk.block * block)
        t.blocks = chunk.blocks
        t.segments = a.segments + np.uintp(16 * chunk.segment)
        t.weights = a.weights + np.uintp(chunk.weights)
        t.start, t.m, t.b = a.offset + words, a.m + words, a.b + words
        t.slopes = a.slopes + words
        x0, o0 = chunk.x0, chunk.o0
        pixel = item % strips * pixels
        n, i, j = position(a, pixel)
        x_next = y_next = r_next = 0
        begins = True  # a row of outputs, or the call's part
        while item < last:
            valid = min(pixels, total - pixel)
            q = 0
            while q < valid:
                if begins:
                    x_next, y_next, r_next = places_of(a, n, i, j, x0, o0, 1, size)
                run, place = min(valid - q, a.width - j), np.uintp(8 * q)
                _line_up(t.x + place, x_next, x_column, run)
                _line_up(t.y + place, y_next, y_column, run)
                if a.has_residual:
                    _line_up(t.r + place, r_next, r_column, run)
                x_next, y_next = x_next + run * x_column, y_next + run * y_column
                r_next += run * r_column
                q += run
                j += run
                begins = j == a.width
                if begins:
                    j = 0
                    i += 1
                    if i == a.height:
                        i = 0
                        n += 1
            if a.single != 0 and 3 * valid <= pixels and a.existing == block:
                single_pixels(a, t, valid, scratch)
            else:
                # Pixels beyond the last repeat one that is there.
                for q in range(valid, pixels):
                    x[q], y[q], r[q] = x[0], y[0], r[0]
                if a.existing == block:
                    call_tile(a.tile, scratch)
                else:
                    _partial_block(a, t, y, spare, valid, size, scratch)
            pixel += pixels
            item += 1


for _tile in MICROKERNELS.values():
    _available = partial(getattr, _tile, "available")
    for _activated in (False, True):
        register_part(
            "dot", f"{_tile.name}{' of fused functions' * _activated}",
            partial(microkernels.address, _tile, _activated), _available,
        )  # fmt: skip
    if _tile.pixels > 1 and _tile.kind in _LARGEST:
        register(
            "conv", "dot", records.CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=_available,
            scratch=lambda record: _SCRATCH, looks_up=True,
        )(_conv_tiles)  # fmt: skip
