"""Where second words buy most: one budget for the model, spent by effect on its outputs.

What a second word takes from the squared error of its weight (`docs/quantization.md` section 2),
times the variance of the weight's input, is what it takes from the error of its layer's outputs;
times the layer's sensitivity, from the error of the network's. Sensitivities are measured: each
layer by itself gets single words, and the rest of the float network runs on what comes out of it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import numpy as np

from logshift.converter.evaluate import Network, Value, clamped, rows
from logshift.converter.feedback import input_variance
from logshift.converter.float_graph import FloatGraph
from logshift.converter.progress import Progress
from logshift.converter.settings import Settings
from logshift.kernels import codec

_PICTURES = 8  # that sensitivities are measured on


def residual_ratios(
    graph: FloatGraph,
    samples: Mapping[str, np.ndarray],
    batches: int,
    settings: Settings,
    progress: Progress,
) -> dict[str, float]:
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

    Returns
    -------
    dict of the output name of a layer with weights to the ratio of its own
    """
    layers = [node for node in graph.nodes if node.is_quantized and node.words is None]
    ratio = settings.residual_ratio
    if ratio in (0.0, 1.0) or len(layers) < 2:
        return {node.output: ratio for node in layers}
    size = max(len(x) // batches for x in samples.values())
    few = min(batches, max(1, _PICTURES // size))
    part = {name: x[: few * (len(x) // batches)] for name, x in samples.items()}
    network = _Network(graph, part, few)
    worth: list[np.ndarray] = []
    sizes: list[int] = []
    for number, node in enumerate(layers):
        progress(number, len(layers), f"measuring {node.name}")
        assert node.weight is not None
        single = codec.encode(node.weight, settings.weight_bits, 0.0)
        gain = codec.gains(
            node.weight, single.alpha, single.bits, settings.residual_shift, single.clip
        )
        # What is not finite is for the conversion itself to refuse.
        with np.errstate(over="ignore", invalid="ignore"):
            sensitivity = network.sensitivity(node.output, single.values())
            variance = np.nan_to_num(
                sensitivity * input_variance(node, rows(network.values[node.inputs[0]]))
            )
        gain *= np.repeat(variance, len(gain) // len(variance), axis=0)
        blocks, size = codec.blocks(gain, settings.granularity, settings.tile)
        worth.append(blocks.astype(np.float32) / size)
        sizes.append(size)
    weights = sum(node.weight.size for node in layers if node.weight is not None)
    bought = _bought(worth, sizes, ratio * weights)
    return {
        node.output: float(np.count_nonzero(chosen) / len(chosen))
        for node, chosen in zip(layers, bought, strict=True)
    }


def _bought(worth: list[np.ndarray], sizes: list[int], budget: float) -> list[np.ndarray]:
    """Mark what the budget is spent on, by layers: what is worth most per weight comes first."""
    everything = np.concatenate(worth)
    if len(set(sizes)) == 1:
        chosen = codec.largest(everything, min(int(budget // sizes[0]), len(everything)))
    else:
        best = np.argsort(-everything, kind="stable")
        spent = np.cumsum(np.repeat(sizes, [len(part) for part in worth])[best])
        chosen = np.zeros(len(everything), bool)
        chosen[best[spent <= budget]] = True
    return np.split(chosen, np.cumsum([len(part) for part in worth])[:-1])


class _Network(Network):
    """The float network on a few pictures."""

    def sensitivity(self, name: str, weight: np.ndarray) -> float:
        """Squared relative error of all outputs, per squared error of a layer with this weight.

        What the layer's bias can make up for, the mean error of a channel, is none.
        """
        changed: dict[str, Value] = {}
        values = ChainMap(changed, self.values)
        error = 0.0
        for node, evaluator in zip(self.graph.nodes, self.evaluators, strict=True):
            if node.output == name:
                inputs = [rows(self.values[n]) for n in node.inputs]
                y, exact = evaluator(inputs, weight), evaluator(inputs)
                y -= (y - exact).mean(axis=(0, 2, 3), keepdims=True)
                error = float(np.square(y - exact).sum(axis=(1, 2, 3)).mean(dtype=np.float64))
                # Of one position of the outputs.
                error /= exact[0, 0].size
                changed[name] = clamped(y, node.clamp)
            elif changed.keys() & set(node.inputs):
                changed.update(self.results(node, evaluator, values))
        if error == 0.0:
            return 0.0
        total = 0.0
        for info in self.graph.outputs:
            if info.name not in changed or not info.dtype.startswith("float"):
                continue
            exact, found = rows(self.values[info.name]), rows(changed[info.name])
            if exact.shape == found.shape:
                power = float(np.square(exact).mean(dtype=np.float64)) or 1.0
                total += float(np.square(found - exact).mean(dtype=np.float64)) / power
        return total / error
