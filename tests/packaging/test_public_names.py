"""Public names are sorted and there; importing the package costs no torch; the interface needs next to nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fairlead

ROOT = Path(__file__).parents[2]


def unsorted_names(source: str) -> list[str]:
    """The names of `__all__`, if it is not sorted: constants, then classes, then the rest, as ruff sorts them."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            if names != sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)):
                return names
    return []


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level modules, beyond the interpreter's own, that a fresh interpreter holds after the statement."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", fairlead.__all__)
def test_a_public_name_is_importable(name: str) -> None:
    assert getattr(fairlead, name).__name__ == name


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        fairlead.Nothing  # noqa: B018 - the access is what is tested


def test_the_lists_of_public_names_are_sorted() -> None:
    files = [file for top in ("core", "server", "platforms") for file in (ROOT / top).rglob("*.py")]
    assert [file for file in files if unsorted_names(file.read_text(encoding="utf-8"))] == []


def test_an_unsorted_list_of_public_names_is_found() -> None:
    assert unsorted_names("__all__ = ['LIMIT', 'Ab', 'Ba', 'a']") == []
    assert unsorted_names("__all__ = ['Ab', 'LIMIT']") == ["Ab", "LIMIT"]


def test_every_public_name_of_the_interface_is_there() -> None:
    interface = importlib.import_module("fairlead.interface")
    assert [name for name in interface.__all__ if not hasattr(interface, name)] == []


def test_importing_fairlead_imports_nothing_else() -> None:
    assert modules_loaded_by("import fairlead") == {"fairlead"}


def test_the_interface_needs_only_the_standard_library_and_pluggy() -> None:
    assert modules_loaded_by("import fairlead.interface") == {"fairlead", "pluggy"}


def test_the_command_line_starts_without_torch() -> None:
    loaded = modules_loaded_by("import fairlead_server.cli")
    assert "fairlead_server" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "tokenizers"}


def test_a_module_that_is_loaded_is_seen() -> None:
    assert "hatchling" in modules_loaded_by("import hatchling")
