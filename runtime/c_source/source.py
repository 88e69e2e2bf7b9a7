"""A C file while it is written: its tables, functions and the steps of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from logshift.runtime.c_source.helpers import TEXTS

_C_TYPES = {
    np.dtype(np.uint8): "uint8_t", np.dtype(np.int8): "int8_t", np.dtype(np.int16): "int16_t",
    np.dtype(np.uint16): "uint16_t", np.dtype(np.int32): "int32_t", np.dtype(np.uint32): "uint32_t",
    np.dtype(np.float32): "float",
}  # fmt: skip


class Source:
    """What is written to `NAME.c`, in parts.

    Attributes
    ----------
    calls : list of callable() -> str
        Statements of a run, in order; they are asked for once all tensors have their places.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], str]] = []
        self._helpers: dict[str, str] = {}
        self._tables: dict[tuple[str, str], str] = {}
        self._functions: list[str] = []

    def helper(self, name: str, **values: int) -> None:
        """Have a function of `helpers`, with those that it calls before it."""
        needs, text = TEXTS[name]
        for other in needs:
            self.helper(other)
        self._helpers.setdefault(
            f"{name}{sorted(values.values())}", text % values if values else text
        )

    def table(self, values: np.ndarray, name: str) -> str:
        """Return the name of a constant array; arrays of equal content are one."""
        if not values.size:  # C has no empty arrays
            values = np.zeros(1, values.dtype)
        kind = _C_TYPES[values.dtype]
        return self.record(kind, [number(value) for value in values.reshape(-1)], name)

    def record(self, kind: str, values: Sequence[str], name: str) -> str:
        """Return the name of a constant array of initialisers."""
        body = textwrap.fill(", ".join(values), 100, break_long_words=False)
        return self._tables.setdefault(
            (f"static const {kind}", f"[{len(values)}] = {{\n{body}\n}};"), name
        )

    def scalar(self, kind: str, values: str, name: str) -> str:
        """Return the name of a constant record."""
        return self._tables.setdefault((f"static const {kind}", f" = {values};"), name)

    def function(self, text: str) -> None:
        """Add a function."""
        self._functions.append(text)

    def call(self, statement: Callable[[], str]) -> None:
        """Add a statement of a run."""
        self.calls.append(statement)

    def text(self) -> str:
        """Return everything but the run itself."""
        tables = [f"{kind} {name}{value}" for (kind, value), name in self._tables.items()]
        return "\n".join([*self._helpers.values(), *tables, "", *self._functions])


def number(value: float | np.generic) -> str:
    """Return a constant of C that has exactly this value."""
    if isinstance(value, (float, np.floating)):
        if np.isinf(value):
            return "-INFINITY" if value < 0 else "INFINITY"
        return f"{float(value).hex()}f"
    # The least of 32 bits is a sum in C: its magnitude has no type.
    return "(-2147483647 - 1)" if int(value) == -(2**31) else str(int(value))


def nest(counts: Sequence[int], offsets: Mapping[str, Sequence[int]], body: str) -> str:
    """Return loops over so many positions, in which offsets are where tensors' elements lie.

    Parameters
    ----------
    counts : sizes of axes, the outer one first
    offsets : dict of variable to its first value and what it grows by along each axis
    body : str
        Statement of the innermost loop.
    """
    steps = {name: list(values[1:]) for name, values in offsets.items()}
    sizes = list(counts)
    # Axes of one position are none, and those that follow each other without a gap are one.
    for axis in range(len(sizes) - 1, -1, -1):
        if sizes[axis] == 1 and len(sizes) > 1:
            del sizes[axis]
            for values in steps.values():
                del values[axis]
    for axis in range(len(sizes) - 2, -1, -1):
        if all(values[axis] == values[axis + 1] * sizes[axis + 1] for values in steps.values()):
            sizes[axis : axis + 2] = [sizes[axis] * sizes[axis + 1]]
            for values in steps.values():
                del values[axis]
    names = [f"i{axis}" for axis in range(len(sizes))]
    lines = [f"    int32_t {', '.join(names)};"]
    lines += [f"    int32_t {name} = {values[0]};" for name, values in offsets.items()]
    indent = "    "
    for axis, size in enumerate(sizes):
        i = names[axis]
        lines.append(f"{indent}for ({i} = 0; {i} < {size}; {i}++) {{")
        indent += "    "
    lines += [indent + line for line in body.splitlines()]
    for axis in range(len(sizes) - 1, -1, -1):
        for name, values in steps.items():
            inner = values[axis + 1] * sizes[axis + 1] if axis + 1 < len(sizes) else 0
            if step := values[axis] - inner:
                lines.append(f"{indent}{name} += {step};")
        indent = indent[:-4]
        lines.append(f"{indent}}}")
    return "\n".join(lines)


def braced(values: Iterable[object]) -> str:
    """Return an initialiser."""
    return "{" + ", ".join(map(str, values)) + "}"
