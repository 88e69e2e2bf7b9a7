"""Who lowers which ONNX operator, and who writes which packed operator as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from logshift.converter.onnx_writer import AnyNode, OnnxWriter, Step

if TYPE_CHECKING:
    import onnx

    from logshift.converter.operators.context import Context

# Takes an ONNX node and its attributes, adds packed operators; raises `Unsupported` if there are
# none that do the same, whatever it has added by then.
Lowering = Callable[["Context", "onnx.NodeProto", dict[str, Any]], None]

# Takes a packed operator and the names of its inputs in ONNX; for `OnnxWriter.steps`.
Writing = Callable[[OnnxWriter, AnyNode, list[str]], list[Step]]

LOWERINGS: dict[str, Lowering] = {}
VARIADIC: set[str] = set()  # ONNX operators whose inputs are all data
WRITINGS: dict[str, Writing] = {}


class Unsupported(Exception):
    """Why a node has no packed counterpart."""


def lowers(*ops: str, variadic: bool = False) -> Callable[[Lowering], Lowering]:
    """Register what lowers these ONNX operators.

    Parameters
    ----------
    ops : str
    variadic : bool
        Whether all inputs are data; else only the first one is, and others give sizes or weights.
    """

    def register(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(ops, lowering))
        VARIADIC.update(ops if variadic else ())
        return lowering

    return register


def writes(*ops: str) -> Callable[[Writing], Writing]:
    """Register what writes these packed operators as ONNX."""

    def register(writing: Writing) -> Writing:
        WRITINGS.update(dict.fromkeys(ops, writing))
        return writing

    return register


def write_same(to: OnnxWriter, node: AnyNode, x: list[str]) -> list[Step]:
    """Write an operator that has the same attributes in ONNX."""
    return [(node.op, x, node.attributes)]
