"""The page of a packed file, as far as it is known from this, its model and some inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from logshift.converter.evaluate import snr_db
from logshift.converter.float_graph import FloatGraph
from logshift.converter.onnx_model import Model, Runner
from logshift.converter.page.content import Page, float_weights, gather
from logshift.converter.pipeline import lowered, placed
from logshift.converter.progress import Progress
from logshift.converter.report import LayerReport, Report
from logshift.converter.samples import open_samples
from logshift.converter.settings import Settings
from logshift.converter.verdict import Verdict
from logshift.kernels.errors import LogshiftError
from logshift.runtime.file.describe import layer_bytes
from logshift.runtime.graph import Graph


def page_of_file(
    loaded: Model,
    path: Path,
    packed: Graph,
    verdict: Verdict,
    output_snr_db: Mapping[str, float],
    batches: Sequence[dict[str, np.ndarray]],
    progress: Progress,
) -> Page:
    """Measure what the page of a packed file shows.

    Parameters
    ----------
    loaded : Model
    path : path
        Of the packed file.
    packed : Graph
        What it holds.
    verdict : Verdict
    output_snr_db : dict of tensor name to float
        Of the tensors that both networks have.
    batches : list of dict of input name to array
        Batches of the model.
    progress : callable(done, total, what)
    """
    graph = _float_graph(loaded, packed, batches)
    exact = float_weights(graph)
    sizes = layer_bytes(path)
    layers, weights, residuals = [], 0, 0
    for index, node in enumerate(packed.nodes):
        out = next(filter(None, node.outputs))
        more: dict[str, Any] = {}
        if (words := node.weights) is not None:
            size = int(np.prod(words.shape))
            more = {"weight_shape": words.shape, "bits": words.bits, "nzr": words.nzr}
            if out in exact:
                more["weight_snr_db"] = snr_db(exact[out], words.values())
            weights, residuals = weights + size, residuals + round(words.nzr * size)
        snr = output_snr_db.get(out)
        layers.append(LayerReport(node.name, node.op, snr, sizes[index], **more))
    report = Report(
        os.fspath(path), layers, os.path.getsize(path), loaded.size, weights,
        residuals / max(weights, 1), 0, packed.settings, verdict=verdict,
    )  # fmt: skip
    return gather(report, packed, graph, Runner(loaded.given), batches, progress)


def _float_graph(
    loaded: Model, packed: Graph, batches: Sequence[dict[str, np.ndarray]]
) -> FloatGraph | None:
    """Return the float network that the file was made from, None if it cannot be found again."""
    known = {f.name for f in fields(Settings)} - {"weight_bits", "residual_ratio"}
    given = {k: v for k, v in packed.settings.items() if k in known}
    given["keep_float"] = tuple(given.get("keep_float", ()))
    try:
        samples = open_samples(batches[:1], loaded.inputs, None)
        settings = Settings(**given)
        network = lowered(loaded, samples, settings)
        graph = placed(network, loaded, settings, packed.settings.get("float_tensors", ()))
    except (LogshiftError, TypeError):
        return None
    made = {name for node in packed.nodes for name in node.outputs}
    shapes = {node.outputs[0]: node.weight_shape for node in packed.nodes if node.weight_shape}
    found = float_weights(graph)
    fits = all(node.output in made for node in graph.nodes) and all(
        name in found and found[name].shape == shape for name, shape in shapes.items()
    )
    return graph if fits else None
