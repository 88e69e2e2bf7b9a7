"""Exact integer Winograd convolution, F(2x2, 3x3), on byte dot products.

With the matrices of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR
2016), a tile of 2x2 outputs of a 3x3 convolution is

    4 acc = A^T [ sum over channels of (2G W (2G)^T) * (B^T x B) ] A

where x are the 4x4 codes that it reads and * is elementwise: 16 products per channel where the
direct way has 36. All of it is integers. Codes of at most T become numbers in [-2T, 2T], or [0, 4T]
where both axes add: with 2T added to the former they are uint8 up to T = 63. Weights become at most
nine times the largest |W|, which at 3 bits is int8; `_supports` looks at the integers themselves.

A call transforms the codes of a strip of tiles once; a microkernel then takes a few tiles at a
time through the 16 positions of the transform and one block of output channels, and back.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from logshift.kernels import abi, microkernels
from logshift.kernels.abi import register, share
from logshift.kernels.dot import (
    CHUNK,
    address_of,
    cut,
    fill_in,
    first_channels,
    fits_int32,
    in_reading_order,
)
from logshift.kernels.layer import Layer, Packed
from logshift.kernels.memory import aligned
from logshift.kernels.microkernels import MICROKERNELS, SEGMENT, TILE, Microkernel
from logshift.kernels.native import as_pointer, call_tile

_TWO_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32)
_POSITIONS = 16
_BOTH_ADD = 5  # the position (1, 1), the only one that has no difference of codes in it

_TILES = 6  # per call
_VECTOR = 32  # channels that are transformed together
# Bytes of transformed codes in a strip: they share the second-level cache with a block's weights.
_STRIP = 2**18
_HEAD = 256  # bytes of a slot's scratch memory for a TILE record
_TABLE = 9 * _TILES  # addresses per call: see `_prepare`
assert TILE.itemsize <= _HEAD and all(
    k.pixels == _TILES for k in MICROKERNELS.values() if k.kind == "winograd"
)


def _transformed(layer: Layer) -> np.ndarray:
    """Weights (2G) W (2G)^T, int32, (O, 16, C)."""
    kept = vars(layer)  # for `_pack`, which follows `_supports`
    if "transformed" not in kept:
        o, _, _, channels = layer.weights.shape
        kept["transformed"] = np.kron(_TWO_G, _TWO_G) @ layer.integers.reshape(o, 9, channels)
    return kept["transformed"]


def _available(tile: Microkernel) -> bool:
    """Whether the machine has the instructions, but none that multiply and add in one.

    With those the direct way is faster, by how much `_cost` does not know.
    """
    better = any(k.available for k in MICROKERNELS.values() if k.kind == "dot")
    return tile.available and not better


def _supports(tile: Microkernel, layer: Layer) -> bool:
    fits = (
        layer.weights.shape[1:3] == (3, 3)
        and layer.weights.shape[0] >= tile.channels
        and layer.strides == layer.dilations == (1, 1)
        and layer.group == 1
        and layer.activation_bits <= 6
        and 4 * layer.accumulator_bound < 2**31
        and fits_int32(layer)
    )
    if not fits:
        return False
    largest, top = int(np.abs(_transformed(layer)).max()), 4 * (2**layer.activation_bits - 1)
    # Two products of neighbouring channels are added with saturation.
    return 0 < largest <= 127 and 2 * largest * top <= 32767


def _cost(tile: Microkernel, layer: Layer) -> float:
    """Cost in channels of the direct way, as in `dot`, from what was measured.

    The products are less than half as many; what is done once per output counts the more the fewer
    input channels there are, and the transform of codes the more the fewer output channels.
    """
    computed = first_channels(tile, layer).size * tile.channels
    return computed * (0.47 + 8 / layer.weights.shape[3]) + 3


def _pack(tile: Microkernel, layer: Layer) -> Packed:
    rows = first_channels(tile, layer).reshape(-1, 1) + np.arange(tile.channels)
    channels = layer.weights.shape[3]
    steps = -(-channels // 4)
    top = 2**layer.activation_bits - 1
    transformed = _transformed(layer)
    padded = np.zeros((len(transformed), _POSITIONS, 4 * steps), np.int8)
    padded[:, :, :channels] = transformed
    # (blocks and positions, steps, channels, codes of a step)
    weights = np.ascontiguousarray(
        padded.reshape(-1, _POSITIONS, steps, 4)[rows].transpose(0, 2, 3, 1, 4)
    ).reshape(-1, steps, tile.channels, 4)
    cuts, groups, initials, begun = cut(weights, steps, 4 * top)
    stream, begins = in_reading_order(tile, weights, groups, initials)

    segments = np.zeros(len(cuts), SEGMENT)
    segments["offset"] = 4 * cuts[:, 1]
    segments["second"], segments["then"] = cuts[:, 2], cuts[:, 3]
    first_segments = np.searchsorted(cuts[:, 0], np.arange(0, len(weights), _POSITIONS))

    # Take away what was added to codes, initial values, and in all four outputs the zero point.
    start = -2 * top * transformed.sum(axis=2, dtype=np.int64)
    start[:, _BOTH_ADD] = -4 * layer.offset
    start = start[rows].transpose(0, 2, 1).reshape(-1, tile.channels) - begun

    chunks = [
        (block, 1, first_segments[block], begins[_POSITIONS * block] * stream.shape[1], 0, o0)
        for block, o0 in enumerate(rows[:, 0])
    ]

    def placed(values: np.ndarray, dtype: type) -> np.ndarray:
        out = aligned(values.shape, dtype)
        out[:] = values
        return out

    return Packed(
        {
            "weights": stream,
            "offset": placed(start, np.int32),
            "m": placed(layer.m[rows], np.float32),
            "b": placed(layer.b[rows], np.float32),
            "block": tile.channels,
            "tile": microkernels.address(tile),
            "segments": segments,
            "chunks": np.array(chunks, CHUNK),
            "chunk_count": len(chunks),
            "x_step": _group_bytes(channels) // _POSITIONS,
            "added": 2 * top,
        }
    )


@register_jitable
def _group_bytes(channels):
    """Return the bytes of the transformed codes of one call: (position, tile, channel)."""
    return _POSITIONS * _TILES * (-(-channels // _VECTOR) * _VECTOR)


@register_jitable
def _largest_strip(channels):
    """Return how many calls a strip has per block of channels, at most."""
    return max(1, _STRIP // _group_bytes(channels))


def _scratch(record: np.void) -> int:
    """Bytes of a TILE, a strip, its tables of addresses, and an output pixel beyond the edge."""
    channels = int(record["x"]["c"])
    per_call = _group_bytes(channels) + 8 * _TABLE
    return _HEAD + per_call * _largest_strip(channels) + 4 * int(record["channels"])


@register_jitable
def _strips(n, height, width, channels):
    """Return how many calls of the microkernel there are per block of channels, and strips."""
    calls = (n * ((height + 1) // 2) * ((width + 1) // 2) + _TILES - 1) // _TILES
    largest = _largest_strip(channels)
    return calls, (calls + largest - 1) // largest


def _pieces(record: np.void) -> int:
    sizes = (int(record[key]) for key in ("n", "height", "width"))
    return _strips(*sizes, int(record["x"]["c"]))[1]


def _differences(b, x):
    """B^T x, along one axis."""
    return b.sub(x[0], x[2]), b.add(x[1], x[2]), b.sub(x[2], x[1]), b.sub(x[1], x[3])


@intrinsic
def _transform(typingctx, x, row, last_row, column, last_column, channels, added, u, step):
    """Transform the codes of a tile: B^T x B, and `added` where a difference is in it.

    x is the address of its first code; row, column, last_row, last_column are bytes to the next,
    and to the last, row and column. u is the address of position 0, step bytes to the next one.
    """
    signature = types.void(x, row, last_row, column, last_column, channels, added, u, step)

    def codegen(context, b, signature, args):
        x, row, last_row, column, last_column, channels, added, u, step = args
        word = partial(ir.Constant, ir.IntType(64))
        kind = ir.VectorType(ir.IntType(8), _VECTOR)
        undefined = ir.Constant(kind, ir.Undefined)
        one = b.insert_element(undefined, b.trunc(added, kind.element), word(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR), [0] * _VECTOR)
        added = b.shuffle_vector(one, undefined, lanes)
        rows, columns = (
            [word(0), first, b.add(first, first), b.add(b.add(first, first), last)]
            for first, last in ((row, last_row), (column, last_column))
        )

        def pointer(base, *offsets):
            for offset in offsets:
                base = b.add(base, offset)
            return b.inttoptr(base, kind.as_pointer())

        with cgutils.for_range_slice(b, word(0), channels, word(_VECTOR)) as (c, _):
            halfway = [
                _differences(b, [b.load(pointer(x, r, s, c), align=1) for r in rows])
                for s in columns
            ]
            for i in range(4):
                for j, value in enumerate(_differences(b, [column[i] for column in halfway])):
                    position = 4 * i + j
                    if position != _BOTH_ADD:
                        value = b.add(value, added)
                    place = pointer(u, b.mul(step, word(position)), c)
                    b.store(value, place, align=_VECTOR)
        return context.get_dummy_value()

    return signature, codegen


@njit(error_model="numpy")
def _prepare(a, first, count, u, tables, beyond, size):
    """Transform the tiles of `count` calls, from call `first` on, and note their addresses.

    The table of a call holds those of the codes of `_TILES` tiles, of their 4 outputs each and of
    as many residuals; for outputs beyond the edge `beyond`.
    """
    tall, wide = (a.height + 1) // 2, (a.width + 1) // 2
    total = a.n * tall * wide
    padded, row_bytes = a.x_step // _TILES, a.x.w * a.x.c
    table = carray(as_pointer(tables), (count, _TABLE), np.int64)
    for call in range(count):
        for q in range(_TILES):
            # Tiles beyond the last repeat it.
            tile = min((first + call) * _TILES + q, total - 1)
            j, i, n = tile % wide * 2, tile // wide % tall * 2, tile // (wide * tall)
            below, right = i + 1 < a.height, j + 1 < a.width
            codes = np.int64(u) + call * _POSITIONS * a.x_step + q * padded
            # Of codes that only outputs beyond the edge need there may be none.
            _transform(
                address_of(a.x, n, a.row0 + i, a.column0 + j, 0, 1),
                row_bytes, row_bytes if below else 0, a.x.c, a.x.c if right else 0,
                padded, a.added, codes, a.x_step,
            )  # fmt: skip
            table[call, q] = codes
            for p in range(4):
                y, r = np.int64(beyond), np.int64(beyond)
                if (below or p < 2) and (right or p % 2 == 0):
                    row, column = (i + p // 2) * a.step_h, (j + p % 2) * a.step_w
                    y = address_of(a.y, n, a.y.top + row, a.y.left + column, 0, size)
                    r = address_of(a.r, n, a.r.top + row, a.r.left + column, 0, 1)
                table[call, _TILES + 4 * q + p] = y
                table[call, 5 * _TILES + 4 * q + p] = r


def _conv_winograd(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    scratch = a.scratch + np.uintp(slot * a.scratch_size)
    t = carray(as_pointer(scratch), 1, TILE)[0]
    size = fill_in(a, t)
    t.blocks = _POSITIONS
    largest = _largest_strip(a.x.c)
    u = scratch + np.uintp(_HEAD)
    tables = u + np.uintp(largest * _group_bytes(a.x.c))
    beyond = tables + np.uintp(largest * 8 * _TABLE)
    chunks = carray(as_pointer(a.chunks), a.chunk_count, CHUNK)
    calls, strips = _strips(a.n, a.height, a.width, a.x.c)
    begin, end = share(strips * a.chunk_count, first_part, end_part, parts)
    prepared = -1
    for item in range(begin, end):
        strip, block = item // a.chunk_count, item % a.chunk_count
        first, last = share(calls, strip, strip + 1, strips)
        if strip != prepared:
            _prepare(a, first, last - first, u, tables, beyond, size)
            prepared = strip
        chunk = chunks[block]
        words = np.uintp(4 * block * a.block)
        t.segments = a.segments + np.uintp(16 * chunk.segment)
        t.weights = a.weights + np.uintp(chunk.weights)
        t.start, t.m, t.b = a.offset + np.uintp(_POSITIONS) * words, a.m + words, a.b + words
        t.channel = chunk.o0
        for call in range(last - first):
            t.x = tables + np.uintp(8 * _TABLE * call)
            t.y, t.r = t.x + np.uintp(8 * _TILES), t.x + np.uintp(40 * _TILES)
            call_tile(a.tile, scratch)


for _tile in MICROKERNELS.values():
    if _tile.kind == "winograd":
        register(
            "conv", "dot", abi.CONV, _tile.name,
            supports=partial(_supports, _tile), pack=partial(_pack, _tile),
            cost=partial(_cost, _tile), available=partial(_available, _tile),
            scratch=_scratch, pieces=_pieces, looks_up=True,
        )(_conv_winograd)  # fmt: skip
