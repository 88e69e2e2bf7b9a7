"""The lowered network: packed operations whose weights are still float.

`lower` makes it from ONNX, `fuse` shrinks it, `place` says where codes end and float32 begins, and
`quantize` packs it. Tensors carry the names of the ONNX tensors that they stand for.
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from logshift.converter.clamp import NO_CLAMP, Clamp
from logshift.converter.function import Function
from logshift.kernels.errors import ConversionError
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.graph import ConstantWords, Quantization, Shape, ValueInfo


@dataclass(eq=False)
class FloatNode:
    """One operation of the lowered network.

    Attributes
    ----------
    op : str
        A key of `runtime.operators.OPERATORS`; before fusion also "Affine" (weight * x + bias per
        channel) and "Elementwise" (`function`, of one or more tensors). Or an ONNX operator.
    name : str
        Name of the ONNX node it came from.
    inputs : tensor names; a second one of a Conv is added to its result
    output : tensor name
        The first one of an ONNX operator.
    attributes : dict
        As in the packed node, without `clamp`.
    weight : float32 array (O, kh, kw, C / group), or (C,) of an Affine
    bias : float32 array of shape (O,)
    words : LogWeights, optional
        The weight, if it lies on a grid already.
    clamp : (low, high) in real units, None for no bound
    function : Function, optional
        A Lookup's; of what may have an activation function, that function: the clamp comes last.
    table : FloatNode, optional
        The Lookup that does what `function` and `clamp` do, if nothing but a table can.
    opset : int
        Version of an ONNX operator in ONNX's own form; 0 for packed operators.
    more_outputs : tensor names
        Of an ONNX operator.
    is_float : bool
        Whether it works on float32; known after `place`.
    keeps_weight : bool
        Whether its weight stays float32.
    """

    op: str
    name: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    words: LogWeights | None = None
    clamp: Clamp = NO_CLAMP
    function: Function | None = None
    table: FloatNode | None = None
    opset: int = 0
    more_outputs: list[str] = field(default_factory=list)
    is_float: bool = False
    keeps_weight: bool = False

    @property
    def outputs(self) -> list[str]:
        """Names of all outputs; "" for one that nobody reads."""
        return [self.output, *self.more_outputs]

    @property
    def weight_shape(self) -> Shape | None:
        """(O, kh, kw, C / group), or None without weights."""
        return None if self.weight is None else self.weight.shape

    @property
    def is_onnx(self) -> bool:
        """Tell whether it is an ONNX operator in ONNX's own form."""
        return self.opset > 0

    @property
    def is_quantized(self) -> bool:
        """Tell whether it has weights that become words."""
        return self.is_conv and not self.keeps_weight

    @property
    def is_conv(self) -> bool:
        """Tell whether it is a packed operator with weights."""
        return self.op in ("Conv", "ConvTranspose") and not self.is_onnx


@dataclass
class FloatGraph:
    """The lowered network.

    Attributes
    ----------
    nodes : list of FloatNode, in execution order
    inputs, outputs : list of ValueInfo
    results : dict of output name to the tensor that holds it
        Before `place`; afterwards both are the same.
    shapes : dict of tensor name to nominal shape
        (N, C, H, W) of tensors of packed operators.
    constants : dict of name to array
        Inputs of ONNX operators.
    weights : dict of constant to the axes of its rows
        Constants that become words, see `constant_words`.
    constant_words : dict of constant to ConstantWords
        Of those that lie on a grid already.
    quantization : dict of tensor name to Quantization
        What the model itself says; other tensors are calibrated.
    code_tensors : set of tensors that become codes
        Known after `place`.
    ranges : dict of tensor name to Quantization
        Of tensors whose codes are chosen before the network is quantized.
    floats : set of tensor names
        Outputs, before `place`, of nodes that were chosen to work on float32.
    """

    nodes: list[FloatNode]
    inputs: list[ValueInfo]
    outputs: list[ValueInfo]
    results: dict[str, str]
    shapes: dict[str, Shape]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    quantization: dict[str, Quantization] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constant_words: dict[str, ConstantWords] = field(default_factory=dict)
    code_tensors: set[str] = field(default_factory=set)
    ranges: dict[str, Quantization] = field(default_factory=dict)
    floats: frozenset[str] = frozenset()

    def copy(self) -> FloatGraph:
        """Return a network that can be changed while this one stays; weights are the same."""
        nodes = [
            replace(
                node, inputs=list(node.inputs), attributes=dict(node.attributes),
                more_outputs=list(node.more_outputs),
            )
            for node in self.nodes
        ]  # fmt: skip
        own = {f.name: copy(getattr(self, f.name)) for f in fields(self) if f.name != "nodes"}
        return FloatGraph(nodes, **own)

    def readers(self) -> dict[str, list[FloatNode]]:
        """Nodes by the tensors that they read, as often as they do."""
        readers: dict[str, list[FloatNode]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return readers

    def uses(self) -> Counter[str]:
        """How often each tensor is read, by nodes and as a result."""
        counts = Counter(name for node in self.nodes for name in node.inputs)
        counts.update(self.results.values())
        return counts


@dataclass
class Problems:
    """What cannot be converted, gathered so that one error can tell all of it."""

    found: list[str] = field(default_factory=list)

    def add(self, op: str, name: str, why: str) -> None:
        """Note an offending node."""
        self.found.append(f"{op} {name!r}: {why}")

    def raise_if_any(self) -> None:
        """Raise one `ConversionError` that lists everything noted."""
        if self.found:
            count = f"{len(self.found)} node{'s' if len(self.found) > 1 else ''}"
            listing = "\n".join(f"  - {line}" for line in self.found)
            raise ConversionError(f"{count} of the model cannot be converted:\n{listing}")
