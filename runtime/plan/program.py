"""Plans: programs with their buffers and argument records, built from a schedule, and run.

A step is one call of a kernel; its argument record is of the type that the kernel was registered
with. Between two programs, ONNX operators that no kernel computes run in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.machine.memory import ALIGNMENT, aligned
from logshift.kernels.registry import Kernel
from logshift.runtime.executor import Team
from logshift.runtime.graph import Inference, Node
from logshift.runtime.onnx_ops import numpy_ops
from logshift.runtime.operators import OPERATORS
from logshift.runtime.operators.base import Operand, Site
from logshift.runtime.operators.moves import sliced
from logshift.runtime.plan import work
from logshift.runtime.plan.call import Call
from logshift.runtime.plan.layout import Layout, TensorValues, layout
from logshift.runtime.plan.place import Places, nchw
from logshift.runtime.plan.schedule import NumpyStep, Operation, Schedule


@dataclass(slots=True)
class Step:
    """One kernel call of a program; `values` are those of its argument record, see `Layout`."""

    node: Node
    kernel: Kernel
    layout: Layout
    values: list[Any]
    homes: int  # threads that it is worth
    parts: int  # into which each one's share of it may be cut
    place: int = 0  # of the argument record in the plan's, of the first group's
    bound: bool = False  # each group has a record of its own


class Plan:
    """Programs with their buffers, for one set of input shapes; serves one run at a time.

    Made by `Planner.plan`.

    Parameters
    ----------
    schedule : Schedule
    found : Inference
        For the shapes of the inputs.
    calls : dict of position of an ONNX operator to the calls of kernels that compute it
    kernel : callable(op) -> Kernel
        Chooses the kernel of an operation that is no convolution.
    threads : int
        Largest number of threads that will run it.
    groups : int
        The program is run for so many groups of pictures, one after the other; `found` is for one.
        Above 1 only of a schedule of packed operators.

    Attributes
    ----------
    steps : list of Step, those of one group
    program : int64 array (steps, 4), see `executor`
    parts : list of slice of the program, or NumpyStep between two of them
    held_bytes : int
        Bytes of all that it keeps for itself.
    """

    def __init__(
        self,
        schedule: Schedule,
        found: Inference,
        calls: Mapping[int, tuple[Call, ...]],
        kernel: Callable[[str], Kernel],
        threads: int,
        groups: int = 1,
    ) -> None:
        self.graph, self.shapes, self.steps = schedule.graph, dict(found.shapes), list[Step]()
        self._groups = groups
        self.parts: list[slice | NumpyStep] = []
        self._schedule, self._found, self._calls = schedule, found, calls
        self._kernel, self._threads = kernel, threads
        self._operands: dict[str, Operand] = {}
        self._scratch: list[tuple[list[Any], Layout, int]] = []  # values, bytes per thread
        self._keep: list[np.ndarray] = []  # arrays whose addresses argument records hold
        # Words of argument records: addresses of float tensors that are set anew at every run.
        self._bindings: dict[str, list[tuple[Step, int]]] = {}
        for stored, name in schedule.renamed:
            if name in self.shapes:
                self.shapes[stored] = self.shapes[name]
        self._places = Places(schedule, self.shapes)
        self._build()
        self._finish()
        if groups > 1:  # from here on they are those of all groups
            self.shapes = {n: (groups * size, *rest) for n, (size, *rest) in self.shapes.items()}

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
        own = {name: self._value(name, arrays) for name in self._schedule.unshared}
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
        for name in self._schedule.outside:
            arrays[name] = np.empty(self.shapes[name], self._found.dtypes.get(name, np.float32))
        for name in self._bound:
            if name in arrays:
                self._point(name, arrays[name])
        return arrays

    def _point(self, name: str, array: np.ndarray) -> None:
        address, part, words = array.ctypes.data, array.nbytes // self._groups, self._words
        for group, places in enumerate(self._bound[name]):
            for place in places:
                words[place] = address + part * group

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
            if name in self._bound or name in self._schedule.viewed:
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
        origin = self._schedule.origin(name)
        values = self._found.values
        array = values[origin] if origin in values else arrays[origin]
        # Shapes of ONNX operators' results need not be known, but then there is no alias either.
        return array if origin == name else array.reshape(self.shapes[name])

    @staticmethod
    def _own(y: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        """Return an array, or a copy if its memory is not its own or that of others too."""
        base = y.base
        if base is not None and not (isinstance(base, np.ndarray) and base.flags.owndata):
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
        origin = self._schedule.origin(name)
        if origin in arrays or origin in self._found.values:
            return self._value(name, arrays)
        if origin in self._places.found and not self.graph.is_code(origin):
            return self._places.array(origin).copy().reshape(self.shapes[name])
        stored = self._schedule.stored(name)
        if stored not in self._places.found:
            return None
        picture = self._places.picture(stored)
        return np.array(picture.transpose(0, 3, 1, 2), order="C").reshape(self.shapes[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor buffers."""
        return self._places.arena.nbytes

    # --- building --------------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the steps of all operations."""
        begin = 0
        for i, operation in enumerate(self._schedule.operations):
            if operation.kind == "numpy":
                if begin < len(self.steps):
                    self.parts.append(slice(begin, begin := len(self.steps)))
                self.parts.append(self._schedule.numpy_steps[i])
                continue
            for call in self._calls_of(operation):
                self._step(operation.node, call)
            for name in operation.writes:
                if name in self._places.rewritten:
                    for call in self._places.write_border(name):
                        self._step(operation.node, call)
        if begin < len(self.steps):
            self.parts.append(slice(begin, len(self.steps)))

    def _calls_of(self, operation: Operation) -> Iterable[Call]:
        if operation.kind == "onnx":
            return self._calls[operation.index]
        (output, *_) = operation.writes
        if operation.kind == "packed":
            node = operation.node
            convolutions = self._schedule.convolutions.get(operation.index, ())
            operands = [self._operand(name) for name in self._schedule.read(node)]
            return OPERATORS[node.op].build(
                Site(node, operands, self._operand(output), convolutions)
            )
        y = self._operand(output)
        return [Call(operation.kind, {"x": operation.reads[0], "y": output}, y.sizes)]

    def _operand(self, name: str) -> Operand:
        found = self._operands.get(name)
        if found is None and name in self._schedule.slices:
            node = self._schedule.slices[name]
            (source,) = self._schedule.read(node)
            found = self._operands[name] = sliced(node, self._operand(source))
        if found is None:
            place, shape = self._places.found.get(name), nchw(self.shapes[name])
            top, left = (place.geometry.top, place.geometry.left) if place else (0, 0)
            quantization, in_place = self.graph.quantization.get(name), name in self._schedule.parts
            found = Operand(name, shape, top, left, quantization, in_place=in_place)
            self._operands[name] = found
        return found

    def _step(self, node: Node, call: Call) -> None:
        """Append a step that makes a call."""
        conv, fields, schedule = call.convolution, call.fields, self._schedule
        kernel = self._kernel(call.op) if conv is None else conv.kernel
        form = layout(kernel)
        values = (form.empty if conv is None else schedule.templates[conv]).copy()
        total = call.work * fields["n"] * fields["height"] * fields["width"] * fields["channels"]
        homes, parts = work.divided(total, self._threads)
        step = Step(node, kernel, form, values, homes, parts)
        tells = conv is not None or kernel.scratch is not None  # hooks of the kernel
        known = fields.copy() if tells else {}
        for key, name in call.tensors.items():
            place = self._places.found.get(name)
            if place is None:
                origin = schedule.origin(name)
                place = self._places.found.get(origin)
            if place is None:
                n, c, h, w = nchw(self.shapes[origin])
                tensor: tuple[int, ...] = (0, n, h, w, c, 0, 0)
                step.bound = True
                self._bindings.setdefault(origin, []).append((step, form.word[key]))
            else:
                tensor = place.values
            if call.moved is not None and key in call.moved:
                top, left = call.moved[key]
                tensor = (*tensor[:5], tensor[5] + top, tensor[6] + left)
            begin = form.index[key]
            values[begin : begin + len(tensor)] = tensor
            if tells:
                known[key] = TensorValues(tensor)
        if tells:
            if conv is not None:
                fields = fields | conv.packed.sized(known)
            if kernel.pieces is not None:
                step.parts = max(1, min(parts, kernel.pieces(known) // homes))
            if kernel.scratch is not None:
                size = -(-int(kernel.scratch(known)) // ALIGNMENT) * ALIGNMENT
                self._scratch.append((values, form, size))
        for key, value in fields.items():
            if isinstance(value, np.ndarray):
                self._keep.append(value)
                value = value.ctypes.data
            values[form.index[key]] = value
        self.steps.append(step)

    def _finish(self) -> None:
        """Lay out scratch memory, argument records and the program."""
        size = max((size for *_, size in self._scratch), default=0)
        self._scratch_space = aligned((size * self._threads,), np.uint8)
        address = self._scratch_space.ctypes.data
        for values, form, size in self._scratch:
            values[form.index["scratch"]] = address
            values[form.index["scratch_size"]] = size
        end = 0
        for step in self.steps:
            step.place = end
            end += step.layout.stride * (self._groups if step.bound else 1)
        self._arguments = aligned((end,), np.uint8)
        self._words = memoryview(self._arguments.data).cast("Q")
        begin, buffer = self._arguments.ctypes.data, self._arguments.data
        program = []
        for group in range(self._groups):
            for step in self.steps:
                place = step.place + step.layout.stride * (group if step.bound else 0)
                if group == 0 or step.bound:
                    step.layout.struct.pack_into(buffer, place, *step.values)
                program.append((step.kernel.address, begin + place, step.homes, step.parts))
        self.program = np.array(program, np.int64).reshape(len(program), 4)
        if self._groups > 1:
            self.parts = [slice(0, len(program))]
        # For each group the words of its records.
        self._bound = {
            name: [
                [(s.place + s.layout.stride * group) // 8 + word for s, word in places]
                for group in range(self._groups)
            ]
            for name, places in self._bindings.items()
        }
        self._bound_constants = {
            name: np.asarray(self._found.values[name], order="C")
            for name in self._bound
            if name in self._found.values
        }
        for name, array in self._bound_constants.items():
            self._point(name, array)
        own = (self._places.arena, self._scratch_space, self._arguments, *self._keep)
        self.held_bytes = sum(array.nbytes for array in own)
