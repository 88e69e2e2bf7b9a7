"""Microkernels of depthwise convolutions that take a row of outputs at a time (`depthwise`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from logshift.kernels.dot.emission import Emission
from logshift.kernels.dot.tiles import READS
from logshift.kernels.machine.emit import i8, i32, i64


class Rows(Emission):
    """Pixels side by side in a row of outputs; a lane is 4 taps of a channel.

    Where there is a window, a record of READS tells the rows of one: each of its columns is loaded
    and interleaved once for all pixels that it is part of. Other records are 4 taps of every pixel.
    """

    def emit(self) -> None:
        """Emit a loop over blocks, each of windows and then of taps."""
        b, k, size = self.b, self.k, self.size
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
        state = ({t: initial[t[1]] for t in self.tiles}, segments, w)
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
                        new[i, j] = self.isa.byte_dot(self, new[i, j], x[j], weights[q][j])
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
                new[i, j] = self.isa.byte_dot(self, acc[i, j], x[j], weights[j])
            offset = b.add(offset, step)
        return new, b.add(w, self.word(self.step_bytes))

    def weights(self, w: Any) -> list[Any]:
        """Load the weights of a step."""
        b, size = self.b, self.size
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
        """Return what gives the address of a pixel's outputs, or residuals, from an offset on."""
        b = self.b
        first, pixel = b.add(self.field(name), offset), self.field(f"{name}_pixel")
        return lambda i: b.add(first, b.mul(pixel, self.word(i)))
