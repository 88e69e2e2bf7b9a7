"""Every kernel against its slow twin: the same codes, bit for bit."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from graphs import GRAPHS, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from logshift.kernels import abi
from logshift.runtime import Session


def assert_same(expected, actual, context):
    """Assert that two dicts of tensors hold the same bits."""
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, (context, name)
        assert tensor.tobytes() == actual[name].tobytes(), (context, name)


@pytest.mark.parametrize("kind", GRAPHS)
def test_fast_equals_reference_equals_numpy(kind):
    @settings(max_examples=60, deadline=None)
    @given(graph=GRAPHS[kind], seed=st.integers(0, 2**16))
    def check(graph, seed):
        inputs = random_inputs(graph, seed)
        expected = Session(graph, threads=1, kernels="reference").trace_codes(inputs)
        tensors = oracle.evaluate(graph, inputs)
        for name in graph.quantization:
            assert np.array_equal(tensors[name], expected[name]), name
        for kernels in ("portable", "dot"):
            for threads in (1, 2):
                session = Session(graph, threads=threads, kernels=kernels)
                assert_same(expected, session.trace_codes(inputs), (kind, kernels, threads))

    check()


def test_every_operation_has_a_reference_and_a_portable_kernel():
    operations = {k.op for k in abi.kernels()}
    for op in operations:
        families = {k.family for k in abi.kernels() if k.op == op}
        assert {"reference", "portable"} <= families <= set(abi.FAMILIES)
