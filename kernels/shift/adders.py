"""Microkernels of the shift family: rows of bytes added in registers, and panels of such rows.

They are emitted as IR of no particular machine, from loads, additions, shifts and shuffles: any
instruction set with vectors serves, and nothing in them multiplies. `ADDERS` lists them; tests and
benchmarks walk that table. `family` says what they are for.

Lists of rows are a *stream* of 64-bit words for each output channel and block of rows:

    segment   a header: groups (16 bits), exponent of the lowest bucket (16), whether it is the
              last (16), 0 or -1 for a sum that is subtracted (16)
    group     eight offsets of rows, or one, 16 bits each; they are multiples of the row size, and
              the low bits of the first one say by how many bits the sum so far is shifted before

A segment's sum is within uint16; it is shifted to its exponent and added to int32 sums. Row 0 is
zeros, and fills groups up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, i8, i16, i32, i64
from logshift.kernels.machine.isa.avx2 import AVX2
from logshift.kernels.machine.isa.avx512 import AVX512_BW
from logshift.kernels.machine.isa.base import ANY, InstructionSet
from logshift.kernels.machine.isa.neon import NEON

PIECE = 16  # rows that are transposed together
DIGIT = 4  # bits of a digit of codes that are split in two
_AHEAD = 2048  # bytes of a stream, from where it is read to what is prefetched
_PANEL = 24576  # bytes of a panel: it shares the first-level cache with what else is in use


@dataclass(frozen=True, eq=False)
class Adder:
    """One entry of the table: how many pixels of how many digits, on an instruction set."""

    isa: InstructionSet
    vectors: int  # of a row
    digits: int
    group: int  # rows that are added before they are widened: 8 or 1

    @property
    def vector(self) -> int:
        """Bytes of a register."""
        return self.isa.vector

    @property
    def lanes(self) -> int:
        """Bytes of a row."""
        return self.vector * self.vectors

    @property
    def pixels(self) -> int:
        """Output pixels of a panel."""
        return self.lanes // self.digits

    @property
    def half(self) -> tuple[int, int, int] | None:
        """What holds the first half of a row's pixels, if adding that takes less time than a row.

        Bytes of a register, number of registers, bytes of the row from one to the next.
        """
        if self.vectors > self.digits == 1:
            return self.vector, self.vectors // 2, self.vector
        if self.vectors > self.digits:  # half of each digit, as one register
            size = self.lanes // self.digits
            return size // 2, self.digits, size
        # In a cycle 64 bytes are loaded, be it by one register or by two.
        return (32, self.vectors, self.vector) if self.vector == 64 else None

    @property
    def rows(self) -> int:
        """Rows of a panel, at most: offsets have 16 bits."""
        return min(_PANEL // self.lanes, 65536 // self.lanes - 1)

    @property
    def name(self) -> str:
        """Instruction set, pixels times digits, and whether rows are widened one by one."""
        digits = f"x{self.digits}" if self.digits > 1 else ""
        return f"{self.isa.name}-{self.pixels}{digits}" + ("-single" if self.group == 1 else "")

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return self.isa.available


@intrinsic(prefer_literal=True)
def add_rows(typingctx, panel, stream, sums, vector, vectors, step, lanes, group):
    """Add what a stream says to int32 sums; returns the end of the stream.

    The first three are addresses. Sums are (4, lanes / 4): sum [q, l] is that of the byte 4 * l + q
    of a row, of which registers, `vectors` of them, hold all bytes or some: see `Adder.half`.
    """
    signature = types.uintp(panel, stream, sums, vector, vectors, step, lanes, group)

    def codegen(context, builder, signature, args):
        sizes = (size.literal_value for size in (vector, vectors, step, lanes, group))
        return Addition(builder, *sizes).emit(*args[:3])

    return signature, codegen


class Addition(Emitter):
    """Emits the loop of `add_rows`."""

    def __init__(
        self, builder: ir.IRBuilder, vector: int, vectors: int, step: int, lanes: int, rows: int
    ) -> None:
        super().__init__(builder)
        self.vector, self.vectors, self.step = vector, vectors, step
        self.lanes, self.count = lanes, rows
        self.bytes = ir.VectorType(i8, vector)
        self.int16s, self.int32s = ir.VectorType(i16, vector // 2), ir.VectorType(i32, vector // 4)

    def emit(self, panel: Any, stream: Any, sums: Any) -> Any:
        """Emit it; returns the end of the stream."""
        b = self.b
        entry = b.block
        segment, group, end, done = (
            b.append_basic_block(name) for name in ("segment", "group", "end", "done")
        )
        b.branch(segment)

        b.position_at_end(segment)
        header_at = b.phi(i64)
        header = self.load(header_at, i64, 2)
        first = b.add(header_at, self.word(8))
        groups = b.and_(header, self.word(0xFFFF))
        stop = b.add(first, b.mul(groups, self.word(2 * self.count)))
        self.prefetch(header_at)
        b.branch(group)

        b.position_at_end(group)
        at = b.phi(i64)
        # Of a vector of uint16 lanes: bytes as they lie, sums of odd bytes in the high halves; and
        # the sums of odd bytes alone.
        held = [[b.phi(self.int16s) for _ in range(self.vectors)] for _ in range(2)]
        shift, rows = self.rows(panel, at)
        new = self.group(rows, held, self.splat(shift, self.int16s))
        following = b.add(at, self.word(2 * self.count))
        self.incoming(at, (segment, first), (group, following))
        zero = self.constant(0, self.int16s)
        for phis, values in zip(held, new, strict=True):
            for phi, value in zip(phis, values, strict=True):
                self.incoming(phi, (segment, zero), (group, value))
        b.cbranch(b.icmp_unsigned("<", following, stop), group, end)

        b.position_at_end(end)
        self.join(header, new, sums)
        last = b.and_(b.lshr(header, self.word(32)), self.word(1))
        b.cbranch(b.icmp_unsigned("==", last, self.word(0)), segment, done)
        self.incoming(header_at, (entry, stream), (end, stop))
        b.position_at_end(done)
        return stop

    def prefetch(self, segment: Any) -> None:
        """Ask for a segment that comes later: lists that are read once come from far away."""
        pointer, (read, near, data) = ir.PointerType(i8), (ir.Constant(i32, k) for k in (0, 3, 1))
        for line in range(0, 384, 64):  # most segments are no longer
            place = self.b.inttoptr(self.b.add(segment, self.word(_AHEAD + line)), pointer)
            self.intrinsic("llvm.prefetch.p0i8", ir.VoidType(), [place, read, near, data])

    def rows(self, panel: Any, at: Any) -> tuple[Any, list[Any]]:
        """Shift of a group, and the addresses of its rows."""
        b = self.b
        if self.count == 1:
            words = [b.zext(self.load(at, i16, 2), i64)]
        else:  # two loads for eight rows: loads are what there is least of
            words = [self.load(b.add(at, self.word(8 * half)), i64, 2) for half in (0, 1)]
        shift = b.trunc(b.and_(words[0], self.word(self.lanes - 1)), i16)
        offsets = [b.and_(words[0], self.word(0x10000 - self.lanes))]
        for number in range(1, self.count):
            offset = b.lshr(words[number // 4], self.word(16 * (number % 4)))
            offsets.append(b.and_(offset, self.word(0xFFFF)))
        return shift, [b.add(panel, offset) for offset in offsets]

    def group(self, rows: list[Any], held: list[list[Any]], count: Any) -> tuple[list, list]:
        """Add rows to shifted sums."""
        b = self.b
        both, odd = [], []
        for v in range(self.vectors):
            total = None
            for row in rows:
                codes = self.load(b.add(row, self.word(self.step * v)), self.bytes, self.vector)
                total = codes if total is None else b.add(total, codes)
            total = b.bitcast(total, self.int16s)
            high = b.lshr(total, self.constant(8, self.int16s))
            both.append(b.add(b.shl(held[0][v], count), total))
            odd.append(b.add(b.shl(held[1][v], count), high))
        return both, odd

    def join(self, header: Any, new: tuple[list, list], sums: Any) -> None:
        """Widen a segment's sums, shift them to their place, and add them or their complements."""
        b = self.b
        low = self.splat(
            b.trunc(b.and_(b.lshr(header, self.word(16)), self.word(31)), i32), self.int32s
        )
        mask = self.splat(b.trunc(b.ashr(header, self.word(48)), i32), self.int32s)
        for v in range(self.vectors):
            both, odd = new[0][v], new[1][v]
            even = b.sub(both, b.shl(odd, self.constant(8, self.int16s)))
            pairs = [b.bitcast(value, self.int32s) for value in (even, odd)]
            for q in range(4):
                pair = pairs[q % 2]
                if q < 2:
                    value = b.and_(pair, self.constant(0xFFFF, self.int32s))
                else:
                    value = b.lshr(pair, self.constant(16, self.int32s))
                value = b.xor(b.shl(value, low), mask)
                place = b.add(sums, self.word(q * self.lanes + self.step * v))
                total = self.load(place, self.int32s, self.vector)
                self.store(b.add(total, value), place, self.vector)


def _transposed(emitter: Emitter, rows: list[Any]) -> list[Any]:
    """Transpose 16x16 bytes, in every part of 16 bytes of 16 vectors."""
    count = rows[0].type.count
    halves = [
        [
            16 * part + 8 * high + lane + source
            for part in range(count // 16)
            for lane in range(8)
            for source in (0, count)
        ]
        for high in (0, 1)
    ]
    for _ in range(4):  # each is a perfect shuffle; four of them swap row and column
        rows = [emitter.shuffle(rows[i // 2], rows[i // 2 + 8], halves[i % 2]) for i in range(16)]
    return rows


@intrinsic(prefer_literal=True)
def gather(typingctx, pixels, offset, target, vector, count, pitch, digits):
    """Write 16 neighbouring bytes of each of some pixels as 16 rows of a panel.

    pixels is the address of a table of addresses, to which offset is added; target that of the
    first row, pitch bytes before the next one. There are vector * count pixels. If digits is 2,
    rows hold the low digits of all pixels, then the high ones.
    """
    signature = types.void(pixels, offset, target, vector, count, pitch, digits)

    def codegen(context, builder, signature, args):
        e = Emitter(builder)
        size, steps, row_bytes, parts = (t.literal_value for t in (vector, count, pitch, digits))
        table, shift, rows_at = args[:3]
        piece = ir.VectorType(i8, PIECE)
        whole = ir.VectorType(i8, size)
        with cgutils.for_range_slice(builder, e.word(0), e.word(size * steps), e.word(size)) as (
            first,
            _,
        ):
            entry = builder.add(table, builder.mul(first, e.word(8)))
            rows = []
            for i in range(PIECE):
                pieces = [
                    e.load(builder.add(e.at(entry, PIECE * part + i), shift), piece, 1)
                    for part in range(size // PIECE)
                ]
                rows.append(_joined(e, pieces))
            for i, row in enumerate(_transposed(e, rows)):
                place = builder.add(rows_at, builder.add(first, e.word(row_bytes * i)))
                if parts == 1:
                    e.store(row, place, size)
                    continue
                low = builder.and_(row, e.constant(2**DIGIT - 1, whole))
                high = builder.lshr(row, e.constant(DIGIT, whole))
                e.store(low, place, size)
                e.store(high, builder.add(place, e.word(size * steps)), size)
        return context.get_dummy_value()

    return signature, codegen


def _joined(e: Emitter, pieces: list[Any]) -> Any:
    while len(pieces) > 1:
        count = 2 * pieces[0].type.count
        pieces = [
            e.shuffle(pieces[i], pieces[i + 1], [*range(count)]) for i in range(0, len(pieces), 2)
        ]
    return pieces[0]


@intrinsic(prefer_literal=True)
def scatter(typingctx, source, pixels, offset, vector, count, pitch):
    """Write 16 rows of bytes to 16 neighbouring bytes of each pixel: the reverse of `gather`."""
    signature = types.void(source, pixels, offset, vector, count, pitch)

    def codegen(context, builder, signature, args):
        e = Emitter(builder)
        size, steps, row_bytes = (t.literal_value for t in (vector, count, pitch))
        whole = ir.VectorType(i8, size)
        with cgutils.for_range_slice(builder, e.word(0), e.word(size * steps), e.word(size)) as (
            first,
            _,
        ):
            entry = builder.add(args[1], builder.mul(first, e.word(8)))
            begin = builder.add(args[0], first)
            rows = [
                e.load(builder.add(begin, e.word(row_bytes * i)), whole, size) for i in range(PIECE)
            ]
            for i, row in enumerate(_transposed(e, rows)):
                for part in range(size // PIECE):
                    lanes = [*range(PIECE * part, PIECE * (part + 1))]
                    place = builder.add(e.at(entry, PIECE * part + i), args[2])
                    e.store(e.shuffle(row, row, lanes), place, 1)
        return context.get_dummy_value()

    return signature, codegen


# --- the table ----------------------------------------------------------------------------------

_VECTORS = {AVX512_BW: (2, 1), AVX2: (2,), NEON: (8,), ANY: (4,)}  # of a row
ADDERS = {
    adder.name: adder
    for isa, (usual, *others) in _VECTORS.items()
    for adder in (
        *(Adder(isa, usual, digits, group) for digits in (1, 2) for group in (8, 1)),
        *(Adder(isa, vectors, 1, 8) for vectors in others),
    )
}
