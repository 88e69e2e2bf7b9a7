"""The machine's peak of byte dot products: the kernels' instructions, on registers only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import njit, types
from numba.extending import intrinsic

from logshift.kernels.machine.memory import aligned
from logshift.kernels.machine.targets import has_features

_ACCUMULATORS = 12  # independent sums, enough to hide the latency of either instruction
_UNROLL = 4


@dataclass(frozen=True)
class Dot:
    """A byte dot product: its LLVM name, vector width and what it needs."""

    llvm: str
    lanes: int  # int32 per vector
    pair: bool  # sums into int16, and takes an addition of its own
    features: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiplications per vector."""
        return 4 * self.lanes


# The widest first.
DOTS = {
    "avx512vnni": Dot("llvm.x86.avx512.vpdpbusd.512", 16, False, ("avx512vnni", "avx512bw")),
    "avxvnni": Dot("llvm.x86.avx512.vpdpbusd.256", 8, False, ("avxvnni",)),
    "avx2": Dot("llvm.x86.avx2.pmadd.ub.sw", 8, True, ("avx2",)),
}


def best() -> str | None:
    """Name of the widest byte dot product that this machine has, or None."""
    return next((name for name, dot in DOTS.items() if has_features(dot.features)), None)


@intrinsic(prefer_literal=True)
def _loop(typingctx, count, out, name):
    """Emit `count` rounds of products on registers; the sums are stored at the address `out`."""

    def codegen(context, builder, signature, args):
        _emit(DOTS[name.literal_value], builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(count, out, name), codegen


def _emit(dot: Dot, b: ir.IRBuilder, count: ir.Value, out: ir.Value) -> None:
    words = ir.VectorType(ir.IntType(32), dot.lanes)
    pairs = ir.VectorType(ir.IntType(16), 2 * dot.lanes)
    codes = ir.VectorType(ir.IntType(8), 4 * dot.lanes)
    sums = pairs if dot.pair else words
    operand = words if not dot.pair and llvm_version_info[0] < 21 else codes
    kind = ir.FunctionType(sums, [operand] * 2 if dot.pair else [sums, operand, operand])
    product = ir.Function(b.module, kind, dot.llvm)
    # No instruction, but LLVM cannot tell what comes out: nothing is the same twice.
    opaque = ir.InlineAsm(ir.FunctionType(operand, [operand]), "", "=v,0", side_effect=True)

    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    index, x = b.phi(count.type), b.phi(operand)
    acc = [b.phi(sums) for _ in range(_ACCUMULATORS)]
    w, x_next, new = ir.Constant(operand, None), x, list(acc)
    for _ in range(_UNROLL):
        for i in range(_ACCUMULATORS):
            x_next = b.call(opaque, [x_next])
            if dot.pair:
                new[i] = b.add(new[i], b.call(product, [x_next, x_next]))
            else:
                new[i] = b.call(product, [new[i], x_next, x_next])
    following = b.add(index, ir.Constant(count.type, 1))
    for phi, first, value in (
        (index, ir.Constant(count.type, 0), following),
        (x, w, x_next),
        *((a, ir.Constant(sums, None), n) for a, n in zip(acc, new, strict=True)),
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    for i, value in enumerate(new):
        address = b.add(out, ir.Constant(out.type, 4 * dot.lanes * i))
        b.store(value, b.inttoptr(address, sums.as_pointer()), align=4 * dot.lanes)


def peak_loop(name: str) -> Callable[[float], float]:
    """Return a function that runs the loop for about so many seconds and returns MAC/s."""
    dot = DOTS[name]

    @njit(types.void(types.intp, types.uintp))
    def loop(count, out):
        _loop(count, out, name)

    sums = aligned((_ACCUMULATORS, 4 * dot.lanes), np.uint8)
    rate = 1e9

    def run(seconds: float) -> float:
        nonlocal rate
        count = max(1, int(seconds * rate / (_UNROLL * _ACCUMULATORS * dot.macs)))
        start = time.perf_counter()
        loop(count, sums.ctypes.data)
        spent = time.perf_counter() - start
        rate = count * _UNROLL * _ACCUMULATORS * dot.macs / spent
        return rate

    return run
