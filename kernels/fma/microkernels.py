"""Microkernels of the fma family, emitted as IR, and addresses of compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llvmlite import ir

from logshift.kernels.fma.tiles import FLOAT_SEGMENT, FLOAT_TILE, FLOAT_TILES, FloatTile
from logshift.kernels.machine import microkernel
from logshift.kernels.machine.emit import Emitter, f32, i64

_OFFSETS = {name: FLOAT_TILE.fields[name][1] for name in FLOAT_TILE.names}  # type: ignore[index, union-attr]
_UNROLLED = 4  # steps of a dense tile


class _Emission(Emitter):
    """The body of one microkernel, in LLVM IR."""

    def __init__(self, tile: FloatTile, builder: ir.IRBuilder, arguments: Any) -> None:
        super().__init__(builder)
        self.k, self.base = tile, arguments
        self.floats, self.size = tile.isa.floats, tile.isa.vector
        self.tiles = [(i, j) for i in range(tile.pixels) for j in range(tile.vectors)]
        self.step_bytes = 4 * tile.channels

    def field(self, name: str, kind: ir.Type = i64) -> Any:
        """Load a field of the record."""
        address = self.b.add(self.base, self.word(_OFFSETS[name]))
        return self.load(address, kind, 4 if kind == f32 else 8)

    def fma(self, x: Any, w: Any, acc: Any) -> Any:
        """Multiply and add vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{self.k.lanes}f32", self.floats, [x, w, acc])

    def phis(self, values: dict) -> dict:
        """Make a phi node for each of some vectors."""
        return {t: self.b.phi(value.type) for t, value in values.items()}

    # --- steps ----------------------------------------------------------------------------------

    def step(self, acc: dict, inputs: Iterable[Any], w: Any) -> dict:
        """Add the products of an input of each pixel; the weights of the step begin at w."""
        b, k = self.b, self.k
        new = {}
        if k.isa.by_lane and k.vectors > k.pixels:  # registers have no room for all weights
            x = list(inputs)
            for j in range(k.vectors):
                place = b.add(w, self.word(self.size * j))
                vector = self.load(place, self.floats, self.size)
                for i in range(k.pixels):
                    new[i, j] = self.fma(x[i], vector, acc[i, j])
            return new
        vectors = [
            self.load(b.add(w, self.word(self.size * j)), self.floats, self.size)
            for j in range(k.vectors)
        ]
        for i, x in enumerate(inputs):
            for j in range(k.vectors):
                new[i, j] = self.fma(x, vectors[j], acc[i, j])
        return new

    def inputs(self, rows: list[Any], steps: int) -> Iterator[Iterable[Any]]:
        """Yield the inputs of pixels in all lanes, step by step; those of the first lie at rows."""
        b, k = self.b, self.k
        if k.isa.by_lane and steps == k.lanes:
            # Products take a lane each of what is loaded at once.
            loaded = [self.load(row, self.floats, 4) for row in rows]
            for s in range(steps):
                yield [self.shuffle(x, x, k.lanes * [s]) for x in loaded]
            return
        for s in range(steps):
            places = [b.add(row, self.word(4 * s)) for row in rows]
            yield (self.splat(self.load(place, f32, 4), self.floats) for place in places)

    def loop(self, steps: int, acc: dict, bases: list[Any], q: Any, end: Any, w: Any) -> tuple:
        """Emit a loop of so many steps at a time, from q on while so many are left until `end`."""
        b = self.b
        before = b.block
        head, body, after = (b.append_basic_block(f"{n}_{steps}") for n in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        q_phi, w_phi, held = b.phi(i64), b.phi(i64), self.phis(acc)
        following = b.add(q_phi, self.word(4 * steps))
        b.cbranch(b.icmp_signed("<=", following, end), body, after)
        b.position_at_end(body)
        new = held
        for s, x in enumerate(self.inputs([b.add(base, q_phi) for base in bases], steps)):
            new = self.step(new, x, b.add(w_phi, self.word(self.step_bytes * s)))
        w_next = b.add(w_phi, self.word(self.step_bytes * steps))
        b.branch(head)
        self.incoming(q_phi, (before, q), (b.block, following))
        self.incoming(w_phi, (before, w), (b.block, w_next))
        for t, phi in held.items():
            self.incoming(phi, (before, acc[t]), (b.block, new[t]))
        b.position_at_end(after)
        return held, q_phi, w_phi

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        """Emit the steps of a segment; returns sums and the end of the weights."""
        b = self.b
        q = self.load(segment, i64, 8)
        end = b.add(q, self.load(b.add(segment, self.word(8)), i64, 8))
        acc, q, w = self.loop(_UNROLLED, acc, bases, q, end, w)
        acc, q, w = self.loop(1, acc, bases, q, end, w)
        return acc, w

    # --- the kernel -----------------------------------------------------------------------------

    def emit(self) -> None:
        b, k = self.b, self.k
        blocks, segments, segments_end = map(self.field, ("blocks", "segments", "segments_end"))
        x_table, x_offset, x_step = map(self.field, ("x", "x_offset", "x_step"))
        first_weights = self.field("weights")
        entry = b.block
        block, segment, after = (b.append_basic_block(n) for n in ("block", "segment", "after"))
        done = b.append_basic_block("done")
        b.branch(block)

        b.position_at_end(block)
        index = b.phi(i64)
        offset = b.add(x_offset, b.mul(index, x_step))
        bases = [b.add(self.at(x_table, i), offset) for i in range(k.pixels)]
        weights = b.add(first_weights, b.mul(index, self.field("w_step")))
        channel = b.mul(index, self.word(4 * k.channels))
        b.branch(segment)

        b.position_at_end(segment)
        s, w = b.phi(i64), b.phi(i64)
        zeros = {t: self.constant(0.0, self.floats) for t in self.tiles}
        acc = self.phis(zeros)
        new, w_next = self.run(acc, bases, s, w)
        s_next = b.add(s, self.word(FLOAT_SEGMENT.itemsize))
        self.incoming(s, (block, segments), (b.block, s_next))
        self.incoming(w, (block, weights), (b.block, w_next))
        for t, phi in acc.items():
            self.incoming(phi, (block, zeros[t]), (b.block, new[t]))
        b.cbranch(b.icmp_signed("<", s_next, segments_end), segment, after)

        b.position_at_end(after)
        self.epilogue(new, channel)
        index_next = b.add(index, self.word(1))
        self.incoming(index, (entry, self.word(0)), (b.block, index_next))
        b.cbranch(b.icmp_signed("<", index_next, blocks), block, done)
        b.position_at_end(done)

    def places(self, name: str, channel: Any) -> Callable[[int], Any]:
        """Return what gives the address of a pixel's output, or residual, in the present block."""
        table, offset = self.field(name), self.b.add(channel, self.field("y_offset"))
        return lambda i: self.b.add(self.at(table, i), offset)

    def epilogue(self, acc: dict, channel: Any) -> None:
        """Add the bias, and the residual if there is one, clamp and store."""
        b = self.b
        residual = b.icmp_signed("!=", self.field("has_residual"), self.word(0))
        with b.if_else(residual) as branches:
            for branch, has_residual in zip(branches, (True, False), strict=True):
                with branch:
                    self.write(acc, channel, has_residual)

    def write(self, acc: dict, channel: Any, has_residual: bool) -> None:
        b, k = self.b, self.k
        bias = b.add(self.field("b"), channel)
        lo, hi = (self.splat(self.field(n, f32), self.floats) for n in ("lo", "hi"))
        y, r = self.places("y", channel), self.places("r", channel)
        for j in range(k.vectors):
            at = self.word(self.size * j)
            shift = self.load(b.add(bias, at), self.floats, self.size)
            for i in range(k.pixels):
                v = b.fadd(acc[i, j], shift)
                if has_residual:
                    v = b.fadd(v, self.load(b.add(r(i), at), self.floats, 4))
                v = b.select(b.fcmp_ordered(">", v, lo), v, lo)
                v = b.select(b.fcmp_ordered("<", v, hi), v, hi)
                self.store(v, b.add(y(i), at), 4)


class _Depthwise(_Emission):
    """Steps of one tap of every channel."""

    def run(self, acc: dict, bases: list[Any], segment: Any, w: Any) -> tuple[dict, Any]:
        b, k = self.b, self.k
        q = self.load(segment, i64, 8)
        new = {}
        for j in range(k.vectors):
            offset = b.add(q, self.word(self.size * j))
            vector = self.load(b.add(w, self.word(self.size * j)), self.floats, self.size)
            for i, base in enumerate(bases):
                x = self.load(b.add(base, offset), self.floats, 4)
                new[i, j] = self.fma(x, vector, acc[i, j])
        return new, b.add(w, self.word(self.step_bytes))


class _Window(_Emission):
    """A rectangle of pixels of a depthwise convolution; a block is one vector of channels."""

    def emit(self) -> None:
        b, k = self.b, self.k
        assert k.window is not None
        kernel, stride = k.window
        x_first, x_row, x_column = map(self.field, ("x", "x_row", "x_column"))
        blocks, first_weights = self.field("blocks"), self.field("weights")
        entry = b.block
        block, done = (b.append_basic_block(n) for n in ("block", "done"))
        b.branch(block)

        b.position_at_end(block)
        index = b.phi(i64)
        channel = b.mul(index, self.word(self.size))
        x = b.add(x_first, channel)
        w = b.add(first_weights, b.mul(channel, self.word(kernel**2)))
        acc = {t: self.constant(0.0, self.floats) for t in self.tiles}
        weights = {}
        reads = [(n - 1) * stride + kernel for n in (k.rows, k.columns)]
        for row in range(reads[0]):
            line = b.add(x, b.mul(x_row, self.word(row)))
            for column in range(reads[1]):
                place = b.add(line, b.mul(x_column, self.word(column)))
                value = self.load(place, self.floats, 4)
                for i in range(k.pixels):
                    ky = row - i // k.columns * stride
                    kx = column - i % k.columns * stride
                    if not (0 <= ky < kernel and 0 <= kx < kernel):
                        continue
                    if (ky, kx) not in weights:
                        at = self.word(self.size * (ky * kernel + kx))
                        weights[ky, kx] = self.load(b.add(w, at), self.floats, self.size)
                    acc[i, 0] = self.fma(value, weights[ky, kx], acc[i, 0])
        self.epilogue(acc, channel)
        index_next = b.add(index, self.word(1))
        self.incoming(index, (entry, self.word(0)), (b.block, index_next))
        b.cbranch(b.icmp_signed("<", index_next, blocks), block, done)
        b.position_at_end(done)

    def places(self, name: str, channel: Any) -> Callable[[int], Any]:
        b, columns = self.b, self.k.columns
        first = b.add(self.field(name), channel)
        row, column = self.field(f"{name}_row"), self.field(f"{name}_column")

        def place(i: int) -> Any:
            line = b.add(first, b.mul(row, self.word(i // columns)))
            return b.add(line, b.mul(column, self.word(i % columns)))

        return place


_KINDS = {"dense": _Emission, "depthwise": _Depthwise, "window": _Window}


def emit(name: str, builder: ir.IRBuilder, arguments: Any) -> None:
    """Emit the microkernel of a name; takes the address of a FLOAT_TILE record."""
    tile = FLOAT_TILES[name]
    _KINDS[tile.kind](tile, builder, arguments).emit()


def address(tile: FloatTile) -> int:
    """Address of the compiled microkernel, `void (FLOAT_TILE *)`."""
    return microkernel.address(__name__, tile.name)
