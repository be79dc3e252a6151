"""What the source imports is declared; nothing is there only because something else happened to bring it."""

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def foreign_modules(source: str) -> set[str]:
    """Top-level modules that a file imports and that neither Python nor this repository brings."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    tops = {name.split(".")[0] for name in names}
    return {name for name in tops if name not in sys.stdlib_module_names and not name.startswith("fairlead")}


def undeclared(modules: Iterable[str], requirements: list[str], owners: Mapping[str, list[str]]) -> list[str]:
    """Modules whose distribution (`owners`: module to distributions) is not among the requirements."""
    declared = {canonicalize_name(Requirement(requirement).name) for requirement in requirements}
    return sorted(m for m in modules if not declared & {canonicalize_name(name) for name in owners.get(m, [m])})


def imports_of(*folders: str) -> set[str]:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert files
    return set().union(*(foreign_modules(file.read_text(encoding="utf-8")) for file in files))


def project(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def test_the_engine_and_the_server_declare_what_they_import() -> None:
    declared = project("pyproject.toml")["project"]
    requirements = [*declared["dependencies"], *declared["optional-dependencies"]["otel"]]  # tracing.py alone needs it
    owners = importlib.metadata.packages_distributions()
    found = undeclared(imports_of("core", "server"), requirements, owners)
    assert found == ["pytest"]  # of its own plugin, which pytest alone imports


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "platforms").glob("*/pyproject.toml")))
def test_a_platform_declares_what_it_imports(name: str) -> None:
    own = project(f"platforms/{name}/pyproject.toml")["project"]["dependencies"]
    requirements = [*own, *project("pyproject.toml")["project"]["dependencies"]]  # it pins fairlead, which brings these
    owners = importlib.metadata.packages_distributions()
    found = undeclared(imports_of(f"platforms/{name}/fairlead_{name}"), requirements, owners)
    # PyTorch's build for a device brings Triton, under a name that differs by device.
    assert set(found) <= ({"triton"} if name == "triton" else set())


def test_an_undeclared_import_is_found() -> None:
    modules = foreign_modules("import os, yaml.nodes\nfrom . import a\nfrom fairlead import b\nif x:\n    import zmq")
    assert modules == {"yaml", "zmq"}
    owners = {"yaml": ["PyYAML"], "zmq": ["pyzmq"]}
    assert undeclared(modules, ["pyyaml>=6", "torch"], owners) == ["zmq"]
