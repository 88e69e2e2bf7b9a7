"""Timing in turns: how long engines take for a run, side by side on a machine that is never quiet.

Blocks of runs, A B A B: only ratios from one measurement mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logshift.converter import ort
from logshift.converter.extra import require
from logshift.kernels.errors import ConversionError, InputError

if TYPE_CHECKING:
    from logshift.runtime import Session

_BLOCK_SECONDS = 0.05


def in_turns(engines: list[Callable[[], Any]], seconds: float) -> list[np.ndarray]:
    """Seconds per run: for each engine the medians of blocks of runs, the engines taking turns.

    The first run of a block, which finds the other's data in the caches, is not counted.
    """
    for engine in engines:
        engine()
    blocks: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + seconds
    while len(blocks[0]) < 5 or time.perf_counter() < end:
        for engine, medians in zip(engines, blocks, strict=True):
            engine()
            runs: list[float] = []
            while len(runs) < 3 or sum(runs) < _BLOCK_SECONDS:
                start = time.perf_counter()
                engine()
                runs.append(time.perf_counter() - start)
            medians.append(float(np.median(runs)))
    return [np.array(medians) for medians in blocks]


def spread(values: np.ndarray) -> dict[str, float]:
    """Return the median and the 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def random_inputs(session: Session, batch: int) -> dict[str, np.ndarray]:
    """Return an input for every input of a network, always the same."""
    rng = np.random.default_rng(0)
    inputs = {}
    for value in session.inputs:
        size = batch if isinstance(value.shape[0], str) else value.nominal[0]
        if size != batch:
            raise InputError(f"the network takes batches of {size} only: --batch {size}")
        x = rng.standard_normal((batch, *value.nominal[1:]))
        inputs[value.name] = (x if "float" in value.dtype else abs(x)).astype(value.dtype)
    return inputs


def onnx_engine(model: Path, x: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    """Return what runs an ONNX model on x in onnxruntime.

    Raises
    ------
    ConversionError
        If onnxruntime is missing, or cannot run the model on x.
    """
    require("comparing", "onnxruntime")
    if not model.is_file():
        raise FileNotFoundError(f"{model}: there is no such file")
    try:
        session = ort.session(model, threads, exact=False)  # as fast as users have it
        session.run(None, x)
    except Exception as error:  # onnxruntime's exceptions share no useful base
        raise ConversionError(f"onnxruntime cannot run {model}: {error}") from error
    return lambda: session.run(None, x)
