"""The command `logshift demo`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from logshift.converter.bench import in_turns, onnx_engine, spread
from logshift.converter.cli.run import best
from logshift.converter.cli.shared import Json, load, show

DEMO = Path(__file__).parents[1] / "demo"


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.stlq", help="Keep the 4-bit network.", show_default="not kept"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run small networks that come with logshift on photographs.

    ResNet-20 for the ten classes of CIFAR-10, trained with weights of 4 and of 3 bits, and in
    onnxruntime the float32 network that their training began with. The first run compiles the
    kernels, which takes a while; later ones start fast.

    **Examples**

    - `logshift demo`

    - `logshift demo --out demo.stlq`
    """
    from PIL import Image

    from logshift.runtime import Preprocessing
    from logshift.runtime.file.describe import describe

    paths = sorted((DEMO / "pictures").glob("*.jpg"))
    pictures = [Image.open(path) for path in paths]
    x = np.stack([Preprocessing().apply(picture, (32, 32)) for picture in pictures])
    networks: list[dict[str, Any]] = []
    engines: list[Callable[[], Any]] = []
    for bits in (4, 3):
        packed = DEMO / f"resnet20-cifar10-w{bits}.stlq"
        session = load(packed)
        about = describe(packed)
        labels, threads = session.labels or [], session.threads
        networks.append(
            {"network": f"{bits} bits", "scores": session.run(pictures)}
            | {key: about[key] for key in ("bytes", "bits_per_weight", "nzr")}
        )
        engines.append(partial(session.run, x[:1]))
    model = DEMO / "resnet20-cifar10.onnx"
    (name,) = (value.name for value in session.inputs)
    networks.append(
        {"network": "float32", "scores": onnx_engine(model, {name: x}, threads)()[0]}
        | {"bytes": model.stat().st_size, "bits_per_weight": 32.0, "nzr": None}
    )
    engines.append(onnx_engine(model, {name: x[:1]}, threads))
    for network, times in zip(networks, in_turns(engines, 1.5), strict=True):
        scores = network.pop("scores")
        network["pictures"] = [
            {"picture": path.name, "truth": path.stem, **best(row, labels)["top"][0]}
            for path, row in zip(paths, scores, strict=True)
        ]
        network["right"] = sum(p["truth"] == p["label"] for p in network["pictures"])
        network["seconds"] = spread(times)
    if out is not None:
        shutil.copy(DEMO / "resnet20-cifar10-w4.stlq", out)
    result = {
        "networks": networks, "threads": threads, "file": None if out is None else str(out)
    }  # fmt: skip
    show(result, _demo_text(result), as_json)


def _demo_text(result: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    networks = result["networks"]
    largest = max(n["bytes"] for n in networks)
    rows = [("", *(n["network"] for n in networks))]
    for answers in zip(*(n["pictures"] for n in networks), strict=True):
        cells = (f"{a['label']} {a['score']:.2f}" for a in answers)
        rows.append((answers[0]["picture"], *cells))
    count = len(networks[0]["pictures"])
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("right", lambda n: f"{n['right']} of {count}"),
        ("bytes", lambda n: f"{n['bytes']:,}"),
        ("times smaller", lambda n: f"{largest / n['bytes']:.1f}"),
        ("bits per weight", lambda n: f"{n['bits_per_weight']:.2f}"),
        ("NZR", lambda n: "" if n["nzr"] is None else f"{100 * n['nzr']:.1f} %"),
        ("ms a picture", lambda n: f"{1e3 * n['seconds']['median']:.2f}"),
    ]
    rows += [(name, *map(cell, networks)) for name, cell in lines]
    text = text_table(rows, left=1)
    text += f"\n{result['threads']} threads; float32 runs in onnxruntime"
    if result["file"]:
        text += f"\npacked file: {result['file']}"
    return text
