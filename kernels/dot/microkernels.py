"""Microkernels of the dot family: what emits each kind of tile, and addresses of compiled ones."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from logshift.kernels.dot.emission import Emission
from logshift.kernels.dot.emit_by_lane import Columns, Dot, Matrices, Pairs, Positions, Taps, Wide
from logshift.kernels.dot.emit_direct import Depthwise, Direct
from logshift.kernels.dot.emit_rows import Rows
from logshift.kernels.dot.emit_winograd import Winograd, WinogradDot
from logshift.kernels.dot.tiles import MICROKERNELS, Microkernel
from logshift.kernels.machine import microkernel

_KINDS: dict[str, type[Emission]] = {
    "pair": Direct, "dot": Direct, "wide": Direct, "depthwise": Depthwise,
    "winograd": Winograd, "winograd_dot": WinogradDot, "rows": Rows,
}  # fmt: skip
_BY_LANE: dict[str, type[Emission]] = {
    "pair": Pairs, "dot": Dot, "matrix": Matrices, "wide": Wide, "depthwise": Taps,
    "winograd": Positions, "winograd_dot": Columns,
}  # fmt: skip


_ACTIVATED = "-activated"


def emit(name: str, builder: ir.IRBuilder, arguments: Any) -> None:
    """Emit the microkernel of a name; takes the address of a TILE record."""
    kernel = MICROKERNELS[name.removesuffix(_ACTIVATED)]
    kinds = _BY_LANE if kernel.isa.by_lane else _KINDS
    kinds[kernel.kind](kernel, builder, arguments, name.endswith(_ACTIVATED)).emit()


def address(kernel: Microkernel, is_activated: bool) -> int:
    """Address of the compiled microkernel, `void (TILE *)`, with or without fused functions."""
    return microkernel.address(__name__, kernel.name + _ACTIVATED * is_activated)
