"""From what was measured to one HTML file, which needs nothing but itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from logshift.converter.extra import require
from logshift.converter.page.content import Page, as_command
from logshift.converter.page.plots import Plotter
from logshift.converter.verdict import as_python, is_good
from logshift.kernels.errors import InputError


def check_target(name: str, path: str | os.PathLike[str], packed: str | os.PathLike[str]) -> None:
    """Refuse a page that cannot be written, before anything is measured.

    Parameters
    ----------
    name : str
        Of the setting.
    path : path
    packed : path
        The packed file.

    Raises
    ------
    ConversionError
        If packages are missing.
    InputError
        If there is no such directory, or the path is the packed file's; names the setting.
    """
    require("a report page", "jinja2", "matplotlib", extra="report")
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"{name}: the directory {os.fspath(target.parent)!r} does not exist")
    if target.is_dir():
        raise InputError(f"{name}: {os.fspath(target)!r} is a directory")
    if os.path.realpath(target) == os.path.realpath(packed):
        raise InputError(f"{name}: {os.fspath(target)!r} is the packed file")


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write a page; an old file is replaced once the new one is complete."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(render(page), encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def render(page: Page) -> str:
    """Return the page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "decibels": _decibels, "bytes": _bytes, "percent": _percent, "milliseconds": _milliseconds,
        "cosine": _cosine, "number": _number, "python": as_python, "command": as_command,
    }  # fmt: skip
    environment.tests["good"] = is_good
    plotter = Plotter()
    environment.globals |= {
        "draw_" + plot.__name__: _drawn(plot)
        for plot in (plotter.weights, plotter.activations, plotter.points, plotter.layers)
    }
    text = files("logshift.converter.page").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        page=page, report=page.report, verdict=page.report.verdict,
        name=os.path.basename(page.report.path), version=version("logshift"),
    )  # fmt: skip


def _drawn(plot: Callable[..., str]) -> Callable[..., str]:
    """Let a template take what a plot is drawn as for what it is."""
    from markupsafe import Markup

    return lambda *arguments: Markup(plot(*arguments))


def _decibels(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "lost"


def _cosine(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.5f}"


def _bytes(value: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} bytes" if value else ""


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    if share == 0:
        return "0 %"
    return f"{100 * share:.3g} %" if share >= 1e-5 else "< 0.001 %"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds < 0.01 else f"{1e3 * seconds:.1f} ms"


def _number(value: float) -> str:
    return f"{value:.4g}"
