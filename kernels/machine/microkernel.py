"""Microkernels: functions that are emitted as IR, compiled, and called through their address.

A module that has some says in its `emit(name, builder, arguments)` what the body of one is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from logshift.kernels.machine.jit import cfunc


@intrinsic(prefer_literal=True)
def _emitted(typingctx, arguments, module, name):
    def codegen(context, builder, signature, args):
        emit = importlib.import_module(module.literal_value).emit
        emit(name.literal_value, builder, args[0])
        return context.get_dummy_value()

    return types.void(arguments, module, name), codegen


def function(module: str, name: str) -> Callable[[int], None]:
    """Return the Python function that compiles to a microkernel of a module."""

    def microkernel(arguments):
        _emitted(arguments, module, name)

    return microkernel


@global_compiler_lock  # of threads that load a network the first compiles, others wait
@cache
def address(module: str, name: str) -> int:
    """Address of a compiled microkernel, `void (address of a record)`."""
    compiled: Any = cfunc(types.void(types.uintp))(function(module, name))
    return compiled.address
