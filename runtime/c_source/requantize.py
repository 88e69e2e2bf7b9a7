"""From sums to codes: tables of `fixed` in C, and what computes an output by the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logshift.kernels.activation import HARD_SWISH, PIECEWISE, PRELU, Target
from logshift.runtime.c_source.fixed import DIGITS, Fixed
from logshift.runtime.c_source.site import Site
from logshift.runtime.c_source.source import braced, number


@dataclass(frozen=True)
class Scale:
    """Names of a layer's records in C."""

    scale: str
    rows: str


def scale(site: Site, form: Fixed, zero: int = 0, factor: float = 0.0) -> Scale:
    """Write the records of a layer; `zero` and `factor` are those of a residual."""
    name = f"{site.name}_scale"
    return Scale(_scale_record(site, form, zero, factor, name), rows_of(site, form))


def rows_of(site: Site, form: Fixed) -> str:
    """Write the records of output channels; returns their name."""
    site.helper("row_products" if site.options.multiply else "row")
    rows = []
    for row in form.rows:
        last = str(row.factor)
        if not site.options.multiply:
            shifts = [*row.plus, *row.minus]
            shifts += [0] * (DIGITS - len(shifts))
            last = f"{len(row.plus) | len(row.minus) << 4}, {braced(shifts)}"
        rows.append(f"{{{row.offset}, {row.bias}, {number(row.m)}, {number(row.b)}, {last}}}")
    return site.source.record("struct row", rows, f"{site.name}_rows")


def _scale_record(site: Site, form: Fixed, zero: int, factor: float, name: str) -> str:
    one, residual = 1 << form.fraction, "0"
    if form.residual is not None:
        residual = site.source.table(form.residual, f"{site.name}_residual")
    # In doubt: everything, if nothing is known well enough.
    low, high, doubt, sure = form.low, form.high, form.doubt, one - 2 * form.doubt
    if not form.fraction:
        low, high, doubt, sure = -(2**31), 2**31 - 1, 0, 0
    record = braced([
        number(np.int64(low)), high, one - 1, doubt, sure, form.grow, form.fraction,
        form.lo, form.hi, zero, number(factor), residual,
    ])  # fmt: skip
    return site.source.scalar("struct scale", record, name)


def scaling(site: Site, name: str) -> None:
    """Have what scales sums: by shifts, or by a product."""
    site.helper(f"{name}_products" if site.options.multiply else name)


def activated(site: Site, to: Target, v: str, lo: int, hi: int, slope: str) -> str:
    """Return C for the code of v, which a fused function is computed of."""
    bounds = f"{lo}, {hi}"
    if to.kind == PIECEWISE:
        site.helper("times_products" if site.options.multiply else "times")
        site.helper("piecewise")
        table = site.source.table(to.coefficients.astype(np.int16), f"{site.name}_pieces")
        return f"piecewise({v}, {table}, {bounds})"
    site.helper("rounded")
    c = [number(value) for value in to.coefficients.astype(np.float32)]
    if to.kind == PRELU:
        site.helper("prelu")
        return f"rounded(prelu({v}, {slope}, {c[0]}), {bounds})"
    if to.kind == HARD_SWISH:
        site.helper("hard_swish")
        return f"rounded(hard_swish({v}, {c[0]}, {c[1]}, {c[2]}), {bounds})"
    return f"rounded({v}, {bounds})"


def clamp_of(site: Site) -> tuple[int, int]:
    """Return the bounds of a node's output codes."""
    q = site.output.quantization
    assert q is not None
    lo, hi = site.node.attributes.get("clamp", (None, None))
    return 0 if lo is None else lo, q.top if hi is None else hi


def slopes_of(site: Site, to: Target, channels: int) -> str:
    """Return the name of a table of slopes, one for each output channel."""
    assert to.slopes is not None
    return site.source.table(np.full(channels, to.slopes, np.float32), f"{site.name}_slopes")


def pointers(tensors: Sequence[str]) -> str:
    """Return the parameters of a function that reads these tensors of codes and writes y."""
    return ", ".join([*(f"const uint8_t *{name}" for name in tensors), "uint8_t *restrict y"])
