"""Sixteen numbers at a time, for stretches too short for the compiler to make vectors of.

Machines with narrower registers take several of these. Where a stretch is no multiple, its last
vector overlaps the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, f32, i8
from logshift.kernels.machine.native import as_pointer

LANES = 16
_FLOATS, _DOUBLES, _BYTES = (ir.VectorType(k, LANES) for k in (f32, ir.DoubleType(), i8))


def _loop(e: Emitter, begin: Any, end: Any, totals: list[Any], body: Callable) -> list[Any]:
    """Emit a loop over vectors: `body(elements before, totals)` returns new totals."""
    b = e.b
    before, head, loop, after = b.block, *(b.append_basic_block(n) for n in ("head", "in", "done"))
    b.branch(head)
    b.position_at_end(head)
    place, held = b.phi(end.type), [b.phi(total.type) for total in totals]
    b.cbranch(b.icmp_signed("<", place, end), loop, after)
    b.position_at_end(loop)
    new = body(place, held)
    following = b.add(place, e.word(LANES))
    b.branch(head)
    e.incoming(place, (before, begin), (b.block, following))
    for phi, first, last in zip(held, totals, new, strict=True):
        e.incoming(phi, (before, first), (b.block, last))
    b.position_at_end(after)
    return held


def _place(e: Emitter, address: Any, place: Any, last: Any) -> Any:
    """Address of a vector that begins no later than the last one."""
    b = e.b
    place = b.select(b.icmp_signed("<", place, last), place, last)
    return b.add(address, b.mul(place, e.word(4)))


def _halved(e: Emitter, values: Any, join: Callable) -> Any:
    """Join lanes that lie half of them apart, until there is one."""
    half = LANES // 2
    while half > 0:
        upper = e.shuffle(values, values, [*range(half, 2 * half)])
        values = join(e.shuffle(values, values, [*range(half)]), upper)
        half //= 2
    return e.b.extract_element(values, ir.Constant(ir.IntType(32), 0))


@intrinsic
def largest_of(typingctx, x, count):
    """Return the largest of floats at an address, at least 16, or what is not a number."""

    def codegen(context, builder, signature, args):
        e, (x, count) = Emitter(builder), args
        last = builder.sub(count, e.word(LANES))

        def maximum(v, r):
            is_larger = builder.fcmp_ordered(">=", v, r)
            is_larger = builder.or_(is_larger, builder.fcmp_unordered("uno", v, v))
            return builder.select(is_larger, v, r)

        def body(place, totals):
            return [maximum(e.load(_place(e, x, place, last), _FLOATS, 4), totals[0])]

        first = e.load(x, _FLOATS, 4)
        (top,) = _loop(e, e.word(LANES), count, [first], body)
        return _halved(e, top, maximum)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def divide(typingctx, x, divisor, y, count):
    """Write floats at an address, at least 16, divided by one number, to another address."""

    def codegen(context, builder, signature, args):
        e, (x, divisor, y, count) = Emitter(builder), args
        last, whole = builder.sub(count, e.word(LANES)), e.splat(divisor, _FLOATS)

        def body(place, totals):
            values = e.load(_place(e, x, place, last), _FLOATS, 4)
            e.store(builder.fdiv(values, whole), _place(e, y, place, last), 4)
            return []

        _loop(e, e.word(0), count, [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), codegen


@intrinsic
def sum_lanes(typingctx, x, count, sums, squares):
    """Write sums of every sixteenth float at an address, and of squares, as doubles to others.

    The count is a multiple of 16.
    """

    def codegen(context, builder, signature, args):
        e, (x, count, sums, squares) = Emitter(builder), args

        def body(place, totals):
            at = builder.add(x, builder.mul(place, e.word(4)))
            values = builder.fpext(e.load(at, _FLOATS, 4), _DOUBLES)
            products = builder.fmul(values, values)
            return [builder.fadd(totals[0], values), builder.fadd(totals[1], products)]

        zeros = e.constant(0.0, _DOUBLES)
        totals = _loop(e, e.word(0), count, [zeros, zeros], body)
        for total, at in zip(totals, (sums, squares), strict=True):
            e.store(total, at, 8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def join_lanes(typingctx, sums):
    """Return the sum of 16 doubles at an address, joined in pairs that lie half of them apart."""

    def codegen(context, builder, signature, args):
        e = Emitter(builder)
        return _halved(e, e.load(args[0], _DOUBLES, 8), builder.fadd)

    return types.float64(types.int64), codegen


def _transpose(kind: ir.VectorType, align: int) -> Any:
    """Return what writes 16 rows of 16 numbers as columns."""

    @intrinsic
    def transpose(typingctx, x, x_row, y, y_row):
        """Take addresses, and bytes from row to row."""

        def codegen(context, builder, signature, args):
            e, (x, x_row, y, y_row) = Emitter(builder), args

            def at(base, row, number):
                return builder.add(base, builder.mul(row, e.word(number)))

            half = LANES // 2
            rows = [e.load(at(x, x_row, i), kind, align) for i in range(LANES)]
            low, high = (
                [k // 2 + k % 2 * LANES + begin for k in range(LANES)] for begin in (0, half)
            )
            # Each time, rows that are half of them apart are dealt out alternately.
            for _ in range(4):
                rows = [
                    e.shuffle(rows[i], rows[i + half], lanes)
                    for i in range(half)
                    for lanes in (low, high)
                ]
            for i, row in enumerate(rows):
                e.store(row, at(y, y_row, i), align)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return transpose


transpose_bytes, transpose_floats = _transpose(_BYTES, 1), _transpose(_FLOATS, 4)


@intrinsic
def interleave_three(typingctx, x, x_row, y):
    """Write 16 bytes of each of three rows, `x_row` apart, in turns, to an address."""

    def codegen(context, builder, signature, args):
        e, (x, x_row, y) = Emitter(builder), args
        first, second, third = (
            e.load(builder.add(x, builder.mul(x_row, e.word(i))), _BYTES, 1) for i in range(3)
        )
        pairs = e.shuffle(first, second, [*range(2 * LANES)])
        more = e.shuffle(third, third, [*range(2 * LANES)])
        lanes = [k // 3 + k % 3 * LANES for k in range(3 * LANES)]
        e.store(e.shuffle(pairs, more, lanes), y, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@njit(error_model="numpy")
def transpose_rows(x, x_row, y, y_row, rows, columns):
    """Write rows of float32 as columns; takes addresses, and how many numbers lie between rows."""
    x, y = np.int64(x), np.int64(y)
    if rows >= LANES and columns >= LANES:
        for i in range(0, rows, LANES):
            first = min(i, rows - LANES)  # the last ones overlap others
            for j in range(0, columns, LANES):
                column = min(j, columns - LANES)
                at, to = x + 4 * (first * x_row + column), y + 4 * (column * y_row + first)
                transpose_floats(at, 4 * x_row, to, 4 * y_row)
        return
    for i in range(rows):
        row = carray(as_pointer(np.uintp(x + 4 * i * x_row)), columns, np.float32)
        to = carray(as_pointer(np.uintp(y + 4 * i)), (columns - 1) * y_row + 1, np.float32)
        for j in range(np.uintp(columns)):
            to[j * np.uintp(y_row)] = row[j]
