"""Sessions: what users may do with a loaded network, and what happens when they get it wrong."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from support.graphs import build, random_weights
from support.packed_nets import pictures, small_network

from logshift import runtime
from logshift.kernels import registry
from logshift.kernels.activation import Activation
from logshift.runtime import InputError, Preprocessing, Session, executor
from logshift.runtime.file import format as packed_format
from logshift.runtime.graph import Node, Quantization, ValueInfo
from logshift.runtime.plan import work
from logshift.runtime.validate import validate


def test_batch_and_picture_size_are_free():
    session = Session(small_network())
    x = pictures(5)
    whole = session.run(x)
    assert whole.shape == (5, 5) and whole.dtype == np.float32
    for i in range(5):
        assert np.array_equal(session.run(x[i : i + 1]), whole[i : i + 1])
    assert session.run(pictures(2, 31, 17)).shape == (2, 5)


def test_many_input_shapes_do_not_accumulate_plans():
    session = Session(small_network())
    first = session.run(pictures(1, 12, 12))
    for size in range(8, 40):
        session.run(pictures(1, size, size))
    assert len(session._idle) <= 8
    assert np.array_equal(session.run(pictures(1, 12, 12)), first)


def test_idle_plans_are_bounded_in_number_and_bytes(monkeypatch):
    session = Session(small_network(), threads=1)

    def kept():
        return [p for plans in session._idle.values() for p in plans]

    def return_plans(size, count):
        x = session._arrays(pictures(1, size, size))
        for p in [session._plan(x) for _ in range(count)]:
            session._return((size,), p)

    return_plans(12, 30)  # as many callers at once
    assert len(kept()) == 16
    return_plans(14, 1)
    assert len(kept()) == 16 and len(session._idle) == 2
    latest = session._idle[14,][0]
    monkeypatch.setattr("logshift.runtime.session._BYTES_KEPT", 3 * latest.held_bytes)
    return_plans(16, 1)
    assert sum(p.held_bytes for p in kept()) <= 3 * latest.held_bytes and latest in kept()
    monkeypatch.setattr("logshift.runtime.session._BYTES_KEPT", 0)
    return_plans(18, 1)
    assert [*session._idle] == [(18,)] and len(kept()) == 1


def test_outputs_of_one_run_survive_the_next():
    session = Session(small_network())
    first = session.run(pictures(seed=1))
    kept = first.copy()
    session.run(pictures(seed=2))
    assert np.array_equal(first, kept)


def test_file_and_memory_give_the_same_session(tmp_path):
    graph = small_network()
    packed_format.write(graph, tmp_path / "net.stlq")
    loaded = runtime.load(tmp_path / "net.stlq")
    assert np.array_equal(loaded.run(pictures(3)), Session(graph).run(pictures(3)))
    assert loaded.labels == graph.labels
    assert loaded.inputs == graph.inputs and loaded.outputs == graph.outputs


@pytest.mark.parametrize(
    "activation",
    [
        Activation("Piecewise", 0.0, 0.01, np.arange(48, dtype=np.int16).reshape(3, 16) * 40),
        Activation("PRelu", 0.0, 1.0, np.linspace(-1, 1, 8, dtype=np.float32)),
    ],
    ids=lambda activation: activation.op,
)
def test_graphs_in_memory_may_lay_arrays_out_as_they_like(activation):
    def scattered(array):
        wide = np.zeros((*array.shape[::-1], 2), array.dtype)[..., 0].T
        wide[:] = array
        return wide

    graph = small_network()
    graph.nodes[1].activation, graph.nodes[1].attributes["clamp"] = activation, [None, None]
    table = np.random.default_rng(0).integers(0, 255, 256).astype(np.uint8)
    graph.nodes.insert(2, Node("Lookup", "t", ["a"], ["t"], {}, table=table))
    graph.nodes[3].inputs = ["t", "t"]
    graph.quantization["t"] = graph.quantization["a"]
    expected = Session(packed_format.deserialize(packed_format.serialize(graph))).run(pictures(2))
    for node in graph.nodes:
        if node.bias is not None:
            node.bias = scattered(node.bias)
    graph.nodes[2].table = scattered(table)
    coefficients = scattered(activation.coefficients)
    graph.nodes[1].activation = dataclasses.replace(activation, coefficients=coefficients)
    assert not coefficients.flags.c_contiguous
    validate(graph)
    for kernels in ("auto", "reference"):
        assert np.array_equal(Session(graph, kernels=kernels).run(pictures(2)), expected)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_threads_and_kernels_do_not_change_bits(kernels):
    expected = Session(small_network(), threads=1).trace_codes(pictures(3))
    for threads in (1, 2, 3):
        actual = Session(small_network(), threads=threads, kernels=kernels).trace_codes(pictures(3))
        for name in expected:
            assert expected[name].tobytes() == actual[name].tobytes(), (name, threads)


@pytest.mark.parametrize("share", [1, 3_000, 20_000, 10**9])
def test_steps_of_one_thread_and_of_several_mix(share, monkeypatch):
    expected = Session(small_network(), threads=1).run(pictures(3))
    monkeypatch.setattr(work, "SHARE", share)
    for threads in (2, 4):
        session = Session(small_network(), threads=threads)
        for pause in (0, 0, 0.1, 0, 0.1):  # workers awake and asleep
            time.sleep(pause)
            assert np.array_equal(session.run(pictures(3)), expected)


def test_a_step_gets_as_many_threads_as_it_is_worth(monkeypatch):
    session = Session(small_network(), threads=3)

    def threads_of(share):
        monkeypatch.setattr(work, "SHARE", share)
        return [step.homes for step in session._plan(session._arrays(pictures())).steps]

    a = 12 * 10 * 8 * 27  # multiplications
    assert threads_of(10**9) == [1] * 5
    assert threads_of(a)[1] == 1
    assert threads_of(a // 2)[1] == 2
    assert threads_of(1) == [3] * 5


def test_several_python_threads_share_a_session():
    session = Session(small_network(), threads=2)
    inputs = [pictures(2, 12 + 3 * (i % 3), 12, seed=i) for i in range(6)]
    expected = [Session(small_network(), threads=1).run(x) for x in inputs]
    failures = []

    def work(offset):
        for i in range(60):
            k = (i + offset) % len(inputs)
            if not np.array_equal(session.run(inputs[k]), expected[k]):
                failures.append(k)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures


def _run_in_child(session, x, pipe):
    pipe.send(session.run(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_session_works_after_fork():
    session = Session(small_network(), threads=2)
    x = pictures(2)
    expected = session.run(x)
    context = multiprocessing.get_context("fork")
    # A lock that some thread holds at the moment of the fork must not matter in the child.
    with session._lock, executor.team(2)._hiring:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_run_in_child, args=(session, x, send))
        child.start()
    assert receive.poll(60), "the child did not answer"
    assert np.array_equal(receive.recv(), expected)
    child.join(30)
    assert child.exitcode == 0
    assert np.array_equal(session.run(x), expected)


def test_steady_state_allocates_only_outputs():
    session = Session(small_network(), threads=2)
    x = pictures(4, 60, 60)
    for _ in range(3):
        session.run(x)
    tracemalloc.start()
    session.run(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000  # one activation of this network alone takes 115,200 bytes


def test_pictures_equal_prepared_tensors():
    session = Session(small_network())
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    prepared = Preprocessing().apply(picture, (12, 10))
    expected = session.run(prepared[None])
    for x in (picture, Image.fromarray(picture), [picture], [Image.fromarray(picture)],
              picture[None]):  # fmt: skip
        assert np.array_equal(session.run(x), expected)
    assert session.run([picture, picture]).shape == (2, 5)


def test_preprocessing_follows_its_formula():
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    same = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), channel_order="BGR")
    expected = (picture[:, :, ::-1] / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    np.testing.assert_allclose(same.apply(picture, (4, 4)), expected.transpose(2, 0, 1), atol=1e-6)
    cropped = Preprocessing(resize=(8, 6), crop=(4, 2)).apply(picture, (4, 4))
    assert cropped.shape == (3, 4, 2)
    assert Preprocessing(resize=8).apply(np.zeros((4, 6, 3), np.uint8), (8, 8)).shape == (3, 8, 8)
    gray = Preprocessing(mean=(0.5,), std=(0.5,)).apply(picture[:, :, 0], (4, 4))
    assert gray.shape == (1, 4, 4)


def test_two_inputs_and_two_outputs_go_by_name():
    nodes = [
        Node("QuantizeLinear", "qa", ["a"], ["xa"]),
        Node("QuantizeLinear", "qb", ["b"], ["xb"]),
        Node("Add", "add", ["xa", "xb"], ["s"]),
        Node("DequantizeLinear", "d", ["s"], ["sum"]),
    ]
    q = dict.fromkeys(("xa", "xb", "s"), Quantization(0.1, 128, 8))
    graph = build(nodes, q, {"a": (1, 2, 3, 3), "b": (1, 2, 3, 3)}, "sum")
    graph.nodes.append(Node("DequantizeLinear", "d2", ["xa"], ["copy"]))
    graph.outputs.append(ValueInfo("copy", (1, 2, 3, 3), (1, 2, 3, 3)))
    session = Session(graph)
    a, b = np.full((1, 2, 3, 3), 0.5, np.float32), np.full((1, 2, 3, 3), 0.25, np.float32)
    outputs = session.run({"b": b, "a": a})
    assert set(outputs) == {"sum", "copy"}
    np.testing.assert_allclose(outputs["sum"], 0.7, atol=0.051)
    np.testing.assert_allclose(outputs["copy"], 0.5, atol=0.051)
    with pytest.raises(InputError, match="dict"):
        session.run(a)
    with pytest.raises(InputError, match="takes"):
        session.run({"a": a})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 4, 12, 10), np.float32), "shape"),
        (np.zeros((3, 12, 10), np.float32), "shape"),
        (np.zeros((0, 3, 12, 10), np.float32), "shape"),
        (np.zeros((1, 3, 12, 10), np.int32), "dtype"),
        (np.zeros((12, 10, 7), np.uint8), "channels"),
        ("photo.jpg", "dtype"),
        (None, "dtype"),
        ([], "shape"),
        ({"image": np.zeros((1, 3, 12, 10), np.float32)}, "takes"),
    ],
)
def test_wrong_inputs_get_one_clear_error(x, message):
    with pytest.raises(InputError, match=message):
        Session(small_network()).run(x)


def test_too_small_a_picture_names_the_node():
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("MaxPool", "the pool", ["x"], ["y"], {"kernel_shape": [3, 3]}),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
    ]
    q = dict.fromkeys(("x", "y"), Quantization(0.1, 0, 8))
    graph = build(nodes, q, {"input": (1, 1, 4, 4)}, "z")
    graph.inputs = [ValueInfo("input", (1, 1, "h", "w"), (1, 1, 4, 4))]
    with pytest.raises(InputError, match="the pool"):
        Session(graph).run(np.zeros((1, 1, 2, 2), np.float32))


def test_pictures_need_stored_preprocessing():
    graph = small_network()
    graph.preprocessing = None
    with pytest.raises(InputError, match="no preprocessing"):
        Session(graph).run(np.zeros((12, 10, 3), np.uint8))


@pytest.mark.parametrize(
    "settings", [{"threads": 0}, {"threads": 1.5}, {"threads": 10**6}, {"kernels": "magic"}]
)
def test_wrong_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Session(small_network(), **settings)


def test_profile_and_summary_cover_every_node():
    session = Session(small_network(), threads=1)
    times = session.profile(pictures(), repeat=2)
    assert [t.name for t in times] == ["q", "a", "b", "p", "fc"]
    assert all(t.seconds > 0 for t in times)
    assert [t.macs > 0 for t in times] == [False, True, True, False, True]
    summary = session.summary()
    assert [layer.op for layer in summary.layers] == [n.op for n in session.graph.nodes]
    assert summary.layers[1].macs == 12 * 10 * 8 * 27
    assert "-conv-" in str(summary)


def test_profile_and_summary_name_the_kernels_of_all_phases():
    rng = np.random.default_rng(0)
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("ConvTranspose", "up", ["x"], ["y"], {"strides": [2, 2]},
             random_weights(rng, (4, 3, 3, 4), 4, 0.15, 0)),
        Node("DequantizeLinear", "d", ["y"], ["z"]),
    ]  # fmt: skip
    q = dict.fromkeys(("x", "y"), Quantization(0.1, 9, 8))
    session = Session(build(nodes, q, {"input": (1, 4, 5, 6)}, "z"), threads=1)
    parts = session._planner.convolutions[1]
    assert len(parts) == 4
    parts[3] = dataclasses.replace(
        parts[3], kernel=registry.kernel("conv", "reference", parts[3].layer)
    )
    expected = f"{parts[0].kernel.name}, reference-conv"
    assert session.summary().layers[1].kernel == expected
    times = session.profile(np.zeros((1, 4, 5, 6), np.float32), repeat=1)
    assert [t.kernel for t in times][1] == expected
    assert times[1].macs == session.summary().layers[1].macs == 5 * 6 * 4 * 36


def test_float_and_non_contiguous_inputs_are_accepted():
    session = Session(small_network())
    x = pictures(2)
    expected = session.run(x)
    assert np.array_equal(session.run(x.astype(np.float64)), expected)
    turned = np.asfortranarray(x)
    assert np.array_equal(session.run(turned), expected)


def test_interrupted_run_leaves_a_working_team(monkeypatch):
    session = Session(small_network(), threads=2)
    expected = session.run(pictures())
    execute = executor._execute

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "_execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run(pictures())
    monkeypatch.setattr(executor, "_execute", execute)
    assert np.array_equal(session.run(pictures()), expected)
