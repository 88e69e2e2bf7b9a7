"""Nodes in the order in which they run, and what keeps them from having one."""

from __future__ import annotations

import onnx

from logshift.converter.imports.editor import reads, subgraphs
from logshift.kernels.errors import ConversionError

_SHOWN = 5


def sort(graph: onnx.GraphProto, known: frozenset[str] = frozenset()) -> bool:
    """Let every node come after those whose outputs it reads, in place; subgraphs too.

    Nodes that are in order stay as they are. ONNX asks for the order, exporters forget about it.

    Parameters
    ----------
    graph : onnx.GraphProto
    known : set of str
        Names from outside the graph.

    Returns
    -------
    bool
        Whether anything was moved.

    Raises
    ------
    ConversionError
        If nodes wait for each other, or read what no node makes.
    """
    nodes = list(graph.node)
    given = known | {value.name for value in graph.input} | {t.name for t in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [reads(node) for node in nodes]
    lost = [
        f"{node.op_type} {_label(node)} reads {name!r}"
        for node, names in zip(nodes, needs, strict=True)
        for name in sorted(names - given - makers.keys())
    ]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" * (len(lost) > _SHOWN)
        raise ConversionError(
            f"the model is not complete: {'; '.join(lost[:_SHOWN])}{more}, which no node makes and"
            " no input is called"
        )
    order = _order(nodes, [{makers[n] for n in names if n in makers} for names in needs])
    moved = order != list(range(len(nodes)))
    if moved:
        sorted_nodes = [onnx.NodeProto.FromString(nodes[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(sorted_nodes)
    names = given | makers.keys()
    for node in graph.node:
        for inner in subgraphs(node):
            moved |= sort(inner, names)
    return moved


def _label(node: onnx.NodeProto) -> str:
    return repr(node.name or next(filter(None, node.output), ""))


def _order(nodes: list[onnx.NodeProto], needs: list[set[int]]) -> list[int]:
    """Return all positions, each after those that it needs, and else as they are."""
    order: list[int] = []
    done, open_ = set[int](), dict[int, None]()
    for first in range(len(nodes)):
        waiting = [first]
        while waiting:
            node = waiting[-1]
            if node in done:
                waiting.pop()
                continue
            open_[node] = None
            missing = sorted(needs[node] - done)
            if not missing:
                order.append(node)
                done.add(node)
                del open_[node]
                waiting.pop()
            elif missing[0] in open_:
                _refuse(nodes, [*open_], missing[0])
            else:
                waiting.append(missing[0])
    return order


def _refuse(nodes: list[onnx.NodeProto], path: list[int], first: int) -> None:
    cycle = [nodes[i] for i in path[path.index(first) :]]
    names = ", ".join(f"{node.op_type} {_label(node)}" for node in cycle)
    raise ConversionError(f"the model's nodes wait for each other in a circle: {names}")
