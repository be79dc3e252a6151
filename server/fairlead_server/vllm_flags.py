"""What is pasted from vLLM's guides, in our words: flags with underscores, short ones, and those that are none here.

`translate` runs before the command line is parsed, so that help and shell completion know our flags alone.
"""

import re
import sys
from collections.abc import Mapping, Sequence

from fairlead.config import ACCEPTED, AWAITED, TRUST_REMOTE_CODE, Awaited
from fairlead.errors import ConfigError

SHORT_FLAGS: Mapping[str, str] = {"q": "quantization"}
REPLACED: Mapping[str, tuple[str, ...]] = {  # of `serve`
    "enable_metrics": ("--metrics-compat", "vllm-legacy"),
    "disable_uvicorn_access_log": ("--no-access-log",),
}
AWAITED_COMMANDS: Mapping[str, str] = {"run-batch": "batch files are", "launch": "parallelism above 1 is"}

_TO_FILE = "writing results to a file beside standard output"
_DATA_SETS = (
    Awaited(name="backend", neutral=("vllm", "openai"), feature="another kind of engine"),
    Awaited(name="dataset_name", neutral=("random",), feature="another data set than random tokens"),
    Awaited(name="dataset_path", feature="another data set than random tokens"),
    Awaited(name="dataset", feature="another data set than random tokens"),
    Awaited(name="random_range_ratio", neutral=(0, 0.0), feature="lengths at random"),
)
_BENCH_SERVE = (
    *_DATA_SETS,
    Awaited(name="endpoint_type", neutral=("vllm", "openai"), feature="another kind of server"),
    Awaited(name="endpoint", neutral=("/v1/completions",), feature="load on another route"),
    Awaited(name="burstiness", neutral=(1, 1.0), feature="another spread of arrivals"),
    Awaited(name="save_result", neutral=(False,), feature=_TO_FILE),
    Awaited(name="save_detailed", neutral=(False,), feature=_TO_FILE),
    Awaited(name="result_dir", feature=_TO_FILE),
    Awaited(name="result_filename", feature=_TO_FILE),
    Awaited(name="percentile_metrics", feature="a choice of percentiles"),
    Awaited(name="metric_percentiles", feature="a choice of percentiles"),
    Awaited(name="goodput", feature="goodput"),
)
_OUTPUT_JSON = Awaited(name="output_json", feature=_TO_FILE)

_Tables = tuple[tuple[str, ...], tuple[Awaited, ...]]  # flags that change nothing, flags that wait
_ACCEPTED = (*ACCEPTED, TRUST_REMOTE_CODE)
_OF_ENGINES: Mapping[str, _Tables] = {
    "serve": (_ACCEPTED, AWAITED),
    "run": (_ACCEPTED, AWAITED),
    "bench latency": (_ACCEPTED, (*AWAITED, _OUTPUT_JSON)),
    "bench throughput": (_ACCEPTED, (*AWAITED, _OUTPUT_JSON, *_DATA_SETS)),
}
COMMANDS: Mapping[str, _Tables] = {
    **_OF_ENGINES,
    "bench serve": (("ignore_eos", "disable_tqdm", "tokenizer", TRUST_REMOTE_CODE), _BENCH_SERVE),
}
_VALUED = frozenset({"tokenizer"})  # accepted flags with a value; that of any other one may be true or false


def translate(arguments: Sequence[str]) -> list[str]:
    """The command line without vLLM's flags that change nothing, and with ours in place of its other spellings.

    Raises ConfigError for a flag or a command that waits for its feature.
    """
    num_words, command = _command(arguments)
    if command in AWAITED_COMMANDS:
        raise ConfigError(f"fairlead {command}: {AWAITED_COMMANDS[command]} not there yet; see `fairlead --help`")
    found, rest = list(arguments[:num_words]), list(arguments[num_words:])
    tables = COMMANDS.get(command, ((), ()))
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            found += [argument, *rest]
            break
        if argument.startswith("-"):
            found += _flag(argument, rest, command, tables)
        else:
            found.append(argument)
    return found


def _command(arguments: Sequence[str]) -> tuple[int, str]:
    """How many arguments come before those of the command, and the command's words."""
    first = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if first is None:
        return 0, ""
    if arguments[first] == "bench" and len(arguments) > first + 1:
        return first + 2, f"bench {arguments[first + 1]}"
    return first + 1, arguments[first]


def command_words(arguments: Sequence[str]) -> str:
    """`fairlead` and the command that the arguments ask for, if there is such a one."""
    _, command = _command(arguments)
    return f"fairlead {command}" if command in COMMANDS else "fairlead"


def _flag(argument: str, rest: list[str], command: str, tables: _Tables) -> list[str]:
    """What stands in the place of one flag; takes its value off the rest where it is a flag of vLLM's alone."""
    spelt, equals, value = argument.partition("=")
    flag, name, level = _named(spelt, tables[1])
    if name in REPLACED and command == "serve":
        return list(REPLACED[name])
    if name in SHORT_FLAGS and not spelt.startswith("--") and command in _OF_ENGINES:
        flag = f"--{SHORT_FLAGS[name]}"
    elif _taken(name, value if equals else level, rest, tables):
        return []
    return [f"{flag}{equals}{value}"]


def _named(spelt: str, awaited: tuple[Awaited, ...]) -> tuple[str, str, str | None]:
    """A flag with dashes in place of underscores, the Python name of what it sets, and the value that it holds."""
    if spelt.startswith("--"):
        words, dot, key = spelt.partition(".")
        return words.replace("_", "-") + dot + key, words[2:].replace("-", "_"), key or None
    held = re.fullmatch(r"-O(\d|\..*)", spelt)  # as in -O3
    short = "O" if held else spelt[1:]
    names = {item.short: item.name for item in awaited if item.short}
    return spelt, names.get(short, short), held[1] if held else None


def _taken(name: str, given: str | None, rest: list[str], tables: _Tables) -> bool:
    """Whether nothing is left of a flag. Raises ConfigError if it asks for what is not there yet."""
    accepted, awaited = tables
    positive = name.removeprefix("no_")
    for item in awaited:
        if item.name == name:
            if given is not None:
                item.check(given)
            else:
                item.check(True if item.is_switch else _value(name, rest))
            return True
        if item.name == positive and item.is_switch:
            return True
    if name in accepted or positive in accepted:
        if name in _VALUED and given is None:
            _value(name, rest)
        elif given is None and rest and rest[0].lower() in ("true", "false"):
            rest.pop(0)
        if name == TRUST_REMOTE_CODE:
            print("note: --trust-remote-code is not needed: no code of a checkpoint is ever run", file=sys.stderr)
        return True
    return False


def _value(name: str, rest: list[str]) -> str:
    if not rest:
        raise ConfigError(f"--{name.replace('_', '-')} needs a value")
    return rest.pop(0)
