"""Logs of a run: one CSV row an iteration and one an epoch, and the same for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Log:
    """Writes `iterations.csv`, `epochs.csv` and `tensorboard/` into a folder.

    Parameters
    ----------
    folder : Path
    iteration, epoch : int
        What a resumed run has done; later rows, of steps that are done again, are removed.
    """

    def __init__(self, folder: Path, iteration: int, epoch: int) -> None:
        self.folder = folder
        for name, done in (("iteration", iteration), ("epoch", epoch)):
            self._shorten(name, done)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}s.csv"

    def _shorten(self, name: str, done: int) -> None:
        path = self._path(name)
        if done == 0:  # its columns may be others
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        rows = [row for row in rows if len(row) == len(header) and int(row[0]) <= done]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    def add(self, name: str, number: int, values: dict[str, float], iteration: int) -> None:
        """Add a row.

        Parameters
        ----------
        name : {"iteration", "epoch"}
        number : int
            Of the iteration or epoch, from 1.
        values : dict
            Column to value; the same columns in each call.
        iteration : int
            Where TensorBoard shows it.
        """
        path = self._path(name)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow([name, *values])
            writer.writerow([number, *(f"{value:.7g}" for value in values.values())])
        for key, value in values.items():
            self.board.add_scalar(f"{name}/{key}", value, iteration)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        self.board.close()
