"""Make the hostile packed files of this directory and their table in README.md.

Every file is a small valid one with a single thing wrong. Files whose fault lies behind the
checksum are signed with a right one: the rule they break must be found, not the damage.

Run `python tests/hostile/make.py` after a change; the files are committed.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from logshift.converter.encode import encode
from logshift.kernels.activation import Activation
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.file import format as packed_format
from logshift.runtime.graph import ConstantWords, Graph, Node, Quantization, ValueInfo
from logshift.runtime.infer import nominal_shapes
from logshift.runtime.validate import validate

HERE = Path(__file__).parent
Manifest = dict[str, Any]
Tensors = dict[str, np.ndarray]


# --- valid files --------------------------------------------------------------------------------


def _finish(nodes: list[Node], quantization: dict[str, Quantization], size: int, **more) -> Graph:
    rng = np.random.default_rng(5)
    for node in nodes:
        if node.weight_shape is not None:
            node.bias = rng.standard_normal(node.weight_shape[0]).astype(np.float32)
    x = ("batch", 2, "height", "width") if size == 6 else ("batch", 2, size, size)
    graph = Graph([ValueInfo("x", x, (1, 2, size, size))], [], quantization, nodes, **more)
    # Attribute defaults, which shapes depend on, are filled in by the first validation.
    graph.outputs = [ValueInfo("y", ("batch",), (1,))]
    try:
        validate(graph)
    except packed_format.FormatError as error:
        assert "is declared" in str(error), error
    shape = nominal_shapes(graph)["y"]
    graph.outputs = [ValueInfo("y", ("batch", *shape[1:]), shape)]
    return graph


def _weights(shape: tuple[int, ...], bits: int, ratio: float, shift: int = 0) -> LogWeights:
    w = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    return encode(w, bits, ratio, residual_shift=shift)


def classifier() -> Graph:
    """Second words as a list, as a bitmap and none at all; a residual, a table, labels."""
    q = Quantization(0.05, 0, 8)
    pads = {"pads": [1, 1, 1, 1], "clamp": [0, None]}
    table = np.minimum(np.arange(256), 200).astype(np.uint8)
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("Conv", "sparse", ["x_q"], ["a"], dict(pads), _weights((12, 3, 3, 2), 4, 0.02)),
        Node("Conv", "dense", ["a", "a"], ["b"], dict(pads), _weights((12, 1, 1, 12), 3, 0.5)),
        Node("Lookup", "table", ["b"], ["c"], table=table),
        Node("GlobalAveragePool", "pool", ["c"], ["d"]),
        Node("Conv", "plain", ["d"], ["e"], {}, _weights((3, 1, 1, 12), 5, 0.0)),
        Node("Flatten", "flatten", ["e"], ["y"]),
    ]
    nodes[2].attributes["pads"] = [0, 0, 0, 0]
    return _finish(
        nodes, {"x_q": Quantization(0.02, 114, 8)} | dict.fromkeys("abcd", q), 6,
        preprocessing={"mean": [0.5], "std": [0.25]}, labels=["cat", "dog", "ship"],
    )  # fmt: skip


def upscaler() -> Graph:
    """The operators that `classifier` has not, on a fixed input size."""
    q, wide = Quantization(0.05, 3, 6), Quantization(0.1, 7, 7)
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("ConvTranspose", "up", ["x_q"], ["a"], {"strides": [2, 2]},
             _weights((4, 2, 2, 2), 3, 0.3, 2)),
        Node("MaxPool", "max", ["a"], ["b"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Node("AveragePool", "average", ["b"], ["c"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Node("Resize", "resize", ["c"], ["d"], {"mode": "linear", "scales": [2.0, 2.0]}),
        Node("Add", "add", ["d", "a"], ["e"]),
        Node("Concat", "concat", ["e", "a"], ["f"]),
        Node("DepthToSpace", "shuffle", ["f"], ["g"], {"blocksize": 2}),
        Node("Slice", "slice", ["g"], ["h"], {"axes": [2, 3], "starts": [0, 1], "ends": [9, 9],
                                              "steps": [2, 1]}),
        Node("Pad", "pad", ["h"], ["i"], {"pads": [0, 0, 1, 1, 0, 0, 0, 2]}),
        Node("GlobalMaxPool", "largest", ["i"], ["j"]),
        Node("Mul", "scale", ["i", "j"], ["k"]),
        Node("Sub", "subtract", ["j", "k"], ["l"], {"clamp": [3, None]}),
        Node("Gather", "swap", ["l"], ["m"], {"indices": [1, 0]}),
        Node("Lookup", "tables", ["m"], ["n"],
             table=np.arange(512, dtype=np.uint8).reshape(2, 256)),
        Node("DequantizeLinear", "dequantize", ["n"], ["y"]),
    ]  # fmt: skip
    return _finish(
        nodes, {"x_q": Quantization(0.02, 114, 8)} | dict.fromkeys("ab", q)
        | dict.fromkeys("cdefghijklm", wide) | {"n": Quantization(0.1, 7, 8)}, 4,
    )  # fmt: skip


def mixed() -> Graph:
    """Codes, float32 and ONNX operators side by side."""
    rng = np.random.default_rng(3)
    pads = {"pads": [1, 1, 1, 1], "clamp": [0.0, 6.0]}
    kept = rng.standard_normal((3, 3, 3, 4)).astype(np.float32)
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("Conv", "codes", ["x_q"], ["a"], {}, _weights((4, 1, 1, 2), 4, 0.2)),
        Node("Conv", "words", ["a"], ["b"], dict(pads), _weights((4, 3, 3, 4), 3, 0.2)),
        Node("Conv", "kept", ["b"], ["c"], dict(pads), float_weights=kept),
        Node("Swish", "swish", ["c"], ["d"]),
        Node("TopK", "largest", ["d", "k"], ["e", ""], {"axis": 1}, domain="ai.onnx"),
        Node("Mul", "scale", ["e", "factor"], ["f"], domain="ai.onnx"),
        Node("Softmax", "softmax", ["f"], ["y"], {"axis": 1}, domain="ai.onnx"),
    ]
    constants = {"k": np.array([2]), "factor": np.array(0.5, np.float32)}
    return _finish(nodes, {"x_q": Quantization(0.02, 114, 8)}, 6, constants=constants, opset=18)


def activated() -> Graph:
    """A fused activation function of each kind."""
    rng = np.random.default_rng(4)
    functions = [
        Activation("PRelu", 0.0, 1.0, rng.uniform(0, 1, 4).astype(np.float32)),
        Activation("HardSwish", -3.0, 6.0, np.zeros(0, np.float32)),
        Activation("Piecewise", 0.0, 1e-3, rng.integers(-9999, 9999, (3, 16)).astype(np.int16)),
    ]
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("Conv", "slopes", ["x_q"], ["a"], {}, _weights((4, 1, 1, 2), 4, 0.2)),
        Node("ConvTranspose", "gate", ["a"], ["b"], {}, _weights((4, 1, 1, 4), 4, 0.2)),
        Node("Add", "pieces", ["a", "b"], ["c"]),
        Node("MaxPool", "max", ["c"], ["d"], {"kernel_shape": [2, 2]}),
        Node("DequantizeLinear", "dequantize", ["d"], ["y"]),
    ]
    for node, function in zip(nodes[1:], functions, strict=False):
        node.activation = function
    return _finish(
        nodes, {"x_q": Quantization(0.02, 114, 8)} | dict.fromkeys("abcd", Quantization(0.1, 9, 8)),
        6,
    )  # fmt: skip


def bundled() -> Graph:
    """Words that two nodes have, and constants of words: what only version 4 knows."""
    words = _weights((4, 1, 1, 4), 4, 0.3)
    matrices = ConstantWords(_weights((16, 1, 1, 4), 3, 0.3), (4, 4, 4), (2, 1))
    table = ConstantWords(_weights((3, 1, 1, 4), 5, 0.0), (3, 4), (0,))
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("Conv", "first", ["x_q"], ["a"], {}, _weights((4, 1, 1, 2), 4, 0.2)),
        Node("Conv", "again", ["a"], ["b"], {}, words),
        Node("Conv", "and again", ["b"], ["c"], {}, words),
        Node("DequantizeLinear", "dequantize", ["c"], ["d"]),
        Node("Add", "add", ["d", "matrices"], ["e"], domain="ai.onnx"),
        Node("Gather", "look up", ["table", "k"], ["f"], domain="ai.onnx"),
        Node("Mul", "scale", ["e", "f"], ["y"], domain="ai.onnx"),
    ]
    constants = {"matrices": matrices.values(), "k": np.array(1), "table": table.values()}
    return _finish(
        nodes, {"x_q": Quantization(0.02, 114, 8)} | dict.fromkeys("abc", Quantization(0.1, 9, 8)),
        4, constants=constants, constant_words={"matrices": matrices, "table": table}, opset=18,
    )  # fmt: skip


def tiled() -> Graph:
    """Second words by tiles of an array: what only version 5 knows."""

    def words(shape: tuple[int, ...], tile: tuple[int, int], group: int = 1) -> LogWeights:
        w = np.random.default_rng(sum(shape)).uniform(-1, 1, shape)
        return encode(w, 4, 0.2, granularity="tile", tile=tile, group=group)

    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        Node("QuantizeLinear", "quantize", ["x"], ["x_q"]),
        Node("Conv", "few", ["x_q"], ["a"], {}, words((18, 1, 1, 2), (16, 4))),
        Node("Conv", "dense", ["a"], ["b"], dict(pads), words((18, 3, 3, 18), (8, 8))),
        Node("Conv", "grouped", ["b"], ["c"], pads | {"group": 3},
             words((18, 3, 3, 6), (4, 4), 3)),
        Node("Conv", "depthwise", ["c"], ["d"], pads | {"group": 18},
             words((18, 3, 3, 1), (16, 4), 18)),
        Node("DequantizeLinear", "dequantize", ["d"], ["y"]),
    ]  # fmt: skip
    return _finish(
        nodes, {"x_q": Quantization(0.02, 114, 8)} | dict.fromkeys("abcd", Quantization(0.1, 9, 8)),
        4,
    )  # fmt: skip


# --- taking files apart -------------------------------------------------------------------------


def take_apart(data: bytes) -> tuple[Manifest, Tensors]:
    """Manifest and tensors of a packed file, each by itself, without any check."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {name: array.copy() for name, array in safetensors.numpy.load(data).items()}
    outer = manifest = json.loads(header["__metadata__"]["logshift"])
    if "manifest_bytes" in outer:
        manifest = json.loads(zlib.decompress(tensors["manifest"].tobytes()))
        bundle, tensors = tensors["data"].tobytes(), {}
        if "data_bytes" in outer:
            bundle = zlib.decompress(bundle)
        for name, (dtype, begin, shape) in manifest.pop("index").items():
            array = np.frombuffer(bundle, dtype, math.prod(shape), begin)
            tensors[name] = array.reshape(shape).copy()
    return manifest, tensors


def put_together(tensors: Tensors) -> tuple[dict[str, Any], np.ndarray]:
    """Index and bytes of all tensors in one; those of equal content lie there once."""
    index, data, places = {}, b"", {}
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
        array, raw = tensors[name], tensors[name].tobytes()
        if raw not in places:
            places[raw], data = len(data), data + raw
        index[name] = [array.dtype.name, places[raw], list(array.shape)]
    return index, np.frombuffer(data, np.uint8)


def sign(text: str, tensors: Tensors) -> bytes:
    """A container of this manifest and these tensors, with the right checksum."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in (4, 5):
        return _signed(text, tensors)
    manifest["index"], data = put_together(tensors)
    return sign_bundle({"format_version": version}, manifest, {"data": data})


def sign_bundle(outer: Manifest, manifest: Manifest, tensors: Tensors) -> bytes:
    """A file of version 4 or 5, of what its metadata say, its manifest and its tensors."""
    text = json.dumps(manifest).encode()
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    return _signed(
        json.dumps({"manifest_bytes": len(text), **outer}), {"manifest": packed, **tensors}
    )


def _signed(text: str, tensors: Tensors) -> bytes:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    metadata = {"logshift": text, "checksum": f"sha256:{digest.hexdigest()}"}
    return safetensors.numpy.save(tensors, metadata)


def inflated(manifest: Manifest, tensors: Tensors) -> None:
    """Store all streams as they are, so that faults can be put into them."""
    for key, weight in weights(manifest).items():
        for name in weight.get("zlib", ()):
            raw = zlib.decompress(tensors[f"{key}.{name}"].tobytes())
            tensors[f"{key}.{name}"] = np.frombuffer(raw, np.uint8).copy()
        weight["zlib"] = []


def weights(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Weight records of all nodes and constants, by what their tensors' names begin with."""
    found = {str(i): node["weight"] for i, node in enumerate(manifest["nodes"]) if "weight" in node}
    words = manifest.get("constant_words", {})
    constants = enumerate(manifest.get("constants", ()))
    return found | {f"constant.{i}": words[n]["weight"] for i, n in constants if n in words}


# --- the faults ---------------------------------------------------------------------------------

FILES: dict[str, tuple[str, str, Callable[[], bytes]]] = {}
SPARSE, DENSE, LOOKUP, POOL, PLAIN = 1, 2, 3, 4, 5  # nodes of `classifier`
SLOPES, GATE, PIECES, MAX = 1, 2, 3, 4  # nodes of `activated`
FEW, WHOLE, GROUPED, DEPTHWISE = 1, 2, 3, 4  # nodes of `tiled`


def fault(
    reason: str, message: str, network: Callable[[], Graph] = classifier
) -> Callable[[Callable[[Manifest, Tensors], Any]], None]:
    """Register a change to the parts of a network; signed afterwards."""

    def register(change: Callable[[Manifest, Tensors], Any]) -> None:
        def make() -> bytes:
            manifest, tensors = take_apart(packed_format.serialize(network()))
            inflated(manifest, tensors)
            text = change(manifest, tensors)
            return sign(text if isinstance(text, str) else json.dumps(manifest), tensors)

        FILES[change.__name__.strip("_")] = reason, message, make

    return register


def bundle_fault(
    reason: str, message: str
) -> Callable[[Callable[[Manifest, Manifest, Tensors], Any]], None]:
    """Register a change to what metadata say, the manifest, and the tensor "data" of version 4.

    What the change returns are the bytes of the tensor "manifest".
    """

    def register(change: Callable[[Manifest, Manifest, Tensors], Any]) -> None:
        def make() -> bytes:
            manifest, tensors = take_apart(packed_format.serialize(bundled()))
            manifest["index"], data = put_together(tensors)
            outer, tensors = {"format_version": 4}, {"data": data}
            if (packed := change(outer, manifest, tensors)) is not None:
                tensors["manifest"] = np.frombuffer(packed, np.uint8)
            return sign_bundle(outer, manifest, tensors)

        FILES[change.__name__.strip("_")] = reason, message, make

    return register


def damage(reason: str, message: str) -> Callable[[Callable[[bytes], bytes]], None]:
    """Register a change to the bytes of `classifier`."""

    def register(change: Callable[[bytes], bytes]) -> None:
        FILES[change.__name__.strip("_")] = (
            reason, message, lambda: change(packed_format.serialize(classifier())),
        )  # fmt: skip

    return register


def weight(manifest: Manifest, index: int) -> dict[str, Any]:
    """Weight record of a node."""
    return manifest["nodes"][index]["weight"]


@damage("no bytes at all", "not a readable safetensors container")
def empty(data):
    return b""


@damage("cut off in the middle of the header", "not a readable safetensors container")
def truncated_header(data):
    return data[:300]


@damage("cut off in the middle of the tensors", "not a readable safetensors container")
def truncated_tensors(data):
    return data[:-100]


@damage("bytes after the last tensor", "not a readable safetensors container")
def trailing_bytes(data):
    return data + bytes(16)


@damage("header length of 2^63 - 1 bytes", "not a readable safetensors container")
def header_length(data):
    return (2**63 - 1).to_bytes(8, "little") + data[8:]


@damage("one bit of a tensor flipped", "checksum")
def flipped_tensor_bit(data):
    return data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]


@damage("one digit of a scale changed", "checksum")
def flipped_manifest_byte(data):
    return data.replace(b'\\"scale\\":0.05', b'\\"scale\\":0.06', 1)


@damage("a checksum of zeros", "checksum")
def bad_checksum(data):
    start = data.index(b"sha256:") + 7
    return data[:start] + b"0" * 64 + data[start + 64 :]


@damage("a safetensors file of something else", "not a .stlq file")
def other_safetensors(data):
    return safetensors.numpy.save({"weight": np.zeros(3, np.float32)})


@fault("the manifest is not JSON", "not strict JSON")
def manifest_not_json(manifest, tensors):
    return json.dumps(manifest)[:-1]


@fault("the manifest is a list", "format_version")
def manifest_a_list(manifest, tensors):
    return "[]"


@fault("4,000 lists in each other, never closed", "not strict JSON")
def deep_nesting(manifest, tensors):
    tensors.clear()
    return "[" * 4_000


@fault("a number that JSON does not have, ignored by many readers", "not strict JSON")
def nan_in_settings(manifest, tensors):
    manifest["settings"] = {"ratio": float("nan")}


@fault("half a surrogate pair in a name", "not strict JSON")
def lone_surrogate(manifest, tensors):
    manifest["nodes"][0]["name"] = "\ud800"


@fault("a version of the future", "install a newer logshift")
def newer_version(manifest, tensors):
    manifest["format_version"] = 99


@fault("tiles of an array in version 4", "by tiles of an array came with 5", tiled)
def tiles_too_early(manifest, tensors):
    manifest["format_version"] = 4


@fault("a fused function in version 2", "activation functions came with 3", activated)
def activation_too_early(manifest, tensors):
    manifest["format_version"] = 2


@fault("constants in version 1", "constants and ONNX operators came with 2", mixed)
def constants_too_early(manifest, tensors):
    manifest["format_version"] = 1


@fault("version 0", "no format_version")
def version_zero(manifest, tensors):
    manifest["format_version"] = 0


@fault("`true` where an integer belongs", "no format_version")
def version_true(manifest, tensors):
    manifest["format_version"] = True


@fault("no list of nodes", "'nodes' is missing")
def nodes_missing(manifest, tensors):
    del manifest["nodes"]


@fault("an empty list of nodes", "belongs to no node")
def no_nodes(manifest, tensors):
    manifest["nodes"] = []


@fault("nodes as an object", "'nodes' must be a list")
def nodes_an_object(manifest, tensors):
    manifest["nodes"] = {}


@fault("a node that is a string", "'op' is missing")
def node_a_string(manifest, tensors):
    manifest["nodes"][0] = "Conv"


@fault("an operator that does not exist", "unknown operator")
def unknown_operator(manifest, tensors):
    manifest["nodes"][0]["op"] = "Exec"


@fault("an attribute that does not exist", "unknown attribute")
def unknown_attribute(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["padding"] = "same"


@fault("two nodes feed each other", "produced by no earlier node")
def cycle(manifest, tensors):
    manifest["nodes"][SPARSE]["inputs"] = ["c"]


@fault("an input that nothing produces", "produced by no earlier node")
def unknown_tensor(manifest, tensors):
    manifest["nodes"][SPARSE]["inputs"] = ["ghost"]


@fault("two nodes produce one tensor", "produced twice")
def produced_twice(manifest, tensors):
    manifest["nodes"][DENSE]["outputs"] = ["a"]


@fault("a node of two outputs", "one output")
def two_outputs(manifest, tensors):
    manifest["nodes"][SPARSE]["outputs"] = ["a", "a2"]


@fault("a pool of two inputs", "inputs, takes")
def too_many_inputs(manifest, tensors):
    manifest["nodes"][4]["inputs"] = ["c", "b"]


@fault("a graph output that nothing produces", "produced by no node")
def unknown_output(manifest, tensors):
    manifest["outputs"][0]["name"] = "ghost"


@fault("a graph output of codes", "holds codes")
def code_output(manifest, tensors):
    manifest["outputs"][0]["name"] = "d"


@fault("a declared output shape that the graph does not produce", "but the graph produces")
def wrong_output_shape(manifest, tensors):
    manifest["outputs"][0] |= {"shape": ["batch", 4], "nominal": [1, 4]}


@fault("an input of negative size", "does not fit")
def negative_dimension(manifest, tensors):
    manifest["inputs"][0] |= {"shape": [1, 2, -6, 6], "nominal": [1, 2, -6, 6]}


@fault("an input of 2^61 elements", "too small or too large")
def enormous_input(manifest, tensors):
    manifest["inputs"][0]["nominal"] = [1, 2, 2**30, 2**30]


@fault("a float32 tensor where codes belong", "must hold float32")
def float_into_conv(manifest, tensors):
    manifest["nodes"][SPARSE]["inputs"] = ["x"]


@fault("scale NaN, written as null", "'scale' must be a number")
def null_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = None


@fault("scale NaN", "not strict JSON")
def nan_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = float("nan")


@fault("scale 0", "scale 0.0 is not in")
def zero_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = 0


@fault("scale 1e999, which parses as infinity", "not strict JSON")
def infinite_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = -5
    return json.dumps(manifest).replace('"scale": -5', '"scale": 1e999')


@fault("scale as an integer of 400 digits", "beyond 64 bits")
def integer_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = 10**400


@fault("scale 1e16, so that ratios of scales may overflow", "is not in (1e-15, 1e15)")
def large_scale(manifest, tensors):
    manifest["tensors"]["a"]["scale"] = 1e16


@fault("codes of 9 bits", "codes have 2 to 8")
def nine_bits(manifest, tensors):
    manifest["tensors"]["a"]["bits"] = 9


@fault("a zero point above the largest code", "is not a code")
def zero_point_too_large(manifest, tensors):
    manifest["tensors"]["a"]["zero_point"] = 256


@fault("quantization of a tensor that does not exist", "unknown tensor")
def quantization_of_nothing(manifest, tensors):
    manifest["tensors"]["ghost"] = manifest["tensors"]["a"]


@fault("pads larger than the kernel", "beyond the kernel's extent")
def huge_pads(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["pads"] = [60000, 0, 0, 0]


@fault("stride 0", "strides")
def zero_stride(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["strides"] = [0, 1]


@fault("dilation of 2^40", "dilations")
def huge_dilation(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["dilations"] = [2**40, 1]


@fault("2^32 phases of a transposed convolution", "strides")
def transposed_strides(manifest, tensors):
    manifest["nodes"][PLAIN] |= {"op": "ConvTranspose", "attributes": {"strides": [65536, 65536]}}


@fault("groups that do not divide the channels", "do not divide into")
def wrong_group(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["group"] = 5


@fault("clamp of a NaN", "not strict JSON")
def nan_clamp(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["clamp"] = [float("nan"), None]


@fault("a clamp bound that is no code", "is not an output code")
def clamp_out_of_range(manifest, tensors):
    manifest["nodes"][SPARSE]["attributes"]["clamp"] = [0, 300]


@fault("a tensor that a node needs is missing", "is missing")
def tensor_missing(manifest, tensors):
    del tensors[f"{SPARSE}.alpha"]


@fault("a tensor that belongs to no node", "belongs to no node")
def tensor_extra(manifest, tensors):
    tensors["payload"] = np.zeros(4, np.uint8)


@fault("bias of type float64", "is float64")
def wrong_dtype(manifest, tensors):
    tensors[f"{SPARSE}.bias"] = tensors[f"{SPARSE}.bias"].astype(np.float64)


@fault("a bias too short", "expected float32 of shape (12,)")
def short_bias(manifest, tensors):
    tensors[f"{SPARSE}.bias"] = tensors[f"{SPARSE}.bias"][:5].copy()


@fault("weights of two dimensions", "must be four positive integers")
def weight_shape_of_two(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [12, 18]


@fault("weights with an empty dimension", "must be four positive integers")
def weight_shape_empty(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [12, 3, 0, 2]


@fault("2^120 weights", "more than a layer can have")
def weight_shape_absurd(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [12, 2**30, 2**30, 2**30]


@fault("more weights than there are bytes", "bytes, expected")
def weight_shape_too_large(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [12, 3, 4, 2]


@fault("weights for other channels than the input has", "its input has")
def wrong_channels(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [12, 3, 2, 3]


@fault("words of 6 bits", "bits is 6")
def weight_bits_six(manifest, tensors):
    weight(manifest, SPARSE)["bits"] = 6


@fault("residual_shift 60", "residual_shift is 60")
def residual_shift_sixty(manifest, tensors):
    weight(manifest, SPARSE)["residual_shift"] = 60


@fault("a tile of 0 weights", "tile is 0")
def tile_zero(manifest, tensors):
    weight(manifest, SPARSE)["tile"] = 0


@fault("a tile of 257 weights, whose positions need 9 bits", "tile is 257")
def tile_too_large(manifest, tensors):
    weight(manifest, SPARSE)["tile"] = 257


@fault("an encoding of positions that does not exist", "unknown encoding")
def unknown_encoding(manifest, tensors):
    weight(manifest, SPARSE)["positions"] = "huffman"


@fault("a first word that is negative zero", "negative zero")
def negative_zero(manifest, tensors):
    tensors[f"{SPARSE}.first"][0] = 0x88


@fault("|W| beyond its bound: both words at their largest", "beyond clip")
def beyond_limit(manifest, tensors):
    weight(manifest, SPARSE)["positions"] = "bitmap"
    tensors[f"{SPARSE}.position"] = np.zeros(27, np.uint8)
    tensors[f"{SPARSE}.position"][0] = 1
    tensors[f"{SPARSE}.second"] = np.array([7], np.uint8)
    tensors[f"{SPARSE}.first"][0] = 0x17
    del tensors[f"{SPARSE}.count"]


@fault("a position outside its tile", "outside a tile")
def position_outside_tile(manifest, tensors):
    weight(manifest, SPARSE)["tile"] = 100
    tensors[f"{SPARSE}.count"] = np.array([4, 0, 0], "<u2").view(np.uint8)
    tensors[f"{SPARSE}.position"] = np.array([1, 2, 3, 100], np.uint8)


@fault("a position beyond the last weight", "beyond the last weight")
def position_beyond_end(manifest, tensors):
    tensors[f"{SPARSE}.position"][-1] = 250


@fault("a position twice", "do not ascend")
def position_twice(manifest, tensors):
    tensors[f"{SPARSE}.position"][1] = tensors[f"{SPARSE}.position"][0]


@fault("counts that do not add up to the positions", "bytes, expected")
def counts_do_not_add_up(manifest, tensors):
    tensors[f"{SPARSE}.count"] = np.array([60000], "<u2").view(np.uint8)


@fault("second words for fewer weights than the bitmap marks", "bytes, expected")
def second_too_short(manifest, tensors):
    tensors[f"{DENSE}.second"] = tensors[f"{DENSE}.second"][:-3].copy()


@fault("stray bits after the last code", "beyond the last value")
def stray_bits(manifest, tensors):
    shape = weight(manifest, PLAIN)["shape"]
    assert shape[0] * shape[3] * 5 % 8
    tensors[f"{PLAIN}.first"][-1] |= 0x80


@fault("alpha negative", "alpha must be finite and positive")
def alpha_negative(manifest, tensors):
    tensors[f"{SPARSE}.alpha"][3] = -1


@fault("alpha NaN", "alpha must be finite and positive")
def alpha_nan(manifest, tensors):
    tensors[f"{SPARSE}.alpha"][3] = np.nan


@fault("alpha so large that results overflow", "absurdly large")
def alpha_absurd(manifest, tensors):
    tensors[f"{SPARSE}.alpha"][3] = 1e38


@fault("bias infinite", "bias must be finite")
def bias_infinite(manifest, tensors):
    tensors[f"{SPARSE}.bias"][0] = np.inf


@fault("a table with values that are no codes of its output", "no output codes")
def table_out_of_range(manifest, tensors):
    manifest["tensors"]["c"]["bits"] = 7


@fault("a table of 255 entries", "expected 256 for each")
def table_too_short(manifest, tensors):
    tensors[f"{LOOKUP}.table"] = tensors[f"{LOOKUP}.table"][:255].copy()


@fault("a table of no entries", "expected 256 for each")
def table_empty(manifest, tensors):
    tensors[f"{LOOKUP}.table"] = tensors[f"{LOOKUP}.table"][:0].copy()


@fault("tables for 5 of 12 channels", "has tables for 5 channels")
def tables_too_few(manifest, tensors):
    tensors[f"{LOOKUP}.table"] = np.tile(tensors[f"{LOOKUP}.table"], 5)


@fault("a channel that does not exist", "takes channel 12")
def gather_beyond_end(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Gather", "attributes": {"indices": [0, 12]}}


@fault("a channel before the first", "indices")
def gather_negative(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Gather", "attributes": {"indices": [0, -1]}}


@fault("no channel at all", "indices")
def gather_nothing(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Gather", "attributes": {"indices": []}}


@fault("a gather of rows", "axis")
def gather_rows(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Gather", "attributes": {"indices": [0], "axis": 2}}


@fault("a gather that changes what codes mean", "quantization of its input")
def gather_requantizes(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Gather", "attributes": {"indices": [0]}}
    manifest["tensors"]["d"]["scale"] = 0.1


@fault("a product of shapes that do not broadcast", "cannot broadcast")
def mul_shapes(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Mul", "inputs": ["c", "x_q"]}


@fault("scales so large that a product overflows", "absurdly large")
def mul_overflow(manifest, tensors):
    manifest["nodes"][POOL] |= {"op": "Mul", "inputs": ["c", "c"]}
    manifest["tensors"]["c"]["scale"], manifest["tensors"]["d"]["scale"] = 1e14, 1e-14


def _deflated(manifest: Manifest, tensors: Tensors, raw: bytes) -> None:
    weight(manifest, SPARSE)["zlib"] = ["first"]
    tensors[f"{SPARSE}.first"] = np.frombuffer(raw, np.uint8)


@fault("a zlib stream that is none", "damaged zlib stream")
def zlib_garbage(manifest, tensors):
    _deflated(manifest, tensors, bytes(range(100)))


@fault("a zlib stream cut off", "does not hold exactly")
def zlib_truncated(manifest, tensors):
    _deflated(manifest, tensors, zlib.compress(tensors[f"{SPARSE}.first"].tobytes(), 9)[:-6])


@fault("a zlib stream with bytes after its end", "does not hold exactly")
def zlib_trailing(manifest, tensors):
    _deflated(manifest, tensors, zlib.compress(tensors[f"{SPARSE}.first"].tobytes(), 9) + b"x")


@fault("a zlib bomb: 1 kB that inflates to 1 MB, where 108 bytes belong", "does not hold exactly")
def zlib_bomb(manifest, tensors):
    _deflated(manifest, tensors, zlib.compress(bytes(2**20), 9))


@fault("2^31 - 1 weights in a 1 kB zlib stream", "cannot inflate")
def zlib_ratio(manifest, tensors):
    weight(manifest, SPARSE)["shape"] = [1, 1, 1, 2**31 - 1]
    tensors[f"{SPARSE}.bias"] = tensors[f"{SPARSE}.bias"][:1].copy()
    _deflated(manifest, tensors, zlib.compress(bytes(2**20), 9))


CODES, WORDS, KEPT, SWISH, TOP_K, SCALE, SOFTMAX = 1, 2, 3, 4, 5, 6, 7  # nodes of `mixed`


@fault("an operator of an unknown domain", "unknown operator of domain", mixed)
def unknown_domain(manifest, tensors):
    manifest["nodes"][SOFTMAX]["domain"] = "com.example"


@fault("an ONNX operator that runs other code", "unknown ONNX operator", mixed)
def onnx_unknown_operator(manifest, tensors):
    manifest["nodes"][SOFTMAX]["op"] = "Loop"


@fault("an ONNX operator on codes", "holds codes", mixed)
def onnx_on_codes(manifest, tensors):
    manifest["nodes"][SOFTMAX]["inputs"] = ["x_q"]


@fault("an ONNX attribute of no known type", "must be a number, a string or a list", mixed)
def onnx_attribute(manifest, tensors):
    manifest["nodes"][SOFTMAX]["attributes"]["axis"] = {"value": 1}


@fault("an ONNX attribute that the operator cannot take", "axis 9 is beyond", mixed)
def onnx_axis(manifest, tensors):
    manifest["nodes"][SOFTMAX]["attributes"]["axis"] = 9


@fault("more outputs than the operator has", "outputs", mixed)
def onnx_outputs(manifest, tensors):
    manifest["nodes"][SOFTMAX]["outputs"] = ["y", "z"]


@fault("an ONNX result of 2^40 elements", "would have the shape", mixed)
def onnx_huge_result(manifest, tensors):
    manifest["nodes"][SCALE] |= {"op": "Tile", "inputs": ["e", "repeats"]}
    manifest["constants"].append("repeats")
    tensors["constant.2"] = np.array([2**10, 2**10, 2**10, 2**10])


@fault("a version of ONNX that does not exist", "opset 99", mixed)
def onnx_opset(manifest, tensors):
    manifest["opset"] = 99


@fault("a constant without its tensor", "is missing", mixed)
def constant_missing(manifest, tensors):
    del tensors["constant.1"]


@fault("two constants of one name", "given twice", mixed)
def constant_twice(manifest, tensors):
    manifest["constants"] = ["k", "k"]


@fault("a constant with the name of an input", "name of another tensor", mixed)
def constant_input(manifest, tensors):
    manifest["constants"] = ["k", "x"]


@fault("float32 weights on codes", "must be words", mixed)
def float_weights_on_codes(manifest, tensors):
    manifest["nodes"][CODES]["weight"] = {"shape": [4, 1, 1, 2], "dtype": "float32"}
    for name in ("first", "second", "count", "position", "alpha"):
        tensors.pop(f"{CODES}.{name}", None)
    tensors[f"{CODES}.weight"] = np.ones(8, np.float32)


@fault("weights of an unknown type", "of dtype 'float8'", mixed)
def weights_of_unknown_type(manifest, tensors):
    manifest["nodes"][KEPT]["weight"]["dtype"] = "float8"


@fault("NaN among float32 weights", "weights must be finite", mixed)
def float_weights_nan(manifest, tensors):
    tensors[f"{KEPT}.weight"][5] = np.nan


@fault("a packed operator on integers", "is int64, not float32", mixed)
def packed_on_integers(manifest, tensors):
    manifest["nodes"][TOP_K]["outputs"] = ["", "e"]
    manifest["nodes"][SCALE] = {"op": "Swish", "name": "s", "inputs": ["e"], "outputs": ["f"]}


@fault("an input of an unknown type", "dtype 'complex64'", mixed)
def unknown_dtype(manifest, tensors):
    manifest["inputs"][0]["dtype"] = "complex64"


@fault("a producer that is no text", "'producer' must be a string")
def producer_a_number(manifest, tensors):
    manifest["producer"] = 1


@fault("an activation function that nobody knows", "unknown activation function 'Swish'", activated)
def activation_unknown(manifest, tensors):
    manifest["nodes"][SLOPES]["activation"]["op"] = "Swish"


@fault("an activation function that is no object", "'activation' must be an object", activated)
def activation_a_string(manifest, tensors):
    manifest["nodes"][SLOPES]["activation"] = "PRelu"


@fault("an activation function of a pool", "takes no activation function", activated)
def activation_of_a_pool(manifest, tensors):
    manifest["nodes"][MAX]["activation"] = manifest["nodes"][GATE]["activation"]


@fault("an activation function of an ONNX operator", "have no fused activation function", mixed)
def activation_of_onnx(manifest, tensors):
    manifest["nodes"][TOP_K]["activation"] = {"op": "HardSwish"}


@fault("an activation function of float32", "only what becomes codes", mixed)
def activation_of_float32(manifest, tensors):
    manifest["nodes"][CODES]["activation"] = {"op": "HardSwish"}


@fault("slopes for three of four channels", "expected (1,) or (4,)", activated)
def slopes_missing(manifest, tensors):
    tensors[f"{SLOPES}.coefficients"] = tensors[f"{SLOPES}.coefficients"][:3]


@fault("a slope that is NaN", "are beyond 1e+15, or not finite", activated)
def slope_nan(manifest, tensors):
    tensors[f"{SLOPES}.coefficients"][2] = np.nan


@fault("coefficients of a function without any", "'2.coefficients' belongs to no node", activated)
def coefficients_of_hard_swish(manifest, tensors):
    tensors[f"{GATE}.coefficients"] = np.zeros(3, np.float32)


@fault("a parabola too few", "expected int16 of shape (48,)", activated)
def piece_missing(manifest, tensors):
    tensors[f"{PIECES}.coefficients"] = tensors[f"{PIECES}.coefficients"][:45]


@fault("parabolas in float32", "expected int16", activated)
def pieces_in_float32(manifest, tensors):
    tensors[f"{PIECES}.coefficients"] = tensors[f"{PIECES}.coefficients"].astype(np.float32)


@fault("a coefficient whose sums overflow", "are beyond 16383", activated)
def piece_too_steep(manifest, tensors):
    tensors[f"{PIECES}.coefficients"][20] = -16384


@fault("a unit of zero", "unit 0.0", activated)
def unit_zero(manifest, tensors):
    manifest["nodes"][GATE]["activation"]["unit"] = 0


@fault("an origin far away", "origin 1e+20", activated)
def origin_far(manifest, tensors):
    manifest["nodes"][GATE]["activation"]["origin"] = 1e20


@fault("a unit so small that sums are beyond float32", "absurdly large", activated)
def unit_tiny(manifest, tensors):
    manifest["nodes"][GATE]["activation"] = {"op": "HardSwish", "unit": 1e-14}
    tensors[f"{GATE}.alpha"][:] = 1e30


@bundle_fault("no index of tensors", "'index' must be an object")
def index_missing(outer, manifest, tensors):
    del manifest["index"]


@bundle_fault(
    "a tensor of the index without its shape", "must have its dtype, first byte and shape"
)
def index_without_shape(outer, manifest, tensors):
    manifest["index"]["1.bias"].pop()


@bundle_fault("a tensor of the index of a type that there is not", "is complex64")
def index_dtype(outer, manifest, tensors):
    manifest["index"]["1.bias"][0] = "complex64"


@bundle_fault("a tensor that begins before the first byte", "positions and sizes")
def index_negative(outer, manifest, tensors):
    manifest["index"]["1.bias"][1] = -4


@bundle_fault("a tensor of no elements and 2^80 rows", "is too large")
def index_shape(outer, manifest, tensors):
    manifest["index"]["1.bias"][2] = [2**40, 2**40, 0]


@bundle_fault("float32 from the second byte on", "is not aligned")
def index_unaligned(outer, manifest, tensors):
    manifest["index"]["1.bias"][1] += 1


@bundle_fault("two tensors that overlap", "overlap or leave gaps")
def index_overlap(outer, manifest, tensors):
    manifest["index"]["1.bias"][1] -= 4


@bundle_fault("a tensor of the index beyond the last byte", "of the index end at byte")
def index_beyond(outer, manifest, tensors):
    tensors["data"] = tensors["data"][:-1]


@bundle_fault("bytes that belong to no tensor", "of the index end at byte")
def index_surplus(outer, manifest, tensors):
    tensors["data"] = np.append(tensors["data"], np.uint8(0))


@bundle_fault("a tensor beside the two of version 4", "version 4 has 'manifest' and 'data'")
def bundle_surplus(outer, manifest, tensors):
    tensors["1.bias"] = np.zeros(4, np.float32)


@bundle_fault("all tensors as float32", "'data' is float32")
def bundle_float(outer, manifest, tensors):
    tensors["data"] = np.zeros(100, np.float32)


@bundle_fault("a manifest of version 3 in a file of version 4", "another format_version")
def inner_version(outer, manifest, tensors):
    manifest["format_version"] = 3


@bundle_fault("a manifest that is a terabyte, as the file says", "must be from 0 to 2^26")
def manifest_terabyte(outer, manifest, tensors):
    outer["manifest_bytes"] = 2**40


@bundle_fault("no size of the manifest", "'manifest_bytes' is null")
def manifest_unsized(outer, manifest, tensors):
    outer["manifest_bytes"] = None


@bundle_fault("a manifest of 2 million spaces in 2 kilobytes", "cannot inflate to")
def manifest_bomb(outer, manifest, tensors):
    outer["manifest_bytes"] = 2**21
    return zlib.compress(b" " * 2**21, 9)


@bundle_fault("a manifest that is longer than the file says", "does not hold exactly")
def manifest_longer(outer, manifest, tensors):
    outer["manifest_bytes"] = 100


@bundle_fault("data of 2 million zeros in 2 kilobytes", "cannot inflate to")
def data_bomb(outer, manifest, tensors):
    outer["data_bytes"] = 2**21
    tensors["data"] = np.frombuffer(zlib.compress(bytes(2**21), 9), np.uint8)


@bundle_fault("data that are shorter than the file says", "does not hold exactly")
def data_shorter(outer, manifest, tensors):
    outer["data_bytes"] = tensors["data"].size + 1
    tensors["data"] = np.frombuffer(zlib.compress(tensors["data"].tobytes()), np.uint8)


@bundle_fault("data of a size that is text", "'data_bytes' is \"100\"")
def data_size_a_string(outer, manifest, tensors):
    outer["data_bytes"] = "100"


@bundle_fault("a manifest that is no zlib stream", "damaged zlib stream")
def manifest_no_stream(outer, manifest, tensors):
    return b"x" * 1000


@bundle_fault("a manifest that is not UTF-8", "not UTF-8")
def manifest_latin(outer, manifest, tensors):
    outer["manifest_bytes"] = 3
    return zlib.compress(b'"\xe4"')


@bundle_fault("a deflated manifest that is not JSON", "not strict JSON")
def manifest_text(outer, manifest, tensors):
    outer["manifest_bytes"] = 3
    return zlib.compress(b"[1,")


@fault("words of a constant that is not there", "which is no constant", bundled)
def words_of_nothing(manifest, tensors):
    manifest["constant_words"]["ghost"] = manifest["constant_words"].pop("table")


@fault("words of a constant without its shape", "'shape' is missing", bundled)
def words_without_shape(manifest, tensors):
    del manifest["constant_words"]["table"]["shape"]


@fault("words of a constant without axes", "shape [] is none", bundled)
def words_of_a_number(manifest, tensors):
    manifest["constant_words"]["table"] |= {"shape": [], "axes": []}


@fault("an axis twice", "axes [1, 1] are not axes", bundled)
def words_axis_twice(manifest, tensors):
    manifest["constant_words"]["matrices"]["axes"] = [1, 1]


@fault("an axis that the constant has not", "axes [3] are not axes", bundled)
def words_axis_beyond(manifest, tensors):
    manifest["constant_words"]["matrices"]["axes"] = [3]


@fault("words for another number of values", "do not make up", bundled)
def words_of_another_shape(manifest, tensors):
    manifest["constant_words"]["table"]["shape"] = [3, 5]


@fault("alpha for other axes", "do not make up", bundled)
def words_of_other_axes(manifest, tensors):
    manifest["constant_words"]["table"]["axes"] = [1]


@fault("an alpha of a constant that is infinite", "alpha must be finite", bundled)
def words_alpha(manifest, tensors):
    tensors["constant.0.alpha"][1] = np.inf


@fault("an alpha of a constant beyond all reason", "absurdly large", bundled)
def words_alpha_large(manifest, tensors):
    tensors["constant.0.alpha"][1] = 1e30


@fault("a constant both of words and as it is", "'constant.2' belongs to no node", bundled)
def words_and_values(manifest, tensors):
    tensors["constant.2"] = np.zeros((3, 4), np.float32)


@fault("words of a constant that end early", "first has 7 bytes, expected 8", bundled)
def words_short(manifest, tensors):
    tensors["constant.2.first"] = tensors["constant.2.first"][:-1]


@fault("a constant that is a negative zero", "negative zero", bundled)
def words_negative_zero(manifest, tensors):
    tensors["constant.2.first"][0] = 16


@fault("tiles of an array with one side", "tiles of an array have two sides", tiled)
def tiles_of_one_side(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = 8


@fault("tiles of an array with three sides", "tile has 3 sides", tiled)
def tiles_of_three_sides(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = [8, 8, 8]


@fault("tiles of no input", "tile is 0", tiled)
def tiles_of_no_input(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = [0, 8]


@fault("tiles of 257 outputs", "tile is 257", tiled)
def tiles_too_large(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = [8, 257]


@fault("tiles with a side that is a fraction", "'tile' must be an integer", tiled)
def tiles_of_a_fraction(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = [8, 7.5]


@fault("a bitmap with tiles of two sides", "has two sides, which", tiled)
def tiles_of_a_bitmap(manifest, tensors):
    weight(manifest, WHOLE)["positions"] = "bitmap"


@fault("a list with tiles of two sides", "has two sides, which")
def tiles_of_a_list(manifest, tensors):
    weight(manifest, SPARSE)["tile"] = [8, 8]


@fault("bits for other tiles", "position has 11 bytes, expected 17", tiled)
def tiles_of_another_size(manifest, tensors):
    weight(manifest, WHOLE)["tile"] = [4, 8]


@fault("a bit behind the last tile", "beyond the last value", tiled)
def tiles_stray_bit(manifest, tensors):
    tensors[f"{WHOLE}.position"][-1] |= 0x80


@fault("second words for fewer weights than tiles have", "second has", tiled)
def tiles_short(manifest, tensors):
    tensors[f"{WHOLE}.second"] = tensors[f"{WHOLE}.second"][:-1].copy()


@fault("second words for more weights than tiles have", "second has", tiled)
def tiles_long(manifest, tensors):
    tensors[f"{DEPTHWISE}.second"] = np.append(tensors[f"{DEPTHWISE}.second"], np.uint8(0))


@fault("a negative zero in a tile", "negative zero", tiled)
def tiles_negative_zero(manifest, tensors):
    tensors[f"{GROUPED}.second"][0] = 0x18


@fault("counts beside tiles", "belongs to no node", tiled)
def tiles_and_counts(manifest, tensors):
    tensors[f"{WHOLE}.count"] = np.zeros(2, np.uint8)


@fault("tiles of groups that are a string", "group is '3', which does not divide", tiled)
def tiles_of_a_string(manifest, tensors):
    manifest["nodes"][GROUPED]["attributes"]["group"] = "3"


@fault("tiles of groups that do not divide the outputs", "group is 4, which", tiled)
def tiles_of_wrong_groups(manifest, tensors):
    manifest["nodes"][GROUPED]["attributes"]["group"] = 4


@fault("tiles of 2^60 groups", "group is 1152921504606846976, which", tiled)
def tiles_of_many_groups(manifest, tensors):
    manifest["nodes"][GROUPED]["attributes"]["group"] = 2**60


def table() -> str:
    """README.md's table of all files."""
    rows = [f"| {name}.stlq | {reason} | {part} |" for name, (reason, part, _) in FILES.items()]
    return "\n".join(["| file | reason | expected in the message |", "| --- | --- | --- |", *rows])


def main() -> None:
    """Write all files and the table."""
    for path in HERE.glob("*.stlq"):
        path.unlink()
    for name, (_, _, make) in FILES.items():
        (HERE / f"{name}.stlq").write_bytes(make())
    readme = HERE / "README.md"
    introduction = readme.read_text(encoding="utf-8").split("| file |")[0]
    readme.write_text(introduction + table() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
