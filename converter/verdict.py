"""Does the packed network do what the float model does? Measured end to end, and said.

The network that is written runs as it will run, on samples that did not calibrate, beside the ONNX
model in ONNX Runtime. Where it falls short, what adds most error is found by `effects`.
"""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from logshift.converter.compare import GroupError, OutputError, OutputSums
from logshift.converter.progress import Progress
from logshift.converter.settings import AUTO
from logshift.kernels.errors import LogshiftError
from logshift.runtime.graph import Graph, ValueInfo
from logshift.runtime.session import Session

if TYPE_CHECKING:
    from logshift.converter.effects import Effect
    from logshift.converter.float_graph import FloatGraph
    from logshift.converter.onnx_model import Model
    from logshift.converter.samples import Division

# Of an output, and of one that holds scores of classes: of these only the order counts.
LEAST_COSINE, LEAST_COSINE_OF_CLASSES = 0.99, 0.975
LEAST_SNR_DB, LEAST_SNR_DB_OF_CLASSES = 15.0, 13.0
LEAST_AGREEMENT = 0.9
MOST_SAMPLES = 32  # batches that are measured on

_CHANCE = 0.05  # with which it may be less by accident
_MOST_COUNTED = 1000  # places, of which those of one picture are not independent of each other
_SECONDS = 4.0  # after which no further sample is begun
_BLAMING_SECONDS = 1.5
_BLAMING_BATCHES = 2
_SPARE = 0.7  # of the noise that an output may have, after a remedy
_MINOR = 0.3  # share of the noise of all layers that are not worth naming
_MOST_NAMES = 8  # that a remedy lists


@dataclass(frozen=True)
class Verdict:
    """How faithful a packed network is; `str()` is a few lines.

    Attributes
    ----------
    outputs : list of OutputError
    samples : int
        Batches of the model that were measured on.
    held_back : bool, optional
        Whether these did not calibrate, if that is known.
    warning : str
        A sentence if an output is not as it should be, else "".
    remedy : dict
        Settings of `convert` that would mend it, as far as they are known.
    note : str
        Why nothing could be measured, else "".
    """

    outputs: list[OutputError]
    samples: int
    held_back: bool | None = None
    warning: str = ""
    remedy: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; infinite and undefined figures are None."""
        record = asdict(self)
        for output in record["outputs"]:
            for figures in (output, *output["groups"]):
                for key in ("snr_db", "cosine"):
                    if figures[key] is not None and not math.isfinite(figures[key]):
                        figures[key] = None
            for group in output["groups"]:
                group["channels"] = [list(ends) for ends in group["channels"]]
        return record

    def __str__(self) -> str:
        """Return a line for each group of channels, and the warning."""
        if self.note:
            return f"not compared with the float model: {self.note}"
        which = (
            "that did not calibrate" if self.held_back else "that calibrated, for want of others"
        )
        count = f"{self.samples} sample{'s' * (self.samples != 1)}"
        lines = [f"against the float model, on {count} {which}:"]
        for output in self.outputs:
            lines += [f"  {line}" for line in _lines(output)]
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines)


def _lines(output: OutputError) -> list[str]:
    name = f"output {output.name!r}"
    agreement = ""
    if output.agreement is not None:
        what = "same top class" if output.groups else "equal values"
        agreement = f"{what} {100 * output.agreement:.1f} %"
    if not output.groups:
        return [f"{name}: {agreement or f'not compared, {output.note}'}"]
    lines = []
    for group in output.groups:
        figures = [f"SNR {group.snr_db:.1f} dB", f"cosine {group.cosine:.5f}"]
        if not group.says_something:
            figures = ["nothing in these samples"]
        lines.append(f"{_named(name, group)}: {', '.join(figures)}")
    if agreement:
        lines[-1] += f", {agreement}"
    return lines


def _named(name: str, group: GroupError) -> str:
    return f"{name}, {group}" if group.channels else name


def compare(
    inputs: Sequence[ValueInfo],
    outputs: Sequence[ValueInfo],
    labels: Sequence[str] | None,
) -> list[OutputSums]:
    """Return what compares the outputs of a network, in order."""
    pictures = [info.nominal[2:] for info in inputs if len(info.nominal) == 4]
    classes = None if labels is None else len(labels)
    picture = pictures[0] if pictures else None
    return [
        OutputSums(info, classes if n == 0 else None, picture) for n, info in enumerate(outputs)
    ]


def judge(
    model: Model, graph: FloatGraph, packed: Graph, samples: Division, progress: Progress
) -> tuple[Verdict, list[dict[str, np.ndarray]]]:
    """Measure a packed network against its float model.

    Parameters
    ----------
    model : Model
    graph : FloatGraph
        What `packed` was made from.
    packed : Graph
    samples : Division
    progress : callable(done, total, what)

    Returns
    -------
    Verdict
    list of dict of input name to array
        The batches that it was measured on, those first on which the outputs differ most.
    """
    from logshift.converter.onnx_model import Runner

    sums = compare(packed.inputs, packed.outputs, packed.labels)
    # Folders are sorted by class: what there is time for is drawn from all of it.
    order = np.random.default_rng(0).permutation(len(samples.measuring))[:MOST_SAMPLES]
    done, until = 0, math.inf
    try:
        # Without codes there is nothing that a quantized model's rounding could stand for.
        reference = Runner(model.given if packed.quantization else model.original)
        session = Session(packed)
        for number in order:
            if time.perf_counter() > until:
                break
            progress(done, len(order), "comparing with the float model")
            inputs = samples.measuring[number]
            expected, found = reference(inputs), outputs_of(session, inputs)
            for output, y in zip(sums, expected, strict=True):
                output.add(np.asarray(y), found[output.name])
            done += 1
            if done == 1:  # what the first run compiles does not count
                until = time.perf_counter() + _SECONDS
    except LogshiftError as error:
        note = " ".join(str(error).split())
        return Verdict([], done, samples.held_back, note=note), samples.measuring
    errors = [output.error() for output in sums]
    noise = [output.noise(error) for output, error in zip(sums, errors, strict=True)]
    total = sum((part for part in noise if len(part) == done), np.zeros(done))
    batches = [samples.measuring[order[n]] for n in np.argsort(-total, kind="stable")]
    effects: list[Effect] = []
    if worst_failure(errors) is not None:
        from logshift.converter.effects import layer_effects

        groups = {error.name: error.groups for error in errors}
        effects, _ = layer_effects(
            graph, packed, batches[:_BLAMING_BATCHES], groups, _BLAMING_SECONDS, progress
        )
    verdict = verdict_on(errors, done, packed.settings, effects, samples.held_back)
    return verdict, batches


def verdict_on(
    errors: list[OutputError],
    samples: int,
    settings: Mapping[str, Any],
    effects: Sequence[Effect] = (),
    held_back: bool | None = None,
) -> Verdict:
    """Return what errors of outputs amount to.

    Parameters
    ----------
    errors : list of OutputError
    samples : int
        That they were measured on.
    settings : dict
        Of the conversion.
    effects : list of Effect
        Of layers, as far as they are known.
    held_back : bool, optional
        Whether the samples did not calibrate, if that is known.
    """
    failure = worst_failure(errors)
    if failure is None:
        return Verdict(errors, samples, held_back)
    return Verdict(errors, samples, held_back, *warning(failure, effects, settings, samples))


def outputs_of(session: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session on arrays and return its outputs by name."""
    y = session.run(inputs)
    return y if isinstance(y, dict) else {session.outputs[0].name: y}


@dataclass(frozen=True)
class Failure:
    """What falls short most: a group of an output, or its top classes."""

    output: OutputError
    number: int
    figure: str


def least(output: OutputError) -> tuple[float, float]:
    """Return the least cosine and signal-to-noise ratio that an output is good with."""
    if output.groups and output.agreement is not None:
        return LEAST_COSINE_OF_CLASSES, LEAST_SNR_DB_OF_CLASSES
    return LEAST_COSINE, LEAST_SNR_DB


def is_good(group: GroupError, output: OutputError) -> bool:
    """Tell whether a group of an output is as near to the float model as it should be."""
    cosine, snr_db = least(output)
    return not group.says_something or (group.cosine >= cosine and group.snr_db >= snr_db)


def worst_failure(errors: Sequence[OutputError]) -> Failure | None:
    """Return what falls short most of the outputs, None if nothing does."""
    found: list[tuple[float, Failure]] = []
    for output in errors:
        for number, group in enumerate(output.groups):
            if not is_good(group, output):
                figure = _figure(group, *least(output))
                found.append((group.snr_db, Failure(output, number, figure)))
        if output.agreement is not None and not _agrees(output.agreement, output.positions):
            what = "same top class" if output.groups else "equal values"
            shares = f"{100 * output.agreement:.1f} %, less than {100 * LEAST_AGREEMENT:g} %"
            found.append((math.inf, Failure(output, 0, f"{what} in {shares}")))
    return min(found, key=lambda item: item[0])[1] if found else None


def _figure(group: GroupError, cosine: float, snr_db: float) -> str:
    if math.isnan(group.cosine):
        return "nothing of it is left"
    if group.cosine < cosine:
        return f"cosine {group.cosine:.4f}, less than {cosine}"
    return f"signal-to-noise ratio {group.snr_db:.1f} dB, less than {snr_db:g}"


def _agrees(share: float, positions: int) -> bool:
    """Tell whether a share of `LEAST_AGREEMENT` may well show as so few in so many."""
    count = min(positions, _MOST_COUNTED)
    least, same = LEAST_AGREEMENT, round(share * count)
    chance = sum(
        math.comb(count, n) * least**n * (1 - least) ** (count - n) for n in range(same + 1)
    )
    return chance >= _CHANCE


def warning(
    failure: Failure, effects: Sequence[Effect], settings: Mapping[str, Any], samples: int
) -> tuple[str, dict[str, Any]]:
    """Return a sentence about what falls short, and the settings that would mend it."""
    output, key = failure.output, (failure.output.name, failure.number)
    where = f"output {output.name!r}"
    if output.groups:
        where = _named(where, output.groups[failure.number])
    sentence = f"{where}: {failure.figure}, on {samples} sample{'s' * (samples != 1)}"
    ranked = sorted(effects, key=lambda effect: -effect.noise.get(key, 0.0))
    if not ranked or not ranked[0].noise.get(key):
        return f"{sentence}; more calibration samples or residual_ratio=0.5 may mend it", {}
    first = ranked[0]
    what = "weights" if first.part == "weights" else f"{first.bits}-bit activations"
    sentence += f"; {first.op} {first.name!r} adds most error by its {what}"
    most = _SPARE * 2 * (1 - least(output)[0])  # the noise of two vectors of this cosine
    group = output.groups[failure.number]
    total = 10 ** (-group.snr_db / 10) if math.isfinite(group.snr_db) else math.inf
    remedy = remedy_for(ranked, key, total, most, settings)
    if remedy:
        return f"{sentence}; {as_python(remedy)} should mend it", remedy
    known = sum(effect.noise[key] for effect in ranked)
    remedy = remedy_for(ranked, key, known, _MINOR * known, settings)
    remedy = remedy or remedy_for_all(ranked, key, settings)
    return f"{sentence}; {as_python(remedy)} would help most", remedy


def as_python(settings: Mapping[str, Any]) -> str:
    """Return settings as arguments of `convert`."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def remedy_for(
    ranked: Sequence[Effect],
    key: tuple[str, int],
    total: float,
    most: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return settings without the parts that add most, so many that the rest is good enough.

    Errors of different parts add up as squares. Empty if it takes too many.

    Parameters
    ----------
    ranked : list of Effect
        The one that adds most comes first.
    key : (output name, number of the group)
    total, most : float
        Squared error over squares, that there is and that may be left.
    settings : dict
        As they were.
    """
    rest = max(sum(effect.noise[key] for effect in ranked), total)
    enough = min(most, rest / 2)
    names: set[str] = set()
    for count, effect in enumerate(ranked, 1):
        names.update(effect.settled_by)
        rest -= effect.noise[key]
        if len(names) > _MOST_NAMES:
            break
        if rest <= enough:
            return settings_without(ranked[:count], settings)
    return {}


def settings_without(effects: Sequence[Effect], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which these parts of layers are not quantized, or less."""
    kept = list(settings.get("keep_float", ()))
    bits: dict[str, int] = {}
    for effect in effects:
        patterns = [glob.escape(name) for name in effect.settled_by]
        if effect.part == "weights":
            kept += [pattern for pattern in patterns if pattern not in kept]
        elif effect.bits < 8 and effect.op != "QuantizeLinear":  # which is no node of the model
            bits[glob.escape(effect.name)] = 8
        else:
            bits |= dict.fromkeys(patterns, 32)
    given = settings.get("activation_bits", 8)
    remedy: dict[str, Any] = {}
    if bits:
        others = given if isinstance(given, Mapping) else {} if given == 8 else {"*": given}
        remedy["activation_bits"] = bits | {k: v for k, v in others.items() if k not in bits}
    if kept != list(settings.get("keep_float", ())):
        remedy["keep_float"] = kept
    return remedy


def remedy_for_all(
    effects: Sequence[Effect], key: tuple[str, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a setting for what adds more in all layers together, weights or activations."""
    noise = {"weights": 0.0, "codes": 0.0}
    for effect in effects:
        noise[effect.part] += effect.noise[key]
    if noise["codes"] > noise["weights"]:
        return {
            "activation_bits": 8 if any(e.bits < 8 for e in effects if e.part == "codes") else 32
        }
    ratio = settings.get("residual_ratio", 0.0)
    if ratio == AUTO and settings.get("prefer") != "accuracy":
        return {"prefer": "accuracy"}
    if isinstance(ratio, float) and ratio < 0.5:
        return {"residual_ratio": 0.5}
    return {"weight_bits": 5, "residual_ratio": 1.0}
