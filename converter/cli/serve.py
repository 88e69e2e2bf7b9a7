"""The command `logshift serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logshift.kernels.errors import InputError


def serve(
    packed: Annotated[list[Path], typer.Argument(metavar="FILE.stlq...", help="Packed networks.")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What requests call a network; once for each file.",
            show_default="the file's, without .stlq",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of REST.")] = 8080,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of gRPC; 0 for none.")
    ] = 8081,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads per run; so many runs at once as there are cores.")
    ] = 1,
) -> None:
    """Serve networks by the Open Inference Protocol: REST (v1, v2), gRPC, metrics.

    The server is KServe's. SIGTERM ends it once the requests it has accepted are answered.

    **Examples**

    - `logshift serve model.stlq --name classifier`

    - `curl localhost:8080/v2/models/classifier`
    """
    from logshift.runtime.serving import serve as run

    names = name or [path.stem for path in packed]
    if len(names) != len(packed):
        raise InputError(f"{len(packed)} files and {len(names)} names; give --name for each file")
    if len(set(names)) != len(names):
        raise InputError(f"two networks have one name ({', '.join(names)}); give --name for each")
    run(
        dict(zip(names, packed, strict=True)),
        port=port,
        grpc_port=grpc_port or None,
        threads=threads,
    )
