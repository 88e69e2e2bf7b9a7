"""Compare a packed network with the ONNX model it came from, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logshift.converter.compare import Sums
from logshift.converter.extra import require
from logshift.converter.progress import bar
from logshift.converter.verdict import Verdict, compare, verdict_on
from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime import Session, load
from logshift.runtime.table import text_table

if TYPE_CHECKING:
    import onnx

    from logshift.converter.onnx_model import Model, Runner

_SHOWN = 4  # batches that a page is about


@dataclass(frozen=True)
class TensorError:
    """How far one tensor of the packed network is from the ONNX model's.

    Attributes
    ----------
    name, op : str
        The tensor, and the packed operation that makes it.
    snr_db : float
        10 log10(sum of squares of the ONNX values / sum of squared differences); infinite if equal.
    cosine : float
        Cosine of the angle between both; NaN if one of them is zero.
    """

    name: str
    op: str
    snr_db: float
    cosine: float


@dataclass(frozen=True)
class Verification:
    """Result of `verify`; `str()` is a table, `to_dict()` is for JSON.

    Attributes
    ----------
    tensors : list of TensorError, in execution order
        Tensors that both networks have under one name and in one shape.
    output : str
        Name of the first output.
    agreement : float
        Share of positions at which the largest channel of the first output is the same.
    samples : int
    verdict : Verdict, optional
        Of all outputs.
    """

    tensors: list[TensorError]
    output: str
    agreement: float
    samples: int
    verdict: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; infinite and undefined ratios are None."""
        record = asdict(self)
        record["verdict"] = self.verdict and self.verdict.to_dict()
        for tensor in record["tensors"]:
            for key in ("snr_db", "cosine"):
                if not math.isfinite(tensor[key]):
                    tensor[key] = None
        return record

    def __str__(self) -> str:
        """Return a table of the tensors, the agreement of the first output, and the verdict."""
        rows = [("tensor", "op", "SNR dB", "cosine")]
        rows += [(t.name, t.op, f"{t.snr_db:.1f}", f"{t.cosine:.5f}") for t in self.tensors]
        lines = [
            text_table(rows, left=2),
            f"first output {self.output!r}: same top-1 for {100 * self.agreement:.1f} % of"
            f" {self.samples} samples",
            *([str(self.verdict)] if self.verdict else []),
        ]
        return "\n".join(lines)


def verify(
    model: str | os.PathLike[str] | onnx.ModelProto,
    packed: str | os.PathLike[str] | Session,
    inputs: np.ndarray | Iterable[Any],
    *,
    html: str | os.PathLike[str] | None = None,
) -> Verification:
    """Run both networks on the same inputs and compare all tensors that they share.

    Parameters
    ----------
    model : path or onnx.ModelProto
    packed : path or Session
    inputs : float32 array (N, C, H, W), or iterable
        An iterable gives one input after the other, each as `Session.run` takes it: pictures,
        arrays with their batch, or dictionaries of arrays.
    html : path, optional
        A page to write that shows more: what each layer adds to the errors of the outputs,
        histograms, times, pictures. `packed` is a path then.

    Returns
    -------
    Verification

    Raises
    ------
    ConversionError
        If the model is none that can be converted, or has not the packed network's inputs and
        outputs.
    InputError
        If an input does not fit, or there is none.
    """
    require("verifying", "onnx", "onnxruntime", "onnxslim")
    path = None if isinstance(packed, Session) else Path(packed)
    if html is not None:
        if path is None:
            raise InputError("html: give the path of the packed file, not a session")
        from logshift.converter.page import check_target

        check_target("html", html, path)
    session = packed if isinstance(packed, Session) else load(packed)
    loaded = _load(model, session)
    reference, names = _reference(loaded, session)
    output = session.outputs[0].name
    sums: dict[str, Sums] = {}
    outputs = compare(session.inputs, session.outputs, session.labels)
    same = positions = samples = 0
    batches: list[dict[str, np.ndarray]] = []
    for sample in _each(inputs, session):
        found = session.trace(sample)
        arrays = {info.name: found[info.name] for info in session.inputs}
        if html is not None and len(batches) < _SHOWN:
            batches.append(arrays)
        expected = dict(zip(names, reference(arrays), strict=True))
        for name in names:
            x, y = expected[name], found.get(name)
            if y is not None and x.dtype.kind == "f" and x.shape == y.shape:
                sums.setdefault(name, Sums()).add(x.reshape(1, -1), y.reshape(1, -1))
        for info, error in zip(session.outputs, outputs, strict=True):
            error.add(expected[info.name], found[info.name])
        if expected[output].shape != found[output].shape:
            raise ConversionError(
                f"output {output!r} has shape {expected[output].shape} in the ONNX model and"
                f" {found[output].shape} in the packed file"
            )
        axis = min(1, expected[output].ndim - 1)
        agree = expected[output].argmax(axis) == found[output].argmax(axis)
        same, positions = same + int(agree.sum()), positions + agree.size
        samples += len(found[output])
    if not samples:
        raise InputError("there are no inputs to compare on")
    ops = {name: node.op for node in session.graph.nodes for name in node.outputs}
    verdict = verdict_on([e.error() for e in outputs], samples, session.graph.settings)
    if html is not None and path is not None:
        from logshift.converter.page import write_page
        from logshift.converter.page.verified import page_of_file

        snr_db = {name: error.snr_db() for name, error in sums.items()}
        with bar("measuring") as show:
            page = page_of_file(loaded, path, session.graph, verdict, snr_db, batches, show)
        write_page(page, html)
    return Verification(
        [TensorError(n, ops[n], s.snr_db(), s.cosine()) for n, s in sums.items()],
        output,
        same / positions,
        samples,
        verdict,
    )


def _each(inputs: np.ndarray | Iterable[Any], session: Session) -> Iterator[Any]:
    """One input of the network after the other: arrays are cut into the model's own batches."""
    if not (isinstance(inputs, np.ndarray) and inputs.dtype.kind == "f"):
        yield from inputs
        return
    dim = session.inputs[0].shape[0]
    size = dim if isinstance(dim, int) else 1
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def _load(model: str | os.PathLike[str] | onnx.ModelProto, session: Session) -> Model:
    """Load the model as `convert` has, with the sizes that it was told for the inputs."""
    from logshift.converter.onnx_model import load

    loaded = load(model)
    packed = {info.name: info.shape for info in session.inputs}
    shapes = {info.name: info.shape for info in loaded.inputs}
    if missing := packed.keys() - shapes.keys():
        raise _of_another(min(missing))
    other = {n: shape for n, shape in packed.items() if shape != shapes[n]}
    if any(len(shape) != len(shapes[n]) for n, shape in other.items()):
        raise _of_another(min(other))
    if not other:
        return loaded
    try:
        return load(model, other)
    except ConversionError as error:
        raise ConversionError(
            f"the packed file was made from another model, or this one cannot have its sizes:"
            f" {error}"
        ) from error


def _reference(loaded: Model, session: Session) -> tuple[Runner, list[str]]:
    """Return what computes every tensor of the packed network, and these tensors' names."""
    import onnx

    from logshift.converter.imports.declared import forget
    from logshift.converter.onnx_model import Runner

    proto = onnx.ModelProto()
    proto.CopyFrom(loaded.given)
    forget(proto)
    computed = {name for node in proto.graph.node for name in node.output}
    if missing := {info.name for info in session.outputs} - computed:
        raise _of_another(min(missing))
    names = [
        name for node in session.graph.nodes for name in node.outputs if name and name in computed
    ]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return Runner(proto), names


def _of_another(name: str) -> ConversionError:
    return ConversionError(
        f"the ONNX model has no such input or output {name!r}: the packed file was made from"
        " another model"
    )
