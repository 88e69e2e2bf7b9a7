"""How a network is quantized: what `prepare` goes by, and the `[quantization]` part of settings."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from logshift.trainer import stlq
from logshift.trainer.blocks import MAX_TILE, Granularity

Method = Literal[
    "stlq", "without_select", "residual_penalty", "residual_penalty_without_select", "log",
    "flightnn", "apot", "uniform",
]  # fmt: skip
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_TILE)]


class LayerConfig(BaseModel):
    """What one layer has different from the others; what is left out is as for the others.

    `keep_float` of a pattern holds, whatever other patterns say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_bits: int | None = Field(default=None, ge=stlq.MIN_BITS, le=stlq.MAX_BITS)
    residual_ratio: float | None = Field(default=None, ge=0, le=1)
    keep_float: bool = False


class Config(BaseModel):
    """Quantization of a network.

    Attributes
    ----------
    method : {"stlq", "without_select", "residual_penalty", ...}
        "stlq": the published one; second words of weights that are not selected fade out.
        "without_select": the same with nothing selected; all second words fade, and lambda decides
        how far.
        "residual_penalty": selection anew every `refresh` steps, and errors of all other weights
        driven to the grid; "residual_penalty_without_select": errors of all.
        "log": no second words. "flightnn": "residual_penalty" for whole filters.
        "apot": additive powers of two. "uniform": integers.
    weight_bits : int
        b, 2 to 5.
    residual_ratio : float
        Share of the weights (tiles, filters) of each layer that have second words.
    granularity : {"element", "tile", "filter"}
        What is selected: `blocks.Blocks`; "flightnn" selects filters whatever this says.
    tile : (int, int) or int
        Input and output channels of a tile at one kernel position; or 1 to 256 consecutive weights.
    scale : {"channel", "layer"}
        What has an alpha; "apot" and "uniform" have one for each channel.
    clip : int, optional
        Bound of |W| in units of alpha, 1 or 2; by default 2 below 4 bits where there are second
        words, else 1.
    residual_shift : int
        s, 0 to 4: the second word's grid is 2^s times finer.
    activation_bits : int
        A, 2 to 8, or 32: activations stay float32.
    input_bits : int
        Least A of the network's inputs, and of outputs that are codes.
    regularisation : float
        lambda: of ||v||^2, where 0 needs `v_lr`; of "residual_penalty" and "flightnn" that of the
        sum of the layers' l2 norms of r1.
    v_lr : float, optional
        Highest learning rate of v. By default the one with which v fades in the first 60 % of a
        run, whatever the length of the run, its optimiser, its learning rate and lambda; of
        "without_select" that with the default lambda.
    refresh : int
        Iterations after which "residual_penalty" and "flightnn" select anew.
    first, last : LayerConfig
        What the first and the last layer have different.
    layers : dict
        Pattern of layer names (`*` stands for anything) to what these layers have different.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "stlq"
    weight_bits: int = Field(default=4, ge=stlq.MIN_BITS, le=stlq.MAX_BITS)
    residual_ratio: float = Field(default=0.15, ge=0, le=1)
    granularity: Granularity = "element"
    tile: Side | tuple[Side, Side] = (16, 16)
    scale: Literal["channel", "layer"] = "channel"
    clip: Literal[1, 2] | None = None
    residual_shift: int = Field(default=0, ge=0, le=4)
    activation_bits: Literal[2, 3, 4, 5, 6, 7, 8, 32] = 8
    input_bits: int = Field(default=8, ge=2, le=8)
    regularisation: float = Field(default=1e-3, ge=0)
    v_lr: float | None = Field(default=None, gt=0)
    refresh: int = Field(default=100, ge=1)
    first: LayerConfig = LayerConfig()
    last: LayerConfig = LayerConfig()
    layers: dict[str, LayerConfig] = {}

    @model_validator(mode="after")
    def _fades(self) -> Config:
        if self.method in ("stlq", "without_select"):
            if self.regularisation == 0 and self.v_lr is None:
                raise ValueError("regularisation is 0: v does not fade by itself; give v_lr, too")
        return self

    @model_validator(mode="after")
    def _selects(self) -> Config:
        # Settings of old runs have their default, 16, which only tiles went by, either.
        if self.granularity != "tile" and self.tile not in (16, (16, 16)):
            raise ValueError(f"tile is {self.tile}, which needs granularity 'tile'")
        return self

    def of_layer(self, name: str, number: int, count: int) -> LayerConfig:
        """Return what holds for layer `number` of `count`: patterns, then first and last."""
        values: dict[str, Any] = {
            "weight_bits": self.weight_bits,
            "residual_ratio": self.residual_ratio,
        }
        special = [c for pattern, c in self.layers.items() if fnmatchcase(name, pattern)]
        special += [self.first] * (number == 0) + [self.last] * (number == count - 1)
        for config in special:
            values |= config.model_dump(exclude_none=True, exclude_defaults=True)
        return LayerConfig(**values)
