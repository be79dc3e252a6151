"""Nobody changes what another module has defined: no assignment to an attribute of anything that was imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWITCHES = ("litellm.telemetry",)  # what a library documents as the way to set something
FOLDERS = ("core", "server", "platforms", "examples", "benchmarks", "docs", "tests")


def imported_names(tree: ast.AST) -> set[str]:
    """Names that imports bind, anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name.split(".")[0]) for alias in node.names)
    return names


def targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to or deletes; of a call of setattr or delattr its first argument's attribute."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        for target in node.targets:
            yield from target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
        yield node.target
    elif isinstance(node, ast.With):
        yield from (item.optional_vars for item in node.items if item.optional_vars is not None)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr") and node.args:
        yield ast.Attribute(value=node.args[0], attr="?", ctx=ast.Store())


def patches(source: str) -> list[str]:
    """Assignments to attributes of imported names."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        for target in targets(node):
            root: ast.expr = target
            while isinstance(root, ast.Attribute):
                root = root.value
            is_foreign = isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in names
            if is_foreign and ast.unparse(target) not in SWITCHES:
                found.append(f"{getattr(node, 'lineno', 0)}: {ast.unparse(node).splitlines()[0]}")
    return found


def test_nothing_in_the_repository_is_patched() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    found = [f"{f.relative_to(ROOT)}:{line}" for f in files for line in patches(f.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "statement",
    [
        "import torch\ntorch.add = my_add",
        "import torch\ntorch.nn.functional.linear = mine",
        "from fairlead import plugins\nplugins.discover, x = mine, 1",
        "from fairlead.plugins import PlatformRecord\nPlatformRecord.name = 'x'",
        "import sys\ndef f():\n    sys.stdout = None",
        "import os as system\nsystem.sep += '/'",
        "import torch\nsetattr(torch, 'add', mine)",
        "import torch\ndel torch.add",
        "import sys\nwith open('x') as sys.stdin: ...",
    ],
)
def test_a_patch_is_found(statement: str) -> None:
    assert len(patches(statement)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "import os\nos.environ['A'] = 'b'",
        "import torch\nx = torch.zeros(1)\nx.grad = None",
        "self.torch = 1",
        "from a import b\nc = b.d",
        "setattr(own, 'name', 1)",
    ],
)
def test_an_assignment_to_ones_own_is_none(statement: str) -> None:
    assert patches(statement) == []
