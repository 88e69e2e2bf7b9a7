"""The command `logshift warmup`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from logshift.converter.cli.shared import AUTO, KernelFamily, warm_up


def warmup(
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the code in DIR; programs find it by the variable LOGSHIFT_CACHE_DIR=DIR.",
            show_default="LOGSHIFT_CACHE_DIR, else the user's cache directory",
        ),
    ] = None,
    cpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compile for this kind of CPU: `haswell`, `icelake-server`, `znver4` ... May be"
            " given several times.",
            show_default="this machine's",
        ),
    ] = None,
    kernels: KernelFamily = AUTO,
) -> None:
    """Compile all kernels, so that later commands and programs start fast.

    Compiled code is kept in a cache; after an update of logshift or Numba, or on another CPU, it is
    made anew. With `--into` and `--cpu` the cache can be part of an image that is built here, and
    run, read-only if need be, elsewhere.

    **Examples**

    - `logshift warmup`

    - `logshift warmup --into /opt/logshift-cache --cpu haswell --cpu icelake-server --cpu znver4`
    """
    start = time.perf_counter()
    for warmed in warm_up(kernels.value, into, cpu or ()):
        where = "kept nowhere" if warmed.directory is None else warmed.directory
        print(f"{warmed.cpu}: {warmed.size / 1e6:.1f} MB in {where}")
    print(f"kernels are ready ({time.perf_counter() - start:.1f} s)")
