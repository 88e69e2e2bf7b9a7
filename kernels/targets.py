"""Which instructions compiled code may use: those of this machine, or of NUMBA_CPU_*."""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
from numba.core import config

# What a CPU name alone implies, for NUMBA_CPU_NAME with NUMBA_CPU_FEATURES="".
_AVX2 = {"avx2", "fma"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl"}
_IMPLIED = {
    "haswell": _AVX2, "broadwell": _AVX2, "skylake": _AVX2, "x86-64-v3": _AVX2,
    "znver1": _AVX2, "znver2": _AVX2, "znver3": _AVX2,
    "alderlake": _AVX2 | {"avxvnni"}, "skylake-avx512": _AVX512, "x86-64-v4": _AVX512,
    "cascadelake": _AVX512 | {"avx512vnni"}, "icelake-server": _AVX512 | {"avx512vnni"},
    "icelake-client": _AVX512 | {"avx512vnni"}, "sapphirerapids": _AVX512 | {"avx512vnni"},
    "znver4": _AVX512 | {"avx512vnni"},
}  # fmt: skip


@cache
def target_features() -> frozenset[str]:
    """Names of the instruction-set features, as LLVM spells them, that code is compiled for."""
    given, cpu = getattr(config, "CPU_FEATURES"), getattr(config, "CPU_NAME")  # noqa: B009
    if given is None:
        features = {name for name, there in llvm.get_host_cpu_features().items() if there}
    else:
        features = {f[1:] for f in given.split(",") if f.startswith("+")}
    return frozenset(features | _IMPLIED.get(cpu or "", set()))


def has_features(names: tuple[str, ...]) -> bool:
    """Whether all of the named features may be used."""
    return set(names) <= target_features()
