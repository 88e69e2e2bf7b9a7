"""How many threads compute while a network is converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_blas() -> Iterator[None]:
    """Let every product of matrices be computed by its caller's thread alone.

    OpenBLAS divides the small matrices of a layer among threads that wait for each other in loops:
    beside any other work that takes several times as long. Converting has threads of its own.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
