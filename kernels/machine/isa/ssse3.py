"""SSSE3: registers of 16 bytes; products of bytes are summed in pairs, in int16."""

from __future__ import annotations

from typing import Any

from logshift.kernels.machine.emit import Emitter
from logshift.kernels.machine.isa.avx2 import AVX2
from logshift.kernels.machine.isa.x86 import X86


class Ssse3(X86):
    """Instructions on 16 bytes."""

    BYTE_PAIRS = "llvm.x86.ssse3.pmadd.ub.sw.128"
    WORD_PAIRS = "llvm.x86.sse2.pmadd.wd"
    PACK_WORDS = "llvm.x86.sse2.packssdw.128"
    PACK_BYTES = "llvm.x86.sse2.packuswb.128"
    SHUFFLE = "llvm.x86.ssse3.pshuf.b.128"
    ROUNDED_PRODUCT = "llvm.x86.ssse3.pmul.hr.sw.128"

    @property
    def available(self) -> bool:
        """Whether the machine has these instructions, and none for twice as many bytes."""
        return super().available and not AVX2.available

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; to the least one beyond the range of these."""
        return e.intrinsic("llvm.x86.sse2.cvtps2dq", self.int32s, [v])


SSSE3 = Ssse3("ssse3", 16, ("ssse3",))
