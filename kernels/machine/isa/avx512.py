"""AVX-512: registers of 64 bytes, and the extensions that kernels have use for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from logshift.kernels.machine.emit import Emitter, i16, i32
from logshift.kernels.machine.isa.x86 import X86


class Avx512(X86):
    """Instructions on 64 bytes, those of all extensions."""

    BYTE_PAIRS = "llvm.x86.avx512.pmaddubs.w.512"
    WORD_PAIRS = "llvm.x86.avx512.pmaddw.d.512"
    PACK_WORDS = "llvm.x86.avx512.packssdw.512"
    PACK_BYTES = "llvm.x86.avx512.packuswb.512"
    SHUFFLE = "llvm.x86.avx512.pshuf.b.512"
    ROUNDED_PRODUCT = "llvm.x86.avx512.pmul.hr.sw.512"
    BYTE_DOT = "llvm.x86.avx512.vpdpbusd.512"

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; to the least one beyond the range of these."""
        unused, all_lanes = e.constant(0, self.int32s), ir.Constant(i16, -1)
        arguments = [v, unused, all_lanes, ir.Constant(i32, 4)]  # 4: as the thread rounds
        return e.intrinsic("llvm.x86.avx512.mask.cvtps2dq.512", self.int32s, arguments)

    def sixteen(self, e: Emitter, address: Any) -> Callable[[Any], Any]:
        """Return what looks int16 up in sixteen entries at an address, by int16 below 16."""
        entries = e.load(address, ir.VectorType(i16, 16), 2)
        entries = e.shuffle(entries, entries, [*range(16)] * 2)
        name = "llvm.x86.avx512.permvar.hi.512"
        return lambda index: e.intrinsic(name, self.int16s, [entries, index])

    def permuted(self, e: Emitter, low: Any, index: Any, high: Any) -> Any:
        """Look up uint8 in the 128 entries of two registers, by the low seven bits of an index."""
        return e.intrinsic("llvm.x86.avx512.vpermi2var.qi.512", self.bytes, [low, index, high])


_BYTES = ("avx512bw", "avx512vl")
_VNNI = ("avx512vnni", *_BYTES)
AVX512 = Avx512("avx512", 64, ("avx512f", "avx512vl"))
AVX512_BW = Avx512("avx512", 64, _BYTES)
AVX512_VBMI = Avx512("avx512", 64, ("avx512vbmi", "avx512bw"))
AVX512_VNNI = Avx512("avx512vnni", 64, _VNNI)
AVX512_VNNI_VBMI = Avx512("avx512vnni", 64, (*_VNNI, "avx512vbmi"))
