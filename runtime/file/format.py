"""The packed file `.stlq`: the one place that reads, writes and validates it.

The container is safetensors; `docs/format.md` describes every byte. `read` trusts nothing: whatever
it returns has passed every rule that a kernel relies on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from logshift.kernels.errors import FormatError, InputError
from logshift.kernels.machine.memory import arena
from logshift.kernels.stlq import bitpack, codec
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.executor import spread
from logshift.runtime.file import files
from logshift.runtime.graph import NEWEST_OPSET, Graph, Node, Quantization, ValueInfo

FORMAT_VERSION = 2
MANIFEST_KEY = "logshift"
CHECKSUM_KEY = "checksum"

# What a stream may expand to, times its compressed size. RFC 1951 allows 1032, which would let a
# file of one megabyte claim gigabytes; codes worth storing never get near this.
_DEFLATE_MAX_RATIO = 64
_MAX_WEIGHTS = 2**31 - 1


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
    graph.validate()
    tensors: dict[str, np.ndarray] = {}
    nodes = [_pack_node(index, node, graph, tensors) for index, node in enumerate(graph.nodes)]
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "inputs": [_value_info_record(info) for info in graph.inputs],
        "outputs": [_value_info_record(info) for info in graph.outputs],
        "tensors": {
            name: {"scale": q.scale, "zero_point": q.zero_point, "bits": q.bits}
            for name, q in graph.quantization.items()
        },
        "nodes": nodes,
        "settings": graph.settings,
    }
    if any(node.is_onnx for node in graph.nodes):
        manifest["opset"] = graph.opset
    if graph.constants:
        manifest["constants"] = list(graph.constants)
        for index, array in enumerate(graph.constants.values()):
            tensors[f"constant.{index}"] = np.array(array, order="C")
    if graph.preprocessing is not None:
        manifest["preprocessing"] = graph.preprocessing
    if graph.labels is not None:
        manifest["labels"] = graph.labels
    text = json.dumps(manifest, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _container(tensors, {MANIFEST_KEY: text, CHECKSUM_KEY: _checksum(text, tensors)})


def _container(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file; the library alone would write metadata in random order."""
    data = safetensors.numpy.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _checksum(manifest: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


def _value_info_record(info: ValueInfo) -> dict[str, Any]:
    record = {"name": info.name, "shape": list(info.shape), "nominal": list(info.nominal)}
    return record if info.dtype == "float32" else record | {"dtype": info.dtype}


def _pack_node(
    index: int, node: Node, graph: Graph, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "op": node.op,
        "name": node.name,
        "inputs": node.inputs,
        "outputs": node.outputs,
    }
    if node.domain:
        record["domain"] = node.domain
    if node.attributes:
        record["attributes"] = node.attributes
    if node.weights is not None:
        record["weight"] = _pack_weights(index, node.weights, graph.settings, tensors)
    elif node.float_weights is not None:
        record["weight"] = {"shape": list(node.float_weights.shape), "dtype": "float32"}
        tensors[f"{index}.weight"] = np.ascontiguousarray(node.float_weights, np.float32).ravel()
    if node.bias is not None:
        tensors[f"{index}.bias"] = np.ascontiguousarray(node.bias, np.float32)
    if node.table is not None:
        tensors[f"{index}.table"] = np.ascontiguousarray(node.table, np.uint8).ravel()
    return record


def _pack_weights(
    index: int, weights: LogWeights, settings: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    if isinstance(weights, _StoredWeights):  # as it lies in the file: packing takes seconds
        stored = weights.streams
        tensors |= {f"{index}.{name}": array for name, array in stored.tensors.items()}
        return stored.record()
    tile = int(settings.get("tile", codec.MAX_TILE))
    mask = weights.second.ravel() != 0
    counts, positions = bitpack.tile_positions(mask, tile)
    choices = {
        "list": _deflate({"count": counts.view(np.uint8), "position": positions}),
        "bitmap": _deflate({"position": bitpack.pack(mask.astype(np.uint8), 1)}),
    }
    encoding = min(choices, key=lambda name: sum(a.size for a, _ in choices[name].values()))
    streams = choices[encoding]
    if not mask.any():
        encoding, streams = "none", {}
    else:
        second = weights.second.ravel()[mask]
        streams |= _deflate({"second": bitpack.pack(second, weights.bits)})
    streams |= _deflate({"first": bitpack.pack(weights.first.ravel(), weights.bits)})
    for name, (array, _) in streams.items():
        tensors[f"{index}.{name}"] = array
    tensors[f"{index}.alpha"] = np.ascontiguousarray(weights.alpha, np.float32)
    return {
        "shape": list(weights.shape),
        "bits": weights.bits,
        "residual_shift": weights.residual_shift,
        "clip": weights.clip,
        "positions": encoding,
        "tile": tile,
        "zlib": sorted(name for name, (_, deflated) in streams.items() if deflated),
    }


def _deflate(streams: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, bool]]:
    """Compress every stream that gets smaller by it."""
    result = {}
    for name, array in streams.items():
        raw = array.tobytes()
        # Codes have no repeats worth finding: Huffman coding alone usually beats matching here.
        # It cannot shrink eight times, so there is always one that readers accept.
        smallest = min(
            (
                packed
                for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
                if len(raw) <= _DEFLATE_MAX_RATIO * len(packed := _zlib(raw, strategy))
            ),
            key=len,
        )
        deflated = len(smallest) < len(raw)
        result[name] = (np.frombuffer(smallest if deflated else raw, np.uint8), deflated)
    return result


def _zlib(raw: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return compressor.compress(raw) + compressor.flush()


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
    return _graph(_parse_manifest(text), tensors, threads, keep_decoded)


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
        return _parse_manifest(_metadata(data)[0])
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


def _parse_manifest(text: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text, parse_int=_integer)
        # Written again, infinity, NaN and half surrogate pairs show: what Python alone reads.
        json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the manifest is not strict JSON ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError("the manifest has no format_version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"format_version is {version}, this logshift reads up to {FORMAT_VERSION};"
            " install a newer logshift"
        )
    return manifest


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"the integer {text:.20} is beyond 64 bits")
    return value


_KINDS: dict[type | tuple[type, ...], str] = {
    dict: "an object", list: "a list", str: "a string", int: "an integer", (int, float): "a number"
}  # fmt: skip


def _field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Take a required key of a manifest object, checking its JSON type."""
    if not isinstance(record, dict) or key not in record:
        raise FormatError(f"{where}: {key!r} is missing")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{where}: {key!r} must be {_KINDS[kind]}")
    return value


def _strings(record: Any, key: str, where: str) -> list[str]:
    values = _field(record, key, list, where)
    if not all(isinstance(v, str) for v in values):
        raise FormatError(f"{where}: {key!r} must be a list of strings")
    return values


def _graph(
    manifest: dict[str, Any], tensors: dict[str, np.ndarray], threads: int, keep_decoded: bool
) -> Graph:
    where = "manifest"
    quantization = {}
    for name, record in _field(manifest, "tensors", dict, where).items():
        here = f"tensor {name!r}"
        quantization[name] = Quantization(
            float(_field(record, "scale", (int, float), here)),
            _field(record, "zero_point", int, here),
            _field(record, "bits", int, here),
        )
    used: set[str] = set()
    nodes = _unpack_nodes(
        _field(manifest, "nodes", list, where), tensors, used, threads, keep_decoded
    )
    constants: dict[str, np.ndarray] = {}
    if "constants" in manifest:
        for index, name in enumerate(_strings(manifest, "constants", where)):
            key = f"constant.{index}"
            if key not in tensors:
                raise FormatError(f"tensor {key!r} is missing")
            if name in constants:
                raise FormatError(f"constant {name!r} is given twice")
            used.add(key)
            constants[name] = tensors[key]
    if extra := set(tensors) - used:
        raise FormatError(f"tensor {min(extra)!r} belongs to no node")
    preprocessing = manifest.get("preprocessing")
    labels = manifest.get("labels")
    graph = Graph(
        [_value_info(r, "input") for r in _field(manifest, "inputs", list, where)],
        [_value_info(r, "output") for r in _field(manifest, "outputs", list, where)],
        quantization,
        nodes,
        None if preprocessing is None else _field(manifest, "preprocessing", dict, where),
        None if labels is None else _strings(manifest, "labels", where),
        _field(manifest, "settings", dict, where),
        constants,
        _field(manifest, "opset", int, where) if "opset" in manifest else NEWEST_OPSET,
    )
    graph.validate()
    return graph


def _value_info(record: Any, kind: str) -> ValueInfo:
    name = _field(record, "name", str, kind)
    shape = _field(record, "shape", list, f"{kind} {name!r}")
    nominal = _field(record, "nominal", list, f"{kind} {name!r}")
    if not all(type(d) in (int, str) for d in shape) or not all(type(d) is int for d in nominal):
        raise FormatError(f"{kind} {name!r}: dimensions must be integers or names")
    dtype = _field(record, "dtype", str, f"{kind} {name!r}") if "dtype" in record else "float32"
    return ValueInfo(name, tuple(shape), tuple(nominal), dtype)


def _unpack_nodes(
    records: list[Any], tensors: dict[str, np.ndarray], used: set[str], threads: int,
    keep_decoded: bool,
) -> list[Node]:  # fmt: skip
    unpacked: list[tuple[Node, _Streams | None]] = []
    try:
        for index, record in enumerate(records):
            unpacked.append(_unpack_node(index, record, tensors, used))
    finally:  # of several faults the first node's is the one to tell
        stored = [(node, streams) for node, streams in unpacked if streams is not None]
        weights = spread(lambda pair: _StoredWeights(pair[1], keep_decoded), stored, threads)
        for (node, _), decoded in zip(stored, weights, strict=True):
            node.weights = decoded
    return [node for node, _ in unpacked]


def _unpack_node(
    index: int, record: Any, tensors: dict[str, np.ndarray], used: set[str]
) -> tuple[Node, _Streams | None]:
    """Return a node without its quantized weights, and those."""
    where = f"node {index}"
    node = Node(
        _field(record, "op", str, where),
        _field(record, "name", str, where),
        _strings(record, "inputs", where),
        _strings(record, "outputs", where),
        dict(_field(record, "attributes", dict, where)) if "attributes" in record else {},
        domain=_field(record, "domain", str, where) if "domain" in record else "",
    )
    if node.domain:
        return node, None

    def take(name: str, dtype: type, shape: tuple[int, ...] | None = None) -> np.ndarray:
        key = f"{index}.{name}"
        if key not in tensors:
            raise FormatError(f"tensor {key!r} is missing")
        used.add(key)
        _expect(key, tensors[key], dtype, shape)
        return tensors[key]

    streams = None
    where = f"node {node.name!r} ({node.op})"
    if node.op in ("Conv", "ConvTranspose"):
        weight = _field(record, "weight", dict, where)
        shape = _field(weight, "shape", list, where)
        if len(shape) != 4 or not all(type(d) is int and 1 <= d <= _MAX_WEIGHTS for d in shape):
            raise FormatError(f"{where}: weight shape {shape} must be four positive integers")
        node.bias = take("bias", np.float32, (shape[0],))
        if "dtype" in weight:
            if weight["dtype"] != "float32":
                raise FormatError(f"{where}: weights of dtype {weight['dtype']!r} are not known")
            # Python integers: no product of claimed sizes can overflow before it is judged.
            count = shape[0] * shape[1] * shape[2] * shape[3]
            node.float_weights = take("weight", np.float32, (count,)).reshape(shape)
        else:
            streams = _weight_streams(index, weight, shape, where, take)
    elif node.op == "Lookup":
        table = take("table", np.uint8)
        if table.size == 0 or table.size % 256:
            raise FormatError(f"{where}: the table has {table.size} bytes, expected 256 for each")
        node.table = table if table.size == 256 else table.reshape(-1, 256)
    return node, streams


def _expect(key: str, array: np.ndarray, dtype: type, shape: tuple[int, ...] | None) -> None:
    if array.dtype != dtype or array.ndim != 1 or (shape and array.shape != shape):
        raise FormatError(
            f"tensor {key!r} is {array.dtype} of shape {array.shape}, expected"
            f" {np.dtype(dtype)} of shape {shape or '(bytes,)'}"
        )


def _weight_streams(
    index: int, weight: dict[str, Any], shape: list[int], where: str, take: Any
) -> _Streams:
    bits = _field(weight, "bits", int, where)
    residual_shift = _field(weight, "residual_shift", int, where)
    clip = _field(weight, "clip", int, where)
    tile = _field(weight, "tile", int, where)
    encoding = _field(weight, "positions", str, where)
    deflated = _strings(weight, "zlib", where)
    for key, value, low, high in (
        ("bits", bits, codec.MIN_BITS, codec.MAX_BITS),
        ("residual_shift", residual_shift, 0, codec.MAX_RESIDUAL_SHIFT),
        ("clip", clip, 1, 2),
        ("tile", tile, 1, codec.MAX_TILE),
    ):
        if not low <= value <= high:
            raise FormatError(f"{where}: {key} is {value}, allowed are {low} to {high}")
    # Python integers: no product of claimed sizes can overflow before it is judged.
    count = shape[0] * shape[1] * shape[2] * shape[3]
    if count > _MAX_WEIGHTS:
        raise FormatError(f"{where}: {count} weights are more than a layer can have")

    if encoding not in _POSITIONS:
        raise FormatError(f"{where}: unknown encoding of positions {encoding!r}")
    tensors = {name: take(name, np.uint8) for name in ("first", *_POSITIONS[encoding])}
    tensors["alpha"] = take("alpha", np.float32)
    return _Streams(
        index, where, (shape[0], shape[1], shape[2], shape[3]), bits, residual_shift, clip, tile,
        encoding, tensors, frozenset(deflated),
    )  # fmt: skip


# Streams of each encoding of the positions of second words, and these words.
_POSITIONS = {
    "none": (),
    "bitmap": ("position", "second"),
    "list": ("count", "position", "second"),
}

_SPARE = 8  # bytes behind a stream that `codec.join_words` may read


@dataclass(frozen=True)
class _Streams:
    """Weights of a layer as they lie in the file."""

    index: int  # of the node
    where: str
    shape: tuple[int, int, int, int]
    bits: int
    residual_shift: int
    clip: int
    tile: int
    encoding: str
    tensors: dict[str, np.ndarray]
    deflated: frozenset[str]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def record(self) -> dict[str, Any]:
        """Return what the manifest says of them."""
        return {
            "shape": list(self.shape), "bits": self.bits, "residual_shift": self.residual_shift,
            "clip": self.clip, "positions": self.encoding, "tile": self.tile,
            "zlib": sorted(self.deflated),
        }  # fmt: skip

    def words(self) -> LogWeights:
        first, mask, second = self._unpacked()
        count = self.count
        words = np.zeros((2, count), np.uint8)
        words[0] = bitpack.unpack(first, self.bits, count)
        if mask.size:
            chosen = bitpack.unpack(mask, 1, count).view(bool)
            words[1, chosen] = bitpack.unpack(second, self.bits, int(np.count_nonzero(chosen)))
        return LogWeights(
            words[0].reshape(self.shape), words[1].reshape(self.shape), self.tensors["alpha"],
            self.bits, self.residual_shift, self.clip,
        )  # fmt: skip

    def integers(self) -> tuple[np.ndarray, int, int]:
        """Return W as `LogWeights.integers` does, the largest |W| and the non-zero second words."""
        first, mask, second = self._unpacked()
        streams = _padded(first), mask.copy(), _padded(second)
        limit = codec.limit(self.bits, self.residual_shift, self.clip)
        dtype = codec.integer_type(limit)
        w = arena(self.count * dtype.itemsize).view(dtype)
        largest, nonzero, allowed = codec.join_words(*streams, self.bits, self.residual_shift, w)
        if not allowed:
            raise FormatError(f"{self.where}: a code is negative zero")
        _expect(f"{self.index}.alpha", self.tensors["alpha"], np.float32, self.shape[:1])
        return w.reshape(self.shape), largest, nonzero

    def _unpacked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First words, a bit for every weight or nothing at all, and second words."""
        count, nothing = self.count, np.empty(0, np.uint8)
        first = self._stream("first", count, self.bits)
        if self.encoding == "none":
            return first, nothing, nothing
        if self.encoding == "bitmap":
            mask = self._stream("position", count, 1)
        else:
            tiles = -(-count // self.tile)
            counts = self._stream("count", 2 * tiles, 8).view("<u2")
            positions = self._stream("position", int(counts.sum(dtype=np.int64)), 8)
            try:
                chosen = bitpack.mask_from_positions(counts, positions, self.tile, count)
            except InputError as error:
                raise FormatError(f"{self.where}: {error}") from None
            mask = bitpack.pack(chosen.view(np.uint8), 1)
        selected = int(_BITS_SET[mask].sum(dtype=np.int64))
        return first, mask, self._stream("second", selected, self.bits)

    def _stream(self, name: str, count: int, bits: int) -> np.ndarray:
        """Return a stream of `count` values of `bits` bits."""
        raw, size = self.tensors[name], bitpack.packed_size(count, bits)
        if name in self.deflated:
            raw = _inflate(raw, size, f"{self.where}: {name}")
        if raw.size != size:
            raise FormatError(f"{self.where}: {name} has {raw.size} bytes, expected {size}")
        try:
            bitpack.check_end(raw, bits, count)
        except InputError as error:
            raise FormatError(f"{self.where}: {error}") from None
        return raw


_BITS_SET = np.array([value.bit_count() for value in range(256)], np.uint8)


def _padded(stream: np.ndarray) -> np.ndarray:
    """Return a stream with bytes behind it."""
    padded = np.zeros(stream.size + _SPARE, np.uint8)
    padded[: stream.size] = stream
    return padded


class _StoredWeights(LogWeights):
    """Weights that stay as they lie in the file; codes are decoded anew whenever asked for.

    Their one reader is usually the packing for a kernel, and once packed they are needed no more.

    Parameters
    ----------
    streams : _Streams
        They are validated.
    keep : bool
        Keep the integers for the first who asks.

    Raises
    ------
    FormatError
    """

    streams: _Streams
    _largest: int
    _nzr: float
    _sums: np.ndarray
    _integers: np.ndarray | None

    def __init__(self, streams: _Streams, keep: bool) -> None:
        w, largest, nonzero = streams.integers()
        sums = codec.channel_sums(w.reshape(len(w), -1))
        vars(self).update(
            alpha=streams.tensors["alpha"], bits=streams.bits, clip=streams.clip,
            residual_shift=streams.residual_shift, streams=streams, _largest=largest,
            _nzr=nonzero / w.size, _sums=sums, _integers=w if keep else None,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _StoredWeights, (self.streams, False)

    def __getattr__(self, name: str) -> Any:
        if name not in ("first", "second"):
            raise AttributeError(name)
        return getattr(self.words(), name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.streams.shape

    @property
    def nzr(self) -> float:
        return self._nzr

    @property
    def largest(self) -> int:
        return self._largest

    def sums(self) -> np.ndarray:
        return self._sums

    def words(self) -> LogWeights:
        self._take()
        return self.streams.words()

    def integers(self) -> np.ndarray:
        kept = self._take()
        return self.streams.integers()[0] if kept is None else kept

    def _take(self) -> np.ndarray | None:
        kept = self._integers
        vars(self)["_integers"] = None
        return kept


def _inflate(raw: np.ndarray, size: int, where: str) -> np.ndarray:
    if size > raw.size * _DEFLATE_MAX_RATIO:
        raise FormatError(f"{where}: {raw.size} bytes cannot inflate to {size}")
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(raw.tobytes(), size + 1)
    except zlib.error as error:
        raise FormatError(f"{where}: damaged zlib stream ({error})") from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise FormatError(f"{where}: the zlib stream does not hold exactly {size} bytes")
    return np.frombuffer(data, np.uint8)
