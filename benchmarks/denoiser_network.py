"""Train the network that `examples/denoise.py` comes with: photographs, darkened as it does.

    python -m benchmarks.denoiser_network --photos photos.parquet --out examples/denoiser.onnx

Six 3x3 convolutions on pixels two by two, as in FFDNet (Zhang et al., 2018). Needs PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

EXAMPLE = Path(__file__).parent.parent / "examples" / "denoise.py"
_CROP, _BATCH, _LR = 48, 16, 2e-3


class Denoiser(nn.Module):
    """Takes brightened pictures (N, 3, H, W) in 0 to 1, of even sizes; gives them without noise.

    Parameters
    ----------
    width : int
        Channels between convolutions.
    depth : int
        Convolutions.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        channels = [12, *[width] * (depth - 1), 12]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for number in range(depth):
            layers += [nn.Conv2d(channels[number], channels[number + 1], 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return what `x` would be without noise."""
        return self.layers(x - 0.5) + 0.5


def main() -> None:
    """Train and export."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="Parquet with column image")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=6)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("denoise", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    files = pq.read_table(options.photos, columns=["image"])["image"].to_pylist()
    photos = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    random = np.random.default_rng(1)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    network = Denoiser(options.width, options.depth)
    optimiser = torch.optim.Adam(network.parameters(), _LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    begin, mean = time.perf_counter(), 0.0
    for step in range(options.steps):
        clean, dark = zip(*(_example(photos, example, random) for _ in range(_BATCH)), strict=True)
        target = torch.from_numpy(np.stack(clean))
        loss = nn.functional.l1_loss(network(torch.from_numpy(np.stack(dark))), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        mean += loss.item() / 100
        if step % 100 == 99:
            print(f"{step + 1} {mean:.4f} {time.perf_counter() - begin:.0f} s", flush=True)
            mean = 0.0
    torch.onnx.export(
        network.eval(), (torch.zeros(1, 3, 64, 64),), options.out, input_names=["dark"],
        output_names=["clean"], dynamo=False, opset_version=17,
        dynamic_axes={"dark": {0: "n", 2: "h", 3: "w"}, "clean": {0: "n", 2: "h", 3: "w"}},
    )  # fmt: skip


def _example(photos, example, random) -> tuple[np.ndarray, np.ndarray]:
    """Return a crop (3, H, W) and the same crop in the dark."""
    photo = photos[random.integers(len(photos))]
    top, left = (random.integers(size - _CROP + 1) for size in photo.shape[:2])
    crop = photo[top : top + _CROP, left : left + _CROP]
    dark = example.brightened(example.darkened(crop, random.uniform(30, 100), random))
    return (np.float32(crop) / 255).transpose(2, 0, 1), dark.transpose(2, 0, 1)


if __name__ == "__main__":
    main()
