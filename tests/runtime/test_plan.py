"""Memory plan: what is in use at the same time lies apart, borders hold, garbage is harmless."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import build, random_inputs, random_weights

from logshift.kernels import registry
from logshift.kernels.machine.memory import (
    ALIGNMENT,
    Block,
    Shelf,
    aligned,
    arena,
    arrange,
)
from logshift.kernels.registry import FAMILIES
from logshift.runtime import Session
from logshift.runtime.graph import Graph, Node, Quantization, ValueInfo
from logshift.runtime.infer import infer
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.onnx_ops import shapes as onnx_shapes
from logshift.runtime.plan import place, planner, prepare, program
from logshift.runtime.validate import validate

BLOCKS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)).map(
        lambda t: Block(t[0] * ALIGNMENT, min(t[1:]), max(t[1:]))
    ),
    max_size=20,
)


def live_bytes(blocks):
    """Most bytes that are in use at once."""
    return max(sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(10))


def have_bytes_in_common(a, b):
    return a.offset < b.offset + b.size and b.offset < a.offset + a.size


@given(blocks=BLOCKS)
def test_blocks_in_use_at_once_lie_apart(blocks):
    total = arrange(blocks)
    assert live_bytes(blocks) <= total <= sum(b.size for b in blocks)
    for i, a in enumerate(blocks):
        assert a.offset % ALIGNMENT == 0 and 0 <= a.offset <= total - a.size
        for b in blocks[:i]:
            in_use_at_once = a.first <= b.last and b.first <= a.last
            assert not (have_bytes_in_common(a, b) and in_use_at_once)
        assert a.shared == any(have_bytes_in_common(a, b) for b in blocks if b is not a)


def test_a_freed_place_is_used_again():
    blocks = [Block(640, 0, 1), Block(640, 1, 2), Block(640, 2, 3), Block(64, 0, 3)]
    assert arrange(blocks) == 640 + 640 + 64
    assert blocks[0].offset == blocks[2].offset


def chain(size=9, zero_points=(3, 0, 250, 7, 114, 9)):
    """Convolutions of several sizes of border, a residual, and tensors without any border."""
    rng = np.random.default_rng(5)
    kernels = [3, 1, 5, 3, 3]
    q = {f"t{i}": Quantization(0.3, z, 8) for i, z in enumerate(zero_points)}
    nodes = [Node("QuantizeLinear", "q", ["input"], ["t0"])]
    for i, k in enumerate(kernels):
        inputs = [f"t{i}", "t1"] if i == 3 else [f"t{i}"]
        nodes.append(
            Node("Conv", f"c{i}", inputs, [f"t{i + 1}"], {"pads": [k // 2] * 4},
                 random_weights(rng, (8, k, k, 8), 4, 0.15, 0))
        )  # fmt: skip
    nodes.append(Node("DequantizeLinear", "d", [f"t{len(kernels)}"], ["out"]))
    return build(nodes, q, {"input": (2, 8, size, size)}, "out")


def joined(size=9):
    """Concats, one in another, of convolutions of several quantizations, of pools and slices."""
    rng = np.random.default_rng(6)
    q = {name: Quantization(0.3, 7, 8) for name in ("x", "a", "b", "pooled", "inner", "y")}
    q |= {"c": Quantization(0.2, 3, 8), "d": Quantization(0.1, 0, 8), "whole": q["x"]}
    q |= {"upper": q["c"], "other": Quantization(0.25, 90, 8), "table": Quantization(0.4, 9, 8)}

    def conv(x, y, kernel, channels):
        weights = random_weights(rng, (12, kernel, kernel, channels), 4, 0.15, 0)
        return Node("Conv", y, [x], [y], {"pads": [kernel // 2] * 4}, weights)

    upper = {"axes": [1, 3], "starts": [5, 0], "ends": [12, 99], "steps": [2, 1]}
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        conv("x", "a", 3, 8),  # as it is
        conv("x", "b", 1, 8),  # read by somebody else too
        conv("x", "c", 3, 8),  # only a slice of it
        conv("b", "d", 1, 12),  # and looked up, and requantized
        Node("Lookup", "l", ["d"], ["table"], table=np.arange(256, dtype=np.uint8)[::-1].copy()),
        Node("MaxPool", "p", ["x"], ["pooled"], {"kernel_shape": [3, 3], "pads": [1] * 4}),
        Node("Slice", "s", ["c"], ["upper"], upper),
        Node("Concat", "i", ["upper", "a", "table"], ["inner"], {"axis": 1}),
        conv("x", "other", 1, 8),
        Node("Concat", "w", ["b", "inner", "pooled", "other"], ["whole"], {"axis": 1}),
        conv("whole", "y", 5, 12 + 28 + 8 + 12),
        Node("DequantizeLinear", "e", ["y"], ["out"]),
    ]
    return build(nodes, q, {"input": (2, 8, size, size)}, "out")


# All borders are written at every run, none is, and both.
SMALL = [0, 2400, 2**30]


@pytest.mark.parametrize("network", [chain, joined])
@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_do_not_depend_on_what_memory_held(network, small, threads, monkeypatch):
    graph = network()
    first, second = random_inputs(graph, 1), random_inputs(graph, 2)
    expected = [Session(graph, threads=1, kernels="reference").run(x) for x in (first, second)]

    def poisoned(shape, dtype):
        array = aligned(shape, dtype)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(program, "aligned", poisoned)
    monkeypatch.setattr(place, "arena", lambda size: poisoned((size,), np.uint8))
    monkeypatch.setattr(place, "_SMALL", small)
    session = Session(graph, threads=threads)
    for x, y in ((first, 0), (second, 1), (second, 1), (first, 0)):
        assert np.array_equal(session.run(x), expected[y])


@pytest.mark.parametrize("small", SMALL)
def test_an_arena_is_as_large_as_it_has_to_be(small, monkeypatch):
    monkeypatch.setattr(place, "_SMALL", small)
    session = Session(chain(), threads=1)
    x = session._arrays(random_inputs(session.graph))
    sizes = [8 * 2 * (9 + 2 * border) ** 2 for border in (1, 0, 2, 1, 1, 0)]
    lower = max(sizes[1] + sizes[2] + sizes[3], sizes[1] + sizes[3] + sizes[4])
    kept_apart = session._plan(x, keep_all=True).nbytes
    assert lower <= session._plan(x).nbytes <= kept_apart
    if small == 0:
        assert session._plan(x).nbytes < lower + 4 * ALIGNMENT


def test_a_border_is_written_at_every_run_only_where_others_use_its_bytes(monkeypatch):
    def fills(small):
        monkeypatch.setattr(place, "_SMALL", small)
        session = Session(chain(), threads=1)
        steps = session._plan(session._arrays(random_inputs(session.graph))).steps
        return sum(step.kernel.op == "fill" for step in steps)

    assert fills(0) > 0
    assert fills(2**30) == 0


def ends_in_floats():
    """A convolution to float32, which is read channels last and is an output as well."""
    rng = np.random.default_rng(7)
    q = {"x": Quantization(0.3, 7, 8)}
    weights = random_weights(rng, (5, 3, 3, 4), 4, 0.15, 0)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("Conv", "c", ["x"], ["f"], {"pads": [1] * 4}, weights),
        Node("GlobalAveragePool", "p", ["f"], ["pooled"]),
        Node("Flatten", "n", ["pooled"], ["flat"]),
    ]
    graph = build(nodes, q, {"input": (2, 4, 5, 6)}, "f")
    graph.outputs += [
        ValueInfo("flat", (2, 5), (2, 5)),
        ValueInfo("pooled", (2, 5, 1, 1), (2, 5, 1, 1)),
    ]
    return graph


@pytest.mark.parametrize("cached", [0, 4000, 2**30])
@pytest.mark.parametrize("make", [chain, joined, ends_in_floats])
def test_a_batch_may_be_cut_into_groups(make, cached, monkeypatch):
    graph = make()
    for infos in (graph.inputs, graph.outputs):
        infos[:] = [dataclasses.replace(i, shape=("N", *i.shape[1:])) for i in infos]
    validate(graph)
    (info,) = graph.inputs
    monkeypatch.setattr(planner, "_CACHED", cached)
    session, reference = Session(graph, threads=2), Session(graph, threads=1, kernels="reference")
    found = set()
    for batch in (1, 6, 7):
        x = np.random.default_rng(batch).normal(0, 30, (batch, *info.shape[1:])).astype(np.float32)
        plan = session._plan(session._arrays(x))
        found.add(len(plan.program) // len(plan.steps))
        expected = reference.trace_codes(x)
        for _ in range(2):
            y = session.run(x)
            for name, value in y.items() if isinstance(y, dict) else [(graph.outputs[0].name, y)]:
                np.testing.assert_array_equal(value, expected[name])
        assert len(session.profile(x, 1)) == len({s.node.name for s in plan.steps})
    assert (1 in found) and (cached == 2**30) == (max(found) == 1)
    assert cached != 0 or found == {1, 6, 7}


def of_any_size(graph):
    """Let the pictures of a graph have any size."""
    (info,) = graph.inputs
    (output,) = graph.outputs
    graph.inputs = [dataclasses.replace(info, shape=("n", info.shape[1], "h", "w"))]
    graph.outputs = [dataclasses.replace(output, shape=("n", output.shape[1], "oh", "ow"))]
    return graph


@pytest.mark.parametrize("network", [chain, joined])
@pytest.mark.parametrize("small", SMALL)
def test_a_session_gives_for_every_size_what_a_new_one_gives(network, small, monkeypatch):
    monkeypatch.setattr(place, "_SMALL", small)
    graph = of_any_size(network())
    session = Session(graph, threads=2)
    rng = np.random.default_rng(3)
    for n, h, w in [(1, 9, 9), (2, 5, 31), (1, 31, 5), (3, 1, 1), (1, 9, 9), (1, 64, 40)]:
        x = rng.standard_normal((n, 8, h, w)).astype(np.float32)
        slow = Session(graph, threads=1, kernels="reference")
        assert np.array_equal(session.run(x), slow.run(x))
        fresh = Session(graph, threads=1)
        plans = [s._plan({"input": x}) for s in (session, fresh)]
        assert plans[0].shapes == plans[1].shapes and plans[0].nbytes == plans[1].nbytes


@pytest.mark.parametrize("kernels", FAMILIES)
def test_parts_of_a_concat_are_written_where_it_would_bring_them(kernels):
    graph = joined()
    session = Session(graph, threads=1, kernels=kernels)
    x = random_inputs(graph)
    plans = [session._plan(session._arrays(x), keep_all) for keep_all in (False, True)]
    copied = [[step.node.name for step in plan.steps if step.kernel.op == "copy"] for plan in plans]
    looks_up = all(conv.kernel.looks_up for (conv,) in session._planner.convolutions.values())
    # Only convolutions that look codes up can bring them to another quantization.
    assert copied[0] == (["i", "w"] if looks_up else ["l", "i", "i", "w", "w"])
    assert copied[1] == ["l", "s", "i", "i", "i", "w", "w", "w", "w"]
    assert plans[0].nbytes < plans[1].nbytes
    assert np.array_equal(session.run(x), session.trace(x)["out"])


def test_a_new_size_uses_what_the_first_one_made(monkeypatch):
    session = Session(of_any_size(chain()), threads=1)
    session._plan({"input": np.zeros((1, 8, 9, 9), np.float32)})
    (schedule,) = session._planner._schedules.values()
    templates = dict(schedule.templates)
    monkeypatch.setattr(planner, "kernel", None)  # that would be called to choose one
    for size in (3, 17, 80):
        other = session._plan({"input": np.zeros((1, 8, size, size), np.float32)})
        assert other._schedule is schedule
    assert all(schedule.templates[conv] is kept for conv, kept in templates.items())
    assert len(schedule.templates) == len(templates) == 5


def test_reads_within_a_row_are_shared_by_all_sizes():
    session = Session(of_any_size(chain()), threads=1, kernels="dot")
    if not any(c.kernel.family == "dot" for (c,) in session._planner.convolutions.values()):
        pytest.skip("needs a machine with products of bytes")
    plans = [session._plan({"input": np.zeros((1, 8, s, s), np.float32)}) for s in (9, 10)]
    kept = [{id(array) for array in p._keep} for p in plans]
    (pointwise,) = (
        c for (c,) in session._planner.convolutions.values() if c.layer.weights.shape[1] == 1
    )
    assert kept[0] & kept[1] == {id(vars(pointwise.packed)["_kept"])}


def test_shapes_of_onnx_operators_are_inferred_by_rules_that_proved_right(monkeypatch):
    def onnx(op, inputs, output, **attributes):
        return Node(op, output, inputs, [output], attributes, domain="ai.onnx")

    nodes = [
        onnx("ReduceMean", ["x"], "mean", axes=[-1], keepdims=1),
        onnx("Sub", ["x", "mean"], "centred"),
        onnx("Transpose", ["centred"], "turned", perm=[0, 1, 3, 2]),
        onnx("MatMul", ["centred", "turned"], "product"),
        onnx("Softmax", ["product"], "share", axis=-1),
        onnx("ReduceMax", ["share"], "largest", axes=[2, 3], keepdims=0),
        onnx("Unsqueeze", ["largest", "axes"], "tall"),
        onnx("Squeeze", ["tall", "axes"], "y"),
    ]
    graph = Graph(
        [ValueInfo("x", ("n", 3, "h", "w"), (1, 3, 4, 5))], [ValueInfo("y", ("n", 3), (1, 3))],
        {}, nodes, constants={"axes": np.array([2])}, opset=13,
    )  # fmt: skip
    validate(graph)
    shapes = [(1, 3, 4, 5), (2, 3, 7, 1), (1, 3, 1, 9)]
    expected = [infer(graph, {"x": shape}) for shape in shapes]
    seen = {}
    infer(graph, {"x": shapes[0]}, seen)
    assert sorted(seen) == list(range(len(nodes))) and None not in seen.values()
    monkeypatch.setattr(numpy_ops, "compute", None)  # nothing is run on zeros any more
    for shape, found in zip(shapes, expected, strict=True):
        again = infer(graph, {"x": shape}, seen)
        assert (again.shapes, again.dtypes) == (found.shapes, found.dtypes)


def test_a_rule_that_does_not_hold_is_not_used(monkeypatch):
    node = Node("Softmax", "s", ["x"], ["y"], {}, domain="ai.onnx")
    graph = Graph(
        [ValueInfo("x", ("n", 3), (1, 3))], [ValueInfo("y", ("n", 3), (1, 3))], {}, [node]
    )
    monkeypatch.setitem(onnx_shapes.RULES, "Softmax", lambda *_: (7,))
    seen = {}
    for n in (1, 2):
        assert infer(graph, {"x": (n, 3)}, seen).shapes["y"] == (n, 3)
    assert seen == {0: None}


def test_large_arenas_are_private_pages_that_are_let_go():
    small, large = arena(100), arena(2**22)
    assert small.nbytes == 100 and large.nbytes == 2**22
    for array in (small, large):
        assert array.ctypes.data % ALIGNMENT == 0
        array[:] = 1
    region = weakref.ref(large.base.base if large.base.base is not None else large.base)
    del large, array
    assert region() is None
    with pytest.raises(MemoryError):
        arena(2**60)


@given(sizes=st.lists(st.sampled_from([0, 1, 63, 64, 5000, 2**20, 2**22, 5 * 2**20]), max_size=8))
def test_arrays_on_a_shelf_lie_apart_and_are_let_go_with_it(sizes):
    shelf = Shelf()
    arrays = [np.arange(size, dtype=np.int64).astype(np.uint8) for size in sizes]
    kept = [shelf.keep(array) for array in arrays]
    assert all(np.array_equal(*pair) for pair in zip(arrays, kept, strict=True))
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in kept)
    shape = shelf.keep(np.ones((3, 5), np.float32))
    assert shape.shape == (3, 5) and shape.dtype == np.float32 and (shape == 1).all()
    assert all(np.array_equal(*pair) for pair in zip(arrays, kept, strict=True))
    region = weakref.ref(shape.base.base)
    del shelf, kept, shape
    assert region() is None


def test_weights_of_a_large_network_lie_side_by_side(monkeypatch):
    graph = chain()
    for many in (0, 2**30):
        monkeypatch.setattr(prepare, "_MANY", many)
        session = Session(graph, threads=2)
        fields = [conv.packed.fields for (conv,) in session._planner.convolutions.values()]
        places = sorted(each["weights"].ctypes.data for each in fields)
        if many == 0:
            assert places[-1] - places[0] < 2**21
        expected = Session(graph, threads=1, kernels="reference").run(random_inputs(graph))
        assert np.array_equal(session.run(random_inputs(graph)), expected)


def test_plans_that_are_let_go_are_freed_at_once():
    session = Session(of_any_size(chain()), threads=1)
    found = weakref.ref(session._plan({"input": np.zeros((1, 8, 9, 9), np.float32)}))
    assert found() is None


def test_a_step_fills_in_the_record_that_its_kernel_reads(monkeypatch):
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["a"]),
        Node("Pad", "p", ["a"], ["b"], {"pads": [0, 1, 2, 1, 0, 0, 1, 2]}),
        Node("DequantizeLinear", "d", ["b"], ["out"]),
    ]
    q = dict.fromkeys("ab", Quantization(0.1, 3, 8))
    graph = build(nodes, q, {"input": (1, 3, 8, 7)}, "out")
    x = random_inputs(graph)
    expected = Session(graph, kernels="portable").run(x)
    # The same kernel, with two fields of its record in each other's place.
    kernel = registry.kernel("fill", "reference")
    names = list(kernel.record.names)
    i, j = names.index("height"), names.index("value")
    names[i], names[j] = names[j], names[i]
    record = np.dtype([(name, kernel.record[name]) for name in names])
    kernel = dataclasses.replace(kernel, record=record)
    monkeypatch.setitem(registry._REGISTRY, ("fill", "reference", ""), kernel)
    session = Session(graph, threads=1, kernels="reference")
    assert np.array_equal(session.run(x), expected)
    assert kernel in [step.kernel for step in session._plan(x).steps]
