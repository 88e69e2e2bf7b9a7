"""What packed networks of other packages do beside their float models, on samples of their kind.

    python -m benchmarks.faithful --model yolov8n --photographs imagenet-sample-500.parquet
    python -m benchmarks.faithful --model pp_ocr_rec --settings '{"prefer": "accuracy"}'

`yolov8n` sees photographs; `yolox` large letters on photographs, `pp_ocr_det` pages of text and
`pp_ocr_rec` lines, drawn here with Pillow's own font. Some calibrate, others are compared: the
cosine of all that belongs together, detections that both networks have, lines that both read alike.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet
from PIL import Image, ImageDraw, ImageFont

from benchmarks import machine
from benchmarks.models import PACKAGED
from logshift import converter, runtime
from logshift.converter.bench import in_turns

_WORDS = (
    "the quick brown fox jumps over lazy dog power of two networks run fast on ordinary machines"
    " 0123456789 Invoice total 42.50 EUR 2026 Hello World shift add select table figure page"
).split()
_LETTERS = "ABCDEFGHKMNPRSTXYZabdefhkmnprt23456789"
_SECONDS = 5.0  # that networks are timed for, in turns
_SEEN = 0.3  # a score from which on something is there

Draw = Callable[[np.random.Generator, list[Image.Image]], Image.Image]


@dataclass(frozen=True)
class Case:
    """A network, and what it is tried on."""

    draw: Draw
    mean: float  # of pixels from 0 to 255
    std: float
    is_bgr: bool
    calibrate: int
    compare: int


def photograph(rng: np.random.Generator, photographs: list[Image.Image]) -> Image.Image:
    """Return the centre of the next photograph."""
    return photographs.pop()


def letters(rng: np.random.Generator, photographs: list[Image.Image]) -> Image.Image:
    """Draw a few large letters on a photograph."""
    picture = photographs[int(rng.integers(len(photographs)))].copy()
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 7))):
        place = tuple(int(v) for v in rng.integers(5, picture.width - 100, 2))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        font = ImageFont.load_default(int(rng.integers(40, 90)))
        draw.text(place, str(rng.choice(list(_LETTERS))), fill=colour, font=font)
    return picture


def page(rng: np.random.Generator, photographs: list[Image.Image]) -> Image.Image:
    """Draw lines of text of several sizes."""
    picture = Image.new("RGB", (480, 480), tuple(int(v) for v in rng.integers(170, 256, 3)))
    draw, y = ImageDraw.Draw(picture), 10
    while y < 440:
        size = int(rng.integers(12, 34))
        text = " ".join(rng.choice(_WORDS, int(rng.integers(1, 6))))
        colour = tuple(int(v) for v in rng.integers(0, 110, 3))
        place = int(rng.integers(5, 60)), y
        draw.text(place, text, fill=colour, font=ImageFont.load_default(size))
        y += int(1.5 * size)
    return picture


def line(rng: np.random.Generator, photographs: list[Image.Image]) -> Image.Image:
    """Draw one line of text."""
    picture = Image.new("RGB", (320, 48), (int(rng.integers(180, 256)),) * 3)
    size = int(rng.integers(20, 32))
    text = " ".join(rng.choice(_WORDS, int(rng.integers(2, 5))))
    colour = tuple(int(v) for v in rng.integers(0, 90, 3))
    place = 6, (48 - size) // 2 - 2
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text(place, text, fill=colour, font=font)
    return picture


CASES = {
    "yolov8n": Case(photograph, 0, 255, False, 40, 60),
    "yolox": Case(letters, 0, 1, True, 40, 60),
    "pp_ocr_det": Case(page, 127.5, 127.5, False, 40, 40),
    "pp_ocr_rec": Case(line, 127.5, 127.5, False, 60, 200),
}


def samples(name: str, photographs: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return what calibrates and what is compared, (N, C, H, W) as the network takes it."""
    case, model, rng = CASES[name], PACKAGED[name], np.random.default_rng(0)
    _, height, width = model.shape
    pictures: list[Image.Image] = []
    if case.draw in (photograph, letters):
        if photographs is None:
            raise SystemExit(f"--model {name} needs --photographs")
        count = case.calibrate + case.compare
        table = pyarrow.parquet.read_table(photographs)
        chosen = np.linspace(0, len(table) - 1, count).round()  # of all classes
        for row in table["image"].take(rng.permutation(chosen).astype(np.int64)).to_pylist():
            data = row["bytes"] if isinstance(row, dict) else row
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = left, top, left + side, top + side
            pictures.append(picture.resize((width, height), Image.Resampling.BILINEAR, box))
    drawn = [case.draw(rng, pictures) for _ in range(case.calibrate + case.compare)]
    x = np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) for p in drawn])
    x = np.ascontiguousarray((x[:, ::-1] if case.is_bgr else x) - np.float32(case.mean))
    x /= np.float32(case.std)
    return x[: case.calibrate], x[case.calibrate :]


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays."""
    x, y = (a.astype(np.float64).ravel() for a in (x, y))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def read(scores: np.ndarray) -> list[list[int]]:
    """Return the characters that scores (lines, places, characters) say, no repeats, no blanks."""
    lines = scores.argmax(axis=-1)
    return [
        [int(c) for before, c in zip([0, *row[:-1]], row, strict=True) if c and c != before]
        for row in lines
    ]


def shared(x: np.ndarray, y: np.ndarray) -> float:
    """Return how many of the places where either network sees something both do."""
    either = (x > _SEEN) | (y > _SEEN)
    return float(((x > _SEEN) & (y > _SEEN)).sum() / max(either.sum(), 1))


def figures(name: str, exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return how near outputs are to those of the float network."""
    if name == "yolov8n":
        return {
            "cosine of scores": cosine(exact[:, 4:], found[:, 4:]),
            "cosine of boxes": cosine(exact[:, :4], found[:, :4]),
        }
    if name == "yolox":
        x, y = (a[..., 4] * a[..., 5] for a in (exact, found))
        return {"cosine of scores": cosine(x, y), "detections shared": shared(x, y)}
    if name == "pp_ocr_rec":
        same = [a == b for a, b in zip(read(exact), read(found), strict=True)]
        return {"cosine": cosine(exact, found), "lines read alike": float(np.mean(same))}
    return {"cosine": cosine(exact, found), "pixels of text shared": shared(exact, found)}


def packed(
    model: onnx.ModelProto, calibration: dict[str, np.ndarray], settings: dict[str, Any], path: Path
) -> tuple[converter.Report, float]:
    """Convert; returns the report, and the seconds that it took."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", converter.AccuracyWarning)
        report = converter.convert(model, path, calibration=[calibration], **settings)
    return report, time.perf_counter() - start


def main() -> None:
    """Convert, run both networks, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=CASES)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--settings", type=json.loads, default={}, help="of convert, as JSON")
    parser.add_argument(
        "--against", type=json.loads, help="settings of a network to time in turns with it"
    )
    args = parser.parse_args()
    model = PACKAGED[args.model].build(PACKAGED[args.model].size)
    calibration, x = samples(args.model, args.photographs)
    float_session = onnxruntime.InferenceSession(model.SerializeToString())
    name = float_session.get_inputs()[0].name
    exact = np.concatenate([float_session.run(None, {name: one[None]})[0] for one in x])
    print(machine.describe())
    print(f"{args.model} {args.settings or ''}")
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "net.stlq", Path(folder) / "other.stlq"
        report, seconds = packed(model, {name: calibration}, args.settings, path)
        session = runtime.load(path)
        found = np.concatenate([session.run(one[None]) for one in x])
        row = figures(args.model, exact, found)
        row |= {"size": report.file_bytes / report.onnx_bytes, "seconds": seconds}
        print("  " + ", ".join(f"{what} {value:.4f}" for what, value in row.items()))
        if args.against is None:
            return
        packed(model, {name: calibration}, args.against, other)
        for threads in (1, 2):
            sessions = [runtime.load(p, threads=threads) for p in (path, other)]
            own, theirs = in_turns([partial(s.run, x[:1]) for s in sessions], _SECONDS)
            speed = np.median(theirs / own)
            print(f"  {speed:.3f} of the speed of {args.against}, threads: {threads}")


if __name__ == "__main__":
    main()
