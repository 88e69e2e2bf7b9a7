"""Sessions that are copied, pickled and sent to other processes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
from support.packed_nets import pictures, small_network

from logshift import runtime
from logshift.runtime import FormatError, InputError, Session, cores
from logshift.runtime.file import format as packed_format

X = pictures(2)


@pytest.fixture
def path(tmp_path):
    packed_format.write(small_network(), tmp_path / "net.stlq")
    return tmp_path / "net.stlq"


def sent(session):
    return pickle.loads(pickle.dumps(session))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, sent])
def test_duplicates_give_the_same_bits(duplicate, path):
    for session in (runtime.load(path, threads=2), Session(small_network(), kernels="reference")):
        expected = session.run(X)
        new = duplicate(session)
        assert type(new) is Session
        assert (new.threads, new.kernels) == (session.threads, session.kernels)
        assert new.labels == session.labels and new.inputs == session.inputs
        assert np.array_equal(new.run(X), expected)
        assert np.array_equal(duplicate(new).run(X), expected)
        # Neither the buffers nor the lock of a run belong to two sessions.
        assert new._idle is not session._idle and new._lock is not session._lock
        with session._lock:
            new.run(pictures(1, 20, 9))
        assert len(session._idle) == 1


def test_a_deep_copy_shares_no_array(path):
    session = runtime.load(path)
    new = copy.deepcopy(session)
    for a, b in zip(session.graph.nodes, new.graph.nodes, strict=True):
        if a.weights is not None:
            assert not np.shares_memory(a.weights.alpha, b.weights.alpha)
            assert not np.shares_memory(a.bias, b.bias)
    for index, parts in session._planner.convolutions.items():
        for a, b in zip(parts, new._planner.convolutions[index], strict=True):
            mine, other = (x.packed.fields.values() for x in (a, b))
            pairs = [p for p in zip(mine, other, strict=True) if isinstance(p[0], np.ndarray)]
            assert pairs and not any(np.shares_memory(*pair) for pair in pairs)


def test_a_pickle_is_about_as_large_as_the_file(path):
    session = runtime.load(path)
    session.run(pictures(1, 200, 200))  # plans and buffers are not in it
    size = path.stat().st_size
    assert size <= len(pickle.dumps(session)) < 1.1 * size
    assert pickle.dumps(session) == pickle.dumps(sent(session))


def test_threads_are_decided_where_a_pickle_is_read(path, monkeypatch):
    ours, given = runtime.load(path), runtime.load(path, threads=3)
    monkeypatch.setattr(cores, "default_threads", lambda: ours.threads + 4)
    assert sent(ours).threads == ours.threads + 4
    assert sent(given).threads == 3
    assert sent(sent(ours)).threads == ours.threads + 4


def test_a_pickle_may_hold_only_the_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    session = runtime.load("net.stlq", pickle_as="path", threads=2)
    data = pickle.dumps(session)
    assert len(data) < 500
    monkeypatch.chdir(path.parent.parent)
    os.replace(path, path.with_suffix(".old"))
    with pytest.raises(InputError, match=r"net\.stlq.*put the file there.*pickle_as='bytes'"):
        pickle.loads(data)
    shutil.copy(path.with_suffix(".old"), path)
    new = pickle.loads(data)
    assert new.threads == 2 and np.array_equal(new.run(X), session.run(X))
    assert pickle.dumps(new) == data == pickle.dumps(copy.copy(session))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"net\.stlq"):
        pickle.loads(data)


def test_wrong_pickle_as(path):
    with pytest.raises(InputError, match="pickle_as is 'file'"):
        runtime.load(path, pickle_as="file")


def test_pickled_bytes_are_validated(path):
    state = runtime.load(path).__getstate__()
    state["network"] = state["network"][:-1] + bytes([state["network"][-1] ^ 1])
    with pytest.raises(FormatError):
        object.__new__(Session).__setstate__(state)


def _result(session, x):
    return os.getpid(), session.run(x)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_pools_of_processes(method, path):
    session = runtime.load(path, threads=2)
    inputs = [pictures(1, 12 + i, 12, seed=i) for i in range(4)]
    expected = [session.run(x) for x in inputs]
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap_async(_result, [(session, x) for x in inputs], chunksize=2).get(120)
    for (pid, actual), wanted in zip(found, expected, strict=True):
        assert pid != os.getpid() and np.array_equal(actual, wanted)


def test_joblib(path):
    joblib = pytest.importorskip("joblib", reason="needs joblib, of the extra [test]")
    session = runtime.load(path, threads=1)
    inputs = [pictures(1, 12 + i, 12, seed=i) for i in range(4)]
    with joblib.parallel_config(backend="loky", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(_result)(session, x) for x in inputs)
    for (pid, actual), x in zip(found, inputs, strict=True):
        assert pid != os.getpid() and np.array_equal(actual, session.run(x))
