"""Products of matrices of float32, by tiles of rows and columns that are read where they lie.

Lanes are columns, so that every element is one chain of fused multiply-adds. The last tile of rows,
and of columns, overlaps the one before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, f32
from logshift.kernels.machine.isa.avx2 import FMA
from logshift.kernels.machine.isa.avx512 import AVX512
from logshift.kernels.machine.isa.neon import NEON
from logshift.kernels.machine.jit import njit
from logshift.kernels.records import share
from logshift.kernels.reference.onnx_ops import ONNX_MATMUL, axes_of, place
from logshift.kernels.registry import register

ISA = next((isa for isa in (AVX512, FMA, NEON) if isa.available), NEON)
_LANES = ISA.lanes
_HALF, _QUARTER = max(_LANES // 2, 1), max(_LANES // 4, 1)
MANY, FEW = 8, 4  # rows of a tile
_NOTHING = np.int64(0)
_CHUNK = 128  # columns that all rows take before others, so that they stay in the cache


def _tile(rows: int, columns: int, adds: bool) -> Any:
    """Return what computes so many rows and columns, or adds them to z."""
    widths = [min(columns, _LANES)] * max(columns // _LANES, 1)

    @intrinsic
    def tile(typingctx, x, x_row, r, r_row, y, y_row, count, z, z_row):
        """Take addresses of first elements, bytes from row to row, and how many products."""

        def codegen(context, builder, signature, args):
            *others, z, z_row = args
            _emit(Emitter(builder), rows, widths, *others, (z, z_row) if adds else None)
            return context.get_dummy_value()

        return types.void(x, x_row, r, r_row, y, y_row, count, z, z_row), codegen

    return tile


def _emit(
    e: Emitter, rows: int, widths: list[int], x: Any, x_row: Any, r: Any, r_row: Any, y: Any,
    y_row: Any, count: Any, first: tuple[Any, Any] | None,
) -> None:  # fmt: skip
    """Emit a loop over the products of a tile, which are added to `first`, and its stores."""
    b, kind = e.b, ir.VectorType(f32, widths[0])
    begins = [4 * kind.count * j for j in range(len(widths))]
    tiles = [(i, j) for i in range(rows) for j in range(len(widths))]
    lines = [b.add(x, b.mul(x_row, e.word(i))) for i in range(rows)]
    totals = {t: e.constant(0.0, kind) for t in tiles}
    if first is not None:
        z, z_row = first
        for i, j in tiles:
            at = b.add(b.add(z, b.mul(z_row, e.word(i))), e.word(begins[j]))
            totals[i, j] = e.load(at, kind, 4)
    before, loop, after = b.block, *(b.append_basic_block(n) for n in ("product", "done"))
    b.branch(loop)
    b.position_at_end(loop)
    k, at = b.phi(count.type), b.phi(r.type)
    acc = {t: b.phi(kind) for t in tiles}
    vectors = [e.load(b.add(at, e.word(begin)), kind, 4) for begin in begins]
    new = {}
    for i, line in enumerate(lines):
        value = e.splat(e.load(b.add(line, b.mul(k, e.word(4))), f32, 4), kind)
        for j, vector in enumerate(vectors):
            arguments = [value, vector, acc[i, j]]
            new[i, j] = e.intrinsic(f"llvm.fma.v{kind.count}f32", kind, arguments)
    k_next, at_next = b.add(k, e.word(1)), b.add(at, r_row)
    e.incoming(k, (before, e.word(0)), (loop, k_next))
    e.incoming(at, (before, r), (loop, at_next))
    for t, phi in acc.items():
        e.incoming(phi, (before, totals[t]), (loop, new[t]))
    b.cbranch(b.icmp_signed("<", k_next, count), loop, after)
    b.position_at_end(after)
    for (i, j), value in new.items():
        e.store(value, b.add(b.add(y, b.mul(y_row, e.word(i))), e.word(begins[j])), 4)


def of_rows(rows: int, adds: bool = False) -> Any:
    """Return what computes so many rows of any number of columns, or adds them to those of z."""
    most = _LANES * min(16 // rows, 8)  # enough sums at once for their latency not to count
    wide, whole, half, quarter, single = (
        _tile(rows, columns, adds) for columns in (most, _LANES, _HALF, _QUARTER, 1)
    )

    @njit(error_model="numpy")
    def compute(
        x, x_row, r, r_row, y, y_row, count, first, columns, all_columns, z=_NOTHING, z_row=_NOTHING
    ):
        j, end, narrow = first, first + columns, 1
        for fewer in (_QUARTER, _HALF, _LANES):
            if all_columns >= fewer:
                narrow = fewer
        while j < end:
            width = narrow
            if 2 * (end - j) > most and all_columns >= most:
                width = most
            at = 4 * min(j, all_columns - width)
            if width == most:
                wide(x, x_row, r + at, r_row, y + at, y_row, count, z + at, z_row)
            elif width == _LANES:
                whole(x, x_row, r + at, r_row, y + at, y_row, count, z + at, z_row)
            elif width == _HALF:
                half(x, x_row, r + at, r_row, y + at, y_row, count, z + at, z_row)
            elif width == _QUARTER:
                quarter(x, x_row, r + at, r_row, y + at, y_row, count, z + at, z_row)
            else:
                single(x, x_row, r + at, r_row, y + at, y_row, count, z + at, z_row)
            j += width

    return compute


_many_rows, _few_rows, _one_row = (of_rows(rows) for rows in (MANY, FEW, 1))


@register("onnx_matmul", "fma", ONNX_MATMUL, available=lambda: ISA.available)
def _matmul(arguments, first_part, end_part, parts, slot):
    a = carray(arguments, 1)[0]
    axes, rows, columns, count = axes_of(a, 4), a.height, a.width, a.count
    of_tile = MANY if rows >= MANY else FEW if rows >= FEW else 1
    tiles, chunks = (rows + of_tile - 1) // of_tile, (columns + _CHUNK - 1) // _CHUNK
    begin, end = share(a.n * chunks * tiles, first_part, end_part, parts)
    for item in range(begin, end):
        matrix, within = item // (chunks * tiles), item % (chunks * tiles)
        row = min(within % tiles * of_tile, rows - of_tile)
        first = within // tiles * _CHUNK
        x = np.int64(a.x.data) + 4 * (place(axes, matrix, 2) + row * count)
        r = np.int64(a.r.data) + 4 * place(axes, matrix, 3)
        y = np.int64(a.y.data) + 4 * (place(axes, matrix, 1) + row * columns)
        given = (
            x, 4 * count, r, 4 * columns, y, 4 * columns, count,
            first, min(_CHUNK, columns - first), columns,
        )  # fmt: skip
        if of_tile == MANY:
            _many_rows(*given)
        elif of_tile == FEW:
            _few_rows(*given)
        else:
            _one_row(*given)
