"""The arithmetic, against vectors that the encoder is tested against too, and its gradients."""

import json
from pathlib import Path

import pytest
import torch

from logshift.trainer import stlq
from logshift.trainer.blocks import Blocks

VECTORS = Path(__file__).parents[2] / "tests/vectors/stlq.json"


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text()), ids=str)
def test_words_are_those_of_the_shared_vectors(case):
    w = torch.tensor([case["w"]])
    alpha = torch.tensor([[case["alpha"]]])
    bits, clip, shift = case["bits"], case["clip"], case["residual_shift"]
    _, _, q0, r1 = stlq.split(w, alpha, bits, clip, shift)
    assert q0[0].tolist() == case["q0"]
    q1 = stlq.nearest_level(r1, bits)
    assert q1[0].tolist() == case["q1"]

    value, _, count = stlq.TwoWords.apply(w, alpha, torch.ones_like(w), None, bits, clip, shift)
    unit = alpha.double() / 2 ** (stlq.exponent_levels(bits) - 1 + shift)
    integers = torch.tensor([case["q0"]]) * 2**shift + torch.tensor([case["q1"]])
    assert torch.equal(value, (integers * unit).float())
    assert int(count) == sum(q != 0 for q in case["q1"])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_are_straight_through_and_follow_alpha():
    w = (draw(1, 3, 50) * 0.6).requires_grad_()
    alpha = torch.tensor([[0.5], [1.0], [2.0]], requires_grad=True)
    share = (draw(2, 3, 50).clamp(0, 1)).requires_grad_()
    value, _, _ = stlq.TwoWords.apply(w, alpha, share, None, 4, 1, 0)
    weights = draw(3, 3, 50)
    (value * weights).sum().backward()
    inside = w.abs() <= alpha
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(w.grad, torch.where(inside, weights, 0.0))
    # value = alpha * W(w / alpha): dW = -w / alpha^2 where W follows w, else W is a constant.
    slope = torch.where(inside, value - w, value) / alpha
    expected = (weights * slope).sum(1, keepdim=True)
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-4, atol=1e-5)
    # value = LogQ(w) + LogQ(r1 * share), both straight-through: that of a share is r1.
    _, r0, q0, _ = stlq.split(w.detach(), alpha.detach(), 4, 1, 0)
    r1 = (r0 - q0) * alpha.detach() / 64
    torch.testing.assert_close(share.grad, weights * r1)
    torch.testing.assert_close(r1, w.detach().clamp(-alpha, alpha).detach() - q0 * alpha / 64)


def test_a_share_of_a_second_word_is_a_smaller_second_word():
    w, alpha = draw(7, 2, 200) * 0.4, torch.tensor([[1.0], [0.5]])
    _, _, q0, r1 = stlq.split(w, alpha, 4, 1, 1)
    for share in (0.0, 0.3, 1.0):
        value, _, count = stlq.TwoWords.apply(w, alpha, torch.full_like(w, share), None, 4, 1, 1)
        q1 = stlq.nearest_level(r1 * share, 4)
        torch.testing.assert_close(value, (2 * q0 + q1) * alpha / 128, rtol=0, atol=0)
        assert count == q1.count_nonzero()
    assert count > 300


def test_the_regulariser_pulls_errors_without_a_second_word_to_the_grid_and_no_others():
    w = (draw(4, 4, 60) * 0.3).requires_grad_()
    alpha = torch.tensor([[1.0], [0.8], [0.001], [1.2]])
    _, r0, q0, r1 = stlq.split(w.detach(), alpha, 4, 1, 0)
    second = Blocks(4, 1, 60).select(r1, 0.25)
    _, norm, _ = stlq.TwoWords.apply(w, alpha, second.float(), ~second, 4, 1, 0)
    mean = alpha.square().mean().sqrt()
    error = torch.where(second, 0.0, (r0 - q0) * alpha / 64)
    torch.testing.assert_close(norm, error.norm() / mean)
    norm.backward()
    assert (w.grad[second] == 0).all()
    # The gradient of |error| / mean with q0 constant; clipped weights cannot move their r0.
    inside = w.detach().abs() <= alpha
    expected = torch.where(inside, error / error.norm() / mean, 0.0)
    torch.testing.assert_close(w.grad, expected)
    closer = stlq.split(w.detach() - 1e-3 * w.grad, alpha, 4, 1, 0)[3]
    assert (closer * alpha)[~second].norm() < (r1 * alpha)[~second].norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_searched_alpha_is_the_best_of_the_candidates(bits):
    w = draw(6, 5, 200)
    clip = stlq.default_clip(bits)
    alpha = stlq.search_alpha(w, bits, clip, 0, 0.0)

    def error(candidate):
        _, _, q0, _ = stlq.split(w, candidate, bits, clip, 0)
        unit = candidate / 2 ** (stlq.exponent_levels(bits) - 1)
        return (q0 * unit - w).square().sum(1)

    best = error(alpha)
    for octave in (0.0, 0.25, 0.5, 1.0, 1.75):
        assert (best <= error(w.abs().amax(1, keepdim=True) * 2.0**-octave) * 1.0001).all()


def test_a_channel_of_zeros_stays_zero():
    w = torch.zeros(1, 9)
    alpha = stlq.search_alpha(w, 4, 1, 0, 0.15)
    everything = torch.ones_like(w)
    value, norm, count = stlq.TwoWords.apply(w, alpha, everything, everything > 0, 4, 1, 0)
    assert alpha.item() == 1 and not value.any() and norm == 0 and count == 0


def test_small_weights_are_searched_as_large_ones_and_negligible_ones_are_zeros():
    w = draw(6, 5, 200)
    alpha = stlq.search_alpha(w, 4, 1, 0, 0.15)
    assert torch.equal(stlq.search_alpha(w * 2.0**-90, 4, 1, 0, 0.15), alpha * 2.0**-90)
    w = torch.tensor([[1.2e-38, 0.0], [7e-31, 1e-45], [8e-31, 0.0]])
    alpha = stlq.search_alpha(w, 4, 1, 0, 0.15)
    assert alpha[:2].eq(1).all() and stlq.NEGLIGIBLE / 4 < alpha[2] < 8e-31 * 1.01
