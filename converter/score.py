"""Scores on labels of the user's own: of packed networks, and of the float model beside them."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from PIL import Image, UnidentifiedImageError

from logshift.converter.onnx_model import Runner
from logshift.kernels.errors import InputError
from logshift.runtime.graph import Graph
from logshift.runtime.picture import picture_files
from logshift.runtime.session import Session

if TYPE_CHECKING:
    from logshift.runtime.plan.program import Plan

_BATCH = 16  # pictures that run together, where the network takes any number
_ROUNDING = 1e-9  # of a score


class FloatSession(Session):
    """The float model behind the interface of a session: `run`, `inputs`, `outputs`, `labels`.

    Parameters
    ----------
    model : onnx.ModelProto
    graph : Graph
        Inputs, outputs, preprocessing and labels of the packed network; it has no nodes.
    """

    def __init__(self, model: onnx.ModelProto, graph: Graph) -> None:
        super().__init__(graph)
        self._model, self._runner = model, Runner(model)

    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [info.name for info in self.outputs]
        return dict(zip(names, self._runner(arrays), strict=True))

    def _plan(self, arrays: dict[str, np.ndarray], keep_all: bool = False) -> Plan:
        raise InputError("this is the float model: it has no layers to trace or to time")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds."""
        return {"model": self._model.SerializeToString(), "graph": self.graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the model anew."""
        FloatSession.__init__(self, onnx.load_from_string(state["model"]), state["graph"])


class Score:
    """What a function says of networks, higher is better; a measure for `auto.smallest`.

    Parameters
    ----------
    function : callable(session) -> float
    float_session : FloatSession
    max_drop : float
        In the unit of the score.

    Raises
    ------
    InputError
        If the function fails or returns no number; also when it is called.
    """

    what = "score"

    def __init__(
        self, function: Callable[[Session], float], float_session: FloatSession, max_drop: float
    ) -> None:
        self.function, self.max_drop = function, max_drop
        self.float_figure = self._of(float_session, "the float model")

    def __call__(self, session: Session) -> float:
        """Return the score of a packed network."""
        return self._of(session, "a packed network")

    def _of(self, session: Session, which: str) -> float:
        try:
            found = self.function(session)
        except Exception as error:  # whatever a function of the user's raises
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise InputError(f"validate failed on {which}: {said}") from error
        try:
            number = math.nan if isinstance(found, (str, bytes)) else float(found)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"validate returned {found!r} for {which}; it must be a finite number")
        return number

    def lack(self, figure: float) -> float:
        """Return by how much the score is too low."""
        spare = _ROUNDING * max(abs(self.float_figure), 1.0)
        return self.float_figure - figure - self.max_drop - spare

    def advice(self) -> str:
        """Return nothing: the figures say it."""
        return ""


class LabelledPictures:
    """Top-1 accuracy in percent on pictures whose classes are known; a function for `Score`.

    Parameters
    ----------
    source : path
        A folder with a folder of pictures for each class, or a file with a picture and its class
        on each line.
    graph : Graph
        Inputs, outputs, preprocessing and labels of the network.

    Raises
    ------
    InputError
        If the network is no classifier of pictures, or pictures or classes are not known.
    """

    def __init__(self, source: str | os.PathLike[str], graph: Graph) -> None:
        self.classes, self.labels = _class_count(graph), graph.labels
        if graph.preprocessing is None:
            raise InputError("validate: pictures need preprocessing, which was not given")
        batch = graph.inputs[0].shape[0]
        self.batch, self.fixed = (batch, True) if isinstance(batch, int) else (_BATCH, False)
        path = Path(source)
        self.where = f"validate: {os.fspath(path)!r}"
        if not path.exists():
            raise InputError(f"{self.where} does not exist")
        self.pictures = self._of_folder(path) if path.is_dir() else self._of_file(path)

    def __call__(self, session: Session) -> float:
        """Return the share of pictures, in percent, whose largest output is that of their class."""
        right = 0
        for begin in range(0, len(self.pictures), self.batch):
            part = self.pictures[begin : begin + self.batch]
            images = [_opened(path) for path, _ in part]
            if self.fixed:
                images += [images[0]] * (self.batch - len(images))
            y = session.run(images)
            scores = next(iter(y.values())) if isinstance(y, Mapping) else y
            found = scores.reshape(len(scores), -1).argmax(axis=1)
            right += sum(int(n == wanted) for n, (_, wanted) in zip(found, part, strict=False))
        return 100.0 * right / len(self.pictures)

    def _of_folder(self, path: Path) -> list[tuple[Path, int]]:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise InputError(f"{self.where} holds no folders, one for each class")
        known = [self._class(folder.name) for folder in folders]
        if set(known) == {None} and len(folders) == self.classes:
            known = list(range(self.classes))
        pairs = []
        for folder, number in zip(folders, known, strict=True):
            if number is None:
                raise InputError(
                    f"{self.where}: {folder.name!r} is no class; folders are called by the"
                    f" network's labels or by indices, or there is one for each of its"
                    f" {self.classes} classes"
                )
            pairs += [(picture, number) for picture in picture_files(folder)]
        return pairs

    def _of_file(self, path: Path) -> list[tuple[Path, int]]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{self.where} is not a text file in UTF-8") from None
        pairs = []
        for line, text in enumerate(lines, 1):
            if not text.strip():
                continue
            name, wanted = _fields(text)
            picture, number = path.parent / name, self._class(wanted)
            if not picture.is_file():
                if line == 1 and number is None:  # names of columns
                    continue
                raise InputError(f"{self.where}, line {line}: there is no picture {name!r}")
            if number is None:
                raise InputError(
                    f"{self.where}, line {line}: {wanted!r} is no class; give one of the network's"
                    f" labels, or an index below {self.classes}"
                )
            pairs.append((picture, number))
        if not pairs:
            raise InputError(f"{self.where} names no pictures")
        return pairs

    def _class(self, name: str) -> int | None:
        """Return the number of a class by its label or index; None if it is neither."""
        if self.labels is not None and name in self.labels:
            return self.labels.index(name)
        if name.isascii() and name.isdigit() and int(name) < self.classes:
            return int(name)
        return None


def _class_count(graph: Graph) -> int:
    output = graph.outputs[0]
    if len(output.nominal) < 2 or output.nominal[1] < 2 or math.prod(output.nominal[2:]) != 1:
        raise InputError(
            f"validate: accuracy needs scores of classes, but output {output.name!r} has shape"
            f" {output.nominal}; give a function of a session"
        )
    return output.nominal[1]


def _fields(line: str) -> tuple[str, str]:
    """Return a picture and its class, apart by a comma, a tab or else a space."""
    separator = next((mark for mark in ",\t" if mark in line), " ")
    fields = [field.strip() for field in next(csv.reader([line], delimiter=separator))]
    if separator == " ":  # also in names of pictures
        fields = line.rsplit(maxsplit=1)
    return (fields[0], fields[1]) if len(fields) > 1 else (line, "")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB") if image.mode not in ("L", "RGB") else image.copy()
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read picture {os.fspath(path)!r}: {error}") from error
