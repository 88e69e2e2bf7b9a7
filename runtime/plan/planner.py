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
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.convolution import Convolution
from logshift.runtime.plan.program import Plan
from logshift.runtime.plan.schedule import Schedule


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
            calls = compiled.calls(self.graph, found)
            schedule = self._schedule(found, calls, keep_all)
            return Plan(schedule, found, calls, self.kernel, self.threads)
        except MemoryError:
            raise InputError(
                "not enough memory for this input size; use a smaller batch or picture"
            ) from None

    def kernel(self, op: str) -> Kernel:
        """Return the kernel for an operation that is no convolution."""
        if op not in self._kernels:
            self._kernels[op] = kernel(op, self._family)
        return self._kernels[op]

    def _schedule(
        self, found: Inference, calls: dict[int, tuple[Call, ...]], keep_all: bool
    ) -> Schedule:
        """Return the schedule for shapes; they decide about little of it, mostly about nothing."""
        pixels = frozenset(name for name in self._heads if math.prod(found.shapes[name][2:]) == 1)
        views = frozenset(index for index, made in calls.items() if not made)
        turned = {} if keep_all else compiled.turned_back(self.graph, found, calls)
        moving = frozenset(calls).difference(views, turned)
        key = frozenset(found.values), pixels, views, moving, frozenset(turned.items()), keep_all
        if key not in self._schedules:
            self._schedules[key] = Schedule(self.graph, self.convolutions, *key)
        return self._schedules[key]
