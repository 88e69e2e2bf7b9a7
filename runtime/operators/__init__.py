"""Packed operators: for each its attributes, checks, shape and kernel calls, in one place.

A module here lists what it defines as `OPERATORS`, in the form of `base.Operator`. All are found
by themselves; whatever else has to know of an operator asks `OPERATORS` below.
"""

from __future__ import annotations

import importlib
import pkgutil

from logshift.runtime.operators.base import Operator

OPERATORS: dict[str, Operator] = {}

for _module in pkgutil.iter_modules(__path__):
    _found = importlib.import_module(f"{__name__}.{_module.name}")
    OPERATORS |= {operator.name: operator for operator in getattr(_found, "OPERATORS", ())}
