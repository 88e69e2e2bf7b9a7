"""What there is to say of a packed operator, and what modules of operators say it with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from logshift.kernels.activation import MOST, PIECES, Target, target
from logshift.runtime.graph import MAX_ATTRIBUTE, Graph, Node, Quantization, Shape
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.convolution import Convolution


class NodeError(Exception):
    """Inputs or attributes that an operator cannot take; wrapped with the node's name."""


class Operand(NamedTuple):
    """A tensor that kernels read or write, or what a Slice takes of one."""

    name: str  # under which it is stored
    shape: Shape  # (N, C, H, W)
    top: int  # first row and column of the picture in its buffer
    left: int
    quantization: Quantization | None  # None for float32
    channel: int = 0  # the first one
    steps: tuple[int, int, int] = (1, 1, 1)  # from channel to channel, row to row, column to column
    in_place: bool = False  # lies already where the Concat that reads it would bring it

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields of an argument record: what is computed is as large."""
        n, c, h, w = self.shape
        return {"n": n, "height": h, "width": w, "channels": c}


class Site(NamedTuple):
    """A node where it is built: what its operator makes kernel calls from."""

    node: Node
    inputs: Sequence[Operand]
    output: Operand
    convolutions: Sequence[Convolution]  # of a node with weights

    def kernel_op(self, name: str) -> str:
        """Return the kernels' name of an operation on codes or on float32."""
        return name if self.inputs[0].quantization is not None else f"float_{name}"

    def bounds(self) -> dict[str, Any]:
        """Return `lo` and `hi` of the node's clamp."""
        return bounds(self.node, self.output.quantization)


def bounds(node: Node, q: Quantization | None) -> dict[str, Any]:
    """Return `lo` and `hi` of a node's clamp: codes for an output of codes, else real values."""
    lo, hi = node.attributes.get("clamp", NO_CLAMP)
    low, high = (0, q.top) if q else (-math.inf, math.inf)
    return {"lo": low if lo is None else lo, "hi": high if hi is None else hi}


Check = Callable[[Any], bool]
Attributes = dict[str, tuple[Any, Check]]
REQUIRED = object()  # in place of a default
NO_CLAMP = [None, None]


@dataclass(frozen=True)
class Operator:
    """All that is to be known of a packed operator.

    Attributes
    ----------
    name : str
    codes : str
        Which of (inputs, output) hold codes: "c" codes, "f" float32, "?" either for the output;
        several pairs are alternatives.
    shape : callable(node, input shapes) -> Shape
        Of the output; raises `NodeError` if the inputs do not go together.
    build : callable(site) -> kernel calls, in order
    attributes : dict of name to (default or REQUIRED, check)
    arity : (int, int)
        Bounds of the number of inputs.
    check : callable(graph, node), optional
        What is to be checked beyond the above; raises `NodeError`. Attributes are complete by then.
    keeps_quantization : bool
        Output codes mean what input codes mean, so both share one quantization.
    activates : bool
        It may have a fused activation function.
    stores : {"", "weights", "table"}
        What a node has beside its attributes.
    reads_onnx, writes_onnx : bool
        Its input, or its output, lies as in ONNX, not channels last.
    writes_parts : bool
        Its kernels on codes write the channels that are the output's and leave others alone that
        lie between those of one pixel and the next.
    renames : bool
        The output is the input's bytes under another name and shape: nothing is built.
    """

    name: str
    codes: str
    shape: Callable[[Node, list[Shape]], Shape]
    build: Callable[[Site], Iterable[Call]]
    attributes: Attributes = field(default_factory=dict)
    arity: tuple[int, int] = (1, 1)
    check: Callable[[Graph, Node], None] | None = None
    keeps_quantization: bool = False
    activates: bool = False
    stores: str = ""
    reads_onnx: bool = False
    writes_onnx: bool = False
    writes_parts: bool = False
    renames: bool = False


# --- checks -------------------------------------------------------------------------------------


def rank4(shape: Shape) -> Shape:
    """Return a shape, if it is (N, C, H, W)."""
    if len(shape) != 4:
        raise NodeError(f"needs a tensor of rank 4, got shape {shape}")
    return shape


def integer(low: int, high: int = MAX_ATTRIBUTE) -> Check:
    """Check for an integer in a range."""
    return lambda v: type(v) is int and low <= v <= high


def integers(count: int, low: int, high: int = MAX_ATTRIBUTE) -> Check:
    """Check for so many integers in a range."""
    one = integer(low, high)
    return lambda v: isinstance(v, list) and len(v) == count and all(map(one, v))


def one_of(*choices: Any) -> Check:
    """Check for one of some values, types included."""
    return lambda v: any(type(v) is type(c) and v == c for c in choices)


def number(v: Any) -> bool:
    """Check for a number that is far from float32's infinity."""
    return type(v) in (int, float) and abs(v) < 1e30


def clamp(v: Any) -> bool:
    """[lo, hi] in output codes, or in real units for a float32 output; None for no bound."""
    return (
        isinstance(v, list)
        and len(v) == 2
        and all(b is None or number(b) for b in v)
        and (v[0] is None or v[1] is None or v[0] <= v[1])
    )


def target_of(graph: Graph, node: Node) -> Target:
    """Return what a node's results are before they are rounded, or stored as float32."""
    q = graph.quantization.get(node.outputs[0])
    return Target(1.0, 0) if q is None else target(node.activation, q.scale, q.zero_point)


def check_activation(graph: Graph, node: Node, channels: int) -> None:
    """Check a fused activation function of results of so many channels; 1 if no one knows."""
    activation = node.activation
    if activation is None:
        return
    if not (graph.on_codes(node) and graph.is_code(node.outputs[0])):
        raise NodeError("only what becomes codes out of codes has an activation function")
    shapes = {"PRelu": ((1,), (channels,)), "HardSwish": ((0,),), "Piecewise": ((3, PIECES),)}
    if activation.op not in shapes:
        raise NodeError(f"unknown activation function {activation.op!r}")
    if activation.coefficients.shape not in shapes[activation.op]:
        raise NodeError(
            f"{activation.op} has coefficients of shape {activation.coefficients.shape}, expected"
            f" {' or '.join(dict.fromkeys(map(str, shapes[activation.op])))}"
        )
    # As of scales: keeps everything far from float32 infinity.
    if not (1e-15 < activation.unit < 1e15 and abs(activation.origin) < 1e15 * activation.unit):
        raise NodeError(
            f"{activation.op} has origin {activation.origin} and unit {activation.unit}"
        )
    values, is_piecewise = activation.coefficients, activation.op == "Piecewise"
    if values.dtype != (np.int16 if is_piecewise else np.float32):
        raise NodeError(f"{activation.op} has coefficients of dtype {values.dtype}")
    bounded = values[1:] if is_piecewise else values
    most = MOST if is_piecewise else 1e15
    if not (np.abs(bounded.astype(np.float64)) <= most).all():  # false for NaN
        raise NodeError(f"coefficients of {activation.op} are beyond {most:g}, or not finite")


def check_clamp(graph: Graph, node: Node) -> None:
    """Check that bounds of an output of codes are codes."""
    q = graph.quantization.get(node.outputs[0])
    if q is not None:
        for bound in node.attributes["clamp"]:
            if bound is not None and not (type(bound) is int and 0 <= bound <= q.top):
                raise NodeError(f"clamp bound {bound!r} is not an output code")
