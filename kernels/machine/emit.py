"""Small pieces of LLVM IR that microkernels are put together from."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f32 = ir.FloatType()


class Emitter:
    """Vectors, and memory by its address, through an IR builder."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def word(self, value: int) -> ir.Constant:
        """Return a constant int64."""
        return ir.Constant(i64, value)

    def load(self, address: Any, kind: ir.Type, align: int) -> Any:
        """Load a value from an int64 address."""
        return self.b.load(self.b.inttoptr(address, ir.PointerType(kind)), align=align)

    def store(self, value: Any, address: Any, align: int) -> None:
        """Store a value at an int64 address."""
        self.b.store(value, self.b.inttoptr(address, ir.PointerType(value.type)), align=align)

    def at(self, table: Any, index: int) -> Any:
        """Load a word of a table of int64."""
        return self.load(self.b.add(table, self.word(8 * index)), i64, 8)

    def splat(self, scalar: Any, kind: ir.VectorType) -> Any:
        """Put a scalar into all lanes."""
        undefined = ir.Constant(kind, ir.Undefined)
        vector = self.b.insert_element(undefined, scalar, ir.Constant(i32, 0))
        return self.shuffle(vector, undefined, [0] * kind.count)

    def shuffle(self, first: Any, second: Any, lanes: list[int]) -> Any:
        """Pick lanes of two vectors, those of the second counted on."""
        mask = ir.Constant(ir.VectorType(i32, len(lanes)), lanes)
        return self.b.shuffle_vector(first, second, mask)

    def constant(self, value: Any, kind: ir.VectorType) -> ir.Constant:
        """Return a vector of one constant in all lanes."""
        return ir.Constant(kind, [value] * kind.count)

    def intrinsic(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        """Call an LLVM intrinsic."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(module, kind, name)
        return self.b.call(function, arguments)

    def incoming(self, phi: Any, *sources: tuple[Any, Any]) -> None:
        """Say what a phi node is, by the block that comes before."""
        for block, value in sources:
            phi.add_incoming(value, block)
