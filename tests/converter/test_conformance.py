"""ONNX's node tests do what docs/operators.md says of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the tests convert models")

import onnx  # noqa: E402

from benchmarks import conformance  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs/operators.md").read_text(encoding="utf-8")
# The lines of its tables, by operator.
PUBLISHED = {
    line.split(" | ")[0].removeprefix("| "): line
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| operator ", "| --- "))
}
MANY = {"Attention"}  # tests, of many nodes each

pytestmark = pytest.mark.skipif(
    f"onnx {onnx.__version__})" not in " ".join(PAGE.split()),
    reason=f"docs/operators.md is not of onnx {onnx.__version__}",
)


@pytest.mark.parametrize(
    "operator", [pytest.param(op, marks=[pytest.mark.slow] * (op in MANY)) for op in PUBLISHED]
)
def test_node_tests_of(operator):
    row, failed = conformance.measure(operator)
    assert not failed
    assert str(row) == PUBLISHED[operator]


def test_page_is_complete():
    assert sorted(PUBLISHED) == sorted(conformance.operators())
    counts = [(int(p), int(n)) for p, n in re.findall(r"\| (\d+) of (\d+) \|", PAGE)]
    passed, tests = map(sum, zip(*counts, strict=True))
    assert f"In all, {passed} of {tests} node tests pass." in PAGE
    assert tests == sum(len(cases) for cases in conformance.cases().values())


def test_failures_are_told():
    case = conformance.cases()["Abs"][0]
    wrong = replace(case, outputs=[case.outputs[0] + 1])
    outcome = conformance.run(wrong)
    assert outcome.verdict == conformance.FAILED and "Not equal to tolerance" in outcome.reason
