"""The packed file `.stlq`: the one place that reads, writes and validates it.

The container is safetensors; `docs/format.md` describes every byte. `read` trusts nothing: whatever
it returns has passed every rule that a kernel relies on.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from logshift.kernels import bitpack, codec
from logshift.kernels.codec import LogWeights
from logshift.kernels.errors import FormatError, InputError
from logshift.runtime import files
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
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
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
        tensors |= {f"{index}.{name}": array for name, array in weights.streams.items()}
        return weights.record
    tile = int(settings.get("tile", codec.MAX_TILE))
    mask = weights.second.ravel() != 0
    counts, positions = bitpack.tile_positions(mask, tile)
    choices = {
        "list": _deflate({"count": counts.view(np.uint8), "position": positions}),
        "bitmap": _deflate({"position": bitpack.pack(mask.astype(np.uint8), 1)}),
    }
    encoding = min(choices, key=lambda name: sum(a.size for a, _ in choices[name].values()))
    if not mask.any():
        encoding, streams = "none", {}
    else:
        streams = choices[encoding]
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


def read(path: str | os.PathLike[str]) -> Graph:
    """Read and validate a packed file.

    Parameters
    ----------
    path : path-like

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
    data = Path(path).read_bytes()
    try:
        return deserialize(data)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error.__cause__


def deserialize(data: bytes) -> Graph:
    """Return the validated graph of the bytes of a packed file; see `read`."""
    try:
        tensors: dict[str, np.ndarray] = safetensors.numpy.load(data)
    except Exception as error:  # the parser's own errors, whatever their type
        raise FormatError(f"not a readable safetensors container ({error})") from error
    text, checksum = _metadata(data)
    if checksum != _checksum(text, tensors):
        raise FormatError("checksum does not match: the file is damaged")
    return _graph(_parse_manifest(text), tensors)


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


def _graph(manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> Graph:
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
    nodes = [
        _unpack_node(index, record, tensors, used)
        for index, record in enumerate(_field(manifest, "nodes", list, where))
    ]
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


def _unpack_node(index: int, record: Any, tensors: dict[str, np.ndarray], used: set[str]) -> Node:
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
        return node

    def take(name: str, dtype: type, shape: tuple[int, ...] | None = None) -> np.ndarray:
        key = f"{index}.{name}"
        if key not in tensors:
            raise FormatError(f"tensor {key!r} is missing")
        used.add(key)
        array = tensors[key]
        if array.dtype != dtype or array.ndim != 1 or (shape and array.shape != shape):
            raise FormatError(
                f"tensor {key!r} is {array.dtype} of shape {array.shape}, expected"
                f" {np.dtype(dtype)} of shape {shape or '(bytes,)'}"
            )
        return array

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
            node.weights = _unpack_weights(weight, shape, where, take)
    elif node.op == "Lookup":
        table = take("table", np.uint8)
        if table.size == 0 or table.size % 256:
            raise FormatError(f"{where}: the table has {table.size} bytes, expected 256 for each")
        node.table = table if table.size == 256 else table.reshape(-1, 256)
    return node


def _unpack_weights(weight: dict[str, Any], shape: list[int], where: str, take: Any) -> LogWeights:
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

    streams: dict[str, np.ndarray] = {}

    def stream(name: str, size: int) -> np.ndarray:
        raw = streams[name] = take(name, np.uint8)
        if name in deflated:
            raw = _inflate(raw, size, f"{where}: {name}")
        if raw.size != size:
            raise FormatError(f"{where}: {name} has {raw.size} bytes, expected {size}")
        return raw

    def decode() -> LogWeights:
        first = bitpack.unpack(stream("first", bitpack.packed_size(count, bits)), bits, count)
        second = np.zeros(count, np.uint8)
        if encoding != "none":
            if encoding == "bitmap":
                packed = stream("position", bitpack.packed_size(count, 1))
                mask = bitpack.unpack(packed, 1, count).astype(bool)
            elif encoding == "list":
                counts = stream("count", 2 * -(-count // tile)).view("<u2")
                positions = stream("position", int(counts.sum(dtype=np.int64)))
                mask = bitpack.mask_from_positions(counts, positions, tile, count)
            else:
                raise FormatError(f"{where}: unknown encoding of positions {encoding!r}")
            selected = int(mask.sum())
            codes = stream("second", bitpack.packed_size(selected, bits))
            second[mask] = bitpack.unpack(codes, bits, selected)
        dims = tuple(shape)
        alpha = streams["alpha"] = take("alpha", np.float32, (shape[0],))
        return LogWeights(
            first.reshape(dims), second.reshape(dims), alpha, bits, residual_shift, clip
        )

    try:
        weights = decode()
    except InputError as error:
        raise FormatError(f"{where}: {error}") from None
    negative_zero = 1 << (bits - 1)
    if (weights.first == negative_zero).any() or (weights.second == negative_zero).any():
        raise FormatError(f"{where}: a code is negative zero")
    return _StoredWeights(weights, decode, weight, streams)


def _restore_weights(record: dict[str, Any], streams: dict[str, np.ndarray]) -> LogWeights:
    """Undo `_StoredWeights.__reduce__`."""
    return _unpack_weights(record, record["shape"], "weights", lambda name, *_: streams[name])


class _StoredWeights(LogWeights):
    """Weights that stay as they lie in the file; codes are decoded anew whenever asked for.

    Their one reader is usually the packing for a kernel, and once packed they are needed no more.

    Attributes
    ----------
    record : dict
        What the manifest says of them.
    streams : dict of name to array
        Their tensors in the file.
    """

    record: dict[str, Any]
    streams: dict[str, np.ndarray]

    def __init__(
        self,
        weights: LogWeights,
        decode: Callable[[], LogWeights],
        record: dict[str, Any],
        streams: dict[str, np.ndarray],
    ) -> None:
        known = {name: getattr(weights, name) for name in ("shape", "nzr", "largest")}
        kept = {k: v for k, v in vars(weights).items() if k not in ("first", "second")}
        vars(self).update(kept, _known=known, _decode=decode, record=record, streams=streams)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_weights, (self.record, self.streams)

    def __getattr__(self, name: str) -> Any:
        if name not in ("first", "second"):
            raise AttributeError(name)
        return getattr(self._decode(), name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._known["shape"]

    @property
    def nzr(self) -> float:
        return self._known["nzr"]

    @property
    def largest(self) -> int:
        return self._known["largest"]

    def integers(self) -> np.ndarray:
        return self._decode().integers()


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
