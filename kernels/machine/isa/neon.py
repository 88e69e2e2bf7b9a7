"""NEON: registers of 16 bytes, which every aarch64 machine has, and its byte dot products.

A product takes one lane of a register of codes with all of a register of weights, so that codes are
loaded many at a time and never broadcast. Without `usmmla` both factors are signed: 128 is taken
from codes, and what sums begin with gives it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from logshift.kernels.machine.emit import Emitter, i8, i16
from logshift.kernels.machine.isa.base import InstructionSet

_TABLE = 64  # entries of a table that one instruction looks up in


class Neon(InstructionSet):
    """What all aarch64 machines have."""

    by_lane = True
    taken = 128
    saturates = True
    addresses = 16

    def signed(self, e: Emitter, codes: Any) -> Any:
        """Take 128 from uint8, as signed products want it."""
        return e.b.xor(codes, e.constant(-128, codes.type))

    def multiplied(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add products of eight int8, or four int16, to integers that are twice as wide."""
        kind = acc.type
        name = f"llvm.aarch64.neon.smull.v{kind.count}i{kind.element.width}"
        return e.b.add(acc, e.intrinsic(name, kind, [x, w]))

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; saturated."""
        return e.intrinsic("llvm.aarch64.neon.fcvtns.v4i32.v4f32", self.int32s, [v])

    def packed(
        self, e: Emitter, words: list[Any], between: Callable[[Any], Any] | None = None
    ) -> Any:
        """Join four registers of int32, in their order, to one of uint8, saturated.

        `between`, if given, is done to each of two registers of int16, saturated, on the way.
        """
        half, quarter = ir.VectorType(i16, 4), ir.VectorType(i8, 8)
        narrow = [e.intrinsic("llvm.aarch64.neon.sqxtn.v4i16", half, [word]) for word in words]
        pairs = [e.shuffle(narrow[p], narrow[p + 1], [*range(8)]) for p in (0, 2)]
        if between is not None:
            pairs = [between(pair) for pair in pairs]
        low, high = (
            e.intrinsic("llvm.aarch64.neon.sqxtun.v8i8", quarter, [pair]) for pair in pairs
        )
        return e.shuffle(low, high, [*range(16)])

    def sixteen(self, e: Emitter, address: Any) -> Callable[[Any], Any]:
        """Return what looks int16 up in sixteen entries at an address, by int16 below 16."""
        b = e.b
        halves = [e.load(b.add(address, e.word(half)), self.bytes, 2) for half in (0, 16)]

        def look_up(index: Any) -> Any:
            # Both bytes of an entry.
            numbers = b.mul(index, e.constant(0x0202, self.int16s))
            numbers = b.bitcast(b.add(numbers, e.constant(0x0100, self.int16s)), self.bytes)
            found = e.intrinsic("llvm.aarch64.neon.tbl2.v16i8", self.bytes, [*halves, numbers])
            return b.bitcast(found, self.int16s)

        return look_up

    def rounded_product(self, e: Emitter, x: Any, w: Any) -> Any:
        """Multiply int16 as (x * w + 2^14) >> 15; saturated, if both are the least one."""
        return e.intrinsic("llvm.aarch64.neon.sqrdmulh.v8i16", self.int16s, [x, w])

    def entries(self, e: Emitter, table: Any, part: int) -> list[Any]:
        """Load a quarter of a table of 256 codes."""
        places = [e.b.add(table, e.word(_TABLE * part + 16 * n)) for n in range(4)]
        return [e.load(place, self.bytes, 1) for place in places]

    def found(self, e: Emitter, so_far: Any, entries: list[Any], index: Any, part: int) -> Any:
        """Look up those of 16 codes that are in a quarter of a table; others stay as they are."""
        index = e.b.sub(index, e.constant(_TABLE * part, self.bytes))
        if part == 0:
            return e.intrinsic("llvm.aarch64.neon.tbl4.v16i8", self.bytes, [*entries, index])
        arguments = [so_far, *entries, index]
        return e.intrinsic("llvm.aarch64.neon.tbx4.v16i8", self.bytes, arguments)


class NeonDot(Neon):
    """With dot products of int8."""

    def byte_dot(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add four neighbouring products of int8 to each int32."""
        return e.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", self.int32s, [acc, w, x])

    @property
    def available(self) -> bool:
        """Whether the machine has these products, and none that are better."""
        return super().available and not NEON_I8MM.available


class NeonI8mm(Neon):
    """With products of matrices of uint8 and int8; they leave nothing for Winograd to gain."""

    taken = 0

    def signed(self, e: Emitter, codes: Any) -> Any:
        """Return codes as they are."""
        return codes

    def byte_matrices(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add the products of two rows of eight uint8 and two of int8 to four int32."""
        return e.intrinsic("llvm.aarch64.neon.usmmla.v4i32.v16i8", self.int32s, [acc, x, w])


class _NeonAlone(Neon):
    """Sums in int16, for machines that have nothing better."""

    @property
    def available(self) -> bool:
        """Whether this is an aarch64 machine without dot products."""
        return super().available and not (NEON_DOT.available or NEON_I8MM.available)


NEON = Neon("neon", 16, ("neon",))
NEON_ALONE = _NeonAlone("neon", 16, ("neon",))
NEON_DOT = NeonDot("neondot", 16, ("neon", "dotprod"))
NEON_I8MM = NeonI8mm("neoni8mm", 16, ("neon", "i8mm"))
