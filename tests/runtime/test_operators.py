"""Operators, packed and in NumPy, are found by themselves, each in one place."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

import pytest

from logshift.runtime import operators
from logshift.runtime.onnx_ops import compiled, numpy_ops
from logshift.runtime.operators.base import REQUIRED

# What modules of operators are written with.
SHARED = {"base", "call"}


def listed(package):
    """Names that each module of a package lists, by the module's."""
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        own = importlib.import_module(f"{package.__name__}.{module.name}")
        names = getattr(own, "OPERATORS", ())
        found[module.name] = [getattr(name, "name", name) for name in names]
    return found


@pytest.mark.parametrize("package", [operators, numpy_ops])
def test_every_module_lists_operators_and_none_is_listed_twice(package):
    found = listed(package)
    assert {name for name, names in found.items() if not names} == SHARED & set(found)
    counts = Counter(name for names in found.values() for name in names)
    assert set(counts) == set(package.OPERATORS)
    assert set(counts.values()) == {1}


def test_defaults_of_attributes_are_allowed():
    for operator in operators.OPERATORS.values():
        for default, check in operator.attributes.values():
            assert default is REQUIRED or check(default)


def test_what_is_compiled_can_be_done_in_numpy():
    assert set(compiled.OPERATORS) <= numpy_ops.OPERATORS
