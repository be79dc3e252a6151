"""The commands about platforms and the machine: doctor, conform, new-platform, bench throughput. No torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fairlead.config import engine_settings
from fairlead_server.cli_options import gather, with_options

ModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="Same as --model.")]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Examine this machine: platforms, versions, cores, memory, limits, disk. Exits with 1 if something is wrong."""
    from fairlead_server.doctor import as_json as report
    from fairlead_server.doctor import as_text, examine, is_healthy

    findings = examine()
    print(report(findings) if as_json else as_text(findings))
    raise typer.Exit(0 if is_healthy(findings) else 1)


def conform(
    platform: Annotated[str, typer.Option(help="Platform to examine, as `fairlead platforms` lists it.")],
    tier: Annotated[
        list[str] | None, typer.Option(help="Run this tier only: contract, ops, attention, ...; repeat it for more.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device of the platform; its first one if not given.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare tokens and log-probabilities with those of this platform too.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Sweep more shapes, families and steps.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one check may take.")] = 60.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the support matrix there, for documentation.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check that a platform keeps its contract, tier by tier, and print what it supports. Exits with 1 if it fails."""
    from fairlead_server.conform import run as run_kit

    status = run_kit(
        platform,
        tiers=tier or (),
        device=device,
        against=against,
        full=full,
        check_s=timeout,
        json_file=json_file,
        markdown_file=markdown,
    )
    raise typer.Exit(status)


@with_options(engine_settings())
def throughput(
    model_name: ModelArgument = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts that run at the same time.")] = 32,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    output_len: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 64,
    repeats: Annotated[int, typer.Option(help="Measured runs of each platform.")] = 3,
    **options: Any,
) -> None:
    """Tokens per second offline. `--platform a,b` compares platforms, whose runs take turns in one process."""
    settings = gather(options, positional_model=model_name)
    from fairlead_server.throughput import Load
    from fairlead_server.throughput import throughput as measure

    load = Load(
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
        seed=settings.engine.get("seed", 0),
    )
    raise typer.Exit(measure(settings.engine, load))


def new_platform(
    name: Annotated[str, typer.Argument(help="Name of the platform, such as 'acme'.")],
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write the package; ./fairlead-NAME if not given.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write the package of a new platform: it installs, serves and conforms as it is, on references."""
    from fairlead_server.new_platform import write

    folder = write(name, directory)
    print(f"Wrote {folder}. Next:")
    for command in (f"pip install -e '{folder}[test]'", "fairlead platforms", f"fairlead conform --platform {name}"):
        print(f"  {command}")
