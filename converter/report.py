"""What a conversion did, for reading and for programs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from logshift.converter.verdict import Verdict
from logshift.runtime.table import text_table


@dataclass(frozen=True)
class LayerReport:
    """One node of the packed network; fields of weights are None for nodes without.

    Attributes
    ----------
    name, op : str
    weight_shape : (O, kh, kw, C / group), optional
    bits : int, optional
    nzr : float, optional
        Non-zero ratio of second words.
    weight_snr_db : float, optional
    output_snr_db : float, optional
        Of the quantized network's values here against the float network's.
    bytes : int
        Size of the layer's tensors in the file.
    """

    name: str
    op: str
    output_snr_db: float | None
    bytes: int
    weight_shape: tuple[int, ...] | None = None
    bits: int | None = None
    nzr: float | None = None
    weight_snr_db: float | None = None


@dataclass(frozen=True)
class Trial:
    """A network that was tried: bytes of its file, and how good it is."""

    file_bytes: int
    figure: float | None = None


@dataclass(frozen=True)
class Search:
    """How a network was found that meets a target; `str()` is a few lines.

    Attributes
    ----------
    target : str
    trials : list of Trial, in order
    chosen : Trial
        One of them.
    what : str
        What the figures are, "" if sizes are all that counts.
    float_figure : float, optional
        The float model's own.
    """

    target: str
    trials: list[Trial]
    chosen: Trial
    what: str = ""
    float_figure: float | None = None

    @property
    def reached(self) -> str:
        """What the chosen network reaches."""
        text = self._line(self.chosen)
        return text if self.float_figure is None else f"{text}, float model {self.float_figure:.4g}"

    def __str__(self) -> str:
        """Return what was reached, and every trial."""
        count = f"{len(self.trials)} trial{'s' * (len(self.trials) != 1)}"
        lines = [f"{self.target}: {self.reached}, in {count}:"]
        return "\n".join(lines + [f"  {self._line(trial)}" for trial in self.trials])

    def _line(self, trial: Trial) -> str:
        figure = "" if trial.figure is None else f", {self.what} {trial.figure:.4g}"
        return f"{trial.file_bytes:,} bytes{figure}"


@dataclass(frozen=True)
class Report:
    """Result of `convert`; `str()` is a table, `to_dict()` is for JSON.

    Attributes
    ----------
    path : str
    layers : list of LayerReport, in execution order
    file_bytes, onnx_bytes : int
    weights : int
        Number of weights.
    nzr : float
        Non-zero ratio over all weights.
    samples : int
        Calibration samples used.
    settings : dict
    notes : list of str
        What was assumed where nothing was said.
    verdict : Verdict, optional
        How far the outputs are from the float model's.
    search : Search, optional
        How a network was found that meets `max_bytes`, `max_drop` or `min_snr`.
    """

    path: str
    layers: list[LayerReport]
    file_bytes: int
    onnx_bytes: int
    weights: int
    nzr: float
    samples: int
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    search: Search | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than the ONNX model the file is."""
        return self.onnx_bytes / self.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of the layers' tensors (words, positions, alpha, bias) per weight."""
        layers = [layer for layer in self.layers if layer.weight_shape]
        return 8 * sum(layer.bytes for layer in layers) / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; infinite and undefined ratios are None."""
        record = asdict(self)
        record |= {"ratio": self.ratio, "bits_per_weight": self.bits_per_weight}
        record["verdict"] = self.verdict and self.verdict.to_dict()
        search = record["search"]
        for trial in (*search["trials"], search["chosen"]) if search else ():
            if trial["figure"] is not None and not math.isfinite(trial["figure"]):
                trial["figure"] = None
        for layer in record["layers"]:
            layer["weight_shape"] = layer["weight_shape"] and list(layer["weight_shape"])
            for key in ("weight_snr_db", "output_snr_db"):
                if layer[key] is not None and not math.isfinite(layer[key]):
                    layer[key] = None
        return record

    def __str__(self) -> str:
        """Return a table of the layers, then the totals, notes and verdict."""
        rows = [("layer", "op", "weights", "bits", "NZR %", "weight SNR", "output SNR", "bytes")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    layer.op,
                    "x".join(map(str, layer.weight_shape or ())),
                    str(layer.bits or ""),
                    "" if layer.nzr is None else f"{100 * layer.nzr:.1f}",
                    _decibels(layer.weight_snr_db),
                    _decibels(layer.output_snr_db),
                    f"{layer.bytes:,}" if layer.bytes else "",
                )
            )
        lines = [
            text_table(rows, left=3),
            "",
            f"{self.path}: {self.file_bytes:,} bytes, {self.ratio:.1f} times smaller than ONNX"
            f" ({self.onnx_bytes:,} bytes)",
            f"{self.weights:,} weights, {self.bits_per_weight:.2f} bits per weight, NZR"
            f" {100 * self.nzr:.1f} %, calibrated with {self.samples} samples",
            *(f"note: {note}" for note in self.notes),
            *([str(self.search)] if self.search else []),
            *([str(self.verdict)] if self.verdict else []),
        ]
        return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1f} dB"
