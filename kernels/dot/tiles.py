"""Microkernels of the dot family: the table of tiles, and what a call of one is told.

A microkernel computes, for `pixels` output pixels and each of some blocks of `channels` output
channels,

    acc = start + sum over steps of x . W

and requantizes it in registers (`docs/quantization.md` section 4). Inputs are read where they lie.
The kinds differ in what a step is and in what it is summed:

    pair        4 uint8 codes of a pixel times 4 int8 weights of each channel, in int16
    dot         the same in int32, with the machine's byte dot product
    matrix      the same with 8 codes of two pixels and weights of two channels at once
    wide        the same with int16 weights, in int32
    depthwise   2 taps of each channel times their int8 weights, in int16
    winograd    as pair; blocks are positions of transformed tiles of pixels (`winograd`)
    winograd_dot    as dot, for tiles of pixels, one column of the transform at a time (`winograd`)
    rows        4 taps of each channel times their int8 weights, in int32 (`depthwise`)

Sums in int16 are modulo 2^16. A *segment* is a run of steps that are contiguous in memory; after
some segments sums are widened to int32 (*flushed*), and begin again from initial values that keep
the total until the next flush within int16 (`steps.cut`).

All are listed in `MICROKERNELS`: a row names the instruction set whose products it is made of.
Tests and benchmarks walk that table; `microkernels` emits what it lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from logshift.kernels.functions import ROUND
from logshift.kernels.machine.isa.avx2 import AVX2
from logshift.kernels.machine.isa.avx512 import AVX512_VNNI, AVX512_VNNI_VBMI
from logshift.kernels.machine.isa.avxvnni import AVX_VNNI
from logshift.kernels.machine.isa.base import InstructionSet
from logshift.kernels.machine.isa.neon import NEON, NEON_ALONE, NEON_DOT, NEON_I8MM
from logshift.kernels.machine.isa.ssse3 import SSSE3

_I, _F, _P = np.int64, np.float32, np.uintp

# What one call needs; addresses of tables unless said otherwise.
TILE = np.dtype(
    [
        ("x", _P),  # int64 (pixels,): addresses of the first input byte of each pixel
        ("y", _P),  # int64 (pixels,): addresses of the first output channel of each pixel
        ("r", _P),  # int64 (pixels,): the same of the residual
        ("blocks", _I),  # how many, at least one; channels of one follow those of another
        ("x_step", _I),  # bytes from the input of one block to that of the next
        ("channel", _I),  # "winograd...": which of those at y and r comes first
        # "winograd_dot": column of the transform, steps of 4 codes, what columns leave each other
        ("column", _I), ("steps", _I), ("sums", _P),
        ("segments", _P),  # SEGMENT records, those of one block after those of another
        ("weights", _P),  # in the order in which they are read, see `steps`
        ("start", _P),  # int32 (blocks * channels,): minus z_x * sum of W
        ("m", _P), ("b", _P), ("slopes", _P),  # float32 (blocks * channels,)
        ("coefficients", _P), ("activation", _I),  # of a fused function, `activation.Target`
        ("table", _P),  # uint8 (256,) that codes go through at the end, or 0
        ("table_end", _P),
        # "rows": x, y and r are addresses of the first pixel, and these the bytes from pixel to
        # pixel; the last block begins so many channels after the first one.
        ("x_pixel", _I), ("y_pixel", _I), ("r_pixel", _I),
        ("x_column", _I),  # bytes from one input column to the next
        ("last", _I),
        ("windows_end", _P), ("segments_end", _P),  # of READS records, the same for all blocks
        ("z_r", np.int32), ("m_r", _F), ("lo", _F), ("hi", _F),
        ("lo_code", np.int32), ("hi_code", np.int32),  # lo and hi rounded, in each byte
        ("has_residual", np.int32), ("float_output", np.int32),
    ],
    align=True,
)  # fmt: skip
# A segment of steps of 4 codes: byte offset from the pixel's address, number of steps. A depthwise
# segment is one step: byte offsets of its two taps. What to do after it: one of the values below.
SEGMENT = np.dtype([("offset", np.int32), ("second", np.int32), ("then", np.int32), ("", np.int32)])
CONTINUE, FLUSH, END = 0, 1, 2
# What a "rows" kernel reads: byte offsets from the pixel's address of the rows of a window, or of
# four taps.
READS = np.dtype([("offset", np.int32, 4)])
# Blocks of channels that one call of a microkernel takes: the first one, how many, and what begins
# where for them; x0 and o0 are input and output channels.
CHUNK = np.dtype([(n, np.int64) for n in ("block", "blocks", "segment", "weights", "x0", "o0")])
# Bytes of weights in a chunk: they stay in the first-level cache while pixels go by.
CHUNK_WEIGHTS = 16384
# Bytes of codes of one transformed tile and position that lie side by side for "winograd_dot".
RUN = 64

# Of a step, for each vector.
_INSTRUCTIONS = {
    "pair": 2, "dot": 1, "matrix": 0.5, "wide": 4, "depthwise": 2, "winograd": 2,
    "winograd_dot": 1, "rows": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Microkernel:
    """One entry of the table: `<pixels>x<channels>` of a kind on an instruction set."""

    isa: InstructionSet
    kind: str
    pixels: int
    vectors: int  # of output channels
    window: tuple[int, int, int] | None = None  # of "rows": rows, columns, stride of columns

    @property
    def lanes(self) -> int:
        """Int32 per vector."""
        return self.isa.lanes

    @property
    def channels(self) -> int:
        """Output channels per block."""
        return self.vectors * self.lanes

    @property
    def name(self) -> str:
        """Instruction set, kind where it is not the instruction set's own, and tile."""
        kind = (
            "" if self.kind in ("pair", "dot", "matrix") else f"{self.kind.removesuffix('_dot')}-"
        )
        if self.kind == "rows":
            window = "{}x{}s{}".format(*self.window) if self.window else ""
            kind = f"depthwise{window}-"
        return f"{self.isa.name}-{kind}{self.pixels}x{self.channels}"

    @property
    def sums_in_int16(self) -> bool:
        """Whether sums must be flushed to int32 in time."""
        return self.kind in ("pair", "depthwise", "winograd")

    @property
    def sums(self) -> int:
        """Registers of sums of a pixel."""
        return self.vectors * self.lanes_of_channel // 2 if self.sums_in_int16 else self.vectors

    @property
    def codes(self) -> int:
        """Codes of a pixel that a step takes."""
        return {"depthwise": 2, "matrix": 8}.get(self.kind, 4)

    @property
    def lanes_of_channel(self) -> int:
        """Lanes that sums in int16 of a pixel and channel are split into."""
        return 1 if self.kind == "depthwise" or self.isa.by_lane else 2

    @property
    def price(self) -> float:
        """How long a step takes for a channel, in steps of "dot" on registers of 64 bytes.

        Registers half as large take more than half the time each on some machines, on others not.
        """
        return _INSTRUCTIONS[self.kind] * (64 / self.isa.vector) ** 0.5

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return self.isa.available


# --- the table ----------------------------------------------------------------------------------

MICROKERNELS = {
    kernel.name: kernel
    for kernel in (
        Microkernel(AVX512_VNNI, "dot", 6, 4),
        Microkernel(AVX512_VNNI, "dot", 1, 4),
        Microkernel(AVX512_VNNI, "dot", 14, 2),
        Microkernel(AVX512_VNNI, "dot", 1, 2),
        Microkernel(AVX512_VNNI, "dot", 28, 1),
        Microkernel(AVX512_VNNI, "dot", 1, 1),
        Microkernel(AVX_VNNI, "dot", 6, 2),
        Microkernel(AVX_VNNI, "dot", 12, 1),
        Microkernel(AVX_VNNI, "dot", 1, 2),
        Microkernel(AVX_VNNI, "dot", 1, 1),
        Microkernel(AVX2, "pair", 6, 2),
        Microkernel(AVX2, "pair", 12, 1),
        Microkernel(AVX2, "pair", 1, 2),
        Microkernel(AVX2, "pair", 1, 1),
        Microkernel(SSSE3, "pair", 6, 2),
        Microkernel(SSSE3, "pair", 12, 1),
        Microkernel(SSSE3, "pair", 1, 2),
        Microkernel(SSSE3, "pair", 1, 1),
        Microkernel(AVX512_VNNI, "wide", 6, 4),
        Microkernel(AVX2, "wide", 6, 2),
        Microkernel(SSSE3, "wide", 6, 2),
        Microkernel(AVX2, "depthwise", 4, 4),
        Microkernel(SSSE3, "depthwise", 4, 4),
        Microkernel(AVX2, "winograd", 6, 2),
        Microkernel(SSSE3, "winograd", 6, 2),
        Microkernel(AVX512_VNNI, "winograd_dot", 6, 2),
        Microkernel(AVX512_VNNI, "winograd_dot", 4, 2),
        Microkernel(AVX_VNNI, "winograd_dot", 3, 2),
        Microkernel(AVX512_VNNI_VBMI, "rows", 7, 2, (3, 3, 1)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 7, 2, (3, 3, 2)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 7, 2, (4, 5, 1)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 7, 2, (4, 5, 2)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 7, 2),
        Microkernel(AVX512_VNNI_VBMI, "rows", 1, 2, (3, 3, 1)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 1, 2, (4, 5, 1)),
        Microkernel(AVX512_VNNI_VBMI, "rows", 1, 2),
        Microkernel(NEON_I8MM, "matrix", 6, 4),
        Microkernel(NEON_I8MM, "matrix", 1, 4),
        Microkernel(NEON_I8MM, "matrix", 8, 2),
        Microkernel(NEON_I8MM, "matrix", 1, 2),
        Microkernel(NEON_I8MM, "matrix", 12, 1),
        Microkernel(NEON_I8MM, "matrix", 1, 1),
        Microkernel(NEON_DOT, "dot", 5, 4),
        Microkernel(NEON_DOT, "dot", 1, 4),
        Microkernel(NEON_DOT, "dot", 8, 2),
        Microkernel(NEON_DOT, "dot", 1, 2),
        Microkernel(NEON_DOT, "dot", 12, 1),
        Microkernel(NEON_DOT, "dot", 1, 1),
        Microkernel(NEON_DOT, "winograd_dot", 5, 2),
        Microkernel(NEON_DOT, "winograd_dot", 4, 2),
        Microkernel(NEON_ALONE, "pair", 5, 8),
        Microkernel(NEON_ALONE, "pair", 1, 8),
        Microkernel(NEON_ALONE, "pair", 8, 4),
        Microkernel(NEON_ALONE, "pair", 1, 4),
        Microkernel(NEON_ALONE, "pair", 12, 2),
        Microkernel(NEON_ALONE, "pair", 1, 2),
        Microkernel(NEON_ALONE, "winograd", 5, 8),
        Microkernel(NEON_ALONE, "winograd", 8, 4),
        Microkernel(NEON, "wide", 5, 4),
        Microkernel(NEON, "depthwise", 8, 4),
    )
}


# --- calls --------------------------------------------------------------------------------------


@njit(inline="always", error_model="numpy")
def fill_in(a, t):
    """Fill in what all calls of a microkernel have in common; returns the bytes of an output."""
    t.z_r, t.m_r, t.lo, t.hi = np.int32(a.z_r), a.m_r, a.lo, a.hi
    t.has_residual, t.float_output = np.int32(a.has_residual), np.int32(a.float_output)
    t.x_step, t.table, t.table_end = a.x_step, a.table, a.table + np.uintp(256)
    t.activation, t.coefficients = a.activation, a.coefficients
    if a.float_output:
        return 4
    t.lo_code = np.int32(np.int64((a.lo + ROUND) - ROUND) * 0x01010101)
    t.hi_code = np.int32(np.int64((a.hi + ROUND) - ROUND) * 0x01010101)
    return 1
