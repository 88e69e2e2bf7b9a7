"""What Numba has no word for: addresses as arrays, calls through addresses, atomics, waiting."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_i32, _i64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def as_pointer(typingctx, address):
    """Turn a uintp address into the void pointer that `numba.carray` takes."""
    signature = types.voidptr(types.uintp)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return signature, codegen


@intrinsic
def call_kernel(typingctx, function, arguments, first_part, end_part, parts, slot):
    """Call the kernel at an address, see `registry`."""
    signature = types.void(*[types.intp] * 6)

    def codegen(context, builder, signature, args):
        function, arguments, *rest = args
        word = arguments.type
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, *[word] * 4])
        target = builder.inttoptr(function, kind.as_pointer())
        builder.call(target, [builder.inttoptr(arguments, pointer), *rest])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def call_tile(typingctx, function, arguments):
    """Call the microkernel at an address: void (address of a record), see `microkernel`."""
    signature = types.void(types.uintp, types.uintp)

    def codegen(context, builder, signature, args):
        function, arguments = args
        kind = ir.FunctionType(ir.VoidType(), [arguments.type])
        builder.call(builder.inttoptr(function, kind.as_pointer()), [arguments])
        return context.get_dummy_value()

    return signature, codegen


# --- atomics --------------------------------------------------------------------------------------


def _word(builder, address):
    return builder.inttoptr(address, _i64.as_pointer())


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the int64 at an address, sequentially consistent; returns the value before."""
    signature = types.int64(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], "seq_cst")

    return signature, codegen


@intrinsic
def atomic_exchange(typingctx, address, value):
    """Set the int64 at an address, sequentially consistent; returns the value before."""
    signature = types.int64(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _word(builder, args[0]), args[1], "seq_cst")

    return signature, codegen


@intrinsic
def atomic_replace(typingctx, address, expected, value):
    """Set the int64 at an address if it is `expected`, sequentially consistent; returns whether."""
    signature = types.boolean(types.uintp, types.int64, types.int64)

    def codegen(context, builder, signature, args):
        pointer = _word(builder, args[0])
        result = builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return signature, codegen


@intrinsic
def atomic_load(typingctx, address):
    """Read the int64 at an address, sequentially consistent."""
    signature = types.int64(types.uintp)

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return signature, codegen


@intrinsic
def atomic_store(typingctx, address, value):
    """Set the int64 at an address; whoever reads it sees what was written before (release)."""
    signature = types.void(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _word(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return signature, codegen


# --- waiting --------------------------------------------------------------------------------------

_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # both private to the process
_UL_COMPARE_AND_WAIT, _ULF_WAKE_ALL = 1, 0x100  # macOS
_POLL = 100  # microseconds between looks where a system has no such call

if sys.platform == "win32":
    _synch = ctypes.WinDLL("api-ms-win-core-synch-l1-2-0")
    for _name in ("WaitOnAddress", "WakeByAddressAll"):
        _address = ctypes.cast(getattr(_synch, _name), ctypes.c_void_p).value
        llvm.add_symbol(_name, _address)


def _call(builder, result, name, arguments):
    """Call a function of the C library."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


@intrinsic
def wait_at(typingctx, address, value):
    """Sleep until the lower half of the int64 at an address is no longer that of `value`.

    Sleeps only if it is when the call begins; may return early. Whoever changes it must call
    `wake_at`.
    """
    signature = types.void(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        address, value = args
        low = builder.trunc(value, _i32)
        zero = _i64(0)
        machine = platform.machine()
        if sys.platform == "linux" and machine in _FUTEX:
            words = [_i64(_FUTEX[machine]), address, _i64(_FUTEX_WAIT), builder.zext(low, _i64)]
            _call(builder, _i64, "syscall", [*words, zero, zero, zero])
        elif sys.platform == "darwin":
            words = [_i32(_UL_COMPARE_AND_WAIT), address, builder.zext(low, _i64), _i32(0)]
            _call(builder, _i32, "__ulock_wait", words)
        elif sys.platform == "win32":
            expected = cgutils.alloca_once_value(builder, low)
            words = [address, builder.ptrtoint(expected, _i64), _i64(4), _i32(0xFFFFFFFF)]
            _call(builder, _i32, "WaitOnAddress", words)
        else:
            _call(builder, _i32, "usleep", [_i32(_POLL)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def wake_at(typingctx, address, count):
    """Wake threads that sleep in `wait_at`; at least `count` of them, as far as there are any."""
    signature = types.void(types.uintp, types.int64)

    def codegen(context, builder, signature, args):
        address, count = args
        zero = _i64(0)
        machine = platform.machine()
        if sys.platform == "linux" and machine in _FUTEX:
            words = [_i64(_FUTEX[machine]), address, _i64(_FUTEX_WAKE), count, zero, zero, zero]
            _call(builder, _i64, "syscall", words)
        elif sys.platform == "darwin":
            words = [_i32(_UL_COMPARE_AND_WAIT | _ULF_WAKE_ALL), address, zero]
            _call(builder, _i32, "__ulock_wake", words)
        elif sys.platform == "win32":
            _call(builder, ir.VoidType(), "WakeByAddressAll", [address])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this thread waits: it does less, and leaves more to its sibling."""
    signature = types.void()

    def codegen(context, builder, signature, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64", "i686"):
            _call(builder, ir.VoidType(), "llvm.x86.sse2.pause", [])
        elif machine in ("aarch64", "arm64"):
            _call(builder, ir.VoidType(), "llvm.aarch64.hint", [_i32(1)])  # yield
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def give_way(typingctx):
    """Let another thread that waits for this core have it."""
    signature = types.void()

    def codegen(context, builder, signature, args):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        _call(builder, _i32, name, [])
        return context.get_dummy_value()

    return signature, codegen


_MASK = 16  # words of a set of cores


@intrinsic
def current_core(typingctx):
    """Return the number of the core that this thread is on; -1 where a system does not tell."""
    signature = types.int64()

    def codegen(context, builder, signature, args):
        if sys.platform != "linux":
            return _i64(-1)
        return builder.sext(_call(builder, _i32, "sched_getcpu", []), _i64)

    return signature, codegen


@intrinsic
def leave_core(typingctx, core):
    """Move this thread to another of the cores that it may use, if it may use another one.

    It is forbidden the core for a moment: where it may run later is as before.
    """
    signature = types.void(types.int64)

    def codegen(context, builder, signature, args):
        if sys.platform != "linux":
            return context.get_dummy_value()
        (core,) = args
        none, size = _i32(0), _i64(8 * _MASK)  # of this thread
        masks = cgutils.alloca_once(builder, ir.ArrayType(_i64, _MASK))
        place = builder.ptrtoint(masks, _i64)
        found = _call(builder, _i32, "sched_getaffinity", [none, size, place])
        known = builder.icmp_unsigned("<", core, _i64(64 * _MASK))
        with builder.if_then(builder.and_(builder.icmp_signed("==", found, none), known)):
            word = builder.gep(masks, [none, builder.lshr(core, _i64(6))])
            allowed = builder.load(word)
            bit = builder.shl(_i64(1), builder.and_(core, _i64(63)))
            builder.store(builder.and_(allowed, builder.not_(bit)), word)
            _call(builder, _i32, "sched_setaffinity", [none, size, place])  # fails if none is left
            builder.store(allowed, word)
            _call(builder, _i32, "sched_setaffinity", [none, size, place])
        return context.get_dummy_value()

    return signature, codegen


# The numbers of system calls that get and set how a thread is scheduled.
_GET_SCHEDULING = {"x86_64": 315, "aarch64": 275, "riscv64": 275, "ppc64le": 356}
_SCHEDULING = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, ...
_NORMAL_POLICIES = (0, 3)  # SCHED_OTHER, SCHED_BATCH


def ask_for_short_turns(seconds: float) -> None:
    """Have this thread scheduled for so long at a time, if others want its core as well.

    It then waits less for its turn, and its share is the same. Linux from 6.12 on; elsewhere, and
    where it is not allowed, nothing changes.
    """
    number = _GET_SCHEDULING.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(_SCHEDULING.size)
    if libc.syscall(number, 0, attributes, _SCHEDULING.size, 0) != 0:
        return
    size, policy, flags, nice, priority, _, deadline, period = _SCHEDULING.unpack(attributes.raw)
    if policy in _NORMAL_POLICIES:
        _SCHEDULING.pack_into(
            attributes, 0, size, policy, flags, nice, priority, int(1e9 * seconds), deadline, period
        )
        libc.syscall(number - 1, 0, attributes, 0)


# The numbers of clocks, by the system: time that passes, and time that this thread has had a core.
_CLOCKS = {"linux": (1, 3), "darwin": (6, 16)}


def _read_clock(index):
    @intrinsic
    def read(typingctx):
        signature = types.int64()

        def codegen(context, builder, signature, args):
            if sys.platform not in _CLOCKS:
                return _i64(0)
            time = cgutils.alloca_once(builder, ir.ArrayType(_i64, 2))
            place = builder.ptrtoint(time, _i64)
            _call(builder, _i32, "clock_gettime", [_i32(_CLOCKS[sys.platform][index]), place])
            seconds, nanoseconds = (
                builder.load(builder.gep(time, [_i32(0), _i32(i)])) for i in range(2)
            )
            return builder.add(builder.mul(seconds, _i64(10**9)), nanoseconds)

        return signature, codegen

    return read


# Nanoseconds; 0 where a system has no such clocks.
clock = _read_clock(0)
thread_clock = _read_clock(1)
