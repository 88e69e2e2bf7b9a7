"""The command `logshift bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from logshift.converter.bench import in_turns, onnx_engine, random_inputs, spread
from logshift.converter.cli.shared import AUTO, Json, KernelFamily, Packed, load, show


def bench(
    packed: Packed,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.onnx", help="Time onnxruntime on this float32 model in turns with it."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per run.")] = 1,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Threads per run; may be repeated.", show_default="1 and 2"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time to spend on each number of threads.")
    ] = 3.0,
    kernels: KernelFamily = AUTO,
    layers: Annotated[bool, typer.Option("--layers", help="Show the time of every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the latency of a packed network.

    Blocks of runs, in turns A B A B if there is something to compare with: only ratios from one
    command mean anything. Medians, and in brackets the 10th to 90th percentile of the blocks.

    **Examples**

    - `logshift bench model.stlq`

    - `logshift bench model.stlq --against model.onnx --threads 1`
    """
    records = []
    for count in threads or [1, 2]:
        session = load(packed, threads=count, kernels=kernels.value)
        x = random_inputs(session, batch)
        engines: dict[str, Callable[[], Any]] = {"logshift": partial(session.run, x)}
        if against is not None:
            engines["onnxruntime"] = onnx_engine(against, x, count)
        times = in_turns(list(engines.values()), seconds)
        record: dict[str, Any] = {"threads": count, "batch": batch}
        record |= {name: spread(t) for name, t in zip(engines, times, strict=True)}
        if against is not None:
            record["ratio"] = spread(times[1] / times[0])
        if layers:
            record["layers"] = [asdict(t) for t in session.profile(x)]
        records.append(record)
    show(records, "\n".join(_bench_text(record) for record in records), as_json)


def _bench_text(record: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    def scaled(s: dict[str, float], factor: float) -> str:
        return f"{factor * s['median']:.3f} [{factor * s['p10']:.3f}-{factor * s['p90']:.3f}]"

    text = f"threads {record['threads']}, batch {record['batch']}:"
    text += f" {scaled(record['logshift'], 1e3)} ms"
    if "ratio" in record:
        text += f"; onnxruntime float32 {scaled(record['onnxruntime'], 1e3)} ms,"
        text += f" {scaled(record['ratio'], 1)} times as long"
    if "layers" in record:
        rows = [("node", "op", "kernel", "ms", "GMAC/s")]
        for t in record["layers"]:
            rate = f"{t['macs'] / t['seconds'] / 1e9:.1f}" if t["macs"] else ""
            rows.append((t["name"], t["op"], t["kernel"], f"{1e3 * t['seconds']:.3f}", rate))
        text += "\n" + text_table(rows, left=3) + "\n"
    return text
