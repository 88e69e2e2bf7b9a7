"""The byte-dot family: convolutions on the machine's products of uint8 codes and int8 weights.

Weights are the integers W of `docs/quantization.md` section 2, which fit an int8 at 3 and 4 bits
whatever is selected; second words cost nothing. There is no im2col: a microkernel reads the runs of
bytes that a row of taps covers where they lie.

Where the machine's products are summed in int16, sums stay there for as long as the range of their
total is no wider than int16. Log-quantized weights are mostly small, so that is long: how long is
known once the weights are, and `cut` flushes sums exactly there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from logshift.kernels import records
from logshift.kernels.dot import microkernels
from logshift.kernels.dot.tiles import (
    CONTINUE,
    END,
    FLUSH,
    MICROKERNELS,
    SEGMENT,
    TILE,
    Microkernel,
    fill_in,
)
from logshift.kernels.layer import Layer, Packed, PackedReads
from logshift.kernels.machine.emit import Emitter, i64
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import aligned, placed
from logshift.kernels.machine.native import as_pointer, call_tile
from logshift.kernels.records import share
from logshift.kernels.registry import register, register_part

# Blocks of channels that one call of a microkernel takes: the first one, how many, and what begins
# where for them; x0 and o0 are input and output channels.
CHUNK = np.dtype([(n, np.int64) for n in ("block", "blocks", "segment", "weights", "x0", "o0")])
# Bytes of weights in a chunk: they stay in the first-level cache while pixels go by.
CHUNK_WEIGHTS = 16384

# Per slot: a TILE record, tables of addresses, and a tile of outputs for a block not full.
_TABLE = 8 * 40
_SCRATCH = 256 + 4 * _TABLE + 4 * 28 * 64
# Of addresses that go in one vector; a table has room for one vector more than it has pixels.
_ADDRESSES = 4
assert TILE.itemsize <= 256 and all(
    8 * (k.pixels + _ADDRESSES) <= _TABLE for k in MICROKERNELS.values()
)


# Of |W|, by the kind of microkernel: two products of 255 and 64 fit an int16, no pair saturates.
_LARGEST = {"pair": 64, "depthwise": 64, "dot": 127, "wide": 32767}


class _PackedTiles(PackedReads):
    """`places` are (segments, 1 or 2, 3): a depthwise segment reads two taps."""

    def offset(self, reads: np.ndarray, offsets: np.ndarray) -> None:
        for key, column in zip(("offset", "second"), offsets.T, strict=False):
            reads[key] = column


def fits_int32(layer: Layer) -> bool:
    """Whether every output but for the residual, before it is clamped, is within int32."""
    # Codes and their zero point are at most `top` apart.
    top = 2**layer.activation_bits - 1
    largest = layer.sums[:, 1] * top * np.abs(layer.m, dtype=np.float64) + np.abs(layer.b)
    return bool(np.all(largest < 2.0**30))  # twice as large would be: float32 rounds


def _supports(tile: Microkernel, layer: Layer) -> bool:
    fits = (
        0 < layer.largest <= _LARGEST[tile.kind]
        and layer.accumulator_bound < 2**31
        and fits_int32(layer)
    )
    return fits and layer.is_depthwise == (tile.kind == "depthwise")


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Channels computed, those beyond the last included; the larger of two equal blocks."""
    channels = layer.weights.shape[0] // layer.group
    padded = -(-channels // tile.channels) * tile.channels - tile.channels / 1000
    return padded * (2 if tile.kind == "wide" else 1)


@njit(cache=True, nogil=True, error_model="numpy")
def cut(weights, run_steps, top):
    """Cut the steps of every block into segments, and decide after which sums are flushed.

    An int16 lane that adds products with weights of positive sum P and negative sum -N ends within
    [-N * top, P * top]. If that is no wider than int16, some initial value brings all of it into
    int16, and sums on the way may wrap around.

    Parameters
    ----------
    weights : int8 (blocks, steps, channels, 2 * lanes), in runs of `run_steps`
    top : the largest input code

    Returns
    -------
    segments : int64 (segments, 4)
        Block, first step, number of steps, what then (`tiles.SEGMENT`).
    groups : int64 (blocks, steps)
        How many flushes of all blocks come before a step.
    initials : int16 (flushes, channels, lanes)
    begun : int64 (blocks, channels)
        Sums of a block's initial values.
    """
    blocks, steps, channels, size = weights.shape
    lanes, sums = size // 2, channels * size // 2
    flat = weights.reshape(blocks, steps, channels * size)
    segments = np.empty((blocks * steps, 4), np.int64)
    groups = np.empty((blocks, steps), np.int64)
    initials = np.empty((blocks * steps, sums), np.int16)
    begun = np.zeros((blocks, channels), np.int64)
    # Of each lane: P - N and P + N, up to the last step and with the next.
    total, width = np.zeros(sums, np.int32), np.zeros(sums, np.int32)
    next_total, next_width = np.empty_like(total), np.empty_like(width)
    count, group = 0, 0
    for block in range(blocks):
        first = 0
        for step in range(steps + 1):
            fits = step < steps
            if fits:
                widest = _add_step(flat[block, step], total, width, next_total, next_width)
                fits = widest * top <= 65535
            if step > first and (not fits or step % run_steps == 0):
                segments[count, 0], segments[count, 1] = block, first
                segments[count, 2] = step - first
                segments[count, 3] = END if step == steps else CONTINUE if fits else FLUSH
                count += 1
                first = step
            if not fits:
                for i in range(sums):
                    plus, minus = (width[i] + total[i]) // 2, (width[i] - total[i]) // 2
                    initial = max(-32768 + minus * top, min(0, 32767 - plus * top))
                    initials[group, i] = initial
                    begun[block, i // lanes] += initial
                total[:], width[:] = 0, 0
                group += 1
                if step == steps:
                    break
                _add_step(flat[block, step], total, width, next_total, next_width)
            groups[block, step] = group
            total, next_total = next_total, total
            width, next_width = next_width, width
    shaped = initials[:group].copy().reshape(group, channels, lanes)
    return segments[:count].copy(), groups, shaped, begun


@njit(inline="always", error_model="numpy")
def _add_step(weights, total, width, next_total, next_width):
    """Add the weights of a step to sums of W and of |W|; returns the largest of the latter."""
    widest = np.int32(0)
    for i in range(np.uintp(total.size)):
        even = np.int32(weights[np.uintp(2) * i])
        odd = np.int32(weights[np.uintp(2) * i + np.uintp(1)])
        next_total[i] = total[i] + even + odd
        sum_ = width[i] + abs(even) + abs(odd)
        next_width[i] = sum_
        widest = max(widest, sum_)
    return np.int64(widest)


def _runs(blocks: int, steps: int, run_steps: int) -> np.ndarray:
    """Return segments, as `cut` does, of sums that are never flushed on the way."""
    firsts = np.tile(np.arange(0, steps, run_steps), blocks)
    block = np.repeat(np.arange(blocks), len(firsts) // max(blocks, 1))
    then = np.where(firsts + run_steps >= steps, END, CONTINUE)
    return np.stack([block, firsts, np.minimum(run_steps, steps - firsts), then], axis=1)


def first_channels(tile: Microkernel, layer: Layer) -> np.ndarray:
    """First output channels of all blocks, (groups, blocks); the last one overlaps if need be."""
    groups = 1 if layer.is_depthwise else layer.group
    size = layer.weights.shape[0] // groups
    firsts = np.minimum(np.arange(0, size, tile.channels), max(size - tile.channels, 0))
    return firsts + size * np.arange(groups)[:, None]


def block_channels(tile: Microkernel, layer: Layer) -> np.ndarray:
    """Output channels of all blocks, (blocks, channels); -1 for those that do not exist."""
    firsts = first_channels(tile, layer)
    existing = min(tile.channels, layer.weights.shape[0] // len(firsts))
    rows = np.full((firsts.size, tile.channels), -1)
    rows[:, :existing] = firsts.reshape(-1, 1) + np.arange(existing)
    return rows


def blocked(values: np.ndarray, rows: np.ndarray, dtype: type) -> np.ndarray:
    """Return values of output channels block by block; 0 for channels that do not exist."""
    return placed(np.where(rows < 0, 0, values[rows]), dtype)


def _by_step(tile: Microkernel, layer: Layer, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights as (blocks, steps, channels, weights of a step), and where the steps' inputs lie.

    Parameters
    ----------
    rows : (blocks, channels)
        Output channels; -1 for those that do not exist.

    Returns
    -------
    weights : int8, of a "wide" tile int16
    places : (steps, 1 or 2, 3), see `_PackedTiles`
    """
    o, kh, kw, in_group = layer.weights.shape
    if tile.kind == "depthwise":
        taps = np.arange(kh * kw + kh * kw % 2)
        taps[kh * kw :] = 0  # a second tap of weight 0 for the last one
        places = np.stack([taps // kw, taps % kw, 0 * taps], axis=1).reshape(-1, 2, 3)
        runs, run, size = 1, kh * kw, 2
    else:
        runs, run, size = kh * kw // layer.run_taps, layer.run_taps * in_group, 4
        index = np.arange(runs * -(-run // size)) // -(-run // size) * layer.run_taps
        byte = np.arange(len(index)) % -(-run // size) * size
        places = np.stack([index // kw, index % kw, byte], axis=1)[:, None]
    steps = -(-run // size)
    padded = np.zeros((o + 1, runs, steps * size), np.int16 if tile.kind == "wide" else np.int8)
    padded[:o, :, :run] = layer.integers.reshape(o, runs, run)
    # What a step takes of a channel is moved as one number.
    words = padded.reshape(o + 1, -1).view(f"u{size * padded.itemsize}")
    ordered = by_block(words, rows)
    return ordered.view(padded.dtype).reshape(*ordered.shape, size), places


@njit(cache=True, nogil=True, error_model="numpy")
def by_block(words, rows):
    """Return words (O + 1, steps) as (blocks, steps, channels); row -1 is the last one."""
    blocks, channels = rows.shape
    ordered = np.empty((blocks, words.shape[1], channels), words.dtype)
    for block in range(blocks):
        for step in range(words.shape[1]):
            for c in range(channels):
                ordered[block, step, c] = words[rows[block, c], step]
    return ordered


def in_reading_order(
    tile: Microkernel, weights: np.ndarray, groups: np.ndarray, initials: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and initial values before the first step of each group, in the order of reading.

    Returns rows of int8, as long as the weights of a step, and the first row of each block.
    """
    blocks, steps, channels, size = weights.shape
    if tile.kind == "wide":  # vectors of even and of odd weights in turns
        split = weights.reshape(blocks, steps, tile.vectors, tile.lanes, 2, 2)
        ordered = np.ascontiguousarray(split.transpose(0, 1, 2, 5, 3, 4))
    elif tile.kind == "depthwise":  # bytes interleave within halves of a register
        order = np.arange(channels).reshape(2, 2, -1).transpose(1, 0, 2).ravel()
        ordered, initials = weights[:, :, order], initials[:, order]
    else:
        ordered = weights
    ordered = ordered.reshape(blocks * steps, -1).view(np.int8)
    first = np.arange(blocks) * steps
    flushes = len(initials) if tile.sums_in_int16 else 0
    stream = aligned((blocks * steps + flushes, ordered.shape[1]), np.int8)
    if not flushes:
        stream[:] = ordered
        return stream, first
    initials = np.ascontiguousarray(initials).reshape(flushes, -1).view(np.int8)
    _weave(ordered, groups.ravel(), initials, stream)
    return stream, first + groups[:, 0]


@njit(cache=True, nogil=True, error_model="numpy")
def _weave(weights, groups, initials, stream):
    """Write rows of weights, and before the first of each group its initial values."""
    at, group = 0, -1
    for step in range(len(weights)):
        if groups[step] != group:
            group = groups[step]
            stream[at] = initials[group]
            at += 1
        stream[at] = weights[step]
        at += 1


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    firsts, rows = first_channels(tile, layer), block_channels(tile, layer)
    blocks_of_group, existing = firsts.shape[1], np.count_nonzero(rows[0] >= 0)
    weights, places = _by_step(tile, layer, rows)
    steps = weights.shape[1]
    depthwise = tile.kind == "depthwise"
    top = 2**layer.activation_bits - 1
    run_steps = 1 if depthwise else -(-layer.run_taps * layer.weights.shape[3] // 4)
    if tile.sums_in_int16:
        cuts, groups, initials, begun = cut(weights, run_steps, top)
    else:
        cuts = _runs(firsts.size, steps, run_steps)
        groups, initials = np.empty((0, 0), np.int64), np.empty((0, 0, 0), np.int16)
        begun = np.zeros(rows.shape, np.int64)
    stream, begins = in_reading_order(tile, weights, groups, initials)

    segments = np.zeros(len(cuts), SEGMENT)
    segments["second"], segments["then"] = cuts[:, 2], cuts[:, 3]
    first_segments = np.searchsorted(cuts[:, 0], np.arange(firsts.size))

    together = max(1, CHUNK_WEIGHTS // (steps * stream.shape[1]))
    chunks: list[list[int]] = []
    for block in range(firsts.size):
        g, i = divmod(block, blocks_of_group)
        o0 = firsts[g, i]
        aligned_block = o0 == firsts[g, 0] + i * tile.channels
        if i and aligned_block and chunks[-1][1] < together:
            chunks[-1][1] += 1
            continue
        x0 = o0 if depthwise else g * layer.weights.shape[3]
        chunks.append([block, 1, first_segments[block], begins[block] * stream.shape[1], x0, o0])

    start = np.where(rows < 0, 0, -layer.offset[rows] - begun)
    single = MICROKERNELS.get(replace(tile, pixels=1).name)
    return _PackedTiles(
        {
            "weights": stream,
            "offset": placed(start, np.int32),
            "m": blocked(layer.m, rows, np.float32),
            "b": blocked(layer.b, rows, np.float32),
            "block": tile.channels,
            "existing": existing,
            "tile": microkernels.address(tile),
            "single": microkernels.address(single) if single else 0,
            "pixels": tile.pixels,
            "x_step": tile.channels if depthwise else 0,
            "chunks": np.array([tuple(chunk) for chunk in chunks], CHUNK),
            "chunk_count": len(chunks),
        },
        places[cuts[:, 1]],
        segments,
        "segments",
    )


@njit(inline="always", error_model="numpy")
def address_of(tensor, n, row, column, channel, size):
    """Address of a channel of a pixel of a TENSOR record; `size` bytes a channel."""
    pixel = (n * tensor.h + row) * tensor.w + column
    return np.int64(tensor.data) + size * (pixel * tensor.c + channel)


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
    for q in range(valid):
        source = carray(as_pointer(outputs + np.uintp(q * block_bytes)), block_bytes, np.uint8)
        target = carray(as_pointer(np.uintp(y[q])), block_bytes, np.uint8)
        for byte in range(np.uintp(a.existing * size)):
            target[byte] = source[byte]


@njit(error_model="numpy")
def single_pixels(a, t, valid, scratch):
    """Run the tile of one pixel for each of the few that are left."""
    x, y, r = t.x, t.y, t.r
    for _ in range(valid):
        call_tile(a.single, scratch)
        t.x, t.y, t.r = t.x + np.uintp(8), t.y + np.uintp(8), t.r + np.uintp(8)
    t.x, t.y, t.r = x, y, r


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
        x0, o0 = chunk.x0, chunk.o0
        pixel = item % strips * pixels
        j, i, n = pixel % a.width, pixel // a.width % a.height, pixel // (a.width * a.height)
        x_next = y_next = r_next = 0
        begins = True  # a row of outputs, or the call's part
        while item < last:
            valid = min(pixels, total - pixel)
            q = 0
            while q < valid:
                if begins:
                    row, column = a.row0 + i * a.stride_h, a.column0 + j * a.stride_w
                    x_next = address_of(a.x, n, row, column, x0, 1)
                    row, column = i * a.step_h, j * a.step_w
                    y_next = address_of(a.y, n, a.y.top + row, a.y.left + column, o0, size)
                    r_next = address_of(a.r, n, a.r.top + row, a.r.left + column, o0, 1)
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
    register_part("dot", _tile.name, partial(microkernels.address, _tile), _available)
    if _tile.pixels > 1 and _tile.kind in _LARGEST:
        register(
            "conv", "dot", records.CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=_available,
            scratch=lambda record: _SCRATCH, looks_up=True,
        )(_conv_tiles)  # fmt: skip
_BYTES, _INDICES = types.int8[:, ::1], types.int64[:, ::1]
_WORDS = (types.uint16, types.uint32, types.uint64)
for _name, _function, _signatures in (
    ("cut", cut, [(types.int8[:, :, :, ::1], types.int64, types.int64)]),
    (
        "by_block",
        by_block,
        [(t[:, ::1], _INDICES) for t in (types.uint16, types.uint32, types.uint64)],
    ),
    ("weave", _weave, [(_BYTES, types.int64[::1], _BYTES, _BYTES)]),
):
    for _signature in _signatures:
        register_part(
            "dot", _name, partial(_function.compile, _signature),
            lambda: any(tile.available for tile in MICROKERNELS.values()),
        )  # fmt: skip
