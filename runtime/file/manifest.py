"""The manifest of a packed file: every field is declared once, for reading, checking and writing.

A `Form` lists the fields of one kind of object, in the order in which they are written. Fields that
no form lists are ignored; what a graph as a whole must keep, `runtime.validate` checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from logshift.kernels.activation import Activation
from logshift.kernels.errors import FormatError
from logshift.kernels.stlq import codec
from logshift.runtime.graph import NEWEST_OPSET, Graph, Quantization, ValueInfo

FORMAT_VERSION = 5

# The first versions with constants and ONNX operators, with fused activation functions, with words
# as constants and all tensors in one, and with second words by tiles of an array.
MIXED, ACTIVATED, BUNDLED, TILED = 2, 3, 4, 5

_REQUIRED = object()

Reader = Callable[[Any, str, str], Any]


@dataclass(frozen=True)
class Field:
    """One field of an object of the manifest.

    Attributes
    ----------
    key : str
    read : callable(JSON value, where, key) -> value in memory
        Raises `FormatError`.
    write : callable(value in memory) -> JSON value
    default : what it is if a file has no such field; then it is not written either
    attribute : str
        Its name in memory, if that is another.
    is_written : callable(object in memory) -> bool, optional
        Decides instead of the default.
    """

    key: str
    read: Reader
    write: Callable[[Any], Any] = lambda value: value
    default: Any = _REQUIRED
    attribute: str = ""
    is_written: Callable[[Any], bool] | None = None

    @property
    def name(self) -> str:
        """Name in memory."""
        return self.attribute or self.key

    def written(self, thing: Any) -> bool:
        """Tell whether it is written for an object in memory."""
        if self.is_written is not None:
            return self.is_written(thing)
        return self.default is _REQUIRED or getattr(thing, self.name) != self.default


class Form:
    """The fields of one kind of object."""

    def __init__(self, *fields: Field) -> None:
        self.fields = fields
        self._reads = [(field.key, field.name, field.read, field.default) for field in fields]

    def read(self, record: Any, where: str) -> dict[str, Any]:
        """Return the fields by their names in memory; raises `FormatError`, which says where."""
        given = record if isinstance(record, dict) else {}
        found = {}
        for key, name, read, default in self._reads:
            if key in given:
                found[name] = read(given[key], where, key)
            elif default is _REQUIRED:
                raise FormatError(f"{where}: {key!r} is missing")
            else:
                found[name] = default.copy() if isinstance(default, dict) else default
        return found

    def write(self, thing: Any) -> dict[str, Any]:
        """Return the object of the manifest for one in memory."""
        return {
            field.key: field.write(getattr(thing, field.name))
            for field in self.fields
            if field.written(thing)
        }


# --- what values there are ----------------------------------------------------------------------


def _kind(name: str, *types: type) -> Reader:
    def read(value: Any, where: str, key: str) -> Any:
        if not isinstance(value, types) or isinstance(value, bool):
            raise FormatError(f"{where}: {key!r} must be {name}")
        return value

    return read


_object, _list = _kind("an object", dict), _kind("a list", list)
_text, _integer = _kind("a string", str), _kind("an integer", int)
_number = _kind("a number", int, float)


def _list_of(name: str, *types: type) -> Reader:
    def read(value: Any, where: str, key: str) -> list[Any]:
        if not set(map(type, _list(value, where, key))).issubset(types):
            raise FormatError(f"{where}: {key!r} must be a list of {name}")
        return value

    return read


_strings = _list_of("strings", str)
_sizes, _dimensions = _list_of("integers", int), _list_of("integers and names", int, str)


def _optional(read: Reader) -> Reader:
    return lambda value, where, key: None if value is None else read(value, where, key)


def _made(make: Callable[[Any], Any], read: Reader) -> Reader:
    """Read a value and make something of it."""
    return lambda value, where, key: make(read(value, where, key))


def _between(low: int, high: int) -> Reader:
    def read(value: Any, where: str, key: str) -> int:
        if not low <= _integer(value, where, key) <= high:
            raise FormatError(f"{where}: {key} is {value}, allowed are {low} to {high}")
        return value

    return read


_side = _between(1, codec.MAX_TILE)


def _weight_shape(value: Any, where: str, key: str) -> tuple[int, ...]:
    shape = _list(value, where, key)
    if len(shape) != 4 or not all(type(d) is int and 1 <= d <= MAX_WEIGHTS for d in shape):
        raise FormatError(f"{where}: weight shape {shape} must be four positive integers")
    return tuple(shape)


def _positions(value: Any, where: str, key: str) -> str:
    if _text(value, where, key) not in POSITIONS:
        raise FormatError(f"{where}: unknown encoding of positions {value!r}")
    return value


def _tile(value: Any, where: str, key: str) -> int | tuple[int, int]:
    """Read the weights of a tile, or the inputs and outputs of an array's."""
    if not isinstance(value, list):
        return _side(value, where, key)
    if len(value) != 2:
        raise FormatError(f"{where}: {key} has {len(value)} sides, allowed are 2")
    return _side(value[0], where, key), _side(value[1], where, key)


def _float_type(value: Any, where: str, key: str) -> str:
    if value != "float32":
        raise FormatError(f"{where}: weights of dtype {value!r} are not known")
    return value


def _values(kind: str) -> Reader:
    def read(value: Any, where: str, key: str) -> list[ValueInfo]:
        return [read_value(record) for record in _list(value, where, key)]

    def read_value(record: Any) -> ValueInfo:
        named = isinstance(record, dict) and "name" in record
        return ValueInfo(**VALUE.read(record, f"{kind} {record['name']!r}" if named else kind))

    return read


def _quantizations(value: Any, where: str, key: str) -> dict[str, Quantization]:
    return {
        name: Quantization(**QUANTIZATION.read(record, f"tensor {name!r}"))
        for name, record in _object(value, where, key).items()
    }


def _activation(value: Any, where: str, key: str) -> Activation:
    """Read a fused activation function, but for its coefficients."""
    fields = ACTIVATION.read(_object(value, where, key), f"{where}: {key}")
    return Activation(**fields, coefficients=np.zeros(0, np.float32))


# --- forms --------------------------------------------------------------------------------------

MAX_WEIGHTS = 2**31 - 1  # of a layer

TILES = "tiles"  # the encoding of positions that needs the sides of a tile

# Streams of each encoding of the positions of second words, and these words.
POSITIONS = {
    "none": (),
    "bitmap": ("position", "second"),
    "list": ("count", "position", "second"),
    TILES: ("position", "second"),
}

VALUE = Form(
    Field("name", _text),
    Field("shape", _made(tuple, _dimensions), list),
    Field("nominal", _made(tuple, _sizes), list),
    Field("dtype", _text, default="float32"),
)

QUANTIZATION = Form(
    Field("scale", _made(float, _number)),
    Field("zero_point", _integer),
    Field("bits", _integer),
)

ACTIVATION = Form(
    Field("op", _text),
    Field("origin", _made(float, _number), default=0.0),
    Field("unit", _made(float, _number), default=1.0),
)

NODE = Form(
    Field("op", _text),
    Field("name", _text),
    Field("inputs", _strings),
    Field("outputs", _strings),
    Field("domain", _text, default=""),
    Field("attributes", _made(dict, _object), default={}),
    Field("activation", _activation, lambda value: ACTIVATION.write(value), default=None),
)

# What a node says of its weights: words, or float32.
WEIGHT = Form(Field("weight", _object))
WORDS = Form(
    Field("shape", _weight_shape, list),
    Field("bits", _between(codec.MIN_BITS, codec.MAX_BITS)),
    Field("residual_shift", _between(0, codec.MAX_RESIDUAL_SHIFT)),
    Field("clip", _between(1, 2)),
    Field("positions", _positions),
    Field("tile", _tile, lambda tile: list(tile) if isinstance(tile, tuple) else tile),
    Field("zlib", _made(frozenset, _strings), sorted),
)
CONSTANT = Form(
    Field("shape", _made(tuple, _sizes)),
    Field("axes", _made(tuple, _sizes)),
    Field("weight", _object, attribute="weights"),
)
FLOATS = Form(Field("shape", _weight_shape, list), Field("dtype", _float_type))

# Nodes and constants are read and written by `format`, with their tensors.
GRAPH = Form(
    Field("inputs", _values("input"), lambda values: list(map(VALUE.write, values))),
    Field("outputs", _values("output"), lambda values: list(map(VALUE.write, values))),
    Field(
        "tensors", _quantizations,
        lambda found: {name: QUANTIZATION.write(q) for name, q in found.items()},
        attribute="quantization",
    ),
    Field("nodes", _list, lambda nodes: list(map(NODE.write, nodes))),
    Field("settings", _object),
    Field("producer", _text, default=""),
    Field(
        "opset", _integer, default=NEWEST_OPSET,
        is_written=lambda graph: any(node.is_onnx for node in graph.nodes),
    ),
    Field("constants", _strings, list, default={}),
    Field("constant_words", _object, lambda words: {}, default={}),
    Field("preprocessing", _optional(_object), default=None),
    Field("labels", _optional(_strings), default=None),
)  # fmt: skip


def of(graph: Graph) -> dict[str, Any]:
    """Return the manifest of a graph, without what its nodes say of their weights.

    The version is the lowest that knows all that there is, but none below `MIXED`.
    """
    return {"format_version": max(MIXED, needed(graph)[0]), **GRAPH.write(graph)}


def needed(graph: Graph) -> tuple[int, str]:
    """Return the first version with all that a graph has but tiles, and what came with it."""
    if graph.constant_words:
        return BUNDLED, "constants of words"
    if any(node.activation is not None for node in graph.nodes):
        return ACTIVATED, "fused activation functions"
    if graph.constants or any(node.is_onnx for node in graph.nodes):
        return MIXED, "constants and ONNX operators"
    return 1, ""


# --- text ---------------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Any]:
    """Return a manifest of a known version as the JSON object that it is; no field is checked."""
    try:
        manifest = json.loads(text, parse_int=_integer_of_64_bits)
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


def _integer_of_64_bits(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(f"the integer {text:.20} is beyond 64 bits")
    return value
