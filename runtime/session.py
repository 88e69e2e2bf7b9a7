"""Sessions: a loaded network, ready to run."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from logshift.kernels.errors import InputError
from logshift.kernels.registry import FAMILIES
from logshift.runtime import cores, executor
from logshift.runtime.file import format
from logshift.runtime.graph import Graph, Node, Shape, ValueInfo
from logshift.runtime.infer import infer_nominal
from logshift.runtime.onnx_ops import compiled, numpy_ops
from logshift.runtime.operators.conv import weight_uses
from logshift.runtime.picture import Preprocessing, is_image
from logshift.runtime.plan.planner import Planner
from logshift.runtime.plan.prepare import prepare
from logshift.runtime.plan.program import Plan
from logshift.runtime.plan.schedule import NumpyStep
from logshift.runtime.table import text_table

# Plans that a session keeps while nobody runs them: of so many sets of input shapes, so many in all
# (several callers at once need one each), and of so many bytes, but always the latest.
_SHAPES_KEPT, _PLANS_KEPT, _BYTES_KEPT = 8, 16, 2**28
_LOADERS = 8  # most threads that load: each needs memory for a layer, and there are only so many
_PICTURES = ("float32", "float16")  # inputs that prepared pictures may be


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    kernels: str = "auto",
    pickle_as: str = "bytes",
) -> Session:
    """Load a packed file.

    Parameters
    ----------
    path : path-like
        A `.stlq` file.
    threads : int, optional
        Threads per run. By default the cores this process may use: what its affinity allows, and
        at most what a container's CPU quota (cgroup v1 or v2, rounded up) pays for, or
        `OMP_NUM_THREADS` in place of the quota.
    kernels : {"auto", "dot", "shift", "portable", "reference"}
        Kernel family: the machine's products of bytes, additions and shifts alone, or plain
        compiled loops; "auto" takes the fastest for this machine. What a family has no kernel for
        the portable one does. Results are the same, bit for bit.
    pickle_as : {"bytes", "path"}
        What a pickle of the session holds: the bytes of the file, or only its absolute path, which
        must then lead to the file on whatever machine the pickle is read.

    Returns
    -------
    Session

    Raises
    ------
    FormatError
        If the file is damaged or of a newer version.
    InputError
        If a setting is out of range.
    OSError
        If the file cannot be opened.
    """
    if pickle_as not in ("bytes", "path"):
        raise InputError(f"pickle_as is {pickle_as!r}; choose 'bytes' or 'path'")
    kernels = family(kernels)
    graph = format.read(path, threads=min(_threads(threads), _LOADERS), keep_decoded=True)
    session = Session(graph, threads=threads, kernels=kernels)
    if pickle_as == "path":
        session._path = os.path.abspath(path)
    return session


@dataclass(frozen=True)
class LayerSummary:
    """One node of `Session.summary`; weights' fields are None for nodes without weights."""

    name: str
    op: str
    output_shape: Shape
    kernel: str
    macs: int
    weight_shape: tuple[int, ...] | None = None
    bits: int | None = None
    nzr: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a session runs, at the nominal input size; `str()` is a table."""

    layers: list[LayerSummary]
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table of the nodes, then the totals."""
        rows = [("node", "op", "output", "weights", "kernel", "bits", "NZR", "MMAC")]
        for layer in self.layers:
            rows.append((
                layer.name, layer.op, "x".join(map(str, layer.output_shape)),
                "x".join(map(str, layer.weight_shape or ())), layer.kernel,
                "" if layer.bits is None else str(layer.bits),
                "" if layer.nzr is None else f"{layer.nzr:.3f}",
                f"{layer.macs / 1e6:.2f}" if layer.macs else "",
            ))  # fmt: skip
        macs = sum(layer.macs for layer in self.layers)
        return f"{text_table(rows, left=5)}\n{macs / 1e6:.2f} MMAC, {self.threads} threads"


@dataclass(frozen=True)
class LayerTime:
    """Median time that one node takes, in seconds."""

    name: str
    op: str
    kernel: str
    seconds: float
    macs: int


class Session:
    """A network ready to run; made by `load`, or from a `Graph` in memory.

    May be used from several threads at once, and after a fork. Buffers are kept from run to run;
    in steady state only the outputs are allocated.

    A pickle holds the packed file and the settings; compiled code, plans and buffers are made anew
    where it is read, and so is the number of threads unless it was given. `copy.deepcopy` does the
    same in memory; `copy.copy` shares the weights.

    Attributes
    ----------
    graph : Graph
    threads : int
    kernels : str
        The kernel family asked for.
    """

    _path: str | None = None  # what a pickle holds instead of bytes

    def __init__(self, graph: Graph, *, threads: int | None = None, kernels: str = "auto") -> None:
        self._threads = threads
        self.graph, self.threads, self.kernels = graph, _threads(threads), family(kernels)
        self._preprocessing = (
            None
            if graph.preprocessing is None
            else Preprocessing.from_manifest(graph.preprocessing)
        )
        convolutions = prepare(graph, self.kernels, min(self.threads, _LOADERS))
        self._planner = Planner(graph, convolutions, self.kernels, self.threads)
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._idle: OrderedDict[tuple[Shape, ...], list[Plan]] = OrderedDict()
        self._renew()
        executor.renew_in_forks(self)

    def _renew(self) -> None:
        """Have a lock that nobody holds, as another thread may have done when we were forked."""
        self._lock = threading.Lock()

    @property
    def inputs(self) -> list[ValueInfo]:
        """Name, shape and dtype of each input."""
        return self.graph.inputs

    @property
    def outputs(self) -> list[ValueInfo]:
        """Name, shape and dtype of each output."""
        return self.graph.outputs

    @property
    def labels(self) -> list[str] | None:
        """Class labels, if the file holds any."""
        return self.graph.labels

    # --- copying ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: the packed file or its path, and the settings."""
        network = self._path or format.serialize(self.graph)
        return {"network": network, "threads": self._threads, "kernels": self.kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the network anew."""
        network, threads = state["network"], state["threads"]
        decoding: dict[str, Any] = {
            "threads": min(_threads(threads), _LOADERS), "keep_decoded": True
        }  # fmt: skip
        if isinstance(network, bytes):
            graph = format.deserialize(network, **decoding)
        else:
            try:
                graph = format.read(network, **decoding)
            except OSError as error:
                raise InputError(
                    f"the session was pickled as the path {network}, which cannot be read here"
                    f" ({error.strerror or error}); put the file there, or pickle the session of"
                    " load(path, pickle_as='bytes')"
                ) from error
            self._path = network
        Session.__init__(self, graph, threads=threads, kernels=state["kernels"])

    def __copy__(self) -> Session:
        """Return a session on the same weights with buffers of its own."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new._forget_plans()
        return new

    # --- running ---------------------------------------------------------------------------------

    def run(self, x: Any) -> Any:
        """Run the network.

        Parameters
        ----------
        x : array, picture, sequence of pictures, or mapping of input name to array
            For a network of one input: a float array of the shape that the ONNX model takes; or,
            if the file holds preprocessing, an HWC uint8 array or a PIL image, or a sequence (or
            NHWC array) of those as a batch. For several inputs a mapping of float arrays.

        Returns
        -------
        array, or dict of output name to array if there are several outputs
            Batch first, also for a single picture.

        Raises
        ------
        InputError
            If `x` does not fit the network; the message says what would.
        """
        outputs = self._run(self._arrays(x))
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = tuple(array.shape for array in arrays.values())
        plan = self._borrow(key) or self._plan(arrays)
        try:
            found = plan.run(executor.team(self._planner.threads), arrays)
        finally:
            self._return(key, plan)
        return {info.name: found[info.name] for info in self.outputs}

    def trace(self, x: Any) -> dict[str, np.ndarray]:
        """Run once and return every tensor, codes dequantized.

        Parameters
        ----------
        x : as for `run`

        Returns
        -------
        dict of tensor name to float32 array in ONNX's layout, in order of computation.
        """
        return {
            name: q.dequantize(array) if (q := self.graph.quantization.get(name)) else array
            for name, array in self.trace_codes(x).items()
        }

    def trace_codes(self, x: Any) -> dict[str, np.ndarray]:
        """Run once and return every tensor as it is: uint8 codes, or float32; see `trace`."""
        arrays = self._arrays(x)
        plan = self._plan(arrays, keep_all=True)
        found = plan.run(executor.team(self._planner.threads), arrays)
        result = dict(arrays)
        for node in self.graph.nodes:
            for name in filter(None, node.outputs):
                if (held := plan.tensor(name, found)) is not None:
                    result[name] = held
        return result

    def profile(self, x: Any, repeat: int = 10) -> list[LayerTime]:
        """Time every node.

        Parameters
        ----------
        x : as for `run`
        repeat : int
            Runs to take the median of.

        Returns
        -------
        list of LayerTime, in order of execution
        """
        if repeat < 1:
            raise InputError(f"repeat is {repeat}; it must be at least 1")
        arrays = self._arrays(x)
        plan = self._plan(arrays)
        team = executor.team(self._planner.threads)
        plan.run(team, arrays)
        pieces: list[tuple[Node, str, slice | NumpyStep]] = []
        for part in plan.parts:
            if isinstance(part, NumpyStep):
                pieces.append((part.node, numpy_name(part.node.op), part))
                continue
            for index in range(part.start, part.stop):
                step = plan.steps[index % len(plan.steps)]
                pieces.append((step.node, step.kernel.name, slice(index, index + 1)))
        seconds = np.empty((repeat, len(pieces)))
        for run in range(repeat):
            held = plan.bind(arrays)
            for index, (_, _, piece) in enumerate(pieces):
                start = time.perf_counter()
                if isinstance(piece, NumpyStep):
                    plan.run_in_numpy(piece, held)
                else:
                    team.run(plan.program[piece])
                seconds[run, index] = time.perf_counter() - start
        times: dict[str, LayerTime] = {}
        for (node, name, _), spent in zip(pieces, np.median(seconds, axis=0), strict=True):
            key = next(filter(None, node.outputs))
            own = times.get(key) or LayerTime(
                node.name, node.op, name, 0.0, _macs(node, plan.shapes)
            )
            if node.weight_shape and "conv" in name and name not in own.kernel.split(", "):
                own = replace(own, kernel=f"{own.kernel}, {name}")
            times[key] = replace(own, seconds=own.seconds + float(spent))
        return list(times.values())

    def summary(self) -> Summary:
        """Describe every node at the nominal input size."""
        found = infer_nominal(self.graph)
        shapes, calls = found.shapes, compiled.calls(self.graph, found)
        layers = []
        for index, node in enumerate(self.graph.nodes):
            # The shape of some ONNX operators' results only a run can tell.
            out = shapes.get(next(filter(None, node.outputs)), ())
            kernels = [c.kernel for c in self._planner.convolutions.get(index, ())]
            kernels += [self._planner.kernel(call.op) for call in calls.get(index, ())]
            name = ", ".join(dict.fromkeys(kernel.name for kernel in kernels))
            if node.is_onnx and index not in calls:
                name = numpy_name(node.op)
            summary = LayerSummary(
                node.name, node.op, out, name, _macs(node, shapes), node.weight_shape
            )
            if node.weights is not None:
                summary = replace(summary, bits=node.weights.bits, nzr=node.weights.nzr)
            layers.append(summary)
        return Summary(layers, self.threads)

    # --- plans -----------------------------------------------------------------------------------

    def _plan(self, arrays: dict[str, np.ndarray], keep_all: bool = False) -> Plan:
        return self._planner.plan({name: x.shape for name, x in arrays.items()}, keep_all)

    def _borrow(self, key: tuple[Shape, ...]) -> Plan | None:
        with self._lock:
            plans = self._idle.get(key)
            if not plans:
                return None
            plan = plans.pop()
            if not plans:
                del self._idle[key]
            return plan

    def _return(self, key: tuple[Shape, ...], plan: Plan) -> None:
        with self._lock:
            self._idle.setdefault(key, []).append(plan)
            self._idle.move_to_end(key)
            while self._keeps_too_much():
                oldest, plans = next(iter(self._idle.items()))
                del plans[:1]  # an interrupt may have left none
                if not plans:
                    del self._idle[oldest]

    def _keeps_too_much(self) -> bool:
        plans = [plan for found in self._idle.values() for plan in found]
        if len(self._idle) > _SHAPES_KEPT or len(plans) > _PLANS_KEPT:
            return True
        return len(plans) > 1 and sum(plan.held_bytes for plan in plans) > _BYTES_KEPT

    # --- inputs ----------------------------------------------------------------------------------

    def _arrays(self, x: Any) -> dict[str, np.ndarray]:
        """Contiguous float32 arrays by input name, in the graph's order."""
        names = [info.name for info in self.inputs]
        if isinstance(x, Mapping):
            if set(x) != set(names):
                raise InputError(f"inputs {sorted(x)} given, the network takes {sorted(names)}")
            return {name: self._array(name, x[name]) for name in names}
        if len(names) > 1:
            raise InputError(f"the network has inputs {names}; give a dict of arrays")
        if _is_picture(x):
            x = self._prepared([x])
        elif isinstance(x, Sequence) and not isinstance(x, str) and len(x) and _is_picture(x[0]):
            x = self._prepared(x)
        elif isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 4 and len(x):
            x = self._prepared(list(x))
        return {names[0]: self._array(names[0], x)}

    def _prepared(self, pictures: Sequence[Any]) -> np.ndarray:
        if self._preprocessing is None:
            raise InputError(
                "the packed file holds no preprocessing, so it takes no pictures: convert with"
                " preprocessing=..., or give the float32 array that the ONNX model takes"
            )
        nominal = self.inputs[0].nominal
        if len(nominal) != 4:
            raise InputError(f"the network takes no pictures but arrays of shape {nominal}")
        last = self._preprocessing.channels_last(nominal)
        size = nominal[1:3] if last else nominal[2:]
        return np.stack([self._preprocessing.prepare(p, size, last) for p in pictures])

    def _array(self, name: str, x: Any) -> np.ndarray:
        array = np.asarray(x)
        dtype = next(info.dtype for info in self.inputs if info.name == name)
        if not (array.dtype.kind == np.dtype(dtype).kind == "f" or _fits(array.dtype, dtype)):
            pictures = " (or, for a network with preprocessing, HWC uint8 pictures)"
            raise InputError(
                f"input {name!r} has dtype {array.dtype}; it takes {dtype}"
                f"{pictures * (dtype in _PICTURES)}"
            )
        return np.asarray(array, dtype, order="C")


def _macs(node: Node, shapes: Mapping[str, Shape]) -> int:
    """Multiplications that a convolution stands for; 0 for other nodes."""
    if node.weight_shape is None:
        return 0
    return weight_uses(node, shapes) * math.prod(node.weight_shape)


def numpy_name(op: str) -> str:
    """Say how an ONNX operator runs."""
    return "onnx.reference (slow)" if op in numpy_ops.SLOW else "numpy"


def _threads(threads: int | None) -> int:
    if threads is None:
        return min(cores.default_threads(), executor.MAX_THREADS)
    if type(threads) is not int or not 1 <= threads <= executor.MAX_THREADS:
        raise InputError(f"threads is {threads!r}; it must be from 1 to {executor.MAX_THREADS}")
    return threads


def family(kernels: str) -> str:
    """Return the name of a kernel family, if it is one."""
    families = ("auto", *FAMILIES)
    if kernels not in families:
        raise InputError(f"kernels is {kernels!r}; choose one of {', '.join(families)}")
    return kernels


def _fits(given: np.dtype, wanted: str) -> bool:
    """Tell whether an input of another type is taken; integers may be pictures gone astray."""
    return wanted not in _PICTURES and np.can_cast(given, wanted)


def _is_picture(x: Any) -> bool:
    return is_image(x) or (isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim in (2, 3))
