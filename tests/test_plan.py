"""Memory plan: what is in use at the same time lies apart, borders hold, garbage is harmless."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build, random_inputs, random_weights
from hypothesis import given
from hypothesis import strategies as st

from logshift.kernels.memory import ALIGNMENT, Block, aligned, arrange
from logshift.runtime import Session, plan
from logshift.runtime.graph import Node, Quantization

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


# All borders are written at every run, none is, and both.
SMALL = [0, 2400, 2**30]


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_do_not_depend_on_what_memory_held(small, threads, monkeypatch):
    graph = chain()
    first, second = random_inputs(graph, 1), random_inputs(graph, 2)
    expected = [Session(graph, threads=1, kernels="reference").run(x) for x in (first, second)]

    def poisoned(shape, dtype):
        array = aligned(shape, dtype)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(plan, "aligned", poisoned)
    monkeypatch.setattr(plan, "_SMALL", small)
    session = Session(graph, threads=threads)
    for x, y in ((first, 0), (second, 1), (second, 1), (first, 0)):
        assert np.array_equal(session.run(x), expected[y])


@pytest.mark.parametrize("small", SMALL)
def test_an_arena_is_as_large_as_it_has_to_be(small, monkeypatch):
    monkeypatch.setattr(plan, "_SMALL", small)
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
        monkeypatch.setattr(plan, "_SMALL", small)
        session = Session(chain(), threads=1)
        steps = session._plan(session._arrays(random_inputs(session.graph))).steps
        return sum(step.kernel.op == "fill" for step in steps)

    assert fills(0) > 0
    assert fills(2**30) == 0
