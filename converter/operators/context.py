"""What an operator is lowered in: the network as far as it is lowered, and what can be asked of it.

A lowering works in a draft, which reads all that is known and keeps what is added to itself until
it is accepted. So one that refuses leaves nothing behind, whatever it has done by then.
"""

from __future__ import annotations

import copy
import math
from collections import ChainMap
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx

from logshift.converter.float_graph import FloatNode
from logshift.converter.operators.registry import Unsupported
from logshift.converter.qdq import table_of
from logshift.converter.recognise import recognise
from logshift.converter.refusals import why_not
from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.graph import DTYPES, Quantization, Shape

if TYPE_CHECKING:
    from logshift.converter.onnx_model import Model, Trace

# What a draft adds to, by name.
ADDED = (
    "alias", "shapes", "onnx_shapes", "plain_names", "constants", "used_constants", "quantization",
    "volumes",
)  # fmt: skip


class Volume(NamedTuple):
    """Where a tensor (N, C, D, H, W) is kept: as pictures (N * D, C, H, W)."""

    pictures: str
    depth: int


def name_of(node: onnx.NodeProto) -> str:
    """Return the node's name; nodes without one are known by their output."""
    return node.name or node.output[0]


class Context:
    """The network as far as it is lowered.

    Attributes
    ----------
    model : Model
    dtypes : dict of tensor name to dtype
    mixed : set of tensor names
        See `Trace`.
    sizes : dict of name to array
        Computed integer tensors.
    joined : dict of tensor name to tensors that must have its height and width
    producers : dict of tensor name to the ONNX node that makes it
    nodes : list of FloatNode
    alias : dict of tensor name to the stored tensor that it is a view of
    shapes : dict of tensor name to Shape
        Of tensors that packed operators can read, (N, C, H, W).
    onnx_shapes : dict of tensor name to Shape
        As ONNX has them.
    plain_names : dict of tensor name to the name that ONNX operators find it under
        Of tensors as ONNX has them.
    constants : dict of name to array
        The model's.
    used_constants : dict of name to array
        Inputs of ONNX operators.
    quantization : dict of stored tensor to Quantization
        As the model has it.
    volumes : dict of tensor name to Volume
    fixed_size : bool
        Whether a node's translation holds for the nominal height and width only.
    """

    alias: MutableMapping[str, str]
    shapes: MutableMapping[str, Shape]
    onnx_shapes: MutableMapping[str, Shape]
    plain_names: MutableMapping[str, str]
    constants: MutableMapping[str, np.ndarray]
    used_constants: MutableMapping[str, np.ndarray]
    quantization: MutableMapping[str, Quantization]
    volumes: MutableMapping[str, Volume]

    def __init__(self, model: Model, trace: Trace) -> None:
        graph = model.proto.graph
        self.model, self.dtypes, self.mixed = model, trace.dtypes, trace.mixed
        self.sizes = trace.integers
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.joined = _joined(graph)
        self.nodes: list[FloatNode] = []
        self.alias, self.shapes, self.plain_names = {}, {}, {}
        self.onnx_shapes, self.constants = dict(trace.shapes), dict(trace.constants)
        self.used_constants, self.quantization, self.volumes = {}, {}, {}
        self.fixed_size = False

    def draft(self) -> Context:
        """Return a network to go on with, which leaves this one as it is."""
        draft = copy.copy(self)
        draft.nodes = []
        for name in ADDED:
            setattr(draft, name, ChainMap({}, getattr(self, name)))
        return draft

    def accept(self, draft: Context) -> None:
        """Take over what a draft has added."""
        self.nodes += draft.nodes
        for name in ADDED:
            getattr(self, name).update(getattr(draft, name).maps[0])
        self.fixed_size = draft.fixed_size

    # --- adding nodes ---------------------------------------------------------------------------

    def add(self, op: str, node: onnx.NodeProto, inputs: list[str], **fields: Any) -> None:
        """Add the packed operator that makes the output of an ONNX node."""
        self.nodes.append(FloatNode(op, name_of(node), inputs, node.output[0], **fields))

    def add_onnx(
        self,
        op: str,
        name: str,
        inputs: list[str],
        outputs: list[str],
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Add an ONNX operator."""
        first, *more = outputs
        self.nodes.append(
            FloatNode(
                op, name, inputs, first, attributes or {}, opset=self.model.opset,
                more_outputs=more,
            )
        )  # fmt: skip

    def unsqueeze(self, name: str, result: str, axes: list[int], op: str = "Unsqueeze") -> None:
        """Insert (or with op "Squeeze" remove) axes of size 1."""
        if self.model.opset < 13:
            self.add_onnx(op, result, [name], [result], {"axes": axes})
        else:
            where = self._constant(f"{result}/axes", np.array(axes, np.int64))
            self.add_onnx(op, result, [name, where], [result])

    def keep(self, node: onnx.NodeProto) -> None:
        """Let a node be the ONNX operator that it is."""
        for name in filter(None, node.output):
            # Also of a node that fails: its consumers shall be judged on their own.
            self.plain_names[name] = name
        if reason := why_not(node, self.model.left):
            raise Unsupported(reason)
        for name in filter(None, node.output):
            if (dtype := self.dtypes.get(name)) is None or dtype.name not in DTYPES:
                raise Unsupported(f"its output {name!r} is no tensor of numbers")
        op, inputs = node.op_type, [self.plain(n) if n else "" for n in node.input]
        attributes: dict[str, Any] = {}
        if op == "ConstantOfShape":
            op = "Expand"  # which takes its value as an input
            values = [onnx.numpy_helper.to_array(a.t) for a in node.attribute]
            value = values[0].reshape(()) if values else np.zeros((), np.float32)
            inputs.insert(0, self._constant(f"{node.output[0]}/value", value))
        for attribute in node.attribute if op == node.op_type else ():
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, (int, float, bytes)):
                attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
            elif isinstance(value, list) and all(isinstance(v, (int, float, bytes)) for v in value):
                attributes[attribute.name] = [
                    v.decode() if isinstance(v, bytes) else v for v in value
                ]
            else:
                raise Unsupported(f"its attribute {attribute.name!r} is no number and no text")
        while inputs and not inputs[-1]:
            inputs.pop()
        self.add_onnx(op, name_of(node), inputs, list(node.output), attributes)

    def _constant(self, name: str, value: np.ndarray) -> str:
        """Make a constant input of ONNX operators; returns its name."""
        self.used_constants[name] = value
        return name

    # --- finding tensors ------------------------------------------------------------------------

    def source(self, name: str) -> str:
        """Return the stored tensor that `name` is, or is a flattened view of."""
        if name in self.constants:
            raise Unsupported(f"its input {name!r} is a constant")
        name = self.alias.get(name, name)
        if name not in self.shapes and name in self.plain_names:
            return self._stored(name)
        if name not in self.shapes:
            shape = self.onnx_shapes.get(name, ())
            raise Unsupported(f"its input has shape {shape}; only (N, C, H, W) is supported")
        return name

    def _stored(self, name: str) -> str:
        """Return a tensor as packed operators have it, of one as ONNX has it."""
        shape = self.onnx_shapes[name]
        if name in self.mixed:
            raise Unsupported(f"its input of shape {shape} has no batch of pictures in front")
        if self.dtypes[name] != np.float32 or len(shape) not in (2, 4):
            raise Unsupported(f"its input is {self.dtypes[name]} of shape {shape}")
        if len(shape) == 4:
            self.shapes[name] = shape
            return name
        stored = f"{name}/NC11"
        if stored not in self.shapes:
            self.unsqueeze(self.plain_names[name], stored, [2, 3])
            self.shapes[stored] = (*shape, 1, 1)
        return stored

    def tensor(self, name: str) -> str:
        """Return the stored tensor that `name` is; not one of which it is a flattened view."""
        source = self.source(name)
        if name in self.onnx_shapes and self.shapes[source][:2] != self.onnx_shapes[name][:2]:
            raise Unsupported(f"reads a flattened tensor of shape {self.shapes[source]}")
        return source

    def plain(self, name: str) -> str:
        """Return the tensor that ONNX operators can read for `name`."""
        if name in self.constants:
            array = self.constants[name]
            if array.dtype.name not in DTYPES:
                raise Unsupported(f"its input {name!r} is {array.dtype}")
            return self._constant(name, array)
        if name in self.plain_names:
            return self.plain_names[name]
        if name in self.volumes:
            return self._made_whole(name)
        stored = self.alias.get(name, name)
        if stored in self.shapes:
            shape = self.onnx_shapes[name]
            if shape == self.shapes[stored]:
                return stored
            # Only (N, F), however it is stored, has another shape.
            flat = f"{name}/NC"
            self.add_onnx("Flatten", flat, [stored], [flat])
            self.onnx_shapes[flat] = shape
            self.plain_names[name] = flat
            return flat
        if name not in self.producers:
            raise Unsupported(f"its input {name!r} is produced by no node")
        producer = self.producers[name]  # which only computes sizes
        try:
            self.keep(producer)
        except Unsupported as reason:
            raise Unsupported(
                f"its input {name!r} comes of {producer.op_type} {name_of(producer)!r}: {reason}"
            ) from None
        return name

    # --- volumes --------------------------------------------------------------------------------

    def volume(self, name: str, volume: Volume, shape: Shape) -> None:
        """Note that a tensor is kept as pictures, whether these are made already or not."""
        n, c, d, h, w = self.onnx_shapes[name] = shape
        self.shapes[volume.pictures] = self.onnx_shapes[volume.pictures] = (n * d, c, h, w)
        self.volumes[name] = volume

    def volume_of(self, name: str) -> Volume:
        """Return a tensor (N, C, D, H, W) as pictures."""
        if name not in self.volumes:
            shape, layers = self.onnx_shapes[name], f"{name}/layers"
            self._swap(self.plain(name), layers, shape)
            pictures = self.pictures(layers, f"{name}/pictures")
            self.volume(name, Volume(pictures, shape[2]), shape)
        return self.volumes[name]

    def layers(self, pictures: str, depth: int) -> str:
        """Return pictures (N * D, C, H, W) as (N, D, C, H, W)."""
        count, c, h, w = self.onnx_shapes[pictures]
        shape, name = (count // depth, depth, c, h, w), f"{pictures}/layers"
        if name not in self.onnx_shapes:
            self.reshape(pictures, name, shape)
        return name

    def pictures(self, layers: str, name: str) -> str:
        """Return (N, D, ..., H, W) as (N * D, C, H, W), with all channels that there are."""
        n, d, *channels, h, w = self.onnx_shapes[layers]
        shape = (n * d, math.prod(channels), h, w)
        self.reshape(layers, name, shape)
        self.shapes[name] = shape
        return name

    def _made_whole(self, name: str) -> str:
        pictures, depth = self.volumes[name]
        self._swap(self.layers(pictures, depth), name, self.onnx_shapes[name])
        self.plain_names[name] = name
        return name

    def _swap(self, x: str, y: str, shape: Shape) -> None:
        """Swap channels and depth; `shape` is that of the volume."""
        self.add_onnx("Transpose", y, [x], [y], {"perm": [0, 2, 1, 3, 4]})
        if y not in self.onnx_shapes:
            n, c, d, h, w = shape
            self.onnx_shapes[y] = (n, d, c, h, w)

    def reshape(self, x: str, y: str, shape: Shape) -> None:
        """Add a Reshape, whatever the batch is."""
        self.fixed_size = True
        sizes = self._constant(f"{y}/sizes", np.array([-1, *shape[1:]], np.int64))
        self.add_onnx("Reshape", y, [x, sizes], [y])
        self.onnx_shapes[y] = shape

    def cut(self, x: str, y: str, axis: int, start: int, step: int, count: int) -> str:
        """Add a Slice of so many positions of an axis."""
        values = {"starts": start, "ends": start + (count - 1) * step + 1, "axes": axis}
        values |= {"steps": step} if step > 1 else {}
        shape = list(self.onnx_shapes[x])
        shape[axis] = count
        if self.model.opset < 10:
            if step > 1:
                raise Unsupported("its stride along the depth needs opset 10")
            self.add_onnx("Slice", y, [x], [y], {key: [v] for key, v in values.items()})
        else:
            inputs = [
                self._constant(f"{y}/{key}", np.array([v], np.int64)) for key, v in values.items()
            ]
            self.add_onnx("Slice", y, [x, *inputs], [y])
        self.onnx_shapes[y] = tuple(shape)
        return y

    def padded(self, x: str, y: str, axis: int, pads: tuple[int, int]) -> str:
        """Add a Pad with zeros along an axis."""
        shape = list(self.onnx_shapes[x])
        widths = [0] * (2 * len(shape))
        widths[axis], widths[axis + len(shape)] = pads
        if self.model.opset < 11:
            self.add_onnx("Pad", y, [x], [y], {"pads": widths})
        else:
            given = self._constant(f"{y}/pads", np.array(widths, np.int64))
            self.add_onnx("Pad", y, [x, given], [y])
        shape[axis] += sum(pads)
        self.onnx_shapes[y] = tuple(shape)
        return y

    # --- finding constants ----------------------------------------------------------------------

    def constant(self, name: str) -> np.ndarray:
        """Return a weight as float32."""
        if name not in self.constants:
            raise Unsupported(f"its weight {name!r} is not a constant")
        array = self.constants[name]
        if array.dtype not in (np.float32, np.float64):
            raise Unsupported(f"its weight {name!r} is {array.dtype}, not float32")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise Unsupported(f"its weight {name!r} holds NaN or infinity")
        return array

    def integers(self, node: onnx.NodeProto, index: int) -> list[int] | None:
        """Return an input that gives sizes or positions; None if it is absent."""
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name in self.constants:
            return [int(v) for v in self.constants[name].ravel()]
        if name not in self.sizes:
            raise Unsupported(f"its input {name!r} must be a constant")
        self.fix_size()
        return [int(v) for v in self.sizes[name].ravel()]

    def fix_size(self) -> None:
        """Note that a translation holds for the nominal height and width only."""
        if self.model.frees_sizes:
            raise Unsupported("it computes sizes from the input's, which were asked to be free")
        self.fixed_size = True

    def words(self, node: onnx.NodeProto, weight: np.ndarray) -> LogWeights | None:
        """Return the words of a weight, (O, kh, kw, C / group), that lies on a grid already."""
        return recognise(weight, self.model.metadata.weights.get(node.input[1]))

    def table(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, Quantization] | None:
        """Return what makes the codes at which a Gather reads a table, see `qdq.table_of`."""
        return table_of(node, self.producers, self.model.quantization)


def _joined(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Return, for every tensor, those that must have its height and width: it is joined to them."""
    joined: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "Concat" and any(a.name == "axis" and a.i == 1 for a in node.attribute):
            for name in node.input:
                joined.setdefault(name, []).extend(n for n in node.input if n != name)
    return joined
