"""The registry finds every module of a family, and kernels of an operation are told the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.assembly import needs_x86, printed_for

from logshift import kernels as package
from logshift.kernels import registry
from logshift.kernels.records import OUTPUT, record

ROOT = Path(package.__path__[0])
FAMILIES = {family for chain in registry.FAMILIES.values() for family in chain}


def test_all_modules_of_families_are_imported():
    assert {k.family for k in registry.kernels()} == FAMILIES
    for family in FAMILIES:
        for path in (ROOT / family).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert f"logshift.kernels.{name.removesuffix('.__init__')}" in sys.modules


def test_packages_are_families_or_serve_all_of_them():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"machine", "stlq"} == FAMILIES


def test_kernels_of_an_operation_have_one_record():
    of_op = {}
    for kernel in registry.kernels():
        assert of_op.setdefault(kernel.op, kernel.record) == kernel.record
        assert any(k.op == kernel.op and k.family == "reference" for k in registry.kernels())


def test_another_record_is_refused():
    list(registry.kernels())
    other = record(**OUTPUT, value=np.int64)
    with pytest.raises(ValueError, match="arguments of fill"):
        registry.register("fill", "portable", other, "other")
    assert all(k.variant != "other" for k in registry.kernels())


@needs_x86
@pytest.mark.parametrize(
    ("cpu", "family"), [("x86-64", "shift"), ("nehalem", "dot"), ("haswell", "dot")]
)
def test_products_of_bytes_are_taken_where_there_are_any(cpu, family):
    script = "from logshift.kernels import registry; print(registry.families('auto')[0])"
    assert printed_for(cpu, script, "").split() == [family]


@pytest.mark.parametrize("op", sorted({k.op for k in registry.kernels()}))
def test_code_can_be_kept_for_other_processes(op):
    for k in registry.kernels():
        if k.op == op and k.available():
            compiled = registry._compiled(k.function, k.record)
            assert not compiled._library.has_dynamic_globals, k.name
