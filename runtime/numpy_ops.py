"""ONNX operators on arrays, through `onnx.reference` for now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError

DATA_DEPENDENT = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})
SLOW: frozenset[str] = frozenset()


class _Everything:
    def __contains__(self, op: object) -> bool:
        return True


OPERATORS = _Everything()


def compute(
    op: str,
    attributes: Mapping[str, Any],
    opset: int,
    inputs: Sequence[np.ndarray | None],
    outputs: int,
) -> list[np.ndarray]:
    """Run one operator."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, **attributes)
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in given.items()
        ],
        [helper.make_tensor_value_info(n, 0, None) for n in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    try:
        return [np.asarray(y) for y in ReferenceEvaluator(model).run(None, given)]
    except Exception as error:
        raise InputError(f"{op}: {error}") from error
