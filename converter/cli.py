"""The command `logshift`: convert, look at, run, time and verify packed networks.

Heavy packages are imported by the commands that need them: `logshift info` needs no onnx.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import numpy as np

from logshift.kernels.errors import ConversionError, FormatError, InputError, LogshiftError

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress
except ModuleNotFoundError:
    # This module is the command and nothing else: a sentence is all that anybody wants from it.
    sys.exit("error: the command line needs typer and rich: pip install 'logshift[cli]'")

if TYPE_CHECKING:
    from logshift.runtime import Preprocessing, Session, Warmed

DEMO = Path(__file__).parent / "demo"
_TOP = 5
_BLOCK_SECONDS = 0.05

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Kernels(str, Enum):
    """Kernel families that a user may ask for."""

    auto = "auto"
    dot = "dot"
    shift = "shift"
    portable = "portable"
    reference = "reference"


class Granularity(str, Enum):
    """What gets second words."""

    element = "element"
    tile = "tile"
    filter = "filter"


class ActivationRange(str, Enum):
    """How activation ranges are chosen."""

    mse = "mse"
    minmax = "minmax"
    percentile = "percentile"


class Interpolation(str, Enum):
    """How pictures are resized."""

    nearest = "nearest"
    bilinear = "bilinear"
    bicubic = "bicubic"


Packed = Annotated[Path, typer.Argument(metavar="FILE.stlq", help="A packed network.")]
Onnx = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A float32 ONNX model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads per run.", show_default="all cores of this process"),
]
KernelFamily = Annotated[
    Kernels, typer.Option(help="Kernel family; the results are the same, bit for bit.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors are one line on the error stream and exit code 1."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="logshift")
    except (LogshiftError, OSError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    sys.exit(f"error: {' '.join(str(error).split())}")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"logshift {importlib.metadata.version('logshift')}")
        raise typer.Exit


@app.callback()
def _logshift(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run power-of-two (STLQ) quantized CNNs fast on ordinary CPUs.

    `logshift demo` shows all of it in a minute. Then, with a network of your own:

    - `logshift convert model.onnx model.stlq --calibration pictures/`

    - `logshift run model.stlq photo.jpg`
    """


# --- convert ------------------------------------------------------------------------------------


@app.command()
def convert(
    model: Onnx,
    out: Annotated[Path, typer.Argument(metavar="FILE.stlq", help="The packed file to write.")],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Typical inputs: a folder of pictures, or a .npy file with a float32 array"
            " (N, C, H, W) as the model takes it or uint8 pictures (N, H, W, C)."
        ),
    ],
    bits: Annotated[
        str,
        typer.Option(
            "--bits",
            "--weight-bits",
            metavar="N|auto",
            help="Bits of a weight word, 2 to 5; or 'auto': for every layer what is best.",
        ),  # fmt: skip
    ] = "4",
    residual_ratio: Annotated[
        float, typer.Option(help="Share of weights that get a second word, 0 to 1.")
    ] = 0.15,
    max_bytes: Annotated[
        int | None, typer.Option(help="With --bits auto: the best file of at most this size.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="With --bits auto: the smallest file that costs at most so many points of"
            " accuracy, estimated on calibration pictures.",
            show_default="0.5",
        ),
    ] = None,
    min_snr: Annotated[
        float | None,
        typer.Option(
            help="With --bits auto: the smallest file whose outputs have this signal-to-noise ratio"
            " in dB; for networks that do not classify."
        ),
    ] = None,
    activation_bits: Annotated[
        int, typer.Option(help="Bits of activations, 2 to 8; 32 quantizes weights alone.")
    ] = 8,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An ONNX node, or a pattern of names like 'head/*', that is not quantized at all;"
            " may be given several times.",
            show_default="none",
        ),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="What gets second words: weights, tiles or whole filters.")
    ] = Granularity.element,
    tile: Annotated[int, typer.Option(help="Weights per tile, 1 to 256.")] = 256,
    residual_shift: Annotated[
        int, typer.Option(help="Second words on a grid 2^N times finer, 0 to 4.")
    ] = 0,
    activation_range: Annotated[
        ActivationRange, typer.Option(help="How activation ranges are chosen.")
    ] = ActivationRange.mse,
    bias_correction: Annotated[
        bool, typer.Option(help="Let biases make up for the mean error of quantized layers.")
    ] = True,
    error_feedback: Annotated[
        bool, typer.Option(help="Let weights make up for the rounding of those before them.")
    ] = True,
    mean: Annotated[
        str | None,
        typer.Option(help="Per channel, in units of pixel / 255.", show_default="ImageNet's"),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(help="Per channel, in units of pixel / 255.", show_default="ImageNet's"),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Length of the shorter side before the crop, or exact size.",
            show_default="what the crop needs",
        ),
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="HxW", help="Centre crop.", show_default="input size")
    ] = None,
    bgr: Annotated[bool, typer.Option("--bgr", help="Channels in the order BGR.")] = False,
    interpolation: Annotated[
        Interpolation, typer.Option(help="How pictures are resized.")
    ] = Interpolation.bilinear,
    labels: Annotated[
        Path | None, typer.Option(help="Text file of class names, one a line.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an ONNX model to a packed file.

    Preprocessing (mean, std, resize, crop ...) is stored in the file, so that it takes pictures.

    **Examples**

    - `logshift convert resnet18.onnx resnet18.stlq --calibration photos/ --resize 256`

    - `logshift convert net.onnx net.stlq --calibration inputs.npy --bits 3 --residual-ratio 0.3`

    - `logshift convert net.onnx net.stlq --calibration photos/ --bits auto --max-bytes 2000000`
    """
    from logshift import converter

    pictures = calibration.suffix != ".npy"
    data: Any = calibration if pictures else _load_array(calibration)
    given = mean or std or resize or crop or bgr or interpolation is not Interpolation.bilinear
    report = converter.convert(
        model,
        out,
        calibration=data,
        weight_bits=_bits(bits),
        residual_ratio=residual_ratio,
        max_bytes=max_bytes,
        max_drop=max_drop,
        min_snr=min_snr,
        activation_bits=activation_bits,
        keep_float=keep_float or (),
        granularity=granularity.value,
        tile=tile,
        residual_shift=residual_shift,
        activation_range=activation_range.value,
        bias_correction=bias_correction,
        error_feedback=error_feedback,
        preprocessing=_preprocessing(mean, std, resize, crop, bgr, interpolation.value)
        if given
        else None,
        labels=None if labels is None else _lines(labels),
    )
    _show(report.to_dict(), str(report), as_json)


def _bits(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise InputError(f"--bits {text!r}: give a number from 2 to 5, or auto")
    return int(text)


def _preprocessing(
    mean: str | None, std: str | None, resize: str | None, crop: str | None, bgr: bool,
    interpolation: str,
) -> Preprocessing:  # fmt: skip
    from logshift.runtime import Preprocessing
    from logshift.runtime.picture import IMAGENET_MEAN, IMAGENET_STD

    return Preprocessing(
        resize=None if resize is None else int(resize) if resize.isdecimal() else _size(resize),
        crop=None if crop is None else _size(crop),
        mean=IMAGENET_MEAN if mean is None else _numbers("mean", mean),
        std=IMAGENET_STD if std is None else _numbers("std", std),
        channel_order="BGR" if bgr else "RGB",
        interpolation=interpolation,
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} {text!r}: give numbers like 0.485,0.456,0.406") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"size {text!r}: give height and width like 224x224")
    return int(height), int(width)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None


# --- info ---------------------------------------------------------------------------------------


@app.command()
def info(
    packed: Packed,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Load the file and show the kernel chosen for each layer."),
    ] = False,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost", help="Load the file and count shifts and adds, bits moved and cycles."
        ),
    ] = False,
    tile: Annotated[
        str,
        typer.Option(
            metavar="PxQ", help="Output channels and inputs per cycle of the array of --cost."
        ),
    ] = "16x16",
    as_json: Json = False,
) -> None:
    """Show what a packed file holds, without loading its weights.

    **Examples**

    - `logshift info model.stlq`

    - `logshift info model.stlq --json | jq .bits_per_weight`

    - `logshift info model.stlq --cost --tile 8x32`
    """
    if kernels and cost:
        raise InputError("--kernels and --cost are different tables: give one of them")
    if kernels:
        session = _load(packed)
        summary = session.summary()
        _show(summary.to_dict(), str(summary), as_json)
        return
    if cost:
        from logshift.runtime.cost import cost as count
        from logshift.runtime.file import format

        sides = _tile(tile)
        counted = count(format.read(packed), sides)
        _show(counted.to_dict(), str(counted), as_json)
        return
    record = _describe(packed)
    _show(record, _description(record), as_json)


def _tile(text: str) -> tuple[int, int]:
    try:
        outputs, inputs = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--tile {text!r}: give output channels and inputs like 16x16") from None
    return outputs, inputs


def _describe(path: Path) -> dict[str, Any]:
    """Everything that `info` shows, from the header and the counts of second words."""
    import safetensors

    from logshift.converter.report import layer_bytes
    from logshift.runtime.file import format

    manifest = format.read_manifest(path)
    try:
        sizes = layer_bytes(path)
        with safetensors.safe_open(path, framework="np") as tensors:
            nodes = [
                _describe_node(index, node, manifest["tensors"], sizes[index], tensors)
                for index, node in enumerate(manifest["nodes"])
            ]
        layers = [node for node in nodes if "bits" in node]
        weights = sum(node["weights"] for node in layers)
        return {
            "file": str(path),
            "bytes": path.stat().st_size,
            "format_version": manifest["format_version"],
            "inputs": [_value(v) for v in manifest["inputs"]],
            "outputs": [_value(v) for v in manifest["outputs"]],
            "preprocessing": manifest.get("preprocessing"),
            "labels": manifest.get("labels"),
            "settings": dict(manifest["settings"]),
            "nodes": nodes,
            "weights": weights,
            "bits_per_weight": 8 * sum(node["bytes"] for node in layers) / max(weights, 1),
            "nzr": sum(node["nzr"] * node["weights"] for node in layers) / max(weights, 1),
        }
    # What is not validated here is validated on loading, which also names the rule.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, zlib.error,
            safetensors.SafetensorError) as error:  # fmt: skip
        raise FormatError(f"{path}: the file is damaged ({error})") from error


def _value(record: dict[str, Any]) -> dict[str, Any]:
    dtype = record.get("dtype", "float32")
    return {"name": record["name"], "shape": list(record["shape"]), "dtype": dtype}


def _describe_node(
    index: int, node: dict[str, Any], codes: dict[str, Any], size: int, tensors: Any
) -> dict[str, Any]:
    from logshift.runtime.onnx_ops import compiled
    from logshift.runtime.session import numpy_name

    runs = "float32" if codes.keys().isdisjoint(node["inputs"] + node["outputs"]) else "codes"
    if node.get("domain"):
        # For some it depends on types and sizes, which are not inferred here.
        runs = "float32 or numpy" if node["op"] in compiled.OPERATORS else numpy_name(node["op"])
    result = {"name": node["name"], "op": node["op"], "runs": runs, "bytes": size}
    if "weight" in node:
        weight = node["weight"]
        count = math.prod(weight["shape"])
        result |= {"weight_shape": weight["shape"], "weights": count}
        if "bits" in weight:
            result["bits"] = weight["bits"]
            result["nzr"] = _second_words(index, weight, count, tensors) / count
    return result


def _second_words(index: int, weight: dict[str, Any], count: int, tensors: Any) -> int:
    """Count the second words of a layer by its tile counts or bitmap."""
    if weight["positions"] == "none":
        return 0
    name = "count" if weight["positions"] == "list" else "position"
    raw = tensors.get_tensor(f"{index}.{name}").tobytes()
    if name in weight["zlib"]:
        raw = zlib.decompressobj().decompress(raw, 2 * count)
    if name == "count":
        return int(np.frombuffer(raw, "<u2").sum(dtype=np.int64))
    return int(np.unpackbits(np.frombuffer(raw, np.uint8)).sum(dtype=np.int64))


def _description(record: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    def value(record: dict[str, Any]) -> str:
        dtype = "" if record["dtype"] == "float32" else f"{record['dtype']} "
        return f"{record['name']} {dtype}({', '.join(map(str, record['shape']))})"

    def values(key: str) -> str:
        return ", ".join(map(value, record[key]))

    def pairs(record: dict[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in record.items() if v is not None)

    lines = [
        f"{record['file']}: {record['bytes']:,} bytes, format version {record['format_version']}",
        f"inputs: {values('inputs')}",
        f"outputs: {values('outputs')}",
    ]
    if record["preprocessing"]:
        lines.append(f"preprocessing: {pairs(record['preprocessing'])}")
    if labels := record["labels"]:
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        lines.append(f"labels: {len(labels)}: {shown}")
    if record["settings"]:
        lines.append(f"settings: {pairs(record['settings'])}")
    rows = [("node", "op", "runs", "weights", "bits", "NZR %", "bytes")]
    for node in record["nodes"]:
        rows.append(
            (
                node["name"],
                node["op"],
                node["runs"],
                "x".join(map(str, node.get("weight_shape", ()))),
                str(node.get("bits", "")),
                f"{100 * node['nzr']:.1f}" if "nzr" in node else "",
                f"{node['bytes']:,}" if node["bytes"] else "",
            )
        )
    lines += ["", text_table(rows, left=4), ""]
    lines.append(
        f"{record['weights']:,} weights, {record['bits_per_weight']:.2f} bits per weight,"
        f" NZR {100 * record['nzr']:.1f} %"
    )
    return "\n".join(lines)


# --- run ----------------------------------------------------------------------------------------


@app.command()
def run(
    packed: Packed,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, folders of pictures, or .npy files as the model takes them."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the outputs of all inputs: .npy, or .npz."),
    ] = None,
    threads: Threads = None,
    kernels: KernelFamily = Kernels.auto,
    as_json: Json = False,
) -> None:
    """Run a network on pictures and print the five best classes, or write its outputs.

    Scores are the network's outputs as they are. Pictures need a file that holds preprocessing.

    **Examples**

    - `logshift run model.stlq cat.jpg dog.jpg`

    - `logshift run model.stlq batch.npy --output logits.npy`
    """
    session = _load(packed, threads=threads, kernels=kernels.value)
    labels, records, collected = session.labels or [], [], []
    for path in _expanded(inputs):
        result = session.run(_load_array(path) if path.suffix == ".npy" else _picture(path))
        outputs = result if isinstance(result, dict) else {session.outputs[0].name: result}
        collected.append(outputs)
        first = outputs[session.outputs[0].name]
        for i, scores in enumerate(first):
            name = str(path) if len(first) == 1 else f"{path}[{i}]"
            records.append({"input": name} | _best(scores, labels))
    if output is not None:
        _write(output, collected)
    text = "\n".join(f"{record['input']}: {_best_text(record)}" for record in records)
    _show(records, text, as_json)


def _best(scores: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    if scores.ndim != 1:
        return {"shape": list(scores.shape)}
    order = np.argsort(-scores, kind="stable")[:_TOP]
    return {
        "top": [
            {
                "class": int(k),
                "label": labels[k] if k < len(labels) else None,
                "score": float(scores[k]),
            }
            for k in order
        ]
    }


def _best_text(record: dict[str, Any]) -> str:
    if "top" not in record:
        return f"output of shape {tuple(record['shape'])}; --output writes it"
    return ", ".join(
        f"{'class ' + str(c['class']) if c['label'] is None else c['label']} {c['score']:.2f}"
        for c in record["top"]
    )


def _write(path: Path, collected: list[dict[str, np.ndarray]]) -> None:
    try:
        arrays = {name: np.concatenate([o[name] for o in collected]) for name in collected[0]}
    except ValueError:
        raise InputError(
            "the inputs give outputs of different sizes; write one at a time"
        ) from None
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]  # its stub mistakes them for options
    elif path.suffix == ".npy" and len(arrays) == 1:
        np.save(path, next(iter(arrays.values())))
    else:
        raise InputError(f"--output {path}: give a .npz file, or .npy for a single output")


# --- bench --------------------------------------------------------------------------------------


@app.command()
def bench(
    packed: Packed,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.onnx", help="Time onnxruntime on this float32 model in turns with it."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per run.")] = 1,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Threads per run; may be repeated.", show_default="1 and 2"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time to spend on each number of threads.")
    ] = 3.0,
    kernels: KernelFamily = Kernels.auto,
    layers: Annotated[bool, typer.Option("--layers", help="Show the time of every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the latency of a packed network.

    Blocks of runs, in turns A B A B if there is something to compare with: only ratios from one
    command mean anything. Medians, and in brackets the 10th to 90th percentile of the blocks.

    **Examples**

    - `logshift bench model.stlq`

    - `logshift bench model.stlq --against model.onnx --threads 1`
    """
    records = []
    for count in threads or [1, 2]:
        session = _load(packed, threads=count, kernels=kernels.value)
        x = _random_inputs(session, batch)
        engines: dict[str, Callable[[], Any]] = {"logshift": partial(session.run, x)}
        if against is not None:
            engines["onnxruntime"] = _onnx_engine(against, x, count)
        times = _in_turns(list(engines.values()), seconds)
        record: dict[str, Any] = {"threads": count, "batch": batch}
        record |= {name: _spread(t) for name, t in zip(engines, times, strict=True)}
        if against is not None:
            record["ratio"] = _spread(times[1] / times[0])
        if layers:
            record["layers"] = [asdict(t) for t in session.profile(x)]
        records.append(record)
    _show(records, "\n".join(_bench_text(record) for record in records), as_json)


def _bench_text(record: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    def spread(s: dict[str, float], factor: float) -> str:
        return f"{factor * s['median']:.3f} [{factor * s['p10']:.3f}-{factor * s['p90']:.3f}]"

    text = f"threads {record['threads']}, batch {record['batch']}:"
    text += f" {spread(record['logshift'], 1e3)} ms"
    if "ratio" in record:
        text += f"; onnxruntime float32 {spread(record['onnxruntime'], 1e3)} ms,"
        text += f" {spread(record['ratio'], 1)} times as long"
    if "layers" in record:
        rows = [("node", "op", "kernel", "ms", "GMAC/s")]
        for t in record["layers"]:
            rate = f"{t['macs'] / t['seconds'] / 1e9:.1f}" if t["macs"] else ""
            rows.append((t["name"], t["op"], t["kernel"], f"{1e3 * t['seconds']:.3f}", rate))
        text += "\n" + text_table(rows, left=3) + "\n"
    return text


def _random_inputs(session: Session, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = {}
    for value in session.inputs:
        size = batch if isinstance(value.shape[0], str) else value.nominal[0]
        if size != batch:
            raise InputError(f"the network takes batches of {size} only: --batch {size}")
        x = rng.standard_normal((batch, *value.nominal[1:]))
        inputs[value.name] = (x if "float" in value.dtype else abs(x)).astype(value.dtype)
    return inputs


def _onnx_engine(model: Path, x: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    from logshift.converter.ort import session_options

    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ConversionError(
            "comparing needs onnxruntime: pip install 'logshift[converter]'"
        ) from None
    if not model.is_file():
        raise FileNotFoundError(f"{model}: there is no such file")
    options = session_options(threads)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        session.run(None, x)
    except Exception as error:  # onnxruntime's exceptions share no useful base
        raise ConversionError(f"onnxruntime cannot run {model}: {error}") from error
    return lambda: session.run(None, x)


def _in_turns(engines: list[Callable[[], Any]], seconds: float) -> list[np.ndarray]:
    """Seconds per run: for each engine the medians of blocks of runs, the engines taking turns.

    The first run of a block, which finds the other's data in the caches, is not counted.
    """
    for engine in engines:
        engine()
    blocks: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + seconds
    while len(blocks[0]) < 5 or time.perf_counter() < end:
        for engine, medians in zip(engines, blocks, strict=True):
            engine()
            runs: list[float] = []
            while len(runs) < 3 or sum(runs) < _BLOCK_SECONDS:
                start = time.perf_counter()
                engine()
                runs.append(time.perf_counter() - start)
            medians.append(float(np.median(runs)))
    return [np.array(medians) for medians in blocks]


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


# --- verify -------------------------------------------------------------------------------------


@app.command()
def verify(
    model: Onnx,
    packed: Packed,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, folders of pictures, or .npy files as the model takes them."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare a packed network with its ONNX model, tensor by tensor.

    Shows where precision is lost: the signal-to-noise ratio and cosine of every tensor that both
    networks have, and how often the best class is the same.

    **Examples**

    - `logshift verify model.onnx model.stlq pictures/`

    - `logshift verify model.onnx model.stlq inputs.npy --json`
    """
    from logshift.converter.verify import verify

    session = _load(packed)
    verification = verify(model, session, _batches(_expanded(inputs), session))
    _show(verification.to_dict(), str(verification), as_json)


def _batches(paths: list[Path], session: Session) -> Iterator[Any]:
    dim = session.inputs[0].shape[0]
    size = dim if isinstance(dim, int) else 1
    for path in paths:
        if path.suffix == ".npy":
            array = _load_array(path)
            yield from (array[i : i + size] for i in range(0, len(array), size))
        else:
            yield _picture(path)


# --- export -------------------------------------------------------------------------------------


@app.command()
def export(
    packed: Packed,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="MODEL.onnx", help="The ONNX model to write."),
    ],
    as_json: Json = False,
) -> None:
    """Write a packed network as standard ONNX, for any other engine to run and check.

    Activations are rounded by QuantizeLinear and DequantizeLinear, weights are float32 of exactly
    their values; converting the model again gives the same network.

    **Examples**

    - `logshift export model.stlq -o model.onnx`

    - `logshift verify model.onnx model.stlq pictures/`
    """
    from logshift.converter.export import export

    export(packed, output)
    size = output.stat().st_size
    _show(
        {"file": str(output), "bytes": size},
        f"{output}: {size:,} bytes, {size / packed.stat().st_size:.1f} times larger than packed",
        as_json,
    )


# --- demo and warmup ----------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.stlq", help="Keep the 4-bit network.", show_default="not kept"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run small networks that come with logshift on photographs.

    ResNet-20 for the ten classes of CIFAR-10, trained with weights of 4 and of 3 bits, and in
    onnxruntime the float32 network that their training began with. The first run compiles the
    kernels, which takes a while; later ones start fast.

    **Examples**

    - `logshift demo`

    - `logshift demo --out demo.stlq`
    """
    from PIL import Image

    from logshift.runtime import Preprocessing

    paths = sorted((DEMO / "pictures").glob("*.jpg"))
    pictures = [Image.open(path) for path in paths]
    x = np.stack([Preprocessing().apply(picture, (32, 32)) for picture in pictures])
    networks: list[dict[str, Any]] = []
    engines: list[Callable[[], Any]] = []
    for bits in (4, 3):
        packed = DEMO / f"resnet20-cifar10-w{bits}.stlq"
        session = _load(packed)
        about = _describe(packed)
        labels, threads = session.labels or [], session.threads
        networks.append(
            {"network": f"{bits} bits", "scores": session.run(pictures)}
            | {key: about[key] for key in ("bytes", "bits_per_weight", "nzr")}
        )
        engines.append(partial(session.run, x[:1]))
    model = DEMO / "resnet20-cifar10.onnx"
    (name,) = (value.name for value in session.inputs)
    networks.append(
        {"network": "float32", "scores": _onnx_engine(model, {name: x}, threads)()[0]}
        | {"bytes": model.stat().st_size, "bits_per_weight": 32.0, "nzr": None}
    )
    engines.append(_onnx_engine(model, {name: x[:1]}, threads))
    for network, times in zip(networks, _in_turns(engines, 1.5), strict=True):
        scores = network.pop("scores")
        network["pictures"] = [
            {"picture": path.name, "truth": path.stem, **_best(row, labels)["top"][0]}
            for path, row in zip(paths, scores, strict=True)
        ]
        network["right"] = sum(p["truth"] == p["label"] for p in network["pictures"])
        network["seconds"] = _spread(times)
    if out is not None:
        shutil.copy(DEMO / "resnet20-cifar10-w4.stlq", out)
    result = {
        "networks": networks, "threads": threads, "file": None if out is None else str(out)
    }  # fmt: skip
    _show(result, _demo_text(result), as_json)


def _demo_text(result: dict[str, Any]) -> str:
    from logshift.runtime.table import text_table

    networks = result["networks"]
    largest = max(n["bytes"] for n in networks)
    rows = [("", *(n["network"] for n in networks))]
    for answers in zip(*(n["pictures"] for n in networks), strict=True):
        cells = (f"{a['label']} {a['score']:.2f}" for a in answers)
        rows.append((answers[0]["picture"], *cells))
    count = len(networks[0]["pictures"])
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("right", lambda n: f"{n['right']} of {count}"),
        ("bytes", lambda n: f"{n['bytes']:,}"),
        ("times smaller", lambda n: f"{largest / n['bytes']:.1f}"),
        ("bits per weight", lambda n: f"{n['bits_per_weight']:.2f}"),
        ("NZR", lambda n: "" if n["nzr"] is None else f"{100 * n['nzr']:.1f} %"),
        ("ms a picture", lambda n: f"{1e3 * n['seconds']['median']:.2f}"),
    ]
    rows += [(name, *map(cell, networks)) for name, cell in lines]
    text = text_table(rows, left=1)
    text += f"\n{result['threads']} threads; float32 runs in onnxruntime"
    if result["file"]:
        text += f"\npacked file: {result['file']}"
    return text


@app.command()
def warmup(
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the code in DIR; programs find it by the variable LOGSHIFT_CACHE_DIR=DIR.",
            show_default="LOGSHIFT_CACHE_DIR, else the user's cache directory",
        ),
    ] = None,
    cpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compile for this kind of CPU: `haswell`, `icelake-server`, `znver4` ... May be"
            " given several times.",
            show_default="this machine's",
        ),
    ] = None,
    kernels: KernelFamily = Kernels.auto,
) -> None:
    """Compile all kernels, so that later commands and programs start fast.

    Compiled code is kept in a cache; after an update of logshift or Numba, or on another CPU, it is
    made anew. With `--into` and `--cpu` the cache can be part of an image that is built here, and
    run, read-only if need be, elsewhere.

    **Examples**

    - `logshift warmup`

    - `logshift warmup --into /opt/logshift-cache --cpu haswell --cpu icelake-server --cpu znver4`
    """
    start = time.perf_counter()
    for warmed in _warmup(kernels.value, into, cpu or ()):
        where = "kept nowhere" if warmed.directory is None else warmed.directory
        print(f"{warmed.cpu}: {warmed.size / 1e6:.1f} MB in {where}")
    print(f"kernels are ready ({time.perf_counter() - start:.1f} s)")


# --- what the commands share --------------------------------------------------------------------


def _warmup(kernels: str, into: Path | None = None, cpus: Sequence[str] = ()) -> Sequence[Warmed]:
    from logshift import runtime

    with _progress("compiling kernels") as show:
        return runtime.warmup(show, kernels=kernels, into=into, cpus=cpus)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callable(done, total, detail) that moves a bar on the error stream."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int, detail: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {detail}")

        yield show


def _load(path: Path, **options: Any) -> Session:
    from logshift import runtime
    from logshift.runtime.warm import is_warm

    session = runtime.load(path, **options)
    if not is_warm(session.kernels):
        _warmup(session.kernels)  # what takes long on the first run, visibly
    return session


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """All files, folders replaced by the pictures in them."""
    from logshift.runtime.picture import picture_files

    return [file for path in paths for file in (picture_files(path) if path.is_dir() else [path])]


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}") from None


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy file of numbers ({error})") from None


def _show(record: Any, text: str, as_json: bool) -> None:
    print(json.dumps(record, indent=2) if as_json else text)


if __name__ == "__main__":
    main()
