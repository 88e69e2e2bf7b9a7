"""STLQ in PyTorch: the arithmetic of `docs/quantization.md` sections 1 and 2, with gradients.

Symbols (`alpha`, `L`, `q0`, `q1`, `r0`, `r1`, `S`, `W`) are those of that page. All of it is
float32, whatever autocast does around it: that decides ties, so it is part of the definition.
Weights are matrices of shape (O, K), one output channel a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 5
NEGLIGIBLE = 2.0**-100  # a channel whose largest weight is less counts as zeros (section 1)

# alpha candidates are max|w| * 2^-g: one octave moves every level onto the next, the rest of the
# range only trades clipping of the largest weights against resolution of the smallest.
ALPHA_OCTAVES = torch.linspace(0.0, 1.75, 57, dtype=torch.float64).tolist()


def exponent_levels(bits: int) -> int:
    """Return L, the number of non-zero magnitudes of a `bits`-bit word (section 1)."""
    return 2 ** (bits - 1) - 1


def default_clip(bits: int) -> int:
    """Return how far two words may reach, in units of alpha: 2 below 4 bits, else 1 (section 2)."""
    return 2 if bits < 4 else 1


def nearest_level(r: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 0 and ±2^(e-1) in the linear domain, ties toward zero (section 1).

    Parameters
    ----------
    r : float32 Tensor, any shape
        In units of the grid.
    bits : int
        Width b of a word.

    Returns
    -------
    float32 Tensor of the same shape.
    """
    magnitude = r.abs()
    # Mantissas above 1.5 carry into the exponent; no logarithm is taken, so ties are exact.
    power = ((magnitude.view(torch.int32) + 0x3FFFFF) & 0x7F800000).view(torch.float32)
    level = power.clamp(1.0, 2.0 ** (exponent_levels(bits) - 1))
    return torch.where(magnitude > 0.5, level, 0.0) * r.sign()


def split(
    w: Tensor, alpha: Tensor, bits: int, clip: int, shift: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split weights into the parts of section 2.

    Parameters
    ----------
    w : float32 Tensor of shape (O, K)
    alpha : float32 Tensor of shape (O, 1)
    bits, clip, shift : int
        Word width b, bound of |W| in units of alpha, `residual_shift` s.

    Returns
    -------
    relative, r0, q0, r1 : float32 Tensors of shape (O, K)
        w / alpha * 2^(L-1) before clipping and after it, the first word, and what it leaves,
        in units of the second word's grid.
    """
    top = 2.0 ** (exponent_levels(bits) - 1)
    relative = w / alpha * top
    r0 = relative.clamp(-clip * top, clip * top)
    q0 = nearest_level(r0, bits)
    return relative, r0, q0, (r0 - q0) * 2.0**shift


class TwoWords(torch.autograd.Function):
    """Quantized weights, the l2 norm of the penalised r1, and the number of second words.

    The weight is that of the paper, w~ = LogQ(w) + LogQ(r1 * share). Gradients are
    straight-through: W's is that of w where w is not clipped, and that of a share is r1's.
    The gradient of the norm takes q0 and alpha for constants, so that it pulls w to the grid.

    The norm is that of alpha * r1 / 2^(L-1), in units of the layer's root mean square alpha. In
    units of each channel's own grid, channels that training has given up, whose alpha is next to
    nothing, would have most of the norm and explode; and the same lambda would pull 2^8 times as
    hard with 5 bits as with 4.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        alpha: Tensor,
        share: Tensor,
        penalised: Tensor | None,
        bits: int,
        clip: int,
        shift: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return w~ (O, K), the norm of r1 where `penalised`, and count(q1 != 0).

        `share`, (O, K), is how much of its second word each weight has, C + v.
        """
        relative, r0, q0, r1 = split(w, alpha, bits, clip, shift)
        q1 = nearest_level(r1 * share, bits)
        top, fine = 2.0 ** (exponent_levels(bits) - 1), 2.0**shift
        integer = q0 * fine + q1
        saved = [relative, r0, alpha, integer]
        norm = w.new_zeros(())
        ctx.top, ctx.fine = top, fine
        if penalised is not None:
            ctx.mean = alpha.square().mean().sqrt()
            pulled = torch.where(penalised, r0 - q0, 0.0) * (alpha / (top * ctx.mean))
            norm = pulled.norm()
            saved += [pulled, norm]
        elif ctx.needs_input_grad[2]:
            saved += [q0]
        ctx.save_for_backward(*saved)
        count = q1.count_nonzero()
        ctx.mark_non_differentiable(count)
        return integer * (alpha / (top * fine)), norm, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_norm: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of w, alpha and share."""
        relative, r0, alpha, integer, *others = ctx.saved_tensors
        inside = relative == r0
        unclipped = torch.where(inside, r0, 0.0)
        grad_alpha = grad * ((integer / ctx.fine - unclipped) / ctx.top)
        grad_w, grad_share = torch.where(inside, grad, 0.0), None
        if ctx.needs_input_grad[2]:
            (q0,) = others
            grad_share = grad * ((r0 - q0) * (alpha / ctx.top))
        elif others:
            pulled, norm = others
            pull = pulled * (grad_norm / (norm.clamp_min(1e-12) * ctx.mean))
            grad_w = grad_w + torch.where(inside, pull, 0.0)
        return grad_w, grad_alpha.sum(1, keepdim=True), grad_share, None, None, None, None


def search_alpha(
    w: Tensor, bits: int, clip: int, shift: int, ratio: float, second: Tensor | None = None
) -> Tensor:
    """Find alpha per output channel by minimising squared error; max |w| is the upper end.

    Parameters
    ----------
    w : float32 Tensor of shape (O, K)
    bits, clip, shift : int
        As for `split`.
    ratio : float
        Share of each channel's weights, those that gain most, that have a second word while alpha
        is judged.
    second : bool Tensor of shape (O, K), optional
        Instead of `ratio`, the weights that have one.

    Returns
    -------
    float32 Tensor of shape (O, 1), positive (1 for a channel of zeros).
    """
    chosen = int(ratio * w.shape[1])

    def error(alpha: Tensor) -> Tensor:
        relative, _, q0, r1 = split(w, alpha, bits, clip, shift)
        one = (relative - q0).square()
        two = (relative - q0 - nearest_level(r1, bits) * 2.0**-shift).square()
        gain = (one - two).clamp_min(0)
        gain = gain.topk(chosen, 1).values if second is None else gain * second
        left = one.sum(1, keepdim=True) - gain.sum(1, keepdim=True)
        return left.double() * alpha.double().square()

    return best_alpha(w, error)


def best_alpha(w: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the candidate for alpha of least error in each channel.

    Parameters
    ----------
    w : float32 Tensor of shape (O, K)
    error : callable
        From alpha to the squared error of each channel, both of shape (O, 1).

    Returns
    -------
    float32 Tensor of shape (O, 1), positive (1 for a channel of zeros, as negligible ones are).
    """
    largest = w.abs().amax(1, keepdim=True)
    largest = torch.where(largest >= NEGLIGIBLE, largest, 1.0)
    best, alpha = torch.full_like(largest, torch.inf), largest
    for octave in ALPHA_OCTAVES:
        candidate = largest * 2.0**-octave
        found = error(candidate)
        alpha = torch.where(found < best, candidate, alpha)
        best = torch.minimum(found, best)
    return alpha
