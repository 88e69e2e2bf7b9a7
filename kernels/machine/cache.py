"""Where compiled code is kept between processes, and how it is written and read there.

A *place* is a directory; `places` says which there are. In it, entries lie under

    <stamp>/<target>/<function>-<key>.bin

where the stamp is made of all that the code depends on but the machine (sources of the kernels,
versions), and the target is the machine (`targets`). So nothing that is found can be stale,
versions share places, and a place that was filled elsewhere, or copied, is as good as one that was
filled here. Every entry is a file of its own, complete or not there, with a digest in front: what
is torn or damaged is compiled anew. Nothing here raises because of a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import config

from logshift.kernels.errors import CacheWarning

VARIABLE = "LOGSHIFT_CACHE_DIR"
PACKAGE = Path(__file__).parent.parent  # all kernels
_BESIDE = PACKAGE / "__pycache__"
_DIGEST = 16  # bytes
_STAMPS_KEPT = 8  # versions that a place holds; older ones go when there is a new one
_WARMED = "warmed.json"  # in the directory of a target that `warmup` has completed

_failed: dict[Path, str] = {}  # places that could not be written, and why
_warned = False


# --- places -------------------------------------------------------------------------------------


def places() -> list[Path]:
    """Directories to read from, in this order, and to write to, the first that can be written.

    That of LOGSHIFT_CACHE_DIR, else of NUMBA_CACHE_DIR, alone if it can be written; behind it, or
    without it, the user's cache directory, then the package's own.
    """
    found = []
    chosen = os.environ.get(VARIABLE) or os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        found.append(Path(os.path.abspath(os.path.expanduser(chosen))))
        if _writable(found[0]):
            return found
    user = _user_directory()
    return [*found, *([user] if user else []), _BESIDE]


def _user_directory() -> Path | None:
    """Return the user's cache directory; None for a user who has none."""
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
        path = os.path.join(base, "logshift", "Cache")
    elif sys.platform == "darwin":
        path = os.path.join(home, "Library", "Caches", "logshift")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        path = os.path.join(base if os.path.isabs(base) else f"{home}/.cache", "logshift")
    return Path(path) if os.path.isabs(path) else None


def _writable(directory: Path) -> bool:
    """Whether a directory can be written, or made."""
    if directory in _failed:
        return False
    existing = next((p for p in (directory, *directory.parents) if os.path.exists(p)), directory)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


@cache
def stamp() -> str:
    """Name of what code depends on but the machine: sources of all kernels, and versions."""
    digest = hashlib.blake2b(digest_size=10)
    sources = sorted(PACKAGE.rglob("*.py")) or sorted(PACKAGE.rglob("*.pyc"))
    for path in sources:
        digest.update(f"{path.relative_to(PACKAGE)} ".encode() + path.read_bytes())
    if not sources:  # an archive, or a frozen program
        status = os.stat(getattr(__spec__.loader, "archive", sys.executable))
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    svml = getattr(config, "USING_SVML")  # noqa: B009 (an attribute when Numba runs)
    versions = (numba.__version__, llvmlite.__version__, np.__version__, svml)
    digest.update(repr((versions, getattr(sys, "abiflags", ""))).encode())
    return f"{sys.implementation.cache_tag}-{digest.hexdigest()}"


# --- entries ------------------------------------------------------------------------------------


def read(name: str) -> bytes | None:
    """Return the content of an entry, "<target>/<file>"; None if there is none that is whole."""
    for place in places():
        try:
            content = (place / stamp() / name).read_bytes()
        except OSError:
            continue
        if _digest(content[_DIGEST:]) == content[:_DIGEST]:
            return content[_DIGEST:]
    return None


def write(name: str, content: bytes) -> Path | None:
    """Keep an entry in the first place that takes it.

    Returns
    -------
    Path or None
        The place; None, and a warning once per process, if there is none.
    """
    while True:
        place = next((place for place in places() if place not in _failed), None)
        if place is None:
            _warn()
            return None
        path = place / stamp() / name
        try:
            _replace(place, path, _digest(content) + content)
            return place
        except OSError as error:
            if os.name == "nt" and isinstance(error, PermissionError) and path.exists():
                return place  # another process has it open at this moment
            _failed[place] = error.strerror or str(error)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _replace(place: Path, path: Path, data: bytes) -> None:
    """Write a file that others see complete or not at all."""
    new = not (place / stamp()).is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    if new:
        _forget_old_versions(place)
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        # Not by `tempfile`, whose files other users could not read.
        try:
            temporary.write_bytes(data)
        except FileNotFoundError:  # another process has taken this version for an old one
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _forget_old_versions(place: Path) -> None:
    """Remove what other versions of anything have left, but for the latest few."""
    with contextlib.suppress(OSError):
        found = [p for p in place.iterdir() if re.fullmatch(r"\w+-\d+t?-[0-9a-f]{20}", p.name)]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found[_STAMPS_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def _warn() -> None:
    global _warned
    if _warned:
        return
    _warned = True
    reasons = "; ".join(f"{place}: {_failed[place]}" for place in places())
    warnings.warn(
        "compiled kernels cannot be kept, every process compiles them again: no directory can be"
        f" written ({reasons}). Set {VARIABLE} to one that can; or, where nothing can be written,"
        f" run `logshift warmup --into DIR` beforehand, as when an image is built, and set"
        f" {VARIABLE} to DIR",
        CacheWarning,
        stacklevel=2,
    )


# --- what `warmup` has completed ----------------------------------------------------------------


def mark(target: str, about: dict[str, Any]) -> Path | None:
    """Note that everything has been compiled for a target; returns the place, as `write` does."""
    return write(f"{target}/{_WARMED}", json.dumps(about).encode())


def marked() -> dict[str, dict[str, Any]]:
    """Return what was noted, by target."""
    names: set[str] = set()
    for place in places():
        with contextlib.suppress(OSError):
            names.update(path.name for path in (place / stamp()).iterdir())
    contents = {name: read(f"{name}/{_WARMED}") for name in sorted(names)}
    return {name: json.loads(content) for name, content in contents.items() if content}


def size(place: Path, target: str) -> int:
    """Bytes of all entries of a target in a place."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in (place / stamp() / target).iterdir())
    return 0
