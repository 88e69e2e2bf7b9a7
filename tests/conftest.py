"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# A checkout's tests neither read nor fill the user's own cache of compiled code.
if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ.setdefault("LOGSHIFT_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "kernels"))

from logshift.runtime import plan  # noqa: E402

# Compilation on first use and busy machines make times meaningless as a criterion.
settings.register_profile("logshift", deadline=None)
settings.load_profile("logshift")


@pytest.fixture(scope="session", autouse=True)
def share_small_steps():
    """Let all threads work on networks that are far too small for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SHARE", 1)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared(repository) -> Path:
    """Data sets and models that are too large, or not free enough, for the repository."""
    path = repository.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the data sets and models in {path.name}/ beside the repository")
    return path
