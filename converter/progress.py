"""Progress of what takes long, shown or handed on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield a callable(done, total, what) for a conversion.

    Parameters
    ----------
    progress : callable, True, False or None
        A callable is used as it is. None and True show a bar if rich is installed and the error
        stream is a terminal; False shows nothing.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield _nothing
    else:
        with bar("converting") as show:
            yield show


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """Yield a callable(done, total, what) that moves a bar on the error stream.

    It does nothing if rich is not installed or the error stream is no terminal.
    """
    if not sys.stderr.isatty():
        yield _nothing
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:
        yield _nothing
        return
    with Bar(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total, what: shown.update(
            task, completed=done, total=total, description=f"{title} {what}".rstrip()
        )


def _nothing(done: int, total: int, what: str) -> None:
    pass
