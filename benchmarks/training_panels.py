"""Pictures of what trained networks make of test examples, and the figures made of them.

`save` leaves pictures in the folder of a run, `draw` sets those of several runs side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PANELS = "panels"
QUALITY = 92  # of JPEG
# The usual colours of CamVid's classes, and black for pixels that do not count.
COLOURS = np.array(
    [
        [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
        [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
    ],
    np.uint8,
)  # fmt: skip


def save(
    folder: Path, data: Any, items: tuple[int, ...], predict: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Run a network on some test examples and keep what it made of them.

    Parameters
    ----------
    folder : Path
        Gets `panels/<number>-{input,truth,output}`, PNG for classes and JPEG for pictures.
    data : FileDataSet
        CamVid or low light.
    items : tuple of int
        Numbers of test examples.
    predict : callable
        From a batch of inputs, float32 (1, C, H, W), to the outputs.
    """
    target = folder / PANELS
    target.mkdir(exist_ok=True)
    for number in items:
        x, truth = (t.numpy() for t in data.example(data.test_items[number], None))
        output = predict(x[None])[0]
        if data.labels:
            mean, std = (
                np.array(data.preprocessing[key], np.float32)[:, None, None]
                for key in ("mean", "std")
            )
            _photograph(target / f"{number}-input.jpg", x * std + mean)
            for name, classes in (("truth", truth), ("output", output.argmax(0))):
                Image.fromarray(classes.astype(np.uint8)).save(target / f"{number}-{name}.png")
        else:
            # The red, the mean of both green and the blue plane, as they are but for gamma.
            planes = np.stack([x[0], (x[1] + x[3]) / 2, x[2]]).repeat(2, 1).repeat(2, 2)
            _photograph(target / f"{number}-input.jpg", planes ** (1 / 2.2))
            for name, picture in (("truth", truth), ("output", output)):
                _photograph(target / f"{number}-{name}.jpg", picture)


def _photograph(path: Path, planes: np.ndarray) -> None:
    pixels = np.rint(np.clip(planes, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(path, quality=QUALITY)


def draw(path: Path, runs: dict[str, Path], labels: tuple[str, ...]) -> None:
    """Draw a row for each example: input, truth, and the output of each run.

    Parameters
    ----------
    path : Path
        The figure, JPEG.
    runs : dict of str to Path
        Folders with `panels` by the names of their columns; input and truth are the first one's.
    labels : tuple of str
        Class names, for the legend; empty if outputs are pictures.
    """
    from matplotlib import patches, pyplot

    first = next(iter(runs.values())) / PANELS
    numbers = sorted(int(p.name.split("-")[0]) for p in first.glob("*-input.jpg"))
    columns = [("input", first, "input"), ("truth", first, "truth")]
    columns += [(name, run / PANELS, "output") for name, run in runs.items()]
    height, width = np.asarray(Image.open(first / f"{numbers[0]}-input.jpg")).shape[:2]
    size = (2.4 * len(columns), 2.4 * len(numbers) * height / width + (0.6 if labels else 0.3))
    figure, axes = pyplot.subplots(
        len(numbers), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for line, number in zip(axes, numbers, strict=True):
        for axis, (name, folder, kind) in zip(line, columns, strict=True):
            (file,) = folder.glob(f"{number}-{kind}.*")
            pixels = np.asarray(Image.open(file))
            if pixels.ndim == 2:
                pixels = np.vstack([COLOURS, np.zeros_like(COLOURS[:1])])[
                    np.minimum(pixels, len(COLOURS))
                ]
            axis.imshow(pixels, interpolation="none")
            axis.set_axis_off()
            if number == numbers[0]:
                axis.set_title(name, fontsize=10)
    if labels:
        handles = [
            patches.Patch(color=colour / 255, label=label)
            for colour, label in zip(COLOURS, labels, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})
    pyplot.close(figure)
