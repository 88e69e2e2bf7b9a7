"""The command `logshift export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from logshift.converter.cli.shared import Json, Packed, choice, show
from logshift.kernels.errors import InputError

Format: Any = choice("Format", ("onnx", "c"))
Layout: Any = choice("Layout", ("fast", "small"))
_ONNX, _FAST = Format("onnx"), Layout("fast")
_Format = Annotated[Format, typer.Option(help="What to write.")]
_Layout = Annotated[
    Layout, typer.Option(help="C: weights as lists of what to add, or as in the file.")
]


def export(
    packed: Packed,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The ONNX model to write; with --format c, the directory of the C files.",
        ),
    ],
    format: _Format = _ONNX,
    name: Annotated[
        str | None,
        typer.Option(
            help="C: what files and functions are called.", show_default="the packed file's name"
        ),
    ] = None,
    layout: _Layout = _FAST,
    multiply: Annotated[
        bool, typer.Option("--multiply", help="C: products, for cores with a multiplier.")
    ] = False,
    codes: Annotated[
        bool, typer.Option("--codes", help="C: inputs and outputs are uint8 codes.")
    ] = False,
    main: Annotated[
        bool, typer.Option("--main", help="C: also a program, from stdin to stdout.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a packed network as standard ONNX, or as C for microcontrollers.

    ONNX is for any other engine to run and check: activations are rounded by QuantizeLinear and
    DequantizeLinear, weights are float32 of exactly their values; converting the model again gives
    the same network. C is C99 of shifts and additions that computes the bits of `logshift run`.

    **Examples**

    - `logshift export model.stlq -o model.onnx`

    - `logshift export model.stlq -o firmware/ --format c --codes`
    """
    if format.value == "c":
        from logshift.runtime.c_source import export_c

        made = export_c(
            packed,
            output,
            name=name,
            layout=layout.value,
            multiply=multiply,
            codes=codes,
            main=main,
        )
        files = [str(file) for file in made.files]
        show(
            {"files": files, "arena_bytes": made.arena_bytes},
            f"{', '.join(files)}: {made.name}_run, {made.arena_bytes:,} bytes of RAM for tensors",
            as_json,
        )
        return
    given = {"--name": name is not None, "--layout": layout is not _FAST, "--multiply": multiply,
             "--codes": codes, "--main": main}  # fmt: skip
    if any(given.values()):
        wrong = ", ".join(option for option, is_given in given.items() if is_given)
        raise InputError(f"{wrong}: only with --format c")
    from logshift.converter.export import export

    export(packed, output)
    size = output.stat().st_size
    show(
        {"file": str(output), "bytes": size},
        f"{output}: {size:,} bytes, {size / packed.stat().st_size:.1f} times larger than packed",
        as_json,
    )
