"""Microkernels for products of one lane of codes and a register of weights, or of matrices.

The codes of some steps of a pixel are one register. Sums of pairs and of Winograd's positions are
those of one channel a lane, in int16: a step's weights are those of its first code, of its second
one and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from logshift.kernels.dot.emission import Emission
from logshift.kernels.dot.emit_direct import Depthwise, Direct
from logshift.kernels.dot.emit_winograd import Winograd, WinogradDot
from logshift.kernels.dot.tiles import RUN, Microkernel
from logshift.kernels.machine.emit import i8, i16, i32, i64
from logshift.kernels.machine.isa.neon import Neon


class _ByLane(Emission):
    """Loads of codes and weights, and loops over steps."""

    isa: Neon
    together = 4  # steps

    def codes(self, address: Any, steps: int) -> Any:
        """Load the codes of 1, 2 or 4 steps into the first lanes of a register."""
        kind = ir.VectorType(i32, steps)
        loaded = self.load(address, kind, 1)
        if steps < 4:
            loaded = self.shuffle(loaded, loaded, [*range(steps)] + (4 - steps) * [0])
        return self.b.bitcast(loaded, self.bytes)

    def loop(self, steps: int, add: Callable, acc: dict, q: Any, end: Any, w: Any) -> tuple:
        """Emit a loop of so many steps at a time, from q on while so many are left until `end`.

        Returns sums, and where steps and weights go on. `add(acc, q, w)` returns new sums and the
        end of the weights.
        """
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block(f"{n}_{steps}") for n in ("head", "body", "end"))
        size = self.word(4 * steps)
        last = b.sub(end, size)  # compared with what addresses are made of, not with what follows
        b.branch(head)
        b.position_at_end(head)
        q_phi, w_phi = b.phi(i64), b.phi(i64)
        held = {t: b.phi(value.type) for t, value in acc.items()}
        b.cbranch(b.icmp_signed("<=", q_phi, last), body, after)
        b.position_at_end(body)
        new, w_next = add(held, q_phi, w_phi)
        q_next = b.add(q_phi, size)
        b.branch(head)
        self.incoming(q_phi, (before, q), (b.block, q_next))
        self.incoming(w_phi, (before, w), (b.block, w_next))
        for t, phi in held.items():
            self.incoming(phi, (before, acc[t]), (b.block, new[t]))
        b.position_at_end(after)
        return held, q_phi, w_phi

    def half(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the sums of a vector, of int16 of eight channels, as int32."""
        i, j = tile
        held, first = acc[i, j // 2], j % 2 * 4
        return self.b.sext(self.shuffle(held, held, [*range(first, first + 4)]), self.int32s)

    def dot_step(self, acc: dict, x: dict, s: int, w: Any) -> dict:
        """Add dot products of the codes of step s of each pixel; its weights begin at w."""
        b, size, new = self.b, self.size, {}
        products = [(i, j) for i in range(self.k.pixels) for j in range(self.k.vectors)]
        if self.k.vectors > self.k.pixels:  # of which not all fit registers at once
            products.sort(key=lambda t: t[1])
        places = [b.add(w, self.word(size * j)) for j in range(self.k.vectors)]
        weights = [self.load(place, self.bytes, size) for place in places]
        for i, j in products:
            quads = b.bitcast(x[i], self.int32s)
            quad = b.bitcast(self.shuffle(quads, quads, 4 * [s]), self.bytes)
            new[i, j] = self.isa.byte_dot(self, acc[i, j], quad, weights[j])
        return new


class Dot(_ByLane, Direct):
    """Dot products of four codes."""

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the steps of a segment; returns sums and the end of the weights."""
        b = self.b
        begin = b.sext(self.load(segment, i32, 4), i64)
        count = b.sext(self.load(b.add(segment, self.word(4)), i32, 4), i64)
        q, end = begin, b.add(begin, b.mul(count, self.word(4)))
        for steps in (self.together, 1):

            def add(acc: dict, q: Any, w: Any, steps: int = steps) -> tuple[dict, Any]:
                x = {i: self.codes(row, steps) for i, row in enumerate(self.rows(bases, q))}
                x = {i: self.prepared(codes) for i, codes in x.items()}
                for s in range(steps):
                    acc = self.step_of(acc, x, s, b.add(w, self.word(self.step_bytes * s)))
                return acc, b.add(w, self.word(self.step_bytes * steps))

            acc, q, w = self.loop(steps, add, acc, q, end, w)
        return acc, w

    def prepared(self, codes: Any) -> Any:
        """Return codes as products want them."""
        return self.isa.signed(self, codes)

    def step_of(self, acc: dict, x: dict, s: int, w: Any) -> dict:
        """Add the products of step s of the codes that were loaded."""
        return self.dot_step(acc, x, s, w)


class Matrices(_ByLane, Direct):
    """Products of matrices: two pixels, 8 codes each, by two channels.

    A register of sums is of both pixels: that of tile (2 * p + h, j) is of the pixels 2 * p and
    2 * p + 1, and of the first or second half, h, of the channels of vector j. A pixel alone is
    both pixels of a pair.
    """

    def __init__(
        self, kernel: Microkernel, builder: ir.IRBuilder, arguments: Any, is_activated: bool
    ) -> None:
        super().__init__(kernel, builder, arguments, is_activated)
        pixels = kernel.pixels + kernel.pixels % 2
        self.sums = [(i, j) for i in range(pixels) for j in range(kernel.vectors)]

    def initial(self, tile: tuple[int, int], vector: Any) -> Any:
        """Return what a register of sums begins with, from what its channels do."""
        first = tile[0] % 2 * 2
        return self.shuffle(vector, vector, 2 * [first, first + 1])

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the sums of a pixel of a tile's vector."""
        i, j = tile
        first = i % 2 * 2
        pair = acc[i - i % 2, j], acc[i - i % 2 + 1, j]
        return self.shuffle(*pair, [first, first + 1, first + 4, first + 5])

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the steps of a segment; returns sums and the end of the weights."""
        b = self.b
        begin = b.sext(self.load(segment, i32, 4), i64)
        count = b.sext(self.load(b.add(segment, self.word(4)), i32, 4), i64)
        end = b.add(begin, b.mul(count, self.word(8)))

        def add(acc: dict, q: Any, w: Any) -> tuple[dict, Any]:
            kind, new = ir.VectorType(i8, 8), dict(acc)
            codes = [self.load(row, kind, 1) for row in self.rows(bases, q)]
            pairs = [
                self.shuffle(codes[i], codes[min(i + 1, len(codes) - 1)], [*range(16)])
                for i in range(0, len(codes), 2)
            ]
            for j in range(self.k.vectors):
                for half in (0, 1):
                    place = b.add(w, self.word(self.size * (2 * j + half)))
                    weights = self.load(place, self.bytes, self.size)
                    for p, pair in enumerate(pairs):
                        t = 2 * p + half, j
                        new[t] = self.isa.byte_matrices(self, acc[t], pair, weights)
            return new, b.add(w, self.word(self.step_bytes))

        acc, _, w = self.loop(2, add, acc, begin, end, w)
        return acc, w


class Pairs(Dot):
    """Products of one code, summed in int16."""

    together = 2

    @property
    def initial_bytes(self) -> int:
        """Bytes of the weights' stream that initial values of sums in int16 take."""
        return self.step_bytes

    def step_of(self, acc: dict, x: dict, s: int, w: Any) -> dict:
        """Add the products of step s of the codes that were loaded."""
        b, new, eight = self.b, dict(acc), ir.VectorType(i8, 8)
        for n in range(4):
            column = b.add(w, self.word(self.k.channels * n))
            places = [b.add(column, self.word(8 * j)) for j in range(self.k.sums)]
            weights = [self.load(place, eight, 8) for place in places]
            for i, codes in x.items():
                code = self.shuffle(codes, codes, 8 * [4 * s + n])
                for j, part in enumerate(weights):
                    new[i, j] = self.isa.multiplied(self, new[i, j], code, part)
        return new

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the int32 sums of a tile's vector."""
        return self.half(acc, tile)


class Wide(Dot):
    """Products of one code and int16 weights, summed in int32."""

    together = 2

    def prepared(self, codes: Any) -> Any:
        """Return codes as int16."""
        return self.b.zext(self.shuffle(codes, codes, [*range(8)]), self.int16s)

    def step_of(self, acc: dict, x: dict, s: int, w: Any) -> dict:
        """Add the products of step s of the codes that were loaded."""
        b, new, half = self.b, dict(acc), ir.VectorType(i16, 4)
        for n in range(4):
            column = b.add(w, self.word(2 * self.k.channels * n))
            places = [b.add(column, self.word(8 * j)) for j in range(self.k.vectors)]
            weights = [self.load(place, half, 8) for place in places]
            for i, codes in x.items():
                code = self.shuffle(codes, codes, 4 * [4 * s + n])
                for j, part in enumerate(weights):
                    new[i, j] = self.isa.multiplied(self, new[i, j], code, part)
        return new


class Taps(_ByLane, Depthwise):
    """Steps of two taps of every channel."""

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the step of a segment; returns sums and the end of the weights."""
        b, eight, new = self.b, ir.VectorType(i8, 8), dict(acc)
        for tap in (0, 1):
            at = b.sext(self.load(b.add(segment, self.word(4 * tap)), i32, 4), i64)
            first = b.add(w, self.word(self.k.channels * tap))
            places = [b.add(first, self.word(8 * j)) for j in range(self.k.sums)]
            weights = [self.load(place, eight, 8) for place in places]
            for i, base in enumerate(bases):
                kind = ir.VectorType(i8, self.k.channels)
                codes = self.isa.signed(self, self.load(b.add(base, at), kind, 1))
                for j, part in enumerate(weights):
                    code = self.shuffle(codes, codes, [*range(8 * j, 8 * j + 8)])
                    new[i, j] = self.isa.multiplied(self, new[i, j], code, part)
        return new, b.add(w, self.word(2 * self.k.channels))

    def widen(self, acc: dict, tile: tuple[int, int]) -> Any:
        """Return the int32 sums of a tile's vector."""
        return self.half(acc, tile)


class Positions(Pairs, Winograd):
    """Transformed codes, which are signed already."""

    def prepared(self, codes: Any) -> Any:
        """Return codes as they are."""
        return codes


class Columns(_ByLane, WinogradDot):
    """Columns of transformed codes, which are signed already."""

    def run(self, acc: dict, q: Any, steps: Any, w: Any) -> tuple[dict, Any]:
        """Emit steps that lie side by side; returns sums and the end of the weights."""
        b, position = self.b, RUN * self.k.pixels
        rows = list(dict.fromkeys(row for row, _, _ in acc))
        end = b.add(q, b.mul(steps, self.word(4)))
        row_bytes = self.step_bytes
        for steps in (self.together, 1):

            def add(acc: dict, q: Any, w: Any, steps: int = steps) -> tuple[dict, Any]:
                for n, row in enumerate(rows):
                    first = b.add(q, self.word(4 * position * row))
                    places = [b.add(first, self.word(RUN * i)) for i in range(self.k.pixels)]
                    x = {i: self.codes(place, steps) for i, place in enumerate(places)}
                    for s in range(steps):
                        of_row = {(i, j): acc[row, i, j] for i, j in self.tiles}
                        w_step = b.add(w, self.word(row_bytes * (2 * s + n)))
                        new = self.dot_step(of_row, x, s, w_step)
                        acc = acc | {(row, i, j): value for (i, j), value in new.items()}
                return acc, b.add(w, self.word(2 * row_bytes * steps))

            acc, q, w = self.loop(steps, add, acc, q, end, w)
        return acc, w
