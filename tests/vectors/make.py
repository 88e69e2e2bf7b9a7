"""Make `stlq.json`: weights and the words q0 and q1 that section 2 gives them, by exact fractions.

Both implementations of the arithmetic are tested against these vectors, the encoder in NumPy and
the trainer in PyTorch; neither imports the other, and this file imports neither.

    python tests/vectors/make.py
"""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np


def nearest_level(r: Fraction, bits: int) -> Fraction:
    """Nearest of 0 and ±2^(e-1), ties toward zero: the obvious way."""
    magnitudes = [Fraction(0)] + [Fraction(2**e) for e in range(2 ** (bits - 1) - 1)]
    level = min(magnitudes, key=lambda m: (abs(abs(r) - m), m))
    return level if r >= 0 else -level


def words(
    w: np.float32, alpha: np.float32, bits: int, clip: int, shift: int
) -> tuple[Fraction, Fraction]:
    """Return q0 and q1 of a weight; w / alpha is rounded to float32, all else is exact."""
    top = 2 ** (2 ** (bits - 1) - 2)
    r0 = min(max(Fraction(float(w / alpha)) * top, Fraction(-clip * top)), Fraction(clip * top))
    q0 = nearest_level(r0, bits)
    return q0, nearest_level((r0 - q0) * 2**shift, bits)


def vectors() -> list[dict]:
    """Return cases of all bits, clips and shifts; with ties and neighbours of ties."""
    random = np.random.default_rng(1)
    cases = []
    for bits, clip, shift in itertools.product((2, 3, 4, 5), (1, 2), (0, 2)):
        top = 2 ** (2 ** (bits - 1) - 2)
        ties = np.array([0.5, 1.5, 3, 6, 12, 24, 48, 0.25, 0.75, top, 1.5 * top, 3 * top])
        ties = (ties[ties <= 3 * top] / top).astype(np.float32)
        near = [np.nextafter(ties, np.float32(side)) for side in (0, np.inf)]
        plain = random.standard_normal(40).astype(np.float32) * np.float32(0.6)
        w = np.concatenate([ties, -ties, *near, plain, np.zeros(1, np.float32)])
        for alpha in (np.float32(1), np.float32(0.37)):
            found = [words(x, alpha, bits, clip, shift) for x in w]
            cases.append(
                {
                    "bits": bits,
                    "clip": clip,
                    "residual_shift": shift,
                    "alpha": float(alpha),
                    "w": [float(x) for x in w],
                    "q0": [int(q0) for q0, _ in found],
                    "q1": [int(q1) for _, q1 in found],
                }
            )
    return cases


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in vectors())
    Path(__file__).with_name("stlq.json").write_text(f"[\n{lines}\n]\n")
