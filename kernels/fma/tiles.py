"""Microkernels of the fma family: the table of tiles, and what a call of one is told.

A microkernel computes, for `pixels` output pixels and each of some blocks of `channels` output
channels,

    acc = 0; acc = fma(x, w, acc) step by step; y = acc + b (+ residual), clamped

Lanes are output channels, so that every output is one chain of fused multiply-adds in the order of
its kernel row, kernel column and input channel: the bits are the same whatever the tile and the
instruction set. Inputs are read where they lie. The kinds differ in what a step is:

    dense       one input of a pixel times a weight of each channel
    depthwise   one tap of each channel times its weight
    window      the same for a fixed kernel and stride: tiles are rectangles of pixels, which load
                every input once for all outputs that it is part of

All are listed in `FLOAT_TILES`: tests and benchmarks walk that table, `microkernels` emits them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logshift.kernels.machine.isa.avx2 import FMA
from logshift.kernels.machine.isa.avx512 import AVX512
from logshift.kernels.machine.isa.base import InstructionSet
from logshift.kernels.machine.isa.neon import NEON

_I, _F, _P = np.int64, np.float32, np.uintp

# What one call needs; addresses of tables unless said otherwise.
FLOAT_TILE = np.dtype(
    [
        ("x", _P),  # int64 (pixels,): addresses of the first input of each pixel
        ("y", _P),  # int64 (pixels,): addresses of the first output of each pixel
        ("r", _P),  # int64 (pixels,): the same of the residual
        ("x_offset", _I), ("y_offset", _I),  # bytes to add to all of x; to all of y and r
        ("blocks", _I),  # how many, at least one; channels of one follow those of another
        ("x_step", _I),  # bytes from the input of one block to that of the next
        ("w_step", _I),  # bytes from the weights of one block to those of the next
        ("segments", _P), ("segments_end", _P),  # FLOAT_SEGMENT records, the same for all blocks
        ("weights", _P),  # float32, in the order in which they are read
        ("b", _P),  # float32 (blocks * channels,)
        # Of a rectangle, x, y and r are addresses of the first pixel, channels of the first block
        # included, and these bytes from pixel to pixel; it has no offsets, segments and steps.
        ("x_row", _I), ("x_column", _I),
        ("y_row", _I), ("y_column", _I),
        ("r_row", _I), ("r_column", _I),
        ("has_residual", _I),
        ("lo", _F), ("hi", _F),
    ],
    align=True,
)  # fmt: skip
# A run of steps, at least one, whose inputs lie side by side: bytes from the pixel's address, and
# how many bytes. A depthwise segment is one step.
FLOAT_SEGMENT = np.dtype([("offset", _I), ("size", _I)])


@dataclass(frozen=True, eq=False)
class FloatTile:
    """One entry of the table: `<pixels>x<channels>` of a kind on an instruction set."""

    isa: InstructionSet
    kind: str
    pixels: int
    vectors: int  # of output channels
    window: tuple[int, int] | None = None  # height and width of the kernel; stride

    @property
    def lanes(self) -> int:
        """Float32 per vector."""
        return self.isa.lanes

    @property
    def rows(self) -> int:
        """Rows of a rectangle of pixels."""
        return 2

    @property
    def columns(self) -> int:
        """Columns of a rectangle of pixels."""
        return self.pixels // self.rows

    @property
    def channels(self) -> int:
        """Output channels per block."""
        return self.vectors * self.lanes

    @property
    def name(self) -> str:
        """Instruction set, kind unless dense, and tile."""
        if self.window is not None:
            kernel, stride = self.window
            rectangle = f"{self.rows}x{self.columns}x{self.channels}"
            return f"{self.isa.name}-depthwise{kernel}s{stride}-{rectangle}"
        kind = "" if self.kind == "dense" else f"{self.kind}-"
        return f"{self.isa.name}-{kind}{self.pixels}x{self.channels}"

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return self.isa.available


# --- the table ----------------------------------------------------------------------------------


def _windows(isa: InstructionSet) -> list[FloatTile]:
    """Rectangles of 2x4 or 2x2 pixels for the windows and strides of the usual networks."""
    windows = [(3, 1), (3, 2), (5, 1), (5, 2)]
    return [FloatTile(isa, "window", 8 // w[1], 1, w) for w in windows]


FLOAT_TILES = {
    tile.name: tile
    for tile in (
        FloatTile(AVX512, "dense", 6, 4),
        FloatTile(AVX512, "dense", 1, 4),
        FloatTile(AVX512, "dense", 8, 3),
        FloatTile(AVX512, "dense", 1, 3),
        FloatTile(AVX512, "dense", 8, 2),
        FloatTile(AVX512, "dense", 1, 2),
        FloatTile(AVX512, "dense", 8, 1),
        FloatTile(AVX512, "dense", 1, 1),
        FloatTile(AVX512, "dense", 1, 8),
        FloatTile(AVX512, "depthwise", 4, 1),
        FloatTile(AVX512, "depthwise", 1, 1),
        *_windows(AVX512),
        FloatTile(FMA, "dense", 6, 2),
        FloatTile(FMA, "dense", 1, 2),
        FloatTile(FMA, "dense", 4, 3),
        FloatTile(FMA, "dense", 1, 3),
        FloatTile(FMA, "dense", 8, 1),
        FloatTile(FMA, "dense", 1, 1),
        FloatTile(FMA, "dense", 1, 8),
        FloatTile(FMA, "depthwise", 4, 2),
        FloatTile(FMA, "depthwise", 4, 1),
        FloatTile(FMA, "depthwise", 1, 1),
        *_windows(FMA),
        FloatTile(NEON, "dense", 5, 4),
        FloatTile(NEON, "dense", 1, 4),
        FloatTile(NEON, "dense", 4, 6),
        FloatTile(NEON, "dense", 1, 6),
        FloatTile(NEON, "dense", 8, 2),
        FloatTile(NEON, "dense", 1, 2),
        FloatTile(NEON, "dense", 1, 16),
        FloatTile(NEON, "depthwise", 4, 4),
        FloatTile(NEON, "depthwise", 4, 1),
        FloatTile(NEON, "depthwise", 1, 1),
        *_windows(NEON),
    )
}
