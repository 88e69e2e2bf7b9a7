"""Branches, loops and sequences: decided, unrolled, computed both ways, or refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.onnx_nets import Net, reference, samples

from logshift import converter, runtime
from logshift.converter import ConversionError
from logshift.converter.simplify import simplified

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


SCALARS = ("i", "go_on", "goes_on")  # of a Loop


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.stlq"


def subgraph(nodes, outputs, inputs=(), initializers=()):
    """A graph for an attribute; inputs and outputs are names and types."""
    described = [
        [helper.make_tensor_value_info(n, kind, [] if n in SCALARS else None) for n, kind in values]
        for values in (inputs, outputs)
    ]
    return helper.make_graph(nodes, "inner", *described, list(initializers))


def branch(op, x="x", **attributes):
    name = f"{op}_result"
    return subgraph([helper.make_node(op, [x], [name], **attributes)], [(name, FLOAT)])


def model_of(net, *outputs):
    """The model, without what shape inference would do to it."""
    graph = helper.make_graph(
        net.nodes, "net",
        [helper.make_tensor_value_info(n, FLOAT, shape) for n, shape in net.inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs], net.initializers,
    )  # fmt: skip
    opset = helper.make_opsetid("", net.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def converted(model, path, feed, **settings):
    converter.convert(model, path, calibration=[feed], keep_float=["*"], **settings)
    return runtime.load(path, threads=1)


def check(model, path, *feeds, **settings):
    """Convert on the first input, in float32, and compare with onnxruntime on all."""
    session = converted(model, path, feeds[0], **settings)
    for feed in feeds:
        found = session.run(feed)
        found = found if isinstance(found, dict) else {session.outputs[0].name: found}
        for name, y in reference(model, feed).items():
            assert found[name].shape == y.shape
            np.testing.assert_allclose(found[name], y, 1e-4, 1e-5)
    return session


def feed_of(*shape, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


# --- If -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [False, True])
def test_a_constant_decides(path, value):
    net = Net()
    y = net.conv("x")
    z = net.node(
        "If", net.constant(value, np.bool_), then_branch=branch("Neg", y),
        else_branch=branch("Relu", y),
    )  # fmt: skip
    session = check(model_of(net, z), path, samples(net.model()))
    ops = [node.op for node in session.graph.nodes]
    assert "Where" not in ops and "If" not in ops


def by_size(net, y, size, axis, **branches):
    shape = net.node("Shape", y)
    found = net.node("Gather", shape, net.constant(axis, np.int64))
    return net.node("If", net.node("Equal", found, net.constant(size, np.int64)), **branches)


@pytest.mark.parametrize("batches", [(1, 3), (3, 1)])
def test_the_batch_decides(path, batches):
    net = Net()
    y = net.conv("x")
    z = by_size(net, y, 1, 0, then_branch=branch("Neg", y), else_branch=branch("Relu", y))
    model = model_of(net, z)
    session = check(model, path, *(feed_of(n, 4, 8, 8) for n in batches))
    # Each size has a plan, which knows: nothing runs in NumPy.
    assert not [layer for layer in session.summary().layers if layer.kernel.startswith("onnx.ref")]
    profile = session.profile(feed_of(1, 4, 8, 8), 1)
    assert not [step for step in profile if step.op == "Where" and "numpy" in step.kernel]


def test_sizes_that_are_known_decide_between_shapes(path):
    net = Net(shape=(1, 4, 8, 8))
    y = net.conv("x")
    z = by_size(net, y, 1, 0, then_branch=branch("Flatten", y), else_branch=branch("Identity", y))
    session = check(model_of(net, z), path, feed_of(1, 4, 8, 8))
    assert session.outputs[0].nominal == (1, 256)


def test_data_decide(path):
    net = Net()
    y = net.conv("x")
    total = net.node("ReduceSum", "x", keepdims=0)
    condition = net.node("Greater", total, net.constant(0))
    z = net.node("If", condition, then_branch=branch("Neg", y), else_branch=branch("Relu", y))
    feeds = [feed_of(2, 4, 8, 8, seed=seed) for seed in range(4)]
    signs = {bool(feed["x"].sum() > 0) for feed in feeds}
    assert signs == {False, True}
    check(model_of(net, z), path, *feeds)


def test_branches_in_branches(path):
    net = Net()
    total = net.node("ReduceSum", "x", keepdims=0)
    condition = net.node("Greater", total, net.constant(0))
    inner = helper.make_node(
        "If", [condition], ["inner_y"], then_branch=branch("Neg"), else_branch=branch("Relu")
    )
    outer = subgraph([inner, helper.make_node("Tanh", ["inner_y"], ["outer_y"])],
                     [("outer_y", FLOAT)])  # fmt: skip
    z = net.node("If", condition, then_branch=branch("Abs"), else_branch=outer)
    check(model_of(net, z), path, *(feed_of(2, 4, 8, 8, seed=seed) for seed in range(3)))


def test_branches_of_different_shapes_are_refused(path):
    net = Net(shape=("n", 4, 8, 8))
    y = net.conv("x")
    flat, same = branch("Flatten", y), branch("Identity", y)
    z = by_size(net, y, 1, 0, then_branch=flat, else_branch=same)
    model = model_of(net, z)
    with pytest.raises(ConversionError, match="If 'n_If.*different shapes.*input_shapes"):
        converted(model, path, feed_of(1, 4, 8, 8))
    session = converted(model, path, feed_of(1, 4, 8, 8), input_shapes={"x": (1, 4, 8, 8)})
    assert session.outputs[0].nominal == (1, 256)


@pytest.mark.parametrize("value", [0, 1, 4])
def test_sizes_that_are_not_known_are_not_decided_by_the_simplifier(value):
    net = Net(shape=("n", 4, 8, 8))
    size = net.node("Gather", net.node("Shape", "x"), net.constant(0, np.int64))
    equal = net.node("Equal", size, net.constant(value, np.int64))
    y = net.node("Where", equal, net.node("Neg", "x"), net.node("Relu", "x"))
    model = net.model(y)
    proto = simplified(model, ())
    for feed in (feed_of(1, 4, 8, 8), feed_of(4, 4, 8, 8)):
        (found,), (expected,) = (reference(m, feed).values() for m in (proto, model))
        np.testing.assert_array_equal(found, expected)
    assert "Equal" in {node.op_type for node in proto.graph.node}


# --- loops ----------------------------------------------------------------------------------------


def body(*nodes, state, rows=(), condition="go_on"):
    inputs = [("i", INT64), ("go_on", BOOL), *((name, FLOAT) for name, _ in state)]
    outputs = [("goes_on", BOOL), *((name, FLOAT) for _, name in state)]
    outputs += [(name, FLOAT) for name in rows]
    keep = helper.make_node("Identity", [condition], ["goes_on"])
    return subgraph([keep, *nodes], outputs, inputs)


def test_loop_of_a_known_number_of_turns(path):
    net = Net()
    turn = [
        helper.make_node("Cast", ["i"], ["number"], to=FLOAT),
        helper.make_node("Add", ["state", "number"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next"]),
        helper.make_node("ReduceMean", ["next"], ["mean"], keepdims=0),
    ]
    loop = body(*turn, state=[("state", "next")], rows=["mean"])
    y, means = net.node(
        "Loop", net.constant(3, np.int64), net.constant(True, np.bool_), net.conv("x"),
        outputs=2, body=loop,
    )  # fmt: skip
    session = check(model_of(net, y, means), path, feed_of(2, 4, 8, 8))
    assert session.outputs[1].nominal == (3,)


def test_loop_that_a_constant_ends(path):
    net = Net()
    last = helper.make_node("Less", ["i", net.constant(1, np.int64)], ["more"])
    turn = helper.make_node("Add", ["state", "state"], ["next"])
    loop = body(last, turn, state=[("state", "next")], condition="more")
    loop.node.insert(0, loop.node.pop(1))
    y = net.node("Loop", net.constant(9, np.int64), "", net.conv("x"), body=loop)
    check(model_of(net, y), path, feed_of(2, 4, 8, 8))


def test_loop_that_data_end_is_refused(path):
    net = Net()
    nodes = [
        helper.make_node("Add", ["state", "state"], ["next"]),
        helper.make_node("ReduceMax", ["next"], ["top"], keepdims=0),
        helper.make_node("Less", ["top", net.constant(100)], ["more"]),
    ]
    loop = body(state=[("state", "next")], condition="more")
    loop.node.extend(nodes)
    y = net.node("Loop", net.constant(9, np.int64), "", net.conv("x"), body=loop)
    loop.node.append(loop.node.pop(0))
    with pytest.raises(ConversionError, match="Loop 'n_Loop.*data say when it ends"):
        converted(model_of(net, y), path, feed_of(2, 4, 8, 8))


def test_loops_of_many_turns_are_refused(path):
    net = Net()
    loop = body(helper.make_node("Tanh", ["state"], ["next"]), state=[("state", "next")])
    y = net.node("Loop", net.constant(10**6, np.int64), "", net.conv("x"), body=loop)
    with pytest.raises(ConversionError, match="Loop 'n_Loop.*1000000 times 2 nodes"):
        converted(model_of(net, y), path, feed_of(2, 4, 8, 8))


@pytest.mark.parametrize("backwards", [0, 1])
def test_scan(path, backwards):
    net = Net(shape=(2, 5, 3))
    nodes = [
        helper.make_node("Add", ["state", "part"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next"]),
        helper.make_node("Identity", ["next"], ["row"]),
    ]
    inner = subgraph(nodes, [("next", FLOAT), ("row", FLOAT)], [("state", FLOAT), ("part", FLOAT)])
    last, rows = net.node(
        "Scan", net.constant(np.zeros((2, 3))), "x", outputs=2, body=inner, num_scan_inputs=1,
        scan_input_axes=[1], scan_input_directions=[backwards], scan_output_axes=[2],
        scan_output_directions=[backwards],
    )  # fmt: skip
    check(model_of(net, last, rows), path, feed_of(2, 5, 3))


def test_scan_of_any_length_is_refused(path):
    net = Net(shape=(2, "length", 3))
    nodes = [helper.make_node("Add", ["state", "part"], ["next"])]
    inner = subgraph(nodes, [("next", FLOAT)], [("state", FLOAT), ("part", FLOAT)])
    y = net.node(
        "Scan", net.constant(np.zeros((2, 3))), "x", body=inner, num_scan_inputs=1,
        scan_input_axes=[1],
    )  # fmt: skip
    with pytest.raises(ConversionError, match="Scan 'n_Scan.*length.*input_shapes"):
        converted(model_of(net, y), path, feed_of(2, 5, 3))
    check(model_of(net, y), path, feed_of(2, 5, 3), input_shapes={"x": (2, 5, 3)})


# --- sequences ------------------------------------------------------------------------------------


def test_sequences_of_known_length(path):
    net = Net()
    parts = net.node("SplitToSequence", net.conv("x"), net.constant(3, np.int64), axis=1)
    first = net.node("SequenceAt", parts, net.constant(0, np.int64))
    last = net.node("SequenceAt", parts, net.constant(-1, np.int64))
    parts = net.node("SequenceErase", parts, net.constant(0, np.int64))
    parts = net.node("SequenceInsert", parts, net.node("Neg", first))
    joined = net.node("ConcatFromSequence", parts, axis=1)
    made = net.node("SequenceConstruct", first, first)
    stacked = net.node("ConcatFromSequence", made, axis=0, new_axis=1)
    length = net.node("Cast", net.node("SequenceLength", made), to=FLOAT)
    model = model_of(net, joined, last, stacked, net.node("Add", length, net.constant(1)))
    check(model, path, feed_of(2, 4, 8, 8))


def test_sequence_that_a_loop_fills(path):
    net = Net()
    empty = net.node("SequenceEmpty")
    state = [("list", "longer")]
    loop = body(
        helper.make_node("Neg", ["x"], ["part"]),
        helper.make_node("SequenceInsert", ["list", "part"], ["longer"]),
        state=state,
    )
    for value in (loop.input[2], loop.output[1]):
        value.CopyFrom(helper.make_tensor_sequence_value_info(value.name, FLOAT, None))
    parts = net.node("Loop", net.constant(2, np.int64), "", empty, body=loop)
    model = model_of(net, net.node("ConcatFromSequence", parts, axis=1))
    check(model, path, feed_of(2, 4, 8, 8))


def test_sequence_at_a_place_that_data_say_is_refused(path):
    net = Net()
    made = net.node("SequenceConstruct", "x", net.node("Neg", "x"))
    place = net.node("Cast", net.node("ReduceMax", "x", keepdims=0), to=INT64)
    place = net.node("Mod", place, net.constant(2, np.int64))
    model = model_of(net, net.node("SequenceAt", made, place))
    with pytest.raises(ConversionError, match="SequenceAt 'n_Seq.*is not a constant"):
        converted(model, path, feed_of(2, 4, 8, 8))
