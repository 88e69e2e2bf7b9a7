"""Calibration data: a folder of pictures, an array, or an iterable of input dictionaries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from logshift.converter.onnx_model import ModelInput
from logshift.kernels.errors import InputError
from logshift.runtime.picture import Preprocessing, picture_files

_HELD_BACK = 5  # one batch in so many measures
_LOOKED_AT = 64  # batches, of which those come first that say most
_MOST_TELLING = 8

Calibration = str | os.PathLike[str] | np.ndarray | Iterable[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Samples:
    """Calibration data that is read when it is known how much of it is wanted.

    Attributes
    ----------
    first : dict of input name to array (n, ...), n the model's batch or 1
    read : callable(limit)
        Returns at most `limit` samples per input, spread evenly over a folder or array, else
        the first ones.
    preprocessing : Preprocessing, optional
        What was applied to pictures.
    """

    first: dict[str, np.ndarray]
    read: Callable[[int], dict[str, np.ndarray]]
    preprocessing: Preprocessing | None


def open_samples(
    calibration: Calibration, inputs: Sequence[ModelInput], preprocessing: Preprocessing | None
) -> Samples:
    """Look at calibration data and check that it fits the model.

    Parameters
    ----------
    calibration : path, array or iterable of dict
        See `convert`.
    inputs : the model's inputs
    preprocessing : Preprocessing, optional
        For pictures; the default one is used if pictures come without.

    Raises
    ------
    InputError
        Names what does not fit and how to mend it.
    """
    if isinstance(calibration, (str, os.PathLike)):
        return _from_pictures(picture_files(Path(calibration)), inputs, preprocessing)
    if hasattr(calibration, "__array__"):  # tensors of other packages are arrays, as for sessions
        calibration = np.asarray(calibration)
    if isinstance(calibration, np.ndarray):
        if calibration.ndim == 0 or len(calibration) == 0:
            raise InputError(
                f"calibration array has shape {calibration.shape}; expected samples (N, C, H, W)"
                " as float32, or pictures (N, H, W, C) as uint8"
            )
        if calibration.dtype == np.uint8 and _single(inputs).is_float:
            return _from_pictures(calibration, inputs, preprocessing)
        return _from_array(calibration, _single(inputs), preprocessing)
    if isinstance(calibration, Iterable):
        return _from_dictionaries(calibration, inputs, preprocessing)
    raise InputError(
        f"calibration is {type(calibration).__name__}; expected a folder of pictures, an array or"
        " an iterable of dictionaries of arrays"
    )


def _single(inputs: Sequence[ModelInput]) -> ModelInput:
    if len(inputs) > 1:
        names = ", ".join(repr(i.name) for i in inputs)
        raise InputError(
            f"the model has several inputs ({names}); give calibration as an iterable of"
            " dictionaries with an array for each"
        )
    return inputs[0]


def spread(available: int, limit: int) -> list[int]:
    """Return indices evenly over all samples, because folders and arrays are sorted by class."""
    return [int(i) for i in np.linspace(0, available - 1, min(available, limit)).round()]


def _nominal_batch(x: np.ndarray, info: ModelInput) -> np.ndarray:
    """Return the samples that make up one batch of the model, repeated where they are too few."""
    return np.resize(x[: info.batch], (info.batch, *x.shape[1:]))


@dataclass(frozen=True)
class Division:
    """Calibration data in two parts: what calibrates, and what measures the outcome.

    Attributes
    ----------
    calibration : dict of input name to array (pictures, ...)
    batches : int
        How many batches of the model these are.
    measuring : list of dict of input name to array
        Batches of the model.
    held_back : bool
        Whether these do not calibrate; where there are too few samples, the same do both.
    """

    calibration: dict[str, np.ndarray]
    batches: int
    measuring: list[dict[str, np.ndarray]]
    held_back: bool

    @property
    def samples_held_back(self) -> int:
        """How many samples do not calibrate."""
        return self.held_back * sum(len(next(iter(x.values()))) for x in self.measuring)


def by_batch(data: Mapping[str, np.ndarray], batches: int) -> dict[str, np.ndarray]:
    """Return data of so many batches as arrays (batches, pictures of one, ...)."""
    return {n: x.reshape(batches, len(x) // batches, *x.shape[1:]) for n, x in data.items()}


def divide(data: Mapping[str, np.ndarray], batches: int, fitting: int, most: int) -> Division:
    """Divide calibration data, both parts spread over all of it.

    What does not fit measures. Where everything fits, every fifth batch is held back, but none of
    fewer than five.

    Parameters
    ----------
    data : dict of input name to array (pictures, ...)
    batches : int
        How many batches of the model these are.
    fitting : int
        Most batches that calibrate.
    most : int
        Most batches to hold back where everything fits.
    """
    used = np.ones(batches, bool)
    if batches > fitting:
        used[:] = False
        used[spread(batches, fitting)] = True
    elif batches >= _HELD_BACK:
        every = np.arange(_HELD_BACK - 1, batches, _HELD_BACK)
        used[every[spread(len(every), most)]] = False
    split = by_batch(data, batches)
    rest = np.flatnonzero(~used)
    held_back = len(rest) > 0
    return Division(
        {name: np.concatenate(x[used]) for name, x in split.items()} if held_back else dict(data),
        int(used.sum()),
        [
            {name: x[i] for name, x in split.items()}
            for i in (rest if held_back else range(batches))
        ],
        held_back,
    )


def telling_first(
    division: Division, run: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]
) -> Division:
    """Let batches that calibrate come first in which the float network says most.

    What is measured on a few samples is to show all that a network can say: the first batches are
    those in which channels of outputs reach what they have not reached before.

    Parameters
    ----------
    division : Division
    run : callable(inputs) -> arrays
        Of the float network.
    """
    count = division.batches
    split = by_batch(division.calibration, count)
    seen = spread(count, _LOOKED_AT)
    found = [_peaks(run({name: x[i] for name, x in split.items()})) for i in seen]
    # Where the data decide on sizes there are no channels to compare.
    alike = [parts for parts in zip(*found, strict=True) if len({len(p) for p in parts}) == 1]
    peaks = np.concatenate([np.stack(parts) / len(parts[0]) for parts in alike], axis=1)
    highest = peaks.max(axis=0)
    peaks = np.divide(peaks, highest, out=np.zeros(peaks.shape), where=highest > 0)
    reached = np.zeros(peaks.shape[1])
    order: list[int] = []
    for _ in range(min(len(seen), _MOST_TELLING)):
        gain = (peaks - reached).clip(0).mean(axis=1)
        gain[order] = -1
        order.append(int(gain.argmax()))
        reached = np.maximum(reached, peaks[order[-1]])
    chosen = [seen[i] for i in order]
    chosen += [i for i in range(count) if i not in chosen]
    ordered = {name: np.concatenate(x[chosen]) for name, x in split.items()}
    return replace(division, calibration=ordered)


def _peaks(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the largest sizes along each axis in which channels may lie."""
    found = [np.zeros(1)]
    for y in outputs:
        if y.dtype.kind == "f" and y.ndim > 1:
            size = np.abs(np.nan_to_num(y.astype(np.float64)))
            for axis in {1, y.ndim - 1} if y.ndim != 4 else {1}:
                others = tuple(a for a in range(y.ndim) if a != axis)
                found.append(size.max(axis=others, initial=0.0))
    return found


# --- pictures -----------------------------------------------------------------------------------


def _from_pictures(
    pictures: Sequence[Path] | np.ndarray,
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing | None,
) -> Samples:
    info = _single(inputs)
    chosen = preprocessing or Preprocessing()
    size = _picture_size(info, chosen)
    last = chosen.channels_last(info.shape)

    def prepare(index: int) -> np.ndarray:
        picture = pictures[index]
        if not isinstance(picture, Path):
            return chosen.prepare(picture, size, last).astype(info.dtype, copy=False)
        try:
            with Image.open(picture) as image:
                return chosen.prepare(image, size, last).astype(info.dtype, copy=False)
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"cannot read picture {os.fspath(picture)!r}: {error}") from error

    def read(limit: int) -> dict[str, np.ndarray]:
        return {info.name: np.stack([prepare(i) for i in spread(len(pictures), limit)])}

    first = {info.name: _nominal_batch(prepare(0)[None], info)}
    return Samples(first, read, chosen)


def _picture_size(info: ModelInput, preprocessing: Preprocessing) -> tuple[int, int]:
    if len(info.shape) != 4 or not info.is_float:
        raise InputError(
            f"input {info.name!r} is {info.dtype} of shape {info.shape}, no picture (N, C, H, W);"
            " give calibration as arrays"
        )
    channels, *size = info.shape[1:]
    if preprocessing.channels_last(info.shape):
        *size, channels = info.shape[1:]
    if len(preprocessing.mean) != channels:
        raise InputError(
            f"preprocessing makes {len(preprocessing.mean)} channels, input {info.name!r} has"
            f" {channels}; give preprocessing=Preprocessing(mean=..., std=...) with one value per"
            " channel"
        )
    crop = preprocessing.crop
    if crop is None:
        height, width = size
        if not (isinstance(height, int) and isinstance(width, int)):
            raise InputError(
                f"input {info.name!r} has no fixed height and width; give"
                " preprocessing=Preprocessing(crop=(height, width))"
            )
        return height, width
    for wanted, dim in zip(crop, size, strict=True):
        if isinstance(dim, int) and dim != wanted:
            raise InputError(
                f"preprocessing crops to {crop}, input {info.name!r} has height and width"
                f" {tuple(size)}"
            )
    return crop


# --- arrays -------------------------------------------------------------------------------------


def _from_array(
    array: np.ndarray, info: ModelInput, preprocessing: Preprocessing | None
) -> Samples:
    _check(array, info)

    def read(limit: int) -> dict[str, np.ndarray]:
        return {info.name: _as_given(array[spread(len(array), limit)], info)}

    first = {info.name: _nominal_batch(_as_given(array[: info.batch], info), info)}
    return Samples(first, read, preprocessing)


def _from_dictionaries(
    dictionaries: Iterable[Mapping[str, np.ndarray]],
    inputs: Sequence[ModelInput],
    preprocessing: Preprocessing | None,
) -> Samples:
    iterator = iter(dictionaries)
    first = next(iterator, None)
    if first is None:
        raise InputError("calibration is empty")
    start = _checked(first, inputs)

    def read(limit: int) -> dict[str, np.ndarray]:
        parts = [start]
        count = len(start[inputs[0].name])
        for item in iterator:
            if count >= limit:
                break
            parts.append(_checked(item, inputs))
            count += len(parts[-1][inputs[0].name])
        joined = {}
        for info in inputs:
            arrays = [part[info.name] for part in parts]
            if len({array.shape[1:] for array in arrays}) > 1:
                raise InputError(f"calibration: samples of input {info.name!r} differ in shape")
            joined[info.name] = np.concatenate(arrays)[: max(limit // info.batch, 1) * info.batch]
        return joined

    return Samples(
        {info.name: _nominal_batch(start[info.name], info) for info in inputs},
        read,
        preprocessing,
    )


def _checked(item: Any, inputs: Sequence[ModelInput]) -> dict[str, np.ndarray]:
    names = {info.name for info in inputs}
    if not isinstance(item, Mapping) or set(item) != names:
        found = sorted(item) if isinstance(item, Mapping) else type(item).__name__
        raise InputError(
            f"calibration: expected dictionaries of {sorted(names)}, got {found}; batches of a"
            " single input become one array by numpy.concatenate"
        )
    arrays = {}
    for info in inputs:
        array = np.asarray(item[info.name])
        _check(array, info)
        arrays[info.name] = _as_given(array, info)
    if len({len(arrays[info.name]) // info.batch for info in inputs}) > 1:
        raise InputError("calibration: the inputs of one dictionary have different batch sizes")
    return arrays


def _check(array: np.ndarray, info: ModelInput) -> None:
    expected: tuple[Any, ...] = ("N", *info.shape[1:])
    if (
        array.ndim != len(expected)
        or not (array.dtype.kind == "f" if info.is_float else np.can_cast(array.dtype, info.dtype))
        or len(array) == 0
        or any(isinstance(d, int) and d != s for d, s in zip(expected, array.shape, strict=True))
    ):
        raise InputError(
            f"calibration for input {info.name!r} is {array.dtype} of shape {array.shape};"
            f" expected {info.dtype} of shape ({', '.join(map(str, expected))})"
        )


def _as_given(array: np.ndarray, info: ModelInput) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, info.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"calibration for input {info.name!r} holds NaN or infinity")
    return array
