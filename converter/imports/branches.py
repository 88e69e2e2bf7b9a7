"""Branches, loops and sequences, as far as they are none: decided, unrolled, or both ways taken.

An If on a constant is one of its branches. Of another both are computed, and Where chooses: what
sizes decide is known when the runtime makes its plan, what data decide when it runs. Loops of a
known number of turns are unrolled, and sequences whose length is known are their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from logshift.converter.imports.editor import (
    Editor,
    Stays,
    Use,
    all_graphs,
    inferred_types,
    subgraphs,
)
from logshift.converter.imports.order import sort

_MOST_TURNS = 512
_MOST_NODES = 2**13  # of an unrolled loop
_MOST_FOLDED = 64  # nodes that a condition or a count is computed by
_FIX = "fix the sizes of its inputs with input_shapes"

CONTROL = (
    "If", "Loop", "Scan", "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
    "SequenceErase", "SequenceInsert", "SequenceLength", "SplitToSequence",
)  # fmt: skip


def has_control(model: onnx.ModelProto) -> bool:
    """Tell whether there are branches, loops or sequences."""
    return any(node.op_type in CONTROL for g in all_graphs(model.graph) for node in g.node)


def straighten(model: onnx.ModelProto) -> dict[str, str]:
    """Take out branches, loops and sequences, in place, where that can be done.

    Returns
    -------
    dict of the first output of a node to str
        Why nodes are left.
    """
    walk = _Walk(model)
    walk.run()
    return walk.edit.left


class _Walk:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.edit = Editor(model)
        self.sequences: dict[str, list[str]] = {}
        self.types = inferred_types(model)
        self.rules: dict[str, Callable[[Use], None]] = {
            "If": self._if, "Loop": self._loop, "Scan": self._scan, "Identity": self._identity,
            "ConcatFromSequence": self._concat, "SequenceAt": self._at,
            "SequenceConstruct": self._construct, "SequenceEmpty": self._empty,
            "SequenceErase": self._erase, "SequenceInsert": self._insert,
            "SequenceLength": self._length, "SplitToSequence": self._split,
        }  # fmt: skip

    def run(self) -> None:
        edit = self.edit
        self._nodes(list(edit.graph.node))
        edit.commit()

    def _nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        edit = self.edit
        for node in nodes:
            start, rule = len(edit.nodes), self.rules.get(node.op_type)
            edit.producers.update({name: node for name in node.output if name})
            if rule is None:
                edit.nodes.append(node)
                if node.op_type == "Constant":
                    edit.note_constant(node)
                continue
            try:
                rule(Use(edit, node))
            except Stays as reason:
                edit.left[next(filter(None, node.output))] = str(reason)
                edit.nodes[start:] = [node]
                edit.producers.update({name: node for name in node.output if name})

    # --- subgraphs ------------------------------------------------------------------------------

    def _inline(self, n: Use, what: str, graph: onnx.GraphProto, given: Sequence[str]) -> list[str]:
        """Add the nodes of a subgraph; returns what its outputs are called.

        Parameters
        ----------
        n : Use
        what : str
            For names.
        graph : onnx.GraphProto
        given : tensor names
            What its inputs are.
        """
        edit = self.edit
        names = dict(zip([value.name for value in graph.input], given, strict=True))
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            inner = f"{n.name}/{what}/{tensor.name}"
            names[tensor.name] = edit.constant(inner, array, array.dtype)
        nodes = []
        for node in graph.node:
            names.update({y: edit.fresh(f"{n.name}/{what}/{y}") for y in node.output if y})
            copy = _renamed(node, names)
            copy.name = edit.fresh_node(f"{n.name}/{what}/{node.name or node.op_type}")
            nodes.append(copy)
        for value in graph.value_info:
            if value.name in names:
                self.types[names[value.name]] = value.type.tensor_type
        self._nodes(nodes)
        return [names.get(value.name, value.name) for value in graph.output]

    def _if(self, n: Use) -> None:
        branches, start = n.attributes, len(self.edit.nodes)
        known = self._value(n.x(0))
        if known is not None:
            chosen = "then_branch" if known.reshape(-1)[0] else "else_branch"
            results = self._inline(n, chosen, branches[chosen], [])
            for name, y in zip(results, n.node.output, strict=True):
                self._alias(n, name, y)
            return
        sides = [self._inline(n, b, branches[b], []) for b in ("then_branch", "else_branch")]
        if any(name in self.sequences for side in sides for name in side):
            raise Stays("its branches give sequences")
        if any(node.op_type in CONTROL for node in self.edit.nodes[start:]):
            raise Stays(f"there are loops in its branches; {_FIX}")
        shapes = [self._shapes(branches[b]) for b in ("then_branch", "else_branch")]
        for then, other, y, one, two in zip(*sides, n.node.output, *shapes, strict=True):
            if not _agree(one, two):
                raise Stays(
                    f"its branches give tensors of different shapes {one} and {two}; {_FIX}, or"
                    " export the branch that is needed"
                )
            n.emit("Where", [n.x(0), then, other], y, name=n.name)

    def _shapes(self, branch: onnx.GraphProto) -> list[list[int | None] | None]:
        """Return what is known of the shapes of a branch's results."""
        found = []
        for value in branch.output:
            kind = self.types.get(value.name)
            kind = kind if kind is not None and kind.HasField("shape") else value.type.tensor_type
            known = kind.HasField("shape")
            dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
            found.append(dims if known else None)
        return found

    def _loop(self, n: Use) -> None:
        count = self._value(n.x(0)) if n.x(0) else None
        goes_on = self._value(n.x(1)) if n.x(1) else np.array(True)
        if goes_on is None or count is None:
            raise Stays(f"data or sizes say how often it runs; {_FIX}, or unroll it")
        body = n.attributes["body"]
        turns = int(count.reshape(-1)[0]) if goes_on.reshape(-1)[0] else 0
        _check_turns(turns, body)
        state, kept = list(n.node.input[2:]), len(n.node.input) - 2
        rows: list[list[str]] = [[] for _ in n.node.output[kept:]]
        condition = n.constant("condition", True, np.bool_)
        rank = len(body.input[0].type.tensor_type.shape.dim)  # onnxruntime goes by that
        for turn in range(turns):
            index = n.constant(f"{turn}/index", np.full((1,) * rank, turn), np.int64)
            results = self._inline(n, str(turn), body, [index, condition, *state])
            held = self._value(results[0])
            if held is None:
                raise Stays("data say when it ends; export it with a fixed number of turns")
            state = results[1 : kept + 1]
            for row, name in zip(rows, results[kept + 1 :], strict=True):
                row.append(name)
            if not held.reshape(-1)[0]:
                break
        for name, y in zip(state, n.node.output, strict=False):
            if y:
                self._alias(n, name, y)
        for row, y in zip(rows, n.node.output[kept:], strict=True):
            if y:
                self._stack(n, row, 0, y)

    def _scan(self, n: Use) -> None:
        if self.edit.opset < 9:
            raise Stays("it is of an older form, with a batch; export the model anew")
        body, count = n.attributes["body"], n.get("num_scan_inputs", 0)
        kept = len(n.node.input) - count
        axes = n.get("scan_input_axes", [0] * count)
        backwards = n.get("scan_input_directions", [0] * count)
        turns = self._length_of(n.x(kept), axes[0])
        _check_turns(turns, body)
        state = list(n.node.input[:kept])
        rows: list[list[str]] = [[] for _ in n.node.output[kept:]]
        for turn in range(turns):
            parts = []
            for name, axis, back in zip(n.node.input[kept:], axes, backwards, strict=True):
                place = turns - 1 - turn if back else turn
                index = n.constant(f"{turn}/index", place, np.int64)
                parts.append(n.emit("Gather", [name, index], axis=axis))
            results = self._inline(n, str(turn), body, [*state, *parts])
            state = results[:kept]
            for row, name in zip(rows, results[kept:], strict=True):
                row.append(name)
        for name, y in zip(state, n.node.output, strict=False):
            if y:
                self._alias(n, name, y)
        ends = n.get("scan_output_axes", [0] * len(rows))
        turned = n.get("scan_output_directions", [0] * len(rows))
        for row, y, axis, back in zip(rows, n.node.output[kept:], ends, turned, strict=True):
            if y:
                self._stack(n, row[::-1] if back else row, axis, y)

    def _stack(self, n: Use, row: list[str], axis: int, y: str) -> None:
        """Join tensors along a new axis."""
        if not row:
            raise Stays("it never runs, and its result is empty")
        parts = [n.move("Unsqueeze", name, [axis]) for name in row]
        n.emit("Concat", parts, y, axis=axis)

    def _alias(self, n: Use, name: str, y: str) -> None:
        """Let a tensor or sequence have another name as well."""
        if name in self.sequences:
            self.sequences[y] = self.sequences[name]
        else:
            n.emit("Identity", [name], y)

    # --- sequences ------------------------------------------------------------------------------

    def _identity(self, n: Use) -> None:
        if n.x(0) in self.sequences:
            self._hold(n, self.sequences[n.x(0)])
        else:
            self.edit.nodes.append(n.node)

    def _construct(self, n: Use) -> None:
        self._hold(n, list(n.node.input))

    def _empty(self, n: Use) -> None:
        self._hold(n, [])

    def _insert(self, n: Use) -> None:
        held = list(self._sequence(n))
        held.insert(self._position(n, 2, len(held), len(held)), n.x(1))
        self._hold(n, held)

    def _erase(self, n: Use) -> None:
        held = list(self._sequence(n))
        del held[self._position(n, 1, len(held), -1)]
        self._hold(n, held)

    def _at(self, n: Use) -> None:
        held = self._sequence(n)
        place = self._position(n, 1, len(held), 0)
        if not -len(held) <= place < len(held):
            raise Stays(f"reads position {place} of {len(held)}")
        n.emit("Identity", [held[place]], n.y())

    def _length(self, n: Use) -> None:
        n.emit("Identity", [n.constant("length", len(self._sequence(n)), np.int64)], n.y())

    def _concat(self, n: Use) -> None:
        held, axis = self._sequence(n), n.get("axis", 0)
        if n.get("new_axis", 0):
            self._stack(n, held, axis, n.y())
        elif not held:
            raise Stays("it joins nothing")
        else:
            n.emit("Concat", held, n.y(), name=n.name, axis=axis)

    def _split(self, n: Use) -> None:
        axis, given = n.get("axis", 0), self._value(n.x(1)) if n.x(1) else np.array(1)
        if given is None:
            raise Stays(f"data or sizes say where it cuts; {_FIX}")
        if given.ndim:
            sizes = [int(v) for v in given]
        else:
            whole, step = self._length_of(n.x(0), axis), int(given)
            sizes = [min(step, whole - start) for start in range(0, whole, step)]
        parts = n.split(n.x(0), axis, sizes)
        if not n.x(1) and not n.get("keepdims", 1):
            parts = [n.move("Squeeze", part, [axis]) for part in parts]
        self._hold(n, parts)

    def _hold(self, n: Use, tensors: list[str]) -> None:
        """Note what is in the sequence that a node makes."""
        if n.y() in self.edit.outputs:
            raise Stays("the model gives a sequence back; let it give its tensors")
        self.sequences[n.y()] = tensors

    def _sequence(self, n: Use) -> list[str]:
        if n.x(0) not in self.sequences:
            raise Stays(f"what is in the sequence {n.x(0)!r} is only known when it runs")
        return self.sequences[n.x(0)]

    def _position(self, n: Use, index: int, length: int, default: int) -> int:
        if not n.x(index):
            return default
        if (value := self._value(n.x(index))) is None:
            raise Stays(f"its position {n.x(index)!r} is not a constant")
        place = int(value.reshape(-1)[0])
        if not -length <= place <= length:
            raise Stays(f"its position {place} is beyond a sequence of {length}")
        return place

    # --- what is known --------------------------------------------------------------------------

    def _length_of(self, name: str, axis: int) -> int:
        shape = self.edit.shape(name)
        kind = self.types.get(name)
        if shape is None and kind is not None and kind.HasField("shape"):
            shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if shape is None or not -len(shape) <= axis < len(shape) or (size := shape[axis]) is None:
            raise Stays(f"the length of {name!r} is only known when it runs; {_FIX}")
        return size

    def _value(self, name: str) -> np.ndarray | None:
        """Return a tensor that follows from constants alone, None if it does not."""
        if (array := self.edit.array(name)) is not None:
            return array
        needed: list[onnx.NodeProto] = []
        waiting, constants = [name], dict[str, np.ndarray]()
        while waiting:
            current = waiting.pop()
            if (array := self.edit.array(current)) is not None:
                constants[current] = array
                continue
            node = self.edit.producers.get(current)
            if node is None or len(needed) == _MOST_FOLDED or node.op_type in CONTROL:
                return None
            if node not in needed:
                needed.append(node)
                waiting.extend(filter(None, node.input))
        return _computed(name, needed[::-1], constants, self.edit.opset)


def _computed(
    name: str, nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray], opset: int
) -> np.ndarray | None:
    """Return what nodes make of constants, None if they cannot be run."""
    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, "constant", [], [onnx.ValueInfoProto(name=name)], tensors)
    sort(graph)
    opsets = [helper.make_opsetid("", opset)]
    try:
        (value,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets)).run(None, {})
    except Exception:  # it fails in any way that NumPy does
        return None
    return np.asarray(value)


def _agree(one: list[int | None] | None, two: list[int | None] | None) -> bool:
    """Tell whether nothing speaks against two shapes being the same."""
    if one is None or two is None:
        return True
    return len(one) == len(two) and all(
        a is None or b is None or a == b for a, b in zip(one, two, strict=True)
    )


def _check_turns(turns: int, body: onnx.GraphProto) -> None:
    if turns > _MOST_TURNS or turns * len(body.node) > _MOST_NODES:
        raise Stays(
            f"it runs {turns} times {len(body.node)} nodes, too many to unroll; export the model"
            " without the loop, as an operator such as LSTM where it is one"
        )


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """Return a node whose tensors have other names, in its subgraphs too."""
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    for graph in subgraphs(copy):
        own = {y for inner in graph.node for y in inner.output} | {v.name for v in graph.input}
        outside = {k: v for k, v in names.items() if k not in own}
        nodes = [_renamed(inner, outside) for inner in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        for value in graph.output:
            value.name = outside.get(value.name, value.name)
    return copy
