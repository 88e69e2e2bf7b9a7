"""NEON: registers of 16 bytes, which every aarch64 machine has."""

from __future__ import annotations

import platform

from logshift.kernels.machine.isa.base import InstructionSet


class Neon(InstructionSet):
    """Vectors of float32, and fused multiply-adds of these."""

    @property
    def available(self) -> bool:
        """Whether this is an aarch64 machine."""
        return platform.machine() in ("aarch64", "arm64")


NEON = Neon("neon", 16)
