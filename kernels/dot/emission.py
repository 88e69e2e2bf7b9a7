"""What microkernels of the dot family are emitted from: fields, steps, and the requantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llvmlite import ir

from logshift.kernels.activation import ACTIVATIONS, PIECES, PIECEWISE, PRELU
from logshift.kernels.dot.tiles import TILE, Microkernel
from logshift.kernels.machine.emit import Emitter, f32, i8, i16, i32, i64
from logshift.kernels.machine.lookup import Lookup

OFFSETS = {name: TILE.fields[name][1] for name in TILE.names}  # type: ignore[index, union-attr]


class Emission(Emitter):
    """The body of one microkernel, in LLVM IR; subclasses say in which order steps are taken."""

    def __init__(
        self, kernel: Microkernel, builder: ir.IRBuilder, arguments: Any, is_activated: bool
    ) -> None:
        super().__init__(builder)
        self.k, self.isa, self.base = kernel, kernel.isa, arguments
        self.is_activated = is_activated
        self.size = self.isa.vector
        self.bytes, self.int16s = self.isa.bytes, self.isa.int16s
        self.int32s, self.floats = self.isa.int32s, self.isa.floats
        self.tiles = [(i, j) for i in range(kernel.pixels) for j in range(kernel.vectors)]

    def emit(self) -> None:
        """Emit all of it."""
        raise NotImplementedError

    def field(self, name: str, kind: ir.Type = i64) -> Any:
        """Load a field of the record."""
        place = self.b.add(self.base, self.word(OFFSETS[name]))
        return self.load(place, kind, 4 if kind in (i32, f32) else 8)

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights of one step."""
        return self.k.codes * self.k.channels * (2 if self.k.kind == "wide" else 1)

    def step(self, acc: dict, rows: Iterable[Any], w: Any) -> dict:
        """Add the products of 4 codes of each pixel; the weights of the step begin at w."""
        b, size = self.b, self.size
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
                    new[i, j] = b.add(acc[i, j], self.isa.byte_pairs(self, x, vectors[j]))
                elif self.k.kind in ("dot", "winograd_dot"):
                    new[i, j] = self.isa.byte_dot(self, acc[i, j], x, vectors[j])
                else:
                    w_even, w_odd = (b.bitcast(vectors[2 * j + p], self.int16s) for p in (0, 1))
                    total = b.add(acc[i, j], self.isa.word_pairs(self, even, w_even))
                    new[i, j] = b.add(total, self.isa.word_pairs(self, odd, w_odd))
        return new

    # --- requantization ---------------------------------------------------------------------------

    def epilogue(self, total: Callable, channel: Any, bytes_of_words: Any) -> None:
        """Requantize the tile: y = t * M + B (+ residual), function, clamp, round, look up, store.

        One piece of code for each case: tests inside would cost registers.
        """
        b = self.b

        def with_or_without_residual(store: Callable) -> None:
            residual = b.icmp_signed("!=", self.field("has_residual", i32), ir.Constant(i32, 0))
            with b.if_else(residual) as branches:
                for branch, has_residual in zip(branches, (True, False), strict=True):
                    with branch:
                        value = self.scaled(total, channel, bytes_of_words, has_residual)
                        store(value, has_residual)

        if self.is_activated:
            after = b.append_basic_block("activated")
            choice = b.switch(self.field("activation"), after)
            for kind in range(1, 1 + len(ACTIVATIONS)):
                case = b.append_basic_block(ACTIVATIONS[kind - 1])
                choice.add_case(self.word(kind), case)
                b.position_at_end(case)
                with_or_without_residual(
                    partial(self.store_activated, kind, channel, bytes_of_words)
                )
                b.branch(after)
            b.position_at_end(after)
            return
        is_float = b.icmp_signed("!=", self.field("float_output", i32), ir.Constant(i32, 0))
        table = self.field("table")
        with b.if_else(is_float) as (floats, codes):
            with floats:
                with_or_without_residual(lambda value, _: self.store_floats(value, channel))
            with codes, b.if_else(b.icmp_unsigned("==", table, self.word(0))) as (plain, look_up):
                with plain:
                    with_or_without_residual(
                        lambda value, residual: self.store_codes(value, channel, not residual)
                    )
                with look_up:
                    with_or_without_residual(
                        lambda value, residual: self.store_codes(
                            value, channel, not residual, table
                        )
                    )

    def scaled(
        self, total: Callable, channel: Any, bytes_of_words: Any, residual: bool
    ) -> Callable[[tuple[int, int]], Any]:
        """Return what computes a vector of real-valued outputs, unclamped, when it is called."""
        b, k, size = self.b, self.k, self.size
        m, bias = (b.add(self.field(n), bytes_of_words) for n in ("m", "b"))
        in_pairs = self.isa.by_lane and k.vectors % 2 == 0  # of vectors, in int16
        if residual:
            r, z = self.places("r", channel), self.field("z_r", i32)
            z_r = (
                self.splat(b.trunc(z, i16), self.int16s) if in_pairs else self.splat(z, self.int32s)
            )
            m_r = self.splat(self.field("m_r", f32), self.floats)

        def codes(i: int, j: int, lanes: int) -> Any:
            address = b.add(r(i), self.word(k.lanes * j))
            return self.load(address, ir.VectorType(i8, lanes), 1)

        pairs: dict[tuple[int, int], Any] = {}

        def difference(i: int, j: int) -> Any:
            """Return codes of a residual less their zero point, as int32."""
            if not in_pairs:
                return b.sub(b.zext(codes(i, j, k.lanes), self.int32s), z_r)
            if (i, j // 2) not in pairs:
                loaded = b.zext(codes(i, j - j % 2, 2 * k.lanes), self.int16s)
                pairs[i, j // 2] = b.sub(loaded, z_r)
            pair, first = pairs[i, j // 2], j % 2 * k.lanes
            half = self.shuffle(pair, pair, [*range(first, first + k.lanes)])
            return b.sext(half, self.int32s)

        def compute(tile: tuple[int, int]) -> Any:
            i, j = tile
            scale = self.load(b.add(m, self.word(size * j)), self.floats, size)
            shift = self.load(b.add(bias, self.word(size * j)), self.floats, size)
            v = b.fadd(b.fmul(b.sitofp(total(tile), self.floats), scale), shift)
            if not residual:
                return v
            return b.fadd(v, b.fmul(b.sitofp(difference(i, j), self.floats), m_r))

        return compute

    # --- fused functions --------------------------------------------------------------------------

    def store_activated(
        self, kind: int, channel: Any, bytes_of_words: Any, value: Callable, residual: bool
    ) -> None:
        """Compute a function, round and store."""
        if kind == PIECEWISE:
            self.store_codes(value, channel, not residual, between=self.piecewise())
        else:
            function = self.prelu if kind == PRELU else self.hard_swish
            self.store_codes(function(value, bytes_of_words), channel, bounded=False)

    def prelu(self, value: Callable, bytes_of_words: Any) -> Callable:
        """(max(v, 0) + min(v, 0) * slope) + c0."""
        b, size, zero = self.b, self.size, self.constant(0.0, self.floats)
        (last,) = self.coefficients(1)
        slopes = b.add(self.field("slopes"), bytes_of_words)

        def compute(tile: tuple[int, int]) -> Any:
            v = value(tile)
            slope = self.load(b.add(slopes, self.word(size * tile[1])), self.floats, size)
            below = b.fmul(self.least(v, zero), slope)
            return b.fadd(b.fadd(self.greatest(v, zero), below), last)

        return compute

    def hard_swish(self, value: Callable, bytes_of_words: Any) -> Callable:
        """(v * c0 + c1) * clamp(v, 0, 1) + c2."""
        b = self.b
        scale, shift, last = self.coefficients(3)
        zero, one = (self.constant(bound, self.floats) for bound in (0.0, 1.0))

        def compute(tile: tuple[int, int]) -> Any:
            v = value(tile)
            gate = self.least(self.greatest(v, zero), one)
            return b.fadd(b.fmul(b.fadd(b.fmul(v, scale), shift), gate), last)

        return compute

    def piecewise(self) -> Callable[[Any], Any]:
        """Return what computes the function of int16 k: 16 parabolas, in int16."""
        b, isa, kind = self.b, self.isa, self.int16s
        first = self.field("coefficients")
        lookups = [isa.sixteen(self, b.add(first, self.word(2 * PIECES * d))) for d in range(3)]

        def compute(k: Any) -> Any:
            c0, c1, c2 = (lookup(b.lshr(k, self.constant(12, kind))) for lookup in lookups)
            f = b.xor(b.shl(k, self.constant(4, kind)), self.constant(-32768, kind))
            p = b.add(c1, isa.rounded_product(self, c2, f))
            y = [c0, isa.rounded_product(self, p, f)]
            y = self.intrinsic(f"llvm.sadd.sat.v{kind.count}i16", kind, y)
            return isa.rounded_product(self, y, self.constant(256, kind))  # (y + 64) >> 7

        return compute

    def coefficients(self, count: int) -> list[Any]:
        """Load the first coefficients, each into all lanes."""
        first = self.field("coefficients")
        places = [self.b.add(first, self.word(4 * index)) for index in range(count)]
        return [self.splat(self.load(place, f32, 4), self.floats) for place in places]

    # --- memory -----------------------------------------------------------------------------------

    def places(self, name: str, offset: Any) -> Callable[[int], Any]:
        """Return what gives the address of a pixel's outputs, or residuals, from an offset on."""
        table = self.field(name)
        return lambda i: self.b.add(self.at(table, i), offset)

    def least(self, v: Any, bound: Any) -> Any:
        """Return the smaller of each pair of floats."""
        return self.b.select(self.b.fcmp_ordered("<", v, bound), v, bound)

    def greatest(self, v: Any, bound: Any) -> Any:
        """Return the larger of each pair of floats."""
        return self.b.select(self.b.fcmp_ordered(">", v, bound), v, bound)

    def store_floats(self, value: Callable, channel: Any) -> None:
        """Clamp and store."""
        b, size = self.b, self.size
        lo, hi = (self.splat(self.field(n, f32), self.floats) for n in ("lo", "hi"))
        y = self.places("y", b.mul(channel, self.word(4)))
        for i, j in self.tiles:
            v = self.least(self.greatest(value((i, j)), lo), hi)
            self.store(v, b.add(y(i), self.word(size * j)), 4)

    def store_codes(
        self, value: Callable, channel: Any, bounded: bool, table: Any = None, between: Any = None
    ) -> None:
        """Round vectors, four together because the machine packs them, and store.

        Codes go through a table if there is one; `between` is a function of int16 on the way.
        """
        b, k = self.b, self.k
        y = self.places("y", channel)
        lookup = None if table is None else Lookup(self, self.isa, table, self.field("table_end"))
        groups = [self.tiles[first : first + 4] for first in range(0, len(self.tiles), 4)]

        def rounded(tiles: list[tuple[int, int]]) -> Any:
            return self.rounded([value(t) for t in tiles], bounded, between)

        # By lane, a table is larger than what registers hold beside sums: all look up in each part.
        together = lookup([rounded(g) for g in groups]) if lookup and self.isa.by_lane else None
        for number, tiles in enumerate(groups):
            codes = rounded(tiles) if together is None else together[number]
            if lookup is not None and together is None:
                (codes,) = lookup([codes])
            elif self.is_activated:
                codes = self.looked_up(codes)
            # Vectors of one pixel lie side by side, here and in memory.
            for i in dict.fromkeys(i for i, _ in tiles):
                places = [place for place, t in enumerate(tiles) if t[0] == i]
                begin, end = places[0] * k.lanes, (places[-1] + 1) * k.lanes
                part = self.shuffle(codes, codes, [*range(begin, end)])
                offset = self.word(k.lanes * tiles[places[0]][1])
                self.store(part, b.add(y(i), offset), 1)

    def looked_up(self, codes: Any) -> Any:
        """Look codes up in the table, if there is one."""
        b, before, table = self.b, self.b.block, self.field("table")
        with b.if_then(b.icmp_unsigned("!=", table, self.word(0))):
            (found,) = Lookup(self, self.isa, table, self.field("table_end"))([codes])
            after = b.block
        result = b.phi(codes.type)
        self.incoming(result, (before, codes), (after, found))
        return result

    def rounded(self, values: list[Any], bounded: bool, between: Any) -> Any:
        """Clamp, round half to even, and join to one vector of uint8.

        Packing saturates, and lo and hi act on codes. What is below the range of int32 converts to
        the least int32, and so would be what is above, unless the instruction set saturates: if it
        is not `bounded` (`Layer.fits_int32`), for there is a residual or a function, hi, or what
        an int16 can hold, comes first.
        """
        b = self.b
        bounded = bounded or self.isa.saturates
        if not bounded:
            hi = self.field("hi", f32) if between is None else ir.Constant(f32, 32767.0)
            hi = self.splat(hi, self.floats)
            values = [self.least(v, hi) for v in values]
        words = [self.isa.nearest(self, v) for v in values]
        words += words[:1] * (4 - len(words))
        codes = self.isa.packed(self, words, between)
        lo, hi_code = (
            b.bitcast(self.splat(self.field(name, i32), self.int32s), self.bytes)
            for name in ("lo_code", "hi_code")
        )
        codes = b.select(b.icmp_unsigned(">", codes, lo), codes, lo)
        if bounded or between is not None:
            codes = b.select(b.icmp_unsigned("<", codes, hi_code), codes, hi_code)
        return codes
