"""The `fairlead` command. Importing this module, and printing any help, imports neither torch nor a web framework."""

import dataclasses
import json
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from fairlead import __version__
from fairlead.config import engine_settings
from fairlead.errors import ConfigError, FairleadError, MissingDependencyError
from fairlead.plugins import PlatformRecord, discover, providers
from fairlead_server import commands, platform_commands
from fairlead_server.cli_options import gather, server_settings, spread_lists, with_options
from fairlead_server.vllm_flags import command_words, translate

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# What click raises on a wrong command line. Newer typers carry their own copy of click; all show this class.
USAGE_ERROR = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Run and serve large language models.",
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="Same as --model.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fairlead {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def fairlead(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run and serve large language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@with_options([*engine_settings(), *server_settings()])
def serve(
    model_name: ModelArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and what would fit, load nothing, and exit.")
    ] = False,
    **options: Any,
) -> None:
    """Serve a model over HTTP as OpenAI's API. MODEL is a directory, a Hugging Face id, or 'demo'."""
    settings = gather(options, positional_model=model_name)
    engine_config, server_config = settings.engine_config(), settings.server_config()
    if dry_run:
        from fairlead import plan_engine
        from fairlead_server.banner import engine_lines, layout

        print(layout(engine_lines(plan_engine(engine_config).info, engine_config.platform)))
        return
    from fairlead_server.serve import serve as serve_http

    raise typer.Exit(serve_http(engine_config, server_config))


@app.command()
@with_options(engine_settings())
def run(
    model_name: ModelArgument = None,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", show_default=False, help="Text to go on.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 200,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Share of the probability to sample from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of likeliest tokens to sample from; 0 is all.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and rates to stderr.")] = False,
    **options: Any,
) -> None:
    """Generate in this process: from PROMPT, from what is piped in, or as a chat at the terminal."""
    settings = gather(options, positional_model=model_name)
    settings.engine_config()
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": settings.engine.get("seed")}
    from fairlead_server.run import run as run_model

    raise typer.Exit(run_model(settings.engine, prompt, {"max_tokens": max_tokens, **sampling}, show_stats=stats))


@app.command()
def platforms(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ops: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Create this platform and list its attention, linear and op providers."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the platform plugins: which were found, which can be used, and why the others cannot."""
    if ops is not None:
        entries = [dataclasses.asdict(entry) for entry in providers(ops)]
        print(json.dumps(entries, indent=2)) if as_json else _print_providers(entries)
        return
    records = discover()
    if as_json:
        print(json.dumps([_platform_entry(record) for record in records], indent=2))
    elif records:
        _print_table([_platform_entry(record) for record in records])
    else:
        print("No platform is installed; install one, for example: pip install 'fairlead[cpu]'")


app.command()(commands.chat)
app.command()(commands.complete)
app.command()(commands.pull)
app.command("list")(commands.list_models)
app.command("rm")(commands.remove)
app.command()(platform_commands.doctor)
app.command("collect-env", help="The same as `doctor`.")(platform_commands.doctor)
app.command()(platform_commands.conform)
app.command()(platform_commands.new_platform)
commands.bench.command()(platform_commands.throughput)
app.add_typer(commands.bench, name="bench")


def _platform_entry(record: PlatformRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "priority": record.priority,
        "devices": [
            {"name": d.name, "description": d.description, "memory_bytes": d.memory_bytes} for d in record.devices
        ],
        "distribution": record.distribution,
        "version": record.version,
    }


def _print_table(entries: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [("NAME", "STATUS", "PRIORITY", "PLUGIN", "DEVICES, OR WHY NOT")]
    for entry in entries:
        devices = ", ".join(
            f"{d['name']}: {d['description']}, {d['memory_bytes'] / 2**30:.1f} GiB" for d in entry["devices"]
        )
        priority = "" if entry["priority"] is None else str(entry["priority"])
        plugin = f"{entry['distribution']} {entry['version']}"
        rows.append((entry["name"], entry["status"], priority, plugin, devices or entry["reason"] or ""))
    _print_rows(rows)


def _print_providers(entries: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [("KIND", "NAME", "PROVIDER", "PRIORITY", "CHOSEN FOR", "REFUSES")]
    for entry in entries:
        priority = "" if entry["priority"] is None else str(entry["priority"])
        refused = "; ".join(f"{dtype}: {reason}" for dtype, reason in entry["refused"].items())
        chosen = ", ".join(entry["chosen_for"])
        rows.append((entry["kind"], entry["name"], entry["provider"], priority, chosen, refused))
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    """In columns; the last one may be of any width."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print("  ".join([*cells, row[-1]]).rstrip())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0, 2 for a wrong command line, 1 for a failure, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        ours = spread_lists(translate(arguments))
        status = typer.main.get_command(app).main(args=ours, prog_name="fairlead", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = EXIT_INTERRUPTED
    except Exception as error:
        status = _report(error, arguments)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception, arguments: list[str]) -> int:
    """Says in one line what went wrong; returns the exit status."""
    debug = "--debug" in arguments
    if debug:
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError):
        error = MissingDependencyError.of("this command", error)
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone
        return EXIT_FAILED
    if isinstance(error, USAGE_ERROR):
        message, status = _usage(error, arguments), EXIT_USAGE
    elif isinstance(error, FairleadError):
        message, status = str(error), EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    else:
        hint = "" if debug else "; this is a fault of Fairlead, --debug shows where"
        message, status = f"{type(error).__name__}: {error}{hint}", EXIT_FAILED
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def _usage(error: Any, arguments: list[str]) -> str:
    """What the parser says of a wrong command line, and where the value came from if not from there."""
    message = error.format_message().rstrip(".")
    variable = getattr(getattr(error, "param", None), "envvar", None)
    flags = getattr(getattr(error, "param", None), "opts", ())
    if isinstance(variable, str) and variable in os.environ and not any(a.startswith(tuple(flags)) for a in arguments):
        message += f"; it comes from the environment, where {variable} is set"
        if os.environ[variable].startswith("tcp://"):
            message += " (as Kubernetes does for a Service of that name; set enableServiceLinks: false)"
    if "api_server_benchmark" in message:
        message += "; its place is taken by `fairlead bench serve`"
    context = getattr(error, "ctx", None)
    command = command_words(arguments) if context is None else context.command_path
    return f"{message}; see `{command} --help`"


if __name__ == "__main__":
    main()
