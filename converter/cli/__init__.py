"""The command `logshift`: convert, look at, run, time and verify packed networks.

A module is a command. Heavy packages are imported by the commands that need them: `logshift info`
needs no onnx.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated

from logshift.kernels.errors import LogshiftError

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError:
    # This package is the command and nothing else: a sentence is all that anybody wants from it.
    sys.exit("error: the command line needs typer and rich: pip install 'logshift[cli]'")

from logshift.converter.cli import (
    bench,
    convert,
    demo,
    export,
    info,
    run,
    serve,
    verify,
    warmup,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors are one line on the error stream and exit code 1."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="logshift")
    except (LogshiftError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"logshift {importlib.metadata.version('logshift')}")
        raise typer.Exit


@app.callback()
def _logshift(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run power-of-two (STLQ) quantized CNNs fast on ordinary CPUs.

    `logshift demo` shows all of it in a minute. Then, with a network of your own:

    - `logshift convert model.onnx model.stlq --calibration pictures/`

    - `logshift run model.stlq photo.jpg`
    """


for _command in (
    convert.convert, info.info, run.run, bench.bench, verify.verify, export.export, demo.demo,
    warmup.warmup, serve.serve,
):  # fmt: skip
    app.command()(_command)
