"""The packed operators, a module for each group: from ONNX nodes to them, and back to ONNX.

Every module of this package is imported with it, so what a module registers cannot be forgotten.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
