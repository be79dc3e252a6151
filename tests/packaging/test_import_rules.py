"""Who may import whom (docs/architecture.md), read from the syntax tree so that no import can hide in a function."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import fairlead

ROOT = Path(__file__).parents[2]
SOURCE_FOLDERS = ("core", "server", "platforms", "examples", "benchmarks")

SCHEDULING_MAY = tuple(
    f"fairlead.{name}" for name in ("scheduling", "request", "records", "config", "errors", "interface")
)
PLATFORM_MAY = tuple(f"fairlead.{name}" for name in ("interface", "ops", "errors", "config", "request", "testing"))
SERVER_MODULES = (
    "checkpoint",
    "config",
    "errors",
    "request",
    "interface",
    "plugins",
    "tokenization",
    "testing",
    "engine.async_engine",
)
SERVER_MAY = tuple(f"fairlead.{name}" for name in (*SERVER_MODULES, *fairlead.__all__, "__version__"))
PLUGGY_HOMES = ("plugins.py", "hookspecs.py", "interface/__init__.py")


def imported_modules(path: PurePosixPath, source: str) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives "a.b", since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.parent.parts[: len(path.parent.parts) - node.level + 1]) if node.level else []
            module = [*package, *((node.module or "").split(".") if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def import_violations(path: PurePosixPath, source: str) -> list[str]:
    """What the file at `path` (relative to the repository) imports and must not."""
    top = path.parts[0]
    # The path from the import root on: core/fairlead/x.py is fairlead/x.py, platforms/cpu/fairlead_cpu/x.py alike.
    inside = PurePosixPath(*path.parts[2 if top == "platforms" else 1 :])
    package = inside.parts[0]
    found = []
    for name in imported_modules(inside, source):
        root = name.split(".")[0]
        ours = root == "fairlead"
        if root == "fairlead_server" and package != "fairlead_server" and top != "benchmarks":
            found.append(f"{path}: nobody but benchmarks imports the server, found {name}")
        elif top in ("core", "server") and root.startswith("fairlead_") and root != package:
            found.append(f"{path}: core and server import no platform, found {name}")
        elif top == "platforms" and root.startswith("fairlead_") and root not in (package, "fairlead_triton"):
            found.append(f"{path}: a platform never imports another one, found {name}")
        elif top == "platforms" and ours and not within(name, PLATFORM_MAY):
            found.append(f"{path}: a platform imports only {', '.join(PLATFORM_MAY)}, found {name}")
        elif top == "server" and ours and name != "fairlead" and not within(name, SERVER_MAY):
            found.append(f"{path}: the server imports only public modules of fairlead, found {name}")
        elif inside.parts[:2] == ("fairlead", "scheduling") and not (
            within(name, SCHEDULING_MAY) or root in sys.stdlib_module_names
        ):
            found.append(f"{path}: scheduling imports only {', '.join(SCHEDULING_MAY)}, found {name}")
        elif inside.parts[:2] == ("fairlead", "interface") and ours and not within(name, ("fairlead.interface",)):
            found.append(f"{path}: the interface imports nothing of the core, found {name}")
        if root == "pluggy" and inside not in [PurePosixPath("fairlead", home) for home in PLUGGY_HOMES]:
            found.append(f"{path}: pluggy is for {', '.join(PLUGGY_HOMES)} alone")
    return found


def test_the_tree_keeps_the_import_rules() -> None:
    files = [file for folder in SOURCE_FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert {file.relative_to(ROOT).parts[0] for file in files} >= {"core", "server", "platforms"}
    found = []
    for file in files:
        path = PurePosixPath(file.relative_to(ROOT).as_posix())
        found += import_violations(path, file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/fairlead/scheduling/scheduler.py", "import torch"),
        ("core/fairlead/scheduling/scheduler.py", "def f():\n    from fairlead.engine import engine"),
        ("core/fairlead/scheduling/scheduler.py", "from ..plugins import discover"),
        ("core/fairlead/scheduling/scheduler.py", "from fairlead import plugins"),
        ("core/fairlead/engine/engine.py", "import fairlead_cpu.platform"),
        ("core/fairlead/engine/engine.py", "import importlib\nimportlib.import_module('fairlead_cpu.plugin')"),
        ("core/fairlead/engine/engine.py", "from fairlead_server import cli"),
        ("core/fairlead/engine/engine.py", "import pluggy"),
        ("core/fairlead/interface/spec.py", "from fairlead.request import Request"),
        ("core/fairlead/interface/spec.py", "from pluggy import HookimplMarker"),
        ("platforms/cpu/fairlead_cpu/platform.py", "from fairlead.engine.llm import LLM"),
        ("platforms/cpu/fairlead_cpu/platform.py", "import fairlead"),
        ("platforms/cpu/fairlead_cpu/platform.py", "import fairlead_other.attention"),
        ("platforms/cpu/fairlead_cpu/platform.py", "import fairlead_server"),
        ("server/fairlead_server/app.py", "from fairlead.engine.engine import Engine"),
        ("server/fairlead_server/app.py", "from fairlead.scheduling import scheduler"),
        ("server/fairlead_server/app.py", "from fairlead_cpu import plugin"),
        ("examples/chat.py", "from fairlead_server.app import create_app"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(import_violations(PurePosixPath(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "core/fairlead/scheduling/scheduler.py",
            "import heapq; from fairlead import request; from . import x",
        ),
        ("core/fairlead/interface/__init__.py", "import pluggy; from fairlead.interface.spec import Device"),
        ("platforms/cpu/fairlead_cpu/platform.py", "import torch; from fairlead.ops import table; from . import x"),
        ("platforms/cpu/fairlead_cpu/platform.py", "import fairlead_triton.attention; from fairlead_cpu import x"),
        ("server/fairlead_server/app.py", "import fairlead; from fairlead import LLM, __version__"),
        (
            "server/fairlead_server/app.py",
            "from fairlead.engine.async_engine import X; from .routes import x",
        ),
    ],
)
def test_an_allowed_import_is_not(path: str, source: str) -> None:
    assert import_violations(PurePosixPath(path), source) == []
