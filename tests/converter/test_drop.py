"""How much accuracy is lost at most, where nobody knows the labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from logshift.converter.drop import Drop, drop


def test_nothing_seen_is_the_rule_of_three():
    # 0.95 = 1 - (1 - most)^n, whatever the loss of a picture is counted in.
    for count in (10, 44, 1000):
        found = Drop(0.0, 0.0, 8.0, count).most
        assert found == pytest.approx(8 * (1 - 0.05 ** (1 / count)))
        assert found < 8 * 3 / count


@pytest.mark.parametrize(("chance", "count"), [(0.01, 50), (0.1, 50), (0.1, 400), (0.5, 20)])
def test_the_bound_holds_in_19_of_20_cases(chance, count):
    rng = np.random.default_rng(0)
    shares = rng.binomial(count, chance, 2000) / count  # the worst distribution there is
    most = np.array([Drop(100 * p, p, 100.0, count).most for p in shares])
    assert np.mean(most >= 100 * chance) >= 0.95
    assert np.median(most) < 100 * (chance + 3 * math.sqrt(chance / count) + 3 / count)


def test_how_many_are_needed():
    measured = Drop(expected=0.3, share=0.05, worst=6.0, samples=40)
    assert measured.most > 0.5
    needed = measured.needed(0.5)
    assert Drop(0.3, 0.05, 6.0, needed).most <= 0.5 < Drop(0.3, 0.05, 6.0, needed - 1).most
    assert measured.needed(0.3) == 0
    assert measured.needed(7.0) == 0 or Drop(0.3, 0.05, 6.0, 1).most <= 7.0


def logits(count, classes=10, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((count, classes))


def test_equal_outputs_lose_nothing():
    x = logits(20)
    assert drop(x, x) == Drop(0.0, 0.0, 0.0, 20)
    assert drop(x, x).most == 0.0


def test_labels_agree():
    # Labels drawn from what the float network says: the bound is no less than what is lost.
    x, rng = logits(4000), np.random.default_rng(1)
    probability = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    labels = (probability.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    found = x + 0.7 * rng.standard_normal(x.shape)
    lost = 100 * np.mean((x.argmax(1) == labels) * 1.0 - (found.argmax(1) == labels))
    assert 1.0 < lost
    holds = 0
    for seed in range(40):
        some = np.random.default_rng(seed).choice(4000, 60, replace=False)
        measured = drop(x[some], found[some])
        holds += measured.most >= lost
        assert measured.samples == 60 and 0 < measured.expected < measured.most < measured.worst
    assert holds >= 38
    assert lost < drop(x, found).most < 3 * lost


def test_further_pictures_say_how_undecided_the_network_is():
    x = logits(200)
    found = x + 0.3 * np.random.default_rng(2).standard_normal(x.shape)
    few, more = drop(x[:30], found[:30]), drop(x[:30], found[:30], x[30:])
    assert (few.samples, more.samples) == (30, 200)
    assert more.most < few.most


def test_pixels_of_a_picture_are_one_sample():
    x = np.random.default_rng(3).standard_normal((6, 4, 50, 50))
    found = x + 0.1 * np.random.default_rng(4).standard_normal(x.shape)
    measured = drop(x, found)
    assert measured.samples == 6
    assert measured.most >= measured.worst * (1 - 0.05 ** (1 / 6))


def test_probabilities_are_as_good_as_scores():
    x = logits(50)
    found = x + 0.3 * np.random.default_rng(5).standard_normal(x.shape)
    softmax = [np.exp(y) / np.exp(y).sum(axis=1, keepdims=True) for y in (x, found)]
    centred = [y - np.log(np.exp(y).sum(axis=1, keepdims=True)) for y in (x, found)]
    assert drop(*softmax).most == pytest.approx(drop(*centred).most, rel=1e-3)
