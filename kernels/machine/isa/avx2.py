"""AVX2: registers of 32 bytes; products of bytes are summed in pairs, in int16."""

from __future__ import annotations

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
    ROUNDED_PRODUCT = "llvm.x86.avx2.pmul.hr.sw"

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; to the least one beyond the range of these."""
        return e.intrinsic("llvm.x86.avx.cvt.ps2dq.256", self.int32s, [v])


AVX2 = Avx2("avx2", 32, ("avx2",))
FMA = Avx2("fma", 32, ("avx2", "fma"))
