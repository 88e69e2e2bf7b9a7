"""Products of matrices and of tensors."""

from __future__ import annotations

import numpy as np

from logshift.kernels.errors import InputError
from logshift.runtime.onnx_ops.numpy_ops.call import Array, Call, Implementation, limited


def _matmul(a: Array, b: Array) -> Array:
    rows, columns = a.shape[:-1][-1:], b.shape[1:][-1:]
    limited([*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns])
    return np.matmul(a, b)


def _gemm(c: Call) -> Array:
    a = c.x.T if c.get("transA", 0) else c.x
    b = c.input(1).T if c.get("transB", 0) else c.input(1)
    if a.ndim != 2 or b.ndim != 2:
        raise InputError("multiplies matrices")
    y, kind = _matmul(a, b), c.x.dtype.type
    if c.get("alpha", 1.0) != 1.0:
        y *= kind(c.get("alpha"))
    bias = c.optional(2)
    if bias is not None:
        y += bias if c.get("beta", 1.0) == 1.0 else kind(c.get("beta")) * bias
    return y


def _einsum(c: Call) -> Array:
    arrays, equation = c.all(), c.get("equation", "").replace(" ", "")
    terms, _, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, x in zip(terms.split(","), arrays, strict=True):
        # The axes that "..." stands for count from the last.
        letters = term.replace("...", "")
        start = term.find("...")
        more = [f"...{i}" for i in range(x.ndim - len(letters), 0, -1)] if start >= 0 else []
        names = [*letters[:start], *more, *letters[start:]] if more else [*letters]
        for name, size in zip(names, x.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    wanted = result if "->" in equation else "".join({i for i in terms if terms.count(i) == 1})
    limited([size for name, size in sizes.items() if name in wanted or name.startswith("...")])
    return np.einsum(equation, *arrays)


OPERATORS: dict[str, Implementation] = {
    "Einsum": _einsum, "Gemm": _gemm, "MatMul": lambda c: _matmul(c.x, c.input(1)),
}  # fmt: skip
