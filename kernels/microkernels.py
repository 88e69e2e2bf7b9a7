"""Byte-dot microkernels: a tile of output pixels times a block of output channels, emitted as IR.

A microkernel computes, for `pixels` output pixels and one block of `channels` output channels,

    acc = start + sum over segments, quads of x (4 uint8) . W (4 int8)

and requantizes the tile in registers (`docs/quantization.md` section 4). Inputs are read where they
lie; a *segment* is a run of quads that are contiguous in memory. Kernels of the "pair" kind sum
products in int16 inside a segment, modulo 2^16, from an initial value of the segment's own that
keeps the total within int16 (`dot._cut`); the others sum in int32 throughout.

All are listed in `MICROKERNELS`; tests and benchmarks walk that table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import cfunc, types
from numba.extending import intrinsic

from logshift.kernels.targets import has_features

_I, _F, _P = np.int64, np.float32, np.uintp

# What one call needs; addresses of tables unless said otherwise.
TILE = np.dtype(
    [
        ("x", _P),  # int64 (pixels,): addresses of the first input byte of each pixel
        ("y", _P),  # int64 (pixels,): addresses of the first output channel of each pixel
        ("r", _P),  # int64 (pixels,): the same of the residual
        ("segments", _P),  # int32 (segment_count, 2): byte offset from x, quads
        ("segment_count", _I),
        ("weights", _P),  # int8 (quads, channels, 4); "pair": each segment begins with its
        # initial values, int16 (channels, 2)
        ("start", _P),  # int32 (channels,): minus z_x * sum of W
        ("m", _P), ("b", _P),  # float32 (channels,)
        ("z_r", np.int32), ("m_r", _F), ("lo", _F), ("hi", _F),
        ("has_residual", np.int32), ("float_output", np.int32),
    ],
    align=True,
)  # fmt: skip

_OFFSETS = {name: TILE.fields[name][1] for name in TILE.names}  # type: ignore[index, union-attr]

_i8, _i16, _i32, _i64, _f32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64),
                               ir.FloatType())  # fmt: skip
_ROUND = 12582912.0  # 1.5 * 2^23: the low byte of v + _ROUND is v rounded half to even


@dataclass(frozen=True, eq=False)
class Microkernel:
    """One entry of the table: `<pixels>x<channels>` on an instruction set."""

    isa: str
    pixels: int
    vectors: int  # of output channels
    lanes: int  # int32 per vector
    pair: bool
    features: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Output channels per call."""
        return self.vectors * self.lanes

    @property
    def name(self) -> str:
        """Instruction set and tile."""
        return f"{self.isa}-{self.pixels}x{self.channels}"

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return has_features(self.features)


@intrinsic(prefer_literal=True)
def _tile(typingctx, arguments, name):
    """Emit the microkernel of a name; takes the address of a TILE record."""

    def codegen(context, builder, signature, args):
        _Emission(MICROKERNELS[name.literal_value], builder, args[0]).emit()
        return context.get_dummy_value()

    return types.void(arguments, name), codegen


class _Emission:
    """The body of one microkernel, in LLVM IR."""

    def __init__(self, kernel: Microkernel, builder: ir.IRBuilder, arguments: Any) -> None:
        self.k, self.b = kernel, builder
        self.base = arguments
        n = kernel.lanes
        self.int32s, self.int16s = ir.VectorType(_i32, n), ir.VectorType(_i16, 2 * n)
        self.bytes, self.floats = ir.VectorType(_i8, 4 * n), ir.VectorType(_f32, n)
        self.tiles = [(i, j) for i in range(kernel.pixels) for j in range(kernel.vectors)]

    # --- small things ---------------------------------------------------------------------------

    def word(self, value: int) -> ir.Constant:
        return ir.Constant(_i64, value)

    def load(self, address: Any, kind: ir.Type, align: int) -> Any:
        return self.b.load(self.b.inttoptr(address, ir.PointerType(kind)), align=align)

    def store(self, value: Any, address: Any, align: int) -> None:
        self.b.store(value, self.b.inttoptr(address, ir.PointerType(value.type)), align=align)

    def field(self, name: str, kind: ir.Type = _i64) -> Any:
        offset = _OFFSETS[name]
        return self.load(self.b.add(self.base, self.word(offset)), kind, _size(kind))

    def at(self, table: Any, index: int) -> Any:
        return self.load(self.b.add(table, self.word(8 * index)), _i64, 8)

    def splat(self, scalar: Any, kind: ir.VectorType) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        vector = self.b.insert_element(undefined, scalar, ir.Constant(_i32, 0))
        zeros = ir.Constant(ir.VectorType(_i32, kind.count), [0] * kind.count)
        return self.b.shuffle_vector(vector, undefined, zeros)

    def constant(self, value: Any, kind: ir.VectorType) -> ir.Constant:
        return ir.Constant(kind, [value] * kind.count)

    def intrinsic(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(module, kind, name)
        return self.b.call(function, arguments)

    # --- instruction sets -----------------------------------------------------------------------

    def dot(self, acc: Any, x: Any, w: Any) -> Any:
        """Add the products of one quad to an accumulator."""
        if self.k.pair:
            name = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
            pairs = self.intrinsic(name[self.k.lanes], self.int16s, [x, w])
            return self.b.add(acc, pairs)
        name = {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}
        if llvm_version_info[0] < 21:  # which took the bytes as int32
            x, w = self.b.bitcast(x, self.int32s), self.b.bitcast(w, self.int32s)
        return self.intrinsic(name[self.k.lanes], self.int32s, [acc, x, w])

    def widen(self, pairs: Any) -> Any:
        """Sum neighbouring int16 into int32."""
        name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
        ones = self.constant(1, self.int16s)
        return self.intrinsic(name[self.k.lanes], self.int32s, [pairs, ones])

    # --- the kernel -----------------------------------------------------------------------------

    def emit(self) -> None:
        b, k = self.b, self.k
        x_table = self.field("x")
        bases = [self.at(x_table, i) for i in range(k.pixels)]
        segments, count = self.field("segments"), self.field("segment_count")
        weights, start = self.field("weights"), self.field("start")
        size = 4 * k.lanes
        entry = b.block
        segment_loop, quad_loop = b.append_basic_block("segment"), b.append_basic_block("quad")
        flush, done = b.append_basic_block("flush"), b.append_basic_block("done")
        # Accumulators live in stack slots between segments: with int16 sums in flight there are
        # not enough registers for both, and LLVM promotes the slots to registers otherwise.
        with b.goto_entry_block():
            slots = {t: b.alloca(self.int32s) for t in self.tiles}
            for slot in slots.values():
                slot.align = size
        for i, j in self.tiles:
            address = b.add(start, self.word(size * j))
            b.store(self.load(address, self.int32s, size), slots[i, j])
        b.cbranch(b.icmp_signed(">", count, self.word(0)), segment_loop, done)

        b.position_at_end(segment_loop)
        s, w_segment = b.phi(_i64), b.phi(_i64)
        s.add_incoming(self.word(0), entry)
        w_segment.add_incoming(weights, entry)
        place = b.add(segments, b.mul(s, self.word(8)))
        offset = b.sext(self.load(place, _i32, 4), _i64)
        quads = b.sext(self.load(b.add(place, self.word(4)), _i32, 4), _i64)
        rows = [b.add(base, offset) for base in bases]
        if k.pair:
            initials = [
                self.load(b.add(w_segment, self.word(size * j)), self.int16s, size)
                for j in range(k.vectors)
            ]
            initial = {(i, j): initials[j] for i, j in self.tiles}
            first = b.add(w_segment, self.word(size * k.vectors))
        else:
            initial, first = {t: b.load(slots[t]) for t in self.tiles}, w_segment
        b.branch(quad_loop)

        b.position_at_end(quad_loop)
        q, w = b.phi(_i64), b.phi(_i64)
        q.add_incoming(self.word(0), segment_loop)
        w.add_incoming(first, segment_loop)
        acc = {t: b.phi(initial[t].type) for t in self.tiles}
        vectors = [
            self.load(b.add(w, self.word(size * j)), self.bytes, size) for j in range(k.vectors)
        ]
        new = {}
        for i in range(k.pixels):
            four = self.load(b.add(rows[i], b.mul(q, self.word(4))), _i32, 1)
            x = b.bitcast(self.splat(four, self.int32s), self.bytes)
            for j in range(k.vectors):
                new[i, j] = self.dot(acc[i, j], x, vectors[j])
        q_next, w_next = b.add(q, self.word(1)), b.add(w, self.word(size * k.vectors))
        q.add_incoming(q_next, quad_loop)
        w.add_incoming(w_next, quad_loop)
        for t in self.tiles:
            acc[t].add_incoming(initial[t], segment_loop)
            acc[t].add_incoming(new[t], quad_loop)
        b.cbranch(b.icmp_signed("<", q_next, quads), quad_loop, flush)

        b.position_at_end(flush)
        for t in self.tiles:
            total = b.add(b.load(slots[t]), self.widen(new[t])) if k.pair else new[t]
            b.store(total, slots[t])
        s_next = b.add(s, self.word(1))
        s.add_incoming(s_next, flush)
        w_segment.add_incoming(w_next, flush)
        b.cbranch(b.icmp_signed("<", s_next, count), segment_loop, done)

        b.position_at_end(done)
        self.epilogue({t: b.load(slots[t]) for t in self.tiles})

    def epilogue(self, acc: dict[tuple[int, int], Any]) -> None:
        """Requantize the tile: y = t * M + B (+ residual), clamp, round, store."""
        b, k = self.b, self.k
        size = 4 * k.lanes
        m, bias = self.field("m"), self.field("b")
        ms = [self.load(b.add(m, self.word(size * j)), self.floats, 4) for j in range(k.vectors)]
        bs = [self.load(b.add(bias, self.word(size * j)), self.floats, 4) for j in range(k.vectors)]
        lo, hi = (self.splat(self.field(n, _f32), self.floats) for n in ("lo", "hi"))
        values = {
            (i, j): b.fadd(b.fmul(b.sitofp(acc[i, j], self.floats), ms[j]), bs[j])
            for i, j in self.tiles
        }
        before = b.block
        with_residual, joined = b.append_basic_block("residual"), b.append_basic_block("joined")
        flag = b.icmp_signed("!=", self.field("has_residual", _i32), ir.Constant(_i32, 0))
        b.cbranch(flag, with_residual, joined)
        b.position_at_end(with_residual)
        r_table = self.field("r")
        z_r = self.splat(self.field("z_r", _i32), self.int32s)
        m_r = self.splat(self.field("m_r", _f32), self.floats)
        added = {}
        for i, j in self.tiles:
            address = b.add(self.at(r_table, i), self.word(k.lanes * j))
            codes = self.load(address, ir.VectorType(_i8, k.lanes), 1)
            t = b.sitofp(b.sub(b.zext(codes, self.int32s), z_r), self.floats)
            added[i, j] = b.fadd(values[i, j], b.fmul(t, m_r))
        b.branch(joined)
        b.position_at_end(joined)
        final = {}
        for t in self.tiles:
            v = b.phi(self.floats)
            v.add_incoming(values[t], before)
            v.add_incoming(added[t], with_residual)
            final[t] = v
        y_table = self.field("y")
        clamped = {}
        for t in self.tiles:
            v = b.select(b.fcmp_ordered(">", final[t], lo), final[t], lo)
            clamped[t] = b.select(b.fcmp_ordered("<", v, hi), v, hi)
        as_float, as_codes = b.append_basic_block("float"), b.append_basic_block("codes")
        end = b.append_basic_block("end")
        flag = b.icmp_signed("!=", self.field("float_output", _i32), ir.Constant(_i32, 0))
        b.cbranch(flag, as_float, as_codes)
        b.position_at_end(as_float)
        for i, j in self.tiles:
            self.store(clamped[i, j], b.add(self.at(y_table, i), self.word(size * j)), 4)
        b.branch(end)
        b.position_at_end(as_codes)
        magic = self.constant(_ROUND, self.floats)
        for i, j in self.tiles:
            rounded = b.bitcast(b.fadd(clamped[i, j], magic), self.int32s)
            codes = b.trunc(rounded, ir.VectorType(_i8, k.lanes))
            self.store(codes, b.add(self.at(y_table, i), self.word(k.lanes * j)), 1)
        b.branch(end)
        b.position_at_end(end)


def _size(kind: ir.Type) -> int:
    return 4 if kind in (_i32, _f32) else 8


# --- the table ----------------------------------------------------------------------------------

_AVX512 = ("avx512vnni", "avx512bw", "avx512vl")
MICROKERNELS = {
    kernel.name: kernel
    for kernel in (
        Microkernel("avx512vnni", 6, 4, 16, False, _AVX512),
        Microkernel("avx512vnni", 14, 2, 16, False, _AVX512),
        Microkernel("avx512vnni", 28, 1, 16, False, _AVX512),
        Microkernel("avxvnni", 6, 2, 8, False, ("avxvnni",)),
        Microkernel("avxvnni", 12, 1, 8, False, ("avxvnni",)),
        Microkernel("avx2", 6, 2, 8, True, ("avx2",)),
        Microkernel("avx2", 12, 1, 8, True, ("avx2",)),
    )
}


# One function each, so that Numba's cache knows them apart.


def _avx512vnni_6x64(arguments):
    _tile(arguments, "avx512vnni-6x64")


def _avx512vnni_14x32(arguments):
    _tile(arguments, "avx512vnni-14x32")


def _avx512vnni_28x16(arguments):
    _tile(arguments, "avx512vnni-28x16")


def _avxvnni_6x16(arguments):
    _tile(arguments, "avxvnni-6x16")


def _avxvnni_12x8(arguments):
    _tile(arguments, "avxvnni-12x8")


def _avx2_6x16(arguments):
    _tile(arguments, "avx2-6x16")


def _avx2_12x8(arguments):
    _tile(arguments, "avx2-12x8")


@cache
def address(kernel: Microkernel) -> int:
    """Address of the compiled microkernel, `void (TILE *)`."""
    function = globals()[f"_{kernel.name.replace('-', '_')}"]
    compiled: Any = cfunc(types.void(types.uintp), cache=True)(function)
    return compiled.address
