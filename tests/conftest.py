"""What all tests share."""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

REPOSITORY = Path(__file__).resolve().parent.parent

# A checkout's tests neither read nor fill the user's own cache of compiled code.
if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ.setdefault("LOGSHIFT_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "kernels"))

from logshift.runtime.plan import work  # noqa: E402

# Property tests draw the same examples for everybody, or, with `-m slow`, random ones of a seed
# that the header of the run names. Compilation and busy machines make times meaningless.
_COMMON = {
    "deadline": None,
    "database": None,  # what an earlier run found must not decide on this one
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("fixed", derandomize=True, **_COMMON)
# Said, because Hypothesis's default is another one where it believes to be in somebody's CI.
settings.register_profile("random", derandomize=False, **_COMMON)
# Hypothesis also draws numbers that it finds in modules, of those outside site-packages: examples
# would depend on how the package is installed and on which other tests are run.
providers.is_local_module_file = lambda path: False

# Scripts start background jobs with interrupts ignored, which Python and its children keep.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What rich and typer ask besides whether they write to a terminal.
_OF_TERMINALS = (
    "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS",
    "TTY_COMPATIBLE", "TTY_INTERACTIVE",
)  # fmt: skip


def _is_random(config) -> bool:
    chosen = re.search(r"(?<!not )\bslow\b", config.option.markexpr) is not None
    return chosen or config.option.hypothesis_seed is not None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Choose the profile before Hypothesis's own options are obeyed."""
    if _is_random(config):
        settings.load_profile("random")
        if config.option.hypothesis_seed is None:
            config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))
    else:
        settings.load_profile("fixed")


def pytest_report_header(config):
    """Say which examples are drawn."""
    if _is_random(config):
        return f"property tests: random examples, --hypothesis-seed={config.option.hypothesis_seed}"
    return "property tests: the same examples in every run; random ones with -m slow"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Let `-m slow` choose property tests as well."""
    if _is_random(config):
        for item in items:
            given = getattr(item.obj, "is_hypothesis_test", False)
            if given or item.get_closest_marker("hypothesis"):
                item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def plain_output():
    """Let the command line print the same wherever the tests run; some CIs ask for colours."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_TERMINALS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def share_small_steps():
    """Let all threads work on networks that are far too small for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHARE", 1)
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
