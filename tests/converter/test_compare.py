"""How outputs are compared: groups of channels, top classes, and what is neither."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logshift.converter.compare import OutputSums, Sums
from logshift.converter.samples import divide
from logshift.runtime.graph import ValueInfo


def error(pairs, **more):
    """Compare batches of an output one after the other."""
    shape = pairs[0][0].shape
    sums = OutputSums(ValueInfo("y", shape, shape), **more)
    for expected, found in pairs:
        sums.add(expected, found)
    return sums.error()


def noisy(x, scale, seed=1):
    return x + np.float32(scale) * np.random.default_rng(seed).standard_normal(x.shape).astype("f")


def channels_of(result):
    return [group.channels for group in result.groups]


def detections(count=3, boxes=400, classes=6, seed=0):
    """Boxes from 0 to 640 and scores, few of which are of anything: (1, 4 + classes, boxes)."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        x = np.zeros((1, 4 + classes, boxes), np.float32)
        x[:, :4] = rng.uniform(20, 640, (1, 4, boxes))
        x[:, 4:] = rng.uniform(0, 0.002, (1, classes, boxes))
        for place in rng.integers(0, boxes, 12):
            x[0, 4 + rng.integers(0, classes - 1), place] = rng.uniform(0.4, 0.9)
        out.append(x)
    return out


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3))
def test_sums_are_those_of_all_values_together(seed, channels, parts):
    rng = np.random.default_rng(seed)
    sums, xs, ys = Sums(), [], []
    for _ in range(parts):
        x, y = rng.standard_normal((2, channels, int(rng.integers(1, 9)))).astype(np.float32)
        sums.add(x, y)
        xs.append(x.astype(np.float64))
        ys.append(y.astype(np.float64))
    for chosen in (slice(None), np.array([rng.integers(channels)])):
        x, y = (np.concatenate([part[chosen].ravel() for part in z]) for z in (xs, ys))
        snr = 10 * np.log10((x @ x) / ((x - y) @ (x - y)))
        assert sums.snr_db(chosen) == pytest.approx(snr, rel=1e-9)
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert sums.cosine(chosen) == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("axis", [1, 2])
def test_boxes_do_not_hide_scores(axis):
    pairs = []
    for x in detections():
        y = x.copy()
        y[:, 4:] = np.round(y[:, 4:] * 3) / 3  # no boxes differ, scores do
        pairs.append((x, y) if axis == 1 else (x.transpose(0, 2, 1), y.transpose(0, 2, 1)))
    result = error(pairs)
    # The class that no sample shows belongs to the others.
    assert channels_of(result) == [((0, 3),), ((4, 9),)]
    assert result.cosine > 0.9999
    boxes, scores = result.groups
    assert boxes.axis == scores.axis == axis
    assert boxes.cosine == pytest.approx(1) and 0.9 < scores.cosine < 0.99
    x, y = (np.concatenate([np.moveaxis(p[i], axis, 1)[:, 4:].ravel() for p in pairs])
            for i in (0, 1))  # fmt: skip
    assert scores.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-5)
    assert result.agreement is None and "ranges" in result.note


def test_boxes_of_0_to_1_do_not_hide_rare_scores():
    pairs = []
    for x in detections():
        x[:, :4] /= 640
        pairs.append((x, x))
    assert channels_of(error(pairs)) == [((0, 3),), ((4, 9),)]


def test_key_points_between_their_scores_are_one_group():
    rng = np.random.default_rng(0)
    x = rng.uniform(50, 640, (1, 5 + 9, 200)).astype(np.float32)
    x[:, [4, 7, 10, 13]] /= 640
    result = error([(x, x)])
    assert channels_of(result) == [((0, 3), (5, 6), (8, 9), (11, 12)),
                                   ((4, 4), (7, 7), (10, 10), (13, 13))]  # fmt: skip
    assert str(result.groups[1]) == "channels 4, 7, 10, 13 of axis 1"
    assert result.groups[0].indices(14).tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 11, 12]


def test_scores_of_nothing_are_a_group_too():
    x = detections(1)[0]
    x[:, 4:] = np.minimum(x[:, 4:], 0.01)
    found = x.copy()
    found[:, 4:] = 0
    boxes, scores = error([(x, found)]).groups
    assert (boxes.channels, scores.channels) == (((0, 3),), ((4, 9),))
    assert boxes.cosine == pytest.approx(1) and np.isnan(scores.cosine) and scores.says_something


def test_a_few_values_tell_no_range():
    x = np.random.default_rng(0).standard_normal((9, 20)).astype(np.float32)
    x[:, 7] *= 0.01
    for count, groups in ((3, 1), (9, 2)):
        assert len(error([(row[None], row[None]) for row in x[:count]]).groups) == groups


def test_an_odd_channel_is_no_group():
    x = np.random.default_rng(0).standard_normal((2, 256, 7, 7)).astype(np.float32)
    x[:, 100] *= 0.01
    assert channels_of(error([(x, x)])) == [()]


@pytest.mark.parametrize("shape", [(2, 12, 20, 24), (1, 12, 5, 6)])
def test_ranges_that_are_alike_are_one_group(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    result = error([(x, noisy(x, 0.1))])
    assert channels_of(result) == [()]
    assert result.groups[0].cosine == result.cosine and result.groups[0].snr_db == result.snr_db
    assert result.snr_db == pytest.approx(20, abs=1)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return (e / e.sum(axis, keepdims=True)).astype(np.float32)


LOGITS = 3 * np.random.default_rng(2).standard_normal((50, 9)).astype(np.float32)
MAPS = 3 * np.random.default_rng(2).standard_normal((2, 5, 16, 12)).astype(np.float32)
READING = np.random.default_rng(3).standard_normal((2, 12, 30)).astype(np.float32)

CLASSES = {  # scores, the axis of the classes, what else is known
    "logits": (LOGITS, 1, {}),
    "logits of height and width 1": (LOGITS[:, :, None, None], 1, {}),
    "probabilities": (softmax(LOGITS, 1), 1, {}),
    "labels": (np.abs(LOGITS), 1, {"classes": 9}),
    "segmentation": (MAPS, 1, {"picture": (32, 24)}),
    "probabilities of places": (softmax(MAPS, 1), 1, {}),
    "text": (softmax(READING, 2), 2, {}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_top_classes_are_compared(name):
    x, axis, known = CLASSES[name]
    y = noisy(x, 0.5 * x.std())
    expected = (x.argmax(axis) == y.argmax(axis)).mean()
    assert 0.2 < expected < 1
    pairs = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    result = error(pairs, **known)
    assert result.agreement == pytest.approx(expected) and not result.note
    assert channels_of(result) == [()]


UNIT = LOGITS / np.linalg.norm(LOGITS, axis=1, keepdims=True)

NO_CLASSES = {
    "vectors of length 1": (UNIT, {}),
    "coordinates": (np.abs(LOGITS) * 20, {}),
    "one value": (LOGITS[:, :1], {}),
    "numbers of different ranges": (LOGITS * np.float32([100, 100, 1, 1, 1, 1, 1, 1, 1]), {}),
    "a picture": (MAPS[:, :3], {"picture": (16, 12)}),
    "a head of a detector": (MAPS, {"picture": (256, 192)}),
}


@pytest.mark.parametrize("name", NO_CLASSES)
def test_what_are_no_classes(name):
    x, known = NO_CLASSES[name]
    result = error([(x, noisy(x, 0.01))], **known)
    assert result.agreement is None and result.note and result.cosine > 0.9


def test_numbers_that_are_no_floats():
    x = np.arange(10).reshape(2, 5)
    y = x.copy()
    y[0, 0] = 7
    result = error([(x, y)])
    assert result.agreement == 0.9 and result.groups == [] and result.cosine is None


def test_what_cannot_be_compared_is_said():
    x = np.ones((1, 5, 4), np.float32)
    assert "depends on values" in error([(x, x), (x, x[:, :3])]).note
    assert error([(x[:, :0], x[:, :0])]).note == "it is empty"
    assert not error([(0 * x, x)]).groups[0].says_something


def test_sizes_may_change_and_infinities_are_left_out():
    rng = np.random.default_rng(0)
    pairs = []
    for size in (4, 9, 6):
        x = rng.standard_normal((1, 8, size)).astype(np.float32)
        x[:, 2:4] *= 100
        y = noisy(x, 0.01)
        x[0, 0, 0] = -np.inf
        pairs.append((x, y))
    assert channels_of(error(pairs)) == [((0, 1), (4, 7)), ((2, 3),)]
    assert all(group.cosine > 0.999 for group in error(pairs).groups)
    pairs[1][1][0, 5, 0] = np.nan
    assert error(pairs).snr_db == -np.inf


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def test_samples_are_divided(batches, fitting, most, size):
    data = {
        "x": np.arange(batches * size)[:, None] + np.zeros((1, 2), int),
        "y": np.repeat(np.arange(batches), 2),
    }
    found = divide(data, batches, fitting, most)
    calibrating, measuring = found.calibration["x"][:, 0], [b["x"][:, 0] for b in found.measuring]
    assert len(calibrating) == found.batches * size and all(len(x) == size for x in measuring)
    assert np.array_equal(found.calibration["y"], np.repeat(calibrating[::size] // size, 2))
    together = np.concatenate([calibrating, *measuring])
    if found.held_back:
        assert sorted(together) == list(range(batches * size))
        if batches > fitting:
            assert found.batches == fitting
        else:
            assert len(measuring) == min(batches // 5, most)
    else:
        assert batches <= fitting and batches < 5
        assert sorted(together) == sorted([*range(batches * size)] * 2)
