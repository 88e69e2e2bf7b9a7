"""Tools that read code without running it find `logshift`'s modules in this checkout.

`logshift` is a namespace whose parts lie in the directories of the repository; the links in
`.typing/` give them the paths that such tools look for. Go to definition is tried with jedi, along
the paths that pyright is told of; mypy and basedpyright run with them in CI.
"""

import ast
import configparser
import re

import pytest

LINKS = ".typing/logshift"


def test_every_package_has_its_link(repository):
    links = list((repository / LINKS).iterdir())
    assert links
    for link in links:
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve() == repository / link.name
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg")
    packages = config["options"]["packages"].split()
    linked = {package.split(".")[1] for package in packages} | {"trainer"}
    assert {link.name for link in links} == linked


@pytest.mark.parametrize("option", ["mypy_path", "extraPaths"])
def test_tools_are_told_of_the_links(repository, option):
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(rf"^{option} = (.*)$", text, re.MULTILINE)[0].strip('[]"') == ".typing"


@pytest.mark.parametrize("file", ["runtime/session.py", "converter/pipeline.py", "trainer/fit.py"])
def test_definitions_are_found_in_the_checkout(repository, file):
    jedi = pytest.importorskip("jedi")
    path = repository / file
    # Nothing but the links, in which the tests' own environment has no part.
    project = jedi.Project(repository, sys_path=[str(repository / ".typing")], smart_sys_path=False)
    script = jedi.Script(path=path, project=project)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("logshift."):
            for name in node.names:
                where = script.goto(name.lineno, name.col_offset, follow_imports=True)
                assert where, f"{node.module}: {name.name}"
                found |= {definition.module_path.resolve() for definition in where}
    directories = {directory.relative_to(repository).parts[0] for directory in found}
    assert len(found) > 5 and directories <= {"kernels", "runtime", "converter", "trainer"}
