"""Command-line options made from the settings of fairlead.config, and the layers that a setting's value comes from.

Command line, then FAIRLEAD_<SETTING> (the parser knows both), then the file of --config, then the default.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import msgspec
import typer

from fairlead.config import EngineConfig, ServerConfig, Setting, absorbed, engine_settings, settings_of
from fairlead.errors import ConfigError

PANELS = {
    "model": "Model",
    "cache": "KV cache",
    "scheduler": "Scheduler",
    "platform": "Platform",
    "server": "Server",
}
_OTHER, _OFF = "__other", "__off"  # behind a setting's name: parameters of its other spellings


def server_settings() -> list[Setting]:
    """The settings of the HTTP server."""
    return list(settings_of("server", ServerConfig))


def with_options(settings: Iterable[Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per setting, in place of its `**options` parameter.

    An option that was not given is None, so that the layers below show through.
    """
    settings = list(settings)
    parameters = [parameter for setting in settings for parameter in _options(setting)]
    parameters.append(
        _parameter("config", str | None, typer.Option(None, help="YAML file of settings.", metavar="FILE"))
    )
    debug = typer.Option(False, "--debug", help="Show the traceback of an error.")
    parameters.append(_parameter("debug", bool, debug))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        setattr(command, "__signature__", signature.replace(parameters=[*own, *parameters]))  # noqa: B010
        command.__annotations__ = {p.name: p.annotation for p in (*own, *parameters)}
        return command

    return decorate


def spread_lists(arguments: list[str]) -> list[str]:
    """Repeats a flag that takes a list before each of the values that follow it, as argparse would read them.

    A value may also be a JSON list. Only behind the command's first argument: before it, a value might be that.
    """
    flags = {
        f"--{name.replace('_', '-')}"
        for setting in (*engine_settings(), *server_settings())
        if get_origin(_base_type(setting.type)) is tuple
        for name in (setting.name, *setting.aliases)
    }
    greedy = len(arguments) > 1 and not arguments[1].startswith("-")
    found: list[str] = []
    flag, is_first = None, True
    for argument in arguments:
        if argument.startswith("-"):
            flag, is_first = argument if argument in flags else None, True
            found.append(argument)
        elif flag is None or not (is_first or greedy):
            flag = None
            found.append(argument)
        else:
            for value in _listed(argument):
                found += [value] if is_first else [flag, value]
                is_first = False
    return found


def _listed(argument: str) -> list[str]:
    if argument.startswith("["):
        try:
            values = json.loads(argument)
        except ValueError:
            return [argument]
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
    return [argument]


def _options(setting: Setting) -> Iterator[inspect.Parameter]:
    """The option of a setting, and its other spellings, which help does not list: each name stands there whole."""
    base = _base_type(setting.type)
    kind = (list[str] if get_origin(base) is tuple else base) | None
    flag = setting.name.replace("_", "-")
    help = setting.help
    if base is bool:
        help += f" On unless --no-{flag}." if setting.default else ""
    elif setting.default not in (None, ()):
        shown = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
        help += f" Default: {shown}."
    environment = f"FAIRLEAD_{setting.name.upper()}"
    panel = PANELS[setting.section]
    reads: dict[str, Any] = {"parser": whole_number, "metavar": "INTEGER"} if base is int else {}
    yield _parameter(
        setting.name,
        kind,
        typer.Option(
            None, f"--{flag}", envvar=environment, show_envvar=False, help=help, rich_help_panel=panel, **reads
        ),
    )
    for i, alias in enumerate(setting.aliases):
        option = typer.Option(None, f"--{alias.replace('_', '-')}", hidden=True, **reads)
        yield _parameter(f"{setting.name}{_OTHER}{i}", kind, option)
    if base is bool:
        yield _parameter(f"{setting.name}{_OFF}", bool, typer.Option(False, f"--no-{flag}", hidden=True))


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _base_type(annotation: Any) -> Any:
    """`int` of `int | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        [annotation] = [arg for arg in get_args(annotation) if arg is not type(None)]
    return annotation


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one command, all layers applied; only those that somebody gave."""

    engine: Mapping[str, Any]
    server: Mapping[str, Any]

    def engine_config(self) -> EngineConfig:
        """Raises ConfigError on a value that does not fit."""
        return EngineConfig.of(**self.engine)

    def server_config(self) -> ServerConfig:
        """Raises ConfigError on a value that does not fit."""
        return ServerConfig(**self.server)


def gather(options: Mapping[str, Any], *, positional_model: str | None) -> Settings:
    """Lays the command line and the environment over the file of --config. Raises ConfigError."""
    known = [*engine_settings(), *server_settings()]
    sections = {setting.name: setting.section for setting in known}
    _check_environment(known)
    path = options.get("config")
    values = {} if path is None else _read_file(Path(path), known)
    for key, given in options.items():  # the other spellings of a setting come behind it
        name, _, _ = key.partition(_OTHER)
        if name in sections and given is not None and given != []:
            values[name] = given
        elif key.endswith(_OFF) and given:
            values[key.removesuffix(_OFF)] = False
    if positional_model is not None:  # it beats the environment, whose model the parser gives as --model
        if options.get("model") not in (None, positional_model, os.environ.get("FAIRLEAD_MODEL")):
            raise ConfigError(f"two models are named: {positional_model!r} and --model {options['model']!r}; give one")
        values["model"] = positional_model
    return Settings(
        engine={name: value for name, value in values.items() if sections[name] != "server"},
        server={name: value for name, value in values.items() if sections[name] == "server"},
    )


def _read_file(path: Path, known: list[Setting]) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path} cannot be read: {reason}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config {path} must hold a mapping of settings, such as 'port: 8080'")
    homes = {name: setting for setting in known for name in (setting.name, *setting.aliases)}
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        setting = homes.get(name)
        if setting is None and absorbed(name, value):
            continue
        if setting is None:
            hint = _nearest(name, homes) or "; `fairlead serve --help` lists them"
            raise ConfigError(f"--config {path}: there is no setting {key!r}{hint}")
        try:
            if _base_type(setting.type) is int and isinstance(value, str):
                value = whole_number(value)
            values[setting.name] = msgspec.convert(value, setting.type)
        except (msgspec.ValidationError, typer.BadParameter) as error:
            reason = error.message if isinstance(error, typer.BadParameter) else str(error)
            raise ConfigError(f"--config {path}: {key}: {reason}") from error
    return values


def whole_number(text: str) -> int:
    """An integer, or one in thousands as vLLM writes them: 16k is 16,000 and 16K is 16,384. Raises BadParameter."""
    found = re.fullmatch(r"\s*([+-]?\d+)([kmgtKMGT]?)\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r:.60} is no whole number")
    digits, unit = found.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(digits) * int((1024 if unit.isupper() else 1000) ** power)


def _check_environment(known: list[Setting]) -> None:
    """Refuses variables of what is not there yet, and tells of those that look misspelt; no silence about either."""
    names = {setting.name for setting in known}
    for variable, value in os.environ.items():
        name = variable.removeprefix("FAIRLEAD_").lower()
        if not variable.startswith("FAIRLEAD_") or name in names or absorbed(name, value):
            continue
        if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
            hint = f"did you mean FAIRLEAD_{near[0].upper()}?"
            print(f"warning: {variable} is no setting and changes nothing; {hint}", file=sys.stderr)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
