"""What vector instructions of x86-64 have in common, whatever the size of registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info

from logshift.kernels.machine.emit import Emitter, i8
from logshift.kernels.machine.isa.base import InstructionSet


class X86(InstructionSet):
    """Packing, interleaving and lookups work within each 16 bytes of a register.

    A subclass says what LLVM calls its instructions.
    """

    BYTE_PAIRS: str  # pmaddubsw
    WORD_PAIRS: str  # pmaddwd
    PACK_WORDS: str  # packssdw
    PACK_BYTES: str  # packuswb
    SHUFFLE: str  # pshufb
    ROUNDED_PRODUCT: str  # pmulhrsw
    BYTE_DOT: str  # vpdpbusd, where there is one

    def byte_pairs(self, e: Emitter, x: Any, w: Any) -> Any:
        """Sum neighbouring products of uint8 and int8 into int16, saturated."""
        return e.intrinsic(self.BYTE_PAIRS, self.int16s, [x, w])

    def word_pairs(self, e: Emitter, x: Any, w: Any) -> Any:
        """Sum neighbouring products of int16 into int32."""
        return e.intrinsic(self.WORD_PAIRS, self.int32s, [x, w])

    def byte_dot(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add four neighbouring products of uint8 and int8 to each int32."""
        if llvm_version_info[0] < 21:  # which took the bytes as int32
            x, w = e.b.bitcast(x, self.int32s), e.b.bitcast(w, self.int32s)
        return e.intrinsic(self.BYTE_DOT, self.int32s, [acc, x, w])

    def interleaved(self, e: Emitter, first: Any, second: Any, half: int) -> Any:
        """Interleave the lower, or upper, halves of each 16 bytes of two registers."""
        lanes = [
            16 * part + 8 * half + lane + source
            for part in range(self.vector // 16)
            for lane in range(8)
            for source in (0, self.vector)
        ]
        return e.shuffle(first, second, lanes)

    def packed(
        self, e: Emitter, words: list[Any], between: Callable[[Any], Any] | None = None
    ) -> Any:
        """Join four registers of int32, in their order, to one of uint8, saturated.

        `between`, if given, is done to each of two registers of int16, saturated, on the way.
        """
        pairs = [e.intrinsic(self.PACK_WORDS, self.int16s, words[p : p + 2]) for p in (0, 2)]
        if between is not None:
            pairs = [between(pair) for pair in pairs]
        packed = e.b.bitcast(e.intrinsic(self.PACK_BYTES, self.bytes, pairs), self.int32s)
        order = [4 * part + v for v in range(4) for part in range(self.vector // 16)]
        return e.b.bitcast(e.shuffle(packed, packed, order), self.bytes)

    def sixteen(self, e: Emitter, address: Any) -> Callable[[Any], Any]:
        """Return what looks int16 up in sixteen entries at an address, by int16 below 16."""
        halves = []
        for half in (0, 16):
            eight = e.load(e.b.add(address, e.word(half)), ir.VectorType(i8, 16), 2)
            halves.append(e.shuffle(eight, eight, [lane % 16 for lane in range(self.vector)]))

        def look_up(index: Any) -> Any:
            # Both bytes of an entry; shuffles look at the low four bits of their numbers.
            numbers = e.b.mul(index, e.constant(0x0202, self.int16s))
            numbers = e.b.add(numbers, e.constant(0x0100, self.int16s))
            numbers = e.b.bitcast(numbers, self.bytes)
            low, high = (
                e.b.bitcast(e.intrinsic(self.SHUFFLE, self.bytes, [half, numbers]), self.int16s)
                for half in halves
            )
            is_low = e.b.icmp_unsigned("<", index, e.constant(8, self.int16s))
            return e.b.select(is_low, low, high)

        return look_up

    def rounded_product(self, e: Emitter, x: Any, w: Any) -> Any:
        """Multiply int16 as (x * w + 2^14) >> 15."""
        return e.intrinsic(self.ROUNDED_PRODUCT, self.int16s, [x, w])

    def looked_up(self, e: Emitter, entries: Any, index: Any) -> Any:
        """Look up uint8 in sixteen entries, which every 16 bytes of a register repeat."""
        return e.intrinsic(self.SHUFFLE, self.bytes, [entries, index])
