"""docs/commands.md has every command, and every flag that is no setting; each flag comes with help."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fairlead.config import ServerConfig, engine_settings, settings_of
from fairlead_server.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def commands(command: Any, path: str = "fairlead") -> Iterator[tuple[str, Any]]:
    """Every command that runs something, by its words."""
    for name, one in getattr(command, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{path} {name}")
        else:
            yield f"{path} {name}", one


def missing(command: Any, page: str) -> list[str]:
    """Commands and flags that the page lacks, and flags without help."""
    settings = [*engine_settings(), *settings_of("server", ServerConfig)]
    in_settings = {f"--{name.replace('_', '-')}" for s in settings for name in (s.name, *s.aliases)}
    found = []
    for words, one in commands(command):
        if f"`{words}" not in page:
            found.append(words)
        for parameter in one.params:
            flags = [name for name in parameter.opts if name.startswith("--") and name not in in_settings]
            if flags and not parameter.hidden:
                found += [f"{words} {flag}" for flag in flags if f"`{flag}" not in page]
                found += [f"{words} {flag} has no help" for flag in flags if not parameter.help]
    return found


def test_every_command_and_flag_is_documented() -> None:
    command = typer.main.get_command(app)
    assert len(list(commands(command))) >= 8
    assert missing(command, PAGE.read_text(encoding="utf-8")) == []


def test_a_missing_one_is_found() -> None:
    made = typer.Typer()

    @made.command()
    def one(number: int = typer.Option(1, "--number")) -> None: ...

    @made.command()
    def two() -> None: ...

    found = missing(typer.main.get_command(made), "`fairlead one`")
    assert found == ["fairlead one --number", "fairlead one --number has no help", "fairlead two"]
