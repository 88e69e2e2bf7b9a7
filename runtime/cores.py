"""How many threads are worth having: affinity, CPU quotas of containers, `OMP_NUM_THREADS`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath


def default_threads(
    root: str | os.PathLike[str] = "/", environment: Mapping[str, str] = os.environ
) -> int:
    """Return how many threads this process should use.

    As many as its affinity allows cores, or fewer if a CPU quota pays for fewer. `OMP_NUM_THREADS`
    takes the place of the quota: whoever sets it may know that the load comes in bursts. It does
    not reach beyond the affinity: threads without a core only disturb each other, and the variable
    is easily left over from a larger machine.

    Parameters
    ----------
    root : path-like
        Where `proc` and the cgroup file systems are.
    environment : mapping of str to str
    """
    cores = affinity()
    wanted = openmp_threads(environment.get("OMP_NUM_THREADS", ""))
    if wanted is None:
        wanted = quota(root)
    return cores if wanted is None else min(cores, wanted)


def affinity() -> int:
    """Return the number of cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def openmp_threads(value: str) -> int | None:
    """Return what a value of `OMP_NUM_THREADS` asks for at the outermost level.

    None if it is not a list of positive integers; OpenMP runtimes ignore such values too.
    """
    numbers = value.split(",")
    if not all(re.fullmatch(r"\s*\+?0*[1-9][0-9]{0,8}\s*", number) for number in numbers):
        return None
    return int(numbers[0])


def quota(root: str | os.PathLike[str] = "/") -> int | None:
    """Return how many cores the CPU quotas of this process's cgroups pay for.

    Quotas are CPU time per period; a thread too many does not fail, but makes all threads stand
    still once the period's time is used up. The least over both versions' hierarchies and all
    groups from the process's own up to the highest that can be seen, rounded up.

    Parameters
    ----------
    root : path-like
        Where `proc` and the cgroup file systems are.

    Returns
    -------
    int or None
        None without a quota; files that are missing or make no sense are none.
    """
    found = [
        -(-time // period)
        for group in _groups(Path(root))
        for time, period in (_limit_v1(group), _limit_v2(group))
        if time > 0 and period > 0
    ]
    return min(found, default=None)


def _limit_v1(group: Path) -> tuple[int, int]:
    return (
        _number(_read(group / "cpu.cfs_quota_us")),  # -1: none
        _number(_read(group / "cpu.cfs_period_us")),
    )


def _limit_v2(group: Path) -> tuple[int, int]:
    time, _, period = _read(group / "cpu.max").strip().partition(" ")  # "max 100000": none
    return _number(time), _number(period)


def _number(text: str) -> int:
    """Return a number of microseconds, 0 if it is none."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _groups(root: Path) -> Iterator[Path]:
    """Directories of the cgroups that limit this process's CPU time, of both versions."""
    mounts = list(_mounts(_read(root / "proc/self/mountinfo")))
    for version, group in _memberships(_read(root / "proc/self/cgroup")):
        found = [(at, top) for kind, at, top in mounts if kind == version]
        holding = [(at, group.relative_to(top)) for at, top in found if group.is_relative_to(top)]
        # Otherwise a namespace hides where the group is; a container mounts its own.
        for at, below in holding or [(at, PurePosixPath()) for at, _ in found]:
            mounted = root / at.relative_to("/")
            yield from (mounted / path for path in (below, *below.parents))


def _memberships(text: str) -> Iterator[tuple[int, PurePosixPath]]:
    """Version and path of each cgroup in `/proc/self/cgroup` that may hold a CPU quota."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if "cpu" in controllers.split(","):
            yield 1, PurePosixPath(path)
        elif number == "0" and not controllers:
            yield 2, PurePosixPath(path)


def _mounts(text: str) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """Version, mount point and the group that is mounted there of `/proc/self/mountinfo`."""
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        fields, types = place.split(" "), kind.split(" ")
        if len(fields) < 5 or len(types) < 3 or not fields[4].startswith("/"):
            continue
        top, at = (PurePosixPath(_unescape(field)) for field in fields[3:5])
        if types[0] == "cgroup" and "cpu" in types[2].split(","):
            yield 1, at, top
        elif types[0] == "cgroup2":
            yield 2, at, top


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks in `/proc/self/mountinfo`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
