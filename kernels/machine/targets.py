"""Which machines code is compiled for: this one, that of NUMBA_CPU_*, or one of a warmed cache."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from numba.core import codegen, config
from numba.core.registry import cpu_target

from logshift.kernels.errors import InputError
from logshift.kernels.machine import arm
from logshift.kernels.machine import cache as store

_V2 = {
    "64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2", "cx16", "sahf", "popcnt", "sse3", "ssse3",
    "sse4.1", "sse4.2", "crc32",
}  # fmt: skip
_SANDY = _V2 | {"avx", "xsave"}
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "evex512"}
_VNNI = _V4 | {"avx512vnni"}
_ICELAKE = _VNNI | {
    "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "avx512ifma", "gfni",
}  # fmt: skip
_SAPPHIRE = _ICELAKE | {"avx512bf16", "avx512fp16", "avxvnni"}
_ALDERLAKE = _V3 | {"avxvnni", "gfni"}
# What code for a CPU, by LLVM's name, may use; for warm-up, and for NUMBA_CPU_NAME with
# NUMBA_CPU_FEATURES="".
_X86: dict[str, set[str]] = {
    "nehalem": _V2, "westmere": _V2, "sandybridge": _SANDY, "ivybridge": _SANDY,
    "x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4,
    "haswell": _V3, "broadwell": _V3, "skylake": _V3,
    "skylake-avx512": _V4, "cascadelake": _VNNI, "cooperlake": _VNNI | {"avx512bf16"},
    "icelake-client": _ICELAKE, "icelake-server": _ICELAKE, "tigerlake": _ICELAKE,
    "rocketlake": _ICELAKE, "alderlake": _ALDERLAKE, "raptorlake": _ALDERLAKE,
    "sapphirerapids": _SAPPHIRE, "emeraldrapids": _SAPPHIRE, "graniterapids": _SAPPHIRE,
    "znver1": _V3, "znver2": _V3, "znver3": _V3,
    "znver4": _ICELAKE | {"avx512bf16"}, "znver5": _ICELAKE | {"avx512bf16", "avxvnni"},
}  # fmt: skip
_V8 = {"neon", "fp-armv8", "crc"}
_V8_2 = _V8 | {"lse", "rdm", "fullfp16", "dotprod", "rcpc"}
_V8_4 = _V8_2 | {"complxnum", "rcpc-immo", "fp16fml"}
_NEOVERSE_V1 = _V8_4 | {"i8mm", "bf16", "sve"}
# Cryptography is left out: it is an option of these cores, which the Raspberry Pi 4 has not.
_ARM: dict[str, set[str]] = {
    "generic": {"neon", "fp-armv8"},
    "cortex-a53": _V8, "cortex-a72": _V8, "cortex-a76": _V8_2, "neoverse-n1": _V8_2,
    "neoverse-v1": _NEOVERSE_V1, "neoverse-n2": _NEOVERSE_V1 | {"sve2"},
    "neoverse-v2": _NEOVERSE_V1 | {"sve2"},
    "apple-m1": _V8_4, "apple-m2": _V8_4 | {"i8mm", "bf16"},
}  # fmt: skip
_MACHINE = platform.machine().lower()
_IS_X86 = _MACHINE in ("x86_64", "amd64")
IS_ARM = _MACHINE in ("aarch64", "arm64")
_CPUS = _X86 if _IS_X86 else _ARM if IS_ARM else {}
# Instructions that no compiler chooses by itself: a hypervisor that hides them changes no code.
_SYSTEM = {
    "clflushopt", "clwb", "cldemote", "clzero", "enqcmd", "fsgsbase", "hreset", "invpcid", "kl",
    "lwp", "movdir64b", "movdiri", "mwaitx", "pconfig", "pku", "prfchw", "prefetchi", "ptwrite",
    "rand", "rdpid", "rdpru", "rdrnd", "rdseed", "rtm", "serialize", "sgx", "shstk", "tsxldtrk",
    "uintr", "usermsr", "waitpkg", "wbnoinvd", "widekl", "xsave", "xsavec", "xsaveopt", "xsaves",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A machine that code is compiled for, as LLVM is told.

    Attributes
    ----------
    cpu : str
    features : str
        Comma separated, "+" or "-" in front of each.
    """

    cpu: str
    features: str

    @property
    def name(self) -> str:
        """Name of the directory of its code."""
        flags = [f for f in self.features.split(",") if f[1:] not in _SYSTEM]
        about = repr((llvm.get_process_triple(), self.cpu, sorted(flags)))
        return f"{self.cpu}-{hashlib.blake2b(about.encode(), digest_size=5).hexdigest()}"

    @property
    def needs(self) -> frozenset[str]:
        """Features that its code may use, beyond what the CPU's name implies."""
        return frozenset(f[1:] for f in self.features.split(",") if f.startswith("+")) - _SYSTEM

    def fits(self, host: Target) -> bool:
        """Whether its code, if made by `baked`, runs on a host."""
        return self.needs <= host.needs


def _all_features() -> str:
    """Return the features of an aarch64 machine, as Numba is to tell LLVM."""
    flags = _llvm_features()
    # LLVM would rely on the CPU's name for most of them, and what is chosen by a feature that is
    # not handed over cannot be compiled: that ends the process.
    known = {flag[1:]: flag[:1] == "+" for flag in flags.split(",") if flag} | arm.detected()
    return ",".join(f"{'+' if there else '-'}{name}" for name, there in sorted(known.items()))


_llvm_features = codegen.get_host_cpu_features
if IS_ARM:
    codegen.get_host_cpu_features = cache(_all_features)


def _check_name() -> None:
    """Raise InputError if NUMBA_CPU_NAME is a CPU of another kind: LLVM would end the process."""
    name = _given()[0]
    # By the first word, for LLVM has more names than the tables: cortex-x4, for one.
    others = {other.partition("-")[0] for other in (_X86 | _ARM).keys() - _CPUS.keys()}
    if name and name != "generic" and name.partition("-")[0] in others:
        raise InputError(
            f"NUMBA_CPU_NAME is {name!r}, which is no CPU of {platform.machine()}; unset it, or "
            f"choose of {', '.join(_CPUS)}"
        )


@cache
def host() -> Target:
    """Return what Numba compiles for in this process: this machine, or that of NUMBA_CPU_*."""
    cpu, features = _given()
    if features is None:
        # If somebody has compiled before logshift was imported, Numba goes on with what it had.
        begun = vars(cpu_target).get("_toplevel_target_context")
        features = begun.codegen()._tm_features if begun else codegen.get_host_cpu_features()
    return Target(llvm.get_host_cpu_name() if cpu is None else cpu, features)


def _given() -> tuple[str | None, str | None]:
    """Values of NUMBA_CPU_NAME and NUMBA_CPU_FEATURES; Numba makes them attributes when it runs."""
    return getattr(config, "CPU_NAME"), getattr(config, "CPU_FEATURES")  # noqa: B009


def baked(cpu: str) -> Target:
    """Return the target of code that is made here to run on machines with a CPU of a name.

    All features are said, those that the CPU has and those that it has not: so the code needs what
    the target names and nothing else, whatever LLVM thinks of the name.

    Raises
    ------
    InputError
        If there is no CPU of that name.
    """
    if cpu not in _CPUS:
        raise InputError(
            f"no CPU {cpu!r} is known for {platform.machine()}; choose of {', '.join(_CPUS)}"
        )
    known = _known()
    absent = [f"-{name}" for name in sorted(known) if name not in _CPUS[cpu]]
    return Target(cpu, ",".join(absent + [f"+{n}" for n in sorted(_CPUS[cpu]) if n in known]))


def _known() -> frozenset[str]:
    """Names of the features that machines of this kind may have."""
    return frozenset(arm.FEATURES if IS_ARM else llvm.get_host_cpu_features())


@cache
def chosen() -> Target:
    """Return the target whose code is looked for.

    That is the host, unless `warmup` has made code for other CPUs only, and the host is one of
    these or can do all that one of these can. Then it is the best of them.
    """
    own = host()
    if _given() != (None, None):
        return own
    marked = store.marked()
    if own.name in marked:
        return own
    others = (Target(about["cpu"], about["features"]) for about in marked.values())
    fitting = [t for t in others if t.name in marked and t.cpu in _CPUS and t.fits(own)]
    return max(fitting, key=lambda t: (t.cpu == own.cpu, len(t.needs), t.cpu), default=own)


@cache
def directories() -> list[str]:
    """Names of the directories to look for code in; what is compiled belongs into the last one."""
    own, other = host(), chosen()
    if own == other:
        return [own.name]
    # Numba compiles for the host all the same; kernels are chosen for the other target, though.
    return [other.name, f"{own.name}-{other.name}"]


@cache
def target_features() -> frozenset[str]:
    """Names of the instruction-set features, as LLVM spells them, that code may use."""
    target = chosen()
    flags = target.features.split(",")
    without = {f[1:] for f in flags if f.startswith("-")}
    implied = _CPUS.get(target.cpu, _ARM["generic"] if IS_ARM else set())
    # Of another kind of machine LLVM ignores the names; its instructions it cannot compile.
    return frozenset((implied - without) | ({f[1:] for f in flags if f[:1] == "+"} & _known()))


def has_features(names: tuple[str, ...]) -> bool:
    """Whether all of the named features may be used."""
    return set(names) <= target_features()


_check_name()
