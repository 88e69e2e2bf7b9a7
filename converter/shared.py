"""Weights that several nodes have: quantized once, for what all of these read.

Unrolled loops and heads for several sizes of a picture use one weight again and again. What it is
multiplied with at the later places is not known when the first one is quantized; the inputs of the
float network stand for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logshift.converter.evaluate import rows, walk
from logshift.converter.feedback import Inputs, covariance, is_followed
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.settings import Settings

_BITS_OF_BIAS = 32


@dataclass
class Ahead:
    """What the float network says of the inputs of all nodes of a weight.

    Attributes
    ----------
    moments : float32 array (group, K, K)
        Summed over all nodes but the first; see `feedback.covariance`.
    mean : float64 array (group, K)
        Of what the weights of an output are multiplied with, over all nodes.
    has_one_bias : bool
        Whether the nodes' bias is one as well.
    """

    moments: np.ndarray
    mean: np.ndarray
    has_one_bias: bool

    def shift(self, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return what the bias must make up for if `values` stand for a weight, (O,)."""
        group, size = self.mean.shape
        lost = (weight - values).reshape(group, -1, size).astype(np.float64)
        return (lost @ self.mean[:, :, None]).reshape(-1)


def share(graph: FloatGraph) -> None:
    """Let nodes of equal weights have one array of them; in place."""
    found: dict[tuple[object, ...], np.ndarray] = {}
    for node in graph.nodes:
        if _is_rounded(node):
            assert node.weight is not None
            content = hashlib.sha256(node.weight.tobytes()).digest()
            key = node.op, node.attributes["group"], node.weight.shape, content
            node.weight = found.setdefault(key, node.weight)


def _is_rounded(node: FloatNode) -> bool:
    """Tell whether a node has words that are to be chosen."""
    return node.is_quantized and node.words is None


def layers(graph: FloatGraph) -> list[list[FloatNode]]:
    """Return the nodes of each weight whose words are to be chosen, in the order of the first."""
    found: dict[int, list[FloatNode]] = {}
    for node in graph.nodes:
        if _is_rounded(node):
            found.setdefault(id(node.weight), []).append(node)
    return list(found.values())


def weight_of(nodes: list[FloatNode]) -> np.ndarray:
    """Return the weight that nodes have in common."""
    weight = nodes[0].weight
    assert weight is not None
    return weight


def look_ahead(
    graph: FloatGraph, samples: Mapping[str, np.ndarray], batches: int, settings: Settings
) -> dict[int, Ahead]:
    """Run the float network and gather what weights of several nodes are multiplied with.

    Returns
    -------
    dict of `id` of a weight to Ahead
        Empty if every node has weights of its own.
    """
    several = {id(nodes[0].weight): nodes for nodes in layers(graph) if len(nodes) > 1}
    found: dict[int, Ahead] = {}
    if not several or not settings.error_feedback:
        return found
    for node, values in walk(graph, samples, batches):
        nodes = several.get(id(node.weight), [])
        if node not in nodes or not is_followed(node):
            continue
        x = Inputs(rows(values[node.inputs[0]]))
        seen = covariance(node, x, None, settings.bias_correction)
        if node is nodes[0]:
            nothing = np.zeros(seen.moments.shape, np.float32)
            found[id(node.weight)] = Ahead(
                nothing, seen.mean / len(nodes), _has_one_bias(nodes, settings)
            )
        else:
            ahead = found[id(node.weight)]
            ahead.moments += seen.moments
            ahead.mean += seen.mean / len(nodes)
    return found


def _has_one_bias(nodes: list[FloatNode], settings: Settings) -> bool:
    """Tell whether biases of their own would take more than the words of the weight."""
    first = nodes[0]
    weight = weight_of(nodes)
    return (
        first.op == "Conv"
        and all(np.array_equal(node.bias, first.bias) for node in nodes)  # type: ignore[arg-type]
        and len(nodes) * _BITS_OF_BIAS > weight[0].size * settings.weight_bits
    )
