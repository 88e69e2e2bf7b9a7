"""How far the outputs of a packed network are from the float model's, summed up over samples.

Channels whose ranges differ are compared apart: boxes from 0 to 640 would hide scores from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from logshift.runtime.graph import ValueInfo

_GAP = 2.0  # octaves between the channels of two groups, in root mean square
_MOST_GROUPS = 4
_LEAST_SHARE = 0.01  # of the channels; fewer of them are no group
_SEEN = 0.1  # a probability that never gets so far says that there is nothing
_FEWEST = 8  # values of a channel that tell its range
_UNSEEN = 1e-3  # a probability that says nothing is not wrong by less
_SAME = 1e-3  # of sums and norms that are one by construction
_PICTURE = 128  # an axis of pictures is longer
_FINEST = 4  # pixels of the input, along an axis, that a segmented one stands for at most


def mean_square(x: np.ndarray) -> float:
    """Return the mean of the squares."""
    flat = x.reshape(-1)
    return float(np.vdot(flat, flat)) / max(flat.size, 1)


class Sums:
    """Running sums for each channel of two tensors.

    Attributes
    ----------
    totals : float64 array (4, channels)
        Of the squares of the expected values, of the squares of those found, of their products, and
        of their squared differences.
    differences : list of float64 array (channels,)
        The last ones of each call.
    """

    def __init__(self) -> None:
        self.totals = np.zeros((4, 1))
        self.differences: list[np.ndarray] = []

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Add arrays (channels, values)."""
        x, y = expected.astype(np.float64), found.astype(np.float64)
        difference = x - y
        pairs = ((x, x), (y, y), (x, y), (difference, difference))
        added = np.stack([np.einsum("cv,cv->c", *pair) for pair in pairs])
        self.totals = self.totals + added
        self.differences.append(added[3])

    def _total(self, channels: np.ndarray | slice) -> list[float]:
        return [float(total) for total in self.totals[:, channels].sum(axis=1)]

    def snr_db(self, channels: np.ndarray | slice = slice(None)) -> float:
        """10 log10(squares of the expected values / squared differences); infinite if equal."""
        expected, _, _, difference = self._total(channels)
        if difference == 0:
            return math.inf
        if not expected or not math.isfinite(difference):
            return -math.inf
        return 10 * math.log10(expected / difference)

    def cosine(self, channels: np.ndarray | slice = slice(None)) -> float:
        """Cosine of the angle between both; NaN if one of them is zero."""
        expected, found, product, _ = self._total(channels)
        norm = math.sqrt(expected) * math.sqrt(found)
        return product / norm if norm else math.nan


@dataclass(frozen=True)
class GroupError:
    """How far channels of one range are from the float model's.

    Attributes
    ----------
    channels : tuple of (first, last)
        Empty for an output that is one group.
    axis : int
        That of the channels; of an output of class scores, that of the classes.
    snr_db, cosine : float
        As of `TensorError`.
    says_something : bool
        False if all of the float model's values are zero.
    """

    channels: tuple[tuple[int, int], ...]
    axis: int
    snr_db: float
    cosine: float
    says_something: bool = True

    def __str__(self) -> str:
        """Return the channels, as one writes them."""
        if not self.channels:
            return ""
        ends = [str(a) if a == b else f"{a}-{b}" for a, b in self.channels]
        text = ", ".join(ends[:4]) + " ..." * (len(ends) > 4)
        return f"channel{'s' * (text != ends[0] or '-' in text)} {text} of axis {self.axis}"

    def part(self, y: np.ndarray) -> np.ndarray:
        """Return what an output has in these channels."""
        return y.take(self.indices(y.shape[self.axis]), self.axis) if self.channels else y

    def indices(self, length: int) -> np.ndarray:
        """Return the channels of an axis of this length."""
        if not self.channels:
            return np.arange(length)
        return np.concatenate([np.arange(first, last + 1) for first, last in self.channels])


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the float model's.

    Attributes
    ----------
    name : str
    snr_db, cosine : float, optional
        Of all its values; None if these are not floats, or cannot be compared.
    groups : list of GroupError
        Of channels whose ranges differ; a single one where they do not.
    agreement : float, optional
        Share of samples, or of positions, with the same top class; of an output that is no float
        array, share of equal values.
    positions : int
        That this is a share of.
    note : str
        Why there is no agreement, or no figure at all.
    """

    name: str
    snr_db: float | None = None
    cosine: float | None = None
    groups: list[GroupError] = field(default_factory=list)
    agreement: float | None = None
    positions: int = 0
    note: str = ""


class OutputSums:
    """Compares one output, sample by sample.

    Parameters
    ----------
    info : ValueInfo
    classes : int, optional
        Number of labels.
    picture : (height, width), optional
        Of the input, if it is a picture.
    """

    def __init__(
        self, info: ValueInfo, classes: int | None = None, picture: Sequence[int] | None = None
    ) -> None:
        self.name, self._classes, self._picture = info.name, classes, picture
        self._axes: dict[int, _Axis] = {}
        self._whole = Sums()
        self._equal = self._values = 0
        self._shape: tuple[int, ...] = ()
        self._problem = ""

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Add what both networks make of one sample, or of one batch."""
        if expected.shape != found.shape:
            self._problem = "its size depends on values of the data"
        if self._problem or not expected.size:
            return
        if expected.dtype.kind not in "f":
            self._equal += int((expected == found).sum())
            self._values += expected.size
            return
        if not (finite := np.isfinite(expected)).all():
            expected, found = np.where(finite, expected, 0), np.where(finite, found, 0)
        axes = _axes(expected.shape)
        if not self._shape:
            self._axes = {axis: _Axis() for axis in axes}
        self._shape = expected.shape
        self._whole.add(expected.reshape(1, -1), found.reshape(1, -1))
        for axis in list(self._axes):
            if axis not in axes or not self._axes[axis].add(
                _by_channel(expected, axis), _by_channel(found, axis)
            ):
                del self._axes[axis]  # sizes that change are none of channels

    def error(self) -> OutputError:
        """Return what has been found."""
        if self._problem:
            return OutputError(self.name, note=self._problem)
        if self._values:
            agreement = self._equal / self._values
            return OutputError(self.name, agreement=agreement, positions=self._values)
        if not self._shape:
            return OutputError(self.name, note="it is empty")
        snr_db, cosine = self._whole.snr_db(), self._whole.cosine()
        whole = [GroupError((), 1, snr_db, cosine, bool(self._whole.totals[0].any()))]
        axis, groups = max(
            ((axis, sums.groups()) for axis, sums in self._axes.items()),
            key=lambda item: len(item[1]) > 1,
            default=(1, []),
        )
        if (scores := self._class_axis(len(groups) > 1)) is not None:
            whole = [replace(whole[0], axis=scores)]
            same, positions = self._axes[scores].same, self._axes[scores].positions
            return OutputError(self.name, snr_db, cosine, whole, same / positions, positions)
        if len(groups) < 2:
            return OutputError(self.name, snr_db, cosine, whole, note="no scores of classes")
        parts = [self._axes[axis].error(axis, group) for group in groups]
        return OutputError(self.name, snr_db, cosine, parts, note="ranges of its channels differ")

    def noise(self, error: OutputError) -> np.ndarray:
        """Return what each batch adds to the error of the group that it does most to.

        Parameters
        ----------
        error : OutputError
            What `error` returned.

        Returns
        -------
        float64 array (batches,)
            Squared errors over all squares of the group.
        """
        most = np.zeros(len(self._whole.differences))
        for group in error.groups:
            sums = self._axes[group.axis].sums if group.channels else self._whole
            chosen = group.indices(sums.totals.shape[1])
            power = float(sums.totals[0, chosen].sum())
            if group.says_something and power:
                parts = np.array([added[chosen].sum() for added in sums.differences])
                most = np.maximum(most, np.nan_to_num(parts / power))
        return most

    def _class_axis(self, is_grouped: bool) -> int | None:
        """Return the axis of class scores, None if the output does not look like these."""
        for axis, sums in self._axes.items():
            size = self._shape[axis]
            if size < 2:
                continue
            if size == self._classes or sums.are_shares():
                return axis
            if axis != 1 or is_grouped or not sums.are_logits():
                continue
            if all(n == 1 for n in self._shape[2:]) or (size != 3 and self._is_segmentation()):
                return axis
        return None

    def _is_segmentation(self) -> bool:
        """Tell whether there is a place for each few pixels of the input."""
        if self._picture is None or len(self._shape) != 4:
            return False
        sizes = zip(self._shape[2:], self._picture, strict=True)
        return all(0 < n <= pixels <= _FINEST * n for n, pixels in sizes)


# By output name and number of the group: squared error over squares of the float values.
Noise = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Groups:
    """Groups of channels of all outputs, with the squares of their values in the float network.

    Attributes
    ----------
    of : dict of output name to list of GroupError
    power : dict of (output name, number of the group) to float
        Mean square.
    """

    of: dict[str, list[GroupError]]
    power: dict[tuple[str, int], float]

    def noise(self, name: str, exact: np.ndarray, found: np.ndarray) -> Noise:
        """Return the squared error of an output's groups, over their squares."""
        noise: Noise = {}
        for number, group in enumerate(self.of[name]):
            if exact.shape == found.shape and (power := self.power[name, number]) > 0:
                lost = group.part(exact) - group.part(found)
                noise[name, number] = mean_square(lost) / power
        return noise


def groups_of(infos: Sequence[ValueInfo], values: Mapping[str, np.ndarray]) -> Groups:
    """Return the groups of channels that float outputs show, of all infos that hold floats."""
    of, power = {}, {}
    for info in infos:
        if info.dtype.startswith("float") and (y := values[info.name]).size:
            sums = OutputSums(info)
            sums.add(y, y)
            of[info.name] = sums.error().groups
            for number, group in enumerate(of[info.name]):
                part = group.part(y)
                mean = float(np.square(part, dtype=np.float64).mean())
                least = 0.0 if group.says_something else _UNSEEN**2
                power[info.name, number] = max(mean, least) if math.isfinite(mean) else 0.0
    return Groups(of, power)


def _axes(shape: tuple[int, ...]) -> list[int]:
    """Return the axes along which channels may lie: the second one, the last one."""
    if len(shape) < 2:
        return []
    last = len(shape) - 1
    if last == 1 or (last == 3 and min(shape[2:]) > _PICTURE):
        return [1]
    return [1, last]


def _by_channel(x: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


class _Axis:
    """What both networks say along one axis of an output."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.low = self.high = self.reached = np.zeros(0)
        self.same = self.positions = 0
        # Of the sums and of the squares of all channels: the least and the largest.
        self.shares, self.norms = [math.inf, -math.inf], [math.inf, -math.inf]

    def add(self, expected: np.ndarray, found: np.ndarray) -> bool:
        """Add arrays (channels, positions); False if there are other channels than before."""
        low, high, reached = expected.min(axis=1), expected.max(axis=1), found.max(axis=1)
        if self.positions:
            if len(low) != len(self.low):
                return False
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
            reached = np.maximum(reached, self.reached)
        self.low, self.high, self.reached = low, high, reached
        self.sums.add(expected, found)
        self.same += int((expected.argmax(axis=0) == found.argmax(axis=0)).sum())
        self.positions += expected.shape[1]
        for ends, values in (
            (self.shares, expected.sum(axis=0, dtype=np.float64)),
            (self.norms, np.square(expected, dtype=np.float64).sum(axis=0)),
        ):
            ends[:] = min(ends[0], float(values.min())), max(ends[1], float(values.max()))
        return True

    def are_shares(self) -> bool:
        """Tell whether the channels are probabilities of which one is true."""
        return bool(self.low.min() >= 0) and all(abs(s - 1) < _SAME for s in self.shares)

    def are_logits(self) -> bool:
        """Tell whether the channels may be scores: of both signs, and no vectors of one length."""
        one_length = self.norms[1] - self.norms[0] < _SAME * self.norms[1]
        several = self.positions > 1
        return bool(self.low.min() < 0) and not (one_length and several)

    def error(self, axis: int, group: np.ndarray) -> GroupError:
        """Return the error of some channels."""
        starts = np.flatnonzero(np.diff(group, prepend=-2) != 1)
        ends = [*(starts[1:] - 1), len(group) - 1]
        runs = tuple((int(group[a]), int(group[b])) for a, b in zip(starts, ends, strict=True))
        is_there = bool(self.sums.totals[0, group].any())
        return GroupError(runs, axis, self.sums.snr_db(group), self.sums.cosine(group), is_there)

    def _probabilities(self) -> np.ndarray:
        return (self.low >= 0) & (self.high <= 1)

    def _seen(self) -> np.ndarray:
        """Mark channels that tell a range: a class that no sample shows does not."""
        nothing = self._probabilities() & (np.maximum(self.high, self.reached) < _SEEN)
        return (self.sums.totals[0] > 0) & ~nothing

    def groups(self) -> list[np.ndarray]:
        """Return sets of channels of which the largest ones of each hide no other set's."""
        power = self.sums.totals[0] / self.positions
        seen, probable = self._seen(), self._probabilities()
        if not seen.any() or self.positions < _FEWEST:
            return [np.arange(len(power))]
        level = np.zeros(len(power), int)
        for kind in (seen & probable, seen & ~probable):  # apart whatever their sizes are
            if kind.any():
                level[kind] = _levels(np.log2(power[kind]) / 2) + level.max() + 1
        # What says nothing belongs to what is like it.
        for channel in np.flatnonzero(~seen):
            alike = seen & probable if (seen & probable).any() and probable[channel] else seen
            if power[channel] > 0 and not (seen & probable).any():
                level[channel] = -1
            else:
                near = np.flatnonzero(alike)
                level[channel] = level[near[np.abs(near - channel).argmin()]]
        found = [np.flatnonzero(level == value) for value in np.unique(level)]
        return sorted(found, key=lambda group: int(group[0]))


def _levels(octaves: np.ndarray) -> np.ndarray:
    """Return for each channel the number of its level: levels are far from each other."""
    order = np.argsort(octaves, kind="stable")
    gaps = np.diff(octaves[order])
    cuts = [i + 1 for i in np.argsort(-gaps, kind="stable")[: _MOST_GROUPS - 1] if gaps[i] >= _GAP]
    level, kinds = np.zeros(len(octaves), int), 0
    for part in np.split(order, sorted(cuts)):
        # A few channels somewhere in the middle are odd ones, no kind of their own.
        at_end = part.min() == 0 or part.max() == len(octaves) - 1
        is_kind = at_end or len(part) >= _LEAST_SHARE * len(octaves)
        level[part] = kinds if is_kind else max(kinds - 1, 0)
        kinds += is_kind
    return level
