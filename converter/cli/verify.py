"""The command `logshift verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logshift.converter.cli.shared import (
    Inputs,
    Json,
    Onnx,
    Packed,
    expanded,
    load,
    load_array,
    picture,
    show,
)

if TYPE_CHECKING:
    from logshift.runtime import Session


def verify(
    model: Onnx,
    packed: Packed,
    inputs: Inputs,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE.html",
            help="Write a page about what each layer adds, ranges, times and pictures.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a packed network with its ONNX model, tensor by tensor.

    Shows where precision is lost: the signal-to-noise ratio and cosine of every tensor that both
    networks have, how often the best class is the same, and the verdict of `logshift convert`.

    **Examples**

    - `logshift verify model.onnx model.stlq pictures/`

    - `logshift verify model.onnx model.stlq inputs.npy --json`

    - `logshift verify model.onnx model.stlq pictures/ --html page.html`
    """
    from logshift.converter.verify import verify

    session = load(packed)
    network = session if html is None else packed
    verification = verify(model, network, _batches(expanded(inputs), session), html=html)
    show(verification.to_dict(), str(verification), as_json)


def _batches(paths: list[Path], session: Session) -> Iterator[Any]:
    dim = session.inputs[0].shape[0]
    size = dim if isinstance(dim, int) else 1
    for path in paths:
        if path.suffix == ".npy":
            array = load_array(path)
            yield from (array[i : i + size] for i in range(0, len(array), size))
        else:
            yield picture(path)
