"""Read the text on a page, with the two networks of PP-OCR: one finds lines, one reads a line.

    pip install --no-deps rapidocr
    python examples/read_text.py page.png -o text.png

Without a page it draws one. The networks are out of that package; they are calibrated on pages and
lines that are drawn too. Text that is not level takes more, for which PP-OCR has a third network.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

from logshift.converter import convert
from logshift.runtime import Session, load

TEXT = ["Every weight is a power of two,", "a chosen few a sum of two.", "3.75 = 4 - 0.25"]
HEIGHT = 48  # of a line, as the reader takes it
WORDS = """one two three shift add round scale weight layer picture line 0.5 17 2048 (a) b, c. Tile
Code Word Model Python CPU 3x3 fast small exact bits bytes table Figure 12 page sum zero""".split()

Box = tuple[int, int, int, int]


def packaged(package: str, file: str) -> Path:
    """Return the path of a file in an installed package, without importing that."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0]) / file


def drawn(lines: list[str], size: int = 28) -> Image.Image:
    """Return a page with these lines."""
    page = Image.new("RGB", (448, 224), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=size)
    for number, line in enumerate(lines):
        draw.text((24, 20 + 2 * size * number), line, "black", font)
    return page


def prepared(picture: Image.Image) -> np.ndarray:
    """Return a picture as both networks take it, (1, 3, H, W) in -1 to 1."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    return (pixels.transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5


def found_lines(finder: Session, page: Image.Image) -> list[Box]:
    """Return the boxes of level lines of text, from top to bottom."""
    size = [max(round(side / 32), 1) * 32 for side in page.size]
    is_text = finder.run(prepared(page.resize(size)))[0, 0] > 0.3
    boxes = []
    for top, bottom in _runs(is_text.any(1), 1):
        height = bottom - top
        for left, right in _runs(is_text[top:bottom].any(0), 2 * height):
            # The finder marks the middle of a line: by so much it is smaller on each side.
            margin = 0.75 * height * (right - left) / (height + right - left)
            box = np.array([left - margin, top - margin, right + margin, bottom + margin])
            box *= np.tile(page.size, 2) / np.tile(size, 2)
            boxes.append(tuple(box.round().astype(int).clip(0, [*page.size, *page.size]).tolist()))
    return boxes


def _runs(is_set: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """Return begin and end of what is set, over gaps shorter than so much."""
    places = np.flatnonzero(is_set)
    if not len(places):
        return []
    cut = np.flatnonzero(np.diff(places) > gap)
    begins, ends = places[np.append(0, cut + 1)], places[np.append(cut, -1)] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def line(page: Image.Image, box: Box) -> np.ndarray:
    """Return a line as the reader takes it, 48 high."""
    cut = page.crop(box)
    return prepared(cut.resize((max(round(cut.width * HEIGHT / cut.height), HEIGHT), HEIGHT)))


def read(reader: Session, characters: list[str], x: np.ndarray) -> str:
    """Return the text of a line: the best character at each place, without blanks and repeats."""
    best = reader.run(x)[0].argmax(1)
    kept = best[(best != 0) & (best != np.append(0, best[:-1]))]
    return "".join(characters[number] for number in kept)


def networks(directory: Path) -> tuple[Session, Session, list[str]]:
    """Return finder, reader, and the reader's characters; convert what is not converted yet."""
    finder, reader = directory / "finder.stlq", directory / "reader.stlq"
    model = onnx.load(packaged("rapidocr", "models/PP-OCRv6_rec_small.onnx"))
    (text,) = (p.value for p in model.metadata_props if p.key == "character")
    random = np.random.default_rng(0)
    texts = [[" ".join(random.choice(WORDS, 4)) for _ in range(4)] for _ in range(16)]
    pages = [drawn(lines, int(random.integers(20, 32))) for lines in texts]
    if not finder.exists():
        file = packaged("rapidocr", "models/PP-OCRv6_det_small.onnx")
        report = convert(file, finder, calibration=np.concatenate([prepared(p) for p in pages]))
        print(f"{report.file_bytes:,} bytes; {report.verdict}")
    if not reader.exists():
        # Lines of one width, since what calibrates is an array: what is shorter gets white.
        lines = [page.crop((20, 12, 340, 60)) for page in pages]
        report = convert(model, reader, calibration=np.concatenate([prepared(x) for x in lines]))
        print(f"{report.file_bytes:,} bytes; {report.verdict}")
    return load(finder), load(reader), ["", *text.splitlines(), " "]


def main() -> None:
    """Convert the networks, read the page, save it with its lines and what they say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("-o", "--out", type=Path, default=Path("text.png"))
    options = parser.parse_args()
    finder, reader, characters = networks(options.out.parent)
    page = Image.open(options.page).convert("RGB") if options.page else drawn(TEXT)
    shown = Image.new("RGB", (2 * page.width, page.height), "white")
    shown.paste(page)
    draw = ImageDraw.Draw(shown)
    for box in found_lines(finder, page):
        said = read(reader, characters, line(page, box))
        print(said)
        draw.rectangle(box, outline="red", width=2)
        font = ImageFont.load_default(size=max(0.55 * (box[3] - box[1]), 8))
        draw.text((page.width + box[0], box[1] + 3), said, "blue", font)
    shown.save(options.out)


if __name__ == "__main__":
    main()
