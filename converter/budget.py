"""Where second words buy most: one budget for the model, spent by effect on its outputs.

What a second word takes from the squared error of its weight (`docs/quantization.md` section 2),
times the variance of the weight's input, is what it takes from the error of its layer's outputs;
times the layer's sensitivity, from the error of the network's. Sensitivities are measured: each
layer by itself gets single words, and the rest of the float network runs on what comes out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from logshift.converter.compare import mean_square
from logshift.converter.encode import Blocks, encode, gains, largest, tile_of
from logshift.converter.evaluate import AT_ONCE, Network, Value, rows
from logshift.converter.feedback import encode_alone, input_variance
from logshift.converter.float_graph import FloatGraph, FloatNode
from logshift.converter.progress import Progress
from logshift.converter.settings import Settings
from logshift.converter.shared import layers, weight_of
from logshift.kernels.stlq.codec import LogWeights, exponent_levels
from logshift.kernels.stlq.tiling import Tiling
from logshift.runtime.cores import default_threads
from logshift.runtime.executor import spread

# Least and most second words, by what is preferred; and what others may still take from the squared
# error of the outputs, over their squares, so that they are not worth their bytes.
_RATIOS = {
    "speed": (0.15, 0.5, 1e-4),
    "size": (0.0, 0.15, 3e-3),
    None: (0.15, 0.5, 1e-4),
    "accuracy": (0.15, 1.0, 3e-5),
}
# Pictures that sensitivities are measured on: fewer, down to `_FEWEST`, if more values were to be
# computed for all layers together, and one if more were to be kept.
_PICTURES, _FEWEST, _COMPUTED, _KEPT = 8, 2, 2**30, 2**27
AUTO_BITS = (3, 4, 5)
_AUTO_RATIOS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.22, 0.3, 0.45, 0.65, 1.0)
_ROWS = 64  # output channels on which they are tried, at most


@dataclass(frozen=True)
class Share:
    """What one layer gets: bits of its words, and `residual_ratio` of its own."""

    bits: int
    ratio: float


# Weights of the blocks of every layer: of all, or of each.
_Sizes = list[int | np.ndarray]

# By the output name of a layer with weights.
Plan = dict[str, Share]


@dataclass(frozen=True)
class Priced:
    """A plan, and its expected size in bytes."""

    size: float
    plan: Plan


@dataclass(frozen=True)
class _Case:
    """A share for a layer: expected bits of its file, squared error of the network's outputs."""

    share: Share
    size: float
    error: float


def fixed_plan(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
) -> Plan:
    """Divide the model's second words among its layers.

    Parameters
    ----------
    graph : FloatGraph
    samples : dict of input name to array (pictures, ...)
    batches : int
        Batches of the model that these are.
    settings : Settings
        `residual_ratio` is the budget: second words, over the weights of all layers.
    progress : callable(done, total, what)
    """
    found = layers(graph)
    bits, ratio = settings.weight_bits, settings.residual_ratio
    if ratio in (0.0, 1.0) or not found or (len(found) == 1 and not isinstance(ratio, str)):
        return {node.output: Share(bits, float(ratio)) for nodes in found for node in nodes}
    worth: list[np.ndarray] = []
    sizes: _Sizes = []
    for nodes, single, variance in _measured(graph, samples, batches, settings, progress):
        weight = weight_of(nodes)
        gain = gains(weight, single.alpha, bits, settings.residual_shift, single.clip)
        gain *= np.repeat(variance, len(gain) // len(variance), axis=0)
        s, group = settings, nodes[0].attributes["group"]
        blocks = Blocks(weight.shape, s.granularity, tile_of(s.granularity, s.tile), group)
        summed = blocks.sums(gain.reshape(weight.shape)).astype(np.float32)
        # Within a layer tiles are chosen by what they gain as a whole, also small ones at edges.
        worth.append(summed / np.float32(np.max(blocks.size)))
        sizes.append(blocks.size)
    if isinstance(ratio, str):
        ratio = _enough(worth, sizes, settings)
    bought = _bought(worth, sizes, ratio * sum(weight_of(nodes).size for nodes in found))
    return {
        node.output: Share(bits, float(np.count_nonzero(chosen) / len(chosen)))
        for nodes, chosen in zip(found, bought, strict=True)
        for node in nodes
    }


def _enough(worth: list[np.ndarray], sizes: _Sizes, settings: Settings) -> float:
    """Return the share of second words after which others have little left to take."""
    least, most, enough = _RATIOS[settings.prefer]
    everything = np.concatenate(worth)
    if (common := _common(sizes)) is not None:  # sorting is much faster than finding out an order
        size = whole = np.full(len(everything), common)
        everything = np.sort(everything)[::-1]
    else:
        order = np.argsort(-everything, kind="stable")
        size = _of_each(worth, sizes)[order]
        whole = _of_each(worth, [int(np.max(of_layer)) for of_layer in sizes])[order]
        everything = everything[order]
    # From units of the grid.
    levels = exponent_levels(settings.weight_bits) - 1 + settings.residual_shift
    taken = np.cumsum(everything.astype(np.float64) * whole) / 4.0**levels
    share = np.cumsum(size) / size.sum()
    first = np.searchsorted(taken, taken[-1] - enough)
    return float(np.clip(share[min(first, len(share) - 1)], least, most))


def _common(sizes: _Sizes) -> int | None:
    """Return the size that all blocks have, None if they differ."""
    numbers = {size for size in sizes if isinstance(size, int)}
    return numbers.pop() if len(numbers) == 1 and all(isinstance(n, int) for n in sizes) else None


def _of_each(worth: list[np.ndarray], sizes: _Sizes) -> np.ndarray:
    """Return the size of each block."""
    parts = zip(worth, sizes, strict=True)
    return np.concatenate([np.broadcast_to(size, part.shape) for part, size in parts])


def _bought(worth: list[np.ndarray], sizes: _Sizes, budget: float) -> list[np.ndarray]:
    """Mark what the budget is spent on, by layers: what is worth most per weight comes first."""
    everything = np.concatenate(worth)
    if (common := _common(sizes)) is not None:
        chosen = largest(everything, min(int(budget // common), len(everything)))
    else:
        best = np.argsort(-everything, kind="stable")
        spent = np.cumsum(_of_each(worth, sizes)[best])
        chosen = np.zeros(len(everything), bool)
        chosen[best[spent <= budget]] = True
    return np.split(chosen, np.cumsum([len(part) for part in worth])[:-1])


def best_plans(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
    bits: Sequence[int] = AUTO_BITS,
) -> list[Priced]:
    """Return plans of which each is expected to be the best at its size, the smallest first.

    A layer gets more only where the error of the network falls by as much for each bit as anywhere
    else; `bits` are those that its words may have.
    """
    tried = [
        (nodes, _cases(nodes, variance, settings, bits))
        for nodes, _, variance in _measured(graph, samples, batches, settings, progress)
    ]
    plans: dict[float, Priced] = {}
    for price in _prices(cases for _, cases in tried):
        chosen = [
            (nodes, min(cases, key=lambda c: c.error + price * c.size)) for nodes, cases in tried
        ]
        size = sum(case.size for _, case in chosen) / 8
        plan = {node.output: case.share for nodes, case in chosen for node in nodes}
        plans.setdefault(size, Priced(size, plan))
    return sorted(plans.values(), key=lambda priced: priced.size)


def _cases(
    nodes: list[FloatNode], variance: np.ndarray, settings: Settings, tried: Sequence[int]
) -> list[_Case]:
    """Try bits and ratios on a weight, on some of its output channels if it has many."""
    whole = weight_of(nodes)
    rows, group = _some_rows(whole.shape, nodes[0].attributes["group"], settings)
    weight = whole[rows]
    of_rows = np.repeat(variance, len(whole) // len(variance), axis=0)[rows]
    scale = whole.size / weight.size
    cases = []
    for bits in tried:
        for ratio in _AUTO_RATIOS:
            words = encode_alone(weight, replace(settings, weight_bits=bits), ratio, group)
            error = np.square(words.values() - weight, dtype=np.float64).reshape(of_rows.shape)
            size = weight.size * (_entropy(words.first) + _entropy(words.second))
            cases.append(
                _Case(Share(bits, ratio), scale * size, scale * float((error * of_rows).sum()))
            )
    return cases


def _some_rows(
    shape: tuple[int, int, int, int], group: int, settings: Settings
) -> tuple[np.ndarray, int]:
    """Return about `_ROWS` output channels, those of whole tiles, and of how many groups these are.

    Tiles of the rows, cut by so many groups, are tiles of the weight.
    """
    outputs, together = shape[0], 1
    if isinstance(settings.tile, tuple):
        tiling = Tiling(shape, settings.tile, group)  # of which shorter ones are left out
        together, most = tiling.height, tiling.together
        begins = np.arange(0, outputs, most)[:, None] + np.arange(most // together) * together
    else:
        begins = np.arange(outputs)
    begins = begins.ravel()
    begins = begins[:: -(-len(begins) * together // _ROWS)]
    return (begins[:, None] + np.arange(together)).ravel(), len(begins)


def _entropy(codes: np.ndarray) -> float:
    """Bits of information in a code."""
    counts = np.bincount(codes.ravel())
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum())


def _prices(layers: Iterable[list[_Case]]) -> np.ndarray:
    """Return errors per bit, from one where every layer is as good as it gets to its opposite."""
    slopes = [
        (worse.error - better.error) / (better.size - worse.size)
        for cases in layers
        for better in cases
        for worse in cases
        if better.size > worse.size and better.error < worse.error
    ]
    return np.unique(slopes) if slopes else np.ones(1)


def _measured(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
) -> Iterator[tuple[list[FloatNode], LogWeights, np.ndarray]]:
    """Yield the nodes of every weight, its single words, and what its squared errors count.

    The last is an array (group, K).
    """
    found = layers(graph)
    network = Network(graph, *few_samples(graph, samples, batches, len(found)), 1)
    threads = default_threads()

    def measure(nodes: list[FloatNode]) -> tuple[list[FloatNode], LogWeights, np.ndarray]:
        single = encode(weight_of(nodes), settings.weight_bits, 0.0)
        # What is not finite is for the conversion itself to refuse.
        with np.errstate(over="ignore", invalid="ignore"):
            variance = sum(
                input_variance(node, rows(network.values[node.inputs[0]])) for node in nodes
            )
            sensitivity = _sensitivity(network, nodes, single.values())
            return nodes, single, np.nan_to_num(sensitivity * variance)

    for begin in range(0, len(found), AT_ONCE * threads):
        progress(begin, len(found), f"measuring {found[begin][0].name}")
        yield from spread(measure, found[begin : begin + AT_ONCE * threads], threads)


def few_samples(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    layers: int,
    most: int = _PICTURES,
) -> tuple[dict[str, np.ndarray], int]:
    """Return the first samples, on which it is measured what each of so many layers does.

    Parameters
    ----------
    graph : FloatGraph
    samples : dict of input name to array (pictures, ...)
    batches : int
        Batches of the model that these are.
    layers : int
    most : int
        Pictures that are enough.

    Returns
    -------
    dict of input name to array
    int
        How many batches these are.
    """
    size = max(len(x) // batches for x in samples.values())
    few = min(batches, max(1, min(_pictures(graph, layers), most) // size))
    return {name: x[: few * (len(x) // batches)] for name, x in samples.items()}, few


def _pictures(graph: FloatGraph, layers: int) -> int:
    batch = max(graph.inputs[0].nominal[0], 1)
    names = [name for node in graph.nodes for name in node.outputs if name]
    values = max(sum(math.prod(graph.shapes[name]) for name in names) // batch, 1)
    pictures = np.clip(_COMPUTED // (max(layers, 1) * values), _FEWEST, _PICTURES)
    return int(np.clip(_KEPT // values, 1, pictures))


def _sensitivity(network: Network, nodes: list[FloatNode], weight: np.ndarray) -> float:
    """Squared relative error of all outputs, per squared error of layers with this weight.

    What a layer's bias can make up for, the mean error of a channel, is none.
    """
    error = 0.0

    def changed(values: Mapping[str, Value], node: FloatNode) -> np.ndarray:
        nonlocal error
        evaluator = network.evaluator(node)
        inputs = [rows(network.values[name]) for name in node.inputs]
        exact = evaluator(inputs)
        lost = evaluator(inputs, weight) - exact
        lost -= lost.mean(axis=(2, 3)).mean(axis=0)[:, None, None]
        # Of one position of the outputs.
        error += lost.shape[1] * mean_square(lost)
        # Of another node with this weight.
        if any(values[name] is not network.values[name] for name in node.inputs):
            exact = evaluator([rows(values[name]) for name in node.inputs])
        return evaluator.finish(exact + lost)

    changes = {node.output: partial(changed, node=node) for node in nodes}
    noise = network.noise(network.rerun(changes))
    return sum(noise.values()) / error if error else 0.0
