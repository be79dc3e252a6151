"""Installs the distributions of this folder with pip, into a directory of their own, and runs Fairlead beside them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that holds all distributions of this folder, as pip installed them."""
    target = tmp_path_factory.mktemp("plugins")
    sources = [str(path.parent) for path in sorted(HERE.glob("*/pyproject.toml"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(target.glob("*.dist-info"))) == len(sources) == 9
    return target


@pytest.fixture
def run(installed: Path) -> Run:
    """Runs Python with the plugins in reach: `run("-c", code, plugins="cpu,unlisted")`; all may load by default."""

    def start(*arguments: str, plugins: str | None = None, **variables: str) -> Result:
        environment = {name: value for name, value in os.environ.items() if name != "FAIRLEAD_PLUGINS"} | variables
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
        if plugins is not None:
            environment["FAIRLEAD_PLUGINS"] = plugins
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        return Result(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return start
