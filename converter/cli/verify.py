"""The command `logshift verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    as_json: Json = False,
) -> None:
    """Compare a packed network with its ONNX model, tensor by tensor.

    Shows where precision is lost: the signal-to-noise ratio and cosine of every tensor that both
    networks have, and how often the best class is the same.

    **Examples**

    - `logshift verify model.onnx model.stlq pictures/`

    - `logshift verify model.onnx model.stlq inputs.npy --json`
    """
    from logshift.converter.verify import verify

    session = load(packed)
    verification = verify(model, session, _batches(expanded(inputs), session))
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
