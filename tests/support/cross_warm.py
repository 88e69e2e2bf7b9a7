"""Compile kernels for an aarch64 CPU on another machine, as `warmup` does there.

    python -m support.cross_warm products | machine | all STAMP

The CPU is that of NUMBA_CPU_NAME and NUMBA_CPU_FEATURES. Numba and logshift are told that this is
an aarch64 Linux, and nothing that is compiled is run: emulated processes find it where
LOGSHIFT_CACHE_DIR says, if their versions, which STAMP stands for, are those here. That takes a
fraction of the time that it takes under emulation. The words are those of `support.digests`.
"""

from __future__ import annotations

import platform
import re
import sys

import llvmlite.binding as llvm
from support.cross import TRIPLE

# Names of what the shorter digests do not need.
_OTHERS = {
    "products": r"(shift|fma)-|portable-(onnx_|conv-(?!float64)|float_)",
    "machine": r"portable-(onnx_|conv-(?!float64)|float_(?!conv))|fma-onnx_",
    "all": r"(?!)",
}


def main(what: str, stamp: str) -> None:
    """Compile what digests of a name need."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    platform.machine = lambda: "aarch64"
    llvm.get_process_triple = llvm.get_default_triple = lambda: TRIPLE
    # Not before, because modules ask for the machine.
    from logshift.kernels import registry
    from logshift.kernels.machine import cache
    from logshift.runtime import session  # noqa: F401 (which registers all kernels)

    if stamp != cache.stamp():
        print(f"of other versions, {stamp} and not {cache.stamp()}: nothing is compiled here")
        return
    for family in ("auto", "shift"):
        for name, compile in registry.to_compile(family):
            if not re.match(_OTHERS[what], name):
                compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
