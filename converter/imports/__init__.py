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
from logshift.converter.imports.sizes import InputShapes, give_sizes
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
    sized : onnx.ModelProto, optional
        The model as it was given, but of the sizes that were asked for, if any were.
    """

    model: onnx.ModelProto
    left: dict[str, str] = field(default_factory=dict)
    changed: bool = False
    rounds: bool = False
    retyped: bool = False
    sized: onnx.ModelProto | None = None


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


def brought_in(model: onnx.ModelProto, input_shapes: InputShapes | None = None) -> Imported:
    """Return a checked model in plain form, and what is left of other forms.

    Parameters
    ----------
    model : onnx.ModelProto
        May be changed.
    input_shapes : mapping of input name to sizes, optional
        See `convert`.

    Raises
    ------
    ConversionError
        If an operator looks at the bits of a number whose type changes, or the model cannot have
        the sizes that are asked for.
    InputError
        If `input_shapes` does not fit its inputs.
    """
    result = Imported(model)
    if model.functions:
        model, result.changed = inliner.inline_local_functions(model), True
    forget(model)
    result.retyped = to_float32(model)
    if input_shapes:
        result.changed |= give_sizes(model, input_shapes)
        result.sized = onnx.ModelProto()
        result.sized.CopyFrom(model)
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
