"""The packed file: what goes in comes out, nothing is half written, nothing damaged gets in."""

from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import GRAPHS, build, random_weights
from support.scripts import HOSTILE, make, script
from support.tiles import tile_numbers, tilings

from logshift import runtime
from logshift.converter.encode import encode
from logshift.kernels.errors import FormatError
from logshift.kernels.stlq import codec
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.file import format as packed_format
from logshift.runtime.file.describe import describe
from logshift.runtime.graph import Node

NETWORKS = [make.classifier, make.upscaler, make.mixed, make.bundled, make.tiled]


def hostile_table():
    """Rows (file, reason, message part) of the README."""
    lines = (HOSTILE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return rows[2:]


def assert_same(a, b):
    """Assert that two graphs are equal, arrays included."""
    assert (a.inputs, a.outputs, a.quantization) == (b.inputs, b.outputs, b.quantization)
    assert (a.preprocessing, a.labels, a.settings) == (b.preprocessing, b.labels, b.settings)
    assert (a.opset, a.producer) == (b.opset, b.producer)
    assert list(a.constants) == list(b.constants)
    assert list(a.constant_words) == list(b.constant_words)
    for name, x in a.constants.items():
        assert x.dtype == b.constants[name].dtype and np.array_equal(x, b.constants[name])
    for x, y in zip(a.nodes, b.nodes, strict=True):
        assert x.domain == y.domain
        assert (x.op, x.name, x.inputs, x.outputs) == (y.op, y.name, y.inputs, y.outputs)
        assert x.attributes == y.attributes
        pairs = (x.bias, y.bias), (x.table, y.table), (x.float_weights, y.float_weights)
        for p, q in pairs:
            assert p is q is None or np.array_equal(p, q)
        if x.activation is None:
            assert y.activation is None
        else:
            for key in ("op", "origin", "unit"):
                assert getattr(x.activation, key) == getattr(y.activation, key)
            p, q = x.activation.coefficients, y.activation.coefficients
            assert p.dtype == q.dtype and np.array_equal(p, q)
        if x.weights is None:
            assert y.weights is None
            continue
        for key in ("bits", "residual_shift", "clip"):
            assert getattr(x.weights, key) == getattr(y.weights, key)
        for key in ("first", "second", "alpha"):
            p, q = getattr(x.weights, key), getattr(y.weights, key)
            assert p.dtype == q.dtype and np.array_equal(p, q), key


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.hypothesis
def test_graphs_round_trip(kind):
    @settings(max_examples=40)
    @given(graph=GRAPHS[kind], tile=st.integers(1, 256))
    def check(graph, tile):
        graph.settings["tile"] = tile
        data = packed_format.serialize(graph)
        again = packed_format.deserialize(data)
        assert_same(graph, again)
        assert packed_format.serialize(again) == data

    check()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_graphs_are_copied_and_pickled(network, duplicate):
    data = packed_format.serialize(network())
    for graph in (packed_format.deserialize(data), network()):  # words as stored, and as arrays
        again = duplicate(graph)
        assert_same(graph, again)
        assert packed_format.serialize(again) == data
    stored = packed_format.deserialize(data)
    # Of others the manifest is larger than the file, which deflates it.
    if network not in (make.bundled, make.tiled):
        assert len(pickle.dumps(stored)) < 1.1 * len(data)


@pytest.mark.parametrize("network", NETWORKS)
def test_optional_parts_round_trip(network):
    graph = network()
    graph.settings = {"tile": 100, "note": "ä 漢 😀", "nested": [1, 2.5, None, {"a": True}]}
    graph.labels = ["chat", "犬", 'a "quoted" one\n']
    graph.producer = "logshift 0.1.0"
    assert_same(graph, packed_format.deserialize(packed_format.serialize(graph)))


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.02, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_every_encoding_round_trips_and_the_smaller_is_taken(bits, ratio):
    graph = make.classifier()
    w = np.random.default_rng(1).standard_normal((12, 3, 3, 2)).astype(np.float32)
    graph.nodes[make.SPARSE].weights = encode(w, bits, ratio)
    data = packed_format.serialize(graph)
    assert_same(graph, packed_format.deserialize(data))
    encoding = make.take_apart(data)[0]["nodes"][make.SPARSE]["weight"]["positions"]
    selected = np.count_nonzero(graph.nodes[make.SPARSE].weights.second)
    assert encoding == ("none" if selected == 0 else "list" if selected <= 20 else "bitmap")


@pytest.mark.parametrize("bits", range(codec.MIN_BITS, codec.MAX_BITS + 1))
@pytest.mark.parametrize("shift", [0, 1, codec.MAX_RESIDUAL_SHIFT])
@pytest.mark.parametrize("ratio", [0, 0.02, 0.9])
def test_streams_decode_to_the_integers_of_their_words(bits, shift, ratio):
    rng = np.random.default_rng(bits)
    for shape in ((5, 3, 3, 7), (1, 1, 1, 1), (16, 1, 1, 1031)):
        weights = random_weights(rng, shape, bits, ratio, shift)
        graph = conv_of(weights)
        stored = packed_format.deserialize(packed_format.serialize(graph)).nodes[0].weights
        for again in (stored, stored.words()):
            assert np.array_equal(again.integers(), weights.integers())
            assert again.integers().dtype == weights.integers().dtype
            assert np.array_equal(again.sums(), weights.sums())
            assert (again.largest, again.nzr) == (weights.largest, weights.nzr)


def conv_of(weights, group=1, **settings):
    """Return a graph of one convolution of float32 with quantized weights."""
    o, kh, kw, c = weights.shape
    node = Node("Conv", "c", ["x"], ["y"], {"group": group}, weights, np.zeros(o, np.float32))
    return build([node], {}, {"x": (1, c * group, kh, kw)}, "y", settings)


def bits_of(stream, width, count):
    """Values of a stream, one after the other, as the format has them."""
    number = int.from_bytes(stream.tobytes(), "little")
    return [number >> i * width & (1 << width) - 1 for i in range(count)]


@given(
    case=tilings(), bits=st.integers(codec.MIN_BITS, codec.MAX_BITS),
    share=st.sampled_from([0.0, 0.1, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_tiles_of_an_array_round_trip(case, bits, share, seed):
    """Stored by tiles only where that is smallest: then bits and words are as the twin's."""
    shape, tile, group = case
    rng, numbers = np.random.default_rng(seed), tile_numbers(*case)
    chosen = rng.random(numbers.max() + 1) < share
    second = np.where(chosen[numbers], rng.integers(0, 2 ** (bits - 1), shape), 0)
    first = np.zeros(shape, np.uint8)
    alpha = np.ones(shape[0], np.float32)
    weights = LogWeights(first, second.astype(np.uint8), alpha, bits, clip=2, tile=tile)
    graph = conv_of(weights, group)
    data = packed_format.serialize(graph)
    manifest, tensors = make.take_apart(data)
    make.inflated(manifest, tensors)
    record = manifest["nodes"][0]["weight"]
    is_tiled = record["positions"] == "tiles"
    assert record["tile"] == (list(tile) if is_tiled else 256)
    assert (manifest["format_version"] == 5) == is_tiled
    if is_tiled:
        used = np.unique(numbers[second != 0])
        assert bits_of(tensors["0.position"], 1, numbers.max() + 1) == [
            int(number in used) for number in range(numbers.max() + 1)
        ]
        inside = second.ravel()[np.isin(numbers.ravel(), used)]
        assert bits_of(tensors["0.second"], bits, inside.size) == inside.tolist()
    again = packed_format.deserialize(data)
    assert_same(graph, again)
    stored = again.nodes[0].weights
    assert stored.tile == (tile if is_tiled else None) and stored.nzr == weights.nzr
    assert np.array_equal(stored.integers(), weights.integers())
    assert packed_format.serialize(again) == data
    plain = packed_format.serialize(conv_of(replace(weights, tile=None), group))
    assert sizes_of(data) <= sizes_of(plain) and (is_tiled or data == plain)


def sizes_of(data):
    """Bytes of all streams of a file."""
    return sum(array.size for array in make.take_apart(data)[1].values() if array.dtype == np.uint8)


def test_tiles_of_other_groups_are_packed_anew():
    """Bits are those of the node, whatever file the words come from."""
    graph = make.tiled()
    again = packed_format.deserialize(packed_format.serialize(graph))
    whole, grouped = (again.nodes[index].weights for index in (make.WHOLE, make.GROUPED))
    assert (whole.streams.group, grouped.streams.group) == (1, 3)
    o, kh, kw, c = grouped.shape
    dense = conv_of(grouped)
    data = packed_format.serialize(dense)
    assert_same(dense, packed_format.deserialize(data))
    assert np.array_equal(
        packed_format.deserialize(data).nodes[0].weights.words().second, grouped.second
    )


def test_words_of_nodes_of_other_groups_are_stored_for_each():
    words = encode(np.random.default_rng(0).uniform(-1, 1, (12, 3, 3, 6)), 4, 0.2,
                   granularity="tile", tile=(4, 8))  # fmt: skip
    nodes = [
        Node("Conv", "first", ["x"], ["y"], {"group": 2, "pads": [1, 1, 1, 1]}, words),
        Node("Conv", "again", ["y"], ["z"], {"group": 2, "pads": [1, 1, 1, 1]}, words),
        Node("Conv", "other", ["v"], ["w"], {"group": 3, "pads": [1, 1, 1, 1]}, words),
    ]
    for node in nodes:
        node.bias = np.zeros(12, np.float32)
    nodes.append(Node("Concat", "join", ["z", "w"], ["out"]))
    graph = build(nodes, {}, {"x": (1, 12, 5, 5), "v": (1, 18, 5, 5)}, "out")
    again = packed_format.deserialize(packed_format.serialize(graph))
    assert_same(graph, again)
    first, second, other = (node.weights for node in again.nodes[:3])
    assert first is second and other is not first
    assert [w.streams.positions for w in (first, other)] == ["tiles", "tiles"]
    assert np.array_equal(first.integers(), other.integers())


def test_info_of_tiles(tmp_path):
    path, graph = tmp_path / "net.stlq", make.tiled()
    packed_format.write(graph, path)
    record = describe(path)
    for node, described in zip(graph.nodes, record["nodes"], strict=True):
        if node.weights is None:
            assert "tiles" not in described
            continue
        numbers = tile_numbers(node.weights.shape, node.weights.tile, node.attributes["group"])
        used = set(numbers[node.weights.second != 0])
        assert described["tile"] == list(node.weights.tile)
        assert described["tiles"] == len(used) / (numbers.max() + 1)
        assert described["nzr"] == pytest.approx(node.weights.nzr) and node.weights.nzr > 0


def test_settings_of_a_file_may_have_any_tile():
    w = np.random.default_rng(1).standard_normal((12, 3, 3, 2)).astype(np.float32)
    for tile in ([16, 16], None, "x", True, {"a": 1}):
        graph = conv_of(encode(w, 4, 0.02), granularity="tile", tile=tile)
        data = packed_format.serialize(graph)
        assert make.take_apart(data)[0]["nodes"][0]["weight"]["tile"] == 256
        assert_same(graph, packed_format.deserialize(data))


def test_load_decodes_every_stream_once_and_keeps_nothing_decoded(tmp_path, monkeypatch):
    path = tmp_path / "net.stlq"
    packed_format.write(make.classifier(), path)
    inflated = []
    unpacked = packed_format.weights.Streams._unpacked
    monkeypatch.setattr(
        packed_format.weights.Streams, "_unpacked",
        lambda self: inflated.append(self.where) or unpacked(self),
    )  # fmt: skip
    session = runtime.load(path, threads=2)
    nodes = [node for node in session.graph.nodes if node.weights is not None]
    assert len(inflated) == len(set(inflated)) == len(nodes)
    assert all(node.weights._integers is None for node in nodes)
    # Whoever only reads a file keeps nothing but the streams.
    nodes = [n for n in packed_format.read(path).nodes if n.weights is not None]
    assert all(node.weights._integers is None for node in nodes)


@pytest.mark.parametrize("threads", [1, 4])
def test_of_several_faults_the_first_nodes_is_told(threads, monkeypatch):
    data = packed_format.serialize(make.classifier())
    integers = packed_format.weights.Streams.integers

    def fails(self):
        integers(self)
        raise FormatError(f"fault in {self.where}")

    monkeypatch.setattr(packed_format.weights.Streams, "integers", fails)
    names = [n.name for n in make.classifier().nodes if n.weights is not None]
    with pytest.raises(FormatError, match=f"fault in node {names[0]!r}"):
        packed_format.deserialize(data, threads=threads)


def test_streams_are_deflated_where_that_is_smaller():
    graph = make.classifier()
    w = np.random.default_rng(1).standard_normal((12, 3, 3, 2)) * 0
    w[0, 0, 0, 0] = 1
    graph.nodes[make.SPARSE].weights = encode(w, 4, 0.0)
    data = packed_format.serialize(graph)
    assert make.take_apart(data)[0]["nodes"][make.SPARSE]["weight"]["zlib"] == ["first"]
    assert_same(graph, packed_format.deserialize(data))


def test_degenerate_weights_stay_readable():
    """A layer of equal weights would deflate 1000 times, more than a reader accepts."""
    graph = make.classifier()
    same = encode(np.ones((12, 64, 64, 12)), 4, 0.0)
    graph.nodes[make.DENSE].weights = same
    graph.nodes[make.DENSE].attributes["pads"] = [32, 32, 31, 31]
    data = packed_format.serialize(graph)
    assert len(data) < 200_000
    assert_same(graph, packed_format.deserialize(data))


# --- files --------------------------------------------------------------------------------------


def test_files_round_trip_and_tell_their_manifest(tmp_path):
    path = tmp_path / "net.stlq"
    size = packed_format.write(make.classifier(), path)
    assert path.stat().st_size == size
    assert_same(make.classifier(), packed_format.read(path))
    manifest = packed_format.read_manifest(path)
    assert manifest == make.take_apart(path.read_bytes())[0]
    assert [p.name for p in tmp_path.iterdir()] == ["net.stlq"]


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="permissions are POSIX's")
def test_new_files_have_ordinary_permissions(tmp_path):
    packed_format.write(make.classifier(), tmp_path / "net.stlq")
    (tmp_path / "other").write_bytes(b"")
    modes = [(tmp_path / name).stat().st_mode for name in ("net.stlq", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, function):
    path = tmp_path / "net.stlq"
    packed_format.write(make.classifier(), path)
    old = path.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="no space"):
        packed_format.write(make.upscaler(), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["net.stlq"]


def test_an_invalid_graph_is_not_written(tmp_path):
    graph = make.classifier()
    graph.nodes[make.SPARSE].inputs = ["ghost"]
    with pytest.raises(FormatError, match="ghost"):
        packed_format.write(graph, tmp_path / "net.stlq")
    assert not list(tmp_path.iterdir())


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "net.stlq"
    path.write_bytes(b"not a packed file")
    for read in (packed_format.read, packed_format.read_manifest):
        with pytest.raises(FormatError, match="net.stlq"):
            read(path)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "ghost.stlq")


def test_the_manifest_is_read_without_the_weights(tmp_path):
    """A file cut off behind its header still tells what it holds; loading it fails."""
    data = packed_format.serialize(make.classifier())
    path = tmp_path / "net.stlq"
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert packed_format.read_manifest(path)["format_version"] == 2
    with pytest.raises(FormatError, match="container"):
        packed_format.read(path)


def test_unknown_keys_of_later_writers_are_ignored():
    manifest, tensors = make.take_apart(packed_format.serialize(make.classifier()))
    manifest["comment"] = manifest["nodes"][make.SPARSE]["weight"]["comment"] = "new"
    assert_same(
        make.classifier(), packed_format.deserialize(make.sign(json.dumps(manifest), tensors))
    )


def test_the_version_is_the_lowest_that_knows_what_there_is():
    for network, version in (
        (make.classifier, 2), (make.mixed, 2), (make.activated, 3), (make.bundled, 4),
        (make.tiled, 5),
    ):  # fmt: skip
        manifest, _ = make.take_apart(packed_format.serialize(network()))
        assert manifest["format_version"] == version


def test_a_file_is_bundled_where_that_makes_it_notably_smaller(tmp_path):
    """Long names, which a small network has nothing to set against, and weights of many nodes."""
    words = random_weights(np.random.default_rng(0), (8, 1, 1, 8), 4, 0.2, 0)
    many = [
        Node("Conv", f"node {i}", [f"t{i}" if i else "x"], [f"t{i + 1}"], {}, words)
        for i in range(40)
    ]
    for node in many:
        node.bias = np.zeros(8, np.float32)
    graph = build(many, {}, {"x": (1, 8, 5, 5)}, "t40")
    path = tmp_path / "net.stlq"
    packed_format.write(graph, path)
    manifest = packed_format.read_manifest(path)
    assert manifest["format_version"] == 4 and len(manifest["nodes"]) == 40
    assert path.stat().st_size < 2200
    again = packed_format.read(path)
    assert_same(graph, again)
    assert all(node.weights is again.nodes[0].weights for node in again.nodes)
    sizes = [node["bytes"] for node in describe(path)["nodes"]]
    assert sizes[0] > 0 and sum(sizes[1:]) == 0


def test_constants_of_words_are_the_values_of_these():
    graph = make.bundled()
    again = packed_format.deserialize(packed_format.serialize(graph))
    assert again.constant_words.keys() == {"matrices", "table"}
    for found in (graph, again):
        words = found.constant_words[
            "matrices"
        ]  # rows in the order of the last axis and of the second
        w = words.weights.values().reshape(4, 4, 4)
        assert np.array_equal(found.constants["matrices"], w.transpose(2, 1, 0))
        assert found.constants["matrices"].dtype == np.float32


def test_words_of_several_nodes_are_decoded_once(monkeypatch):
    data = packed_format.serialize(make.bundled())
    decoded = []
    integers = packed_format.weights.Streams.integers
    monkeypatch.setattr(
        packed_format.weights.Streams, "integers",
        lambda self: decoded.append(self.where) or integers(self),
    )  # fmt: skip
    graph = packed_format.deserialize(data, keep_decoded=True)
    session = runtime.Session(graph, kernels="portable")
    assert sorted(decoded) == [
        "constant 'matrices'", "constant 'table'", "node 'again' (Conv)", "node 'first' (Conv)"
    ]  # fmt: skip
    weights = [node.weights for node in session.graph.nodes if node.weights is not None]
    assert all(w._integers is None for w in weights)
    again, and_again = (session._planner.convolutions[index][0].packed.fields for index in (2, 3))
    assert again["weights"] is and_again["weights"] and again["b"] is not and_again["b"]


def test_nodes_share_no_attributes():
    manifest, tensors = make.take_apart(packed_format.serialize(make.classifier()))
    for record in manifest["nodes"]:
        if record["op"] in ("QuantizeLinear", "Lookup"):
            assert "attributes" not in record
    graph = packed_format.deserialize(make.sign(json.dumps(manifest), tensors))
    empty = [node.attributes for node in graph.nodes if not node.attributes]
    assert len(empty) > 1 and len({id(attributes) for attributes in empty}) == len(empty)


@pytest.mark.parametrize("field", ["op", "name", "inputs", "outputs"])
def test_a_missing_field_is_named(field):
    manifest, tensors = make.take_apart(packed_format.serialize(make.classifier()))
    del manifest["nodes"][2][field]
    with pytest.raises(FormatError, match=f"node 2: '{field}' is missing"):
        packed_format.deserialize(make.sign(json.dumps(manifest), tensors))


# --- what must be refused -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason", "message"), hostile_table())
def test_hostile_file_is_refused(name, reason, message):
    with pytest.raises(FormatError) as caught:
        packed_format.read(HOSTILE / name)
    assert message in str(caught.value)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    try:
        packed_format.read_manifest(HOSTILE / name)
    except FormatError:
        pass


def test_hostile_table_and_directory_agree():
    files = {path.name for path in HOSTILE.glob("*.stlq")}
    assert files == {name for name, *_ in hostile_table()}
    assert files == {f"{name}.stlq" for name in make.FILES}
    assert make.table() in (HOSTILE / "README.md").read_text(encoding="utf-8")
    assert max((HOSTILE / name).stat().st_size for name in files) < 5000


@pytest.mark.parametrize("network", NETWORKS)
def test_every_flipped_byte_is_found(network):
    data = packed_format.serialize(network())
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(FormatError):
            packed_format.deserialize(bytes(damaged))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_truncation_is_found(network):
    data = packed_format.serialize(network())
    for size in range(0, len(data), 11):
        with pytest.raises(FormatError):
            packed_format.deserialize(data[:size])


def test_fuzzing_finds_only_format_errors(repository):
    fuzz = script(repository / "benchmarks" / "fuzz_format.py")
    outcome = fuzz.run(count=3000, seed=1)
    assert outcome.rejected > 1000 and outcome.ran > 100
