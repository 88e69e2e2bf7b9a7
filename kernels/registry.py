"""How a kernel is called, and the registry of all kernels.

Every kernel is compiled to

    void kernel(record *arguments, intp first_part, intp end_part, intp parts, intp slot)

and does those of the `parts` equal parts of the work that begin at `first_part` and end before
`end_part`; who does which, and when, is its caller's business. `slot` says which scratch memory it
may use: no two calls at the same time have the same. A kernel never allocates, never raises and
never checks: whatever an argument record says has been validated when the record was made.

A family is a package beside this file: each module in it is imported when the family is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from numba import from_dtype, types
from numba.core.compiler_lock import global_compiler_lock

from logshift.kernels.machine.jit import cfunc

# What each family falls back to for an operation, or a layer, that it has no kernel for; beside
# them "auto" may be asked for, see `families`.
FAMILIES = {
    "reference": ("reference",),
    "portable": ("portable",),
    "dot": ("dot", "fma", "portable"),
    "shift": ("shift", "fma", "portable"),
}
_PACKAGES = sorted({family for chain in FAMILIES.values() for family in chain})


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel of the registry.

    Attributes
    ----------
    op : str
        Key of the argument record: "conv", "pool_max", ...
    family : str
        Of those that `FAMILIES` falls back to.
    variant : str
        What sets it apart from others of the same op and family; "" if nothing does.
    record : numpy dtype of its arguments, the same for all kernels of an op
    function : the Python function, compiled on first use
    supports : callable(layer.Layer) -> bool, or None
        Whether it can serve a convolution; None for other ops.
    pack : callable(layer.Layer) -> layer.Packed, or None
        Lays out a convolution; None for other ops.
    cost : callable(layer.Layer) -> float, or None
        Decides between kernels of one family that support a layer: the lowest is taken.
    available : callable() -> bool
        Whether the machine has the instructions.
    preferred : callable(layer.Layer) -> bool, or None
        Whether "auto" takes it for a convolution that it supports; None if always.
    scratch : callable(argument record) -> int, or None
        Bytes of scratch memory it needs per slot.
    pieces : callable(argument record) -> int, or None
        Pieces of its work within which something is prepared once, so that they are better not
        cut; None if it may be cut anywhere.
    looks_up : bool
        Whether a convolution passes its output codes through the table of its arguments.
    """

    op: str
    family: str
    variant: str
    record: np.dtype
    function: Callable[..., None]
    supports: Callable[[Any], bool] | None = None
    pack: Callable[[Any], Any] | None = None
    cost: Callable[[Any], float] | None = None
    available: Callable[[], bool] = lambda: True
    preferred: Callable[[Any], bool] | None = None
    scratch: Callable[[Any], int] | None = None
    pieces: Callable[[Any], int] | None = None
    looks_up: bool = False

    @property
    def name(self) -> str:
        """Family, op and variant, as `logshift info` shows it."""
        return "-".join(part for part in (self.family, self.op, self.variant) if part)

    @cached_property
    def address(self) -> int:
        """Address of the compiled kernel; the first use compiles it or loads it from the cache."""
        return _compiled(self.function, self.record).address


@global_compiler_lock  # of threads that load a network the first compiles, others wait
@cache
def _compiled(function: Callable[..., None], record: np.dtype) -> Any:
    signature = types.void(types.CPointer(from_dtype(record)), *[types.intp] * 4)
    return cfunc(signature, error_model="numpy")(function)


_REGISTRY: dict[tuple[str, str, str], Kernel] = {}
# What kernels of a family need compiled beside themselves: family, name, what compiles it, whether
# the machine has the instructions.
_PARTS: list[tuple[str, str, Callable[[], object], Callable[[], bool]]] = []


def register(op: str, family: str, record: np.dtype, variant: str = "", **hooks: Any) -> Callable:
    """Enter a function in the registry; a decorator.

    Raises
    ------
    ValueError
        If other kernels of `op` have another argument record.
    """
    others = [k for k in _REGISTRY.values() if k.op == op]
    if any(k.record != record for k in others):  # it would be taken for what it is not
        raise ValueError(f"{family}: arguments of {op} are declared otherwise by {others[0].name}")

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        _REGISTRY[op, family, variant] = Kernel(op, family, variant, record, function, **hooks)
        return function

    return enter


def register_part(
    family: str, name: str, compile: Callable[[], object], available: Callable[[], bool]
) -> None:
    """Enter what kernels of a family call through its address, or what packs their weights."""
    _PARTS.append((family, name, compile, available))


def kernels() -> Iterator[Kernel]:
    """Yield all kernels, for tests, benchmarks and warm-up to walk."""
    for family in _PACKAGES:
        _import(family)
    yield from list(_REGISTRY.values())


@cache
def _import(family: str) -> None:
    """Import all modules of a family's package, which register what they have."""
    package = importlib.import_module(f"logshift.kernels.{family}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _of(family: str) -> Iterator[Kernel]:
    """Yield the kernels of one family that the machine can run."""
    _import(family)
    # A list: another thread may import one more family.
    return (k for k in list(_REGISTRY.values()) if k.family == family and k.available())


def families(name: str) -> tuple[str, ...]:
    """Return where kernels are taken from if one of `FAMILIES`, or "auto", is asked for.

    Where the machine has products of bytes, these are faster than shifts and additions whatever
    the bits; elsewhere it is the other way round.
    """
    if name == "auto":
        name = "dot" if any(_of("dot")) else "shift"
    return FAMILIES[name]


def to_compile(name: str) -> list[tuple[str, Callable[[], object]]]:
    """Return names of all that a family of `families` may use here, with what compiles each."""
    chosen = families(name)
    found: list[tuple[str, Callable[[], object]]] = [
        (k.name, partial(getattr, k, "address"))
        for k in kernels()
        if k.family in chosen and k.available()
    ]
    return found + [
        (part, compile)
        for family, part, compile, available in _PARTS
        if family in chosen and available()
    ]


def kernel(op: str, family: str, layer: Any = None) -> Kernel:
    """Return the kernel for `op`, and `layer` if given, of a family or what it falls back to."""
    auto = family == "auto"

    def serves(k: Kernel) -> bool:
        if layer is None or k.supports is None:
            return True
        return k.supports(layer) and not (auto and k.preferred and not k.preferred(layer))

    for name in families(family):
        candidates = [k for k in _of(name) if k.op == op and serves(k)]
        if candidates:
            return min(candidates, key=lambda k: k.cost(layer) if k.cost and layer else 0)
    raise LookupError(f"no {family} kernel for {op}")
