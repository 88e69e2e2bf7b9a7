"""Weights of ONNX operators in ONNX's own form: which constants are some, and words for them.

What an operator multiplies with its data, or looks up for them, is a weight; every other constant
(biases, scales, positions, sizes) stays exactly what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from logshift.converter.feedback import encode_alone, encode_with_feedback
from logshift.converter.float_graph import FloatGraph
from logshift.converter.metadata import WeightRecord
from logshift.converter.recognise import recognise
from logshift.converter.settings import Settings
from logshift.runtime.graph import ConstantWords, Shape, rows_first

_FEWEST = 1024  # values that words are worth it for
_SHORTEST = 16  # row: an alpha takes as much as some words
_FEWEST_ROWS = 32  # of a table that is looked up: fewer are cases, like sizes of anchors
_SAMPLES = 4096  # rows of inputs whose covariance is taken, or three for each column
_MOST_INPUTS = 4096  # columns of a covariance


class _Node(Protocol):
    """What nodes of lowered and of packed graphs have in common."""

    op: str
    inputs: list[str]
    attributes: dict[str, Any]

    @property
    def outputs(self) -> list[str]: ...

    @property
    def is_onnx(self) -> bool: ...


def weights_among(
    nodes: Iterable[_Node],
    constants: Mapping[str, np.ndarray],
    inputs: Iterable[str],
    keeps: Callable[[Any], bool] = lambda node: False,
) -> dict[str, tuple[int, ...]]:
    """Return the constants that are nothing but weights, and the axes of their rows.

    Parameters
    ----------
    nodes : FloatNodes or Nodes, in execution order
    constants : dict of name to array
    inputs : tensor names
        Of the network.
    keeps : callable(node)
        Whether a node's weights stay what they are.
    """
    found: dict[str, tuple[int, ...]] = {}
    others: set[str] = set()
    data = set(inputs)  # and all that depends on their values, not on their sizes alone
    for node in nodes:
        follows = not data.isdisjoint(node.inputs)
        if follows and node.op not in ("Shape", "Size"):
            data.update(filter(None, node.outputs))
        for index, name in enumerate(node.inputs):
            if name not in constants:
                continue
            axes = None
            if follows and node.is_onnx and not keeps(node):
                axes = _axes(node, index, constants[name].shape)
            if axes is None or not _is_worth_it(constants[name], axes):
                others.add(name)
            else:
                found.setdefault(name, axes)
    return {name: axes for name, axes in found.items() if name not in others}


def find_weights(graph: FloatGraph, hints: Mapping[str, WeightRecord]) -> None:
    """Find the weights among the constants of a network, and their words if they are on a grid.

    Parameters
    ----------
    graph : FloatGraph
        After `place`; changed in place.
    hints : dict of name to WeightRecord
        Grids that are known.
    """
    graph.weights = weights_among(
        graph.nodes,
        {n: x for n, x in graph.constants.items() if n not in graph.results.values()},
        [info.name for info in graph.inputs],
        lambda node: node.keeps_weight,
    )
    for name, axes in graph.weights.items():
        words = recognise(_matrix(graph.constants[name], axes), hints.get(name))
        if words is not None:
            shape = graph.constants[name].shape
            graph.constant_words[name] = ConstantWords(words, shape, axes)


def _is_worth_it(array: np.ndarray, axes: Sequence[int]) -> bool:
    if array.dtype != np.float32 or array.size < _FEWEST or not np.isfinite(array).all():
        return False
    return array.size >= _SHORTEST * math.prod(array.shape[axis] for axis in axes)


def _axes(node: _Node, index: int, shape: Shape) -> tuple[int, ...] | None:
    """Return the axes of the rows of a weight, None if an operator's input is none."""
    rank, a = len(shape), node.attributes
    if node.op == "MatMul" and rank >= 2 and index < 2:
        return (*range(rank - 2), rank - 1 - (index == 0))
    if node.op == "Gemm" and index < 2:
        turned = bool(a.get("transB" if index else "transA", 0))
        return (int(index == 1) ^ turned,)
    if node.op in ("LSTM", "GRU", "RNN") and index in (1, 2):
        return (0, 1)  # directions, and the gates of all units
    if node.op == "Conv" and index == 1:
        return (0,)
    if node.op == "ConvTranspose" and index == 1:
        return (1,) if a.get("group", 1) == 1 else (0,)
    if node.op == "Gather" and index == 0 and rank >= 2:
        axis = a.get("axis", 0) % rank
        return (axis,) if shape[axis] >= _FEWEST_ROWS else None
    if node.op == "Einsum":
        return _kept_axes(a.get("equation", ""), index, rank)
    return None


def _kept_axes(equation: str, index: int, rank: int) -> tuple[int, ...] | None:
    """Return the axes of an operand that the result has as well; None if that are all."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    own = terms.split(",")[index]
    if not arrow or len(own) != rank or "." in equation:
        return None
    kept = tuple(axis for axis, letter in enumerate(own) if letter in result)
    return kept if len(kept) < rank else None


def _matrix(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return a constant as its words have it, (O, 1, 1, K)."""
    rows = math.prod(array.shape[axis] for axis in axes)
    ordered = array.transpose(rows_first(axes, array.ndim))
    return np.ascontiguousarray(ordered).reshape(rows, 1, 1, -1)


def encode_constant(
    array: np.ndarray,
    axes: tuple[int, ...],
    quantized: np.ndarray | None,
    exact: np.ndarray | None,
    settings: Settings,
    ratio: float,
) -> ConstantWords:
    """Quantize a weight.

    Parameters
    ----------
    array : float32 array
    axes : tuple of int
        Of its rows.
    quantized, exact : float arrays (group, rows, K), optional
        What it is multiplied with in the quantized network and in the float one, see `rows_read`;
        if that is not known each weight is rounded by itself.
    settings : Settings
    ratio : float
        `residual_ratio` of this weight.
    """
    matrix = _matrix(array, axes)
    if (
        not settings.error_feedback
        or matrix.shape[3] > _MOST_INPUTS
        or quantized is None
        or exact is None
        or quantized.shape != exact.shape
    ):
        return ConstantWords(encode_alone(matrix, settings, ratio), array.shape, axes)
    group, count, size = quantized.shape
    outputs = (exact - quantized) @ matrix.reshape(group, -1, size).transpose(0, 2, 1)
    moments = quantized.transpose(0, 2, 1) @ quantized / count
    lost = (outputs.transpose(0, 2, 1) @ quantized / count).astype(np.float64)
    words = encode_with_feedback(matrix, moments, lost, settings, ratio)
    return ConstantWords(words, array.shape, axes)


def rows_read(
    node: _Node, index: int, inputs: Sequence[Any], outputs: Sequence[list[np.ndarray]]
) -> np.ndarray | None:
    """Return rows that the weights of a node are multiplied with, float (group, rows, K).

    Parameters
    ----------
    node : FloatNode
    index : int
        Which of its inputs is the weight.
    inputs : list of Value
        Its inputs; only data are looked at.
    outputs : list of list of array
        Its outputs, for every batch.

    Returns
    -------
    array, or None where that is not known; not too many rows, the same for inputs of a shape
    """
    if node.op in ("MatMul", "Gemm") and index == 1 and not node.attributes.get("transA"):
        found = [_batches(inputs[0])]
    elif node.op in ("LSTM", "GRU", "RNN") and index == 1:
        found = [_batches(inputs[0])]
    elif node.op in ("LSTM", "GRU", "RNN") and outputs and not node.attributes.get("layout"):
        # (steps, directions, batch, units): of every direction what it reads at the next step.
        found = [[y[:, d] for y in outputs[0]] for d in range(outputs[0][0].shape[1])]
    else:
        return None
    stacked = [np.concatenate([x.reshape(-1, x.shape[-1]) for x in xs]) for xs in found]
    together = np.stack(stacked)
    if not np.isfinite(together).all():
        return None
    count, size = together.shape[1:]
    most = max(_SAMPLES, 3 * size)
    if count > most:
        together = together[:, np.random.default_rng(0).choice(count, most, replace=False)]
    return together.astype(np.float32)


def _batches(value: Any) -> list[np.ndarray]:
    return value if isinstance(value, list) else [value]
