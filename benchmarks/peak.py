"""The machine's peak of byte dot products: the kernels' instructions, on registers only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter
from logshift.kernels.machine.isa.avx2 import AVX2
from logshift.kernels.machine.isa.avx512 import AVX512_VNNI
from logshift.kernels.machine.isa.avxvnni import AVX_VNNI
from logshift.kernels.machine.isa.base import InstructionSet
from logshift.kernels.machine.memory import aligned

_ACCUMULATORS = 12  # independent sums, enough to hide the latency of either instruction
_UNROLL = 4


@dataclass(frozen=True)
class Dot:
    """A byte dot product of an instruction set."""

    isa: InstructionSet
    pair: bool  # sums into int16, and takes an addition of its own

    @property
    def macs(self) -> int:
        """Multiplications per vector."""
        return self.isa.vector

    def add(self, e: Emitter, acc: ir.Value, x: ir.Value) -> ir.Value:
        """Add products of a vector with itself."""
        if self.pair:
            return e.b.add(acc, self.isa.byte_pairs(e, x, x))
        return self.isa.byte_dot(e, acc, x, x)


# The widest first.
DOTS = {
    "avx512vnni": Dot(AVX512_VNNI, False), "avxvnni": Dot(AVX_VNNI, False), "avx2": Dot(AVX2, True),
}  # fmt: skip


def best() -> str | None:
    """Name of the widest byte dot product that this machine has, or None."""
    return next((name for name, dot in DOTS.items() if dot.isa.available), None)


@intrinsic(prefer_literal=True)
def _loop(typingctx, count, out, name):
    """Emit `count` rounds of products on registers; the sums are stored at the address `out`."""

    def codegen(context, builder, signature, args):
        _emit(DOTS[name.literal_value], builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(count, out, name), codegen


def _emit(dot: Dot, b: ir.IRBuilder, count: ir.Value, out: ir.Value) -> None:
    e, isa = Emitter(b), dot.isa
    codes, sums = isa.bytes, isa.int16s if dot.pair else isa.int32s
    # No instruction, but LLVM cannot tell what comes out: nothing is the same twice.
    opaque = ir.InlineAsm(ir.FunctionType(codes, [codes]), "", "=v,0", side_effect=True)

    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    index, x = b.phi(count.type), b.phi(codes)
    acc = [b.phi(sums) for _ in range(_ACCUMULATORS)]
    x_next, new = x, list(acc)
    for _ in range(_UNROLL):
        for i in range(_ACCUMULATORS):
            x_next = b.call(opaque, [x_next])
            new[i] = dot.add(e, new[i], x_next)
    following = b.add(index, ir.Constant(count.type, 1))
    for phi, first, value in (
        (index, ir.Constant(count.type, 0), following),
        (x, ir.Constant(codes, None), x_next),
        *((a, ir.Constant(sums, None), n) for a, n in zip(acc, new, strict=True)),
    ):
        e.incoming(phi, (before, first), (loop, value))
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    for i, value in enumerate(new):
        e.store(value, b.add(out, ir.Constant(out.type, isa.vector * i)), isa.vector)


def peak_loop(name: str) -> Callable[[float], float]:
    """Return a function that runs the loop for about so many seconds and returns MAC/s."""
    dot = DOTS[name]

    @njit(types.void(types.intp, types.uintp))
    def loop(count, out):
        _loop(count, out, name)

    sums = aligned((_ACCUMULATORS, dot.isa.vector), np.uint8)
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
