"""The convolutions of a network: their kernels chosen, and their weights as these want them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from logshift.kernels.activation import Target
from logshift.kernels.layer import FloatLayer, Layer
from logshift.kernels.machine.memory import Shelf, trim
from logshift.kernels.registry import kernel
from logshift.runtime.executor import spread
from logshift.runtime.graph import Graph, Node, Shape
from logshift.runtime.infer import nominal_shapes
from logshift.runtime.operators.base import target_of
from logshift.runtime.operators.conv import phases
from logshift.runtime.plan.convolution import Convolution

# Arrays by dtype, shape and content.
_LaidOut = dict[tuple[str, tuple[int, ...], bytes], np.ndarray]

_MANY = 2**19  # weights of a network that large pages are worth it for


def prepare(graph: Graph, family: str, threads: int = 1) -> dict[int, list[Convolution]]:
    """Choose kernels and lay out weights for all convolutions; keyed by the node's position.

    `threads` nodes are worked on at once. The largest go first, so that what they need on the way
    never adds to what others have left.
    """
    sizes = {
        index: math.prod(node.weight_shape)
        for index, node in enumerate(graph.nodes)
        if node.weight_shape is not None
    }
    shapes = nominal_shapes(graph)
    order = sorted(sizes, key=sizes.__getitem__, reverse=True)
    uses = Counter(id(graph.nodes[index].weights) for index in sizes)
    laid_out: dict[int, _LaidOut] = {key: {} for key, count in uses.items() if count > 1}
    shelf = Shelf() if sum(sizes.values()) >= _MANY else None
    prepared = spread(
        lambda index: list(
            _prepare_node(graph, graph.nodes[index], family, shapes, shelf, laid_out)
        ),
        order, threads,
    )  # fmt: skip
    if shelf is not None:
        trim()  # nothing that stays fills the gaps that packing leaves
    return dict(zip(order, prepared, strict=True))


def _prepare_node(
    graph: Graph, node: Node, family: str, shapes: dict[str, Shape], shelf: Shelf | None,
    laid_out: dict[int, _LaidOut],
) -> Iterator[Convolution]:  # fmt: skip
    is_coded = graph.on_codes(node)
    to = target_of(graph, node)
    layer_of = _coded_layer(graph, node, to) if is_coded else _float_layer(node)
    for taps, phase in phases(node):
        pixels = shapes[node.outputs[0]][0] * math.prod(shapes[node.outputs[0]][2:])
        layer = layer_of(
            taps, group=node.attributes["group"], strides=phase.strides,
            dilations=phase.dilations, pixels=pixels // math.prod(phase.steps),
        )  # fmt: skip
        chosen = kernel("conv" if is_coded else "float_conv", family, layer)
        assert chosen.pack is not None
        packed = chosen.pack(layer)
        shared = laid_out.get(id(node.weights))
        packed.fields.update(
            (key, _kept(value, shelf, shared))
            for key, value in packed.fields.items()
            if isinstance(value, np.ndarray)
        )
        # A layer keeps what it has computed; a new one holds nothing that only packing needs.
        yield Convolution(chosen, replace(layer), packed, phase, to)


def _kept(values: np.ndarray, shelf: Shelf | None, shared: _LaidOut | None) -> np.ndarray:
    """Return the array that stays: one for all layers that have laid out one weight alike."""
    if shared is None:
        return values if shelf is None else shelf.keep(values)
    key = values.dtype.str, values.shape, hashlib.sha256(values.tobytes()).digest()
    if key not in shared:
        shared[key] = values if shelf is None else shelf.keep(values)
    return shared[key]


def _coded_layer(graph: Graph, node: Node, to: Target) -> Callable[..., Layer]:
    """Return what makes a layer of some of the weights of a convolution of codes."""
    weights, bias = node.weights, node.bias
    assert weights is not None and bias is not None
    q_x = graph.quantization[node.inputs[0]]
    # docs/quantization.md section 4; float64 until the last step
    m = (q_x.scale * weights.unit() / to.unit).astype(np.float32)
    b = (bias.astype(np.float64) / to.unit + to.zero).astype(np.float32)
    slopes = None if to.slopes is None else np.full(b.shape, to.slopes)
    # Of a ConvTranspose all words are needed once for every phase.
    words = cache(weights.words)

    def layer(taps: Any, **geometry: Any) -> Layer:
        part, channels = weights, slice(None)
        if taps is not ...:
            part, channels = words(), taps[0].ravel()
            part = replace(
                part, first=part.first[taps], second=part.second[taps], alpha=part.alpha[channels]
            )
        return Layer(
            part, activation_bits=q_x.bits, z_x=q_x.zero_point, m=m[channels], b=b[channels],
            slopes=None if slopes is None else slopes[channels], is_activated=to.kind != 0,
            **geometry,
        )  # fmt: skip

    return layer


def _float_layer(node: Node) -> Callable[..., FloatLayer]:
    """Return what makes a layer of some of the weights of a convolution of float32."""
    bias, weights = node.bias, node.float_weights
    if node.weights is not None:
        weights = node.weights.values()
    assert bias is not None and weights is not None

    def layer(taps: Any, **geometry: Any) -> FloatLayer:
        part = np.ascontiguousarray(weights[taps], np.float32)
        channels = slice(None) if taps is ... else taps[0].ravel()
        return FloatLayer(part, bias=bias[channels], **geometry)

    return layer
