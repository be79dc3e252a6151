"""Command-line options made from the settings of fairlead.config, and the layers that a setting's value comes from.

Command line, then FAIRLEAD_<SETTING> (the parser knows both), then the file of --config, then the default.
"""

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import msgspec
import typer

from fairlead.config import AWAITED, EngineConfig, ServerConfig, Setting, engine_settings, settings_of
from fairlead.errors import ConfigError

PANELS = {
    "model": "Model",
    "cache": "KV cache",
    "scheduler": "Scheduler",
    "platform": "Platform",
    "server": "Server",
}
_OTHER, _OFF, _AWAITED = "__other", "__off", "__awaited"  # behind a setting's name: parameters of its other spellings

# Old spellings that change nothing here, since what they ask for is how Fairlead is.
ACCEPTED = (
    "disable_log_requests",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prompt_tokens_details",
    "enable_request_id_headers",
    "enable_tokenizer_info_endpoint",
    "no_ui",
)
ENABLE_METRICS = "enable_metrics"  # an old spelling of --metrics-compat vllm-legacy


def server_settings() -> list[Setting]:
    """The settings of the HTTP server."""
    return list(settings_of("server", ServerConfig))


def with_options(settings: Iterable[Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per setting, in place of its `**options` parameter.

    An option that was not given is None, so that the layers below show through.
    """
    settings = list(settings)
    parameters = [parameter for setting in settings for parameter in _options(setting)]
    parameters += [_flag(name, "Accepted; it changes nothing.", hidden=True) for name in ACCEPTED]
    parameters += _awaited_options({setting.name for setting in settings})
    if any(setting.name == "metrics_compat" for setting in settings):
        parameters.append(_flag(ENABLE_METRICS, "The same as --metrics-compat vllm-legacy.", hidden=True))
    parameters.append(
        _parameter("config", str | None, typer.Option(None, help="YAML file of settings.", metavar="FILE"))
    )
    parameters.append(_flag("debug", "Show the traceback of an error.", hidden=False))

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
    yield _parameter(
        setting.name,
        kind,
        typer.Option(None, f"--{flag}", envvar=environment, show_envvar=False, help=help, rich_help_panel=panel),
    )
    for i, alias in enumerate(setting.aliases):
        option = typer.Option(None, f"--{alias.replace('_', '-')}", hidden=True)
        yield _parameter(f"{setting.name}{_OTHER}{i}", kind, option)
    if base is bool:
        yield _parameter(f"{setting.name}{_OFF}", bool, typer.Option(False, f"--no-{flag}", hidden=True))


def _awaited_options(settings: set[str]) -> Iterator[inspect.Parameter]:
    """Options that are refused in one line, unless they ask for what is anyway."""
    for awaited in AWAITED:
        if awaited.name not in settings:
            flags = [f"--{awaited.name.replace('_', '-')}", *([f"-{awaited.short}"] if awaited.short else [])]
            kind = bool if isinstance(awaited.neutral, bool) else str | None
            default = False if kind is bool else None
            help = f"Waits for {awaited.feature}."
            yield _parameter(f"{awaited.name}{_AWAITED}", kind, typer.Option(default, *flags, help=help, hidden=True))


def _flag(name: str, help: str, *, hidden: bool) -> inspect.Parameter:
    return _parameter(name, bool, typer.Option(False, f"--{name.replace('_', '-')}", help=help, hidden=hidden))


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
    for awaited in AWAITED:
        awaited.check(options.get(f"{awaited.name}{_AWAITED}") or None)
    path = options.get("config")
    values = {} if path is None else _read_file(Path(path), known)
    if options.get(ENABLE_METRICS):
        values["metrics_compat"] = "vllm-legacy"
    for key, given in options.items():  # the other spellings of a setting come behind it
        name, _, _ = key.partition(_OTHER)
        if name in sections and given is not None and given != []:
            values[name] = given
        elif key.endswith(_OFF) and given:
            values[key.removesuffix(_OFF)] = False
    if positional_model is not None:
        if options.get("model") not in (None, positional_model):
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
    awaited = {item.name: item for item in AWAITED if item.name not in homes}
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in awaited:
            awaited[name].check(value)
            continue
        setting = homes.get(name)
        if setting is None:
            raise ConfigError(f"--config {path}: there is no setting {key!r}; `fairlead serve --help` lists them")
        try:
            values[setting.name] = msgspec.convert(value, setting.type)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--config {path}: {key}: {error}") from error
    return values
