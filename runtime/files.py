"""Files that are complete or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file; an existing one is replaced only once the new one is complete.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 is not what a new file should have
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
