"""How much of ONNX converts and runs: the node tests of the package onnx, each through a file.

    python -m benchmarks.conformance
    python -m benchmarks.conformance --operators Conv Resize
    python -m benchmarks.conformance --write docs/operators.md

Every test becomes a packed file, nothing of it quantized, and the session that loads it has to give
the outputs that the test expects. What a network has as constants, such as weights, axes and sizes,
is made one; all other inputs stay inputs. Compiled kernels take pictures, of rank 4: element-wise
operators run a second time on their tensors as such, and some others have an example of ours.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from logshift import converter, runtime
from logshift.converter.imports.branches import CONTROL
from logshift.converter.onnx_model import MIN_OPSET
from logshift.converter.operators.functions import ELEMENTWISE
from logshift.converter.progress import reporting
from logshift.converter.refusals import RANDOM
from logshift.kernels.errors import ConversionError
from logshift.runtime.graph import DTYPES
from logshift.runtime.onnx_ops import compiled, numpy_ops
from logshift.runtime.session import Session

PASSED, NOT_SUPPORTED, FAILED = "passed", "not supported", "failed"

# Tests that expect something else than we mean, and why.
DEPARTURES = {
    "test_resize_downsample_scales_linear_align_corners": (
        "aligns the last corner with position 1.4, because 4 * 0.6 = 2.4, where the result has the"
        " positions 0 and 1; onnxruntime and PyTorch, as we do, align it with 1"
    )
}

# Operators whose inputs but the first are parameters.
_PARAMETERS = frozenset(
    {
        "AffineGrid", "BatchNormalization", "CenterCropPad", "Clip", "Col2Im", "Conv",
        "ConvInteger", "ConvTranspose", "CumSum", "DFT", "DequantizeLinear", "Dropout", "Expand",
        "GRU", "Gemm", "GroupNormalization", "InstanceNormalization", "LSTM", "LayerNormalization",
        "MatMul", "OneHot", "PRelu", "Pad", "QLinearConv", "QuantizeLinear", "RMSNormalization",
        "RNN", "Reshape", "Resize", "STFT", "Slice", "Split", "Squeeze", "Tile", "TopK", "Trilu",
        "Unsqueeze", "Upsample", *(op for op in numpy_ops.OPERATORS if op.startswith("Reduce")),
    }
)  # fmt: skip
# Operators that conversion replaces, and what runs in their place.
_REPLACED = {"Constant": "is a constant", "ConstantOfShape": "NumPy"}

_NUMBERS = {helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in DTYPES}
# What other types are called, by how ONNX's names begin.
_OTHER_TYPES = {
    "BFLOAT16": "bfloat16", "FLOAT4": "4 bits and less", "FLOAT8": "float8",
    "INT2": "4 bits and less", "INT4": "4 bits and less", "STRING": "strings",
    "UINT2": "4 bits and less", "UINT4": "4 bits and less",
}  # fmt: skip

# Attempts to find a test that runs on codes.
_MOST_TRIES = 4


@dataclass(frozen=True)
class Case:
    """A test: a model of one operator, inputs, and the outputs that are expected."""

    name: str
    domain: str
    operator: str
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    rtol: float = 1e-3
    atol: float = 1e-7

    @property
    def is_expanded(self) -> bool:
        """Tell whether the operator has been replaced by simpler ones that make it up."""
        return "_expanded" in self.name

    @property
    def is_claimed(self) -> bool:
        """Tell whether the converter takes the operator."""
        return not self.domain and self.operator in numpy_ops.OPERATORS | set(_REPLACED)


@dataclass(frozen=True)
class Outcome:
    """What became of a test.

    Attributes
    ----------
    verdict : str
        "passed", "not supported" (the converter says so) or "failed".
    reason : str
        Why it did not pass.
    compiled : bool
        Whether it ran in compiled kernels, in part at least.
    """

    verdict: str
    reason: str = ""
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """What the page says of an operator.

    Attributes
    ----------
    operator : str
    on_codes, on_float : bool
        Whether it has compiled kernels.
    otherwise : str
        How it runs where it has none; "" if it is not supported.
    passed, tests : int
    others : dict of reason to number of tests that did not pass
    """

    operator: str
    on_codes: bool
    on_float: bool
    otherwise: str
    passed: int
    tests: int
    others: Mapping[str, int]

    def __str__(self) -> str:
        """Return the table's line."""
        marks = ["yes" if mark else "" for mark in (self.on_codes, self.on_float)]
        how = [*marks, self.otherwise] if self.otherwise else []
        tests = f"{self.passed} of {self.tests}" if self.tests else "there are none"
        others = ", ".join(f"{reason} ({count})" for reason, count in sorted(self.others.items()))
        return f"| {' | '.join([self.operator, *how, tests, others])} |"


# --- the tests ----------------------------------------------------------------------------------


@cache
def cases() -> dict[str, list[Case]]:
    """Return the node tests of the installed package onnx by operator, in alphabetical order.

    An operator's expansion into simpler ones, where ONNX defines one, is a test of that operator.
    """
    from onnx.backend.test.loader import load_model_tests

    np.random.seed(0)  # the tests draw their inputs, when they are imported first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own arithmetic
        found = load_model_tests(kind="node")
    nodes = {test.name: test.model.graph.node[0] for test in found if "_expanded" not in test.name}
    result: dict[str, list[Case]] = defaultdict(list)
    for test in found:
        node = nodes[test.name.split("_expanded")[0]]
        (inputs, outputs), *_ = test.data_sets
        arrays = [_array(x) for x in inputs], [_array(y) for y in outputs]
        result[f"{node.domain}.{node.op_type}".lstrip(".")].append(
            Case(test.name, node.domain, node.op_type, test.model, *arrays, test.rtol, test.atol)
        )
    return {operator: result[operator] for operator in sorted(result)}


def _array(value: Any) -> Any:
    """Return a tensor's values as an array; what is no tensor of numbers as it is."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value) if value.data_type in _NUMBERS else value
    return np.asarray(value) if isinstance(value, np.generic) else value


def foreign_type(case: Case) -> str:
    """Name the type of an input or output that is no tensor of numbers; "" if there is none."""
    for value in (*case.model.graph.input, *case.model.graph.output):
        if not value.type.HasField("tensor_type"):
            return "sequences and optional values"
        number = value.type.tensor_type.elem_type
        if number not in _NUMBERS:
            name = TensorProto.DataType.Name(number)
            return next(text for start, text in _OTHER_TYPES.items() if name.startswith(start))
    return ""


def as_pictures(case: Case) -> Case | None:
    """Return an element-wise test on tensors of rank 4; None if it is not one, or already so."""
    if case.operator not in ELEMENTWISE | {"Sum"} or foreign_type(case):
        return None
    rank = max(x.ndim for x in case.inputs)
    if any(x.dtype != np.float32 for x in case.inputs) or not 0 < rank < 4:
        return None

    def raised(x: np.ndarray) -> np.ndarray:
        return x.reshape((1,) * (4 - rank) + x.shape) if x.ndim == rank else x

    inputs, outputs = [raised(x) for x in case.inputs], [raised(y) for y in case.outputs]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    graph = model.graph
    for infos, arrays in ((graph.input, inputs), (graph.output, outputs)):
        for info, array in zip(infos, arrays, strict=True):
            kind = info.type.tensor_type.elem_type
            info.CopyFrom(helper.make_tensor_value_info(info.name, kind, array.shape))
    return replace(case, model=model, inputs=inputs, outputs=outputs)


def example(operator: str) -> Case | None:
    """Return an example of ours on pictures, for operators whose node tests have none."""
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)
    names, outputs, attributes = ["x"], ["y"], {}
    constants: dict[str, Any] = {}
    match operator:
        case "Concat":
            names, attributes = ["x", "x"], {"axis": 1}
        case "Div":
            constants = {"divisor": np.float32(3)}
        case "PRelu":
            constants = {"slope": np.full((4, 1, 1), 0.25, np.float32)}
        case "Pad":
            constants = {"pads": [0, 0, 1, 1, 0, 0, 1, 1]}
        case "ReduceMean":
            constants = {"axes": [2, 3]}
        case "Slice":
            constants = {"starts": [1, 0], "ends": [4, 5], "axes": [1, 3]}
        case "Split":
            outputs, attributes = ["y", "z"], {"axis": 1, "num_outputs": 2}
        case _:
            return None
    graph = helper.make_graph(
        [helper.make_node(operator, [*names, *constants], outputs, **attributes)], operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    expected = ReferenceEvaluator(model).run(None, {"x": x})
    return Case(operator, "", operator, model, [x], expected)


# --- running them -------------------------------------------------------------------------------


def prepared(case: Case) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return the model with its parameters inside, and its inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    if not case.domain and model.opset_import[0].version < MIN_OPSET:
        model = onnx.version_converter.convert_version(model, MIN_OPSET)
    graph, feed = model.graph, {}
    infos = list(graph.input)
    del graph.input[:]
    for index, (info, x) in enumerate(zip(infos, case.inputs, strict=True)):
        if not isinstance(x, np.ndarray):
            graph.input.append(info)  # for the converter to refuse
        elif x.ndim == 0 or len(x) == 0 or (index and case.operator in _PARAMETERS):
            graph.initializer.append(numpy_helper.from_array(x, info.name))
        else:
            graph.input.append(info)
            feed[info.name] = x
    if not graph.input:
        feed["number"] = _give_input(graph)
    return model, feed


def _give_input(graph: onnx.GraphProto) -> np.ndarray:
    """Give a graph without inputs one: a number of its own as a vector, or one that it copies."""
    scalar = next((t for t in graph.initializer if not t.dims), None)
    if scalar is not None:
        x = numpy_helper.to_array(scalar).reshape(1)
        shape = numpy_helper.from_array(np.array([], np.int64), "no_dimensions")
        graph.node.insert(0, helper.make_node("Reshape", ["number", shape.name], [scalar.name]))
        graph.initializer.remove(scalar)
        graph.initializer.append(shape)
    else:
        x = np.zeros(1, np.float32)
        graph.node.append(helper.make_node("Identity", ["number"], ["copy"]))
        graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, [1]))
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph.input.append(helper.make_tensor_value_info("number", kind, [1]))
    return x


def run(case: Case) -> Outcome:
    """Convert a test, write and load the file, run it and compare."""
    pictures = as_pictures(case)
    try:
        compiled = [_is_compiled(_check(variant)) for variant in (case, pictures) if variant]
    except Exception as error:
        if reason := foreign_type(case):
            return Outcome(NOT_SUPPORTED, reason)
        if isinstance(error, ConversionError):
            reason = _reason(case, str(error))
            return Outcome(NOT_SUPPORTED if reason else FAILED, reason or str(error))
        # Whatever else it is, it is a bug.
        if case.name in DEPARTURES:
            return Outcome(NOT_SUPPORTED, "differs, see below")
        return Outcome(FAILED, f"{type(error).__name__}: {error}")
    return Outcome(PASSED, "", any(compiled))


def _reason(case: Case, message: str) -> str:
    """Say briefly why the converter refuses a test; "" if it should not have."""
    if not case.is_claimed and not case.is_expanded:
        return "no such operator"
    if "training mode" in message:
        return "training"
    refused = {line.split()[1] for line in message.splitlines() if line.startswith("  - ")}
    return " and ".join(f"needs {op}" for op in sorted(refused & {*CONTROL, *RANDOM}))


def _check(case: Case) -> Session:
    """Run a test as float32; raises whatever goes wrong."""
    model, feed = prepared(case)
    session = _converted(model, feed, ["*"])
    found = session.run(feed)
    if not isinstance(found, dict):
        found = {session.outputs[0].name: found}
    for info, expected in zip(case.model.graph.output, case.outputs, strict=True):
        y = found[info.name]
        assert y.dtype == expected.dtype, f"{info.name} is {y.dtype}, not {expected.dtype}"
        assert y.shape == expected.shape, f"{info.name} is {y.shape}, not {expected.shape}"
        np.testing.assert_allclose(y, expected, case.rtol, case.atol, err_msg=info.name)
    return session


def _converted(
    model: onnx.ModelProto, feed: Mapping[str, np.ndarray], keep_float: Sequence[str]
) -> Session:
    finite = {k: np.nan_to_num(x) if x.dtype.kind == "f" else x for k, x in feed.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not finite
        path = Path(folder) / "test.stlq"
        converter.convert(model, path, calibration=[finite], keep_float=keep_float, progress=False)
        return runtime.load(path, threads=1)


def _is_compiled(session: Session) -> bool:
    return any(
        not node.is_onnx and node.op not in ("QuantizeLinear", "DequantizeLinear", "Flatten")
        for node in session.graph.nodes
    )


def _runs_on_codes(tests: Sequence[Case]) -> bool:
    """Tell whether any of the first tests on float32 pictures or vectors runs on codes."""
    firsts = [(test, test.inputs[0]) for test in tests if test.inputs]
    fit = [test for test, x in firsts if x.dtype == np.float32 and x.ndim in (2, 4)]
    for test in fit[:_MOST_TRIES]:
        try:
            if _is_compiled(_converted(*prepared(test), [])):
                return True
        except ConversionError:
            continue  # such as values that are not finite
    return False


def measure(operator: str) -> tuple[Row, dict[str, str]]:
    """Run all tests of an operator; returns its row, and why tests failed, by their names."""
    outcomes = [(test, run(test)) for test in cases().get(operator, [])]
    passed = [test for test, outcome in outcomes if outcome.verdict == PASSED]
    others = Counter(
        outcome.reason if outcome.verdict == NOT_SUPPORTED else FAILED
        for _, outcome in outcomes
        if outcome.verdict != PASSED
    )
    own = [test for test in passed if not test.is_expanded]
    on_float = any(outcome.compiled for test, outcome in outcomes if not test.is_expanded)
    if ours := example(operator):
        own, on_float = [ours], _is_compiled(_check(ours))
    row = Row(
        operator, _runs_on_codes([as_pictures(test) or test for test in own]), on_float,
        _otherwise(operator), len(passed), len(outcomes), others,
    )  # fmt: skip
    return row, {test.name: o.reason for test, o in outcomes if o.verdict == FAILED}


def _otherwise(operator: str) -> str:
    if operator in _REPLACED:
        return _REPLACED[operator]
    if operator not in numpy_ops.OPERATORS:
        return ""
    if operator in compiled.OPERATORS:
        return "kernels or NumPy"
    return "`onnx.reference`, slow" if operator in numpy_ops.SLOW else "NumPy"


# --- the page -----------------------------------------------------------------------------------

_PAGE = """\
# Operators

Which ONNX operators convert and run, and how many of ONNX's own node tests (`onnx.backend.test`
of onnx {version}) they pass. Each test is converted with `keep_float=["*"]`, written to a file,
loaded, run and compared within its own tolerance. Where ONNX defines an operator by simpler ones,
their combination counts as one more test of it. `tests/converter/test_conformance.py` holds this
page to what a run makes of it; it is written by

    python -m benchmarks.conformance --write docs/operators.md

## Supported

*On codes* and *on float32*: there are compiled kernels, for tensors (N, C, H, W) or (N, C) with
constant parameters, in the cases for which [format.md](format.md) has a packed operator. Everything
else runs as the next column says: in NumPy, or, on float32 tensors of any rank whose shapes follow
from the input's, by kernels ([kernels.md](kernels.md)), or through `onnx.reference`, which is slow
and needs the package onnx at run time. Identity, Dropout, Cast, Flatten, Reshape, Squeeze and
Unsqueeze cost nothing where they only give a picture another name. What operators multiply their
data with, or look up for them, is stored as words wherever they run:
[quantization.md](quantization.md), section 2.

| operator | on codes | on float32 | otherwise | node tests passed | not supported |
| --- | --- | --- | --- | --- | --- |
{supported}

## Not supported

The converter names every node that it cannot take. What passes here are the combinations of simpler
operators.

| operator | node tests passed | not supported |
| --- | --- | --- |
{unsupported}

In all, {passed} of {tests} node tests pass.

{departures}
"""


def operators() -> list[str]:
    """Return all operators that the page lists, in its order."""
    return sorted({*cases(), *numpy_ops.OPERATORS, *_REPLACED}, key=lambda op: ("." in op, op))


def page(rows: Sequence[Row]) -> str:
    """Return docs/operators.md."""
    return _PAGE.format(
        version=onnx.__version__,
        supported="\n".join(str(row) for row in rows if row.otherwise),
        unsupported="\n".join(str(row) for row in rows if not row.otherwise),
        passed=sum(row.passed for row in rows),
        tests=sum(row.tests for row in rows),
        departures="\n".join(f"- `{name}` {why}." for name, why in DEPARTURES.items()),
    )


def main() -> None:
    """Print a line for every operator, and what failed; with --write, make the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", help="only these")
    parser.add_argument("--write", type=Path, help="the page to write")
    arguments = parser.parse_args()
    chosen = arguments.operators or operators()
    if arguments.write and arguments.operators:
        parser.error("--write takes all operators")
    rows = []
    with reporting(None) as show:
        for done, operator in enumerate(chosen):
            show(done, len(chosen), operator)
            row, failed = measure(operator)
            rows.append(row)
            print(row, *(f"  {name}: {why}" for name, why in failed.items()), sep="\n", flush=True)
    print(f"{sum(row.passed for row in rows)} of {sum(row.tests for row in rows)} tests passed")
    if arguments.write:
        arguments.write.write_text(page(rows))


if __name__ == "__main__":
    main()
