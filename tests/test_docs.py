"""What the pages say of the repository is true: links, paths, modules, commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
PAGES = [
    *REPOSITORY.glob("*.md"),
    *DOCS,
    REPOSITORY / "trainer" / "README.md",
    REPOSITORY / "tests" / "hostile" / "README.md",
]
DIRECTORIES = "kernels|runtime|converter|trainer|benchmarks|examples|tests|docs"
CHECKS = r"\.venv/bin/(?:ruff|mypy|basedpyright|mkdocs)\b"


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


def checks_of_ci():
    _, _, own = read(".ci", "run").partition('cd "$work/checks"\n')
    return re.findall(rf"^ +({CHECKS}.*)$", own, re.MULTILINE)


def test_make_checks_what_ci_checks():
    checks = checks_of_ci()
    assert len(checks) == 5
    assert re.findall(rf"^\t({CHECKS}.*)$", read("Makefile"), re.MULTILINE) == checks


def test_checks_before_a_commit_are_those_of_ci():
    checks = checks_of_ci()
    hooks = re.findall(rf"entry: ({CHECKS}.*)$", read(".pre-commit-config.yaml"), re.MULTILINE)
    # The hook formats, CI tells that something was not.
    assert set(hooks) < {check.removesuffix(" --check") for check in checks}


def test_set_up_is_what_make_does():
    commands = re.findall(r"```sh set-up\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)[0]
    recipe = re.search(r"^setup:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[1]
    assert commands.splitlines() == [line.strip() for line in recipe.splitlines()]
    assert len(commands.splitlines()) == 2


@pytest.mark.parametrize("module", ["runtime", "converter", "trainer"])
def test_reference_has_every_public_name(module):
    tree = ast.parse(read(module, "__init__.py"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    page = read("docs", "api", f"{module}.md")
    shown = re.findall(rf"^::: logshift\.{module}\.(\w+)$", page, re.MULTILINE)
    elsewhere = [name for name in names if f"`{name}`" in page]
    assert sorted(shown + elsewhere) == sorted(names)
    if elsewhere:
        runtime = read("docs", "api", "runtime.md")
        assert all(f"::: logshift.runtime.{name}\n" in runtime for name in elsewhere)


def test_site_has_every_page():
    settings = read("docs", "site", "mkdocs.yml")
    pages = {path.relative_to(REPOSITORY / "docs").as_posix() for path in DOCS}
    elsewhere = set(
        re.findall(r'^    "(\S+\.md)": "', read("docs", "site", "hooks.py"), re.MULTILINE)
    )
    assert len(elsewhere) == 4
    assert set(re.findall(r": (\S+\.md)$", settings, re.MULTILINE)) == pages | elsewhere
