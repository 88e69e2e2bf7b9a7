"""The byte-dot family: convolutions on the machine's dot product of uint8 codes and int8 weights.

Weights are the integers W of `docs/quantization.md` section 2, which fit an int8 at 3 and 4 bits
whatever is selected; second words cost nothing. There is no im2col: a microkernel reads the runs of
bytes that a row of taps covers where they lie.

Where the machine's dot product sums in int16, sums stay there for as long as the range of their
total is no wider than int16. Log-quantized weights are mostly small, so that is long: how long is
known once the weights are, and `_cut` ends a segment exactly there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numba import carray, njit

from logshift.kernels import abi, microkernels
from logshift.kernels.abi import register, share
from logshift.kernels.layer import Layer, Packed
from logshift.kernels.memory import aligned
from logshift.kernels.microkernels import MICROKERNELS, TILE, Microkernel
from logshift.kernels.native import as_pointer, call_tile

# Per thread: a TILE record, tables of addresses, and a tile of outputs for the last block.
_TABLE = 8 * 32
_SCRATCH = 256 + 4 * _TABLE + 4 * 28 * 64
assert TILE.itemsize <= 256 and all(k.pixels <= 32 for k in MICROKERNELS.values())


@dataclass(frozen=True, eq=False)
class _PackedDot(Packed):
    """`segments` of all blocks are (run, first quad of the run, quads)."""

    layer: Layer
    segments: np.ndarray

    def place(self, arguments: np.ndarray) -> list[np.ndarray]:
        a = arguments[0]
        pixel = int(a["x"]["c"])
        taps = self.layer.run_taps
        runs_of_row = self.layer.integers.shape[2] // taps
        row, column = self.segments[:, 0] // runs_of_row, self.segments[:, 0] % runs_of_row
        offsets = row * (int(a["dilation_h"]) * int(a["x"]["w"]) * pixel)
        offsets += column * (taps * int(a["dilation_w"]) * pixel) + 4 * self.segments[:, 1]
        table = np.stack([offsets, self.segments[:, 2]], axis=1).astype(np.int32)
        a["segments"] = table.ctypes.data
        return [table, *super().place(arguments)]


def _supports(tile: Microkernel, layer: Layer) -> bool:
    largest = int(np.abs(layer.integers).max(initial=0))
    # Two products of 255 and 64 fit an int16, so that no pair saturates.
    fits = 0 < largest <= (64 if tile.pair else 127)
    return fits and layer.accumulator_bound < 2**31 and not layer.is_depthwise


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Channels computed, those beyond the last included; the larger of two equal blocks."""
    channels = layer.integers.shape[0] // layer.group
    return -(-channels // tile.channels) * tile.channels - tile.channels / 1000


@njit(cache=True)
def _cut(weights, run_quads, top, pair, segments, initials):
    """Cut the quads of one block into segments (run, first quad of the run, quads).

    An int16 lane that adds products with weights of positive sum P and negative sum -N ends within
    [-N * top, P * top]. If that is no wider than int16, some initial value brings all of it into
    int16, and sums on the way may wrap around.

    weights : int8 (runs * run_quads, channels, 4); initials : int16 (segments, channels, 2).
    Returns how many segments there are.
    """
    channels = weights.shape[1]
    plus, minus = np.zeros((channels, 2), np.int64), np.zeros((channels, 2), np.int64)
    count = 0
    for run in range(weights.shape[0] // run_quads):
        first = 0
        for q in range(run_quads + 1):
            fits = q < run_quads
            if fits and pair:
                for c in range(channels):
                    for lane in range(2):
                        width = plus[c, lane] + minus[c, lane]
                        for byte in range(2):
                            width += abs(np.int64(weights[run * run_quads + q, c, 2 * lane + byte]))
                        fits = fits and width * top <= 65535
            if not fits:
                segments[count, 0], segments[count, 1], segments[count, 2] = run, first, q - first
                for c in range(channels):
                    for lane in range(2):
                        low, high = -minus[c, lane] * top, plus[c, lane] * top
                        initials[count, c, lane] = max(-32768 - low, min(0, 32767 - high))
                plus[:], minus[:] = 0, 0
                count += 1
                first = q
            if q < run_quads:
                for c in range(channels):
                    for byte in range(4):
                        w = np.int64(weights[run * run_quads + q, c, byte])
                        if w > 0:
                            plus[c, byte // 2] += w
                        else:
                            minus[c, byte // 2] -= w
    return count


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    w = layer.integers
    o, kh, kw, in_group = w.shape
    out_group = o // layer.group
    blocks = -(-out_group // tile.channels)
    runs, run = kh * kw // layer.run_taps, layer.run_taps * in_group
    quads = -(-run // 4)
    padded = np.zeros((layer.group, blocks * tile.channels, runs, quads * 4), np.int8)
    padded[:, :out_group, :, :run] = w.reshape(layer.group, out_group, runs, run)
    quadwise = (
        padded.reshape(layer.group * blocks, tile.channels, runs * quads, 4)
        .transpose(0, 2, 1, 3)
        .copy()
    )
    top = 2**layer.activation_bits - 1
    table = np.empty((runs * quads, 3), np.int64)
    initials = np.empty((runs * quads, tile.channels, 2), np.int16)
    cuts, streams = [], []
    start = np.zeros((layer.group, blocks * tile.channels), np.int64)
    start[:, :out_group] = -layer.offset.reshape(layer.group, out_group)
    for block, own_start in zip(quadwise, start.reshape(-1, tile.channels), strict=True):
        count = _cut(block, quads, top, tile.pair, table, initials)
        cuts.append(table[:count].copy())
        if tile.pair:
            own_start -= initials[:count].sum(axis=(0, 2), dtype=np.int64)
            for (index, first, length), initial in zip(cuts[-1], initials, strict=False):
                begin = index * quads + first
                streams.append(initial.copy().view(np.int8).ravel())
                streams.append(block[begin : begin + length].ravel())
        else:
            streams.append(block.ravel())
    stream = np.concatenate(streams)
    weights = aligned(stream.shape, np.int8)
    weights[:] = stream
    counts = np.array([len(cut) for cut in cuts], np.int64)
    # Initial values, int16 (channels, 2), are as large as a quad.
    sizes = 4 * tile.channels * (runs * quads + (counts if tile.pair else 0 * counts))

    def blocked(values: np.ndarray, dtype: type) -> np.ndarray:
        out = aligned((layer.group, blocks * tile.channels), dtype)
        out[:] = 0
        out[:, :out_group] = values.reshape(layer.group, out_group)
        return out

    start_values = aligned(start.shape, np.int32)
    start_values[:] = start
    return _PackedDot(
        {
            "weights": weights,
            "offset": start_values,
            "m": blocked(layer.m, np.float32),
            "b": blocked(layer.b, np.float32),
            "block": tile.channels,
            "tile": microkernels.address(tile),
            "pixels": tile.pixels,
            "segment_counts": counts,
            "segment_firsts": np.cumsum(counts) - counts,
            "weight_begins": np.cumsum(sizes) - sizes,
        },
        layer,
        np.concatenate(cuts),
    )


@njit(inline="always", error_model="numpy")
def _address(tensor, n, row, column, channel, size):
    pixel = (n * tensor.h + row) * tensor.w + column
    return np.int64(tensor.data) + size * (pixel * tensor.c + channel)


@njit(error_model="numpy")
def _partial_block(a, t, y, spare, valid, count, size, scratch):
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
        for byte in range(np.uintp(count * size)):
            target[byte] = source[byte]


def _conv_dot(arguments, thread, threads):
    a = carray(arguments, 1)[0]
    block, pixels = a.block, a.pixels
    scratch = a.scratch + np.uintp(thread * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    t.x = scratch + np.uintp(256)
    t.y, t.r = t.x + np.uintp(_TABLE), t.x + np.uintp(2 * _TABLE)
    spare = t.x + np.uintp(3 * _TABLE)
    x = carray(as_pointer(t.x), pixels, np.int64)
    y = carray(as_pointer(t.y), pixels, np.int64)
    r = carray(as_pointer(t.r), pixels, np.int64)
    t.z_r, t.m_r, t.lo, t.hi = np.int32(a.z_r), a.m_r, a.lo, a.hi
    t.has_residual, t.float_output = np.int32(a.has_residual), np.int32(a.float_output)
    size = 4 if a.float_output else 1
    out_group, in_group = a.channels // a.group, a.x.c // a.group
    blocks = (out_group + block - 1) // block
    counts = carray(as_pointer(a.segment_counts), a.group * blocks, np.int64)
    firsts = carray(as_pointer(a.segment_firsts), a.group * blocks, np.int64)
    begins = carray(as_pointer(a.weight_begins), a.group * blocks, np.int64)
    total = a.n * a.height * a.width
    strips = (total + pixels - 1) // pixels
    begin, end = share(a.group * blocks * strips, thread, threads)
    item = begin
    while item < end:
        index = item // strips
        last = min(end, (index + 1) * strips)
        g, i_block = index // blocks, index % blocks
        t.segments = a.segments + np.uintp(8 * firsts[index])
        t.segment_count = counts[index]
        t.weights = a.weights + np.uintp(begins[index])
        t.start = a.offset + np.uintp(4 * index * block)
        t.m, t.b = a.m + np.uintp(4 * index * block), a.b + np.uintp(4 * index * block)
        x0, o0 = g * in_group, g * out_group + i_block * block
        count = min(block, out_group - i_block * block)
        pixel = item % strips * pixels
        j, i, n = pixel % a.width, pixel // a.width % a.height, pixel // (a.width * a.height)
        while item < last:
            valid = min(pixels, total - pixel)
            for q in range(valid):
                row, column = a.row0 + i * a.stride_h, a.column0 + j * a.stride_w
                x[q] = _address(a.x, n, row, column, x0, 1)
                row, column = i * a.step_h, j * a.step_w
                y[q] = _address(a.y, n, a.y.top + row, a.y.left + column, o0, size)
                if a.has_residual:
                    r[q] = _address(a.r, n, a.r.top + row, a.r.left + column, o0, 1)
                j += 1
                if j == a.width:
                    j = 0
                    i += 1
                    if i == a.height:
                        i = 0
                        n += 1
            # Pixels beyond the last repeat one that is there.
            for q in range(valid, pixels):
                x[q], y[q], r[q] = x[0], y[0], r[0]
            if count == block:
                call_tile(a.tile, scratch)
            else:
                _partial_block(a, t, y, spare, valid, count, size, scratch)
            pixel += pixels
            item += 1


for _tile in MICROKERNELS.values():
    register(
        "conv", "dot", abi.CONV, _tile.name,
        supports=partial(_supports, _tile), pack=partial(_pack, _tile), cost=partial(_cost, _tile),
        available=partial(getattr, _tile, "available"), scratch=lambda channels: _SCRATCH,
    )(_conv_dot)  # fmt: skip
