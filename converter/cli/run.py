"""The command `logshift run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from logshift.converter.cli.shared import (
    AUTO,
    Inputs,
    Json,
    KernelFamily,
    Packed,
    Threads,
    expanded,
    load,
    load_array,
    picture,
    show,
)
from logshift.kernels.errors import InputError

_TOP = 5


def run(
    packed: Packed,
    inputs: Inputs,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the outputs of all inputs: .npy, or .npz."),
    ] = None,
    threads: Threads = None,
    kernels: KernelFamily = AUTO,
    as_json: Json = False,
) -> None:
    """Run a network on pictures and print the five best classes, or write its outputs.

    Scores are the network's outputs as they are. Pictures need a file that holds preprocessing.

    **Examples**

    - `logshift run model.stlq cat.jpg dog.jpg`

    - `logshift run model.stlq batch.npy --output logits.npy`
    """
    session = load(packed, threads=threads, kernels=kernels.value)
    labels, records, collected = session.labels or [], [], []
    for path in expanded(inputs):
        result = session.run(load_array(path) if path.suffix == ".npy" else picture(path))
        outputs = result if isinstance(result, dict) else {session.outputs[0].name: result}
        collected.append(outputs)
        first = outputs[session.outputs[0].name]
        for i, scores in enumerate(first):
            name = str(path) if len(first) == 1 else f"{path}[{i}]"
            records.append({"input": name} | best(scores, labels))
    if output is not None:
        _write(output, collected)
    text = "\n".join(f"{record['input']}: {_best_text(record)}" for record in records)
    show(records, text, as_json)


def best(scores: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return the best classes of an output, or just its shape if it holds no scores."""
    if scores.ndim != 1:
        return {"shape": list(scores.shape)}
    order = np.argsort(-scores, kind="stable")[:_TOP]
    return {
        "top": [
            {
                "class": int(k),
                "label": labels[k] if k < len(labels) else None,
                "score": float(scores[k]),
            }
            for k in order
        ]
    }


def _best_text(record: dict[str, Any]) -> str:
    if "top" not in record:
        return f"output of shape {tuple(record['shape'])}; --output writes it"
    return ", ".join(
        f"{'class ' + str(c['class']) if c['label'] is None else c['label']} {c['score']:.2f}"
        for c in record["top"]
    )


def _write(path: Path, collected: list[dict[str, np.ndarray]]) -> None:
    try:
        arrays = {name: np.concatenate([o[name] for o in collected]) for name in collected[0]}
    except ValueError:
        raise InputError(
            "the inputs give outputs of different sizes; write one at a time"
        ) from None
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]  # its stub mistakes them for options
    elif path.suffix == ".npy" and len(arrays) == 1:
        np.save(path, next(iter(arrays.values())))
    else:
        raise InputError(f"--output {path}: give a .npz file, or .npy for a single output")
