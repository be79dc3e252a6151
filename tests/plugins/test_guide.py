"""docs/writing_a_platform.md, done: every snippet is written, installed and examined, every command exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fairlead_server.cli import app

GUIDE = Path(__file__).parents[2] / "docs" / "writing_a_platform.md"
DEVICE = "/dev/null"  # stands for the Acme's


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def fairlead(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairlead_server.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes that see the package of the page, as its reader has it at the end of the day."""
    folder = tmp_path_factory.mktemp("guide")
    package, target = folder / "package", folder / "site"
    plain = dict(os.environ)
    assert fairlead(plain, "new-platform", "acme", "--directory", str(package)).returncode == 0
    snippets = [block.split("\n", 1) for block in blocks("python")]
    assert [line for line, _ in snippets] == [
        f"# fairlead_acme/{n}.py" for n in ("plugin", "platform", "ops", "attention")
    ]
    for line, text in snippets:
        (package / line.removeprefix("# ")).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(package)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return plain | {"PYTHONPATH": path, "ACME_DEVICE": DEVICE}


def record_of_acme(environment: dict[str, str]) -> dict[str, Any]:
    records = json.loads(fairlead(environment, "platforms", "--json").stdout)
    [record] = [record for record in records if record["name"] == "acme"]
    return dict(record)


def test_hour_1_finds_the_device_or_says_why_not(environment: dict[str, str]) -> None:
    assert record_of_acme(environment)["status"] == "available"
    missing = record_of_acme(environment | {"ACME_DEVICE": "/dev/acme0"})
    assert (missing["status"], missing["reason"]) == ("unavailable", "there is no /dev/acme0; is the driver loaded?")


def test_the_other_hours_keep_the_contract(environment: dict[str, str], tmp_path: Path, full: bool) -> None:
    file = tmp_path / "found.json"
    tiers = () if full else ("--tier=contract", "--tier=ops", "--tier=attention")
    done = fairlead(environment, "conform", "--platform", "acme", "--against", "cpu", "--json", str(file), *tiers)
    results = {result["name"]: result for result in json.loads(file.read_text())["results"]}
    assert done.returncode == 0, [r["message"] for r in results.values() if r["status"] == "failed"]
    norm = results["rms_norm, acme, bfloat16"]
    assert (norm["status"], norm["message"]) == ("unsupported", "the Acme normalises float32 only, not bfloat16")
    assert results["rms_norm, acme, float32"]["status"] == "supported"
    assert results["acme, bfloat16, head size 80"]["status"] == "supported"
    assert results["acme, float32, ALiBi"]["message"] == "the Acme knows plain causal attention only"
    assert results["demo, acme against cpu, float32"]["status"] == "supported"


def test_every_command_of_the_page_exists() -> None:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    commands: Any = typer.main.get_command(app)
    assert len(lines) > 10
    for line in lines:
        program, *words = line.split()
        if program == "pip":
            continue
        assert program == "fairlead", line
        command = commands
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
