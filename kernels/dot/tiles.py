"""Byte-dot microkernels: a tile of output pixels times blocks of output channels, emitted as IR.

A microkernel computes, for `pixels` output pixels and each of some blocks of `channels` output
channels,

    acc = start + sum over steps of x . W

and requantizes it in registers (`docs/quantization.md` section 4). Inputs are read where they lie.
The kinds differ in what a step is and in what it is summed:

    pair        4 uint8 codes of a pixel times 4 int8 weights of each channel, in int16
    dot         the same in int32, with the machine's byte dot product
    wide        the same with int16 weights, in int32
    depthwise   2 taps of each channel times their int8 weights, in int16
    winograd    as pair; blocks are positions of transformed tiles of pixels (`winograd`)
    winograd_dot    as dot, for tiles of pixels, one column of the transform at a time (`winograd`)
    rows        4 taps of each channel times their int8 weights, in int32 (`depthwise`)

Sums in int16 are modulo 2^16. A *segment* is a run of steps that are contiguous in memory; after
some segments sums are widened to int32 (*flushed*), and begin again from initial values that keep
the total until the next flush within int16 (`dot.cut`).

All are listed in `MICROKERNELS`; tests and benchmarks walk that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, f32, i8, i16, i32, i64
from logshift.kernels.machine.jit import cfunc
from logshift.kernels.machine.lookup import Lookup
from logshift.kernels.machine.targets import has_features

_I, _F, _P = np.int64, np.float32, np.uintp

# What one call needs; addresses of tables unless said otherwise.
TILE = np.dtype(
    [
        ("x", _P),  # int64 (pixels,): addresses of the first input byte of each pixel
        ("y", _P),  # int64 (pixels,): addresses of the first output channel of each pixel
        ("r", _P),  # int64 (pixels,): the same of the residual
        ("blocks", _I),  # how many, at least one; channels of one follow those of another
        ("x_step", _I),  # bytes from the input of one block to that of the next
        ("channel", _I),  # "winograd...": which of those at y and r comes first
        # "winograd_dot": column of the transform, steps of 4 codes, what columns leave each other
        ("column", _I), ("steps", _I), ("sums", _P),
        ("segments", _P),  # SEGMENT records, those of one block after those of another
        ("weights", _P),  # in the order in which they are read, see `dot`
        ("start", _P),  # int32 (blocks * channels,): minus z_x * sum of W
        ("m", _P), ("b", _P),  # float32 (blocks * channels,)
        ("table", _P),  # uint8 (256,) that codes go through at the end, or 0
        ("table_end", _P),
        # "rows": x, y and r are addresses of the first pixel, and these the bytes from pixel to
        # pixel; the last block begins so many channels after the first one.
        ("x_pixel", _I), ("y_pixel", _I), ("r_pixel", _I),
        ("x_column", _I),  # bytes from one input column to the next
        ("last", _I),
        ("windows_end", _P), ("segments_end", _P),  # of READS records, the same for all blocks
        ("z_r", np.int32), ("m_r", _F), ("lo", _F), ("hi", _F),
        ("lo_code", np.int32), ("hi_code", np.int32),  # lo and hi rounded, in each byte
        ("has_residual", np.int32), ("float_output", np.int32),
    ],
    align=True,
)  # fmt: skip
# A segment of steps of 4 codes: byte offset from the pixel's address, number of steps. A depthwise
# segment is one step: byte offsets of its two taps. What to do after it: one of the values below.
SEGMENT = np.dtype([("offset", np.int32), ("second", np.int32), ("then", np.int32), ("", np.int32)])
CONTINUE, FLUSH, END = 0, 1, 2
# What a "rows" kernel reads: byte offsets from the pixel's address of the rows of a window, or of
# four taps.
READS = np.dtype([("offset", np.int32, 4)])
# Bytes of codes of one transformed tile and position that lie side by side for "winograd_dot".
RUN = 64

_OFFSETS = {name: TILE.fields[name][1] for name in TILE.names}  # type: ignore[index, union-attr]


@dataclass(frozen=True, eq=False)
class Microkernel:
    """One entry of the table: `<pixels>x<channels>` of a kind on an instruction set."""

    isa: str
    kind: str
    pixels: int
    vectors: int  # of output channels
    lanes: int  # int32 per vector
    features: tuple[str, ...]
    window: tuple[int, int, int] | None = None  # of "rows": rows, columns, stride of columns

    @property
    def channels(self) -> int:
        """Output channels per block."""
        return self.vectors * self.lanes

    @property
    def name(self) -> str:
        """Instruction set, kind where it is not the instruction set's own, and tile."""
        kind = "" if self.kind in ("pair", "dot") else f"{self.kind.removesuffix('_dot')}-"
        if self.kind == "rows":
            window = "{}x{}s{}".format(*self.window) if self.window else ""
            kind = f"depthwise{window}-"
        return f"{self.isa}-{kind}{self.pixels}x{self.channels}"

    @property
    def sums_in_int16(self) -> bool:
        """Whether sums must be flushed to int32 in time."""
        return self.kind in ("pair", "depthwise", "winograd")

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return has_features(self.features)


@intrinsic(prefer_literal=True)
def _tile(typingctx, arguments, name):
    """Emit the microkernel of a name; takes the address of a TILE record."""

    def codegen(context, builder, signature, args):
        kernel = MICROKERNELS[name.literal_value]
        kinds = {
            "depthwise": _Depthwise, "rows": _Rows,
            "winograd": _Winograd, "winograd_dot": _WinogradDot,
        }  # fmt: skip
        kinds.get(kernel.kind, _Emission)(kernel, builder, args[0]).emit()
        return context.get_dummy_value()

    return types.void(arguments, name), codegen


class _Emission(Emitter):
    """The body of one microkernel, in LLVM IR."""

    def __init__(self, kernel: Microkernel, builder: ir.IRBuilder, arguments: Any) -> None:
        super().__init__(builder)
        self.k, self.base = kernel, arguments
        n = kernel.lanes
        self.int32s, self.int16s = ir.VectorType(i32, n), ir.VectorType(i16, 2 * n)
        self.bytes, self.floats = ir.VectorType(i8, 4 * n), ir.VectorType(f32, n)
        self.tiles = [(i, j) for i in range(kernel.pixels) for j in range(kernel.vectors)]
        # Accumulators: pixel, vector; depthwise ones hold twice as many channels.
        self.sums = [
            (i, j)
            for i in range(kernel.pixels)
            for j in range(kernel.vectors // (2 if kernel.kind == "depthwise" else 1))
        ]

    def field(self, name: str, kind: ir.Type = i64) -> Any:
        offset = _OFFSETS[name]
        return self.load(self.b.add(self.base, self.word(offset)), kind, _size(kind))

    # --- steps ----------------------------------------------------------------------------------

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights of one step."""
        return 4 * self.k.channels * (2 if self.k.kind == "wide" else 1)

    def multiply_pairs(self, x: Any, w: Any) -> Any:
        """Sum neighbouring products of uint8 and int8 into int16."""
        name = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
        return self.intrinsic(name[self.k.lanes], self.int16s, [x, w])

    def multiply_wide_pairs(self, x: Any, w: Any) -> Any:
        """Sum neighbouring products of int16 into int32."""
        name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
        return self.intrinsic(name[self.k.lanes], self.int32s, [x, w])

    def byte_dot(self, acc: Any, x: Any, w: Any) -> Any:
        name = {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}
        if llvm_version_info[0] < 21:  # which took the bytes as int32
            x, w = self.b.bitcast(x, self.int32s), self.b.bitcast(w, self.int32s)
        return self.intrinsic(name[self.k.lanes], self.int32s, [acc, x, w])

    def rows(self, bases: list[Any], q: Any) -> Iterator[Any]:
        """Yield where the codes of a step lie; q is the step's offset from those of a pixel."""
        b = self.b
        # More addresses than registers would be copied to the stack first, and read from there.
        # What is read from their table atomically is read where it is needed.
        again = self.k.pixels > 6 and self.k.kind != "winograd"
        table = self.field("x")
        for i, base in enumerate(bases):
            if again:
                place = b.inttoptr(b.add(table, self.word(8 * i)), ir.PointerType(i64))
                base = b.load_atomic(place, "monotonic", 8)
            yield b.add(base, q)

    def step(self, acc: dict, rows: Iterable[Any], w: Any) -> dict:
        """Add the products of 4 codes of each pixel; the weights of the step begin at w."""
        b, size = self.b, 4 * self.k.lanes
        count = self.step_bytes // size
        vectors = [self.load(b.add(w, self.word(size * v)), self.bytes, size) for v in range(count)]
        new = {}
        for i, row in enumerate(rows):
            x = b.bitcast(self.splat(self.load(row, i32, 1), self.int32s), self.bytes)
            if self.k.kind == "wide":
                codes = b.bitcast(x, self.int16s)
                even = b.and_(codes, self.constant(255, self.int16s))
                odd = b.lshr(codes, self.constant(8, self.int16s))
            for j in range(self.k.vectors):
                if self.k.kind in ("pair", "winograd"):
                    new[i, j] = b.add(acc[i, j], self.multiply_pairs(x, vectors[j]))
                elif self.k.kind in ("dot", "winograd_dot"):
                    new[i, j] = self.byte_dot(acc[i, j], x, vectors[j])
                else:
                    w_even, w_odd = (b.bitcast(vectors[2 * j + p], self.int16s) for p in (0, 1))
                    total = b.add(acc[i, j], self.multiply_wide_pairs(even, w_even))
                    new[i, j] = b.add(total, self.multiply_wide_pairs(odd, w_odd))
        return new

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the steps of a segment; returns sums and the end of the weights."""
        b = self.b
        begin = b.sext(self.load(segment, i32, 4), i64)
        count = b.sext(self.load(b.add(segment, self.word(4)), i32, 4), i64)
        end = b.add(begin, b.mul(count, self.word(4)))

        def step(acc: dict, q: Any, w: Any) -> tuple[Any, Any, dict]:
            new = self.step(acc, self.rows(bases, q), w)
            return b.add(q, self.word(4)), b.add(w, self.word(self.step_bytes)), new

        # Outside of the loop, the first step reads its sums from memory and copies none.
        first = step(acc, begin, w)
        before, loop = b.block, b.append_basic_block("step")
        after = b.append_basic_block("stepped")
        b.cbranch(b.icmp_signed("<", first[0], end), loop, after)
        b.position_at_end(loop)
        q, w_q = b.phi(i64), b.phi(i64)
        held = {t: b.phi(value.type) for t, value in acc.items()}
        following = step(held, q, w_q)
        self.incoming(q, (before, first[0]), (b.block, following[0]))
        self.incoming(w_q, (before, first[1]), (b.block, following[1]))
        for t, phi in held.items():
            self.incoming(phi, (before, first[2][t]), (b.block, following[2][t]))
        b.cbranch(b.icmp_signed("<", following[0], end), loop, after)
        b.position_at_end(after)
        sums = {t: b.phi(value.type) for t, value in acc.items()}
        for t, phi in sums.items():
            self.incoming(phi, (before, first[2][t]), (loop, following[2][t]))
        return sums, b.add(w, b.mul(count, self.word(self.step_bytes)))

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the int32 sums of a tile's vector."""
        if self.k.sums_in_int16:
            return self.multiply_wide_pairs(acc[tile], self.constant(1, self.int16s))
        return acc[tile]

    # --- the kernel -----------------------------------------------------------------------------

    def emit(self) -> None:
        b, k = self.b, self.k
        size = 4 * k.lanes
        x_table, blocks, x_step = self.field("x"), self.field("blocks"), self.field("x_step")
        begin = (self.field("segments"), self.field("weights"))
        entry = b.block
        names = ("block", "group", "more", "ran", "flush", "end", "next", "done")
        at = {name: b.append_basic_block(name) for name in names}
        # Sums in int32 between flushes; until the first one `start`, which is added in its place.
        with b.goto_entry_block():
            slots = b.alloca(ir.ArrayType(self.int32s, len(self.tiles)))
            slots.align = size
        slots = b.ptrtoint(slots, i64)
        b.branch(at["block"])

        b.position_at_end(at["block"])
        index, s_block, w_block = (b.phi(i64) for _ in range(3))
        channel = b.mul(index, self.word(k.channels))
        bytes_of_words = b.mul(channel, self.word(4))
        start = b.add(self.field("start"), bytes_of_words)
        x_offset = b.mul(index, x_step)
        bases = [b.add(self.at(x_table, i), x_offset) for i in range(k.pixels)]
        b.branch(at["group"])

        b.position_at_end(at["group"])
        s_group, w_group, held_at, held_step = (b.phi(i64) for _ in range(4))
        kind, place = (self.int16s, w_group) if k.sums_in_int16 else (self.int32s, start)
        columns = 1 + max(j for _, j in self.sums)
        initial = [self.load(b.add(place, self.word(size * j)), kind, size) for j in range(columns)]
        w_first = b.add(w_group, self.word(size * columns if k.sums_in_int16 else 0))
        first, w_ran = self.run({t: initial[t[1]] for t in self.sums}, bases, s_group, w_first)
        group_end = b.block
        b.branch(at["ran"])

        b.position_at_end(at["ran"])
        s, w = b.phi(i64), b.phi(i64)
        acc = {t: b.phi(value.type) for t, value in first.items()}
        then = self.load(b.add(s, self.word(8)), i32, 4)
        s_next = b.add(s, self.word(SEGMENT.itemsize))
        choice = b.switch(then, at["end"])
        choice.add_case(ir.Constant(i32, CONTINUE), at["more"])
        choice.add_case(ir.Constant(i32, FLUSH), at["flush"])

        b.position_at_end(at["more"])
        more, w_more = self.run(acc, bases, s_next, w)
        self.incoming(s, (group_end, s_group), (b.block, s_next))
        self.incoming(w, (group_end, w_ran), (b.block, w_more))
        for t, phi in acc.items():
            self.incoming(phi, (group_end, first[t]), (b.block, more[t]))
        b.branch(at["ran"])

        b.position_at_end(at["flush"])
        if k.sums_in_int16:
            for number, t in enumerate(self.tiles):
                total = self.total(acc, t, held_at, held_step)
                self.store(total, b.add(slots, self.word(size * number)), size)
            b.branch(at["group"])
        else:
            b.unreachable()

        b.position_at_end(at["end"])
        self.epilogue(lambda t: self.total(acc, t, held_at, held_step), channel, bytes_of_words)
        b.branch(at["next"])
        b.position_at_end(at["next"])
        index_next = b.add(index, self.word(1))
        b.cbranch(b.icmp_signed("<", index_next, blocks), at["block"], at["done"])
        b.position_at_end(at["done"])

        self.incoming(index, (entry, self.word(0)), (at["next"], index_next))
        self.incoming(s_block, (entry, begin[0]), (at["next"], s_next))
        self.incoming(w_block, (entry, begin[1]), (at["next"], w))
        for phi, value, following in (
            (s_group, s_block, s_next),
            (w_group, w_block, w),
            (held_at, start, slots),
            (held_step, self.word(0), self.word(size * k.vectors)),
        ):
            self.incoming(phi, (at["block"], value))
            if k.sums_in_int16:
                self.incoming(phi, (at["flush"], following))

    def total(self, acc: dict, tile: tuple[int, int], held_at: Any, held_step: Any) -> Any:
        """Return a vector's int32 total so far."""
        b, (i, j) = self.b, tile
        widened = self.widen(acc, tile)
        if not self.k.sums_in_int16:
            return widened
        size = 4 * self.k.lanes
        place = b.add(held_at, b.add(b.mul(held_step, self.word(i)), self.word(size * j)))
        return b.add(self.load(place, self.int32s, size), widened)

    def epilogue(self, total: Callable, channel: Any, bytes_of_words: Any) -> None:
        """Requantize the tile: y = t * M + B (+ residual), clamp, round, look up, store."""
        b = self.b
        is_float = b.icmp_signed("!=", self.field("float_output", i32), ir.Constant(i32, 0))
        table = self.field("table")

        def with_or_without_residual(store: Callable) -> None:
            residual = b.icmp_signed("!=", self.field("has_residual", i32), ir.Constant(i32, 0))
            with b.if_else(residual) as branches:
                for branch, has_residual in zip(branches, (True, False), strict=True):
                    with branch:
                        value = self.scaled(total, channel, bytes_of_words, has_residual)
                        store(value, has_residual)

        # One piece of code for each case: tests inside would cost registers.
        with b.if_else(is_float) as (floats, codes):
            with floats:
                with_or_without_residual(lambda value, _: self.store_floats(value, channel))
            with codes, b.if_else(b.icmp_unsigned("==", table, self.word(0))) as (plain, look_up):
                with plain:
                    with_or_without_residual(
                        lambda value, residual: self.store_codes(value, channel, residual)
                    )
                with look_up:
                    with_or_without_residual(
                        lambda value, residual: self.store_codes(value, channel, residual, table)
                    )

    def scaled(
        self, total: Callable, channel: Any, bytes_of_words: Any, residual: bool
    ) -> Callable[[tuple[int, int]], Any]:
        """Return what computes a vector of real-valued outputs, unclamped, when it is called."""
        b, k = self.b, self.k
        size = 4 * k.lanes
        m, bias = (b.add(self.field(n), bytes_of_words) for n in ("m", "b"))
        if residual:
            r = self.places("r", channel)
            z_r = self.splat(self.field("z_r", i32), self.int32s)
            m_r = self.splat(self.field("m_r", f32), self.floats)

        def compute(tile: tuple[int, int]) -> Any:
            i, j = tile
            scale = self.load(b.add(m, self.word(size * j)), self.floats, size)
            shift = self.load(b.add(bias, self.word(size * j)), self.floats, size)
            v = b.fadd(b.fmul(b.sitofp(total(tile), self.floats), scale), shift)
            if not residual:
                return v
            address = b.add(r(i), self.word(k.lanes * j))
            codes = self.load(address, ir.VectorType(i8, k.lanes), 1)
            t = b.sitofp(b.sub(b.zext(codes, self.int32s), z_r), self.floats)
            return b.fadd(v, b.fmul(t, m_r))

        return compute

    def places(self, name: str, offset: Any) -> Callable[[int], Any]:
        """Return what gives the address of a pixel's outputs, or residuals, from an offset on."""
        table = self.field(name)
        return lambda i: self.b.add(self.at(table, i), offset)

    def least(self, v: Any, bound: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", v, bound), v, bound)

    def greatest(self, v: Any, bound: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", v, bound), v, bound)

    def store_floats(self, value: Callable, channel: Any) -> None:
        b, size = self.b, 4 * self.k.lanes
        lo, hi = (self.splat(self.field(n, f32), self.floats) for n in ("lo", "hi"))
        y = self.places("y", b.mul(channel, self.word(4)))
        for i, j in self.tiles:
            v = self.least(self.greatest(value((i, j)), lo), hi)
            self.store(v, b.add(y(i), self.word(size * j)), 4)

    def store_codes(self, value: Callable, channel: Any, residual: bool, table: Any = None) -> None:
        """Round vectors, four together because the machine packs them, and store."""
        b, k = self.b, self.k
        y = self.places("y", channel)
        lookup = None if table is None else Lookup(self, table, self.field("table_end"))
        for first in range(0, len(self.tiles), 4):
            tiles = self.tiles[first : first + 4]
            codes = self.rounded([value(t) for t in tiles], residual)
            if lookup is not None:
                (codes,) = lookup([codes])
            # Vectors of one pixel lie side by side, here and in memory.
            for i in dict.fromkeys(i for i, _ in tiles):
                numbers = [number for number, t in enumerate(tiles) if t[0] == i]
                begin, end = numbers[0] * k.lanes, (numbers[-1] + 1) * k.lanes
                part = self.shuffle(codes, codes, [*range(begin, end)])
                offset = self.word(k.lanes * tiles[numbers[0]][1])
                self.store(part, b.add(y(i), offset), 1)

    def rounded(self, values: list[Any], residual: bool) -> Any:
        """Clamp, round half to even, and join to one vector of uint8.

        Packing saturates, and lo and hi act on codes. What is below the range of int32 converts to
        the least int32, and so would be what is above: only a residual can make it so large
        (`dot.fits_int32`), and then hi comes first.
        """
        b = self.b
        if residual:
            hi = self.splat(self.field("hi", f32), self.floats)
            values = [self.least(v, hi) for v in values]
        words = [self.nearest(v) for v in values]
        words += words[:1] * (4 - len(words))
        isa, size = ("avx2", "") if self.k.lanes == 8 else ("avx512", ".512")
        to_words, to_bytes = f"llvm.x86.{isa}.packssdw{size}", f"llvm.x86.{isa}.packuswb{size}"
        pairs = [self.intrinsic(to_words, self.int16s, words[p : p + 2]) for p in (0, 2)]
        packed = b.bitcast(self.intrinsic(to_bytes, self.bytes, pairs), self.int32s)
        # Packing works within 16 bytes of the register.
        order = [4 * part + v for v in range(4) for part in range(self.k.lanes // 4)]
        codes = b.bitcast(self.shuffle(packed, packed, order), self.bytes)
        lo, hi_code = (
            b.bitcast(self.splat(self.field(name, i32), self.int32s), self.bytes)
            for name in ("lo_code", "hi_code")
        )
        codes = b.select(b.icmp_unsigned(">", codes, lo), codes, lo)
        return codes if residual else b.select(b.icmp_unsigned("<", codes, hi_code), codes, hi_code)

    def nearest(self, v: Any) -> Any:
        """Round a vector of floats half to even, to int32."""
        if self.k.lanes == 8:
            return self.intrinsic("llvm.x86.avx.cvt.ps2dq.256", self.int32s, [v])
        unused, all_lanes = self.constant(0, self.int32s), ir.Constant(i16, -1)
        arguments = [v, unused, all_lanes, ir.Constant(i32, 4)]  # 4: as the thread rounds
        return self.intrinsic("llvm.x86.avx512.mask.cvtps2dq.512", self.int32s, arguments)


class _Depthwise(_Emission):
    """Steps of two taps of every channel."""

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        b, size = self.b, 4 * self.k.lanes
        offsets = [b.sext(self.load(b.add(segment, self.word(4 * p)), i32, 4), i64) for p in (0, 1)]
        vectors = [self.load(b.add(w, self.word(size * half)), self.bytes, size) for half in (0, 1)]
        new = {}
        half_lane = self.bytes.count // 4
        for i, base in enumerate(bases):
            x = [self.load(b.add(base, offset), self.bytes, 1) for offset in offsets]
            for half in (0, 1):
                # Interleaves within halves of the register, as the machine does.
                lanes = [
                    lane + 2 * half_lane * part + half_lane * half + tap * self.bytes.count
                    for part in (0, 1)
                    for lane in range(half_lane)
                    for tap in (0, 1)
                ]
                pairs = self.multiply_pairs(self.shuffle(x[0], x[1], lanes), vectors[half])
                new[i, half] = b.add(acc[i, half], pairs)
        return new, b.add(w, self.word(2 * size))

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        i, j = tile
        held, n = acc[i, j % 2], self.k.lanes
        half = [*range(j // 2 * n, j // 2 * n + n)]
        return self.b.sext(self.shuffle(held, held, half), self.int32s)


class _Winograd(_Emission):
    """Blocks are the 16 positions of `pixels` transformed tiles, each of which has 4 outputs.

    The tables y and r hold the addresses of 4 pixels per tile; the record's y and r move past them.
    """

    def emit(self) -> None:
        b, k = self.b, self.k
        size = 4 * k.lanes
        with b.goto_entry_block():
            products = b.alloca(ir.ArrayType(self.int32s, 16 * len(self.tiles)))
            products.align = size
        self.products = b.ptrtoint(products, i64)
        super().emit()
        before, loop, done = b.block, b.append_basic_block("tile"), b.append_basic_block("tiled")
        b.branch(loop)
        b.position_at_end(loop)
        index = b.phi(i64)
        tile = b.add(self.products, b.mul(index, self.word(4 * k.channels)))
        outputs = {}
        for j in range(k.vectors):
            places = [4 * k.channels * k.pixels * p + size * j for p in range(16)]
            at = [self.load(b.add(tile, self.word(place)), self.int32s, size) for place in places]
            columns = [self.combined(at[column::4]) for column in range(4)]
            for row in (0, 1):
                for column, total in enumerate(self.combined([c[row] for c in columns])):
                    # Transformed weights are four times too large.
                    outputs[2 * row + column, j] = b.ashr(total, self.constant(2, self.int32s))
        self.tiles = sorted(outputs)
        super().epilogue(lambda t: outputs[t], self.field("channel"), self.word(0))
        for name in ("y", "r"):
            address = b.add(self.base, self.word(_OFFSETS[name]))
            self.store(b.add(self.field(name), self.word(8 * 4)), address, 8)
        index_next = b.add(index, self.word(1))
        self.incoming(index, (before, self.word(0)), (b.block, index_next))
        b.cbranch(b.icmp_signed("<", index_next, self.word(k.pixels)), loop, done)
        b.position_at_end(done)

    def combined(self, m: list[Any]) -> tuple[Any, Any]:
        """Return two outputs of four products, along one axis."""
        b = self.b
        return b.add(b.add(m[0], m[1]), m[2]), b.sub(b.sub(m[1], m[2]), m[3])

    def epilogue(self, total: Callable, channel: Any, bytes_of_words: Any) -> None:
        """Keep the products of one position."""
        b, size = self.b, 4 * self.k.lanes
        begin = b.add(self.products, b.mul(bytes_of_words, self.word(self.k.pixels)))
        for number, t in enumerate(self.tiles):
            self.store(total(t), b.add(begin, self.word(size * number)), size)


class _WinogradDot(_Emission):
    """One column of the 16 positions of `blocks` times `pixels` transformed tiles of pixels.

    With M the products of a position, down a column

        V0 = (M1 + M2) / 2 + M0        V1 = (M1 - M2) / 2 - M3

    and along a row of these, in the same way, two outputs. Sums and differences of M1 and M2 are
    even, M3 is summed with its sign turned. Columns 1, 2, 3 and 0 are calls in this order; what
    they leave to each other lies at `sums`, 4 vectors for each tile and vector of channels, of
    which column 3 begins with the third. The records y and r have 4 outputs per tile, row by row.
    """

    def emit(self) -> None:
        b, k = self.b, self.k
        size = 4 * k.lanes
        column, count, start = self.field("column"), self.field("steps"), self.field("start")
        calls, x_step, weights = self.field("blocks"), self.field("x_step"), self.field("weights")
        begin = (self.word(0), self.field("x"), self.field("sums"))
        entry = b.block
        names = ("call", "onto", "outer", "keep", "join", "finish", "next", "done")
        at = {name: b.append_basic_block(name) for name in names}
        b.branch(at["call"])

        b.position_at_end(at["call"])
        index, x, held = (b.phi(i64) for _ in begin)

        def place(n: int, i: int, j: int) -> Any:
            return b.add(held, self.word(size * (k.vectors * (k.pixels * n + i) + j)))

        def initial(n: int, j: int) -> Any:
            return self.load(b.add(start, self.word(size * (k.vectors * n + j))), self.int32s, size)

        acc = {(n + 1, i, j): initial(n, j) for n in (0, 1) for i, j in self.tiles}
        acc, w = self.products(acc, x, weights, count)
        inner = {}
        for i, j in self.tiles:
            inner[0, i, j], inner[3, i, j] = self.halved(acc[1, i, j], acc[2, i, j])
        is_inner = b.icmp_unsigned("<=", b.sub(column, self.word(1)), self.word(1))
        inner_end = b.block
        b.cbranch(is_inner, at["onto"], at["outer"])

        b.position_at_end(at["outer"])
        outer = {}
        for (row, i, j), value in inner.items():
            kept = self.load(place(row // 3, i, j), self.int32s, size)
            outer[row, i, j] = b.add(kept, value)
        b.branch(at["onto"])

        b.position_at_end(at["onto"])
        acc = {t: b.phi(self.int32s) for t in inner}
        for t, phi in acc.items():
            self.incoming(phi, (inner_end, inner[t]), (at["outer"], outer[t]))
        acc, _ = self.products(acc, x, w, count)
        choice = b.switch(column, at["finish"])
        choice.add_case(self.word(1), at["keep"])
        choice.add_case(self.word(2), at["join"])

        b.position_at_end(at["keep"])
        for (row, i, j), value in acc.items():
            self.store(value, place(row // 3, i, j), size)
        b.branch(at["next"])

        b.position_at_end(at["join"])
        for (row, i, j), value in acc.items():
            kept = self.load(place(row // 3, i, j), self.int32s, size)
            for n, half in enumerate(self.halved(kept, value)):
                self.store(half, place(row // 3 + 2 * n, i, j), size)
        b.branch(at["next"])

        b.position_at_end(at["finish"])
        outputs = {(4 * i + 2 * (row // 3), j): value for (row, i, j), value in acc.items()}
        self.tiles = sorted(outputs)
        self.epilogue(lambda t: outputs[t], self.field("channel"), self.word(0))
        for name in ("y", "r"):
            address = b.add(self.base, self.word(_OFFSETS[name]))
            self.store(b.add(self.field(name), self.word(8 * 4 * k.pixels)), address, 8)
        b.branch(at["next"])

        b.position_at_end(at["next"])
        following = (
            b.add(index, self.word(1)),
            b.add(x, x_step),
            b.add(held, self.word(4 * size * k.vectors * k.pixels)),
        )
        for phi, first, value in zip((index, x, held), begin, following, strict=True):
            self.incoming(phi, (entry, first), (at["next"], value))
        b.cbranch(b.icmp_signed("<", following[0], calls), at["call"], at["done"])
        b.position_at_end(at["done"])

    def halved(self, first: Any, second: Any) -> tuple[Any, Any]:
        """Return half the sum of two vectors, which is even, and half their difference."""
        half = self.b.ashr(self.b.add(first, second), self.constant(1, self.int32s))
        return half, self.b.sub(half, second)

    def products(self, acc: dict, x: Any, w: Any, count: Any) -> tuple[dict, Any]:
        """Add products to sums of (row, tile, vector); returns these and the end of the weights."""
        b = self.b
        rows = list(dict.fromkeys(row for row, _, _ in acc))
        begin, position = b.block, RUN * self.k.pixels
        run, loop, ran, done = (b.append_basic_block(n) for n in ("run", "step", "ran", "done"))
        b.branch(run)

        b.position_at_end(run)
        x_run, w_run, left = (b.phi(i64) for _ in range(3))
        run_acc = {t: b.phi(self.int32s) for t in acc}
        few = b.icmp_signed("<", left, self.word(RUN // 4))
        end = b.add(x_run, b.mul(b.select(few, left, self.word(RUN // 4)), self.word(4)))
        b.branch(loop)

        b.position_at_end(loop)
        q, w_q = b.phi(i64), b.phi(i64)
        new = held = {t: b.phi(self.int32s) for t in acc}
        w_next = w_q
        for row in rows:
            codes = [
                b.add(q, self.word(4 * position * row + RUN * i)) for i in range(self.k.pixels)
            ]
            sums = self.step({(i, j): held[row, i, j] for i, j in self.tiles}, codes, w_next)
            new = new | {(row, i, j): value for (i, j), value in sums.items()}
            w_next = b.add(w_next, self.word(self.step_bytes))
        q_next = b.add(q, self.word(4))
        b.cbranch(b.icmp_unsigned("<", q_next, end), loop, ran)

        b.position_at_end(ran)
        x_next = b.add(x_run, self.word(16 * position))
        left_next = b.sub(left, self.word(RUN // 4))
        b.cbranch(b.icmp_signed(">", left_next, self.word(0)), run, done)
        b.position_at_end(done)
        self.incoming(x_run, (begin, x), (ran, x_next))
        self.incoming(w_run, (begin, w), (ran, w_next))
        self.incoming(left, (begin, count), (ran, left_next))
        self.incoming(q, (run, x_run), (loop, q_next))
        self.incoming(w_q, (run, w_run), (loop, w_next))
        for t in acc:
            self.incoming(run_acc[t], (begin, acc[t]), (ran, new[t]))
            self.incoming(held[t], (run, run_acc[t]), (loop, new[t]))
        return new, w_next


class _Rows(_Emission):
    """Pixels side by side in a row of outputs; a lane is 4 taps of a channel.

    Where there is a window, a record of READS tells the rows of one: each of its columns is loaded
    and interleaved once for all pixels that it is part of. Other records are 4 taps of every pixel.
    """

    def emit(self) -> None:
        b, k = self.b, self.k
        size = 4 * k.lanes
        x, blocks, last = (self.field(name) for name in ("x", "blocks", "last"))
        segments, weights, start = (self.field(n) for n in ("segments", "weights", "start"))
        entry = b.block
        block, done = (b.append_basic_block(name) for name in ("block", "done"))
        b.branch(block)

        b.position_at_end(block)
        index, w = b.phi(i64), b.phi(i64)
        first = b.mul(index, self.word(k.channels))
        channel = b.select(b.icmp_signed("<", first, last), first, last)
        bytes_of_words = b.mul(first, self.word(4))
        begin = b.add(start, bytes_of_words)
        initial = [
            self.load(b.add(begin, self.word(size * j)), self.int32s, size)
            for j in range(k.vectors)
        ]
        base = b.add(x, channel)
        state = ({t: initial[t[1]] for t in self.sums}, segments, w)
        if k.window is not None:
            state = self.loop(self.add_window, "windows_end", base, *state)
        acc, _, w_next = self.loop(self.add_taps, "segments_end", base, *state)
        self.epilogue(acc.__getitem__, channel, bytes_of_words)
        index_next = b.add(index, self.word(1))
        self.incoming(index, (entry, self.word(0)), (b.block, index_next))
        self.incoming(w, (entry, weights), (b.block, w_next))
        b.cbranch(b.icmp_signed("<", index_next, blocks), block, done)
        b.position_at_end(done)

    def loop(self, add: Callable, end: str, base: Any, acc: dict, s: Any, w: Any) -> tuple:
        """Emit a loop over records up to a field's address; returns sums and ends."""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block(f"{n}_{end}") for n in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        held = {t: b.phi(value.type) for t, value in acc.items()}
        s_phi, w_phi = b.phi(i64), b.phi(i64)
        b.cbranch(b.icmp_unsigned("<", s_phi, self.field(end)), body, after)
        b.position_at_end(body)
        places = [b.add(s_phi, self.word(4 * row)) for row in range(4)]
        rows = [b.add(base, b.sext(self.load(place, i32, 4), i64)) for place in places]
        new, w_next = add(held, rows, w_phi)
        s_next = b.add(s_phi, self.word(READS.itemsize))
        b.branch(head)
        for t, phi in held.items():
            self.incoming(phi, (before, acc[t]), (b.block, new[t]))
        self.incoming(s_phi, (before, s), (b.block, s_next))
        self.incoming(w_phi, (before, w), (b.block, w_next))
        b.position_at_end(after)
        return held, s_phi, w_phi

    def add_window(self, acc: dict, rows: list[Any], w: Any) -> tuple[dict, Any]:
        """Add the products of a window of every pixel."""
        b, k = self.b, self.k
        assert k.window is not None
        count, columns, stride = k.window
        weights = [self.weights(b.add(w, self.word(self.step_bytes * q))) for q in range(columns)]
        new, offset, step = dict(acc), self.word(0), self.field("x_column")
        for column in range((k.pixels - 1) * stride + columns):
            x = self.interleaved([b.add(row, offset) for row in rows[:count]])
            for q in range(columns):
                i, rest = divmod(column - q, stride)
                if rest == 0 and 0 <= i < k.pixels:
                    for j in range(k.vectors):
                        new[i, j] = self.byte_dot(new[i, j], x[j], weights[q][j])
            offset = b.add(offset, step)
        return new, b.add(w, self.word(self.step_bytes * columns))

    def add_taps(self, acc: dict, rows: list[Any], w: Any) -> tuple[dict, Any]:
        """Add the products of four taps of every pixel."""
        b, k = self.b, self.k
        weights = self.weights(w)
        new, offset, step = {}, self.word(0), self.field("x_pixel")
        for i in range(k.pixels):
            x = self.interleaved([b.add(row, offset) for row in rows])
            for j in range(k.vectors):
                new[i, j] = self.byte_dot(acc[i, j], x[j], weights[j])
            offset = b.add(offset, step)
        return new, b.add(w, self.word(self.step_bytes))

    def weights(self, w: Any) -> list[Any]:
        """Load the weights of a step."""
        b, size = self.b, 4 * self.k.lanes
        places = [b.add(w, self.word(size * j)) for j in range(self.k.vectors)]
        return [self.load(place, self.bytes, size) for place in places]

    def interleaved(self, rows: list[Any]) -> list[Any]:
        """Load a block's channels from 3 or 4 addresses; returns vectors of 4 bytes a channel.

        The fourth byte of three is 0.
        """
        k = self.k
        # Costs nothing, and keeps the compiler from loading more than there are registers for.
        self.b.fence("seq_cst", "singlethread")
        kind = ir.VectorType(i8, k.channels)
        x = [self.load(row, kind, 1) for row in rows] + [self.constant(0, kind)]
        side_by_side = [*range(2 * k.channels)]
        upper, lower = (self.shuffle(x[p], x[p + 1], side_by_side) for p in (0, 2))
        lanes = [tap * k.channels + lane for lane in range(k.lanes) for tap in range(4)]
        return [
            self.shuffle(upper, lower, [lane + j * k.lanes for lane in lanes])
            for j in range(k.vectors)
        ]

    def places(self, name: str, offset: Any) -> Callable[[int], Any]:
        b = self.b
        first, pixel = b.add(self.field(name), offset), self.field(f"{name}_pixel")
        return lambda i: b.add(first, b.mul(pixel, self.word(i)))


def _size(kind: ir.Type) -> int:
    return 4 if kind in (i32, f32) else 8


# --- the table ----------------------------------------------------------------------------------

_AVX512 = ("avx512vnni", "avx512bw", "avx512vl")
_VBMI = (*_AVX512, "avx512vbmi")
MICROKERNELS = {
    kernel.name: kernel
    for kernel in (
        Microkernel("avx512vnni", "dot", 6, 4, 16, _AVX512),
        Microkernel("avx512vnni", "dot", 1, 4, 16, _AVX512),
        Microkernel("avx512vnni", "dot", 14, 2, 16, _AVX512),
        Microkernel("avx512vnni", "dot", 1, 2, 16, _AVX512),
        Microkernel("avx512vnni", "dot", 28, 1, 16, _AVX512),
        Microkernel("avx512vnni", "dot", 1, 1, 16, _AVX512),
        Microkernel("avxvnni", "dot", 6, 2, 8, ("avxvnni",)),
        Microkernel("avxvnni", "dot", 12, 1, 8, ("avxvnni",)),
        Microkernel("avxvnni", "dot", 1, 2, 8, ("avxvnni",)),
        Microkernel("avxvnni", "dot", 1, 1, 8, ("avxvnni",)),
        Microkernel("avx2", "pair", 6, 2, 8, ("avx2",)),
        Microkernel("avx2", "pair", 12, 1, 8, ("avx2",)),
        Microkernel("avx2", "pair", 1, 2, 8, ("avx2",)),
        Microkernel("avx2", "pair", 1, 1, 8, ("avx2",)),
        Microkernel("avx512vnni", "wide", 6, 4, 16, _AVX512),
        Microkernel("avx2", "wide", 6, 2, 8, ("avx2",)),
        Microkernel("avx2", "depthwise", 4, 4, 8, ("avx2",)),
        Microkernel("avx2", "winograd", 6, 2, 8, ("avx2",)),
        Microkernel("avx512vnni", "winograd_dot", 6, 2, 16, _AVX512),
        Microkernel("avx512vnni", "winograd_dot", 4, 2, 16, _AVX512),
        Microkernel("avxvnni", "winograd_dot", 3, 2, 8, ("avxvnni",)),
        Microkernel("avx512vnni", "rows", 7, 2, 16, _VBMI, (3, 3, 1)),
        Microkernel("avx512vnni", "rows", 7, 2, 16, _VBMI, (3, 3, 2)),
        Microkernel("avx512vnni", "rows", 7, 2, 16, _VBMI, (4, 5, 1)),
        Microkernel("avx512vnni", "rows", 7, 2, 16, _VBMI, (4, 5, 2)),
        Microkernel("avx512vnni", "rows", 7, 2, 16, _VBMI),
        Microkernel("avx512vnni", "rows", 1, 2, 16, _VBMI, (3, 3, 1)),
        Microkernel("avx512vnni", "rows", 1, 2, 16, _VBMI, (4, 5, 1)),
        Microkernel("avx512vnni", "rows", 1, 2, 16, _VBMI),
    )
}


def function(name: str) -> Callable[[int], None]:
    """Return the Python function that compiles to a microkernel."""

    def microkernel(arguments):
        _tile(arguments, name)

    return microkernel


@global_compiler_lock  # of threads that load a network the first compiles, others wait
@cache
def address(kernel: Microkernel) -> int:
    """Address of the compiled microkernel, `void (TILE *)`."""
    compiled: Any = cfunc(types.void(types.uintp))(function(kernel.name))
    return compiled.address
