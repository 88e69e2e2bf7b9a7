"""AVX-VNNI: what AVX2 has, and products of bytes that are summed in int32."""

from __future__ import annotations

from logshift.kernels.machine.isa.avx2 import Avx2


class AvxVnni(Avx2):
    """Instructions on 32 bytes, with the byte dot product."""

    BYTE_DOT = "llvm.x86.avx512.vpdpbusd.256"


AVX_VNNI = AvxVnni("avxvnni", 32, ("avxvnni",))
