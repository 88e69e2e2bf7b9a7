"""What an emitter is told of a node, and the registry of emitters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from logshift.kernels.errors import ConversionError
from logshift.kernels.machine.memory import Block
from logshift.runtime.c_source.source import Source
from logshift.runtime.c_source.tensors import Arena, Tensor
from logshift.runtime.graph import Graph, Node, Quantization, Shape


@dataclass(frozen=True)
class Options:
    """How C is written, see `export_c`."""

    layout: str = "fast"
    multiply: bool = False


@dataclass
class Site:
    """A node where it is written.

    Attributes
    ----------
    name : str
        Of the C function, and what names of its tables begin with.
    inputs : sequence of Tensor
    output : Tensor
    """

    graph: Graph
    node: Node
    index: int
    name: str
    inputs: Sequence[Tensor]
    output: Tensor
    source: Source
    arena: Arena
    options: Options
    shapes: Mapping[str, Shape]

    @property
    def shape(self) -> Shape:
        """Shape of the first input as the graph has it."""
        return self.shapes[self.node.inputs[0]]

    @property
    def title(self) -> str:
        """What the comment on the function says."""
        sizes = " x ".join(map(str, self.output.shape))
        name = self.node.name.replace("*/", "* /").replace("/*", "/ *").replace("\\", "/")
        return (
            f"{self.node.op} {name}: {sizes}".encode("ascii", "replace").decode().replace("??", "?")
        )

    def helper(self, name: str, **values: int) -> None:
        """Have a function of `helpers`; where cores have products, the one with these."""
        self.source.helper(name, **values)

    def scratch(self, nbytes: int) -> Block:
        """Return memory of this step alone."""
        return self.arena.add(nbytes, self.index, self.index)

    def write(self, body: str, arguments: str, *values: Callable[[], str]) -> None:
        """Write the function of this node and its call."""
        self.source.function(
            f"/* {self.title} */\nstatic void {self.name}({arguments})\n{{\n{body}\n}}\n"
        )
        name = self.name
        self.source.call(lambda: f"{name}({', '.join(value() for value in values)});")

    def quantizations(self) -> tuple[Quantization, ...]:
        """Return those of a node whose tensors all hold codes."""
        found = tuple(tensor.quantization for tensor in (*self.inputs, self.output))
        if None in found:
            raise refused(
                self.node, "works on float32", "activation_bits=8 and nothing in keep_float"
            )
        return tuple(q for q in found if q is not None)


def refused(node: Node, why: str, mend: str) -> ConversionError:
    """Return the error for a node that cannot be written."""
    return ConversionError(
        f"node {node.name!r} ({node.op}) cannot be exported as C: it {why}; convert with {mend}"
    )


Emitter = Callable[[Site], None]
# Of packed operators, domain "", and of ONNX's.
EMITTERS: dict[tuple[str, str], Emitter] = {}


def emits(*ops: str, domain: str = "") -> Callable[[Emitter], Emitter]:
    """Register what writes an operator."""

    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update({(domain, op): emitter for op in ops})
        return emitter

    return register
