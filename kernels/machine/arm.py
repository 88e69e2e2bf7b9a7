"""What an aarch64 machine can do, as its system tells: LLVM knows no more than the CPU's name.

Names of features are LLVM's. What a system says holds for all of its cores: where they differ, as
in big.LITTLE, for what all of them have, whichever one LLVM takes the name of.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# Bits of getauxval on Linux: for each feature which of AT_HWCAP, AT_HWCAP2, and a mask.
_HWCAP, _HWCAP2 = 16, 26
_LINUX = {
    "aes": (_HWCAP, 1 << 3 | 1 << 4), "sha2": (_HWCAP, 1 << 5 | 1 << 6), "crc": (_HWCAP, 1 << 7),
    "lse": (_HWCAP, 1 << 8), "fullfp16": (_HWCAP, 1 << 9 | 1 << 10), "rdm": (_HWCAP, 1 << 12),
    "complxnum": (_HWCAP, 1 << 14), "rcpc": (_HWCAP, 1 << 15), "sha3": (_HWCAP, 1 << 17 | 1 << 21),
    "dotprod": (_HWCAP, 1 << 20), "sve": (_HWCAP, 1 << 22), "fp16fml": (_HWCAP, 1 << 23),
    "rcpc-immo": (_HWCAP, 1 << 26), "sve2": (_HWCAP2, 1 << 1), "i8mm": (_HWCAP2, 1 << 13),
    "bf16": (_HWCAP2, 1 << 14),
}  # fmt: skip
# Keys of sysctl below hw.optional.arm on macOS, which has no SVE.
_MACOS = {
    "aes": ("FEAT_AES", "FEAT_PMULL"), "sha2": ("FEAT_SHA1", "FEAT_SHA256"),
    "crc": ("FEAT_CRC32",), "lse": ("FEAT_LSE",), "fullfp16": ("FEAT_FP16",), "rdm": ("FEAT_RDM",),
    "complxnum": ("FEAT_FCMA",), "rcpc": ("FEAT_LRCPC",), "sha3": ("FEAT_SHA3", "FEAT_SHA512"),
    "dotprod": ("FEAT_DotProd",), "fp16fml": ("FEAT_FHM",), "rcpc-immo": ("FEAT_LRCPC2",),
    "i8mm": ("FEAT_I8MM",), "bf16": ("FEAT_BF16",),
}  # fmt: skip
# PF_ARM_* of IsProcessorFeaturePresent on Windows. It says nothing about other features, and an old
# Windows denies what it does not know yet.
_WINDOWS = {
    "crc": (31,), "lse": (34,), "dotprod": (43,), "rcpc": (45,), "sve": (46,), "sve2": (47,),
    "sha3": (64, 65), "i8mm": (66,), "fullfp16": (67,), "bf16": (68,),
}  # fmt: skip
FEATURES = ("fp-armv8", "neon", *_LINUX)  # all that any system tells


def detected(system: str = sys.platform) -> dict[str, bool]:
    """Return which features this machine has and which it has not, as far as its system tells.

    Parameters
    ----------
    system : str
        As `sys.platform`; of others than Linux, macOS and Windows nothing is known.

    Returns
    -------
    dict of LLVM's name to bool
    """
    # Every machine that runs Python and NumPy has these.
    always = {"fp-armv8": True, "neon": True}
    if system == "linux":
        words = {word: _auxiliary(word) for word in (_HWCAP, _HWCAP2)}
        return always | {name: words[word] & mask == mask for name, (word, mask) in _LINUX.items()}
    if system == "darwin":
        none = {"sve": False, "sve2": False}
        return always | none | _all(_MACOS, lambda key: _sysctl(f"hw.optional.arm.{key}"))
    if system == "win32":
        return always | _all(_WINDOWS, _is_present)
    return always


def _all(table: dict, asked: Callable[..., bool]) -> dict[str, bool]:
    return {name: all(map(asked, keys)) for name, keys in table.items()}


def _auxiliary(word: int) -> int:
    """Return a word of the auxiliary vector, 0 if there is none."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return getauxval(word)


def _sysctl(name: str) -> bool:
    """Whether a number of the system is not 0; one that it does not know is."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    get = ctypes.CDLL(None).sysctlbyname
    found = get(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return found == 0 and value.value != 0


def _is_present(feature: int) -> bool:
    if sys.platform != "win32":
        return False
    return bool(ctypes.WinDLL("kernel32").IsProcessorFeaturePresent(feature))
