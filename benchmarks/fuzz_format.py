"""Mutate valid packed files and load them: each is refused with `FormatError`, or runs.

    python benchmarks/fuzz_format.py --count 100000

A quarter of the files is damaged as bytes (flips, cuts, splices), half in the manifest or tensors
and then signed with a right checksum, so that every rule behind it is tried; in the rest numbers of
the manifest are varied gently, so that many stay valid. Whatever loads is run on its nominal input,
if that is small, and must give what the reference kernels give. Anything but `FormatError`, or a
file that takes longer than the limit, ends the program with the number and seed of the file.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logshift.kernels.errors import FormatError, InputError
from logshift.runtime import Session, warmup
from logshift.runtime.file import format as packed_format
from logshift.runtime.infer import nominal_shapes

SECONDS_PER_FILE = 10
LARGEST_RUN = 1e6  # elements and multiplications of a run that is worth its time

_HOSTILE = Path(__file__).resolve().parent.parent / "tests" / "hostile" / "make.py"
_spec = importlib.util.spec_from_file_location("hostile_make", _HOSTILE)
assert _spec and _spec.loader
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@dataclass
class Outcome:
    """What became of the files."""

    accepted: int = 0
    rejected: int = 0
    ran: int = 0
    slowest: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


# --- mutation -----------------------------------------------------------------------------------

NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 5, 7, 8, 9, 16, 100, 255, 256, 257, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32,
    2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-300, 1e-21, 1e-10, 1e15,
    1e19, 1e300, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
VALUES: list[Any] = [
    *NUMBERS, None, True, False, "", "a", "\x00", "\ud800", "Conv", [], [1], [1, 1], [1, 1, 1, 1],
    {}, {"a": 1}, [[[]]], [None, None],
]  # fmt: skip


def damaged(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes with flips, a cut, or a piece of another file."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        where = rng.randrange(len(result)) if result else 0
        kind = rng.randrange(5)
        if kind == 0 and result:
            result[where] ^= 1 << rng.randrange(8)
        elif kind == 1 and result:
            result[where] = rng.randrange(256)
        elif kind == 2:
            del result[where : where + rng.choice([1, 8, 100, 10**6])]
        elif kind == 3:
            start = rng.randrange(len(other))
            result[where:where] = other[start : start + rng.choice([1, 8, 300])]
        else:
            start = rng.randrange(len(other))
            piece = other[start : start + rng.choice([1, 8, 300])]
            result[where : where + len(piece)] = piece
    return bytes(result)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate_manifest(manifest: Any, rng: random.Random) -> None:
    """Change, remove, copy or swap something anywhere in the manifest."""
    found = list(places(manifest))
    container, key = rng.choice(found)
    kind = rng.randrange(6)
    if kind == 0:
        container[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 1:
        del container[key]
    elif kind == 2:
        source, k = rng.choice(found)
        container[key] = copy.deepcopy(source[k])
    elif kind == 3 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
    elif kind == 4 and isinstance(container[key], int):
        container[key] = int(container[key]) + rng.choice([-1, 1, 2, 10])
    else:
        numbers = [(c, k) for c, k in found if type(c[k]) in (int, float)]
        container, key = rng.choice(numbers or found)
        container[key] = rng.choice(NUMBERS)


def vary_numbers(manifest: Any, rng: random.Random) -> None:
    """Set a number of the graph to a small one, or scale it."""
    parts = {key: manifest[key] for key in ("inputs", "outputs", "nodes", "tensors")}
    found = [(c, k) for c, k in places(parts) if type(c[k]) in (int, float)]
    container, key = rng.choice(found)
    if isinstance(container[key], float):
        container[key] *= rng.choice([0.5, 1.5, 2.0, 1e-3, 1e3, 1e-12, 1e12])
    else:
        container[key] = rng.choice([0, 1, 1, 2, 2, 3, 4, 5, 7, 8, container[key] + 1])


def mutate_tensors(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
    """Change the values, size or type of a tensor, or remove, rename or add one."""
    if not tensors:
        return
    name = rng.choice(sorted(tensors))
    array = tensors[name]
    kind = rng.randrange(8)
    if kind < 3 and array.size:
        raw = array.copy().reshape(-1).view(np.uint8)
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(raw.size)] = rng.choice([0, 255, 128, 127, rng.randrange(256)])
        tensors[name] = raw.view(array.dtype).reshape(array.shape)
    elif kind == 3:
        tensors[name] = array.reshape(-1)[: rng.randrange(array.size + 1)].copy()
    elif kind == 4:
        tensors[name] = np.concatenate([array.reshape(-1), array.reshape(-1)])
    elif kind == 5:
        tensors[name] = array.astype(rng.choice([np.uint8, np.int8, np.float32, np.float64]))
    elif kind == 6:
        tensors[rng.choice(["9.first", "1.first", "x", ""])] = tensors.pop(name)
    else:
        raw = array.tobytes() if rng.random() < 0.5 else bytes(rng.choice([0, 100, 10**5]))
        tensors[name] = np.frombuffer(zlib.compress(raw), np.uint8)


def mutated(data: bytes, rng: random.Random, gently: bool) -> bytes:
    """Change a file behind its checksum, and sign it again."""
    manifest, tensors = make.take_apart(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # casts of mutated floats
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if gently:
                vary_numbers(manifest, rng)
            elif rng.random() < 0.6:
                mutate_manifest(manifest, rng)
            else:
                mutate_tensors(tensors, rng)
    version = manifest.get("format_version")
    if version not in (4, 5) or rng.random() < 0.7:
        return make.sign(json.dumps(manifest), tensors)
    # What only files from version 4 on have: the index, and what their metadata say.
    manifest["index"], together = make.put_together(tensors)
    outer: dict[str, Any] = {"format_version": version}
    if rng.random() < 0.5:
        outer["data_bytes"] = together.size
        together = np.frombuffer(zlib.compress(together.tobytes()), np.uint8)
    mutate_manifest(rng.choice([manifest["index"], outer]), rng)
    return make.sign_bundle(outer, manifest, {"data": together})


# --- loading ------------------------------------------------------------------------------------


def _deflated(data: bytes) -> bytes:
    """Deflate all streams of a file; small ones are not by themselves."""
    manifest, tensors = make.take_apart(data)
    make.inflated(manifest, tensors)
    for key, weight in make.weights(manifest).items():
        for name in ("first", "count", "position", "second"):
            if f"{key}.{name}" in tensors:
                raw = zlib.compress(tensors[f"{key}.{name}"].tobytes(), 9)
                tensors[f"{key}.{name}"] = np.frombuffer(raw, np.uint8)
                weight["zlib"].append(name)
    return make.sign(json.dumps(manifest), tensors)


NETWORKS = (make.classifier, make.upscaler, make.mixed, make.activated, make.bundled, make.tiled)


def files(count: int, seed: int) -> Iterator[bytes]:
    """All files of a seed."""
    valid = [packed_format.serialize(graph()) for graph in NETWORKS]
    valid += [_deflated(data) for data in valid]
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        data = rng.choice(valid)
        if number % 4 == 0:
            yield damaged(data, rng.choice(valid), rng)
        else:
            yield mutated(data, rng, gently=number % 4 == 1)


def cost(session: Session) -> float:
    """Elements and window positions of a run at the nominal size, about."""
    shapes = nominal_shapes(session.graph)
    total = sum(float(np.prod(shape, dtype=float)) for shape in shapes.values())
    for layer, node in zip(session.summary().layers, session.graph.nodes, strict=True):
        total += layer.macs
        if node.is_onnx:
            continue
        window = node.attributes.get("kernel_shape", (1, 1))
        total += float(np.prod(layer.output_shape, dtype=float)) * window[0] * window[1]
        total += sum(node.attributes.get("pads", ())) ** 2  # borders
    return total


def load_and_run(data: bytes) -> bool:
    """Load a file as a user would; tell whether it was also run."""
    session = Session(packed_format.deserialize(data), threads=1)
    if cost(session) > LARGEST_RUN:
        return False
    x = {info.name: np.ones(info.nominal, np.float32) for info in session.inputs}
    tensors = session.trace_codes(x)
    reference = Session(session.graph, threads=1, kernels="reference").trace_codes(x)
    # Float32 inside of a network may overflow, and any function may be undefined somewhere.
    finite = not any(node.is_onnx for node in session.graph.nodes)
    for name, array in tensors.items():
        assert not finite or not np.isnan(array).any(), f"a run produced NaN in {name!r}"
        assert array.tobytes() == reference[name].tobytes(), f"kernels differ in {name!r}"
    return True


def limited(function: Callable[[bytes], bool], data: bytes) -> bool:
    """Call with a time limit, where the system has an alarm."""
    if not hasattr(signal, "SIGALRM"):
        return function(data)

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS_PER_FILE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_PER_FILE)
    try:
        return function(data)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(count: int, seed: int = 0, keep: Path | None = None) -> Outcome:
    """Try `count` files; a finding is raised, and its file written to `keep`."""
    outcome = Outcome()
    warmup()
    warmup(kernels="reference")
    for number, data in enumerate(files(count, seed)):
        start = time.perf_counter()
        try:
            outcome.ran += limited(load_and_run, data)
            outcome.accepted += 1
        except FormatError as error:
            outcome.rejected += 1
            outcome.reasons[" ".join(w for w in str(error).split() if w.isalpha())[:40]] += 1
        except InputError:
            outcome.accepted += 1  # the file is fine, its nominal input is no size to run
        except BaseException:
            print(f"finding: file {number} of seed {seed}", file=sys.stderr)
            if keep:
                keep.write_bytes(data)
            raise
        outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
    return outcome


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to write a file that is a finding")
    arguments = parser.parse_args()
    start = time.perf_counter()
    outcome = run(arguments.count, arguments.seed, arguments.keep)
    print(
        f"{arguments.count} files in {time.perf_counter() - start:.0f} s, seed {arguments.seed}:"
        f" {outcome.rejected} refused, {outcome.accepted} accepted, {outcome.ran} of them run;"
        f" slowest {outcome.slowest:.2f} s; only FormatError"
    )
    for reason, times in outcome.reasons.most_common(15):
        print(f"{times:8d}  {reason}")


if __name__ == "__main__":
    main()
