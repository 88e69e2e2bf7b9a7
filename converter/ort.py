"""How ONNX Runtime's sessions are made here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from logshift.runtime.cores import default_threads

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return options of a session that lives beside others.

    Its threads do not spin when they have nothing to do, as they would without end: converting
    has a session for every layer. Warnings are for those who wrote the model.

    Parameters
    ----------
    threads : int, optional
        By default as many as a session of logshift would have.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def session(
    model: onnx.ModelProto | str | os.PathLike[str],
    threads: int | None = None,
    *,
    optimize: bool = True,
    exact: bool = True,
    keeps_memory: bool = True,
) -> onnxruntime.InferenceSession:
    """Return a session that lives beside others; see `session_options`.

    Parameters
    ----------
    model : onnx.ModelProto or path
    threads : int, optional
    optimize : bool
        Whether onnxruntime may change its graph.
    exact : bool
        Whether a model in QDQ form computes what it says, in float32 between its pairs. Else
        onnxruntime rounds float32 weights between them to int8, one scale for all of a layer, and
        leaves out pairs that follow others.
    keeps_memory : bool
        Whether it keeps what a run has taken, for the next one.
    """
    import onnxruntime

    options = session_options(threads)
    options.enable_cpu_mem_arena = keeps_memory
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, (str, os.PathLike)) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def attempt(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[Any]:
    """Run a model as it is, in a way that may fail: nothing is printed, whatever is raised."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return list(session(model, optimize=False).run(None, dict(inputs), options))
