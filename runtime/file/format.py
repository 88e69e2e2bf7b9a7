"""The packed file `.stlq`: the one place that reads, writes and validates it.

The container is safetensors; `docs/format.md` describes every byte. `manifest` knows the fields of
the manifest, `weights` the streams of words. `read` trusts nothing: whatever it returns has passed
every rule that a kernel relies on.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from logshift.kernels.activation import PIECES
from logshift.kernels.errors import FormatError
from logshift.runtime.executor import spread
from logshift.runtime.file import files, manifest, weights
from logshift.runtime.graph import Graph, Node
from logshift.runtime.operators import OPERATORS
from logshift.runtime.validate import validate

MANIFEST_KEY = "logshift"
CHECKSUM_KEY = "checksum"

_NO_COEFFICIENTS = "HardSwish"  # all other activation functions have some


# --- writing ------------------------------------------------------------------------------------


def write(graph: Graph, path: str | os.PathLike[str]) -> int:
    """Validate `graph` and write it to `path`, atomically.

    Parameters
    ----------
    graph : Graph
    path : path-like
        An existing file is replaced only once the new one is complete.

    Returns
    -------
    int
        Size of the file in bytes.

    Raises
    ------
    FormatError
        If the graph breaks a rule of the format.
    OSError
        If the file cannot be written.
    """
    data = serialize(graph)
    files.replace(path, data)
    return len(data)


def serialize(graph: Graph) -> bytes:
    """Return the bytes of the packed file; see `write`."""
    validate(graph)
    tensors: dict[str, np.ndarray] = {}
    content = manifest.of(graph)
    for index, (node, record) in enumerate(zip(graph.nodes, content["nodes"], strict=True)):
        for name, array in _node_tensors(node, record, graph.settings).items():
            tensors[f"{index}.{name}"] = array
    for index, array in enumerate(graph.constants.values()):
        tensors[f"constant.{index}"] = np.array(array, order="C")
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _container(tensors, {MANIFEST_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)})


def _node_tensors(
    node: Node, record: dict[str, Any], settings: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return the tensors of a node by their names; `record` gets what is to be said of weights."""
    tensors: dict[str, np.ndarray] = {}
    if node.weights is not None:
        streams = weights.pack(node.weights, _label(node), settings)
        record["weight"] = manifest.WORDS.write(streams)
        tensors |= streams.tensors
    elif node.float_weights is not None:
        record["weight"] = {"shape": list(node.float_weights.shape), "dtype": "float32"}
        tensors["weight"] = np.ascontiguousarray(node.float_weights, np.float32).ravel()
    if node.bias is not None:
        tensors["bias"] = np.ascontiguousarray(node.bias, np.float32)
    if node.table is not None:
        tensors["table"] = np.ascontiguousarray(node.table, np.uint8).ravel()
    if node.activation is not None and node.activation.op != _NO_COEFFICIENTS:
        tensors["coefficients"] = np.ascontiguousarray(node.activation.coefficients).ravel()
    return tensors


def _label(node: Node) -> str:
    return f"node {node.name!r} ({node.op})"


def _container(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file; the library alone would write metadata in random order."""
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _checksum(text: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


# --- reading ------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], *, threads: int = 1, keep_decoded: bool = False) -> Graph:
    """Read and validate a packed file.

    Parameters
    ----------
    path : path-like
    threads : int
        How many decode weights.
    keep_decoded : bool
        Keep the integers that weights are decoded to until they are asked for the first time, as a
        session does at once; otherwise they are decoded again.

    Returns
    -------
    Graph

    Raises
    ------
    FormatError
        If the file is damaged or breaks a rule; names the tensor or node and the rule.
    OSError
        If the file cannot be opened.
    """
    try:
        # Nobody but `deserialize` holds the bytes of the file: it lets go of them halfway.
        return deserialize(Path(path).read_bytes(), threads=threads, keep_decoded=keep_decoded)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error.__cause__


def deserialize(data: bytes, *, threads: int = 1, keep_decoded: bool = False) -> Graph:
    """Return the validated graph of the bytes of a packed file; see `read`."""
    try:
        tensors: dict[str, np.ndarray] = safetensors.numpy.load(data)
    except Exception as error:  # the parser's own errors, whatever their type
        raise FormatError(f"not a readable safetensors container ({error})") from error
    text, checksum = _metadata(data)
    del data
    if checksum != _checksum(text, tensors):
        raise FormatError("checksum does not match: the file is damaged")
    return _graph(manifest.parse(text), tensors, threads, keep_decoded)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest alone, without reading weights or verifying the checksum.

    Raises
    ------
    FormatError
        If there is no readable manifest of a known version.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > os.fstat(file.fileno()).st_size:
            raise FormatError(f"{os.fspath(path)}: not a readable safetensors container")
        data = start + file.read(size)
    try:
        return manifest.parse(_metadata(data)[0])
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error.__cause__


def _metadata(data: bytes) -> tuple[str, str]:
    """Manifest text and checksum out of the safetensors header."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        text, checksum = metadata[MANIFEST_KEY], metadata[CHECKSUM_KEY]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"no {MANIFEST_KEY!r} manifest and checksum in the header: not a .stlq file"
        ) from error
    if not (isinstance(text, str) and isinstance(checksum, str)):
        raise FormatError("the manifest must be a JSON string")
    return text, checksum


class _Tensors:
    """The tensors of a file, each of which somebody has to take."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors
        self._left = set(tensors)

    def take(self, key: str) -> np.ndarray:
        if key not in self._tensors:
            raise FormatError(f"tensor {key!r} is missing")
        self._left.discard(key)
        return self._tensors[key]

    def vector(self, key: str, dtype: type, size: int | None = None) -> np.ndarray:
        """Take a tensor of one dimension."""
        array = self.take(key)
        if array.dtype != dtype or array.ndim != 1 or (size and array.size != size):
            raise FormatError(
                f"tensor {key!r} is {array.dtype} of shape {array.shape}, expected"
                f" {np.dtype(dtype)} of shape {'(bytes,)' if size is None else (size,)}"
            )
        return array

    def check_end(self) -> None:
        """Refuse what nobody took."""
        if self._left:
            raise FormatError(f"tensor {min(self._left)!r} belongs to no node")


def _graph(
    content: dict[str, Any], arrays: dict[str, np.ndarray], threads: int, keep_decoded: bool
) -> Graph:
    fields, tensors = manifest.GRAPH.read(content, "manifest"), _Tensors(arrays)
    fields["nodes"] = _nodes(fields["nodes"], tensors, threads, keep_decoded)
    constants: dict[str, np.ndarray] = {}
    for index, name in enumerate(fields["constants"]):
        array = tensors.take(f"constant.{index}")
        if name in constants:
            raise FormatError(f"constant {name!r} is given twice")
        constants[name] = array
    tensors.check_end()
    fields["constants"] = constants
    graph = Graph(**fields)
    validate(graph)
    return graph


def _nodes(records: list[Any], tensors: _Tensors, threads: int, keep_decoded: bool) -> list[Node]:
    unpacked: list[tuple[Node, weights.Streams | None]] = []
    try:
        for index, record in enumerate(records):
            unpacked.append(_node(index, record, tensors))
    finally:  # of several faults the first node's is the one to tell
        stored = [(node, streams) for node, streams in unpacked if streams is not None]
        decoded = spread(lambda pair: weights.StoredWeights(pair[1], keep_decoded), stored, threads)
        for (node, _), words in zip(stored, decoded, strict=True):
            node.weights = words
    return [node for node, _ in unpacked]


def _node(index: int, record: Any, tensors: _Tensors) -> tuple[Node, weights.Streams | None]:
    """Return a node without its quantized weights, and those."""
    node = Node(**manifest.NODE.read(record, f"node {index}"))
    streams, where = None, _label(node)
    stores = OPERATORS[node.op].stores if not node.domain and node.op in OPERATORS else ""
    if stores == "weights":
        record = manifest.WEIGHT.read(record, where)["weight"]
        form = manifest.FLOATS if "dtype" in record else manifest.WORDS
        found = form.read(record, where)
        shape = found["shape"]
        # Python integers: no product of claimed sizes can overflow before it is judged.
        count = shape[0] * shape[1] * shape[2] * shape[3]
        if count > manifest.MAX_WEIGHTS:
            raise FormatError(f"{where}: {count} weights are more than a layer can have")
        node.bias = tensors.vector(f"{index}.bias", np.float32, shape[0])
        if form is manifest.FLOATS:
            values = tensors.vector(f"{index}.weight", np.float32, count)
            node.float_weights = values.reshape(shape)
        else:
            parts = {
                name: tensors.vector(f"{index}.{name}", np.uint8)
                for name in ("first", *manifest.POSITIONS[found["positions"]])
            }
            parts["alpha"] = tensors.vector(f"{index}.alpha", np.float32)
            streams = weights.Streams(where, parts, **found)
    elif stores == "table":
        table = tensors.vector(f"{index}.table", np.uint8)
        if table.size == 0 or table.size % 256:
            raise FormatError(f"{where}: the table has {table.size} bytes, expected 256 for each")
        node.table = table if table.size == 256 else table.reshape(-1, 256)
    if node.activation is not None and node.activation.op != _NO_COEFFICIENTS:
        if node.activation.op == "Piecewise":
            coefficients = tensors.vector(f"{index}.coefficients", np.int16, 3 * PIECES)
            coefficients = coefficients.reshape(3, PIECES)
        else:
            coefficients = tensors.vector(f"{index}.coefficients", np.float32)
        node.activation = replace(node.activation, coefficients=coefficients)
    return node, streams
