"""Lookups in a table of 256 codes, as many at a time as the machine's byte shuffles take."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, i8, i64
from logshift.kernels.machine.native import as_pointer
from logshift.kernels.machine.targets import has_features

_SHUFFLES = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}


class Lookup:
    """How to look codes up in a table, emitted as IR.

    Parameters
    ----------
    emitter : Emitter
    table, end : int64
        Its address, and the one behind it.
    """

    def __init__(self, emitter: Emitter, table: Any, end: Any) -> None:
        self._e, self._table, self._end = emitter, table, end
        self._quarters = None
        if _permutes():
            kind = ir.VectorType(i8, 64)
            places = [emitter.b.add(table, emitter.word(64 * part)) for part in range(4)]
            self._quarters = [emitter.load(place, kind, 1) for place in places]

    def __call__(self, codes: list[Any]) -> list[Any]:
        """Return the entries of some vectors of codes, all of 16, 32 or 64."""
        if self._quarters is not None:
            return [self._permuted(vector) for vector in codes]
        return self._shuffled(codes)

    def _permuted(self, codes: Any) -> Any:
        """Let the low 7 bits of an index permute each half of the table, and the 8th choose."""
        e, b, count = self._e, self._e.b, codes.type.count
        q = self._quarters
        assert q is not None
        wide = e.shuffle(codes, codes, [lane % count for lane in range(64)])
        name, kind = "llvm.x86.avx512.vpermi2var.qi.512", wide.type
        low, high = (e.intrinsic(name, kind, [q[i], wide, q[i + 1]]) for i in (0, 2))
        found = b.select(b.icmp_signed("<", wide, e.constant(0, kind)), high, low)
        return e.shuffle(found, found, [*range(count)])

    def _shuffled(self, codes: list[Any]) -> list[Any]:
        """Sixteen entries at a time.

        An index that is not among them gets its highest bit set, for which a byte shuffle yields 0.
        """
        e, b = self._e, self._e.b
        before, loop = b.block, b.append_basic_block("sixteen")
        after = b.append_basic_block("looked_up")
        b.branch(loop)
        b.position_at_end(loop)
        kind, count = codes[0].type, codes[0].type.count
        entry = b.phi(i64)
        held = [(b.phi(kind), b.phi(kind)) for _ in codes]
        sixteen = e.load(entry, ir.VectorType(i8, 16), 1)
        entries = e.shuffle(sixteen, sixteen, [lane % 16 for lane in range(count)])
        add, shuffle = f"llvm.uadd.sat.v{count}i8", _SHUFFLES[count]
        result = []
        for vector, (index, found) in zip(codes, held, strict=True):
            masked = e.intrinsic(add, kind, [index, e.constant(0x70, kind)])
            found_next = b.or_(found, e.intrinsic(shuffle, kind, [entries, masked]))
            index_next = b.sub(index, e.constant(16, kind))
            e.incoming(index, (before, vector), (loop, index_next))
            e.incoming(found, (before, e.constant(0, kind)), (loop, found_next))
            result.append(found_next)
        entry_next = b.add(entry, e.word(16))
        e.incoming(entry, (before, self._table), (loop, entry_next))
        b.cbranch(b.icmp_unsigned("<", entry_next, self._end), loop, after)
        b.position_at_end(after)
        return result


def _permutes() -> bool:
    """Whether one instruction looks up 64 codes in 128 entries."""
    return has_features(("avx512vbmi", "avx512bw"))


def _stages() -> list[tuple[int, int]]:
    """Codes of a vector, and vectors at a time, that are faster than codes one by one."""
    if _permutes():
        return [(64, 2), (16, 1)]
    if has_features(("avx512bw",)):
        return [(64, 4), (64, 1)]
    return [(32, 4), (32, 1)] if has_features(("avx2",)) else []


@intrinsic
def _look_up_vectors(typingctx, x, y, count, table):
    """Look up the first codes at address x, as many as fill vectors; returns how many."""

    def codegen(context, builder, signature, args):
        x, y, count, table = args
        e = Emitter(builder)
        begin = e.word(0)
        lookup = Lookup(e, table, builder.add(table, e.word(256)))
        for size, vectors in _stages():
            kind, step = ir.VectorType(i8, size), size * vectors
            end = builder.and_(count, e.word(-step))
            with cgutils.for_range_slice(builder, begin, end, e.word(step)) as (at, _):
                places = [builder.add(at, e.word(size * v)) for v in range(vectors)]
                codes = [e.load(builder.add(x, place), kind, 1) for place in places]
                for place, found in zip(places, lookup(codes), strict=True):
                    e.store(found, builder.add(y, place), 1)
            begin = end
        return begin

    return types.int64(x, y, count, table), codegen


@njit(error_model="numpy")
def look_up(x, y, count, table):
    """Look up `count` codes at the address x in the table at an address, into y, or in place."""
    done = _look_up_vectors(x, y, count, table)
    codes = carray(as_pointer(x), count, np.uint8)
    found = carray(as_pointer(y), count, np.uint8)
    entries = carray(as_pointer(table), 256, np.uint8)
    for c in range(np.uintp(done), np.uintp(count)):
        found[c] = entries[codes[c]]
