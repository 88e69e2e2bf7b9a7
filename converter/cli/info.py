"""The command `logshift info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from logshift.converter.cli.shared import Json, Packed, load, show
from logshift.kernels.errors import InputError

if TYPE_CHECKING:
    from logshift.runtime.graph import Graph


def info(
    packed: Packed,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Load the file and show the kernel chosen for each layer."),
    ] = False,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost", help="Load the file and count shifts and adds, bits moved and cycles."
        ),
    ] = False,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="PxQ",
            help="Output and input channels (convert's --tile has the inputs first), at one kernel"
            " position, that the array of --cost multiplies per cycle. By default the tiles by"
            " which the file has its second words, else 16x16.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a packed file holds, without loading its weights.

    **Examples**

    - `logshift info model.stlq`

    - `logshift info model.stlq --json | jq .bits_per_weight`

    - `logshift info model.stlq --cost --tile 8x32`
    """
    if kernels and cost:
        raise InputError("--kernels and --cost are different tables: give one of them")
    if kernels:
        session = load(packed)
        summary = session.summary()
        show(summary.to_dict(), str(summary), as_json)
        return
    if cost:
        from logshift.runtime.cost import cost as count
        from logshift.runtime.file import format

        graph = format.read(packed)
        counted = count(graph, _tile_of(graph) if tile is None else _tile(tile))
        show(counted.to_dict(), str(counted), as_json)
        return
    from logshift.runtime.file.describe import describe

    record = describe(packed)
    show(record, _description(record), as_json)


def _tile(text: str) -> tuple[int, int]:
    try:
        outputs, inputs = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--tile {text!r}: give output and input channels like 16x16") from None
    return outputs, inputs


def _tile_of(graph: Graph) -> tuple[int, int]:
    """Return output and input channels of the tiles of a file, if all have the same."""
    weights = [node.weights for node in graph.nodes if node.weights is not None]
    tiles = {words.tile for words in weights if words.tile is not None}
    if len(tiles) != 1:
        return 16, 16
    ((inputs, outputs),) = tiles
    return outputs, inputs


def _description(record: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    def value(record: dict[str, Any]) -> str:
        dtype = "" if record["dtype"] == "float32" else f"{record['dtype']} "
        return f"{record['name']} {dtype}({', '.join(map(str, record['shape']))})"

    def values(key: str) -> str:
        return ", ".join(map(value, record[key]))

    def pairs(record: dict[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in record.items() if v is not None)

    by = f", by {record['producer']}" if record["producer"] else ""
    version = f"format version {record['format_version']}{by}"
    lines = [
        f"{record['file']}: {record['bytes']:,} bytes, {version}",
        f"inputs: {values('inputs')}",
        f"outputs: {values('outputs')}",
    ]
    if record["preprocessing"]:
        lines.append(f"preprocessing: {pairs(record['preprocessing'])}")
    if labels := record["labels"]:
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        lines.append(f"labels: {len(labels)}: {shown}")
    if record["settings"]:
        lines.append(f"settings: {pairs(record['settings'])}")
    rows: list[tuple[str, ...]] = [
        ("node", "op", "runs", "weights", "bits", "NZR %", "tiles %", "bytes")
    ]
    for node in record["nodes"]:
        rows.append(
            (
                node["name"],
                f"{node['op']}, {node['activation']}" if "activation" in node else node["op"],
                node["runs"],
                "x".join(map(str, node.get("weight_shape", ()))),
                str(node.get("bits", "")),
                f"{100 * node['nzr']:.1f}" if "nzr" in node else "",
                f"{100 * node['tiles']:.1f}" if "tiles" in node else "",
                f"{node['bytes']:,}" if node["bytes"] else "",
            )
        )
    if any("tiles" in node for node in record["nodes"]):
        tiles = {"x".join(map(str, node["tile"])) for node in record["nodes"] if "tile" in node}
        lines.append(f"second words by tiles of an array: {', '.join(sorted(tiles))}")
    else:
        rows = [(*row[:6], *row[7:]) for row in rows]
    lines += ["", text_table(rows, left=4), ""]
    lines.append(
        f"{record['weights']:,} weights, {record['bits_per_weight']:.2f} bits per weight,"
        f" NZR {100 * record['nzr']:.1f} %"
    )
    return "\n".join(lines)
