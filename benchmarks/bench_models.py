"""Whole networks of the suite, batch 1 on one thread.

    python -m pytest benchmarks/bench_models.py

Networks are built and converted on the first run, which takes minutes, and kept where
`benchmarks.compare` keeps them by default.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.compare import CACHE, prepare
from benchmarks.models import SUITE
from logshift import runtime


@pytest.mark.parametrize("name", SUITE)
def test_model(benchmark, name: str) -> None:
    """Time one run."""
    session = runtime.load(prepare(name, CACHE).packed, threads=1)
    x = np.random.default_rng(2).standard_normal((1, *SUITE[name].shape)).astype(np.float32)
    benchmark(session.run, x)
