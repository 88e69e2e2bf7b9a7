"""What Numba has no word for: addresses as arrays, calls through addresses, atomics."""

from __future__ import annotations

import os

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


@intrinsic
def as_pointer(typingctx, address):
    """Turn a uintp address into the void pointer that `numba.carray` takes."""
    signature = types.voidptr(types.uintp)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return signature, codegen


@intrinsic
def call_kernel(typingctx, function, arguments, thread, threads):
    """Call the kernel at an address: void (arguments, thread, threads), see `abi.Kernel`."""
    signature = types.void(types.intp, types.intp, types.intp, types.intp)

    def codegen(context, builder, signature, args):
        function, arguments, thread, threads = args
        word = arguments.type
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word])
        target = builder.inttoptr(function, kind.as_pointer())
        builder.call(target, [builder.inttoptr(arguments, pointer), thread, threads])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def call_tile(typingctx, function, arguments):
    """Call the microkernel at an address: void (address of a TILE), see `microkernels`."""
    signature = types.void(types.uintp, types.uintp)

    def codegen(context, builder, signature, args):
        function, arguments = args
        kind = ir.FunctionType(ir.VoidType(), [arguments.type])
        builder.call(builder.inttoptr(function, kind.as_pointer()), [arguments])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the int64 at an address; returns the value before."""
    signature = types.int64(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return signature, codegen


@intrinsic
def atomic_load(typingctx, address):
    """Read the int64 at an address, not before anything that is written before it."""
    signature = types.int64(types.uintp)

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature, codegen


@intrinsic
def yield_thread(typingctx):
    """Let another runnable thread have this core."""
    signature = types.void()

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return signature, codegen
