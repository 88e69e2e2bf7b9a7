"""What a plan does in which order: operations, the layouts of their tensors, changes of layout.

Packed operators keep float32 tensors channels last, ONNX operators and the caller see ONNX's
layout; where a tensor is needed in both, one more operation converts it. Lookups that a
convolution does as well are no operations, nor is what only gives a tensor another name or shape,
nor a Slice that only Concats read: they read what it is of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logshift.runtime.graph import Graph, Node
from logshift.runtime.onnx_ops.shapes import OF_SHAPE
from logshift.runtime.operators import OPERATORS
from logshift.runtime.operators.conv import constants
from logshift.runtime.operators.lookup import has_one_table
from logshift.runtime.operators.moves import between
from logshift.runtime.plan.convolution import Convolution
from logshift.runtime.plan.layout import layout


@dataclass(frozen=True)
class NumpyStep:
    """An ONNX operator that no kernel computes, between two programs."""

    node: Node
    last_of: list[str]  # tensors that no later step reads


@dataclass(frozen=True)
class Operation:
    """A node, or a change of a float32 tensor's layout for it; `writes` are stored tensors."""

    index: int
    node: Node
    kind: str  # "packed", "onnx", "numpy", "to_channels_first", "to_channels_last"
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def channels_last(name: str) -> str:
    """Return the name under which a float32 tensor is stored as (N, H, W, C)."""
    return f"{name} (channels last)"


class Schedule:
    """What is to be done, in order, and by which names tensors are stored.

    Parameters
    ----------
    graph : Graph, validated
    convolutions : dict of node's position to list of Convolution
    known : names of tensors whose values are known before a run
    pixels : names of float32 outputs of convolutions that are of one pixel
    views : positions of ONNX operators that cost nothing
    compiled : (position, names read, names written) of those that kernels compute
    turned : (position, tensor) of Transposes that give the bytes of a tensor stored channels last
    keep_all : bool
        Nothing is fused, and every tensor keeps its bytes to the end.

    Attributes
    ----------
    lookups : dict of tensor name to Node
        Lookups that convolutions do as well, by the outputs of these.
    slices : dict of tensor name to Node
        Slices that nobody does, by their outputs: whoever reads these reads what they are of.
    parts : dict of tensor name to Node
        Codes that are written where a Concat would bring them, and that Concat.
    tables : dict of tensor name to uint8 array (256,)
        What codes of convolutions go through at the end, by the outputs of these.
    native, outside : set of tensor names
        Float32 tensors that are stored channels last, and those that a run allocates.
    viewed : set of names of tensors whose bytes others are as well
    unshared : set of names of outputs that are the only ones of what a run allocates
    operations : list of Operation
    last_use : dict of tensor name to position of the last operation that reads or writes it
    numpy_steps : dict of operation's position to NumpyStep
    renamed : list of (name stored under, name)
    templates : dict of Convolution to the values of its argument record that no size changes
    """

    def __init__(
        self,
        graph: Graph,
        convolutions: Mapping[int, Sequence[Convolution]],
        known: frozenset[str],
        pixels: frozenset[str],
        views: frozenset[int],
        compiled: frozenset[tuple[int, tuple[str, ...], tuple[str, ...]]],
        turned: frozenset[tuple[int, str]],
        keep_all: bool,
    ) -> None:
        self.graph, self.convolutions = graph, convolutions
        self._alias = {
            node.outputs[0]: node.inputs[0] for node in graph.nodes if _only_renames(node)
        }
        self._views = {self.graph.nodes[i].outputs[0]: self.graph.nodes[i].inputs[0] for i in views}
        self._views |= {self.graph.nodes[i].outputs[0]: channels_last(x) for i, x in turned}
        self.viewed = {self.origin(name) for name in self._views}
        self._compiled = {index: (reads, writes) for index, reads, writes in compiled}
        self.keep_all = keep_all
        self._read_by = self._readers()
        self.lookups = {} if keep_all else self._fused_lookups()
        self.slices = {} if keep_all else self._read_in_place()
        self.tables = {
            out: node.table for out, node in self.lookups.items() if node.table is not None
        }
        self.parts = {} if keep_all else self._written_in_place()
        self.native, self.outside = set[str](), set[str]()
        self.operations = self._operations(known, pixels)
        origins = Counter(self.origin(info.name) for info in self.graph.outputs)
        self.unshared = {
            info.name
            for info in self.graph.outputs
            if (origin := self.origin(info.name)) in self.outside and origins[origin] == 1
        }
        end = len(self.operations)
        self.last_use = {
            self.held(name): end if keep_all else index
            for index, operation in enumerate(self.operations)
            for name in (*operation.reads, *operation.writes)
        }
        self.renamed = [
            (name, name.removesuffix(channels_last("")))
            for name in self.last_use
            if name.endswith(channels_last(""))
        ]
        self.numpy_steps = self._numpy_steps()
        self.readers = [
            (graph.nodes[index], self.stored(graph.nodes[index].inputs[0]), found)
            for index, found in sorted(convolutions.items())
        ]
        self.templates = self._templates()

    def root(self, name: str) -> str:
        """Name of the tensor that a flattened one is made of."""
        while name in self._alias:
            name = self._alias[name]
        return name

    def origin(self, name: str) -> str:
        """Name of the tensor in ONNX's layout whose bytes a tensor's are."""
        while (root := self.root(name)) in self._views:
            name = self._views[root]
        return root

    def stored(self, name: str) -> str:
        """Name under which packed operators other than QuantizeLinear find a tensor."""
        name = self.root(name)
        return name if self.graph.is_code(name) else channels_last(name)

    def read(self, node: Node) -> tuple[str, ...]:
        """Names of the tensors that a packed operator's kernels read, in whatever layout."""
        of = self.origin if OPERATORS[node.op].reads_onnx else self.stored
        return tuple(map(of, node.inputs))

    def held(self, name: str) -> str:
        """Name of the stored tensor whose memory another one's is."""
        while True:
            if name in self.parts:
                name = self.parts[name].outputs[0]
            elif name in self.slices:
                name = self.stored(self.slices[name].inputs[0])
            else:
                return name

    def written(self, node: Node) -> str:
        """Name of the tensor that a node's kernels write, in whatever layout."""
        out = node.outputs[0]
        return self.lookups[out].outputs[0] if out in self.lookups else out

    def _templates(self) -> dict[Convolution, list[Any]]:
        templates = {}
        for index, convolutions in self.convolutions.items():
            node = self.graph.nodes[index]
            table = self.tables.get(node.outputs[0])
            for conv in convolutions:
                fields = constants(self.graph, node, conv, table)
                templates[conv] = layout(conv.kernel).filled(fields)
        return templates

    def _numpy_steps(self) -> dict[int, NumpyStep]:
        reads = {name: i for i, operation in enumerate(self.operations) for name in operation.reads}
        kept = {self.origin(info.name) for info in self.graph.outputs}
        steps = {}
        for i, operation in enumerate(self.operations):
            if operation.kind == "numpy":
                names = {*operation.reads, *operation.writes} - kept
                last = [n for n in names if reads.get(n, i) <= i and not self.keep_all]
                steps[i] = NumpyStep(operation.node, last)
        return steps

    def _needed(self, values: frozenset[str]) -> list[tuple[int, Node]]:
        """List the nodes to be run, with their positions, in order."""
        fused = {node.outputs[0] for node in self.lookups.values()}
        needed = {self.root(info.name) for info in self.graph.outputs}
        nodes: list[tuple[int, Node]] = []
        for index, node in reversed(list(enumerate(self.graph.nodes))):
            written = {name for name in node.outputs if name not in values}
            wanted = self.keep_all or not needed.isdisjoint(written)
            if _only_renames(node):
                if wanted:
                    needed.add(self.root(node.inputs[0]))
            elif node.outputs[0] in fused or node.outputs[0] in self.slices:
                if node.outputs[0] in needed:
                    needed.add(node.inputs[0])
            elif written and wanted:
                shape_only = node.is_onnx and node.op in OF_SHAPE
                inputs = () if shape_only else self._inputs(index, node)
                needed.update(self.root(name) for name in inputs)
                nodes.append((index, node))
        return nodes[::-1]

    def _operations(self, values: frozenset[str], pixels: frozenset[str]) -> list[Operation]:
        """List what is to be done, with changes of layout; sets `native` and `outside`."""
        graph, nodes = self.graph, self._needed(values)
        # Float32 tensors that somebody reads channels last, or as ONNX has them.
        channels_first = {self.origin(info.name) for info in graph.outputs}
        outside = set(channels_first)
        for index, node in nodes:
            names = {self.origin(name) for name in self._inputs(index, node)}
            if node.outputs[0] in self._views:
                continue
            if node.is_onnx:
                channels_first |= names
                if not self._is_native(index, node):
                    outside |= names
            elif OPERATORS[node.op].reads_onnx:
                channels_first |= names
            else:
                names = {self.root(name) for name in node.inputs}
                self.native |= {name for name in names if not graph.is_code(name)}
        channels_first |= {self.origin(name) for name in self.native.intersection(self._views)}
        given = {info.name for info in graph.inputs}
        operations: list[Operation] = []

        def convert(index: int, node: Node, name: str, kind: str) -> None:
            x, y = self.origin(name), channels_last(name)
            if kind == "to_channels_first":
                x, y = y, x
            operations.append(Operation(index, node, kind, (x,), (y,)))

        for name in sorted((given | values) & self.native):
            index, node = next((i, n) for i, n in nodes if name in map(self.root, n.inputs))
            convert(index, node, name, "to_channels_last")
        for index, node in nodes:
            if node.is_onnx:
                origins = [self.origin(name) for name in self._inputs(index, node)]
                reads = tuple(name for name in origins if name not in values)
                writes = self._outputs(index, node)
                if not self._is_native(index, node):
                    operations.append(Operation(index, node, "numpy", reads, writes))
                elif index in self._compiled:
                    operations.append(Operation(index, node, "onnx", reads, writes))
                    self.outside |= outside.intersection(writes)
                for name in writes:
                    if name in self.native:
                        convert(index, node, name, "to_channels_last")
                continue
            operator, out, reads = OPERATORS[node.op], self.written(node), self.read(node)
            if graph.is_code(out):
                operations.append(Operation(index, node, "packed", reads, (out,)))
                continue
            if out in channels_first and out in outside and out not in given:
                self.outside.add(out)
            # What is of one pixel lies alike in both layouts.
            if operator.writes_onnx or (out in pixels and out not in self.native):
                operations.append(Operation(index, node, "packed", reads, (out,)))
                if out in self.native:
                    convert(index, node, out, "to_channels_last")
                continue
            operations.append(Operation(index, node, "packed", reads, (channels_last(out),)))
            self.native.add(out)
            self.outside |= outside & {channels_last(out)}
            if out in channels_first:
                convert(index, node, out, "to_channels_first")
        return operations

    def _inputs(self, index: int, node: Node) -> tuple[str, ...]:
        """Names of what is read to compute a node."""
        if index in self._compiled:
            return self._compiled[index][0]
        return tuple(filter(None, node.inputs))

    def _outputs(self, index: int, node: Node) -> tuple[str, ...]:
        """Names of what is written when a node is computed."""
        if index in self._compiled:
            return self._compiled[index][1]
        return tuple(filter(None, node.outputs))

    def _is_native(self, index: int, node: Node) -> bool:
        """Whether an ONNX operator needs no NumPy."""
        return index in self._compiled or node.outputs[0] in self._views

    def _readers(self) -> dict[str, list[Node]]:
        """Nodes by what they read, as often as they do."""
        readers: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return readers

    def _fused_lookups(self) -> dict[str, Node]:
        """Lookups that the convolutions whose outputs they read do as well, by those outputs."""
        return {
            out: self._read_by[out][0]
            for index in self.convolutions
            if self._look_up(index)
            and (out := self.graph.nodes[index].outputs[0]) in self.graph.quantization
            and [has_one_table(reader) for reader in self._read_by.get(out, [])] == [True]
        }

    def _look_up(self, index: int) -> bool:
        """Whether codes of a node's convolutions can go through a table at the end."""
        return all(conv.kernel.looks_up for conv in self.convolutions[index])

    def _read_in_place(self) -> dict[str, Node]:
        """Slices of codes of which only Concats are made, by their outputs."""
        return {
            out: node
            for node in self.graph.nodes
            if node.op == "Slice"
            and self.graph.is_code(out := node.outputs[0])
            and all(reader.op == "Concat" for reader in self._read_by.get(out, []))
        }

    def _written_in_place(self) -> dict[str, Node]:
        """Names of codes that nobody reads but one Concat of channels, with that one.

        Codes of another quantization are there if convolutions bring them to the Concat's, after
        what they look up anyway. Adds these to `tables`.
        """
        quantization, parts = self.graph.quantization, dict[str, Node]()
        for index, node in enumerate(self.graph.nodes):
            out = self.written(node)
            readers = self._read_by.get(out, [])
            if node.is_onnx or not OPERATORS[node.op].writes_parts or out not in quantization:
                continue
            if [(r.op, r.attributes.get("axis")) for r in readers] != [("Concat", 1)]:
                continue
            if any(conv.phase.pixels > 1 for conv in self.convolutions.get(index, ())):
                continue
            table = between(quantization[out], quantization[readers[0].outputs[0]])
            if table is not None:
                if index not in self.convolutions or not self._look_up(index):
                    continue
                first = self.tables.get(node.outputs[0])
                self.tables[node.outputs[0]] = table if first is None else table[first]
            parts[out] = readers[0]
        return parts


def _only_renames(node: Node) -> bool:
    """Whether a node's output is its input under another name."""
    return not node.is_onnx and OPERATORS[node.op].renames
