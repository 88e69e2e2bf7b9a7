"""From a packed graph and input shapes to programs: buffers, argument records, kernels.

Tensors of packed operators lie as (N, H, W, C) inside a border of their zero point, as wide as the
paddings of the convolutions that read them need: padding then costs nothing and no kernel tests for
edges. ONNX operators and the caller see ONNX's layout; where a float32 tensor is needed in both,
one more step converts it. ONNX operators are steps like others where they have kernels, see
`plain`; else they run in NumPy between two programs.

All tensors of packed operators share one arena, planned by when they are in use. A border whose
bytes other tensors use as well is written anew at every run. For small tensors that would take too
long; they keep their bytes, which go only to tensors of the same geometry and zero point, and their
borders are written once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from struct import Struct
from typing import Any

import numpy as np

from logshift.kernels import records
from logshift.kernels.errors import InputError
from logshift.kernels.functions import UNARY_FUNCTIONS
from logshift.kernels.layer import FloatLayer, Layer, Packed
from logshift.kernels.machine.memory import ALIGNMENT, Block, aligned, arena, arrange
from logshift.kernels.registry import Kernel, kernel
from logshift.runtime.executor import Team, spread
from logshift.runtime.graph import Graph, Inference, Node, Shape, slice_range
from logshift.runtime.onnx_ops import compiled, numpy_ops

_RESIZE_ONE = 2048  # weights of linear resizing of codes are integers of this

# A thread more is worth it for this much work: some microseconds, several times what a meeting at
# the barrier takes. In multiplications of a convolution; an element of other kernels takes as long
# as so many of them.
_SHARE = 2**18
_ELEMENT = 16
_DEPTHWISE = 4  # as long as so many others takes one of a depthwise convolution
_PARTS = 16  # of a thread's share that others may take over

# Bytes of a part of a row that is computed at once where a tensor is repeated along it: long enough
# for the loops, short enough for the first-level cache.
_REPEATED = 2**12

_SMALL = 2**16  # bytes of a tensor below which its border is written once


@dataclass(frozen=True, eq=False)
class Convolution:
    """What a Conv, or one phase of a ConvTranspose, needs at every run, whatever the input size.

    A phase computes the output rows `phase[0] + i * strides[0]` from input rows that begin at
    `i + shift[0]` (columns alike); a plain Conv is its own only phase.
    """

    kernel: Kernel
    layer: Layer | FloatLayer
    packed: Packed
    dilations: tuple[int, int]
    phase: tuple[int, int] = (0, 0)
    shift: tuple[int, int] = (0, 0)

    @cached_property
    def work(self) -> int:
        """Multiplications per output, or what takes as long."""
        products = math.prod(self.layer.weights.shape[1:])
        return products * (_DEPTHWISE if self.layer.is_depthwise else 1)


def prepare(graph: Graph, family: str, threads: int = 1) -> dict[int, list[Convolution]]:
    """Choose kernels and lay out weights for all convolutions; keyed by the node's position.

    `threads` nodes are worked on at once. The largest go first, so that what they need on the way
    never adds to what others have left.
    """
    sizes = {
        index: math.prod(node.weight_shape)
        for index, node in enumerate(graph.nodes)
        if node.weight_shape is not None
    }
    shapes = graph.nominal_shapes()
    order = sorted(sizes, key=sizes.__getitem__, reverse=True)
    prepared = spread(
        lambda index: list(_prepare_node(graph, graph.nodes[index], family, shapes)), order, threads
    )
    return dict(zip(order, prepared, strict=True))


def _prepare_node(
    graph: Graph, node: Node, family: str, shapes: dict[str, Shape]
) -> Iterator[Convolution]:
    a, shape = node.attributes, node.weight_shape
    assert shape is not None
    layer_of = _coded_layer(graph, node) if graph.on_codes(node) else _float_layer(node)
    pixels = shapes[node.outputs[0]][0] * math.prod(shapes[node.outputs[0]][2:])
    if node.op == "ConvTranspose":
        pixels //= math.prod(a["strides"])

    def convolution(
        taps: Any, strides: tuple[int, int], dilations: tuple[int, int], **phase: Any
    ) -> Convolution:
        layer = layer_of(
            taps, group=a["group"], strides=strides, dilations=dilations, pixels=pixels
        )
        chosen = kernel("conv" if graph.on_codes(node) else "float_conv", family, layer)
        assert chosen.pack is not None
        packed = chosen.pack(layer)
        # A layer keeps what it has computed; a new one holds nothing that only packing needs.
        return Convolution(chosen, replace(layer), packed, dilations, **phase)

    if node.op == "Conv":
        yield convolution(..., tuple(a["strides"]), tuple(a["dilations"]))
        return
    rows, columns = (
        list(_phases(shape[1 + i], a["strides"][i], a["dilations"][i], a["pads"][i]))
        for i in (0, 1)
    )
    for p, (taps_h, shift_h, dilation_h) in enumerate(rows):
        for q, (taps_w, shift_w, dilation_w) in enumerate(columns):
            grid = np.ix_(range(shape[0]), taps_h, taps_w, range(shape[3]))
            yield convolution(
                grid, (1, 1), (dilation_h, dilation_w), phase=(p, q), shift=(shift_h, shift_w)
            )


def _coded_layer(graph: Graph, node: Node) -> Callable[..., Layer]:
    """Return what makes a layer of some of the weights of a convolution of codes."""
    weights, bias = node.weights, node.bias
    assert weights is not None and bias is not None
    q_x = graph.quantization[node.inputs[0]]
    q_y = graph.quantization.get(node.outputs[0])
    scale_y, z_y = (q_y.scale, q_y.zero_point) if q_y else (1.0, 0)
    # docs/quantization.md section 4; float64 until the last step
    m = (q_x.scale * weights.unit() / scale_y).astype(np.float32)
    b = (bias.astype(np.float64) / scale_y + z_y).astype(np.float32)
    # Of a ConvTranspose all words are needed once for every phase.
    words = cache(weights.words)

    def layer(taps: Any, **geometry: Any) -> Layer:
        part = weights
        if taps is not ...:
            part = replace(words(), first=words().first[taps], second=words().second[taps])
        return Layer(part, activation_bits=q_x.bits, z_x=q_x.zero_point, m=m, b=b, **geometry)

    return layer


def _float_layer(node: Node) -> Callable[..., FloatLayer]:
    """Return what makes a layer of some of the weights of a convolution of float32."""
    bias, weights = node.bias, node.float_weights
    if node.weights is not None:
        weights = node.weights.values()
    assert bias is not None and weights is not None
    return lambda taps, **geometry: FloatLayer(
        np.ascontiguousarray(weights[taps], np.float32), bias=bias, **geometry
    )


def _phases(
    kernel_size: int, stride: int, dilation: int, pad: int
) -> Iterator[tuple[list[int], int, int]]:
    """Split one axis of a ConvTranspose into ordinary convolutions, one per output phase.

    Output position `stride * i + p` receives input position `i + (p + pad - k * dilation) / stride`
    through every tap k for which that is an integer. Yields, per phase p: the taps in the order of
    ascending input positions, the first of those positions relative to i, and their distance.
    """
    for p in range(stride):
        taps = [k for k in range(kernel_size) if (p + pad - k * dilation) % stride == 0][::-1]
        shift = (p + pad - taps[0] * dilation) // stride if taps else 0
        yield taps, shift, dilation // math.gcd(stride, dilation)


@dataclass(slots=True)
class Step:
    """One kernel call of a program; `values` are those of its argument record, see `_Layout`."""

    node: Node
    kernel: Kernel
    layout: _Layout
    values: list[Any]
    homes: int  # threads that it is worth
    parts: int  # into which each one's share of it may be cut
    place: int = 0  # of the argument record in the plan's


@dataclass(frozen=True)
class NumpyStep:
    """An ONNX operator that no kernel computes, between two programs."""

    node: Node
    last_of: list[str]  # tensors that no later step reads


class _Place(tuple):
    """Values of an `records.TENSOR`, for hooks that look a size up by its name."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_TENSOR_FIELDS[key])


_TENSOR_FIELDS = {name: index for index, name in enumerate(records.TENSOR.names or ())}
_NOTHING: Mapping[str, Any] = {}


class _Layout:
    """Where the fields of an argument record are in a flat list of values, and in bytes.

    A record's fields are packed. Those of a tensor follow each other in the order of
    `records.TENSOR`.
    """

    def __init__(self, record: np.dtype) -> None:
        self.index: dict[str, int] = {}
        self.word: dict[str, int] = {}  # of the addresses of tensors
        codes = "="
        assert record.names is not None and record.fields is not None
        for name in record.names:
            dtype, offset = record.fields[name][:2]
            self.index[name] = len(codes) - 1
            if dtype == records.TENSOR:
                self.word[name] = offset // 8
            parts = [dtype[part] for part in dtype.names] if dtype.names else [dtype]
            codes += "".join(_CODES[part] for part in parts)
        self.struct = Struct(codes)
        assert self.struct.size == record.itemsize
        self.empty = [0] * (len(codes) - 1)
        self.stride = -(-self.struct.size // ALIGNMENT) * ALIGNMENT


_CODES = {np.dtype(np.uintp): "Q", np.dtype(np.int64): "q", np.dtype(np.float32): "f"}


@cache
def _layout(record: np.dtype) -> _Layout:
    return _Layout(record)


@dataclass(frozen=True)
class _Operation:
    """A node, or a change of a float32 tensor's layout for it; `writes` are stored tensors."""

    index: int
    node: Node
    kind: str  # "packed", "plain", "numpy", "to_channels_first", "to_channels_last"
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def _nchw(shape: Shape) -> Shape:
    """(N, C, H, W) of a tensor; all is N in one that packed operators cannot have."""
    return (*shape, 1, 1)[:4] if 2 <= len(shape) <= 4 else (math.prod(shape), 1, 1, 1)


def _channels_last(name: str) -> str:
    """Name under which a float32 tensor is stored as (N, H, W, C)."""
    return f"{name} (channels last)"


@dataclass(frozen=True)
class _Geometry:
    """Size of a tensor's buffer, and where in it the picture lies."""

    shape: Shape  # (N, H, W, C), border included
    dtype: np.dtype
    size: tuple[int, int]  # of the picture
    top: int = 0
    left: int = 0
    zero_point: int = 0

    @property
    def bordered(self) -> bool:
        return self.shape[1:3] != self.size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lives, and the values of its `records.TENSOR`."""

    geometry: _Geometry
    offset: int  # in the arena
    values: tuple[int, ...]

    @property
    def top(self) -> int:
        return self.geometry.top

    @property
    def left(self) -> int:
        return self.geometry.left


class Planner:
    """Plans of one network for any input shapes; keeps what does not depend on these.

    Parameters
    ----------
    graph : Graph, validated
    convolutions : see `prepare`
    family : str
    threads : int
        Largest number of threads that will run a plan.
    """

    def __init__(
        self, graph: Graph, convolutions: dict[int, list[Convolution]], family: str, threads: int
    ) -> None:
        self.graph, self.convolutions, self.threads = graph, convolutions, threads
        self._family = family
        self._kernels: dict[str, Kernel] = {}
        self._seen: dict[int, np.dtype | None] = {}  # see `Graph.infer`
        self._outlines: dict[tuple, _Outline] = {}
        self._heads = [
            (node.outputs[0], index)
            for index, node in enumerate(graph.nodes)
            if node.weight_shape is not None and not graph.is_code(node.outputs[0])
        ]

    def plan(self, shapes: Mapping[str, Shape], keep_all: bool = False) -> Plan:
        """Return a plan for input shapes; with `keep_all` it keeps all tensors, for `tensor`.

        Raises
        ------
        InputError
            If the inputs do not fit the graph, or memory does not suffice.
        """
        found = self.graph.infer(shapes, self._seen)
        try:
            calls = compiled.calls(self.graph, found)
            return Plan(self, self._outline(found, calls, keep_all), found, calls)
        except MemoryError:
            raise InputError(
                "not enough memory for this input size; use a smaller batch or picture"
            ) from None

    def kernel(self, op: str) -> Kernel:
        """Return the kernel for an operation that is no convolution."""
        if op not in self._kernels:
            self._kernels[op] = kernel(op, self._family)
        return self._kernels[op]

    def _outline(
        self, found: Inference, calls: dict[int, tuple[compiled.Call, ...]], keep_all: bool
    ) -> _Outline:
        """Return the outline for shapes; they decide about little of it, mostly about nothing."""
        pixels = frozenset(
            name for name, _ in self._heads if math.prod(found.shapes[name][2:]) == 1
        )
        views = frozenset(index for index, made in calls.items() if not made)
        key = frozenset(found.values), pixels, views, frozenset(calls) - views, keep_all
        if key not in self._outlines:
            self._outlines[key] = _Outline(self, *key)
        return self._outlines[key]


class _Outline:
    """What is to be done, in order, and by which names tensors are stored.

    Parameters
    ----------
    planner : Planner
    known : names of tensors whose values are known before a run
    pixels : names of float32 outputs of convolutions that are of one pixel
    views, compiled : positions of ONNX operators that cost nothing, and that kernels compute
    keep_all : bool

    Attributes
    ----------
    lookups : dict of tensor name to Node
        Lookups that convolutions do as well, by the outputs of these.
    native, outside : set of tensor names
        Float32 tensors that are stored channels last, and those that a run allocates.
    viewed : set of names of tensors whose bytes others are as well
    unshared : set of names of outputs that are the only ones of what a run allocates
    operations : list of _Operation
    last_use : dict of tensor name to position of the last operation that reads or writes it
    numpy_steps : dict of operation's position to NumpyStep
    renamed : list of (name stored under, name)
    templates : dict of Convolution to the values of its argument record that no size changes
    """

    def __init__(
        self,
        planner: Planner,
        known: frozenset[str],
        pixels: frozenset[str],
        views: frozenset[int],
        compiled: frozenset[int],
        keep_all: bool,
    ) -> None:
        self.graph, self._convolutions = planner.graph, planner.convolutions
        self._alias = {
            node.outputs[0]: node.inputs[0]
            for node in self.graph.nodes
            if node.op == "Flatten" and not node.is_onnx
        }
        self._views = {self.graph.nodes[i].outputs[0]: self.graph.nodes[i].inputs[0] for i in views}
        self.viewed = {self.origin(name) for name in self._views}
        self._compiled = compiled
        self.keep_all = keep_all
        self.templates: dict[Convolution, list[Any]] = {}
        self.lookups = {} if keep_all else self._fused_lookups()
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
            name: end if keep_all else index
            for index, operation in enumerate(self.operations)
            for name in (*operation.reads, *operation.writes)
        }
        self.renamed = [
            (name, name.removesuffix(_channels_last("")))
            for name in self.last_use
            if name.endswith(_channels_last(""))
        ]
        self.numpy_steps = self._numpy_steps()
        self.readers = [
            (node, self.stored(node.inputs[0]), planner.convolutions[index])
            for index, node in enumerate(self.graph.nodes)
            if index in planner.convolutions
        ]

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
        return name if self.graph.is_code(name) else _channels_last(name)

    def written(self, node: Node) -> str:
        """Name of the tensor that a node's kernels write, in whatever layout."""
        out = node.outputs[0]
        return self.lookups[out].outputs[0] if out in self.lookups else out

    def target(self, node: Node) -> str:
        """Name under which a packed node's kernels write."""
        out = self.written(node)
        return _channels_last(out) if out in self.native else out

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

    def _operations(self, values: frozenset[str], pixels: frozenset[str]) -> list[_Operation]:
        """List what is to be done, with changes of layout; sets `native` and `outside`."""
        graph, keep_all = self.graph, self.keep_all
        fused = {node.outputs[0] for node in self.lookups.values()}
        needed = {self.root(info.name) for info in graph.outputs}
        nodes: list[tuple[int, Node]] = []
        for index, node in reversed(list(enumerate(graph.nodes))):
            written = {name for name in node.outputs if name not in values}
            flat = node.op == "Flatten" and not node.is_onnx
            wanted = keep_all or not needed.isdisjoint(written)
            if written and wanted and not flat and node.outputs[0] not in fused:
                shape_only = node.is_onnx and node.op in ("Shape", "Size")
                needed.update(self.root(n) for n in node.inputs if n and not shape_only)
                nodes.append((index, node))
            elif flat and wanted:
                needed.add(self.root(node.inputs[0]))
            elif node.outputs[0] in fused and node.outputs[0] in needed:
                needed.add(node.inputs[0])
        nodes.reverse()
        # Float32 tensors that somebody reads channels last, or as ONNX has them.
        channels_first = {self.origin(info.name) for info in graph.outputs}
        outside = set(channels_first)
        for index, node in nodes:
            names = {self.origin(name) for name in node.inputs if name}
            if node.is_onnx:
                channels_first |= names
                if not self._is_native(index, node):
                    outside |= names
            elif node.op == "QuantizeLinear":
                channels_first |= names
            else:
                names = {self.root(name) for name in node.inputs}
                self.native |= {name for name in names if not graph.is_code(name)}
        given = {info.name for info in graph.inputs}
        operations: list[_Operation] = []

        def convert(index: int, node: Node, name: str, kind: str) -> None:
            x, y = self.origin(name), _channels_last(name)
            if kind == "to_channels_first":
                x, y = y, x
            operations.append(_Operation(index, node, kind, (x,), (y,)))

        for name in sorted((given | values) & self.native):
            index, node = next((i, n) for i, n in nodes if name in map(self.root, n.inputs))
            convert(index, node, name, "to_channels_last")
        for index, node in nodes:
            if node.is_onnx:
                origins = [self.origin(name) for name in node.inputs if name]
                reads = tuple(name for name in origins if name not in values)
                writes = tuple(name for name in node.outputs if name)
                if not self._is_native(index, node):
                    operations.append(_Operation(index, node, "numpy", reads, writes))
                elif index in self._compiled:
                    operations.append(_Operation(index, node, "plain", reads, writes))
                    self.outside |= outside.intersection(writes)
                for name in writes:
                    if name in self.native:
                        convert(index, node, name, "to_channels_last")
                continue
            if node.op == "QuantizeLinear":
                reads = tuple(map(self.origin, node.inputs))
            else:
                reads = tuple(map(self.stored, node.inputs))
            out = self.written(node)
            if graph.is_code(out):
                operations.append(_Operation(index, node, "packed", reads, (out,)))
                continue
            if out in channels_first and out in outside and out not in given:
                self.outside.add(out)
            as_plain = out in pixels and out not in self.native
            if node.op == "DequantizeLinear" or as_plain:
                operations.append(_Operation(index, node, "packed", reads, (out,)))
                if out in self.native:
                    convert(index, node, out, "to_channels_last")
                continue
            operations.append(_Operation(index, node, "packed", reads, (_channels_last(out),)))
            self.native.add(out)
            if out in channels_first:
                convert(index, node, out, "to_channels_first")
        return operations

    def _is_native(self, index: int, node: Node) -> bool:
        """Whether an ONNX operator needs no NumPy."""
        return index in self._compiled or node.outputs[0] in self._views

    def _fused_lookups(self) -> dict[str, Node]:
        """Lookups that the convolutions whose outputs they read do as well, by those outputs."""
        readers: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return {
            out: readers[out][0]
            for index, convolutions in self._convolutions.items()
            if (out := self.graph.nodes[index].outputs[0]) in self.graph.quantization
            and [_has_one_table(reader) for reader in readers.get(out, [])] == [True]
            and all(conv.kernel.looks_up for conv in convolutions)
        }


class Plan:
    """Programs with their buffers, for one set of input shapes; serves one run at a time.

    Made by `Planner.plan`.

    Attributes
    ----------
    steps : list of Step
    program : int64 array (steps, 4), see `executor`
    parts : list of slice of the program, or NumpyStep between two of them
    held_bytes : int
        Bytes of all that it keeps for itself.
    """

    def __init__(
        self,
        planner: Planner,
        outline: _Outline,
        found: Inference,
        calls: Mapping[int, tuple[compiled.Call, ...]],
    ) -> None:
        self.graph, self.shapes, self.steps = planner.graph, dict(found.shapes), list[Step]()
        # Parts of the program, and what runs between them.
        self.parts: list[slice | NumpyStep] = []
        self._planner, self._outline, self._found = planner, outline, found
        self._calls = calls
        self._tensors: dict[str, _Tensor] = {}
        self._rewritten: set[str] = set()  # tensors whose borders are written at every run
        self._scratch: list[tuple[list[Any], _Layout, int]] = []  # values, bytes per thread
        self._keep: list[np.ndarray] = []  # arrays whose addresses argument records hold
        # Words of argument records: addresses of float tensors that are set anew at every run.
        self._bindings: dict[str, list[tuple[Step, int]]] = {}
        self._build()

    # --- running ---------------------------------------------------------------------------------

    def run(self, team: Team, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the network.

        Parameters
        ----------
        team : Team
        inputs : dict of name to array
            Contiguous, of the graph's types and the plan's shapes.

        Returns
        -------
        dict of tensor name to array
            In ONNX's layout: the graph's outputs, and what else exists outside of the arena.

        Raises
        ------
        InputError
            If an ONNX operator cannot take the values that it gets.
        """
        arrays = self.bind(inputs)
        for part in self.parts:
            if isinstance(part, NumpyStep):
                self.run_in_numpy(part, arrays)
            else:
                team.run(self.program[part])
        own = {name: self._value(name, arrays) for name in self._outline.unshared}
        if len(own) < len(self.graph.outputs):
            others = [*inputs.values(), *self._found.values.values(), *own.values()]
            for info in self.graph.outputs:
                if info.name not in own:
                    own[info.name] = self._own(self._value(info.name, arrays), others)
                    others.append(own[info.name])
        return arrays | own

    def bind(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Point the program at input arrays and at new arrays for what it writes, all returned."""
        arrays = dict(inputs)
        for name in self._outline.outside:
            arrays[name] = np.empty(self.shapes[name], np.float32)
        for name in self._bound:
            if name in arrays:
                self._point(name, arrays[name])
        return arrays

    def _point(self, name: str, array: np.ndarray) -> None:
        self._words[self._bound[name]] = array.ctypes.data

    def run_in_numpy(self, step: NumpyStep, arrays: dict[str, np.ndarray]) -> None:
        """Run an ONNX operator; its results go into `arrays`."""
        node = step.node
        values = [self._value(name, arrays) if name else None for name in node.inputs]
        try:
            results = numpy_ops.compute(
                node.op, node.attributes, self.graph.opset, values, len(node.outputs)
            )
        except InputError as error:
            raise InputError(f"node {node.name!r} ({node.op}): {error}") from None
        for name, y in zip(node.outputs, results, strict=True):
            if name in self._bound or name in self._outline.viewed:
                # Programs trust the plan: types and shapes were inferred from zeros.
                if y.shape != self.shapes[name] or y.dtype != self._found.dtypes[name]:
                    raise InputError(
                        f"node {node.name!r} ({node.op}): its output {name!r} is {y.dtype}"
                        f" {y.shape} for these inputs, {self._found.dtypes[name]}"
                        f" {self.shapes[name]} was expected"
                    )
                y = np.asarray(y, order="C")
                if name in self._bound:
                    self._point(name, y)
            arrays[name] = y
        for name in step.last_of:
            arrays.pop(name, None)

    def _value(self, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Array of a tensor outside of the arena, in ONNX's layout."""
        origin = self._outline.origin(name)
        values = self._found.values
        array = values[origin] if origin in values else arrays[origin]
        # Shapes of ONNX operators' results need not be known, but then there is no alias either.
        return array if origin == name else array.reshape(self.shapes[name])

    @staticmethod
    def _own(y: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        """Return an array, or a copy if its memory is not its own or that of others too."""
        if not y.flags.owndata and y.base is not None and not y.base.flags.owndata:
            return y.copy()
        if any(np.may_share_memory(y, x) for x in others):
            return y.copy()
        return np.asarray(y, order="C")

    def tensor(self, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """Return a tensor in ONNX's layout after a run of a plan that keeps all; codes stay codes.

        Parameters
        ----------
        name : str
        arrays : what `run` returned

        Returns
        -------
        array, or None if it was not computed
        """
        root, origin = self._outline.root(name), self._outline.origin(name)
        if origin in arrays or origin in self._found.values:
            return self._value(name, arrays)
        if origin in self._tensors and not self.graph.is_code(origin):
            return self._array(self._tensors[origin]).copy().reshape(self.shapes[name])
        stored = self._outline.stored(name)
        if stored not in self._tensors:
            return None
        held, (_, _, h, w) = self._tensors[stored], _nchw(self.shapes[root])
        picture = self._array(held)[:, held.top : held.top + h, held.left : held.left + w]
        return np.array(picture.transpose(0, 3, 1, 2), order="C").reshape(self.shapes[name])

    def _array(self, held: _Tensor) -> np.ndarray:
        geometry = held.geometry
        place = self._arena[held.offset : held.offset + geometry.nbytes]
        return place.view(geometry.dtype).reshape(geometry.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor buffers."""
        return self._arena.nbytes

    # --- building --------------------------------------------------------------------------------

    def _build(self) -> None:
        outline = self._outline
        for stored, name in outline.renamed:
            if name in self.shapes:
                self.shapes[stored] = self.shapes[name]
        self._place()
        begin = 0
        for i, operation in enumerate(outline.operations):
            node = operation.node
            if operation.kind == "numpy":
                if begin < len(self.steps):
                    self.parts.append(slice(begin, begin := len(self.steps)))
                self.parts.append(outline.numpy_steps[i])
                continue
            if operation.kind == "packed":
                _BUILDERS[node.op](self, operation.index, node)
            elif operation.kind == "plain":
                for call in self._calls[operation.index]:
                    self._step(
                        node, call.op, tensors=call.tensors, work=call.work, **call.fields,
                    )  # fmt: skip
            else:
                (x,), (y,) = operation.reads, operation.writes
                self._step(node, operation.kind, tensors={"x": x, "y": y}, **self._sizes(y))
            for name in operation.writes:
                if name in self._rewritten:
                    self._write_border(node, name)
        if begin < len(self.steps):
            self.parts.append(slice(begin, len(self.steps)))
        self._finish()

    def _finish(self) -> None:
        """Lay out scratch memory, argument records and the program."""
        size = max((size for *_, size in self._scratch), default=0)
        self._scratch_space = aligned((size * self._planner.threads,), np.uint8)
        address = self._scratch_space.ctypes.data
        for values, layout, size in self._scratch:
            values[layout.index["scratch"]] = address
            values[layout.index["scratch_size"]] = size
        end = 0
        for step in self.steps:
            step.place = end
            end += step.layout.stride
        self._arguments = aligned((end,), np.uint8)
        self._words = self._arguments.view(np.uintp)
        begin, buffer = self._arguments.ctypes.data, self._arguments.data
        program = []
        for step in self.steps:
            step.layout.struct.pack_into(buffer, step.place, *step.values)
            address = begin + step.place
            program.append((step.kernel.address, address, step.homes, step.parts))
        self.program = np.array(program, np.int64).reshape(len(program), 4)
        self._bound = {
            name: np.array([step.place // 8 + word for step, word in places])
            for name, places in self._bindings.items()
        }
        self._bound_constants = {
            name: np.asarray(self._found.values[name], order="C")
            for name in self._bound
            if name in self._found.values
        }
        for name, array in self._bound_constants.items():
            self._point(name, array)
        own = (self._arena, self._scratch_space, self._arguments, *self._keep)
        self.held_bytes = sum(array.nbytes for array in own)

    def _borders(self) -> dict[str, tuple[int, int, int, int]]:
        """Border (top, left, bottom, right) that the readers of each stored tensor need."""
        borders: dict[str, tuple[int, int, int, int]] = {}
        for node, x, convolutions in self._outline.readers:
            if x not in self.shapes:  # nobody computes it
                continue
            size = self.shapes[x][2:]
            for conv in convolutions:
                needed = [0, 0, 0, 0]
                shape = conv.layer.weights.shape
                for axis in (0, 1):
                    first, stride, count = self._window(node, conv, axis)
                    if count > 0 and 0 not in shape:
                        extent = conv.dilations[axis] * (shape[1 + axis] - 1)
                        last = first + (count - 1) * stride + extent
                        needed[axis] = max(0, -first)
                        needed[2 + axis] = max(0, last - size[axis] + 1)
                old = borders.get(x, (0, 0, 0, 0))
                top, left, bottom, right = map(max, old, needed)
                borders[x] = (top, left, bottom, right)
        return borders

    def _window(self, node: Node, conv: Convolution, axis: int) -> tuple[int, int, int]:
        """First input row, stride over the input, and number of output rows of one axis."""
        a = node.attributes
        size = self.shapes[node.outputs[0]][2 + axis]
        if node.op == "Conv":
            return -a["pads"][axis], a["strides"][axis], size
        step = a["strides"][axis]
        return conv.shift[axis], 1, -(-(size - conv.phase[axis]) // step)

    def _place(self) -> None:
        """Give every tensor that only programs read its part of the arena."""
        outline, borders = self._outline, self._borders()
        end = len(outline.operations)
        blocks: list[Block] = []
        tensors: dict[str, tuple[Block, _Geometry]] = {}
        # Blocks of small tensors, each with the step until which it is in use.
        kept: dict[_Geometry, list[list[Any]]] = {}
        for index, operation in enumerate(outline.operations):
            for name in operation.writes if operation.kind != "numpy" else ():
                if name in outline.outside:
                    continue
                geometry = self._geometry(name, borders.get(name, (0, 0, 0, 0)))
                last, nbytes = outline.last_use[name], geometry.nbytes
                small = geometry.bordered and nbytes < _SMALL
                users = kept.setdefault(geometry, []) if small else []
                user = next((user for user in users if user[1] < index), None)
                if user is None:
                    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
                    user = [Block(size, 0, end) if small else Block(size, index, last), last]
                    users.append(user)
                    blocks.append(user[0])
                user[1] = last
                tensors[name] = user[0], geometry
        self._arena = arena(arrange(blocks))
        begin = self._arena.ctypes.data
        for name, (block, geometry) in tensors.items():
            values = (begin + block.offset, *geometry.shape, geometry.top, geometry.left)
            self._tensors[name] = _Tensor(geometry, block.offset, values)
            if geometry.bordered:
                if block.shared:
                    self._rewritten.add(name)
                else:
                    self._array(self._tensors[name]).fill(geometry.zero_point)

    def _geometry(self, name: str, border: tuple[int, int, int, int]) -> _Geometry:
        n, c, h, w = _nchw(self.shapes[name])
        top, left, bottom, right = border
        q = self.graph.quantization.get(name)
        return _Geometry(
            (n, h + top + bottom, w + left + right, c), np.dtype(np.uint8 if q else np.float32),
            (h, w), top, left, q.zero_point if q else 0,
        )  # fmt: skip

    def _write_border(self, node: Node, name: str) -> None:
        held = self._tensors[name]
        n, rows, columns, c = held.geometry.shape
        h, w = held.geometry.size
        bottom, right = held.top + h, held.left + w
        for top, left, height, width in (
            (0, 0, held.top, columns),
            (bottom, 0, rows - bottom, columns),
            (held.top, 0, h, held.left),
            (held.top, right, h, columns - right),
        ):
            if height and width:
                q = self.graph.quantization.get(name)
                self._step(
                    node, "fill" if q else "float_fill",
                    tensors={"y": name}, moved={"y": (top - held.top, left - held.left)},
                    n=n, height=height, width=width, channels=c,
                    value=q.zero_point if q else 0,
                )  # fmt: skip

    def _step(
        self,
        node: Node,
        op: str,
        *,
        conv: Convolution | None = None,
        tensors: dict[str, str],
        moved: Mapping[str, tuple[int, int]] = _NOTHING,
        template: list[Any] | None = None,
        work: int = _ELEMENT,
        **fields: Any,
    ) -> None:
        """Append a kernel call; `tensors` maps record fields to tensor names.

        `work` is that of one element of the output, in multiplications of a convolution. The
        pictures of tensors in `moved` begin so many rows and columns further. `fields` are values
        of the argument record, arrays stand for their addresses; `template` has the others.
        """
        chosen = self._planner.kernel(op) if conv is None else conv.kernel
        layout = _layout(chosen.record)
        index = layout.index
        values = (template or layout.empty).copy()
        total = work * fields["n"] * fields["height"] * fields["width"] * fields["channels"]
        homes = max(1, min(total // _SHARE, self._planner.threads))
        parts = max(1, min(total // homes // (2 * _SHARE), _PARTS))  # each claim takes its time
        step = Step(node, chosen, layout, values, homes, parts)
        places = {}
        for key, name in tensors.items():
            origin = self._outline.origin(name)
            held = self._tensors.get(origin)
            if held is None:
                n, c, h, w = _nchw(self.shapes[origin])
                tensor: tuple[int, ...] = (0, n, h, w, c, 0, 0)
                self._bindings.setdefault(origin, []).append((step, layout.word[key]))
            else:
                tensor = held.values
            if key in moved:
                top, left = moved[key]
                tensor = (*tensor[:5], tensor[5] + top, tensor[6] + left)
            begin = index[key]
            values[begin : begin + len(tensor)] = tensor
            places[key] = _Place(tensor)
        if conv is not None or chosen.scratch is not None:
            known = {**fields, **places}
            if conv is not None:
                fields |= conv.packed.sized(known)
            if chosen.pieces is not None:
                step.parts = max(1, min(parts, chosen.pieces(known) // homes))
            if chosen.scratch is not None:
                size = -(-int(chosen.scratch(known)) // ALIGNMENT) * ALIGNMENT
                self._scratch.append((values, layout, size))
        for key, value in fields.items():
            if isinstance(value, np.ndarray):
                self._keep.append(value)
                value = value.ctypes.data
            values[index[key]] = value
        self.steps.append(step)

    def _sizes(self, name: str) -> dict[str, Any]:
        n, c, h, w = _nchw(self.shapes[name])
        return {"n": n, "height": h, "width": w, "channels": c}

    def _range(self, node: Node) -> dict[str, Any]:
        """`lo` and `hi` of the node's clamp: codes for a code output, else real values."""
        lo, hi = node.attributes.get("clamp", (None, None))
        q = self.graph.quantization.get(node.outputs[0])
        low, high = (0, q.top) if q else (-math.inf, math.inf)
        return {"lo": low if lo is None else lo, "hi": high if hi is None else hi}

    def _conv(self, index: int, node: Node) -> None:
        # Kernels write channels last; one more step brings floats into ONNX's order.
        tensors = {"x": self._outline.stored(node.inputs[0]), "y": self._outline.target(node)}
        if len(node.inputs) > 1:
            tensors["r"] = self._outline.stored(node.inputs[1])
        n, c, _, _ = self.shapes[node.outputs[0]]
        x = self._tensors[tensors["x"]]
        for conv in self._planner.convolutions[index]:
            row, _, height = self._window(node, conv, 0)
            column, _, width = self._window(node, conv, 1)
            if height <= 0 or width <= 0:
                continue
            # A phase writes into the picture from its own first row and column on.
            moved = {"y": conv.phase, "r": conv.phase} if conv.phase != (0, 0) else _NOTHING
            self._step(
                node, conv.kernel.op,
                conv=conv, tensors=tensors, work=conv.work, moved=moved,
                template=self._conv_template(node, conv),
                n=n, height=height, width=width, channels=c,
                row0=x.top + row, column0=x.left + column,
                dilation_h=conv.dilations[0], dilation_w=conv.dilations[1],
                kernel_h=conv.layer.weights.shape[1], kernel_w=conv.layer.weights.shape[2],
            )  # fmt: skip

    def _conv_template(self, node: Node, conv: Convolution) -> list[Any]:
        """Return the argument record of a convolution, as far as no size changes it."""
        template = self._outline.templates.get(conv)
        if template is not None:
            return template
        out, quantization = node.outputs[0], self.graph.quantization
        transposed = node.op == "ConvTranspose"
        strides = node.attributes["strides"]
        stride, step = ((1, 1), strides) if transposed else (strides, (1, 1))
        residual = len(node.inputs) > 1
        constants = conv.packed.constants | self._range(node) | {
            "stride_h": stride[0], "stride_w": stride[1],
            "step_h": step[0], "step_w": step[1],
            "group": conv.layer.group, "has_residual": residual,
        }  # fmt: skip
        if self.graph.on_codes(node):
            assert node.weights is not None
            constants |= {
                "bits": node.weights.bits, "residual_shift": node.weights.residual_shift,
                "float_output": not self.graph.is_code(out),
            }  # fmt: skip
            if residual:
                q_y, q_r = quantization.get(out), quantization[node.inputs[1]]
                scale_y = q_y.scale if q_y else 1.0
                constants |= {"z_r": q_r.zero_point, "m_r": np.float32(q_r.scale / scale_y)}
            if out in self._outline.lookups:
                table = self._outline.lookups[out].table
                assert table is not None
                constants["table"] = table.ctypes.data
        layout = _layout(conv.kernel.record)
        template = layout.empty.copy()
        for key, value in constants.items():
            template[layout.index[key]] = value
        self._outline.templates[conv] = template
        return template

    def _pool(self, index: int, node: Node) -> None:
        a = node.attributes
        x, out = self._outline.stored(node.inputs[0]), self._outline.target(node)
        _, _, h, w = self.shapes[x]
        everything = node.op in ("GlobalAveragePool", "GlobalMaxPool")
        size = [h, w] if everything else a["kernel_shape"]
        strides, dilations, pads = (
            ([1, 1], [1, 1], [0, 0, 0, 0])
            if everything
            else (a["strides"], a["dilations"], a["pads"])
        )
        if size[0] * size[1] >= 2**23:
            raise InputError(f"node {node.name!r}: a window of {size} is too large")
        held = self._tensors[x]
        average: dict[str, Any] = {}
        largest = node.op in ("MaxPool", "GlobalMaxPool")
        on_codes = self.graph.is_code(x)
        if not largest:
            padded = pads if not everything and a["count_include_pad"] else [0, 0, 0, 0]
            average = {
                "count_low_h": held.top - padded[0], "count_high_h": held.top + h + padded[2],
                "count_low_w": held.left - padded[1], "count_high_w": held.left + w + padded[3],
            }  # fmt: skip
        if not on_codes:
            average |= self._range(node)
        elif not largest:
            q_x, q_y = self.graph.quantization[x], self.graph.quantization[out]
            counts = np.arange(size[0] * size[1] + 1, dtype=np.float64)
            counts[0] = 1  # a window with nothing in it has a sum of 0 to divide
            average |= {
                "z_x": q_x.zero_point, "b": q_y.zero_point,
                "m": (q_x.scale / (counts * q_y.scale)).astype(np.float32),
                **self._range(node),
            }  # fmt: skip
        self._step(
            node, self._op(node, "pool_max" if largest else "pool_average"),
            tensors={"x": x, "y": out}, work=_ELEMENT * size[0] * size[1], **self._sizes(out),
            kernel_h=size[0], kernel_w=size[1], stride_h=strides[0], stride_w=strides[1],
            dilation_h=dilations[0], dilation_w=dilations[1],
            row0=held.top - pads[0], column0=held.left - pads[1],
            low_h=held.top, high_h=held.top + h, low_w=held.left, high_w=held.left + w,
            **average,
        )  # fmt: skip

    def _op(self, node: Node, name: str) -> str:
        """Return the kernel operation `name` on what a node works on."""
        return name if self.graph.on_codes(node) else f"float_{name}"

    def _binary(self, index: int, node: Node) -> None:
        if not self.graph.on_codes(node):
            self._float_binary(node)
            return
        x, r = node.inputs
        out = node.outputs[0]
        q_x, q_r, q_y = (self.graph.quantization[name] for name in (x, r, out))
        if node.op == "Mul":
            factors = {"m": np.float32(q_x.scale * q_r.scale / q_y.scale)}
        else:
            m_r = np.float32(q_r.scale / q_y.scale)
            m_r = -m_r if node.op == "Sub" else m_r
            factors = {"m": np.float32(q_x.scale / q_y.scale), "m_r": m_r}
        _, c, _, w = self.shapes[out]
        parts = -(-w * c // _REPEATED)
        self._step(
            node, "multiply" if node.op == "Mul" else "add",
            tensors={"x": x, "r": r, "y": out}, **self._sizes(out),
            x_height=self.shapes[x][2], x_width=self.shapes[x][3],
            r_height=self.shapes[r][2], r_width=self.shapes[r][3],
            z_x=q_x.zero_point, z_r=q_r.zero_point, b=q_y.zero_point, **factors,
            **self._range(node), pixels=-(-w // parts),
        )  # fmt: skip

    def _float_binary(self, node: Node) -> None:
        y = self._outline.target(node)
        tensors: dict[str, str] = {"y": y}
        steps: dict[str, Any] = {}
        for key, name in zip("xr", node.inputs, strict=True):
            tensors[key] = self._outline.stored(name)
            for axis, size, whole in zip("nchw", self.shapes[name], self.shapes[y], strict=True):
                steps[f"{key}_step_{axis}"] = size == whole
        self._step(
            node, f"float_{node.op.lower()}", tensors=tensors,
            **self._sizes(y), **steps, **self._range(node),
        )  # fmt: skip

    def _unary(self, index: int, node: Node) -> None:
        a, y = node.attributes, self._outline.target(node)
        alpha, beta = a.get("alpha", 0.0), a.get("beta", 0.0)
        if node.op == "Clip":
            alpha, beta = self._range(node).values()
        elif node.op == "HardSwish":
            alpha, beta = np.float32(1 / 6), 0.5
        self._step(
            node, "float_unary",
            tensors={"x": self._outline.stored(node.inputs[0]), "y": y}, **self._sizes(y),
            function=[*UNARY_FUNCTIONS].index(_UNARY[node.op]), alpha=alpha, beta=beta,
        )  # fmt: skip

    def _copy(
        self,
        node: Node,
        x: str,
        *,
        at: tuple[int, int, int] = (0, 0, 0),
        start: tuple[int, int, int] = (0, 0, 0),
        step: tuple[int, int, int] = (1, 1, 1),
        sizes: dict[str, Any] | None = None,
        table: np.ndarray | None = None,
    ) -> None:
        """Copy from x to the output; `at`, `start` and `step` are (channel, row, column)."""
        x, y = self._outline.stored(x), self._outline.target(node)
        source, target = self._tensors[x], self._tensors[y]
        self._step(
            node, self._op(node, "copy"), tensors={"x": x, "y": y},
            **(sizes or self._sizes(x)),
            channel0_x=start[0], row0=source.top + start[1], column0=source.left + start[2],
            stride_c=step[0], stride_h=step[1], stride_w=step[2],
            channel0_y=at[0], row0_y=target.top + at[1], column0_y=target.left + at[2],
            table=0 if table is None else table, has_table=table is not None,
        )  # fmt: skip

    def _lookup(self, index: int, node: Node) -> None:
        assert node.table is not None
        if node.table.ndim == 1:
            self._copy(node, node.inputs[0], table=node.table)
            return
        self._step(
            node, "lookup_channels",
            tensors={"x": node.inputs[0], "y": node.outputs[0]}, **self._sizes(node.outputs[0]),
            tables=np.ascontiguousarray(node.table),
        )  # fmt: skip

    def _gather(self, index: int, node: Node) -> None:
        indices = np.array(node.attributes["indices"], np.int32)
        self._step(
            node, "gather",
            tensors={"x": node.inputs[0], "y": node.outputs[0]}, **self._sizes(node.outputs[0]),
            indices=indices, interleaved=bool((indices[2:] == indices[:-2] + 1).all()),
        )  # fmt: skip

    def _concat(self, index: int, node: Node) -> None:
        q_y = self.graph.quantization.get(node.outputs[0])
        axis, position = node.attributes["axis"], 0
        for name in node.inputs:
            q_x = self.graph.quantization.get(name)
            table = None
            if (
                q_x
                and q_y
                and (q_x.scale, q_x.zero_point, q_x.bits) != (q_y.scale, q_y.zero_point, q_y.bits)
            ):
                t = (np.arange(256) - q_x.zero_point).astype(np.float32)
                v = t * np.float32(q_x.scale / q_y.scale) + np.float32(q_y.zero_point)
                table = np.clip(np.rint(v), 0, q_y.top).astype(np.uint8)
            channel, row, column = (position if axis == a else 0 for a in (1, 2, 3))
            self._copy(node, name, at=(channel, row, column), table=table)
            position += self.shapes[name][axis]

    def _slice(self, index: int, node: Node) -> None:
        a = node.attributes
        start, step = [0, 0, 0], [1, 1, 1]
        for axis, first, end, stride in zip(
            a["axes"], a["starts"], a["ends"], a["steps"], strict=True
        ):
            chosen = slice_range(self.shapes[node.inputs[0]][axis], first, end, stride)
            start[axis - 1], step[axis - 1] = chosen.start, chosen.step
        self._copy(
            node, node.inputs[0], start=(start[0], start[1], start[2]),
            step=(step[0], step[1], step[2]), sizes=self._sizes(node.outputs[0]),
        )  # fmt: skip

    def _pad(self, index: int, node: Node) -> None:
        out, pads = self._outline.target(node), node.attributes["pads"]
        q = self.graph.quantization.get(out)
        self._step(
            node, self._op(node, "fill"),
            tensors={"y": out}, **self._sizes(out), value=q.zero_point if q else 0,
        )  # fmt: skip
        self._copy(node, node.inputs[0], at=(pads[1], pads[2], pads[3]))

    def _resize(self, index: int, node: Node) -> None:
        x, out = self._outline.stored(node.inputs[0]), self._outline.target(node)
        tables: dict[str, Any] = {}
        for axis, label in ((0, "row"), (1, "column")):
            first, second, weight = resize_table(
                node.attributes, axis, self.shapes[x][2 + axis], self.shapes[out][2 + axis]
            )
            if self.graph.is_code(x):
                weight = np.rint(weight * _RESIZE_ONE).astype(np.int64)
            else:
                weight = weight.astype(np.float32)
            tables |= {
                f"{label}_index0": first, f"{label}_index1": second, f"{label}_weight": weight
            }  # fmt: skip
        self._step(
            node, self._op(node, "resize"),
            tensors={"x": x, "y": out}, **self._sizes(out),
            linear=node.attributes["mode"] == "linear", **tables,
        )  # fmt: skip

    def _depth_to_space(self, index: int, node: Node) -> None:
        self._step(
            node, self._op(node, "depth_to_space"),
            tensors={"x": self._outline.stored(node.inputs[0]), "y": self._outline.target(node)},
            **self._sizes(node.outputs[0]),
            blocksize=node.attributes["blocksize"], block_first=node.attributes["mode"] == "DCR",
        )  # fmt: skip

    def _quantize(self, index: int, node: Node) -> None:
        q = self.graph.quantization[node.outputs[0]]
        self._step(
            node, "quantize",
            tensors={"x": node.inputs[0], "y": node.outputs[0]}, **self._sizes(node.outputs[0]),
            scale=np.float32(q.scale), zero_point=q.zero_point, top=q.top,
        )  # fmt: skip

    def _dequantize(self, index: int, node: Node) -> None:
        q = self.graph.quantization[node.inputs[0]]
        self._step(
            node, "dequantize",
            tensors={"x": node.inputs[0], "y": node.outputs[0]}, **self._sizes(node.outputs[0]),
            scale=np.float32(q.scale), zero_point=q.zero_point,
        )  # fmt: skip


def _has_one_table(node: Node) -> bool:
    return node.op == "Lookup" and node.table is not None and node.table.ndim == 1


def resize_table(
    attributes: dict[str, Any], axis: int, size: int, out: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source positions of a Resize along one axis (0 height, 1 width).

    Returns
    -------
    index0, index1 : int64 arrays of shape (out,)
        The two neighbours; equal for mode "nearest".
    weight : float64 array of shape (out,)
        Weight of index1; index0 has the rest.
    """
    scale = out / size if attributes["scales"] is None else attributes["scales"][axis]
    i = np.arange(out, dtype=np.float64)
    mode = attributes["coordinate_transformation_mode"]
    if mode == "asymmetric":
        source = i / scale
    elif mode == "align_corners":
        source = i * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    elif mode == "pytorch_half_pixel" and out == 1:
        source = np.zeros(1)
    else:
        source = (i + 0.5) / scale - 0.5
    if attributes["mode"] == "nearest":
        index = np.clip(_NEAREST[attributes["nearest_mode"]](source), 0, size - 1).astype(np.int64)
        return index, index, np.zeros(out)
    source = np.clip(source, 0, size - 1)
    index0 = np.floor(source).astype(np.int64)
    return index0, np.minimum(index0 + 1, size - 1), source - index0


_NEAREST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda v: np.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}

# Packed functions of float32 by their names among `functions.UNARY_FUNCTIONS`.
_UNARY = {
    "Clip": "clip", "Elu": "elu", "HardSigmoid": "hard_sigmoid", "HardSwish": "hard_swish",
    "LeakyRelu": "leaky_relu", "Sigmoid": "sigmoid", "Swish": "silu", "Tanh": "tanh",
}  # fmt: skip

_BUILDERS: dict[str, Callable[[Plan, int, Node], None]] = {
    "QuantizeLinear": Plan._quantize,
    "DequantizeLinear": Plan._dequantize,
    "Conv": Plan._conv,
    "ConvTranspose": Plan._conv,
    "MaxPool": Plan._pool,
    "AveragePool": Plan._pool,
    "GlobalAveragePool": Plan._pool,
    "GlobalMaxPool": Plan._pool,
    "Add": Plan._binary,
    "Sub": Plan._binary,
    "Mul": Plan._binary,
    "Concat": Plan._concat,
    "Gather": Plan._gather,
    "Lookup": Plan._lookup,
    "Resize": Plan._resize,
    "DepthToSpace": Plan._depth_to_space,
    "Slice": Plan._slice,
    "Pad": Plan._pad,
    **dict.fromkeys(_UNARY, Plan._unary),
}
