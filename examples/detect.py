"""Find things in photographs and draw boxes around them, with a YOLOv8 network.

    pip install --no-deps nudenet
    python examples/detect.py photo.jpg --calibration pictures -o boxes.png

The network, YOLOv8n for parts of people, is out of that package. Others are used the same way:
their output has a column for each place, its box first, then a score for each class.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

from logshift.converter import convert
from logshift.runtime import Session, load

SIDE = 320


def packaged(package: str, file: str) -> Path:
    """Return the path of a file in an installed package, without importing that."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0]) / file


def prepared(picture: Image.Image) -> np.ndarray:
    """Return a picture as the network takes it, (1, 3, 320, 320): scaled, black below or beside."""
    square = Image.new("RGB", (max(picture.size),) * 2)
    square.paste(picture)
    pixels = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return pixels.transpose(2, 0, 1)[None] / 255


def views(picture: Image.Image) -> list[Image.Image]:
    """Return a picture and its quarters: some hundred photographs would do without these."""
    x, y = (side // 2 for side in picture.size)
    return [picture, *(picture.crop((i, j, i + x, j + y)) for i in (0, x) for j in (0, y))]


def detections(session: Session, picture: Image.Image, least: float = 0.3, overlap: float = 0.45):
    """Return what is found: arrays of boxes (left, top, right, bottom), classes and scores."""
    found = session.run(prepared(picture))[0].T  # (places, 4 + classes)
    found = found[found[:, 4:].max(1) >= least]
    scores, classes = found[:, 4:].max(1), found[:, 4:].argmax(1)
    centre, half = found[:, :2], found[:, 2:4] / 2
    scale = max(picture.size) / SIDE
    boxes = np.concatenate([centre - half, centre + half], 1) * scale
    boxes = boxes.clip(0, [*picture.size, *picture.size])
    kept: list[int] = []
    for i in np.argsort(-scores):  # the best of those that overlap
        if all(_overlap(boxes[i], boxes[j]) < overlap for j in kept):
            kept.append(i)
    return boxes[kept], classes[kept], scores[kept]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the area that two boxes share over that of both."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(width, 0) * max(height, 0)
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def main() -> None:
    """Convert the network, find things, save the picture with boxes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("-o", "--out", type=Path, default=Path("boxes.png"))
    options = parser.parse_args()
    model = onnx.load(packaged("nudenet", "320n.onnx"))
    (names,) = (ast.literal_eval(p.value) for p in model.metadata_props if p.key == "names")

    packed = options.out.with_suffix(".stlq")
    if not packed.exists():
        pictures = [Image.open(path) for path in sorted(options.calibration.glob("*.jpg"))]
        samples = [prepared(view) for picture in pictures for view in views(picture)]
        report = convert(model, packed, calibration=np.concatenate(samples))
        print(f"{report.file_bytes:,} bytes; {report.verdict}")
    session = load(packed)

    picture = Image.open(options.photo).convert("RGB")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=18)
    for box, number, score in zip(*detections(session, picture), strict=True):
        said, place = f"{names[number]} {score:.2f}", (box[0], max(box[1] - 22, 0))
        print(said, box.round().astype(int).tolist())
        draw.rectangle(box.tolist(), outline="yellow", width=3)
        draw.rectangle(draw.textbbox(place, said, font), fill="yellow")
        draw.text(place, said, "black", font)
    picture.save(options.out)


if __name__ == "__main__":
    main()
