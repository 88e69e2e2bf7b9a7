"""Remove the noise of a photograph taken in the dark.

    python examples/denoise.py photo.jpg --calibration pictures -o clean.png

Few photographs have a twin that was taken in the dark, so this darkens `photo.jpg` itself, as a
sensor would see it, and shows three pictures: the dark one brightened, that one without noise, and
the photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from logshift.converter import convert
from logshift.runtime import load

NETWORK = Path(__file__).with_name("denoiser.onnx")
FULL_WELL = 10_000.0  # electrons of a white pixel
READ_NOISE = 4.0  # electrons


def darkened(photo: np.ndarray, times: float, random: np.random.Generator) -> np.ndarray:
    """Return linear light (H, W, 3) of a photograph with so many times less of it, and noise."""
    light = (np.float32(photo) / 255) ** 2.2
    electrons = random.poisson(light / times * FULL_WELL)
    noise = random.normal(0, READ_NOISE, light.shape)
    return (electrons + noise) / FULL_WELL * times


def brightened(light: np.ndarray) -> np.ndarray:
    """Return linear light as pixels in 0 to 1."""
    return (np.clip(light, 0, 1) ** (1 / 2.2)).astype(np.float32)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in decibels."""
    return float(-10 * np.log10(np.square(found - wanted).mean()))


def read(path: Path) -> np.ndarray:
    """Return a picture (H, W, 3), of even sizes."""
    photo = np.asarray(Image.open(path).convert("RGB"))
    return photo[: photo.shape[0] // 2 * 2, : photo.shape[1] // 2 * 2]


def main() -> None:
    """Convert the network, remove the noise, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--times", type=float, default=100, help="how many times less light")
    parser.add_argument("-o", "--out", type=Path, default=Path("clean.png"))
    options = parser.parse_args()
    random = np.random.default_rng(0)

    packed = options.out.with_suffix(".stlq")
    if not packed.exists():
        # What calibrates is as what comes later: dark pictures, with their noise, a crop of each.
        crops = [read(path)[:128, :128] for path in sorted(options.calibration.glob("*.jpg"))]
        dark = [brightened(darkened(crop, options.times, random)) for crop in crops]
        report = convert(NETWORK, packed, calibration=np.stack(dark).transpose(0, 3, 1, 2))
        print(f"{report.file_bytes:,} bytes; {report.verdict}")
    session = load(packed)

    photo = read(options.photo)
    dark = brightened(darkened(photo, options.times, random))
    clean = session.run(dark.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0).clip(0, 1)
    wanted = np.float32(photo) / 255
    print(f"PSNR {psnr(dark, wanted):.1f} dB before, {psnr(clean, wanted):.1f} dB after")
    pictures = np.rint(np.concatenate([dark, clean, wanted], 1) * 255)
    Image.fromarray(pictures.astype(np.uint8)).save(options.out)


if __name__ == "__main__":
    main()
