"""Lookups of many codes: whole vectors where the machine has byte shuffles, the rest one by one."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from logshift.kernels.machine.emit import Emitter, i8
from logshift.kernels.machine.isa.avx2 import AVX2
from logshift.kernels.machine.isa.avx512 import AVX512_BW, AVX512_VBMI
from logshift.kernels.machine.isa.base import ANY
from logshift.kernels.machine.isa.neon import NEON
from logshift.kernels.machine.lookup import Lookup
from logshift.kernels.machine.native import as_pointer

# Of the first one that a machine has: codes of a vector, and vectors at a time, that are faster
# than codes one by one.
_STAGES = {
    AVX512_VBMI: ((64, 2), (16, 1)),
    AVX512_BW: ((64, 4), (64, 1)),
    AVX2: ((32, 4), (32, 1)),
    NEON: ((16, 4), (16, 1)),
}


@intrinsic
def _look_up_vectors(typingctx, x, y, count, table):
    """Look up the first codes at address x, as many as fill vectors; returns how many."""

    def codegen(context, builder, signature, args):
        x, y, count, table = args
        e = Emitter(builder)
        begin = e.word(0)
        isa, stages = next((s for s in _STAGES.items() if s[0].available), (ANY, ()))
        lookup = Lookup(e, isa, table, builder.add(table, e.word(256)), keeps=True)
        for size, vectors in stages:
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
