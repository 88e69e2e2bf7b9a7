"""Numba's decorators, with compiled code kept in `cache` instead of Numba's own.

`njit` and `cfunc` are Numba's but for `cache=True`, which neither needs a directory that can be
written nor looks at times of files. Functions of others in the same process are not affected.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import sigutils, typeinfer
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from logshift.kernels.machine import cache as store
from logshift.kernels.machine import targets


class _KernelCache(_Cache):
    """What a compiled function asks for code, and hands code to."""

    def __init__(self, function: Callable, kind: str) -> None:
        self._function, self._kind = function, kind

    @property
    def cache_path(self) -> str:
        return str(store.places()[0])

    def enable(self) -> None:
        pass

    disable = flush = enable

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        for directory in targets.directories():
            if (content := store.read(f"{directory}/{self._file(sig)}")) is None:
                continue
            try:
                return CompileResult._rebuild(target_context, *pickle.loads(content))
            except Exception:  # whatever it is, compiling again mends it
                continue
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        if not data.library.has_dynamic_globals and all(part.can_cache for part in data.lifted):
            name = f"{targets.directories()[-1]}/{self._file(sig)}"
            store.write(name, dumps(data._reduce()))

    def _file(self, sig: Any) -> str:
        """Name of the file with the code for a signature."""
        function = self._function
        arguments, _ = sigutils.normalize_signature(sig)
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        key = (
            self._kind, function.__module__, function.__qualname__, [str(a) for a in arguments],
            hashlib.blake2b(dumps(cells)).hexdigest(), _source(function.__code__.co_filename),
        )  # fmt: skip
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        return f"{name}-{hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()}.bin"


@cache
def _source(path: str) -> str:
    """Digest of a source file; those of the kernels are part of `cache.stamp`."""
    file = Path(path)
    if file.is_relative_to(store.PACKAGE) or not file.is_file():
        return ""
    return hashlib.blake2b(file.read_bytes()).hexdigest()


def njit(*arguments: Any, cache: bool = False, **options: Any) -> Any:
    """Do what `numba.njit` does; with `cache`, keep the code in logshift's own cache."""
    if not cache:
        return numba.njit(*arguments, **options)

    def compiled(function: Callable) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        dispatcher._cache = _KernelCache(function, "njit")
        if arguments:
            with typeinfer.register_dispatcher(dispatcher):
                dispatcher.compile(*arguments)
            dispatcher.disable_compile()
        return dispatcher

    return compiled


def cfunc(signature: Any, **options: Any) -> Callable[[Callable], Any]:
    """Do what `numba.cfunc` does with `cache=True`, with logshift's own cache."""

    def compiled(function: Callable) -> Any:
        result: Any = CFunc(function, sigutils.normalize_signature(signature), {}, options)
        result._cache = _KernelCache(function, "cfunc")
        result.compile()
        return result

    return compiled
