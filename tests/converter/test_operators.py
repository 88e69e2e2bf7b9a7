"""The operators' modules: what refuses leaves nothing behind, and one list of functions for all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.onnx_nets import Net, convert, operations, samples
from support.operator_nets import KEPT, OPERATORS

from logshift import runtime
from logshift.converter import onnx_model
from logshift.converter.export import export
from logshift.converter.float_graph import Problems
from logshift.converter.lower import lower
from logshift.converter.operators import registry
from logshift.converter.operators.context import ADDED, Context
from logshift.converter.operators.functions import ELEMENTWISE
from logshift.converter.operators.registry import LOWERINGS, WRITINGS, Unsupported
from logshift.converter.rearrange import rearrange
from logshift.runtime.operators import OPERATORS as PACKED

DYNAMIC = ("batch", 4, "height", "width")
knows_swish = pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 24, reason="needs the operator Swish"
)


def traced(model):
    loaded = onnx_model.load(model)
    return loaded, onnx_model.trace(loaded, {n: x[:2] for n, x in samples(model).items()})


def test_every_packed_operator_can_be_written():
    assert WRITINGS.keys() - {"Lookup"} == PACKED.keys() - {"Lookup"}
    assert ELEMENTWISE <= LOWERINGS.keys() and registry.VARIADIC >= ELEMENTWISE


# --- refusing -----------------------------------------------------------------------------------


def _computed(net, *values):
    """Sizes that are computed from the input's height, which is below 100."""
    height = net.node(
        "Slice", net.node("Shape", "x"), *(net.constant([v], np.int64) for v in (2, 3))
    )
    nothing = net.node("Div", height, net.constant([100], np.int64))
    return net.node("Add", nothing, net.constant(values, np.int64))


def _slice_of_the_batch(net):
    numbers = [net.constant([0], np.int64), _computed(net, 1), net.constant([0], np.int64)]
    return net.node("Slice", net.conv("x"), *numbers)


def _negative_pads(net):
    return net.node("Pad", net.conv("x"), _computed(net, 0, 0, -1, 0, 0, 0, 0, 0))


def _bias(net):
    return net.node("ReduceMax", "x", net.constant([0, 2, 3], np.int64), keepdims=0)


def _same_pads_and_a_computed_bias(net):
    return net.node("Conv", "x", net.random(4, 4, 3, 3), _bias(net), strides=[2, 2],
                    auto_pad="SAME_UPPER")  # fmt: skip


REFUSED_LATE = {
    "Slice": _slice_of_the_batch,
    "Pad": _negative_pads,
    "Conv": _same_pads_and_a_computed_bias,
}


@pytest.mark.parametrize("op", REFUSED_LATE)
def test_what_is_refused_fixes_no_size(op, tmp_path):
    net = Net(shape=DYNAMIC)
    graph = convert(net.model(REFUSED_LATE[op](net)), tmp_path / "net.stlq")
    assert op in [node.op for node in graph.nodes if node.is_onnx]
    assert graph.inputs[0].shape == DYNAMIC


# What is lowered, and not among the models of `operator_nets`.
OTHERS = {
    "Gather": lambda n: n.node("Gather", "x", n.constant([2, 0], np.int64), axis=1),
    "SpaceToDepth": lambda n: n.node("SpaceToDepth", "x", blocksize=2),
}


def state(ctx):
    maps = {name: dict(getattr(ctx, name)) for name in ADDED}
    nodes = [
        (node.op, list(node.inputs), node.outputs, dict(node.attributes)) for node in ctx.nodes
    ]
    return maps, nodes, ctx.fixed_size


def test_a_refused_node_leaves_the_state_as_it_was(monkeypatch):
    """Every lowering does its work, and then refuses."""
    before, refused = [], set()
    draft = Context.draft

    def remembered(ctx):
        before[:] = [ctx, state(ctx)]
        return draft(ctx)

    def refusing(lowering):
        def lower(ctx, node, attributes):
            try:
                lowering(ctx, node, attributes)
                refused.add(lowering)
            finally:
                original, known = before
                assert str(state(original)) == str(known)
            raise Unsupported("after all")

        return lower

    monkeypatch.setattr(Context, "draft", remembered)
    registered = dict(LOWERINGS)
    for op, lowering in registered.items():
        monkeypatch.setitem(LOWERINGS, op, refusing(lowering))
    builders = [build for build, _ in (*KEPT.values(), *OPERATORS.values())]
    for build in [*builders, *OTHERS.values()]:
        net = Net(shape=(2, 4, 8, 8))
        outputs = build(net)
        loaded, trace = traced(net.model(*(outputs if isinstance(outputs, tuple) else (outputs,))))
        known, shapes = dict(trace.constants), dict(trace.shapes)
        problems = Problems()
        graph = lower(loaded, trace, problems)
        assert not problems.found and all(node.is_onnx for node in graph.nodes)
        assert (trace.constants, trace.shapes) == (known, shapes)
    assert {op for op, lowering in registered.items() if lowering not in refused} <= {"Swish"}


def test_first_outputs_that_nobody_wants(tmp_path):
    rng = np.random.default_rng(0)
    h = onnx.helper
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in
               {"w": (1, 4, 3), "r": (1, 4, 4)}.items()}  # fmt: skip
    nodes = [h.make_node("RNN", ["x", "w", "r"], ["", y], hidden_size=4, name=y, direction=d)
             for y, d in (("y", "forward"), ("z", "reverse"))]  # fmt: skip
    graph = h.make_graph(
        nodes, "net", [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (5, 2, 3))],
        [onnx.ValueInfoProto(name=y) for y in ("y", "z")],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    model = onnx.shape_inference.infer_shapes(
        h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)
    )
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    packed = convert(model, tmp_path / "net.stlq", keep_float=["*"])
    found = runtime.Session(packed).run({"x": x})
    for name, y in zip(("y", "z"), ReferenceEvaluator(model).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(found[name], y, rtol=1e-5, atol=1e-6)


# --- functions ----------------------------------------------------------------------------------


@knows_swish
@pytest.mark.parametrize("alpha", [None, 1.0, 1.702])
def test_swish(alpha, tmp_path):
    net = Net(opset=24)
    given = {} if alpha is None else {"alpha": alpha}
    model = net.model(net.conv(net.node("Swish", net.conv("x"), **given)))
    x = samples(model)["x"][:3]
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    on_codes = convert(model, tmp_path / "net.stlq")
    assert operations(on_codes) == ["Conv", "Conv"]
    found = runtime.Session(on_codes).run(x)
    assert np.square(found - y).sum() < 10**-2.6 * np.square(y).sum()
    on_floats = convert(model, tmp_path / "net.stlq", keep_float=["*"])
    packed = ["Mul", "Sigmoid", "Mul"] if alpha == 1.702 else ["Swish"]
    assert operations(on_floats) == ["Conv", *packed, "Conv"]
    np.testing.assert_allclose(runtime.Session(on_floats).run(x), y, rtol=1e-4, atol=1e-5)
    export(on_floats, tmp_path / "net.onnx")
    (same,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(same, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["operator", "tanh", "in parts"])
def test_gelu(how, tmp_path):
    net = Net(opset=20)
    x = net.conv("x")
    if how == "in parts":
        gate = net.node("Erf", net.node("Div", x, net.constant(np.sqrt(2))))
        gate = net.node("Add", gate, net.constant(1.0))
        y = net.node("Mul", net.node("Mul", x, gate), net.constant(0.5))
    else:
        y = net.node("Gelu", x, approximate="none" if how == "operator" else how)
    model = net.model(net.conv(y))
    x = samples(model)["x"][:3]
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    on_codes = convert(model, tmp_path / "net.stlq")
    assert operations(on_codes) == ["Conv", "Conv"]
    on_floats = convert(model, tmp_path / "net.stlq", keep_float=["*"])
    assert [n.op for n in on_floats.nodes if not n.is_onnx].count("Gelu") == (how != "tanh")
    np.testing.assert_allclose(runtime.Session(on_floats).run(x), y, rtol=1e-4, atol=1e-5)
    export(on_floats, tmp_path / "net.onnx")
    (same,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(same, y, rtol=1e-4, atol=1e-5)


@knows_swish
@pytest.mark.parametrize("op", sorted(ELEMENTWISE))
def test_transposes_move_through_all_functions(op):
    net = Net(opset=24)
    last = net.node("Transpose", net.conv("x"), perm=[0, 2, 3, 1])
    binary = ("Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub")
    y = net.node(op, last, *[net.constant(2.0)] * (op in binary))
    model = net.model(net.conv(net.node("Transpose", y, perm=[0, 3, 1, 2])))
    loaded, trace = traced(model)
    if any(node.op_type == "Transpose" for node in loaded.proto.graph.node):
        assert rearrange(loaded, trace)
    assert not [node for node in loaded.proto.graph.node if node.op_type == "Transpose"]
