"""Weight quantizers: parametrizations of a layer's weight, all of one interface.

`LogQuantizer` has log-exponent words, all second words that it selects and no others;
`FadingQuantizer` is STLQ, which fades the others out; `PenaltyQuantizer` drives their errors to the
grid instead, to compare with, as `LevelQuantizer` is, which rounds to any other table of levels
(uniform, APoT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logshift.trainer import stlq
from logshift.trainer.blocks import Blocks, Granularity

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear

# A magnitude is a sum of one value of each term, zero or a power of two.
_APOT_EXPONENTS = {2: [[0]], 3: [[0, 1, 2]], 4: [[0, 1, 3], [2]], 5: [[0, 2, 4], [1, 3, 5]]}


class Layout:
    """Between a layer's weight and the matrix (O, K) in the order that kernels read: kh, kw, C.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    """

    def __init__(self, layer: Layer) -> None:
        self.shape = layer.weight.shape
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self._transposed = isinstance(layer, nn.ConvTranspose2d)

    def blocks(self, granularity: Granularity, tile: int | tuple[int, int]) -> Blocks:
        """Return the blocks of the layer's weights."""
        outputs, inputs, *kernel = self.shape
        if self._transposed:  # (I, O / group, kh, kw)
            outputs, inputs = self.groups * inputs, outputs // self.groups
        return Blocks(outputs, math.prod(kernel), inputs, self.groups, granularity, tile)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix (O, K)."""
        if self._transposed:
            _, outputs, kh, kw = self.shape
            parts = weight.reshape(self.groups, -1, outputs, kh, kw).permute(0, 2, 3, 4, 1)
            return parts.reshape(self.groups * outputs, -1)
        return weight.movedim(1, -1).reshape(len(weight), -1)

    def weight(self, rows: Tensor) -> Tensor:
        """Return the matrix (O, K) as a weight of the layer."""
        if self._transposed:
            _, outputs, kh, kw = self.shape
            parts = rows.reshape(self.groups, outputs, kh, kw, -1).permute(0, 4, 1, 2, 3)
            return parts.reshape(self.shape)
        outputs, inputs, *kernel = self.shape
        return rows.reshape(outputs, *kernel, inputs).movedim(-1, 1).contiguous()


class WeightQuantizer(nn.Module):
    """Base of the parametrizations.

    Attributes
    ----------
    alpha : Parameter of shape (O, 1), or (1, 1) if the layer has one scale
        Real value of the largest level of a word, learned; see `magnitude`.
    regulariser : float32 Tensor
        What lambda multiplies in the loss, in the last forward pass.
    second_words : int64 Tensor
        Number of weights that had a second word then.
    """

    alpha: nn.Parameter

    def __init__(self, layer: Layer, bits: int) -> None:
        super().__init__()
        self.layout = Layout(layer)
        self.bits = bits
        self.regulariser = torch.zeros(())
        self.second_words = torch.zeros((), dtype=torch.int64)

    def magnitude(self) -> Tensor:
        """Return |alpha|, positive: where a channel's weights have died, steps go past zero."""
        return self.alpha.abs().clamp_min(stlq.NEGLIGIBLE)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied: not the graph behind the regulariser."""
        return self.__dict__ | {"regulariser": self.regulariser.detach()}


@dataclass(frozen=True)
class Words:
    """How a layer is written in words: `docs/quantization.md` section 2.

    Attributes
    ----------
    bits : int
        Width b of a word, 2 to 5.
    ratio : float
        `residual_ratio`, the share of blocks that have second words.
    granularity : {"element", "tile", "filter"}
        What a block is.
    tile : int or (int, int)
        Of `blocks.Blocks`.
    clip : int
        Bound of |W| in units of alpha, 1 or 2.
    shift : int
        `residual_shift` s.
    scale : {"channel", "layer"}
        Whether each output channel has an alpha, or the layer.
    """

    bits: int
    ratio: float
    granularity: Granularity = "element"
    tile: int | tuple[int, int] = (16, 16)
    clip: int = 1
    shift: int = 0
    scale: Literal["channel", "layer"] = "channel"

    @property
    def array_tile(self) -> tuple[int, int] | None:
        """Inputs and outputs of the tiles of an array, if these are selected."""
        if self.granularity == "tile" and isinstance(self.tile, tuple):
            return self.tile
        return None


class LogQuantizer(WeightQuantizer):
    """Log-exponent words, second ones where they are selected.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    words : Words

    Attributes
    ----------
    selected : bool Tensor, of the shape of the blocks
        The selection tensor C.
    """

    selected: Tensor

    def __init__(self, layer: Layer, words: Words) -> None:
        super().__init__(layer, words.bits)
        self.words = words
        self.blocks = self.layout.blocks(words.granularity, words.tile)
        rows = self.layout.rows(layer.weight.detach().float())
        scaled = rows if words.scale == "channel" else rows.reshape(1, -1)

        def searched(ratio: float, second: Tensor | None = None) -> nn.Parameter:
            return nn.Parameter(
                stlq.search_alpha(scaled, words.bits, words.clip, words.shift, ratio, second)
            )

        if words.granularity == "element":
            self.alpha = searched(words.ratio)
        else:
            # Few channels have the second words of their own worst weights, those of blocks: alpha
            # is that of first words, and of both where blocks are chosen with it.
            self.alpha = searched(0.0)
            second = self.blocks.spread(self.blocks.select(self.error(rows), words.ratio))
            self.alpha = searched(0.0, second.reshape(scaled.shape))
        self.register_buffer("selected", self.blocks.select(self.error(rows), words.ratio))

    def magnitude(self) -> Tensor:
        """Return |alpha| of every output channel, (O, 1)."""
        return super().magnitude().expand(self.blocks.rows[0], 1)

    @torch.no_grad()
    def error(self, rows: Tensor) -> Tensor:
        """Return alpha * r1 of weights (O, K)."""
        words, alpha = self.words, self.magnitude()
        return stlq.split(rows, alpha, words.bits, words.clip, words.shift)[3] * alpha

    def share(self) -> Tensor:
        """Return how much of its second word each block has, 0 to 1."""
        return self.selected.float()

    def penalised(self) -> Tensor | None:
        """Return the weights whose errors the regulariser is the norm of, bool (O, K), if any."""
        return None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, of the shape of `weight`."""
        words = self.words
        rows = self.layout.rows(weight.float())
        share, penalised = self.blocks.spread(self.share()), self.penalised()
        quantized, self.regulariser, self.second_words = stlq.TwoWords.apply(
            rows, self.magnitude(), share, penalised, words.bits, words.clip, words.shift
        )
        return self.layout.weight(quantized)


class FadingQuantizer(LogQuantizer):
    """STLQ as published (Oh, Sim, Lee, Lee, CVPR 2021, section 4).

    C is chosen once, from the float weights. Blocks that are not selected keep a part of their
    second words, v, which is trained with the weights: w~ = LogQ(w) + LogQ(r1 * (C + v)). The
    regulariser is the square of its norm.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    words : Words
    select : bool
        Whether anything is selected: without, all second words fade, and lambda decides how many
        there are in the end.

    Attributes
    ----------
    v : Parameter, of the shape of the blocks
        0 where C is set.
    """

    EPSILON = 0.001  # of v; what is less is 0 after a step

    def __init__(self, layer: Layer, words: Words, select: bool = True) -> None:
        super().__init__(layer, words)
        self.cuts = select
        if not select:
            self.selected.zero_()
        rows = self.layout.rows(layer.weight.detach().float())
        # The norm of r1 in units of the layer's root mean square alpha; the paper's has one scale.
        mean = self.magnitude().detach().square().mean().sqrt()
        top = 2.0 ** (stlq.exponent_levels(words.bits) - 1 + words.shift)
        score = self.blocks.sum((self.error(rows) / (top * mean)).square()).sqrt()
        score = torch.where(self.selected, -torch.inf, score)
        self.v = nn.Parameter((score - score.max()).exp().nan_to_num(0.0))

    def share(self) -> Tensor:
        """Return C + v."""
        return self.selected + self.v

    def fading(self) -> Tensor:
        """Return v of the blocks that are not selected, one-dimensional."""
        return self.v.detach()[~self.selected]

    @torch.no_grad()
    def fade(self) -> None:
        """Keep v at most 1, and set it to 0 where it is below epsilon, and where C is set."""
        self.v.clamp_max_(1.0).masked_fill_(self.selected | (self.v < self.EPSILON), 0.0)

    @torch.no_grad()
    def cut(self) -> None:
        """Set what is left of v to 0, if there is a selection."""
        if self.cuts:
            self.v.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, of the shape of `weight`."""
        quantized = super().forward(weight)
        self.regulariser = self.v.square().sum()
        return quantized


class PenaltyQuantizer(LogQuantizer):
    """Drive errors without a second word to the grid: the regulariser is the l2 norm of these r1.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    words : Words
    select : bool
        Without, all weights have second words and all errors are driven to the grid.
    """

    def __init__(self, layer: Layer, words: Words, select: bool = True) -> None:
        super().__init__(layer, words if select else replace(words, ratio=1.0))
        self.select = select

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose anew which weights may have a second word; `weight` is the float weight."""
        error = self.error(self.layout.rows(weight))
        self.selected.copy_(self.blocks.select(error, self.words.ratio))

    def penalised(self) -> Tensor:
        """Return those that are not selected, or all."""
        selected = self.blocks.spread(self.selected)
        return ~selected if self.select else torch.ones_like(selected)


class _Nearest(torch.autograd.Function):
    """alpha * nearest(w / alpha), straight-through where w is not beyond the last level."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, levels: Tensor) -> Tensor:
        relative = w / alpha
        clipped = relative.clamp(levels[0], levels[-1])
        level = levels[torch.bucketize(clipped, (levels[1:] + levels[:-1]) / 2)]
        ctx.save_for_backward(relative, clipped, level)
        return level * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        relative, clipped, level = ctx.saved_tensors
        inside = relative == clipped
        grad_alpha = grad * (level - torch.where(inside, clipped, 0.0))
        return torch.where(inside, grad, 0.0), grad_alpha.sum(1, keepdim=True), None


class LevelQuantizer(WeightQuantizer):
    """Round to the nearest of given levels times a learned alpha per channel.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    bits : int
    levels : list of float
        Ascending; the largest magnitude is 1.
    """

    levels: Tensor

    def __init__(self, layer: Layer, bits: int, levels: list[float]) -> None:
        super().__init__(layer, bits)
        rows = self.layout.rows(layer.weight.detach())
        self.register_buffer("levels", torch.tensor(levels, device=rows.device), persistent=False)

        def error(alpha: Tensor) -> Tensor:
            quantized = _Nearest.apply(rows, alpha, self.levels)
            return (quantized - rows).double().square().sum(1, keepdim=True)

        self.alpha = nn.Parameter(stlq.best_alpha(rows, error))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, of the shape of `weight`."""
        rows = self.layout.rows(weight.float())
        return self.layout.weight(_Nearest.apply(rows, self.magnitude(), self.levels))


def uniform_levels(bits: int) -> list[float]:
    """Return the levels of a signed integer of `bits` bits, the lowest being -1 (LSQ)."""
    half = 2 ** (bits - 1)
    return [code / half for code in range(-half, half)]


def apot_levels(bits: int) -> list[float]:
    """Return the levels of additive powers of two (Li, Dong, Wang, 2020), the largest being 1."""
    terms = [[0.0, *(2.0**-e for e in exponents)] for exponents in _APOT_EXPONENTS[bits]]
    magnitudes = sorted({sum(values) for values in product(*terms)})
    largest = magnitudes[-1]
    return sorted({sign * m / largest for m in magnitudes for sign in (1, -1)})
