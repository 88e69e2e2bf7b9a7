"""Weights in the order in which microkernels read them: steps, which are cut into segments.

Where the machine's products are summed in int16, sums stay there for as long as the range of their
total is no wider than int16. Log-quantized weights are mostly small, so that is long: how long is
known once the weights are, and `cut` flushes sums exactly there.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import types

from logshift.kernels.blocks import by_block
from logshift.kernels.dot.tiles import CONTINUE, END, FLUSH, MICROKERNELS, Microkernel
from logshift.kernels.layer import Layer
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import aligned
from logshift.kernels.registry import register_part


def by_step(tile: Microkernel, layer: Layer, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights as (blocks, steps, channels, weights of a step), and where the steps' inputs lie.

    Parameters
    ----------
    rows : (blocks, channels)
        Output channels; -1 for those that do not exist.

    Returns
    -------
    weights : int8, of a "wide" tile int16
    places : (steps, 1 or 2, 3), see `family`
    """
    o, kh, kw, in_group = layer.weights.shape
    if tile.kind == "depthwise":
        taps = np.arange(kh * kw + kh * kw % 2)
        taps[kh * kw :] = 0  # a second tap of weight 0 for the last one
        places = np.stack([taps // kw, taps % kw, 0 * taps], axis=1).reshape(-1, 2, 3)
        runs, run, size = 1, kh * kw, tile.codes
    else:
        runs, run, size = kh * kw // layer.run_taps, layer.run_taps * in_group, tile.codes
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
def cut(weights, run_steps, top, lanes, taken):
    """Cut the steps of every block into segments, and decide after which sums are flushed.

    An int16 lane that adds products with weights of positive sum P and negative sum -N ends within
    [-N * top, P * top]. If that is no wider than int16, some initial value brings all of it into
    int16, and sums on the way may wrap around.

    Parameters
    ----------
    weights : int8 (blocks, steps, channels, size), in runs of `run_steps`
    top : the largest input code
    lanes : of a channel, each of which adds neighbouring products of a step
    taken : what products take from codes, which initial values give back modulo 2^16

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
    sums, each = channels * lanes, size // lanes
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
                widest = _add_step(flat[block, step], each, total, width, next_total, next_width)
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
                    initials[group, i] = ((initial + taken * total[i] + 32768) & 65535) - 32768
                    begun[block, i // lanes] += initial
                total[:], width[:] = 0, 0
                group += 1
                if step == steps:
                    break
                _add_step(flat[block, step], each, total, width, next_total, next_width)
            groups[block, step] = group
            total, next_total = next_total, total
            width, next_width = next_width, width
    shaped = initials[:group].copy().reshape(group, channels, lanes)
    return segments[:count].copy(), groups, shaped, begun


@njit(inline="always", error_model="numpy")
def _add_step(weights, each, total, width, next_total, next_width):
    """Add the weights of a step to sums of W and of |W|; returns the largest of the latter."""
    widest = np.int32(0)
    if each == 4:
        for i in range(np.uintp(total.size)):
            sum_, sum_of_sizes = total[i], width[i]
            for k in range(np.uintp(4)):
                weight = np.int32(weights[np.uintp(4) * i + k])
                sum_, sum_of_sizes = sum_ + weight, sum_of_sizes + abs(weight)
            next_total[i], next_width[i] = sum_, sum_of_sizes
            widest = max(widest, sum_of_sizes)
        return np.int64(widest)
    for i in range(np.uintp(total.size)):
        even = np.int32(weights[np.uintp(2) * i])
        odd = np.int32(weights[np.uintp(2) * i + np.uintp(1)])
        next_total[i] = total[i] + even + odd
        sum_ = width[i] + abs(even) + abs(odd)
        next_width[i] = sum_
        widest = max(widest, sum_)
    return np.int64(widest)


def uncut(blocks: int, steps: int, run_steps: int) -> np.ndarray:
    """Return segments, as `cut` does, of sums that are never flushed on the way."""
    firsts = np.tile(np.arange(0, steps, run_steps), blocks)
    block = np.repeat(np.arange(blocks), len(firsts) // max(blocks, 1))
    then = np.where(firsts + run_steps >= steps, END, CONTINUE)
    return np.stack([block, firsts, np.minimum(run_steps, steps - firsts), then], axis=1)


def in_reading_order(
    tile: Microkernel, weights: np.ndarray, groups: np.ndarray, initials: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and initial values before the first step of each group, in the order of reading.

    Returns rows of int8, as long as the weights of a step, and the first row of each block.
    """
    blocks, steps, channels, size = weights.shape
    if tile.isa.by_lane and tile.kind in ("pair", "winograd", "wide", "depthwise"):
        # All channels of one code or tap after another; initial values are of one lane a channel.
        ordered = np.ascontiguousarray(weights.swapaxes(2, 3))
    elif tile.kind == "wide":  # vectors of even and of odd weights in turns
        split = weights.reshape(blocks, steps, tile.vectors, tile.lanes, 2, 2)
        ordered = np.ascontiguousarray(split.transpose(0, 1, 2, 5, 3, 4))
    elif tile.kind == "depthwise":  # bytes interleave within each 16 of a register
        order = np.arange(channels).reshape(-1, 2, 8).transpose(1, 0, 2).ravel()
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
    before = np.zeros((flushes, ordered.shape[1]), np.int8)  # as long as a step
    values = np.ascontiguousarray(initials).reshape(flushes, -1).view(np.int8)
    before[:, : values.shape[1]] = values
    _weave(ordered, groups.ravel(), before, stream)
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


_BYTES, _INDICES = types.int8[:, ::1], types.int64[:, ::1]
for _name, _function, _signatures in (
    ("cut", cut, [(types.int8[:, :, :, ::1], *4 * [types.int64])]),
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
