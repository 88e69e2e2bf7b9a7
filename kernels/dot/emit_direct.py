"""Microkernels that take pixels directly: four codes of all channels, or two taps of each channel.

Sums in int16 are flushed after the segments that say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from logshift.kernels.dot.emission import Emission
from logshift.kernels.dot.tiles import CONTINUE, FLUSH, SEGMENT, Microkernel
from logshift.kernels.machine.emit import i32, i64


class Direct(Emission):
    """Blocks of channels, each from segments of steps."""

    def __init__(
        self, kernel: Microkernel, builder: ir.IRBuilder, arguments: Any, is_activated: bool
    ) -> None:
        super().__init__(kernel, builder, arguments, is_activated)
        # Accumulators: pixel, vector.
        self.sums = [(i, j) for i in range(kernel.pixels) for j in range(kernel.sums)]

    def rows(self, bases: list[Any], q: Any) -> Iterator[Any]:
        """Yield where the codes of a step lie; q is the step's offset from those of a pixel."""
        b = self.b
        # More addresses than registers would be copied to the stack first, and read from there.
        # What is read from their table atomically is read where it is needed.
        again = self.k.pixels > self.isa.addresses and self.k.kind != "winograd"
        table = self.field("x")
        for i, base in enumerate(bases):
            if again:
                place = b.inttoptr(b.add(table, self.word(8 * i)), ir.PointerType(i64))
                base = b.load_atomic(place, "monotonic", 8)
            yield b.add(base, q)

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
            return self.isa.word_pairs(self, acc[tile], self.constant(1, self.int16s))
        return acc[tile]

    def initial(self, tile: tuple[int, int], vector: Any) -> Any:
        """Return what a register of sums begins with, from what its channels do."""
        return vector

    @property
    def initial_bytes(self) -> int:
        """Bytes of the weights' stream that initial values of sums in int16 take."""
        return self.size * self.k.sums

    # --- the kernel -----------------------------------------------------------------------------

    def emit(self) -> None:
        """Emit a loop over blocks, of groups of segments up to a flush."""
        b, k, size = self.b, self.k, self.size
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
        initial = [self.load(b.add(place, self.word(size * j)), kind, size) for j in range(k.sums)]
        w_first = b.add(w_group, self.word(self.initial_bytes if k.sums_in_int16 else 0))
        begin_sums = {t: self.initial(t, initial[t[1]]) for t in self.sums}
        first, w_ran = self.run(begin_sums, bases, s_group, w_first)
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
        size = self.size
        place = b.add(held_at, b.add(b.mul(held_step, self.word(i)), self.word(size * j)))
        return b.add(self.load(place, self.int32s, size), widened)


class Depthwise(Direct):
    """Steps of two taps of every channel."""

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the step of a segment; returns sums and the end of the weights."""
        b, size = self.b, self.size
        offsets = [b.sext(self.load(b.add(segment, self.word(4 * p)), i32, 4), i64) for p in (0, 1)]
        vectors = [self.load(b.add(w, self.word(size * half)), self.bytes, size) for half in (0, 1)]
        new = {}
        for i, base in enumerate(bases):
            first, second = (self.load(b.add(base, at), self.bytes, 1) for at in offsets)
            for half in (0, 1):
                codes = self.isa.interleaved(self, first, second, half)
                pairs = self.isa.byte_pairs(self, codes, vectors[half])
                new[i, half] = b.add(acc[i, half], pairs)
        return new, b.add(w, self.word(2 * size))

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the int32 sums of a tile's vector."""
        i, j = tile
        # Of each 16 channels a vector of int16 holds the lower 8, or the upper ones.
        piece, within = divmod(j * self.k.lanes, 16)
        held, first = acc[i, within // 8], 8 * piece + within % 8
        part = self.shuffle(held, held, [*range(first, first + self.k.lanes)])
        return self.b.sext(part, self.int32s)
