"""Compiling all kernels beforehand, for this machine or for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from logshift.kernels import registry
from logshift.kernels.errors import InputError, LogshiftError
from logshift.kernels.machine import cache, targets
from logshift.kernels.machine.targets import Target
from logshift.runtime import cores
from logshift.runtime.session import family

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Warmed:
    """What `warmup` has compiled for one kind of CPU.

    Attributes
    ----------
    cpu : str
        LLVM's name of it.
    directory : str or None
        Where the code is kept; None if nothing could be written.
    size : int
        Bytes of it.
    """

    cpu: str
    directory: str | None
    size: int


def warmup(
    progress: Progress | None = None,
    *,
    kernels: str = "auto",
    into: str | os.PathLike[str] | None = None,
    cpus: Sequence[str] = (),
) -> list[Warmed]:
    """Compile all kernels that a family may use, so that later processes start fast.

    Compiled code is kept in the directory that LOGSHIFT_CACHE_DIR names, else in the user's cache
    directory, else beside the package.

    Parameters
    ----------
    progress : callable(done, total, name), optional
    kernels : str
        As for `load`.
    into : path-like, optional
        Directory to keep the code in, to be named by LOGSHIFT_CACHE_DIR later, on this machine or
        in an image. It may be read-only by then.
    cpus : sequence of str
        CPUs to compile for, by LLVM's names: "haswell", "icelake-server", "znver4" ... A machine
        that `warmup` has not been called on, or for, takes the code for its own CPU, else the best
        that it can run. By default for this machine.

    Returns
    -------
    list of Warmed, one per CPU

    Raises
    ------
    InputError
        If there is no such family or CPU, or `into` cannot be written.
    """
    family(kernels)
    if into is None and not cpus:
        for done, total, name in _compile(kernels):
            if progress:
                progress(done, total, name)
        return [_note(kernels)]
    asked = [targets.baked(cpu) for cpu in dict.fromkeys(cpus)] or [targets.host()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if into is not None:
        environment[cache.VARIABLE] = _directory(into)
    reports = _Reports(len(asked), progress)
    with ThreadPoolExecutor(cores.default_threads()) as pool:
        run = partial(_in_process, kernels, environment, reports)
        return list(pool.map(run, asked, range(len(asked))))


def is_warm(kernels: str) -> bool:
    """Whether `warmup` has compiled all that a family may use in this process."""
    known = cache.marked().get(targets.directories()[0], {})
    return registry.families(family(kernels))[0] in known.get("families", ())


def _compile(kernels: str) -> Iterator[tuple[int, int, str]]:
    """Compile everything; yields how far it is."""
    parts = registry.to_compile(kernels)
    for done, (name, compile) in enumerate(parts):
        yield done, len(parts), name
        compile()
    yield len(parts), len(parts), ""


def _note(kernels: str) -> Warmed:
    """Note that all has been compiled for the target of this process."""
    target, name = targets.chosen(), targets.directories()[0]
    families = {registry.families(kernels)[0], *cache.marked().get(name, {}).get("families", ())}
    place = cache.mark(name, asdict(target) | {"families": sorted(families)})
    if place is None:
        return Warmed(target.cpu, None, 0)
    return Warmed(target.cpu, str(place), cache.size(place, name))


def _directory(into: str | os.PathLike[str]) -> str:
    """Make a directory that can be written."""
    path = Path(into).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    return str(path)


class _Reports:
    """Progress of several processes as that of one."""

    def __init__(self, count: int, progress: Progress | None) -> None:
        self.count, self.progress, self.lock = count, progress, threading.Lock()
        self.done: dict[int, int] = {}
        self.total: dict[int, int] = {}

    def __call__(self, index: int, cpu: str, done: int, total: int, name: str) -> None:
        with self.lock:
            self.done[index], self.total[index] = done, total
            if self.progress:
                # As if those that have not begun were as many.
                expected = sum(self.total.values()) * self.count // len(self.total)
                self.progress(sum(self.done.values()), expected, f"{cpu} {name}" if name else "")


def _in_process(
    kernels: str, environment: dict[str, str], reports: _Reports, target: Target, index: int
) -> Warmed:
    """Compile for a target in a process of its own: Numba has one per process."""
    environment = environment | {
        "NUMBA_CPU_NAME": target.cpu, "NUMBA_CPU_FEATURES": target.features,
    }  # fmt: skip
    code = "import sys; from logshift.runtime import warm; warm._report(sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", code, kernels], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))  # type: ignore
        reader.start()
        last: list = []
        for line in process.stdout:
            last = json.loads(line)
            if isinstance(last, list):
                reports(index, target.cpu, *last)
        reader.join()
    if process.returncode or not isinstance(last, dict):
        reason = "".join(errors[-5:]).strip() or f"exit status {process.returncode}"
        raise LogshiftError(f"kernels could not be compiled for {target.cpu}: {reason}")
    return Warmed(**last)


def _report(kernels: str) -> None:
    """Compile, and print how far it is; what the process of a target does."""
    for state in _compile(kernels):
        print(json.dumps(state), flush=True)
    print(json.dumps(asdict(_note(kernels))), flush=True)
