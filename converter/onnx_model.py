"""Load an ONNX model, simplify it and learn its tensors' shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from logshift.converter import imports, qdq
from logshift.converter.imports.edges import write_out
from logshift.converter.imports.sizes import InputShapes
from logshift.converter.metadata import Metadata
from logshift.converter.ort import session
from logshift.converter.simplify import RENAMING, simplified
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.graph import DTYPES, Dim, Quantization, Shape

# Checking and simplifying serialize the model, which protobuf refuses from 2 GiB.
_MAX_BYTES = 2**31 - 2**20
# Before it, arithmetic broadcasts by attributes.
MIN_OPSET = 7


@dataclass(frozen=True)
class ModelInput:
    """An input of the ONNX model; unknown dimensions have names."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "float32"

    @property
    def is_float(self) -> bool:
        """Whether it holds real numbers, of any precision."""
        return np.dtype(self.dtype).kind == "f"

    @property
    def batch(self) -> int:
        """Samples that the model takes at once, 1 if it does not matter."""
        return self.shape[0] if isinstance(self.shape[0], int) else 1


@dataclass
class Model:
    """A checked and simplified ONNX model.

    Attributes
    ----------
    original : onnx.ModelProto
        In plain form (see `imports`), without its quantization.
    proto : onnx.ModelProto
        Simplified.
    inputs : list of ModelInput
    size : int
        Bytes of the model as it was given.
    quantization : dict of node name to Quantization
        What was taken out of it; see `qdq.strip`.
    metadata : Metadata
    given : onnx.ModelProto
        As it was given, but for half precision: what the packed network is to do.
    left : dict of the first output of a node to str
        Why nodes have a form still that is not plain.
    forms : (onnx.ModelProto, onnx.ModelProto), optional
        The model as it was given and in plain form, with its quantization, to be compared; if it
        was of another form.
    rounds : bool
        Whether the given model rounds where the plain one does not.
    declared : dict of output name to TypeProto.Tensor
        What the given model says of its outputs.
    frees_sizes : bool
        Whether inputs must take other sizes than the nominal ones, whatever that costs.
    """

    original: onnx.ModelProto
    proto: onnx.ModelProto
    inputs: list[ModelInput]
    size: int
    quantization: dict[str, Quantization]
    metadata: Metadata
    given: onnx.ModelProto
    left: dict[str, str] = field(default_factory=dict)
    forms: tuple[onnx.ModelProto, onnx.ModelProto] | None = None
    rounds: bool = False
    declared: dict[str, onnx.TypeProto.Tensor] = field(default_factory=dict)
    frees_sizes: bool = False

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next(o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx"))


def load(
    source: str | os.PathLike[str] | onnx.ModelProto, input_shapes: InputShapes | None = None
) -> Model:
    """Load, check and simplify a model.

    Parameters
    ----------
    source : path or onnx.ModelProto
        The latter is left as it is.
    input_shapes : mapping of input name to sizes, optional
        See `convert`.

    Raises
    ------
    ConversionError
        If it is no valid ONNX model, or has inputs that are no tensors of numbers, or cannot have
        the sizes that are asked for.
    InputError
        If it is no model of ONNX at all, or `input_shapes` does not fit its inputs.
    OSError
        If the file cannot be read.
    """
    if isinstance(source, onnx.ModelProto):
        original, where = source, "the model"
    elif not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"the model is {type(source).__name__}; expected the path of an ONNX file or an"
            " onnx.ModelProto: export it (torch.onnx.export, keras.Model.export, tf2onnx)"
        )
    else:
        where = os.fspath(source)
        if not Path(source).is_file():
            raise ConversionError(f"{where}: there is no such file")
        try:
            original = onnx.load(where)
        except OSError:
            raise
        except Exception as error:  # protobuf's and onnx's own types, by version
            raise ConversionError(f"{where}: not a readable ONNX model ({error})") from error
    size = original.ByteSize()
    if size > _MAX_BYTES:
        raise ConversionError(f"{where}: {size} bytes; models of 2 GiB and more are not supported")
    model = onnx.ModelProto()
    model.CopyFrom(original)
    try:
        mended = imports.put_in_order(model)
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ConversionError(f"{where}: not a valid ONNX model ({error})") from error
    _check_opset(model, where)
    known = Metadata.read(model)
    imported = imports.brought_in(model, input_shapes)
    original = imported.sized or original
    inputs = _inputs(imported.model.graph)
    plain, quantization = qdq.strip(imported.model, known)
    write_out(plain, quantization)
    # What is known of weights and tensors is known by their names, and of weights as they are.
    named = quantization or known.weights or known.keep_float
    proto = simplified(plain, RENAMING if named else ())
    # Of half precision onnxruntime's transformers may be wrong, or end the process.
    comparable = (mended or imported.changed) and not imported.retyped
    forms = (original, imported.model) if comparable else None
    declared = {value.name: value.type.tensor_type for value in original.graph.output}
    if input_shapes:
        declared = {}
    free = any(not isinstance(d, int) for sizes in (input_shapes or {}).values() for d in sizes)
    given = imported.model if imported.retyped else original
    return Model(
        plain, proto, inputs, size, quantization, known, given, imported.left, forms,
        imported.rounds, declared, free,
    )  # fmt: skip


def _check_opset(model: onnx.ModelProto, where: str) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if opset < MIN_OPSET:
        raise ConversionError(
            f"{where}: opset {opset} is too old; onnx.version_converter.convert_version makes it"
            f" {MIN_OPSET} or newer"
        )


def _inputs(graph: onnx.GraphProto) -> list[ModelInput]:
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = []
    for value in graph.input:
        if value.name in initializers:  # IR version 3 lists them as inputs too
            continue
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        dtype = _DTYPES.get(tensor.elem_type)
        if dtype is None:
            raise ConversionError(
                f"input {value.name!r} is {kind}; export the model with float32 inputs"
            )
        shape = tuple(_dim(value.name, i, dim) for i, dim in enumerate(tensor.shape.dim))
        if not shape:
            raise ConversionError(
                f"input {value.name!r} has no dimensions; make it a constant of the model"
            )
        inputs.append(ModelInput(value.name, shape, dtype))
    if not inputs:
        raise ConversionError("the model has no inputs")
    return inputs


def _dim(name: str, axis: int, dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    return dim_name(dim) or f"{name}_dim_{axis}"


def dim_name(dim: onnx.TensorShapeProto.Dimension) -> str:
    """Return the name of an unknown dimension, "" if it has none.

    "?" says no more than that, and a formula is no name.
    """
    return "" if dim.dim_param == "?" or " " in dim.dim_param else dim.dim_param


_DTYPES: dict[int, str] = {
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)): name for name in DTYPES
}


@dataclass
class Trace:
    """What one run of the simplified model shows.

    Attributes
    ----------
    shapes : dict of tensor name to Shape
        Every tensor computed by a node, every input and constant; no sequences.
    constants : dict of name to array
        Initializers and outputs of Constant nodes.
    integers : dict of name to array
        Computed integer tensors: sizes that depend on the input's size.
    dtypes : dict of tensor name to dtype
    mixed : set of tensor names
        Tensors of rank 2 and 4 whose first axis is not that of the batch alone; known only of
        models that take any batch.
    """

    shapes: dict[str, Shape]
    constants: dict[str, np.ndarray]
    integers: dict[str, np.ndarray]
    dtypes: dict[str, np.dtype]
    mixed: set[str] = field(default_factory=set)


def trace(model: Model, sample: Mapping[str, np.ndarray]) -> Trace:
    """Run the simplified model on one sample and record every tensor's shape.

    Running it is surer than shape inference: sizes that the network computes from its input's size
    are known as well.
    """
    graph = model.proto.graph
    values = _values(model, sample)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = values[node.output[0]]
    known = {**values, **constants, **sample}
    return Trace(
        {name: tuple(array.shape) for name, array in known.items()},
        constants,
        {n: a for n, a in values.items() if a.dtype.kind == "i" and n not in constants},
        {name: array.dtype for name, array in known.items()},
        _mixed(model, sample, values),
    )


def _values(model: Model, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what every node computes, but for sequences."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    names = [name for node in proto.graph.node for name in node.output if name]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    outputs = zip(names, run(proto, sample, optimize=False), strict=True)
    return {name: y for name, y in outputs if isinstance(y, np.ndarray)}


def _mixed(
    model: Model, sample: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]
) -> set[str]:
    """Return the tensors that a second picture does not just make twice as long."""
    if not all(isinstance(info.shape[0], str) for info in model.inputs):
        return set()
    try:
        twice = _values(model, {name: np.concatenate([x, x]) for name, x in sample.items()})
    except ConversionError:  # it takes no batches, whatever it says
        return set()
    return {
        name
        for name, y in values.items()
        if y.ndim in (2, 4)
        and name in twice
        and twice[name].shape != (2 * len(y), *y.shape[1:])
        and twice[name].shape != y.shape
    }


class Runner:
    """Runs a model with onnxruntime.

    What onnxruntime knows no way to run, such as operators of a newer version, `onnx.reference`
    runs.
    """

    def __init__(self, proto: onnx.ModelProto, *, optimize: bool = True) -> None:
        self._proto = proto
        self._session: Any = None
        self._error: Exception | None = None
        try:
            self._session = session(proto, optimize=optimize)
        except Exception as error:  # onnxruntime's exceptions share no useful base
            self._error = error

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs.

        Raises
        ------
        ConversionError
            If neither can run the model on these inputs.
        """
        if self._session is not None:
            # Simplifying removes inputs on which nothing depends.
            known = {value.name for value in self._session.get_inputs()}
            given = {name: x for name, x in inputs.items() if name in known}
            try:
                return list(self._session.run(None, given))
            except Exception as error:
                self._error = error
        if (found := run_reference(self._proto, inputs)) is None:
            raise ConversionError(
                f"onnxruntime cannot run the model: {self._error}"
            ) from self._error
        return found


def run(
    proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray], *, optimize: bool = True
) -> list[np.ndarray]:
    """Run a model once and return its outputs; see `Runner`."""
    return Runner(proto, optimize=optimize)(inputs)


def run_reference(
    proto: onnx.ModelProto, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray] | None:
    """Run a model with `onnx.reference`, slowly; returns its outputs, None if that fails."""
    try:
        with np.errstate(all="ignore"):
            outputs: Any = ReferenceEvaluator(proto).run(None, dict(inputs))
            return list(outputs)
    except Exception:  # it fails in any way that NumPy does
        return None
