"""ONNX graphs made ready for packed operators: channels first, values moved by one operator.

Two things that exporters write in many nodes, all of them exact:

- TensorFlow's tensors are (N, H, W, C), with Transposes wherever ONNX wants (N, C, H, W). Here
  Transposes move towards the outputs, through whatever does not care, until they cancel.
- Channel shuffles, depth-to-space and its inverse, and repetition of pixels come as Reshape,
  Transpose, Tile and the like on tensors of rank 5 or 6. What such a chain does to an array of
  indices tells which single operator it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from logshift.converter.onnx_model import Model, Trace
from logshift.converter.operators.functions import ELEMENTWISE

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Where axes of (N, H, W, C) are in (N, C, H, W).
_AXES = (0, 2, 3, 1)
_ELEMENTWISE = ELEMENTWISE | {"Cast", "Dropout", "Identity", "Sum"}
_REDUCING = {"ReduceMax", "ReduceMean"}
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze"}
_MOVING = _VIEWS | {"Expand", "Tile", "Transpose"}


def rearrange(model: Model, trace: Trace) -> bool:
    """Rewrite `model.proto` in place; returns whether anything has changed.

    Parameters
    ----------
    model : Model
    trace : Trace
        Of the model as it is; what it says of sizes along the batch is not relied on.
    """
    rearrangement = _Rearrangement(model, trace)
    rearrangement.run()
    return rearrangement.changed


class _Rearrangement:
    def __init__(self, model: Model, trace: Trace) -> None:
        self.graph = model.proto.graph
        self.opset = model.opset
        self.shapes, self.constants, self.mixed = trace.shapes, trace.constants, trace.mixed
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        # Of tensors (N, H, W, C): the same as (N, C, H, W).
        self.first: dict[str, str] = {}
        # Of such that are flattened: (N, C, H, W) flattened, and where its values were before.
        self.flat: dict[str, tuple[str, np.ndarray]] = {}
        self.changed = False

    def run(self) -> None:
        if any(a.HasField("g") for node in self.graph.node for a in node.attribute):
            return  # graphs inside read tensors of this one
        for value in self.graph.input:
            if len(self.shapes.get(value.name, ())) == 4 and self._becomes_first(value.name):
                self._turned(value.name)
        for node in self.graph.node:
            if not self._rewritten(node):
                self.nodes.append(node)
        if self.changed:
            needed = {value.name for value in self.graph.output}
            kept = []
            for node in reversed(self.nodes):
                if needed.intersection(node.output):
                    needed.update(node.input)
                    kept.append(node)
            del self.graph.node[:]
            self.graph.node.extend(kept[::-1])

    def _rewritten(self, node: onnx.NodeProto) -> bool:
        """Emit other nodes for this one; False if it shall stay."""
        op = node.op_type
        if node.domain not in ("", "ai.onnx") or not node.input:
            return False
        if not self.mixed.isdisjoint((*node.input, *node.output)):
            return False
        a = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if op == "Transpose" and self._transpose(node, tuple(a.get("perm", ()))):
            return True
        if op in ("Reshape", "Squeeze") and self._chain(node):
            return True
        if op in ("Flatten", *_VIEWS) and self._view(node):
            return True
        if node.input[0] in self.flat:
            self._after_flatten(node, a)
            return True
        if op == "MatMul" and self._matrix(node):
            return True
        return self._pushed(node, a)

    # --- what nodes are made of ----------------------------------------------------------------

    def _emit(
        self, node: onnx.NodeProto, op: str, inputs: Iterable[str], output: str, **attributes: Any
    ) -> None:
        # What comes before the last of several nodes is named after its output.
        name = node.name if output in (node.output[0], f"{node.output[0]}/NCHW") else output
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        self.changed = True

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = value = np.ascontiguousarray(value)
            self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _integers(self, name: str, *values: int) -> str:
        return self._constant(name, np.array(values, np.int64))

    def _turned(self, name: str) -> str:
        """Return a tensor (N, H, W, C) as (N, C, H, W)."""
        if name not in self.first:
            turned = self.first[name] = f"{name}/NCHW"
            node = helper.make_node("Transpose", [name], [turned], name=turned, perm=_TO_FIRST)
            self.nodes.append(node)
        return self.first[name]

    def _is_last(self, name: str, turned: str) -> None:
        """Note that a tensor is another one with its channels last."""
        self.first[name] = turned
        node = helper.make_node(
            "Transpose", [turned], [name], name=f"{name}/Transpose", perm=_TO_LAST
        )
        self.nodes.append(node)

    def _becomes_first(self, name: str) -> bool:
        """Tell whether a Transpose follows, after element-wise nodes with constants at most."""
        for node in self.readers.get(name, ()):
            others = [n for n in node.input if n != name and n not in self.constants]
            if node.op_type in _ELEMENTWISE and not others:
                if self._becomes_first(node.output[0]):
                    return True
            elif node.op_type == "Transpose" and name not in (v.name for v in self.graph.input):
                if tuple(helper.get_attribute_value(node.attribute[0])) == _TO_FIRST:
                    return True
        return False

    # --- Transposes ----------------------------------------------------------------------------

    def _transpose(self, node: onnx.NodeProto, perm: tuple[int, ...]) -> bool:
        x, y = node.input[0], node.output[0]
        if perm == _TO_FIRST and x in self.first:
            self._emit(node, "Identity", [self.first[x]], y)
            return True
        if perm == _TO_FIRST:
            self.first[x] = y
        elif perm == _TO_LAST:
            self.first[y] = x
        return False

    def _pushed(self, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
        """Let a node on (N, H, W, C) work on (N, C, H, W)."""
        data = [name for name in node.input if name and name not in self.constants]
        if has_axes := node.op_type in ("Pad", "Slice", "Split", *_REDUCING):
            data = data[:1]
        if not data or any(name not in self.first for name in data):
            return False
        if any(len(self.shapes.get(name, ())) != 4 for name in node.output if name):
            return self._reduced_to_matrix(node, a)
        inputs = None
        if has_axes:
            inputs = self._with_axes(node, a)
        elif node.op_type in _ELEMENTWISE:
            inputs = [self._broadcast(name) for name in node.input]
        elif node.op_type == "Concat" and len(data) == len(node.input):
            inputs, a["axis"] = [self.first[name] for name in data], _AXES[a["axis"] % 4]
        if inputs is None:
            return False
        outputs = [name and f"{name}/NCHW" for name in node.output]
        self.nodes.append(helper.make_node(node.op_type, inputs, outputs, name=node.name, **a))
        for name, turned in zip(node.output, outputs, strict=True):
            if name:
                self._is_last(name, turned)
        self.changed = True
        return True

    def _broadcast(self, name: str) -> str:
        """Return an input of an element-wise node on (N, C, H, W)."""
        if name not in self.constants:
            return self.first.get(name, name)
        array = self.constants[name]
        if array.ndim == 0 or array.size <= 1:
            return name
        array = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(_TO_FIRST)
        return self._constant(f"{name}/NCHW", array)

    def _with_axes(self, node: onnx.NodeProto, a: dict[str, Any]) -> list[str] | None:
        """Return the inputs of a node that names axes, and change its attributes."""
        inputs, y = [self.first[node.input[0]], *node.input[1:]], node.output[0]
        if node.op_type == "Split":
            a["axis"] = _AXES[a.get("axis", 0) % 4]
            return inputs
        where = {"Slice": 3, "Pad": 3}.get(node.op_type, 1)
        given = inputs[where] if len(inputs) > where else ""
        if given and given not in self.constants:
            return None
        axes = a.get("axes") or (self.constants[given].tolist() if given else [])
        if node.op_type in _REDUCING and sorted(axis % 4 for axis in axes) != [1, 2]:
            return None
        if node.op_type == "Pad" and not axes:
            return self._pads(node, a, inputs)
        if node.op_type == "Slice" and not axes:
            starts = a["starts"] if "starts" in a else self.constants.get(inputs[1], np.empty(0))
            axes = list(range(len(starts)))
        if not axes:
            return None
        axes = [_AXES[axis % 4] for axis in axes]
        if "axes" in a or "starts" in a:
            a["axes"] = axes
        else:
            inputs += [""] * (where + 1 - len(inputs))
            inputs[where] = self._integers(f"{y}/axes", *axes)
        return inputs

    def _pads(self, node: onnx.NodeProto, a: dict[str, Any], inputs: list[str]) -> list[str] | None:
        if "pads" in a:
            a["pads"] = [a["pads"][i + axis] for i in (0, 4) for axis in _TO_FIRST]
            return inputs
        pads = self.constants.get(inputs[1])
        if pads is None:
            return None
        pads = pads.reshape(2, 4)[:, _TO_FIRST]
        inputs[1] = self._constant(f"{node.output[0]}/pads", pads.ravel())
        return inputs

    def _reduced_to_matrix(self, node: onnx.NodeProto, a: dict[str, Any]) -> bool:
        """Mean or maximum over H and W that leaves (N, C), which has no layout."""
        if node.op_type not in _REDUCING or (inputs := self._with_axes(node, a)) is None:
            return False
        self._emit(node, node.op_type, inputs, node.output[0], **a)
        return True

    # --- views and matrices --------------------------------------------------------------------

    def _view(self, node: onnx.NodeProto) -> bool:
        """Between (N, C) and (N, 1, 1, C), and flattening."""
        x, y = node.input[0], node.output[0]
        before, after = self.shapes.get(x, ()), self.shapes.get(y, ())
        if len(before) == 2 and len(after) == 4 and after[1:3] == (1, 1) and before[1] == after[3]:
            sizes = self._integers(f"{y}/sizes", 0, 0, 1, 1)
            self._emit(node, "Reshape", [x, sizes], f"{y}/NCHW")
            # Only its first two sizes are copied, whatever they are.
            self._is_last(y, f"{y}/NCHW")
            return True
        if x not in self.first or len(before) != 4 or len(after) != 2:
            return False
        n, h, w, c = before
        if after != (n, h * w * c):
            return False
        where = np.arange(h * w * c).reshape(h, w, c).transpose(2, 0, 1).ravel()
        readers = self.readers.get(y, ())
        outputs = {value.name for value in self.graph.output}
        if h * w == 1:
            self._emit(node, "Flatten", [self.first[x]], y)
            return True
        if y in outputs or not all(self._multiplies(reader, y) for reader in readers):
            return False
        self._emit(node, "Flatten", [self.first[x]], f"{y}/NCHW")
        self.flat[y] = f"{y}/NCHW", where
        return True

    def _multiplies(self, node: onnx.NodeProto, x: str) -> bool:
        """Tell whether a node multiplies rows by a constant matrix."""
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        known = node.op_type in ("Gemm", "MatMul") and node.input[1] in self.constants
        return known and node.input[0] == x and not transposed

    def _after_flatten(self, node: onnx.NodeProto, a: dict[str, Any]) -> None:
        x, where = self.flat[node.input[0]]
        weight = np.take(self.constants[node.input[1]], where, axis=1 if a.get("transB") else 0)
        name = self._constant(f"{node.input[1]}/{x}", weight)
        self._emit(node, node.op_type, [x, name, *node.input[2:]], node.output[0], **a)

    def _matrix(self, node: onnx.NodeProto) -> bool:
        """Multiply the channels of (N, H, W, C) by a matrix, as a convolution does."""
        x, y = node.input[0], node.output[0]
        weight = self.constants.get(node.input[1])
        if weight is None or weight.ndim != 2 or len(self.shapes.get(x, ())) != 4:
            return False
        kernel = self._constant(f"{node.input[1]}/OI11", weight.T[:, :, None, None])
        self._emit(node, "Conv", [self._turned(x), kernel], f"{y}/NCHW", kernel_shape=[1, 1])
        self._is_last(y, f"{y}/NCHW")
        return True

    # --- chains --------------------------------------------------------------------------------

    def _chain(self, node: onnx.NodeProto) -> bool:
        """Recognise what nodes on tensors of rank 5 and more do to one of rank 4."""
        y, steps = node.output[0], [node]
        while len(self.shapes.get(steps[-1].input[0], ())) > 4:
            producer = self.producers.get(steps[-1].input[0])
            if producer is None or producer.op_type not in _MOVING:
                return False
            steps.append(producer)
        x = steps[-1].input[0]
        shape = self.shapes.get(x, ())
        if len(steps) < 2 or len(shape) != 4 or len(self.shapes[y]) != 4 or not np.prod(shape):
            return False
        turned = self.first.get(x)
        indices = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        moved = indices
        for step in reversed(steps):
            if (after := self._step(step, moved)) is None:
                return False
            moved = after
        if turned is not None and self._single(
            node, turned, indices.transpose(_TO_FIRST), moved.transpose(_TO_FIRST), f"{y}/NCHW"
        ):
            self._is_last(y, f"{y}/NCHW")
            return True
        if self._single(node, x, indices, moved, y):
            return True
        if self._single(node, x, indices, moved.transpose(_TO_FIRST), f"{y}/NCHW"):
            self._is_last(y, f"{y}/NCHW")
            return True
        return False

    def _step(self, node: onnx.NodeProto, x: np.ndarray) -> np.ndarray | None:
        """Do a step of a chain, None if it mixes the pictures of a batch."""
        shape = self.shapes[node.output[0]]
        if shape[0] != x.shape[0]:
            return None
        if node.op_type == "Transpose":
            perm = list(helper.get_attribute_value(node.attribute[0])) if node.attribute else [1]
            return x.transpose(perm) if perm[0] == 0 else None
        if node.op_type == "Tile":
            repeats = self.constants.get(node.input[1])
            return None if repeats is None else np.tile(x, repeats)
        if node.op_type == "Expand":
            return np.broadcast_to(x, shape) if len(shape) == x.ndim else None
        return x.reshape(shape)

    def _single(
        self, node: onnx.NodeProto, x: str, before: np.ndarray, after: np.ndarray, y: str
    ) -> bool:
        """Emit the operator that moves these values, (N, C, H, W); False if there is none."""
        (_, c, h, w), (_, d, rows, columns) = before.shape, after.shape
        if (h, w) == (rows, columns):
            index = np.searchsorted(before[0, :, 0, 0], after[0, :, 0, 0]).clip(max=c - 1)
            if np.array_equal(before[:, index], after):
                self._gather(node, x, y, index)
                return True
        if c == d and rows % h == 0 and columns % w == 0:
            factors = rows // h, columns // w
            if np.array_equal(before.repeat(factors[0], 2).repeat(factors[1], 3), after):
                self._repeat(node, x, y, factors)
                return True
        k = rows // h
        if (rows, columns, d * k * k) == (h * k, w * k, c) and k > 1:
            for mode, order in (("DCR", (0, 3, 4, 1, 5, 2)), ("CRD", (0, 1, 4, 2, 5, 3))):
                split = (-1, k, k, d, h, w) if mode == "DCR" else (-1, d, k, k, h, w)
                if np.array_equal(
                    before.reshape(split).transpose(order).reshape(after.shape), after
                ):
                    if mode == "CRD" and self.opset < 11:  # which knows DCR only
                        self._gather(node, x, f"{y}/DCR", np.arange(c).reshape(d, k * k).T.ravel())
                        x = f"{y}/DCR"
                    extra = {"mode": mode} if self.opset >= 11 else {}
                    self._emit(node, "DepthToSpace", [x], y, blocksize=k, **extra)
                    return True
        k = h // rows
        if (rows * k, columns * k, d) == (h, w, c * k * k) and k > 1:
            parts = [before[:, :, i::k, j::k] for i in range(k) for j in range(k)]
            joined = np.concatenate(parts, axis=1)
            for index in (np.arange(d), np.arange(d).reshape(k * k, c).T.ravel()):
                if np.array_equal(joined[:, index], after):
                    self._emit(node, "SpaceToDepth", [x], f"{y}/blocks", blocksize=k)
                    self._gather(node, f"{y}/blocks", y, index)
                    return True
        return False

    def _gather(self, node: onnx.NodeProto, x: str, y: str, index: np.ndarray) -> None:
        self._emit(node, "Gather", [x, self._integers(f"{y}/indices", *index)], y, axis=1)

    def _repeat(self, node: onnx.NodeProto, x: str, y: str, factors: tuple[int, int]) -> None:
        scales = self._constant(f"{y}/scales", np.array([1, 1, *factors], np.float32))
        if self.opset < 10:
            inputs = [x, scales] if self.opset == 9 else [x]
            own = {} if self.opset == 9 else {"scales": [1.0, 1.0, *map(float, factors)]}
            self._emit(node, "Upsample", inputs, y, mode="nearest", **own)
        elif self.opset == 10:
            self._emit(node, "Resize", [x, scales], y, mode="nearest")
        else:
            self._emit(
                node, "Resize", [x, "", scales], y, mode="nearest",
                coordinate_transformation_mode="asymmetric", nearest_mode="floor",
            )  # fmt: skip
