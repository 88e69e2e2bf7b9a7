"""From ONNX to a packed file, step by step."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from logshift.converter.extra import require
from logshift.converter.progress import Progress, reporting
from logshift.converter.report import LayerReport, Report, Search
from logshift.converter.settings import AUTO, Settings, Target
from logshift.converter.threads import single_blas
from logshift.converter.verdict import MOST_SAMPLES, Verdict, judge
from logshift.kernels.errors import AccuracyWarning, ConversionError, InputError
from logshift.runtime.file import format
from logshift.runtime.file.describe import layer_bytes
from logshift.runtime.graph import Graph
from logshift.runtime.picture import Preprocessing

if TYPE_CHECKING:
    import onnx

    from logshift.converter.float_graph import FloatGraph
    from logshift.converter.imports.sizes import InputShapes
    from logshift.converter.onnx_model import Model
    from logshift.converter.quantize import LayerError
    from logshift.converter.samples import Calibration, Samples
    from logshift.converter.settings import Validate

_MOST_SAMPLES = 512
_FEWEST_SAMPLES = 16
_MEMORY = 2**30
# Folding reorders float32 sums; anything beyond that means a wrong translation.
_TOLERANCE = 1e-3
_LEAST = 1e-4
# What a model on codes, rounded everywhere, may differ from the float one that it means.
_ROUNDING = 0.5
_OF_HALVES = 2e-3
_SHOWN = 5
_FAITHFUL = 20.0  # dB, where samples are too few to bound what accuracy is lost


def convert(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out: str | os.PathLike[str],
    *,
    calibration: Calibration,
    input_shapes: InputShapes | None = None,
    weight_bits: int | Literal["auto"] | None = None,
    residual_ratio: float | Literal["auto"] = "auto",
    max_bytes: int | None = None,
    max_drop: float | None = None,
    min_snr: float | None = None,
    validate: Validate | None = None,
    activation_bits: int | Literal["auto"] | Mapping[str, int | str] = "auto",
    keep_float: Sequence[str] = (),
    granularity: str = "element",
    tile: int | tuple[int, int] | None = None,
    residual_shift: int = 0,
    activation_range: str = "auto",
    percentile: float = 99.99,
    bias_correction: bool = True,
    error_feedback: bool = True,
    prefer: Literal["speed", "size", "accuracy"] | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    calibration_limit: int | None = None,
    strict: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Convert an ONNX model to a packed power-of-two network.

    Parameters
    ----------
    model : path or onnx.ModelProto
        float32 inputs (N, C, H, W).
    out : path
        The `.stlq` file to write; replaced only once the new one is complete.
    calibration : folder, array or iterable
        Typical inputs: a folder of pictures, a float32 array (N, C, H, W) as the ONNX model takes
        it, a uint8 array of pictures (N, H, W, C), or an iterable of dictionaries with a float32
        array for each input. Tensors of PyTorch or TensorFlow do for arrays.
    input_shapes : mapping of input name to sizes, optional
        Of the model's inputs, for every axis a number, or None (or a name) for any size: what an
        export has fixed is freed, as in ``{"x": (None, 3, None, None)}``, or the other way round.
        Numbers in the graph that were sizes of the input follow; where that cannot be, the node is
        named.
    weight_bits : int, or "auto"
        Bits of a word, 2 to 5; by default 4, or "auto" where `max_bytes`, `max_drop`, `min_snr` or
        `validate` is given. "auto" chooses 3, 4 or 5 and second words for every layer: the smallest
        file that meets `max_drop` or `min_snr`, or the best one within `max_bytes`. It converts
        several times.
    residual_ratio : float, or "auto"
        Share of all weights with a second word, 0 to 1; layers whose errors matter more get more.
        "auto" gives as many as have something left to take from the errors of the outputs. Not used
        with `weight_bits="auto"`.
    max_bytes : int, optional
        Size of the packed file.
    max_drop : float, optional
        By how much the score of `validate` may fall, in its unit. Without `validate` by how many
        points accuracy may fall, with 95 % confidence: a bound that needs no labels, from how sure
        the float network is on samples that do not calibrate, so that it takes some hundreds of
        them for half a point. The first output then holds scores of classes along axis 1. 0.5 by
        default with "auto" or a path for `validate`.
    min_snr : float, optional
        For other networks: least signal-to-noise ratio of the outputs in dB.
    validate : callable(session) -> float, or path, optional
        How good a network is on labels of your own, higher is better. It is called with a session
        of the float model, which has `run`, `inputs`, `outputs` and `labels`, and of at most nine
        packed networks. What is given of `weight_bits`, `residual_ratio`, `activation_bits` and
        `prefer` stays as it is. A path measures top-1 accuracy in percent: a folder with a folder
        of pictures for each class, called by label or index or in the order of the classes, or a
        file whose lines have a picture and its class, by label or index, apart by a comma.
    activation_bits : int, or "auto", or dict of pattern to these
        2 to 8, or 32: activations stay float32, and only weights are quantized. "auto" is 8, 32
        for tensors whose codes would cost the outputs much, and 6 where that is faster, with 3-bit
        weights, and costs them next to nothing. A dictionary gives the bits of nodes
        whose ONNX names fit patterns (`*`, `?`); the first that fits counts, and nodes that fit
        none have 8.
    keep_float : list of str
        Names of ONNX nodes, or patterns (`*`, `?`), that are not quantized at all.
    granularity : {"element", "tile", "filter"}
        What gets second words: single weights, tiles, or output channels.
    tile : (int, int), or int, optional
        With "tile": input by output channels at one kernel position, 1 to 256 each, as an array of
        an accelerator takes at once; see `docs/quantization.md` section 2. By default (16, 16). A
        single number is so many consecutive weights instead, and for other granularities what a
        list of places is cut into in the file, by default 256.
    residual_shift : int
        The second word's grid is 2^residual_shift times finer, 0 to 4.
    activation_range : {"auto", "mse", "minmax", "percentile"}
        How the range of an activation's codes is chosen; "auto" takes for each tensor what costs
        the outputs least.
    percentile : float
        With "percentile": the upper one, 50 to 100, of the values beside zero; the lower one is as
        far from the other end.
    bias_correction : bool
        Whether biases make up for the mean error of quantized layers.
    error_feedback : bool
        Whether weights that are rounded later make up for those before them, as far as the
        calibration data show how; see `docs/quantization.md` section 2.
    prefer : {"speed", "size", "accuracy"}
        What "auto" is to spend least of: time, bytes or accuracy; by default a balance.
    preprocessing : Preprocessing, optional
        How pictures become inputs; stored in the file. Pictures for calibration without it are
        prepared by the default `Preprocessing()`, and the report says so.
    labels : list of str, optional
        Class names; stored in the file.
    calibration_limit : int, optional
        Most samples that calibrate; by default as many as fit into 1 GiB, at most 512. What is
        beyond them measures the outcome, else every fifth sample does, if there are five.
    strict : bool
        Whether a network whose outputs are too far from the float model's is an error, and no file
        is written, rather than a warning; see `docs/quantization.md`, "The verdict".
    report : path, optional
        An HTML file to write: the verdict, what each layer adds to the errors of the outputs,
        histograms, times, pictures side by side, and what would mend weak layers.
    progress : callable(done, total, what), or bool, optional
        By default a progress bar on terminals, if rich is installed.

    Returns
    -------
    Report

    Raises
    ------
    ConversionError
        If the model cannot be converted; lists every offending node. With `strict`, if the packed
        network does not do what the model does.
    InputError
        If a setting or the calibration data does not fit.
    OSError
        If the file cannot be written. Whatever stops a conversion leaves an old file as it was.

    Warns
    -----
    AccuracyWarning
        If outputs of the packed network are too far from the float model's.
    """
    wanted = Target.of(weight_bits, max_bytes, max_drop, min_snr, validate)
    bits = weight_bits if weight_bits is not None else AUTO if wanted else Settings.weight_bits
    settings = Settings(
        weight_bits=Settings.weight_bits if bits == AUTO else bits,  # type: ignore[arg-type]
        residual_ratio=residual_ratio,
        activation_bits=activation_bits,
        granularity=granularity,
        tile=tile,
        residual_shift=residual_shift,
        activation_range=activation_range,
        percentile=percentile,
        bias_correction=bias_correction,
        error_feedback=error_feedback,
        prefer=prefer,
        keep_float=_patterns(keep_float),
    )
    target = Path(out)
    _check_arguments(target, labels, calibration_limit)
    require("converting", "onnx", "onnxruntime", "onnxslim", "threadpoolctl")
    if report is not None:
        from logshift.converter.page import check_target

        check_target("report", report, target)
    from logshift.converter import auto
    from logshift.converter.budget import AUTO_BITS
    from logshift.converter.onnx_model import Runner, load
    from logshift.converter.precision import choose_precision
    from logshift.converter.samples import divide, open_samples, telling_first
    from logshift.converter.score import FloatSession, LabelledPictures, Score

    loaded = load(model, input_shapes)
    preprocessing = preprocessing or loaded.metadata.preprocessing
    labels = loaded.metadata.labels if labels is None else labels
    samples = open_samples(calibration, loaded.inputs, preprocessing)
    network = lowered(loaded, samples, settings)
    place = partial(placed, network, loaded, settings)
    graph = place(())
    _prove(loaded, graph, samples.first)
    if loaded.frees_sizes:
        _prove(loaded, graph, _enlarged(samples.first, loaded))
    limit = calibration_limit or _limit(graph)
    # What a plan does to the outputs is measured on as many as there are, a batch at a time.
    chooses = wanted is not None and wanted.max_bytes is None and validate is None
    most = _readable(loaded) if chooses and calibration_limit is None else limit + MOST_SAMPLES
    data, batches = _whole_batches(samples.read(most), loaded)
    size = loaded.inputs[0].batch
    divided = divide(
        data, batches, max(limit // size, 1), batches if chooses else max(MOST_SAMPLES // size, 1)
    )

    # What a target that was not given needs, old calls may not have.
    implied = wanted is not None and (max_bytes, max_drop, min_snr, validate) == (None,) * 4
    if too_few := implied and divided.samples_held_back < auto.FEWEST:
        wanted = Target(min_snr=_FAITHFUL)

    def finish(packed: Graph, graph: FloatGraph) -> None:
        if samples.preprocessing is not None:
            packed.preprocessing = samples.preprocessing.to_manifest()
        packed.labels = list(labels) if labels is not None else None
        packed.settings = asdict(settings) | {"float_tensors": sorted(graph.floats)}
        packed.producer = f"logshift {version('logshift')}"
        if wanted:
            packed.settings |= {"weight_bits": bits, **asdict(wanted)}
            if bits == AUTO:
                packed.settings["residual_ratio"] = AUTO

    shell = Graph(graph.inputs, graph.outputs, {}, [])
    finish(shell, graph)
    if validate is not None and not callable(validate):
        validate = LabelledPictures(validate, shell)

    with single_blas(), reporting(progress) as show:
        run = Runner(loaded.original)
        divided = telling_first(divided, run)
        scored: Score | None = None
        if wanted and wanted.max_drop is not None and validate is not None:
            show(0, 1, "measuring the float model")
            scored = Score(validate, FloatSession(loaded.given, shell), wanted.max_drop)
        precise = partial(
            choose_precision, network, graph, place, divided.calibration, divided.batches
        )
        graph = precise(settings, show)
        make = auto.Maker(divided, settings, AUTO_BITS if bits == AUTO else None, finish, show)
        search: Search | None = None
        if wanted is None:
            packed, errors = make(graph, None)
        else:
            refine = None
            if prefer is None:
                refine = partial(precise, replace(settings, prefer="accuracy"), show)
            made = auto.find(graph, make, wanted, scored, run, refine)
            graph, packed, errors, search = made.graph, made.packed, made.errors, made.search
        verdict, shown = judge(loaded, graph, packed, divided, show)
        if strict and verdict.warning:
            raise ConversionError(f"{verdict.warning}; nothing was written")
        file_bytes = format.write(packed, target)
        count = len(next(iter(divided.calibration.values())))
        notes = _notes(samples, preprocessing, loaded, packed) + _notes_on_given(graph, packed)
        if too_few:
            notes.append(
                f"samples are too few to bound what accuracy is lost: outputs of {_FAITHFUL:g} dB"
                " were aimed at"
            )
        found = _report(
            target, packed, errors, file_bytes, loaded.size, count, notes, verdict, search
        )
        if report is not None:
            from logshift.converter.page import gather, write_page

            reference = Runner(loaded.given)
            write_page(gather(found, packed, graph, reference, shown, show), report)
    if verdict.warning:
        warnings.warn(f"{os.fspath(target)}: {verdict.warning}", AccuracyWarning, stacklevel=2)
    return found


def _patterns(keep_float: Sequence[str]) -> tuple[str, ...]:
    if isinstance(keep_float, str) or not all(isinstance(name, str) for name in keep_float):
        raise InputError("keep_float must be a list of node names or patterns")
    return tuple(keep_float)


def _check_arguments(
    target: Path, labels: Sequence[str] | None, calibration_limit: int | None
) -> None:
    if not target.parent.is_dir():
        raise InputError(f"out: the directory {os.fspath(target.parent)!r} does not exist")
    if target.is_dir():
        raise InputError(f"out: {os.fspath(target)!r} is a directory")
    if target.exists() and not target.is_file():
        raise InputError(f"out: {os.fspath(target)!r} is not a regular file")
    if not os.access(os.path.dirname(os.path.realpath(target)), os.W_OK):
        raise InputError(
            f"out: the directory of {os.fspath(target)!r} cannot be written to; choose another one"
        )
    if labels is not None and (
        isinstance(labels, str) or not all(isinstance(label, str) for label in labels)
    ):
        raise InputError("labels must be a list of strings")
    if calibration_limit is not None and (
        type(calibration_limit) is not int or calibration_limit < 1
    ):
        raise InputError(f"calibration_limit is {calibration_limit!r}; it must be at least 1")


def lowered(model: Model, samples: Samples, settings: Settings) -> FloatGraph:
    """Lower and fuse."""
    from logshift.converter.float_graph import Problems
    from logshift.converter.fuse import fuse
    from logshift.converter.lower import lower
    from logshift.converter.onnx_model import trace
    from logshift.converter.operators.registry import LOWERINGS
    from logshift.converter.qdq import settle
    from logshift.converter.rearrange import rearrange
    from logshift.converter.refusals import refuse

    refuse(model.proto.graph, model.left, LOWERINGS)
    _check_import(model, samples.first)
    problems = Problems()
    shown = trace(model, samples.first)
    if rearrange(model, shown):
        shown = trace(model, samples.first)
    graph = lower(model, shown, problems)
    problems.raise_if_any()
    fuse(graph)
    names = [node.name or node.output[0] for node in model.proto.graph.node]
    settings.check_names(dict.fromkeys([node.name for node in graph.nodes] + names))
    kept = {
        node.name or node.output[0]
        for node in model.proto.graph.node
        if not model.metadata.keep_float.isdisjoint(node.input)
    }
    for node in graph.nodes:
        node.keeps_weight = node.name in kept or settings.keeps_float(node.name)
    settle(graph)
    return graph


def placed(
    network: FloatGraph, model: Model, settings: Settings, floats: Collection[str]
) -> FloatGraph:
    """Decide what is codes, with what makes some tensors on float32, and fuse functions."""
    from logshift.converter.constant_words import find_weights
    from logshift.converter.fuse import fuse_functions
    from logshift.converter.place import place
    from logshift.converter.qdq import saturate
    from logshift.converter.shared import share

    graph, bits = network.copy(), settings.activation_bits_of
    graph.floats = frozenset(floats)
    place(
        graph,
        lambda node: node.keeps_weight or node.output in floats or bits(node.name) == 32,
    )
    fuse_functions(graph, lambda node, table: bits(node.name) == bits(table.name))
    saturate(graph)
    share(graph)
    find_weights(graph, model.metadata.weights)
    return graph


def _prove(model: Model, graph: FloatGraph, sample: Mapping[str, np.ndarray]) -> None:
    """Prove on a sample that the function is still the same."""
    from logshift.converter.evaluate import evaluate_graph
    from logshift.converter.onnx_model import run, run_reference

    found = evaluate_graph(graph, sample)
    expected = run(model.original, sample)
    worst = max(_differences(expected, found))
    if not worst <= _TOLERANCE and (reference := run_reference(model.original, sample)):
        # Where onnxruntime departs from the specification, that counts.
        expected = min(expected, reference, key=lambda outputs: max(_differences(outputs, found)))
    rounds = graph.code_tensors or any(node.is_quantized for node in graph.nodes)
    names = [value.name for value in model.original.graph.output]
    for name, y, error in zip(names, expected, _differences(expected, found), strict=True):
        if rounds and y.dtype.kind == "f" and not np.isfinite(y).all():
            raise ConversionError(
                f"output {name!r}: the ONNX model itself produces NaN or infinity on the"
                " calibration data"
            )
        # float16 has no more digits.
        precise = _TOLERANCE if y.dtype != np.float16 else _OF_HALVES
        if not error <= precise:
            raise ConversionError(
                f"output {name!r}: the translated network differs from the ONNX model by"
                f" {error:.2g} (relative) before any quantization; please report this model"
            )


def _enlarged(sample: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """Return a sample that is twice as long along every axis whose size is free."""
    return {
        info.name: np.tile(sample[info.name], [1 + isinstance(dim, str) for dim in info.shape])
        for info in model.inputs
    }


def _check_import(model: Model, sample: Mapping[str, np.ndarray]) -> None:
    """Prove on a sample that the model in plain form is the one that was given."""
    from logshift.converter.onnx_model import run

    if model.forms is None:
        return
    before, after = model.forms
    try:
        given = run(before, sample)
    except ConversionError:  # nobody can run it as it is
        return
    tolerance = _ROUNDING if model.rounds else _TOLERANCE
    names = [value.name for value in before.graph.output]
    for name, y, z in zip(names, given, run(after, sample), strict=True):
        if y.shape != z.shape or y.dtype != z.dtype:
            difference = f"is {z.dtype} of shape {z.shape} and not {y.dtype} of shape {y.shape}"
        elif model.rounds and not (y.dtype.kind == "f" and np.isfinite(y).all()):
            continue
        elif _difference(y, z) > tolerance:
            difference = f"differs by {_difference(y, z):.2g} (relative)"
        else:
            continue
        raise ConversionError(
            f"output {name!r}: brought into standard float operators it {difference}; please"
            " report this model"
        )


def _differences(expected: Sequence[np.ndarray], found: Mapping[str, np.ndarray]) -> list[float]:
    """Differences of all outputs, in order."""
    return [_difference(y, z) for y, z in zip(expected, found.values(), strict=True)]


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Relative size of the difference; for anything but floats, the share of values that differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if expected.dtype.kind != "f":
        return float((expected != found).mean()) if expected.size else 0.0
    finite = np.isfinite(expected)
    same = np.array_equal(expected[~finite], found[~finite], equal_nan=True)
    expected, found = expected[finite], found[finite]
    if not same or not np.isfinite(found).all():
        return math.inf
    # Of outputs that are almost nothing, like a sigmoid's, not even onnxruntime knows more.
    least = _LEAST * math.sqrt(expected.size)
    norm = max(float(np.linalg.norm(expected.astype(np.float64))), least, 1e-30)
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / norm


def _whole_batches(data: dict[str, np.ndarray], model: Model) -> tuple[dict[str, np.ndarray], int]:
    """Cut calibration data to whole batches of the model; returns their number as well."""
    batches = min(max(len(data[info.name]) // info.batch, 1) for info in model.inputs)
    return {
        info.name: np.resize(x, (batches * info.batch, *x.shape[1:]))
        if len(x := data[info.name]) < info.batch
        else x[: batches * info.batch]
        for info in model.inputs
    }, batches


def _readable(model: Model) -> int:
    """Return how many samples to read at most."""
    size = sum(
        4 * int(np.prod([d for d in i.shape[1:] if isinstance(d, int)])) for i in model.inputs
    )
    return _fitting(max(size, 1))


def _limit(graph: FloatGraph) -> int:
    from logshift.converter.quantize import bytes_per_picture

    return _fitting(bytes_per_picture(graph))


def _fitting(size: int) -> int:
    """Return how many samples of so many bytes to use at most."""
    return int(np.clip(_MEMORY // size, _FEWEST_SAMPLES, _MOST_SAMPLES))


def _notes(
    samples: Samples, preprocessing: Preprocessing | None, model: Model, packed: Graph
) -> list[str]:
    notes = []
    if preprocessing is None and samples.preprocessing is not None:
        notes.append(
            f"assumed {samples.preprocessing}; give preprocessing if the model was trained"
            " otherwise"
        )
    for before, after in zip(model.inputs, packed.inputs, strict=True):
        if before.shape != after.shape and len(before.shape) == 4:
            notes.append(
                f"input {after.name!r} is fixed to {after.nominal[1:]} in all axes but the first:"
                " the model computes sizes from it"
            )
    return notes


def _notes_on_given(graph: FloatGraph, packed: Graph) -> list[str]:
    """Say what was taken from a quantized model as it is, and what was not."""
    notes = []
    words = [node.words is not None for node in graph.nodes if node.is_quantized]
    if any(words):
        notes.append(f"weights of {sum(words)} of {len(words)} layers were words already: kept")
    calibrated = [name for name in packed.quantization if name not in graph.quantization]
    if graph.quantization and packed.quantization:
        count = len(packed.quantization) - len(calibrated)
        note = f"ranges of {count} of {len(packed.quantization)} tensors are the model's"
        if calibrated:
            shown = ", ".join(map(repr, calibrated[:_SHOWN])) + " ..." * (len(calibrated) > _SHOWN)
            note += f"; calibrated: {shown}"
        notes.append(note)
    return notes


def _report(
    target: Path,
    graph: Graph,
    errors: list[LayerError],
    file_bytes: int,
    onnx_bytes: int,
    samples: int,
    notes: list[str],
    verdict: Verdict,
    search: Search | None,
) -> Report:
    sizes = layer_bytes(target)
    layers, weights, residuals = [], 0, 0
    for index, (node, error) in enumerate(zip(graph.nodes, errors, strict=True)):
        fields: dict[str, Any] = {}
        if node.weights is not None:
            fields = {
                "weight_shape": node.weights.shape,
                "bits": node.weights.bits,
                "nzr": node.weights.nzr,
            }
            weights += node.weights.first.size
            residuals += int(np.count_nonzero(node.weights.second))
        layers.append(
            LayerReport(
                node.name,
                node.op,
                error.output_snr_db,
                sizes[index],
                weight_snr_db=error.weight_snr_db,
                **fields,
            )
        )
    for words in graph.constant_words.values():
        weights += words.weights.first.size
        residuals += int(np.count_nonzero(words.weights.second))
    return Report(
        os.fspath(target),
        layers,
        file_bytes,
        onnx_bytes,
        weights,
        residuals / max(weights, 1),
        samples,
        graph.settings,
        notes,
        verdict,
        search,
    )
