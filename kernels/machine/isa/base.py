"""What an instruction set is to those who emit IR: a size of registers, and what has no common IR.

Whatever LLVM has an instruction of its own for, such as additions, shuffles of known lanes and
fused multiply-adds, is emitted as that. An instruction set has a file beside this one with what it
has of the rest; rows of the tables of microkernels name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from llvmlite import ir

from logshift.kernels.machine.emit import Emitter, f32, i8, i16, i32
from logshift.kernels.machine.targets import has_features


@dataclass(frozen=True)
class InstructionSet:
    """Registers, and the instructions that work on them.

    Attributes
    ----------
    name : str
        As kernels are named after it.
    vector : int
        Bytes of a register.
    features : tuple of str
        LLVM's names of the instructions that are used, but for those that every machine has.
    by_lane : bool
        Whether a product takes one lane of a register of codes with all of one of weights; else
        codes are broadcast first.
    taken : int
        What is taken from codes before they are multiplied, for the products' sake.
    saturates : bool
        Whether `nearest` yields the largest int32 for what is above it.
    addresses : int
        Of pixels, that general registers have room for.
    """

    by_lane: ClassVar[bool] = False
    taken: ClassVar[int] = 0
    saturates: ClassVar[bool] = False
    addresses: ClassVar[int] = 6

    name: str
    vector: int
    features: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether the machine that code is compiled for has the instructions."""
        return has_features(self.features)

    @property
    def lanes(self) -> int:
        """Lanes of 32 bits in a register."""
        return self.vector // 4

    @property
    def bytes(self) -> ir.VectorType:
        """A register of codes or weights."""
        return ir.VectorType(i8, self.vector)

    @property
    def int16s(self) -> ir.VectorType:
        """A register of int16."""
        return ir.VectorType(i16, self.vector // 2)

    @property
    def int32s(self) -> ir.VectorType:
        """A register of int32."""
        return ir.VectorType(i32, self.lanes)

    @property
    def floats(self) -> ir.VectorType:
        """A register of float32."""
        return ir.VectorType(f32, self.lanes)

    def byte_pairs(self, e: Emitter, x: Any, w: Any) -> Any:
        """Sum neighbouring products of uint8 and int8 into int16, saturated."""
        raise NotImplementedError

    def word_pairs(self, e: Emitter, x: Any, w: Any) -> Any:
        """Sum neighbouring products of int16 into int32."""
        raise NotImplementedError

    def byte_dot(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add four neighbouring products of uint8 and int8 to each int32."""
        raise NotImplementedError

    def byte_matrices(self, e: Emitter, acc: Any, x: Any, w: Any) -> Any:
        """Add the products of two rows of eight uint8 and two of int8 to four int32."""
        raise NotImplementedError

    def interleaved(self, e: Emitter, first: Any, second: Any, half: int) -> Any:
        """Interleave bytes of two registers: of each 16 the lower half, or the upper one."""
        raise NotImplementedError

    def nearest(self, e: Emitter, v: Any) -> Any:
        """Round float32 half to even, to int32; to the least one beyond the range of these."""
        raise NotImplementedError

    def packed(
        self, e: Emitter, words: list[Any], between: Callable[[Any], Any] | None = None
    ) -> Any:
        """Join four registers of int32, in their order, to one of uint8, saturated.

        `between`, if given, is done to each of two registers of int16, saturated, on the way.
        """
        raise NotImplementedError

    def looked_up(self, e: Emitter, entries: Any, index: Any) -> Any:
        """Look up uint8 in sixteen entries, which every 16 bytes of a register repeat.

        What counts of an index are its low four bits; if the highest one is set, 0 is found.
        """
        raise NotImplementedError

    def sixteen(self, e: Emitter, address: Any) -> Callable[[Any], Any]:
        """Return what looks int16 up in sixteen entries at an address, by int16 below 16."""
        raise NotImplementedError

    def rounded_product(self, e: Emitter, x: Any, w: Any) -> Any:
        """Multiply int16 as (x * w + 2^14) >> 15."""
        raise NotImplementedError


ANY = InstructionSet("any", 16)  # vectors alone: LLVM makes them of what a machine has
