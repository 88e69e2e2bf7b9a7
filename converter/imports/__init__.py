"""ONNX models as people have them, brought into the plain float form that all else works on.

One module for each kind: nodes out of order, wrong declarations, half precision, ONNX Runtime's own
operators, integer operators, dynamic quantization, branches and loops. What comes out is a model of
standard operators on float32, in which quantization is pairs of QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import inliner

from logshift.converter.imports.branches import has_control, straighten
from logshift.converter.imports.declared import complete, forget
from logshift.converter.imports.dynamic import DYNAMIC
from logshift.converter.imports.editor import Editor
from logshift.converter.imports.microsoft import ONNXRUNTIME, claim
from logshift.converter.imports.order import sort
from logshift.converter.imports.qoperator import MOVES, QOPERATORS
from logshift.converter.imports.working_type import drop_idle_casts, to_float32
from logshift.converter.simplify import simplified

_ROUNDS = 4  # operators that are made of others which are to be replaced
_RULES = ONNXRUNTIME | QOPERATORS | DYNAMIC


@dataclass
class Imported:
    """What became of a model.

    Attributes
    ----------
    model : onnx.ModelProto
    left : dict of the first output of a node to str
        Why nodes stayed that no other operators could be put in the place of.
    changed : bool
        Whether it was of another form.
    rounds : bool
        Whether the given model rounds where this one does not: on codes.
    retyped : bool
        Whether it worked in another type than float32.
    """

    model: onnx.ModelProto
    left: dict[str, str] = field(default_factory=dict)
    changed: bool = False
    rounds: bool = False
    retyped: bool = False


def put_in_order(model: onnx.ModelProto) -> bool:
    """Mend what ONNX does not allow and others do, in place, before the model is checked.

    Returns
    -------
    bool
        Whether there was anything to mend.

    Raises
    ------
    ConversionError
        If nodes wait for each other, or read what no node makes.
    """
    complete(model)
    moved, claimed = sort(model.graph), claim(model)
    return moved or claimed


def brought_in(model: onnx.ModelProto) -> Imported:
    """Return a checked model in plain form, and what is left of other forms.

    Parameters
    ----------
    model : onnx.ModelProto
        May be changed.

    Raises
    ------
    ConversionError
        If an operator looks at the bits of a number whose type changes.
    """
    result = Imported(model)
    if model.functions:
        model, result.changed = inliner.inline_local_functions(model), True
    forget(model)
    result.retyped = to_float32(model)
    if has_control(model):
        model, result.changed = simplified(model, ()), True
        result.left |= straighten(model)
    result.rounds |= _rounds(model)
    for _ in range(_ROUNDS):
        edit = Editor(model)
        if not edit.apply(_RULES):
            break
        result.changed = True
    result.left |= edit.left
    drop_idle_casts(model)
    result.model = model
    return result


def _rounds(model: onnx.ModelProto) -> bool:
    """Tell whether nodes round that are to be replaced."""
    rounding = (DYNAMIC.keys() | QOPERATORS.keys()) - {("", op) for op in MOVES}
    return any((node.domain, node.op_type) in rounding for node in model.graph.node)
