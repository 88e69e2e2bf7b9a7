"""What the pages say of the repository is true: links, paths, modules, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").glob("*.md"),
    REPOSITORY / "trainer" / "README.md",
    REPOSITORY / "tests" / "hostile" / "README.md",
]
DIRECTORIES = "kernels|runtime|converter|trainer|benchmarks|examples|tests|docs"
CHECKS = r"\.venv/bin/(?:ruff|mypy|basedpyright)\b"


def read(*path):
    return REPOSITORY.joinpath(*path).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(rf"`((?:{DIRECTORIES})/[^` ]*)`", text):
        # NAME stands for a file that whoever reads it makes.
        known = path.rpartition("/")[0] if "NAME" in path else path.rstrip("/")
        assert any(REPOSITORY.glob(known)), path
    for module in re.findall(r"python3? -m ((?:benchmarks)[.\w]*)", text):
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").exists(), module
    for script in re.findall(rf"python3? ((?:{DIRECTORIES})/\S+\.py)", text):
        assert (REPOSITORY / script).exists(), script


def test_make_checks_what_ci_checks():
    checks = re.findall(rf"^{CHECKS}.*$", read(".ci", "run"), re.MULTILINE)
    assert len(checks) == 4
    assert re.findall(rf"^\t({CHECKS}.*)$", read("Makefile"), re.MULTILINE) == checks


def test_checks_before_a_commit_are_those_of_ci():
    checks = re.findall(rf"^{CHECKS}.*$", read(".ci", "run"), re.MULTILINE)
    hooks = re.findall(rf"entry: ({CHECKS}.*)$", read(".pre-commit-config.yaml"), re.MULTILINE)
    # The hook formats, CI tells that something was not.
    assert set(hooks) < {check.removesuffix(" --check") for check in checks}


def test_set_up_is_what_make_does():
    commands = re.findall(r"```sh set-up\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)[0]
    recipe = re.search(r"^setup:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[1]
    assert commands.splitlines() == [line.strip() for line in recipe.splitlines()]
    assert len(commands.splitlines()) == 2
