"""ONNX operators in NumPy, for what a packed network need not quantize.

Semantics are those of the ONNX operator specification at the version that is asked for. A module
here says what it implements as `OPERATORS`; all are found by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation
from logshift.runtime.onnx_ops.numpy_ops.reference import SLOW

__all__ = ["DATA_DEPENDENT", "OPERATORS", "SLOW", "compute"]

_IMPLEMENTATIONS: dict[str, Implementation] = {}

for _module in pkgutil.iter_modules(__path__):
    _found = importlib.import_module(f"{__name__}.{_module.name}")
    _IMPLEMENTATIONS |= getattr(_found, "OPERATORS", {})

OPERATORS = frozenset(_IMPLEMENTATIONS)

# Operators whose results' shapes depend on the values of their inputs.
DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})


def compute(
    op: str,
    attributes: Mapping[str, Any],
    opset: int,
    inputs: Sequence[Array | None],
    outputs: int,
) -> list[Array]:
    """Run one operator.

    Parameters
    ----------
    op : str
        One of `OPERATORS`.
    attributes : mapping of name to number, string or list of those
        ONNX's.
    opset : int
        Version of the default operator set, 7 or newer.
    inputs : list of array
        None for inputs that are not given.
    outputs : int
        How many outputs are wanted.

    Returns
    -------
    list of array
        The outputs; they may be views of the inputs.

    Raises
    ------
    InputError
        If the operator cannot take these inputs, or needs a package that is not installed.
    """
    if op not in OPERATORS:
        raise InputError(f"{op} is no ONNX operator that is supported")
    call = Call(op, attributes, opset, inputs, outputs)
    try:
        with np.errstate(all="ignore"):
            results = _IMPLEMENTATIONS[op](call)
    except (InputError, ModuleNotFoundError) as error:
        raise InputError(str(error)) from None
    except MemoryError:
        raise InputError("not enough memory for its result") from None
    except Exception as error:  # whatever NumPy says of shapes, indices and types
        shapes = ", ".join("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in inputs)
        raise InputError(f"cannot take inputs ({shapes}): {error}") from None
    found = [np.asarray(y) for y in (results if isinstance(results, (list, tuple)) else [results])]
    if len(found) < outputs:
        raise InputError(f"has {len(found)} outputs, {outputs} are asked for")
    return found[:outputs]
