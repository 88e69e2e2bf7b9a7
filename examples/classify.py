"""Say what is on each picture of a folder.

    python examples/classify.py pictures -o classes.png

The network, for CIFAR-10's ten classes, comes with logshift; for one of your own set the names in
capitals. The folder also calibrates; where there are many pictures, some hundreds are used.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from logshift.converter import Preprocessing, convert
from logshift.runtime import load

NETWORK = Path(str(resources.files("logshift.converter"))) / "demo" / "resnet20-cifar10.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCH = 32
SIDE, COLUMNS = 144, 6  # of the sheet


def main() -> None:
    """Convert the network, classify the pictures, save a sheet of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("classes.png"))
    options = parser.parse_args()

    packed = options.out.with_suffix(".stlq")
    if not packed.exists():
        report = convert(
            NETWORK, packed, calibration=options.folder, labels=LABELS,
            preprocessing=Preprocessing(mean=MEAN, std=STD),
        )  # fmt: skip
        print(f"{report.file_bytes:,} bytes; {report.verdict}")
    session = load(packed)

    paths = sorted(path for path in options.folder.iterdir() if path.suffix in (".jpg", ".png"))
    row = SIDE + 24
    sheet = Image.new("RGB", (SIDE * COLUMNS, row * -(-len(paths) // COLUMNS)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for begin in range(0, len(paths), BATCH):
        pictures = [Image.open(path) for path in paths[begin : begin + BATCH]]
        scores = session.run(pictures)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        for number, (picture, chance) in enumerate(zip(pictures, chances, strict=True), begin):
            said = f"{session.labels[chance.argmax()]} {chance.max():.0%}"
            print(f"{paths[number].name}: {said}")
            place = number % COLUMNS * SIDE, number // COLUMNS * row
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE)), place)
            draw.text((place[0] + 4, place[1] + SIDE + 3), said, "black", font)
    sheet.save(options.out)


if __name__ == "__main__":
    main()
