"""From ONNX to packed operations, node by node; weights stay float and nothing is fused yet.

Packed operators know (N, C, H, W) only. An ONNX tensor (N, F) of theirs is either stored as
(N, F, 1, 1), or it is a flattened (N, C, H, W), which only a Gemm (as a convolution with a kernel
of H x W) and element-wise functions can read.

Whatever has no packed counterpart stays an ONNX operator, on tensors as ONNX has them. How each
operator is lowered is in `operators/`.
"""

from __future__ import annotations

import numpy as np
import onnx

from logshift.converter.float_graph import FloatGraph, Problems
from logshift.converter.onnx_model import Model, Trace, dim_name
from logshift.converter.operators.context import Context, name_of
from logshift.converter.operators.edges import round_to_codes
from logshift.converter.operators.lookup import piece_of
from logshift.converter.operators.registry import LOWERINGS, VARIADIC, Lowering, Unsupported
from logshift.converter.operators.volumes import on_pictures
from logshift.runtime.graph import Dim, Shape, ValueInfo


def lower(model: Model, trace: Trace, problems: Problems) -> FloatGraph:
    """Translate every ONNX node that the outputs depend on.

    Parameters
    ----------
    model : Model
    trace : Trace
        Of a sample of the nominal size.
    problems : Problems
        Nodes that cannot be translated are added to it.

    Returns
    -------
    FloatGraph
        With "Affine" and "Elementwise" nodes, which `fuse` resolves.
    """
    return _Walk(model, trace, problems).run()


class _Walk:
    def __init__(self, model: Model, trace: Trace, problems: Problems) -> None:
        self.model, self.problems = model, problems
        self.ctx = Context(model, trace)

    def run(self) -> FloatGraph:
        ctx, graph = self.ctx, self.model.proto.graph
        for info in self.model.inputs:
            ctx.plain_names[info.name] = info.name
            if len(info.shape) == 4 and info.dtype == "float32":
                ctx.shapes[info.name] = ctx.onnx_shapes[info.name]
        for node in self._needed(graph):
            try:
                self._lower(node)
            except Unsupported as reason:
                self.problems.add(node.op_type, name_of(node), str(reason))
        results = {}
        for value in graph.output:
            try:
                results[value.name] = self._result(value.name)
            except Unsupported as reason:
                self.problems.add("output", value.name, str(reason))
        return FloatGraph(
            ctx.nodes,
            self._inputs(),
            self._outputs(graph, results),
            results,
            {**ctx.onnx_shapes, **ctx.shapes},
            dict(ctx.used_constants),
            dict(ctx.quantization),
        )

    def _needed(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Nodes that compute data, in execution order: not those that only compute sizes."""
        needed = {value.name for value in graph.output}
        kept = []
        for node in reversed(graph.node):
            if node.op_type != "Constant" and needed.intersection(node.output):
                # Lowerings look up sizes themselves; ONNX operators ask for their inputs.
                if table := self.ctx.table(node):
                    needed.add(table[0].input[0])
                elif piece := piece_of(node, self.ctx.producers, self.ctx.constants):
                    needed.add(piece)
                elif node.op_type in LOWERINGS:
                    needed.update(node.input if node.op_type in VARIADIC else node.input[:1])
                else:
                    real = (n for n in node.input if self.ctx.dtypes.get(n) == np.float32)
                    needed.update(real, node.input[:1])
                kept.append(node)
        return _resized_late(kept[::-1], self.ctx.joined)

    def _lower(self, node: onnx.NodeProto) -> None:
        if not self.ctx.plain_names.keys().isdisjoint(filter(None, node.output)):
            return  # an ONNX operator already, whose result another one has asked for
        if (lowering := self._lowering(node)) is not None:
            draft = self.ctx.draft()
            for name in node.output:
                if len(shape := draft.onnx_shapes.get(name, ())) in (2, 4):
                    draft.shapes[name] = shape if len(shape) == 4 else (*shape, 1, 1)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            texts = {k: v.decode() for k, v in attributes.items() if isinstance(v, bytes)}
            try:
                lowering(draft, on_pictures(draft, node) or node, attributes | texts)
            except Unsupported:
                pass
            else:
                self.ctx.accept(draft)
                return
        self.ctx.keep(node)

    def _lowering(self, node: onnx.NodeProto) -> Lowering | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Clip" and node.name in self.model.quantization:
            return round_to_codes
        if not self.ctx.mixed.isdisjoint(node.output):
            return None
        return LOWERINGS.get(node.op_type)

    # --- inputs and outputs --------------------------------------------------------------------

    def _result(self, name: str) -> str:
        """Return the tensor that holds an output of the network."""
        if name in self.ctx.plain_names:
            return self.ctx.plain_names[name]
        try:
            return self.ctx.tensor(name)
        except Unsupported:
            return self.ctx.plain(name)

    def _inputs(self) -> list[ValueInfo]:
        infos = []
        for info in self.model.inputs:
            nominal = self.ctx.onnx_shapes[info.name]
            shape: tuple[Dim, ...] = info.shape
            if self.ctx.fixed_size and len(shape) >= 4:
                shape = (shape[0], *nominal[1:])
            # An empty sample is no accident.
            shape = tuple(size and dim for dim, size in zip(shape, nominal, strict=True))
            infos.append(ValueInfo(info.name, shape, nominal, info.dtype))
        return infos

    def _outputs(self, graph: onnx.GraphProto, results: dict[str, str]) -> list[ValueInfo]:
        batch = self.model.inputs[0].shape[0]
        pictures = self.ctx.onnx_shapes[self.model.inputs[0].name][0]
        sizes = [dim for info in self._inputs() for dim in info.shape[1:]]
        dynamic = any(isinstance(dim, str) for dim in sizes)
        infos = []
        for value in graph.output:
            if value.name not in results or value.name not in self.ctx.onnx_shapes:
                continue  # `problems` knows why
            nominal = self.ctx.onnx_shapes[value.name]
            declared = self._declared(value, nominal)
            packed = results[value.name] not in self.ctx.plain_names
            shape: list[Dim] = []
            if packed:  # its first dimension is the batch, unless it has been summed up
                shape = [batch if nominal[0] == pictures else nominal[0], nominal[1]]
            for axis in range(len(shape), len(nominal)):
                dim = declared[axis] if axis < len(declared) else None
                fixed = not dynamic and (packed or isinstance(batch, int))
                if fixed or (dim and dim.dim_value == nominal[axis] > 0):
                    shape.append(nominal[axis])
                else:
                    shape.append((dim and dim_name(dim)) or f"{value.name}_dim_{axis}")
            dtype = self.ctx.dtypes[value.name].name
            infos.append(ValueInfo(value.name, tuple(shape), nominal, dtype))
        return infos

    def _declared(
        self, value: onnx.ValueInfoProto, nominal: Shape
    ) -> list[onnx.TensorShapeProto.Dimension]:
        """Return an output's dimensions: as declared where inference does not say otherwise."""
        found = list(value.type.tensor_type.shape.dim)
        found = found if len(found) == len(nominal) else []
        given = self.model.declared.get(value.name)
        dims = found if given is None else list(given.shape.dim)
        if len(dims) != len(nominal):
            return found
        return [
            inferred if inferred.dim_param and dim.dim_value else dim
            for dim, inferred in zip(dims, found or dims, strict=True)
        ]


def _resized_late(
    nodes: list[onnx.NodeProto], joined: dict[str, list[str]]
) -> list[onnx.NodeProto]:
    """Let a Resize come just before its reader: what it is joined with is there by then."""
    waiting: dict[str, onnx.NodeProto] = {}
    ordered: list[onnx.NodeProto] = []

    def emit(node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in waiting:
                emit(waiting.pop(name))
        ordered.append(node)

    for node in nodes:
        if node.op_type == "Resize" and node.output[0] in joined:
            waiting[node.output[0]] = node
        else:
            emit(node)
    return ordered + list(waiting.values())
