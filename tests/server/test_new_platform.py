"""`fairlead new-platform`: what it writes installs, is found, conforms and serves, in few lines of its author's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead.errors import ConfigError
from fairlead_server.new_platform import FILES, write

NAME = "acme_one"
MAX_OWN_LINES = 150
QUICK = ("contract", "engine", "server")  # ops and attention are the references, which the CPU's tests run too


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(NAME, tmp_path_factory.mktemp("scaffold") / "package")


@pytest.fixture(scope="module")
def environment(package: Path) -> dict[str, str]:
    """Of processes that see the package as pip installed it."""
    target = package.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(package)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_every_file_is_written_and_filled_in(package: Path) -> None:
    written = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert written == {target.format(name=NAME) for target in FILES.values()}
    for path in package.rglob("*"):
        assert not path.is_file() or "${" not in path.read_text(encoding="utf-8")


def test_its_author_owns_few_lines(package: Path) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in package.rglob("*.py"))
    assert 40 < lines < MAX_OWN_LINES


def test_the_written_code_is_formatted(package: Path) -> None:
    for check in (["format", "--check"], ["check", "--select", "E,F,W,B,UP,C4,SIM,RUF,N,PT"]):
        command = [sys.executable, "-m", "ruff", *check, "--isolated", "--line-length", "120", str(package)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_it_is_found_and_never_taken_by_accident(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "fairlead_server.cli", "platforms", "--json"]
    records = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    [record] = [record for record in records if record["name"] == NAME]
    assert (record["status"], record["distribution"], record["priority"]) == ("available", "fairlead-acme-one", -1)


def test_its_own_tests_pass_and_run_the_kit(package: Path, environment: dict[str, str], full: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fairlead.testing.conformance.pytest_plugin"]
    command += [] if full else [f"--fairlead-tier={tier}" for tier in QUICK]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    summary = done.stdout.splitlines()[-1]
    assert int(summary.split()[0]) > 30, summary
    assert "skipped" not in summary


@pytest.mark.parametrize("name", ["Acme", "1acme", "acme-one", "", "class", "../x"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a platform"):
        write(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is a platform 'cpu' already, of fairlead-cpu"):
        write("cpu", tmp_path / "new")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write(NAME, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
