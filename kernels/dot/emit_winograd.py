"""Winograd convolution emitted as IR: the transform of codes, products, the way back to outputs.

`winograd` says what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from logshift.kernels.dot.emission import OFFSETS, Emission
from logshift.kernels.dot.emit_direct import Direct
from logshift.kernels.dot.tiles import RUN
from logshift.kernels.machine.emit import Emitter, i64

POSITIONS = 16
BOTH_ADD = 5  # the position (1, 1), the only one that has no difference of codes in it


# --- codes --------------------------------------------------------------------------------------


def _differences(b, x):
    """B^T x, along one axis."""
    return b.sub(x[0], x[2]), b.add(x[1], x[2]), b.sub(x[2], x[1]), b.sub(x[1], x[3])


def _transforming(vector: int) -> Callable:
    """Return what transforms the codes of some channels of a tile."""

    @intrinsic
    def transform(typingctx, x, row, last_row, column, last_column, added, both, u, step):
        """Store B^T x B, and `added` where a difference is in it, `both` elsewhere.

        x is the address of its first code; row, column, last_row, last_column are bytes to the
        next, and to the last, row and column. u is the address of position 0, step bytes to the
        next one.
        """
        signature = types.void(x, row, last_row, column, last_column, added, both, u, step)

        def codegen(context, b, signature, args):
            x, row, last_row, column, last_column, added, both, u, step = args
            word = partial(ir.Constant, ir.IntType(64))
            kind = ir.VectorType(ir.IntType(8), vector)
            e = Emitter(b)
            added, both = (e.splat(b.trunc(v, kind.element), kind) for v in (added, both))
            rows, columns = (
                [word(0), first, b.add(first, first), b.add(b.add(first, first), last)]
                for first, last in ((row, last_row), (column, last_column))
            )

            def pointer(base, *offsets):
                for offset in offsets:
                    base = b.add(base, offset)
                return b.inttoptr(base, kind.as_pointer())

            halfway = [
                _differences(b, [b.load(pointer(x, r, s), align=1) for r in rows]) for s in columns
            ]
            for i in range(4):
                for j, value in enumerate(_differences(b, [column[i] for column in halfway])):
                    position = 4 * i + j
                    value = b.add(value, both if position == BOTH_ADD else added)
                    place = pointer(u, b.mul(step, word(position)))
                    b.store(value, place, align=vector)
            return context.get_dummy_value()

        return signature, codegen

    return transform


transform_half, transform_run = _transforming(RUN // 2), _transforming(RUN)


# --- microkernels -------------------------------------------------------------------------------


class Winograd(Direct):
    """Blocks are the 16 positions of `pixels` transformed tiles, each of which has 4 outputs.

    The tables y and r hold the addresses of 4 pixels per tile; the record's y and r move past them.
    """

    def emit(self) -> None:
        """Emit the products of all positions, and the way back from them to outputs."""
        b, k, size = self.b, self.k, self.size
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
            address = b.add(self.base, self.word(OFFSETS[name]))
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
        b, size = self.b, self.size
        begin = b.add(self.products, b.mul(bytes_of_words, self.word(self.k.pixels)))
        for number, t in enumerate(self.tiles):
            self.store(total(t), b.add(begin, self.word(size * number)), size)


class WinogradDot(Emission):
    """One column of the 16 positions of `blocks` times `pixels` transformed tiles of pixels.

    With M the products of a position, down a column

        V0 = (M1 + M2) / 2 + M0        V1 = (M1 - M2) / 2 - M3

    and along a row of these, in the same way, two outputs. Sums and differences of M1 and M2 are
    even, M3 is summed with its sign turned. Columns 1, 2, 3 and 0 are calls in this order; what
    they leave to each other lies at `sums`, 4 vectors for each tile and vector of channels, of
    which column 3 begins with the third. The records y and r have 4 outputs per tile, row by row.
    """

    def emit(self) -> None:
        """Emit a loop over calls, each two pairs of rows of the column."""
        b, k, size = self.b, self.k, self.size
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
            address = b.add(self.base, self.word(OFFSETS[name]))
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
        begin, position = b.block, RUN * self.k.pixels
        run, done = (b.append_basic_block(n) for n in ("run", "done"))
        b.branch(run)

        b.position_at_end(run)
        x_run, w_run, left = (b.phi(i64) for _ in range(3))
        run_acc = {t: b.phi(self.int32s) for t in acc}
        few = b.icmp_signed("<", left, self.word(RUN // 4))
        steps = b.select(few, left, self.word(RUN // 4))
        new, w_next = self.run(run_acc, x_run, steps, w_run)
        ran = b.block
        x_next = b.add(x_run, self.word(16 * position))
        left_next = b.sub(left, self.word(RUN // 4))
        b.cbranch(b.icmp_signed(">", left_next, self.word(0)), run, done)
        b.position_at_end(done)
        self.incoming(x_run, (begin, x), (ran, x_next))
        self.incoming(w_run, (begin, w), (ran, w_next))
        self.incoming(left, (begin, count), (ran, left_next))
        for t in acc:
            self.incoming(run_acc[t], (begin, acc[t]), (ran, new[t]))
        return new, w_next

    def run(self, acc: dict, x: Any, steps: Any, w: Any) -> tuple[dict, Any]:
        """Emit steps that lie side by side; returns sums and the end of the weights."""
        b, position = self.b, RUN * self.k.pixels
        rows = list(dict.fromkeys(row for row, _, _ in acc))
        end = b.add(x, b.mul(steps, self.word(4)))
        begin, loop, ran = b.block, *(b.append_basic_block(n) for n in ("step", "ran"))
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
        self.incoming(q, (begin, x), (loop, q_next))
        self.incoming(w_q, (begin, w), (loop, w_next))
        for t in acc:
            self.incoming(held[t], (begin, acc[t]), (loop, new[t]))
        return new, w_next
