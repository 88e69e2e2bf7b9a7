"""Activation quantizers: A-bit codes with a learned scale (`docs/quantization.md` section 3).

    x = scale * (c - zero_point)        c in [0, 2^A - 1]

The scale is learned as in LSQ (Esser et al., 2020); the zero point is fixed by calibration.
Rounding a tensor is bound by memory, so it is compiled where there is a compiler.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLE = 2**14  # values of each batch that calibration keeps
_SHRINK = torch.linspace(1.0, 0.1, 46).tolist()  # parts of the observed range that are tried


def _round(x: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor) -> Tensor:
    code = (torch.round(x.float() / scale) + zero_point).clamp(zero_point * 0, top)
    return ((code - zero_point) * scale).to(x.dtype)  # half the memory with 16-bit activations


def _gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    relative = x.float() / scale
    unclipped = torch.round(relative) + zero_point
    code = unclipped.clamp(zero_point * 0, top)
    inside = code == unclipped
    grad_scale = (grad * (code - zero_point - torch.where(inside, relative, 0.0))).sum()
    return torch.where(inside, grad, 0.0).to(x.dtype), grad_scale


@functools.cache
def _compiled(function: Callable) -> Callable:
    """Return the function compiled, or as it is if this machine has no C++ compiler.

    Compiling for a GPU needs one too.
    """
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return function
    return torch.compile(function, dynamic=True)


class _FakeQuantize(torch.autograd.Function):
    """Round to codes and back; gradients straight-through for x, LSQ's for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, top)
        return _compiled(_round)(x, scale, zero_point, top)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, top = ctx.saved_tensors
        grad_x, grad_scale = _compiled(_gradients)(x, scale, zero_point, top, grad)
        # LSQ's gradient scale, with the values of one example as N.
        return grad_x, grad_scale / math.sqrt(x[0].numel() * float(top)), None, None


class ActivationQuantizer(nn.Module):
    """Rounds what it is given to A-bit codes, once it is calibrated; before, it lets it pass.

    Parameters
    ----------
    bits : int
        A, 2 to 8.

    Attributes
    ----------
    scale : Parameter, float32 scalar
    zero_point : float32 scalar buffer
    ready : bool buffer
        Whether it is calibrated.
    """

    scale: nn.Parameter
    zero_point: Tensor
    top: Tensor
    ready: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("top", torch.tensor(2.0**bits - 1), persistent=False)
        self.register_buffer("ready", torch.tensor(False))
        self._seen: list[Tensor] | None = None

    def extra_repr(self) -> str:
        """Return what identifies it."""
        return f"bits={self.bits}, zero_point={int(self.zero_point)}"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded, of the same shape and type; codes are found in float32."""
        if self._seen is not None:
            self._seen.append(_sample(x.detach().float()))
            return x
        if not self.ready:
            return x
        return _FakeQuantize.apply(x, self.positive_scale(), self.zero_point, self.top)

    def positive_scale(self) -> Tensor:
        """Return the scale, or the least one if training has pushed it to or below zero."""
        return self.scale.clamp_min(1e-8)

    def observe(self) -> None:
        """Let values pass from now on, and remember some of them."""
        self._seen = []

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set scale and zero point to what rounds the values seen with the least squared error."""
        seen, self._seen = self._seen, None
        if not seen:  # a branch that is not taken
            return
        x = torch.cat(seen)
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        if low == high:
            high = 1.0
        best = math.inf
        for below in _SHRINK if low < 0 else (0.0,):
            # The negative part is searched more coarsely, both together would be a square of tries.
            for above in _SHRINK if low == 0 else {below, below * 0.9, below * 0.8, 1.0}:
                scale = (high * above - low * below) / float(self.top)
                if not scale > 0:
                    continue
                zero_point = min(max(round(-low * below / scale), 0), int(self.top))
                arguments = torch.tensor(scale), torch.tensor(float(zero_point)), self.top.cpu()
                error = float((_round(x, *arguments) - x).square().mean())
                if error < best:
                    best = error
                    self.scale.fill_(scale)
                    self.zero_point.fill_(zero_point)
        self.ready.fill_(True)


def _sample(x: Tensor) -> Tensor:
    """Return some of the values of a batch, its smallest and its largest among them."""
    flat = x.flatten().cpu()
    step = max(1, len(flat) // _SAMPLE)
    return torch.cat([flat[::step], flat.min()[None], flat.max()[None]])
