"""AVX2: registers of 32 bytes; products of bytes are summed in pairs, in int16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from logshift.kernels.machine.emit import Emitter
from logshift.kernels.machine.isa.x86 import X86


class Avx2(X86):
    """Instructions on 32 bytes."""

    BYTE_PAIRS = "llvm.x86.avx2.pmadd.ub.sw"
    WORD_PAIRS = "llvm.x86.avx2.pmadd.wd"
    PACK_WORDS = "llvm.x86.avx2.packssdw"
    PACK_BYTES = "llvm.x86.avx2.packuswb"
    SHUFFLE = "llvm.x86.avx2.pshuf.b"

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; to the least one beyond the range of these."""
        return e.intrinsic("llvm.x86.avx.cvt.ps2dq.256", self.int32s, [v])

    def sixteen_floats(self, e: Emitter, address: Any) -> Callable[[Any], Any]:
        """Return what looks up float32 in sixteen of them, by the low four bits of int32."""
        halves = [e.load(e.b.add(address, e.word(at)), self.floats, 4) for at in (0, 32)]

        def look_up(index: Any) -> Any:
            # The low three bits permute each half, the fourth one chooses.
            low, high = (
                e.intrinsic("llvm.x86.avx2.permps", self.floats, [half, index]) for half in halves
            )
            sign = e.b.shl(index, e.constant(28, self.int32s))
            return e.b.select(e.b.icmp_signed("<", sign, e.constant(0, self.int32s)), high, low)

        return look_up


AVX2 = Avx2("avx2", 32, ("avx2",))
FMA = Avx2("fma", 32, ("avx2", "fma"))
