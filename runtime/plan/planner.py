"""Plans of one network, for any input shapes: what does not depend on these is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.registry import Kernel, kernel
from logshift.runtime.graph import Graph, Inference, Shape
from logshift.runtime.infer import infer
from logshift.runtime.onnx_ops import compiled
from logshift.runtime.plan.call import Call, reads_of, writes_of
from logshift.runtime.plan.convolution import Convolution
from logshift.runtime.plan.program import Plan
from logshift.runtime.plan.schedule import Schedule

# Bytes of all that a step reads and writes: batches are cut into groups of pictures whose tensors
# stay in the caches between two steps.
_CACHED = 2**23


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
        self._seen: dict[int, np.dtype | None] = {}  # see `infer`
        self._prepared: dict[str, np.ndarray] = {}  # constants, for compiled ONNX operators
        self._schedules: dict[tuple, Schedule] = {}
        self._heads = [
            node.outputs[0]
            for node in graph.nodes
            if node.weight_shape is not None and not graph.is_code(node.outputs[0])
        ]

    def plan(self, shapes: Mapping[str, Shape], keep_all: bool = False) -> Plan:
        """Return a plan for input shapes; with `keep_all` it keeps all tensors, for `tensor`.

        Raises
        ------
        InputError
            If the inputs do not fit the graph, or memory does not suffice.
        """
        found = infer(self.graph, shapes, self._seen)
        try:
            turned = {} if keep_all else compiled.turned_back(self.graph, found)
            calls = compiled.calls(self.graph, found, self._prepared, turned)
            schedule = self._schedule(found, calls, turned, keep_all)
            part, groups = found, 1 if keep_all else self._groups(schedule, found)
            if groups > 1:
                part = infer(self.graph, {n: (s[0] // groups, *s[1:]) for n, s in shapes.items()})
                schedule = self._schedule(part, calls, turned, keep_all)
            return Plan(schedule, part, calls, self.kernel, self.threads, groups)
        except MemoryError:
            raise InputError(
                "not enough memory for this input size; use a smaller batch or picture"
            ) from None

    def kernel(self, op: str) -> Kernel:
        """Return the kernel for an operation that is no convolution."""
        if op not in self._kernels:
            self._kernels[op] = kernel(op, self._family)
        return self._kernels[op]

    def _groups(self, schedule: Schedule, found: Inference) -> int:
        """Return into how many groups of pictures, one after the other, a batch is cut."""
        firsts = {info.shape[0] if info.shape else 1 for info in self.graph.inputs}
        # Packed operators compute every picture by itself.
        if len(firsts) > 1 or type(*firsts) is int or any(n.is_onnx for n in self.graph.nodes):
            return 1
        batch = found.shapes[self.graph.inputs[0].name][0]
        bytes_of = {
            name: math.prod(shape) * (1 if self.graph.is_code(name) else 4)
            for name, shape in found.shapes.items()
        }
        for stored, name in schedule.renamed:
            bytes_of[stored] = bytes_of[name]
        largest = max(
            (sum(bytes_of[name] for name in (*o.reads, *o.writes)) for o in schedule.operations),
            default=0,
        )
        counts = [g for g in range(1, batch + 1) if batch % g == 0]
        groups = next((g for g in counts if largest <= g * _CACHED), batch)
        # Of small groups, which other numbers of pictures would not need, threads get too little.
        return groups if 4 * largest >= groups * _CACHED else 1

    def _schedule(
        self,
        found: Inference,
        calls: dict[int, tuple[Call, ...]],
        turned: dict[int, str],
        keep_all: bool,
    ) -> Schedule:
        """Return the schedule for shapes; they decide about little of it, mostly about nothing."""
        pixels = frozenset(name for name in self._heads if math.prod(found.shapes[name][2:]) == 1)
        views = frozenset(index for index, made in calls.items() if not made)
        moving = frozenset(
            (index, reads_of(made), writes_of(made))
            for index, made in calls.items()
            if index not in views and index not in turned
        )
        key = frozenset(found.values), pixels, views, moving, frozenset(turned.items()), keep_all
        if key not in self._schedules:
            self._schedules[key] = Schedule(self.graph, self.convolutions, *key)
        return self._schedules[key]
