"""What an ONNX model may say about itself for logshift: one JSON object in its metadata.

Written by `export` and by trainers, read by `convert`; `docs/qdq.md` describes it, and
`tests/vectors/metadata.json` holds `logshift.trainer`, which writes it by itself, to the same.
Every part may be missing, and what does not fit the model is not believed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from logshift.converter.encode import tile_of
from logshift.kernels.errors import ConversionError, LogshiftError
from logshift.kernels.stlq import codec
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.picture import Preprocessing

if TYPE_CHECKING:
    import onnx

KEY = "logshift"


@dataclass(frozen=True)
class WeightRecord:
    """The grid that the weights of a layer lie on: w = alpha * W / 2^(L-1+s) (section 2).

    Attributes
    ----------
    bits, residual_shift, clip : int
    alpha : list of float, one per output channel
    granularity : str
        How second words were selected; for the reader's eye only.
    tile : list of two int, optional
        Inputs and outputs of the tiles of an array by which they were, whatever `granularity` says.
    """

    bits: int
    residual_shift: int
    clip: int
    alpha: list[float]
    granularity: str = "element"
    tile: list[int] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        codec.exponent_levels(self.bits)
        numbers = (self.residual_shift, self.clip)
        if not all(type(v) is int for v in numbers) or not (
            0 <= self.residual_shift <= codec.MAX_RESIDUAL_SHIFT and self.clip in (1, 2)
        ):
            raise ValueError(f"residual_shift and clip are {numbers}")
        alpha = np.asarray(self.alpha, np.float32)
        if alpha.ndim != 1 or not (np.isfinite(alpha).all() and (alpha > 0).all()):
            raise ValueError("alpha must be a list of positive numbers")
        if self.tile is not None:
            if not isinstance(self.tile, list) or len(self.tile) != 2:
                raise ValueError(f"tile is {self.tile}; it must be a list of two numbers")
            tile_of("tile", (self.tile[0], self.tile[1]))

    @classmethod
    def of(
        cls, weights: LogWeights, granularity: str, tile: tuple[int, int] | None = None
    ) -> WeightRecord:
        """Describe the grid of packed weights.

        How second words were selected is what the weights know, else what is given.
        """
        if weights.tile is not None:
            granularity, tile = "tile", weights.tile
        alpha = [float(a) for a in weights.alpha]
        sides = None if tile is None else list(tile)
        return cls(weights.bits, weights.residual_shift, weights.clip, alpha, granularity, sides)

    @property
    def array_tile(self) -> tuple[int, int] | None:
        """Inputs and outputs of the tiles of an array."""
        return None if self.tile is None else (self.tile[0], self.tile[1])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types, without what there is none of."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Metadata:
    """The metadata of a model.

    Attributes
    ----------
    weights : dict of the name of a weight initializer to WeightRecord
    scales : dict of the name of a scale initializer to its value before rounding to float32
    keep_float : set of the names of weight initializers that stay float32
    preprocessing : Preprocessing, optional
    labels : list of str, optional
    """

    weights: dict[str, WeightRecord] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    keep_float: frozenset[str] = frozenset()
    preprocessing: Preprocessing | None = None
    labels: list[str] | None = None

    @classmethod
    def read(cls, model: onnx.ModelProto) -> Metadata:
        """Return the metadata of a model; empty if it has none.

        Raises
        ------
        ConversionError
            If there is some, but not as `docs/qdq.md` describes it.
        """
        text = next((p.value for p in model.metadata_props if p.key == KEY), None)
        if text is None:
            return cls()
        try:
            return cls.from_json(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError, LogshiftError) as error:
            raise ConversionError(
                f"the model's metadata {KEY!r} is not as docs/qdq.md describes it ({error})"
            ) from error

    def write(self, model: onnx.ModelProto) -> None:
        """Let this be the metadata of a model."""
        from onnx import helper

        helper.set_model_props(model, {KEY: json.dumps(self.to_json(), allow_nan=False)})

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Metadata:
        """Return what a JSON object says; exceptions of any kind if it is not as it should be."""
        preprocessing, labels = record.get("preprocessing"), record.get("labels")
        if labels is not None and not all(isinstance(label, str) for label in labels):
            raise ValueError("labels must be strings")
        kept = record.get("keep_float", [])
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            raise ValueError("keep_float must be a list of strings")
        return cls(
            {name: WeightRecord(**weight) for name, weight in record.get("weights", {}).items()},
            {name: float(scale) for name, scale in record.get("scales", {}).items()},
            frozenset(kept),
            None if preprocessing is None else Preprocessing.from_manifest(preprocessing),
            None if labels is None else list(labels),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        record: dict[str, Any] = {
            "weights": {name: weight.to_json() for name, weight in self.weights.items()},
            "scales": self.scales,
        }
        if self.keep_float:
            record["keep_float"] = sorted(self.keep_float)
        if self.preprocessing is not None:
            record["preprocessing"] = self.preprocessing.to_manifest()
        if self.labels is not None:
            record["labels"] = self.labels
        return record
