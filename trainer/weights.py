"""Weight quantizers: parametrizations of a layer's weight, all of one interface.

`LogQuantizer` is STLQ and its relatives in log-exponent words (without select, one word, per-filter
selection); `LevelQuantizer` rounds to any other table of levels (uniform, APoT), to compare with.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from logshift.trainer import stlq

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
        self.groups = layer.groups if isinstance(layer, nn.ConvTranspose2d) else 0

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix (O, K)."""
        if self.groups:  # (I, O / group, kh, kw)
            _, outputs, kh, kw = self.shape
            parts = weight.reshape(self.groups, -1, outputs, kh, kw).permute(0, 2, 3, 4, 1)
            return parts.reshape(self.groups * outputs, -1)
        return weight.movedim(1, -1).reshape(len(weight), -1)

    def weight(self, rows: Tensor) -> Tensor:
        """Return the matrix (O, K) as a weight of the layer."""
        if self.groups:
            _, outputs, kh, kw = self.shape
            parts = rows.reshape(self.groups, outputs, kh, kw, -1).permute(0, 4, 1, 2, 3)
            return parts.reshape(self.shape)
        outputs, inputs, *kernel = self.shape
        return rows.reshape(outputs, *kernel, inputs).movedim(-1, 1).contiguous()


class WeightQuantizer(nn.Module):
    """Base of the parametrizations.

    Attributes
    ----------
    alpha : Parameter of shape (O, 1)
        Real value of the largest level of a word, per output channel, learned; see `magnitude`.
    regulariser : float32 Tensor
        l2 norm of the errors that are to shrink, in the last forward pass; see `stlq.TwoWords`.
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

    def refresh(self, weight: Tensor) -> None:
        """Choose anew which weights may have a second word; `weight` is the float weight."""


class LogQuantizer(WeightQuantizer):
    """Log-exponent words: `docs/quantization.md` section 2.

    Parameters
    ----------
    layer : nn.Conv2d, nn.ConvTranspose2d or nn.Linear
    bits : int
        Width b of a word, 2 to 5.
    ratio : float
        `residual_ratio`, the share of weights that may have a second word.
    granularity : {"element", "tile", "filter"}
    tile : int
        Weights per tile.
    clip : int
        Bound of |W| in units of alpha, 1 or 2.
    shift : int
        `residual_shift` s.
    regular : {"rest", "all", "none"}
        Which r1 the regulariser pulls to the grid: those without a second word, all, or none.
    """

    second: Tensor

    def __init__(
        self,
        layer: Layer,
        bits: int,
        ratio: float,
        granularity: str,
        tile: int,
        clip: int,
        shift: int,
        regular: str,
    ) -> None:
        super().__init__(layer, bits)
        self.ratio, self.granularity, self.tile = ratio, granularity, tile
        self.clip, self.shift, self.regular = clip, shift, regular
        rows = self.layout.rows(layer.weight.detach())
        self.alpha = nn.Parameter(stlq.search_alpha(rows, bits, clip, shift, ratio))
        self.register_buffer("second", torch.zeros_like(rows, dtype=torch.bool))
        self.refresh(layer.weight)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Choose the weights with the largest |alpha * r1|."""
        rows = self.layout.rows(weight)
        alpha = self.magnitude()
        error = stlq.split(rows, alpha, self.bits, self.clip, self.shift)[3] * alpha
        self.second.copy_(stlq.select(error, self.ratio, self.granularity, self.tile))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, of the shape of `weight`."""
        if self.regular == "rest":
            regular = ~self.second
        else:
            regular = torch.full_like(self.second, self.regular == "all")
        rows = self.layout.rows(weight.float())
        quantized, self.regulariser, self.second_words = stlq.TwoWords.apply(
            rows, self.magnitude(), self.second, regular, self.bits, self.clip, self.shift
        )
        return self.layout.weight(quantized)


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
