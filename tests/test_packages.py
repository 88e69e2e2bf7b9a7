"""Packages: all are installed, all kernels are found, what imports what, and what is private.

Data goes one way, ONNX -> converter -> packed file -> runtime -> kernels, and nothing imports back.
"""

import ast
import configparser
import subprocess
import sys

import pytest

# What each part of the namespace may import of it.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "runtime": {"kernels", "runtime"},
    "converter": {"kernels", "runtime", "converter"},
    "trainer": {"trainer"},
}


def sources(directory):
    """Source files of a package, without its tests."""
    return [path for path in directory.rglob("*.py") if "tests" not in path.parts[-2:]]


def imports(path):
    """Yield all modules that a file imports, wherever in it, with the lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "logshift":
                yield from ((f"logshift.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


@pytest.mark.parametrize(
    ("file", "parts"),
    [("setup.cfg", ("kernels", "runtime", "converter")), ("trainer/setup.cfg", ("trainer",))],
)
def test_every_directory_of_sources_is_a_package(repository, file, parts):
    config = configparser.ConfigParser()
    config.read(repository / file)
    found = set()
    for part in parts:
        for path in sources(repository / part):
            assert (path.parent / "__init__.py").exists(), path
            found.add(".".join(("logshift", *path.parent.relative_to(repository).parts)))
    listed = config["options"]["packages"].split()
    assert listed == sorted(found)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(repository, part):
    for path in sources(repository / part):
        for module, line in imports(path):
            where = f"{path.relative_to(repository)}:{line} imports {module}"
            root, *rest = module.split(".")
            if root == "logshift":
                assert rest and rest[0] in MAY_IMPORT[part], where
            assert root != "torch" or part == "trainer", where
            assert root not in ("tests", "benchmarks", "support"), where


def test_nothing_of_the_runtime_needs_the_export_to_c(repository):
    for path in sources(repository / "runtime"):
        if path.parent.name != "c_source":
            assert not any("c_source" in module for module, _ in imports(path)), path


def test_every_module_that_registers_kernels_is_found(repository):
    def registers(path):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        return any(getattr(c.func, "id", getattr(c.func, "attr", "")) == "register" for c in calls)

    code = "import sys; from logshift.kernels import registry; list(registry.kernels())"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    modules = {
        ".".join(("logshift", *path.relative_to(repository).with_suffix("").parts))
        for path in sources(repository / "kernels")
        if registers(path)
    }
    assert len(modules) > 5 and modules <= set(done.stdout.split())


def taken(tree):
    """Yield the private names that a module has of others of ours, with the lines."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("logshift"):
            imported |= {alias.asname or alias.name for alias in node.names}
            for name in [alias.name for alias in node.names] + node.module.split("."):
                if name.startswith("_"):
                    yield name, node.lineno
    for node in ast.walk(tree):  # attributes of a module or class that was imported
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id in imported:
                yield f"{node.value.id}.{node.attr}", node.lineno


@pytest.mark.parametrize("part", ["kernels", "runtime", "converter", "trainer"])
def test_private_names_stay_in_their_modules(repository, part):
    found = [
        f"{path.relative_to(repository)}:{line} {name}"
        for path in (repository / part).rglob("*.py")
        if path.parent.name != "tests"
        for name, line in taken(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)
