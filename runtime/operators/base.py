"""What there is to say of a packed operator, and what modules of operators say it with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from logshift.runtime.graph import MAX_ATTRIBUTE, Graph, Node, Quantization, Shape
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.convolution import Convolution


class NodeError(Exception):
    """Inputs or attributes that an operator cannot take; wrapped with the node's name."""


class Operand(NamedTuple):
    """A tensor that kernels read or write."""

    name: str  # under which it is stored
    shape: Shape  # (N, C, H, W)
    top: int  # first row and column of the picture in its buffer
    left: int
    quantization: Quantization | None  # None for float32

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
    stores : {"", "weights", "table"}
        What a node has beside its attributes.
    reads_onnx, writes_onnx : bool
        Its input, or its output, lies as in ONNX, not channels last.
    writes_within : bool
        Its kernels write codes also where pixels of the output lie further apart than its channels
        take: as some channels of another tensor.
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
    stores: str = ""
    reads_onnx: bool = False
    writes_onnx: bool = False
    writes_within: bool = False
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


def check_clamp(graph: Graph, node: Node) -> None:
    """Check that bounds of an output of codes are codes."""
    q = graph.quantization.get(node.outputs[0])
    if q is not None:
        for bound in node.attributes["clamp"]:
            if bound is not None and not (type(bound) is int and 0 <= bound <= q.top):
                raise NodeError(f"clamp bound {bound!r} is not an output code")
