"""What a packed file holds, told from its header and what counts second words alone."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from logshift.kernels.errors import FormatError
from logshift.kernels.stlq import bitpack
from logshift.kernels.stlq.tiling import Tiling
from logshift.runtime.file import format
from logshift.runtime.file.manifest import TILES
from logshift.runtime.onnx_ops import compiled
from logshift.runtime.session import numpy_name


def describe(path: Path) -> dict[str, Any]:
    """Return everything that `logshift info` shows, as JSON types.

    Raises
    ------
    FormatError
        If the file is damaged where it is looked at; the rest is validated on loading.
    OSError
        If it cannot be read.
    """
    layout = format.read_layout(path)
    manifest = layout.manifest
    try:
        sizes = _layer_bytes(layout)
        nodes = [
            _describe_node(index, node, sizes[index], layout)
            for index, node in enumerate(manifest["nodes"])
        ]
        layers = [node for node in nodes if "bits" in node]
        weights = sum(node["weights"] for node in layers)
        return {
            "file": str(path),
            "bytes": path.stat().st_size,
            "format_version": manifest["format_version"],
            "producer": manifest.get("producer", ""),
            "inputs": [_value(v) for v in manifest["inputs"]],
            "outputs": [_value(v) for v in manifest["outputs"]],
            "preprocessing": manifest.get("preprocessing"),
            "labels": manifest.get("labels"),
            "settings": dict(manifest["settings"]),
            "nodes": nodes,
            "weights": weights,
            "bits_per_weight": 8 * sum(node["bytes"] for node in layers) / max(weights, 1),
            "nzr": sum(node["nzr"] * node["weights"] for node in layers) / max(weights, 1),
        }
    # What is not validated here is validated on loading, which also names the rule.
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        zlib.error,
    ) as error:
        raise FormatError(f"{path}: the file is damaged ({error})") from error


def _value(record: dict[str, Any]) -> dict[str, Any]:
    dtype = record.get("dtype", "float32")
    return {"name": record["name"], "shape": list(record["shape"]), "dtype": dtype}


def _describe_node(
    index: int, node: dict[str, Any], size: int, layout: format.Layout
) -> dict[str, Any]:
    codes = layout.manifest["tensors"]
    runs = "float32" if codes.keys().isdisjoint(node["inputs"] + node["outputs"]) else "codes"
    if node.get("domain"):
        # For some it depends on types and sizes, which are not inferred here.
        runs = "float32 or numpy" if node["op"] in compiled.OPERATORS else numpy_name(node["op"])
    result = {"name": node["name"], "op": node["op"], "runs": runs, "bytes": size}
    if "activation" in node:
        result["activation"] = node["activation"]["op"]
    if "weight" in node:
        weight = node["weight"]
        count = math.prod(weight["shape"])
        result |= {"weight_shape": weight["shape"], "weights": count}
        if "bits" in weight:
            result["bits"] = weight["bits"]
            result["nzr"] = _second_words(index, weight, count, layout) / count
        if weight.get("positions") == TILES:
            group = node.get("attributes", {}).get("group", 1)
            tiling = Tiling(tuple(weight["shape"]), tuple(weight["tile"]), group)
            chosen = _bits_set(index, weight, tiling.count, layout)
            result |= {"tile": weight["tile"], "tiles": chosen / tiling.count}
    return result


def _second_words(index: int, weight: dict[str, Any], count: int, layout: format.Layout) -> int:
    """Count the second words of a layer by its tile counts or bitmap, else one by one."""
    if weight["positions"] == "none":
        return 0
    if weight["positions"] == "bitmap":
        return _bits_set(index, weight, count, layout)
    if weight["positions"] == "list":
        raw = _stream(f"{index}.count", weight, 2 * count, layout)
        return int(raw.view("<u2").sum(dtype=np.int64))
    bits = weight["bits"]
    raw = _stream(f"{index}.second", weight, bitpack.packed_size(count, bits), layout)
    chosen = 8 * raw.size // bits
    return int(np.count_nonzero(bitpack.unpack(raw, bits, chosen)))


def _bits_set(index: int, weight: dict[str, Any], count: int, layout: format.Layout) -> int:
    raw = _stream(f"{index}.position", weight, bitpack.packed_size(count, 1), layout)
    return int(np.unpackbits(raw).sum(dtype=np.int64))


def _stream(name: str, weight: dict[str, Any], most: int, layout: format.Layout) -> np.ndarray:
    """Return the bytes of a stream."""
    raw = layout.read(name)
    if name.rpartition(".")[2] in weight["zlib"]:
        raw = zlib.decompressobj().decompress(raw, most)
    return np.frombuffer(raw, np.uint8)


def layer_bytes(path: Path) -> Counter[int]:
    """Return the bytes of each node's tensors in a packed file, by the node's index.

    Tensors are named `<index of the node>.<what>`; see `docs/format.md`. What several nodes have is
    counted for the first, also constants of words.
    """
    return _layer_bytes(format.read_layout(path))


def _layer_bytes(layout: format.Layout) -> Counter[int]:
    manifest = layout.manifest
    readers = {
        n: i for i, node in reversed([*enumerate(manifest["nodes"])]) for n in node["inputs"]
    }
    words = manifest.get("constant_words", {})
    constants = {
        f"constant.{i}": readers[name]
        for i, name in enumerate(manifest.get("constants", ()))
        if name in words and name in readers
    }
    owners: dict[tuple[int, int], int] = {}
    for name, place in layout.places.items():
        key = name.rpartition(".")[0]
        owner = int(key) if key.isdecimal() else constants.get(key)
        if owner is not None:
            owners[place] = min(owner, owners.get(place, owner))
    sizes: Counter[int] = Counter()
    for (begin, end), owner in owners.items():
        sizes[owner] += end - begin
    return sizes
