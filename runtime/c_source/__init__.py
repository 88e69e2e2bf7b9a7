"""Packed networks as C for microcontrollers: `export_c(packed, directory)`."""

from logshift.runtime.c_source.export import Exported, export_c

__all__ = ["Exported", "export_c"]
