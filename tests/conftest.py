"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from logshift.runtime import plan

REPOSITORY = Path(__file__).resolve().parent.parent

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
