"""Raw pictures behind a Bayer filter, in four half-size planes, as See-in-the-Dark takes them."""

from __future__ import annotations

import numpy as np

from logshift.trainer.data.base import DataError


def pack(mosaic: np.ndarray) -> np.ndarray:
    """Return the four planes of a mosaic.

    Parameters
    ----------
    mosaic : array of shape (H, W)
        Rows R G R G ... and G B G B ...; H and W even.

    Returns
    -------
    array of shape (4, H / 2, W / 2)
        R, G of the red rows, B, G of the blue rows.
    """
    return np.stack(
        [mosaic[0::2, 0::2], mosaic[0::2, 1::2], mosaic[1::2, 1::2], mosaic[1::2, 0::2]]
    )


def augment(
    raw: np.ndarray, picture: np.ndarray, size: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same part out of both, mirror and transpose it.

    Parameters
    ----------
    raw : array of shape (4, h, w)
    picture : array of shape (3, 2 * h, 2 * w)
    size : int
        Height and width of the part in `raw`.
    random : Generator

    Returns
    -------
    raw, picture : arrays of shape (4, size, size) and (3, 2 * size, 2 * size)

    Raises
    ------
    DataError
        If they are smaller.
    """
    if size > min(raw.shape[1:]):
        raise DataError(f"planes of {raw.shape[1]}x{raw.shape[2]} are smaller than a crop, {size}")
    top = random.integers(0, raw.shape[1] - size + 1)
    left = random.integers(0, raw.shape[2] - size + 1)
    raw = raw[:, top : top + size, left : left + size]
    picture = picture[:, 2 * top : 2 * (top + size), 2 * left : 2 * (left + size)]
    for axis in (1, 2):
        if random.random() < 0.5:
            raw, picture = np.flip(raw, axis), np.flip(picture, axis)
    if random.random() < 0.5:
        raw, picture = raw.transpose(0, 2, 1), picture.transpose(0, 2, 1)
    return np.ascontiguousarray(raw), np.ascontiguousarray(picture)
