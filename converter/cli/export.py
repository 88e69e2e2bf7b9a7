"""The command `logshift export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logshift.converter.cli.shared import Json, Packed, show


def export(
    packed: Packed,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="MODEL.onnx", help="The ONNX model to write."),
    ],
    as_json: Json = False,
) -> None:
    """Write a packed network as standard ONNX, for any other engine to run and check.

    Activations are rounded by QuantizeLinear and DequantizeLinear, weights are float32 of exactly
    their values; converting the model again gives the same network.

    **Examples**

    - `logshift export model.stlq -o model.onnx`

    - `logshift verify model.onnx model.stlq pictures/`
    """
    from logshift.converter.export import export

    export(packed, output)
    size = output.stat().st_size
    show(
        {"file": str(output), "bytes": size},
        f"{output}: {size:,} bytes, {size / packed.stat().st_size:.1f} times larger than packed",
        as_json,
    )
