"""The shift family: convolutions by additions and shifts alone, for any machine.

A weight of `docs/quantization.md` is plus or minus a power of two, or two of these. So an output is

    sum over e of 2^e * (codes whose weight is +2^e, minus codes whose weight is -2^e)

Codes are laid out as a *panel*: a row for each input of an output (kernel row, kernel column,
channel), a byte for each of some output pixels. Then an output channel is a list of row numbers,
bucket by bucket: rows of a bucket are added, eight in uint8 lanes before they are widened, and sums
are shifted on the way from one exponent to the next. A weight that is zero costs nothing, a second
word one more addition, and nothing is ever multiplied but by the requantization at the end.

Eight codes of 5 bits fit a uint8. Codes of more bits are split into two digits of 4, which are
columns of the panel like other pixels. Where buckets are small, as in depthwise convolutions, rows
are widened one by one. Small groups of channels share a panel: that most weights of such a panel
are zero costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import carray, types

from logshift.kernels import records
from logshift.kernels.activation import PRELU, activated
from logshift.kernels.functions import ROUND
from logshift.kernels.layer import Layer, Packed, PackedReads
from logshift.kernels.machine.jit import njit
from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.records import share
from logshift.kernels.registry import register, register_part
from logshift.kernels.shift.adders import ADDERS, DIGIT, PIECE, Adder, add_rows, gather, scatter
from logshift.kernels.stlq.codec import exponent_levels
from logshift.kernels.walk import copy_bytes, places_of, position

_ONE_DIGIT = 5  # bits of codes that need not be split

# Rows of a panel: `PIECE` bytes from `offset` on, counted from an output pixel's first input,
# become rows from `row` on.
ROWS = np.dtype([("offset", np.int64), ("row", np.int64)])


# --- packing ------------------------------------------------------------------------------------


@njit(cache=True)
def _streams(first, second, bits, residual_shift, top, row_bytes, group):
    """Make the streams of a block of rows, channel after channel.

    Parameters
    ----------
    first, second : uint8 (channels, rows), codes of words
    top : the largest digit of an input code
    group : rows of a group

    Returns
    -------
    stream : uint16 array
    begins : int64 (channels,), where each channel's stream begins
    negative : int64 (channels,), segments that are subtracted
    """
    channels, rows = first.shape
    sign_bit = 1 << (bits - 1)
    levels = sign_bit + residual_shift
    # Every bucket may need a header of its own, and almost a group more than it has rows.
    stream = np.empty(channels * (2 * rows + (2 * levels + 1) * (4 + group)), np.uint16)
    begins, negative = np.empty(channels, np.int64), np.zeros(channels, np.int64)
    counts = np.empty((2, levels), np.int64)
    buckets = np.empty((2, levels, 2 * (rows + group)), np.int64)
    at = 0
    for c in range(channels):
        begins[c] = at
        counts[:] = 0
        for r in range(rows):
            for word in range(2):
                code = first[c, r] if word == 0 else second[c, r]
                e = np.int64(code) & (sign_bit - 1)
                if e:
                    exponent = e - 1 + (residual_shift if word == 0 else 0)
                    sign = 1 if code & sign_bit else 0
                    buckets[sign, exponent, counts[sign, exponent]] = r + 1
                    counts[sign, exponent] += 1
        _fill_up(buckets, counts, group)
        header = -1
        for sign in range(2):
            exponent = levels - 1
            while exponent >= 0:
                if counts[sign, exponent] == 0:
                    exponent -= 1
                    continue
                # A segment: as many exponents as its sum is within uint16.
                header = at
                at += 4
                total, low, groups = 0, exponent, 0
                while exponent >= 0:
                    count = counts[sign, exponent]
                    if count:
                        following = (total << (low - exponent)) + count * top
                        if total and following > 65535:
                            break
                        shift = low - exponent
                        total, low = following, exponent
                        for k in range((count + group - 1) // group * group):
                            row = buckets[sign, exponent, k] if k < count else 0
                            stream[at] = row * row_bytes + (shift if k == 0 else 0)
                            at += 1
                        groups += (count + group - 1) // group
                    exponent -= 1
                negative[c] += sign
                stream[header], stream[header + 1] = groups, low
                stream[header + 2], stream[header + 3] = 0, 65535 * sign
        if header < 0:  # nothing but zeros
            header = at
            stream[at : at + 4 + group] = 0
            stream[at] = 1
            at += 4 + group
        stream[header + 2] = 1
    return stream[:at].copy(), begins, negative


@njit(inline="always")
def _fill_up(buckets, counts, group):
    """Save groups that are not full: 2^e is two times 2^(e-1), if there is room for these."""
    for sign in range(2):
        for exponent in range(counts.shape[1] - 1, 0, -1):
            left, below = counts[sign, exponent] % group, counts[sign, exponent - 1]
            if 2 * left > -below % group:
                continue
            counts[sign, exponent] -= left
            for k in range(2 * left):
                row = buckets[sign, exponent, counts[sign, exponent] + k // 2]
                buckets[sign, exponent - 1, below + k] = row
            counts[sign, exponent - 1] += 2 * left


def _digit(bits: int) -> int:
    """Return the largest value of a digit of codes of so many bits."""
    return 2**bits - 1 if bits <= _ONE_DIGIT else 2**DIGIT - 1


def _supports(adder: Adder, layer: Layer) -> bool:
    if 0 in layer.weights.shape or layer.accumulator_bound >= 2**31:
        return False
    digits = 1 if layer.activation_bits <= _ONE_DIGIT else 2
    # Eight rows at a time take as long as about three single ones.
    buckets = 2 * exponent_levels(layer.weights.bits)
    group = 1 if math.prod(layer.weights.shape[1:]) < 2.5 * buckets else 8
    return (adder.digits, adder.group) == (digits, group)


def _groups_together(layer: Layer) -> int:
    """Return how many groups of channels share a panel: as many as fill a piece."""
    o, _, _, in_group = layer.weights.shape
    return max(1, min(layer.group, PIECE // max(in_group, o // layer.group)))


def _pieces(layer: Layer, together: int) -> tuple[np.ndarray, np.ndarray]:
    """Where pieces of at most 16 rows are read, see `_PackedRows`, and how many rows each has."""
    _, kh, kw, in_group = layer.weights.shape
    taps = layer.run_taps
    run = taps * in_group * together
    places, sizes = [], []
    for index in range(0, kh * kw, taps):
        for byte in range(0, run, PIECE):
            places.append((index // kw, index % kw, byte))
            sizes.append(min(PIECE, run - byte))
    return np.array(places), np.array(sizes)


def _blocks(adder: Adder, sizes: np.ndarray) -> np.ndarray:
    """Cut pieces into the fewest blocks that fit a panel, as `share` does; returns their edges."""
    begins = np.concatenate([[0], np.cumsum(sizes)])
    blocks = -(-int(begins[-1]) // adder.rows)
    while True:
        edges = np.arange(blocks + 1) * len(sizes) // blocks
        if np.diff(begins[edges]).max() <= adder.rows:
            return edges
        blocks += 1


def _codes_of_set(words: np.ndarray, first: int, together: int, out_group: int) -> np.ndarray:
    """Codes (channels, rows) of some groups, from (O, taps, C / group): zeros between groups."""
    taps, in_group = words.shape[1:]
    codes = np.zeros((together, out_group, taps, together, in_group), np.uint8)
    for i in range(together):
        begin = (first + i) * out_group
        codes[i, :, :, i] = words[begin : begin + out_group]
    return codes.reshape(together * out_group, -1)


def _pack(adder: Adder, layer: Layer) -> Packed:
    o, kh, kw, in_group = layer.weights.shape
    weights, out_group, together = layer.weights, o // layer.group, _groups_together(layer)
    places, sizes = _pieces(layer, together)
    edges = _blocks(adder, sizes)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    rows = 1 + begins[:-1] - np.repeat(begins[edges[:-1]], np.diff(edges))
    # Sets of groups that share a panel; the last one overlaps if need be.
    firsts = np.minimum(np.arange(0, layer.group, together), layer.group - together)
    words = [w.reshape(o, kh * kw, in_group) for w in (weights.first, weights.second)]
    streams, positions, size = [], [], 0
    negative = np.zeros(o, np.int64)
    for group in firsts:
        codes = [_codes_of_set(w, group, together, out_group) for w in words]
        channels = slice(group * out_group, (group + together) * out_group)
        negative[channels] = 0
        for begin, end in zip(begins[edges[:-1]], begins[edges[1:]], strict=True):
            first, second = (np.ascontiguousarray(c[:, begin:end]) for c in codes)
            stream, starts, subtracted = _streams(
                first, second, weights.bits, weights.residual_shift,
                _digit(layer.activation_bits), adder.lanes, adder.group,
            )  # fmt: skip
            streams.append(stream)
            positions.append(2 * (size + starts[::PIECE]))
            negative[channels] += subtracted
            size += len(stream)
    packed = aligned((size,), np.uint16)
    np.concatenate(streams, out=packed)
    # The complement of a sum is one less than its negative, in each digit.
    complements = negative * (1 if adder.digits == 1 else 1 + 2**DIGIT)
    chunks = np.zeros(len(rows), ROWS)
    chunks["row"] = rows
    return PackedReads(
        {
            "weights": packed,
            "positions": np.concatenate(positions),
            "offset": (complements - layer.offset).astype(np.int32),
            **layer.outputs,
            "sets": np.stack([firsts * in_group, firsts * out_group], axis=1),
            "set_count": len(firsts),
            "existing": together * out_group,
            "blocks": len(edges) - 1,
            "chunk_count": len(sizes),
        },
        places,
        chunks,
        "chunks",
    )


def _panels(adder: Adder, record: np.void) -> int:
    pixels = int(record["n"]) * int(record["height"]) * int(record["width"])
    return -(-pixels // adder.pixels)


# --- the kernel ---------------------------------------------------------------------------------


@njit(error_model="numpy")
def _addresses(a, first, pixels, x0, o0, x, y, r, size):
    """Note where inputs, outputs and residuals of pixels lie; those beyond the last repeat it."""
    last = a.n * a.height * a.width - 1
    n, i, j = position(a, first)
    for q in range(pixels):
        x[q], y[q], r[q] = places_of(a, n, i, j, x0, o0, 1, size)
        if first + q < last:
            j += 1
            if j == a.width:
                i, j = i + 1, 0
            if i == a.height:
                n, i = n + 1, 0


@njit(inline="always", error_model="numpy")
def _real(t, m, b, has_residual, code, z_r, m_r):
    """Requantize a sum: section 4 of `docs/quantization.md`, up to the activation function."""
    v = np.float32(t) * m
    v = v + b
    if has_residual:
        v = v + np.float32(np.int32(code) - z_r) * m_r
    return v


@njit(inline="always", error_model="numpy")
def _begin_sums(sums, start, words):
    """Begin with `start` in pixels' first digit, with 0 in their second one."""
    quarter = np.uintp(sums.size // 4)
    for q in range(np.uintp(4)):
        for i in range(np.uintp(words)):
            sums[q * quarter + i] = start
        for i in range(np.uintp(words), quarter):
            sums[q * quarter + i] = 0


@njit(inline="always", error_model="numpy")
def _join_digits(sums, words):
    words = np.uintp(words)
    for q in range(np.uintp(4)):
        first = q * np.uintp(sums.size // 4)
        for i in range(words):
            sums[first + i] += sums[first + words + i] << np.int32(DIGIT)


@njit(inline="always", error_model="numpy")
def _write_codes(a, sums, m, b, slope, is_activated, r, y, words):
    """Requantize: four codes, or residuals, make a word; their sums lie a quarter apart."""
    # Read once: for all the compiler knows, a store to y may change the record.
    lo, hi, z_r, m_r, has_residual = a.lo, a.hi, np.int32(a.z_r), a.m_r, a.has_residual != 0
    kind, coefficients = a.activation, a.coefficients
    quarter = np.uintp(sums.size // 4)
    for i in range(np.uintp(words)):
        residuals, codes = r[i], np.uint32(0)
        for q in range(4):
            byte = np.uint32(8 * q)
            code = residuals >> byte & np.uint32(255)
            t = sums[np.uintp(q) * quarter + i]
            v = _real(t, m, b, has_residual, code, z_r, m_r)
            if is_activated:
                v = activated(v, kind, slope, coefficients)
            v = min(max(v, lo), hi)
            codes |= np.uint32(np.int32((v + ROUND) - ROUND)) << byte
        y[i] = codes


@njit(error_model="numpy")
def _write_floats(a, sums, m, b, r, y, channel, count):
    quarter = sums.size // 4
    for p in range(count):
        t = sums[p % 4 * quarter + p // 4]
        v = _real(t, m, b, a.has_residual != 0, r[p], np.int32(a.z_r), a.m_r)
        y_here = carray(as_pointer(np.uintp(y[p] + 4 * channel)), 1, np.float32)
        y_here[0] = min(max(v, a.lo), a.hi)


@njit(inline="always", error_model="numpy")
def _fill_panel(a, pixels, panel, block, vector, vectors, row_bytes, digits):
    """Make the rows of a block, but for row 0, from what lies at a table's addresses."""
    chunks = carray(as_pointer(a.chunks), a.chunk_count, ROWS)
    first, end = share(a.chunk_count, block, block + 1, a.blocks)
    for k in range(first, end):
        rows = panel + np.uintp(chunks[k].row * row_bytes)
        gather(pixels, chunks[k].offset, rows, vector, vectors, row_bytes, digits)


@njit(inline="always", error_model="numpy")
def _finish(a, sums, words, digits, o, channel, valid, y, r_row, codes_row):
    """Requantize the sums of output channel o, which is written `channel` behind addresses y."""
    m = carray(as_pointer(a.m), a.channels, np.float32)
    b = carray(as_pointer(a.b), a.channels, np.float32)
    if digits == 2:
        _join_digits(sums, words)
    if a.float_output:
        r = carray(as_pointer(r_row), 4 * words, np.uint8)
        _write_floats(a, sums, m[o], b[o], r, y, channel, valid)
    else:
        r = carray(as_pointer(r_row), words, np.uint32)
        codes = carray(as_pointer(codes_row), words, np.uint32)
        slope = np.float32(0)
        if a.activation == PRELU:
            slope = carray(as_pointer(a.slopes), a.channels, np.float32)[o]
        # A loop for each: a test inside would keep the compiler from vectors.
        if a.activation:
            _write_codes(a, sums, m[o], b[o], slope, True, r, codes, words)
        else:
            _write_codes(a, sums, m[o], b[o], slope, False, r, codes, words)


@njit(inline="always", error_model="numpy")
def _put(codes, table, channel, count, valid, spare_table, vector, vectors, pixels):
    """Bring the codes of up to 16 channels, from `channel` on, to the addresses of a table."""
    if count == PIECE and valid == pixels:
        scatter(codes, table, channel, vector, vectors, pixels)
    else:
        scatter(codes, spare_table, 0, vector, vectors, pixels)
        y = carray(as_pointer(table), pixels, np.int64)
        spare = carray(as_pointer(spare_table), pixels, np.int64)
        for q in range(valid):
            copy_bytes(spare[q], y[q] + channel, count)


def _convolution(adder: Adder) -> Callable[..., None]:
    """Return the kernel of an entry of the table."""
    vector, digits, group, lanes = adder.vector, adder.digits, adder.group, adder.lanes
    vectors, pixels = adder.vectors, adder.pixels
    pixel_vectors = vectors // digits
    words = pixels // 4
    panel_bytes = _panel_bytes(adder)
    half = pixels // 2 if adder.half else 0
    half_vector, half_vectors, half_step = adder.half or (vector, vectors, vector)

    def convolution(arguments, first_part, end_part, parts, slot):
        a = carray(arguments, 1)[0]
        size = 4 if a.float_output else 1
        # Scratch memory: tables of addresses, tiles of codes, the panel, sums.
        x_at = a.scratch + np.uintp(slot * a.scratch_size)
        y_at, r_at = x_at + np.uintp(8 * pixels), x_at + np.uintp(16 * pixels)
        spare_at = x_at + np.uintp(24 * pixels)
        tile_at = x_at + np.uintp(32 * pixels)
        residual_at = tile_at + np.uintp(PIECE * pixels)
        spare_tile_at = residual_at + np.uintp(PIECE * pixels)
        panel_at = spare_tile_at + np.uintp(PIECE * pixels)
        sums_at = panel_at + np.uintp(panel_bytes)
        x = carray(as_pointer(x_at), pixels, np.int64)
        y = carray(as_pointer(y_at), pixels, np.int64)
        r = carray(as_pointer(r_at), pixels, np.int64)
        spare = carray(as_pointer(spare_at), pixels, np.int64)
        for q in range(pixels):
            spare[q] = np.int64(spare_tile_at) + PIECE * q
        row0 = carray(as_pointer(panel_at), lanes, np.uint8)
        for q in range(lanes):
            row0[q] = 0
        sets = carray(as_pointer(a.sets), (a.set_count, 2), np.int64)
        pieces = (a.existing + PIECE - 1) // PIECE  # of the output channels of a set
        positions = carray(as_pointer(a.positions), a.set_count * a.blocks * pieces, np.int64)
        start = carray(as_pointer(a.offset), a.channels, np.int32)
        total = a.n * a.height * a.width
        strips = (total + pixels - 1) // pixels
        item, end = share(strips * a.set_count * pieces, first_part, end_part, parts)
        while item < end:
            # Pieces that read the same panel.
            first = item % pieces
            last = min(pieces, first + end - item)
            number = item // pieces % a.set_count
            x0, o0 = sets[number, 0], sets[number, 1]
            pixel = item // pieces // a.set_count * pixels
            valid = min(pixels, total - pixel)
            _addresses(a, pixel, pixels, x0, o0, x, y, r, size)
            for block in range(a.blocks):
                _fill_panel(a, x_at, panel_at, block, vector, pixel_vectors, lanes, digits)
                finish = block + 1 == a.blocks
                for piece in range(first, last):
                    channel = PIECE * piece
                    count = min(PIECE, a.existing - channel)
                    position = positions[(number * a.blocks + block) * pieces + piece]
                    stream = a.weights + np.uintp(position)
                    if finish and a.has_residual:
                        gather(r_at, channel, residual_at, vector, pixel_vectors, pixels, 1)
                    for c in range(count):
                        o = o0 + channel + c
                        place = sums_at
                        if a.blocks > 1:
                            place += np.uintp(4 * lanes * (channel - PIECE * first + c))
                        sums = carray(as_pointer(place), lanes, np.int32)
                        if block == 0:
                            _begin_sums(sums, start[o], words)
                        if valid > half:
                            stream = add_rows(
                                panel_at, stream, place, vector, vectors, vector, lanes, group
                            )
                        else:
                            stream = add_rows(
                                panel_at, stream, place, half_vector, half_vectors, half_step,
                                lanes, group,
                            )  # fmt: skip
                        if finish:
                            row = np.uintp(c * pixels)
                            _finish(
                                a, sums, words, digits, o, channel + c, valid, y,
                                residual_at + row, tile_at + row,
                            )  # fmt: skip
                    if finish and not a.float_output:
                        _put(
                            tile_at, y_at, channel, count, valid, spare_at,
                            vector, pixel_vectors, pixels,
                        )  # fmt: skip
            item += last - first

    return convolution


def _scratch(adder: Adder, record: np.void) -> int:
    """Bytes of what `_convolution` lays out."""
    tables, tiles = 32 * adder.pixels, 3 * PIECE * adder.pixels
    inputs = record["kernel_h"] * record["kernel_w"] * record["x"]["c"]
    # Sums are kept from one block of rows to the next.
    channels = int(record["channels"]) if inputs > adder.rows else 1
    return tables + tiles + _panel_bytes(adder) + 4 * adder.lanes * channels


def _panel_bytes(adder: Adder) -> int:
    """Bytes of all rows, the one of zeros, and what the last piece writes too much."""
    return (1 + adder.rows + PIECE) * adder.lanes


def _cost(adder: Adder, layer: Layer) -> float:
    """Cycles for an output channel, about: wide rows are read in more blocks, narrow ones oftener.

    Every block of rows costs groups that are not full, the more the more buckets there are, and
    what begins and ends a stream.
    """
    strips, rest = divmod(layer.pixels, adder.pixels)
    last = 0.5 if adder.half and 2 * rest <= adder.pixels else 1.0
    rows = math.prod(layer.weights.shape[1:])
    blocks = -(-rows * _groups_together(layer) // adder.rows)
    ends = 15 + 5 * exponent_levels(layer.weights.bits) + 40 / adder.vectors
    panels = strips + (last if rest else 0.0)
    return panels * adder.vectors * (1.1 * rows + blocks * ends)


def _preferred(adder: Adder, layer: Layer) -> bool:
    """Whether it is faster than the portable kernels: not for depthwise, nor for a few pixels."""
    return adder.group == 8 and 2 * layer.pixels >= adder.pixels


for _adder in ADDERS.values():
    register(
        "conv", "shift", records.CONV, _adder.name,
        supports=partial(_supports, _adder), pack=partial(_pack, _adder),
        cost=partial(_cost, _adder), available=partial(getattr, _adder, "available"),
        scratch=partial(_scratch, _adder), pieces=partial(_panels, _adder),
        preferred=partial(_preferred, _adder),
    )(_convolution(_adder))  # fmt: skip
_STREAMS = (types.uint8[:, ::1], types.uint8[:, ::1], *5 * [types.int64])
register_part(
    "shift", "streams", partial(_streams.compile, _STREAMS),
    lambda: any(adder.available for adder in ADDERS.values()),
)  # fmt: skip
