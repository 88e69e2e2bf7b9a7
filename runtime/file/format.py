"""The packed file `.stlq`: the one place that reads, writes and validates it.

The container is safetensors; `docs/format.md` describes every byte. `manifest` knows the fields of
the manifest, `weights` the streams of words, `bundle` how tensors lie together in one. `read`
trusts nothing: whatever it returns has passed every rule that a kernel relies on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from logshift.kernels.activation import PIECES
from logshift.kernels.errors import FormatError
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.executor import spread
from logshift.runtime.file import bundle, files, manifest, weights
from logshift.runtime.graph import ConstantWords, Graph, Node, Shape
from logshift.runtime.operators import OPERATORS
from logshift.runtime.validate import check_words, validate

MANIFEST_KEY = "logshift"
CHECKSUM_KEY = "checksum"

_NO_COEFFICIENTS = "HardSwish"  # all other activation functions have some

# What all tensors in one must save, or older readers are worth more: bytes, share of the file.
_LEAST_SAVED, _LEAST_SHARE = 4096, 1 / 16


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
    """Return the bytes of the packed file; see `write`.

    The version is the lowest that knows all that there is, unless the file is notably smaller in
    the form of version 4.
    """
    validate(graph)
    content, tensors = _parts(graph)
    if content["format_version"] >= manifest.BUNDLED:
        return _bundled(content, tensors)
    plain = _signed(_text(content), tensors)
    smaller = _bundled(content, tensors)
    saved = len(plain) - len(smaller)
    return smaller if saved >= max(_LEAST_SAVED, _LEAST_SHARE * len(plain)) else plain


def _parts(graph: Graph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest and the tensors of a graph by their names."""
    content = manifest.of(graph)
    packed: dict[tuple[int, int], weights.Streams] = {}  # of weights that several nodes have

    def pack(words: LogWeights, where: str, group: int = 1) -> weights.Streams:
        key = id(words), group
        if key not in packed:
            packed[key] = weights.pack(words, where, graph.settings, group)
        return packed[key]

    tensors: dict[str, np.ndarray] = {}
    for index, (node, record) in enumerate(zip(graph.nodes, content["nodes"], strict=True)):
        for name, array in _node_tensors(node, record, pack).items():
            tensors[f"{index}.{name}"] = array
    for index, (name, array) in enumerate(graph.constants.items()):
        if name in graph.constant_words:
            words = graph.constant_words[name]
            streams = pack(words.weights, f"constant {name!r}")
            content["constant_words"][name] = {
                "shape": list(words.shape),
                "axes": list(words.axes),
                "weight": manifest.WORDS.write(streams),
            }
            tensors |= {f"constant.{index}.{key}": part for key, part in streams.tensors.items()}
        else:
            tensors[f"constant.{index}"] = np.array(array, order="C")
    if any(streams.positions == manifest.TILES for streams in packed.values()):
        content["format_version"] = manifest.TILED
    return content, tensors


def _node_tensors(
    node: Node, record: dict[str, Any], pack: Callable[[LogWeights, str, int], weights.Streams]
) -> dict[str, np.ndarray]:
    """Return the tensors of a node by their names; `record` gets what is to be said of weights."""
    tensors: dict[str, np.ndarray] = {}
    if node.weights is not None:
        streams = pack(node.weights, _label(node), node.attributes["group"])
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


def _bundled(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """Return a file whose tensors are all in one."""
    index, data = bundle.bundle(tensors)
    version = {"format_version": max(content["format_version"], manifest.BUNDLED)}
    sizes, packed = bundle.pack(_text(content | version | {bundle.INDEX_KEY: index}), data)
    return _signed(_text(version | sizes), packed)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _signed(text: str, tensors: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file; the library alone would write metadata in random order."""
    metadata = {MANIFEST_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)}
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    written = _text(header).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + data[end:]


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
    content = manifest.parse(text)
    if content["format_version"] >= manifest.BUNDLED:
        if tensors.keys() != {bundle.MANIFEST, bundle.DATA}:
            raise FormatError(
                f"tensors are {sorted(tensors)}: version {content['format_version']} has"
                " 'manifest' and 'data'"
            )
        both = _Tensors(tensors)
        stored = both.vector(bundle.DATA, np.uint8)
        outer, content = content, _inner(content, both.vector(bundle.MANIFEST, np.uint8).tobytes())
        arrays = bundle.unpack_data(stored, outer)
        tensors = bundle.unbundle(content.get(bundle.INDEX_KEY), arrays)
    return _graph(content, tensors, threads, keep_decoded)


def _inner(outer: dict[str, Any], stored: bytes) -> dict[str, Any]:
    """Return the manifest of a bundled file, of what its metadata say and its tensor."""
    content = manifest.parse(bundle.unpack_manifest(stored, outer))
    if content["format_version"] != outer["format_version"]:
        raise FormatError("the manifest has another format_version than the metadata")
    return content


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest alone, without reading weights or verifying the checksum.

    Raises
    ------
    FormatError
        If there is no readable manifest of a known version.
    """
    return read_layout(path).manifest


@dataclass(frozen=True)
class Layout:
    """What a file says of its tensors, without their values.

    Attributes
    ----------
    path : path-like
    manifest : dict
        As it is, no field checked.
    places : dict of tensor name to (first byte, byte behind it)
        Of the file, or of its data if these are deflated.
    outer : dict
        What the metadata say; of a bundled file.
    stored : (first byte, byte behind it)
        Of the file: the data of a bundled one.
    """

    path: str | os.PathLike[str]
    manifest: dict[str, Any]
    places: dict[str, tuple[int, int]]
    outer: dict[str, Any]
    stored: tuple[int, int] = (0, 0)

    def read(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        begin, end = self.places[name]
        if bundle.DATA_SIZE in self.outer:
            return self._data[begin:end].tobytes()
        return self._bytes(begin, end)

    @cached_property
    def _data(self) -> np.ndarray:
        stored = np.frombuffer(self._bytes(*self.stored), np.uint8)
        return bundle.unpack_data(stored, self.outer)

    def _bytes(self, begin: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """Return the manifest, and where each tensor lies.

    Raises
    ------
    FormatError
        If there is no readable manifest of a known version.
    """
    try:
        with open(path, "rb") as file:
            return _layout(path, file)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error.__cause__


def _layout(path: str | os.PathLike[str], file: BinaryIO) -> Layout:
    start = file.read(8)
    end = 8 + int.from_bytes(start, "little")
    if len(start) < 8 or end > 8 + os.fstat(file.fileno()).st_size:
        raise FormatError("not a readable safetensors container")
    data = start + file.read(end - 8)
    outer = manifest.parse(_metadata(data)[0])
    try:
        header = json.loads(data[8:])
        places = {
            name: (end + record["data_offsets"][0], end + record["data_offsets"][1])
            for name, record in header.items()
            if name != "__metadata__"
        }
        if outer["format_version"] < manifest.BUNDLED:
            return Layout(path, outer, places, outer)
        (begin, behind), stored = places[bundle.MANIFEST], places[bundle.DATA]
        file.seek(begin)
        packed = file.read(behind - begin)
    except (LookupError, TypeError, ValueError, OSError, OverflowError) as error:
        raise FormatError(f"the header is damaged ({error})") from error
    content = _inner(outer, packed)
    first, size = stored[0], stored[1] - stored[0]
    if bundle.DATA_SIZE in outer:
        first, size = 0, outer[bundle.DATA_SIZE]
    found = bundle.ranges(content.get(bundle.INDEX_KEY), size)
    places = {name: (first + begin, first + end) for name, (begin, end) in found.items()}
    return Layout(path, content, places, outer, stored)


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
    fields["constants"], fields["constant_words"] = _constants(
        fields["constants"], fields["constant_words"], tensors, threads
    )
    tensors.check_end()
    graph = Graph(**fields)
    validate(graph)
    first, what = manifest.needed(graph)
    if any(node.weights is not None and node.weights.tile is not None for node in graph.nodes):
        first, what = manifest.TILED, "second words by tiles of an array"
    if (version := content["format_version"]) < first:
        raise FormatError(f"format_version is {version}, but {what} came with {first}")
    return graph


def _nodes(records: list[Any], tensors: _Tensors, threads: int, keep_decoded: bool) -> list[Node]:
    unpacked: list[tuple[Node, weights.Streams | None]] = []
    try:
        for index, record in enumerate(records):
            unpacked.append(_node(index, record, tensors))
    finally:  # of several faults the first node's is the one to tell
        stored = [(node, streams) for node, streams in unpacked if streams is not None]
        decoded = _decoded([streams for _, streams in stored], threads, keep_decoded)
        for (node, _), words in zip(stored, decoded, strict=True):
            node.weights = words
    return [node for node, _ in unpacked]


def _constants(
    names: list[str], records: dict[str, Any], tensors: _Tensors, threads: int
) -> tuple[dict[str, np.ndarray], dict[str, ConstantWords]]:
    """Return constants by name, and the words that some are made of."""
    for name, count in Counter(names).items():
        if count > 1:
            raise FormatError(f"constant {name!r} is given twice")
    if unknown := records.keys() - set(names):
        raise FormatError(f"words are given for {min(unknown)!r}, which is no constant")
    found, streams = {}, []
    for index, name in enumerate(names):
        if name in records:
            where = f"constant {name!r}"
            found[name] = manifest.CONSTANT.read(records[name], where)
            streams.append(_streams(f"constant.{index}", found[name]["weights"], where, tensors))
    decoded = _decoded(streams, threads, True)
    words = {
        name: ConstantWords(w, fields["shape"], fields["axes"])
        for (name, fields), w in zip(found.items(), decoded, strict=True)
    }
    for name in words:
        check_words(name, words[name])
    arrays = {
        name: words[name].values() if name in words else tensors.take(f"constant.{index}")
        for index, name in enumerate(names)
    }
    return arrays, words


def _decoded(
    streams: list[weights.Streams], threads: int, keep: bool
) -> list[weights.StoredWeights]:
    """Decode weights; those of equal tensors are one object."""
    keys = [_identity(each) for each in streams]
    uses, distinct = Counter(keys), dict[tuple[Any, ...], weights.Streams]()
    for key, each in zip(keys, streams, strict=True):
        distinct.setdefault(key, each)
    stored = spread(
        lambda key: weights.StoredWeights(distinct[key], uses[key] if keep else 0),
        list(distinct), threads,
    )  # fmt: skip
    found = dict(zip(distinct, stored, strict=True))
    return [found[key] for key in keys]


def _identity(streams: weights.Streams) -> tuple[Any, ...]:
    """Return what weights of equal tensors have in common, and others have not."""
    tensors = tuple(
        (name, hashlib.sha256(array.data).digest()) for name, array in streams.tensors.items()
    )
    said = streams.shape, streams.bits, streams.residual_shift, streams.clip, streams.group
    return tensors, said, streams.positions, streams.tile, streams.zlib


def _streams(
    key: str, record: Any, where: str, tensors: _Tensors, group: Any = 1
) -> weights.Streams:
    """Take the streams of words of which a manifest says `record`; `group` is not validated."""
    found = manifest.WORDS.read(record, where)
    _count(found["shape"], where)
    if found["positions"] == manifest.TILES:
        if not isinstance(found["tile"], tuple):
            raise FormatError(f"{where}: tile is {found['tile']}, tiles of an array have two sides")
        if type(group) is not int or group < 1 or found["shape"][0] % group:
            raise FormatError(
                f"{where}: group is {group!r}, which does not divide {found['shape'][0]} channels"
            )
        found["group"] = group
    elif isinstance(found["tile"], tuple):
        raise FormatError(
            f"{where}: tile has two sides, which positions {found['positions']!r} do not know"
        )
    parts = {
        name: tensors.vector(f"{key}.{name}", np.uint8)
        for name in ("first", *manifest.POSITIONS[found["positions"]])
    }
    parts["alpha"] = tensors.vector(f"{key}.alpha", np.float32)
    return weights.Streams(where, parts, **found)


def _count(shape: Shape, where: str) -> int:
    """Return the number of weights; refuses more than a layer can have."""
    # Python integers: no product of claimed sizes can overflow before it is judged.
    count = math.prod(shape)
    if count > manifest.MAX_WEIGHTS:
        raise FormatError(f"{where}: {count} weights are more than a layer can have")
    return count


def _node(index: int, record: Any, tensors: _Tensors) -> tuple[Node, weights.Streams | None]:
    """Return a node without its quantized weights, and those."""
    node = Node(**manifest.NODE.read(record, f"node {index}"))
    streams, where = None, _label(node)
    stores = OPERATORS[node.op].stores if not node.domain and node.op in OPERATORS else ""
    if stores == "weights":
        record = manifest.WEIGHT.read(record, where)["weight"]
        form = manifest.FLOATS if "dtype" in record else manifest.WORDS
        shape = form.read(record, where)["shape"]
        count = _count(shape, where)
        node.bias = tensors.vector(f"{index}.bias", np.float32, shape[0])
        if form is manifest.FLOATS:
            values = tensors.vector(f"{index}.weight", np.float32, count)
            node.float_weights = values.reshape(shape)
        else:
            group = node.attributes.get("group", 1)
            streams = _streams(str(index), record, where, tensors, group)
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
