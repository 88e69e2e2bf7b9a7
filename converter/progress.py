"""Progress of a conversion, shown or handed on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield a callable(done, total, what).

    Parameters
    ----------
    progress : callable, True, False or None
        A callable is used as it is. None and True show a bar if rich is installed and the error
        stream is a terminal; False shows nothing.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        yield lambda done, total, what: None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting")
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what or "converting"
        )
