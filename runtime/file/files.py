"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import time
from pathlib import Path
from typing import BinaryIO

_STALE = 3600  # seconds after which nobody is still writing a temporary file


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file; an existing one is replaced only once the new one is complete.

    Whatever stops the process, the old file or the new one is there. Where the system has files
    without names (Linux, most file systems) nothing else is left; elsewhere a process that is
    killed leaves a hidden file, which a later call for the same path removes.

    Parameters
    ----------
    path : path-like
        If it is a symbolic link, what it points to is replaced.
    data : bytes

    Raises
    ------
    OSError
        If the file cannot be written, or is no regular file; names `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    # Not the whole name: with all it gets, it might be longer than names can be.
    prefix = f".{target.name[:40]}."
    temporary = target.with_name(f"{prefix}{secrets.token_hex(8)}.tmp")
    try:
        _write(temporary, data)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    with contextlib.suppress(OSError):
        _finish(target.parent, prefix)


def _write(path: Path, data: bytes) -> None:
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # not every file system can
            handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
            with os.fdopen(handle, "wb") as file:
                _fill(file, data)
                # Only with a directory, which is not used, does Python follow the link.
                os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=handle)
                return
    with path.open("xb") as file:
        _fill(file, data)


def _fill(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _finish(directory: Path, prefix: str) -> None:
    """Make the new name last, and remove what killed processes have left."""
    for old in directory.glob(f"{glob.escape(prefix)}*.tmp"):
        if time.time() - old.stat().st_mtime > _STALE:
            old.unlink()
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
