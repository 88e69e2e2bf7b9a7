"""Moves of pixels whose channels lie together, from one distance to another: vectors of any width.

A pixel of few channels is one vector, or two that overlap: no loop over single bytes is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, i8, i64
from logshift.kernels.machine.isa.avx512 import AVX512_VBMI
from logshift.kernels.machine.lookup import Lookup
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.portable.lookup import look_up

_WIDTHS = (64, 32, 16, 8, 4)  # bytes of a vector, the widest that a pixel fills first
_FEWEST = 64  # codes of a pixel from which on they are looked up by vectors wherever these are


def _by_vectors(has_table: bool) -> Callable[..., Any]:
    """Return what moves pixels of at least four bytes, looked up on the way or not."""

    @intrinsic
    def move(typingctx, x, y, pixels, x_step, y_step, size, table):
        def codegen(context, builder, signature, args):
            x, y, pixels, x_step, y_step, size, table = args
            e = Emitter(builder)
            lookup = None
            if has_table and not AVX512_VBMI.available:  # never called
                return context.get_dummy_value()
            if has_table:
                lookup = Lookup(e, AVX512_VBMI, table, builder.add(table, e.word(256)))

            def vector(source: Any, target: Any, at: Any, width: int) -> None:
                codes = e.load(builder.add(source, at), ir.VectorType(i8, width), 1)
                if lookup is not None:
                    (codes,) = lookup([codes])
                e.store(codes, builder.add(target, at), 1)

            def row(width: int) -> None:
                last = builder.sub(size, e.word(width))
                with cgutils.for_range(builder, pixels, intp=i64) as loop:
                    source = builder.add(x, builder.mul(loop.index, x_step))
                    target = builder.add(y, builder.mul(loop.index, y_step))
                    with cgutils.for_range_slice(
                        builder, e.word(0), last, e.word(width), intp=i64
                    ) as (at, _):
                        vector(source, target, at, width)
                    vector(source, target, last, width)

            def widest(widths: tuple[int, ...]) -> None:
                if len(widths) == 1:
                    row(widths[0])
                    return
                fits = builder.icmp_signed(">=", size, e.word(widths[0]))
                with builder.if_else(fits) as (then, otherwise):
                    with then:
                        row(widths[0])
                    with otherwise:
                        widest(widths[1:])

            widest(_WIDTHS)
            return context.get_dummy_value()

        return types.void(x, y, pixels, x_step, y_step, size, table), codegen

    return move


_move, _look_up = _by_vectors(False), _by_vectors(True)


@intrinsic
def _permutes(typingctx):
    """Whether a pixel is looked up by permutations, in which a vector costs what a code does."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), AVX512_VBMI.available)

    return types.boolean(), codegen


@njit(error_model="numpy")
def _look_up_singly(x, y, pixels, x_step, y_step, size, table):
    source = carray(as_pointer(x), 1, np.uint8)
    target = carray(as_pointer(y), 1, np.uint8)
    entries = carray(as_pointer(table), 256, np.uint8)
    p, q, one, two = np.uintp(0), np.uintp(0), np.uintp(1), np.uintp(2)
    if size == 3:  # pictures
        for _ in range(pixels):
            first, second, third = source[p], source[p + one], source[p + two]
            target[q] = entries[first]
            target[q + one] = entries[second]
            target[q + two] = entries[third]
            p += np.uintp(x_step)
            q += np.uintp(y_step)
        return
    for _ in range(pixels):
        for c in range(np.uintp(size)):
            target[q + c] = entries[source[p + c]]
        p += np.uintp(x_step)
        q += np.uintp(y_step)


@njit(error_model="numpy")
def move_pixels(x, y, pixels, x_step, y_step, size, table):
    """Move `size` bytes of each of some pixels, looked up on the way unless `table` is 0.

    Parameters
    ----------
    x, y : addresses of the first pixel's bytes, here and there
    x_step, y_step : bytes from a pixel to the next
    table : address of uint8 (256,)
    """
    if table != 0:
        if pixels == 1:
            look_up(x, y, size, table)
        elif size >= 4 and _permutes():
            _look_up(x, y, pixels, x_step, y_step, size, table)
        elif size >= _FEWEST:
            for j in range(pixels):
                look_up(x + np.uintp(j * x_step), y + np.uintp(j * y_step), size, table)
        else:
            _look_up_singly(x, y, pixels, x_step, y_step, size, table)
    elif size >= 4:
        _move(x, y, pixels, x_step, y_step, size, table)
    else:
        source = carray(as_pointer(x), 1, np.uint8)
        target = carray(as_pointer(y), 1, np.uint8)
        for j in range(np.uintp(pixels)):
            p, q = j * np.uintp(x_step), j * np.uintp(y_step)
            for c in range(np.uintp(size)):
                target[q + c] = source[p + c]
