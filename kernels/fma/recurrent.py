"""Recurrent networks, their products by tiles of rows and columns."""

from __future__ import annotations

from logshift.kernels.fma.matmul import FEW, ISA, MANY, of_rows
from logshift.kernels.machine.jit import njit
from logshift.kernels.portable.recurrent import kernels, pieces
from logshift.kernels.reference.recurrent import ONNX_RECURRENT, scratch
from logshift.kernels.registry import register

_many_rows, _few_rows, _one_row = (of_rows(rows, adds=True) for rows in (MANY, FEW, 1))


@njit(error_model="numpy")
def _products(z, z_row, h, h_row, w, w_row, y, y_row, rows, count, columns):
    while rows > 0:
        given = (h, h_row, w, w_row, y, y_row, count, 0, columns, columns, z, z_row)
        taken = MANY if rows >= MANY else FEW if rows >= FEW else 1
        if taken == MANY:
            _many_rows(*given)
        elif taken == FEW:
            _few_rows(*given)
        else:
            _one_row(*given)
        z, h, y = z + taken * z_row, h + taken * h_row, y + taken * y_row
        rows -= taken


for _op, _function in kernels(_products).items():
    register(
        _op, "fma", ONNX_RECURRENT, available=lambda: ISA.available, scratch=scratch, pieces=pieces
    )(_function)
