"""What vector instructions of x86-64 have in common, whatever the size of registers."""

from __future__ import annotations

from typing import Any

from llvmlite.binding import llvm_version_info

from logshift.kernels.machine.emit import Emitter
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

    def packed(self, e: Emitter, words: list[Any]) -> Any:
        """Join four registers of int32, in their order, to one of uint8, saturated."""
        pairs = [e.intrinsic(self.PACK_WORDS, self.int16s, words[p : p + 2]) for p in (0, 2)]
        packed = e.b.bitcast(e.intrinsic(self.PACK_BYTES, self.bytes, pairs), self.int32s)
        order = [4 * part + v for v in range(4) for part in range(self.vector // 16)]
        return e.b.bitcast(e.shuffle(packed, packed, order), self.bytes)

    def looked_up(self, e: Emitter, entries: Any, index: Any) -> Any:
        """Look up uint8 in sixteen entries, which every 16 bytes of a register repeat."""
        return e.intrinsic(self.SHUFFLE, self.bytes, [entries, index])
