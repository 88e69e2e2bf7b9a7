"""What a packed file holds, told from its header and the counts of second words alone."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from logshift.kernels.errors import FormatError
from logshift.runtime.file import format
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
    manifest = format.read_manifest(path)
    try:
        sizes = layer_bytes(path)
        with safetensors.safe_open(path, framework="np") as tensors:
            nodes = [
                _describe_node(index, node, manifest["tensors"], sizes[index], tensors)
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
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, zlib.error,
            safetensors.SafetensorError) as error:  # fmt: skip
        raise FormatError(f"{path}: the file is damaged ({error})") from error


def _value(record: dict[str, Any]) -> dict[str, Any]:
    dtype = record.get("dtype", "float32")
    return {"name": record["name"], "shape": list(record["shape"]), "dtype": dtype}


def _describe_node(
    index: int, node: dict[str, Any], codes: dict[str, Any], size: int, tensors: Any
) -> dict[str, Any]:
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
            result["nzr"] = _second_words(index, weight, count, tensors) / count
    return result


def _second_words(index: int, weight: dict[str, Any], count: int, tensors: Any) -> int:
    """Count the second words of a layer by its tile counts or bitmap."""
    if weight["positions"] == "none":
        return 0
    name = "count" if weight["positions"] == "list" else "position"
    raw = tensors.get_tensor(f"{index}.{name}").tobytes()
    if name in weight["zlib"]:
        raw = zlib.decompressobj().decompress(raw, 2 * count)
    if name == "count":
        return int(np.frombuffer(raw, "<u2").sum(dtype=np.int64))
    return int(np.unpackbits(np.frombuffer(raw, np.uint8)).sum(dtype=np.int64))


def layer_bytes(path: Path) -> Counter[int]:
    """Return the bytes of each node's tensors in a packed file, by the node's index.

    Tensors are named `<index of the node>.<what>`; see `docs/format.md`.
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes: Counter[int] = Counter()
    for name, tensor in header.items():
        owner = name.split(".")[0]
        if owner.isdecimal():
            begin, end = tensor["data_offsets"]
            sizes[int(owner)] += end - begin
    return sizes
