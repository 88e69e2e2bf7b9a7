"""Lookups in a table of 256 codes, emitted as IR: as many at a time as byte shuffles take."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from logshift.kernels.machine.emit import Emitter, i8, i64
from logshift.kernels.machine.isa.avx512 import AVX512_VBMI
from logshift.kernels.machine.isa.base import InstructionSet
from logshift.kernels.machine.isa.neon import Neon


class Lookup:
    """How to look codes up in a table, emitted as IR.

    Parameters
    ----------
    emitter : Emitter
    isa : InstructionSet
        Whose registers hold the codes; of x86, where the machine has AVX-512 VBMI, that is used
        instead.
    table, end : int64
        Its address, and the one behind it.
    keeps : bool
        Whether registers have room for all of the table, if it takes 16 of them.
    """

    def __init__(
        self, emitter: Emitter, isa: InstructionSet, table: Any, end: Any, keeps: bool = False
    ) -> None:
        self._e, self._isa, self._table, self._end = emitter, isa, table, end
        self._kept = self._quarters = None
        if isinstance(isa, Neon):
            if keeps:
                self._kept = [isa.entries(emitter, table, part) for part in range(4)]
        elif AVX512_VBMI.available:
            kind = AVX512_VBMI.bytes
            places = [emitter.b.add(table, emitter.word(64 * part)) for part in range(4)]
            self._quarters = [emitter.load(place, kind, 1) for place in places]

    def __call__(self, codes: list[Any]) -> list[Any]:
        """Return the entries of some vectors of codes, all of 16, 32 or 64."""
        if self._quarters is not None:
            return [self._permuted(vector) for vector in codes]
        if isinstance(self._isa, Neon):
            return self._by_quarters(self._isa, codes)
        return self._shuffled(codes)

    def _permuted(self, codes: Any) -> Any:
        """Let the low 7 bits of an index permute each half of the table, and the 8th choose."""
        e, b, count = self._e, self._e.b, codes.type.count
        q = self._quarters
        assert q is not None
        wide = e.shuffle(codes, codes, [lane % count for lane in range(64)])
        low, high = (AVX512_VBMI.permuted(e, q[i], wide, q[i + 1]) for i in (0, 2))
        found = b.select(b.icmp_signed("<", wide, e.constant(0, wide.type)), high, low)
        return e.shuffle(found, found, [*range(count)])

    def _by_quarters(self, isa: Neon, codes: list[Any]) -> list[Any]:
        """Look all codes up in one quarter of the table after the other."""
        found = codes
        for part in range(4):
            entries = self._kept[part] if self._kept else isa.entries(self._e, self._table, part)
            found = [
                isa.found(self._e, so_far, entries, index, part)
                for so_far, index in zip(found, codes, strict=True)
            ]
        return found

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
        add = f"llvm.uadd.sat.v{count}i8"
        result = []
        for vector, (index, found) in zip(codes, held, strict=True):
            masked = e.intrinsic(add, kind, [index, e.constant(0x70, kind)])
            found_next = b.or_(found, self._isa.looked_up(e, entries, masked))
            index_next = b.sub(index, e.constant(16, kind))
            e.incoming(index, (before, vector), (loop, index_next))
            e.incoming(found, (before, e.constant(0, kind)), (loop, found_next))
            result.append(found_next)
        entry_next = b.add(entry, e.word(16))
        e.incoming(entry, (before, self._table), (loop, entry_next))
        b.cbranch(b.icmp_unsigned("<", entry_next, self._end), loop, after)
        b.position_at_end(after)
        return result
