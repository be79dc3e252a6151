"""Commands beside serve and run, as the command line declares them. What they do stands in their own modules."""

import math
import os
from typing import Annotated, Any

import typer

from fairlead.config import engine_settings
from fairlead.errors import ConfigError
from fairlead_server.cli_options import gather, with_options

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Url = Annotated[str, typer.Option(envvar="FAIRLEAD_URL", show_envvar=False, help="Address of the server.")]
Key = Annotated[str | None, typer.Option(envvar="FAIRLEAD_API_KEY", show_envvar=False, help="Key that it asks for.")]
Model = Annotated[str | None, typer.Option("--model", "--model-name", help="Model to ask; the server's first one.")]
Prompt = Annotated[str | None, typer.Argument(metavar="[PROMPT]", show_default=False, help="Text to send.")]
Quick = Annotated[str | None, typer.Option("--quick", "-q", help="The same as PROMPT.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate, at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
CacheDir = Annotated[str | None, typer.Option("--download-dir", help="The cache, if not the Hugging Face one.")]
LOCAL = "http://127.0.0.1:8000"


def chat(
    prompt: Prompt = None,
    url: Url = LOCAL,
    model: Model = None,
    api_key: Key = None,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    quick: Quick = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    debug: Debug = False,
) -> None:
    """Chat with a running server: one PROMPT, what is piped in, or a conversation at the terminal."""
    from fairlead_server.client import Client
    from fairlead_server.client import chat as run

    options = {"max_tokens": max_tokens, "temperature": temperature}
    raise typer.Exit(run(Client(url, api_key, model), _one(prompt, quick), system_prompt, options))


def complete(
    prompt: Prompt = None,
    url: Url = LOCAL,
    model: Model = None,
    api_key: Key = None,
    quick: Quick = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    debug: Debug = False,
) -> None:
    """Let a running server complete a text: PROMPT, what is piped in, or lines at the terminal."""
    from fairlead_server.client import Client
    from fairlead_server.client import complete as run

    options = {"max_tokens": max_tokens, "temperature": temperature}
    raise typer.Exit(run(Client(url, api_key, model), _one(prompt, quick), options))


def pull(
    model: Annotated[str, typer.Argument(help="Hugging Face id, org/name.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    download_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Download a model into the Hugging Face cache and print its directory."""
    from fairlead_server.hub_cache import pull as run

    raise typer.Exit(run(model, revision=revision, cache_dir=download_dir))


def list_models(download_dir: CacheDir = None, debug: Debug = False) -> None:
    """List the models in the Hugging Face cache."""
    from fairlead_server.hub_cache import show

    raise typer.Exit(show(cache_dir=download_dir))


def remove(
    models: Annotated[list[str], typer.Argument(help="Hugging Face ids, as `fairlead list` shows them.")],
    download_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Delete models from the Hugging Face cache."""
    from fairlead_server.hub_cache import remove as run

    raise typer.Exit(run(models, cache_dir=download_dir))


bench = typer.Typer(help="Measure; the results are JSON on standard output.")


@bench.callback(invoke_without_command=True)
def show_benchmarks(context: typer.Context) -> None:
    """Measure; the results are JSON on standard output."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command("serve")
def bench_serve(
    url: Annotated[
        str | None,
        typer.Option("--url", "--base-url", envvar="FAIRLEAD_URL", show_envvar=False, help="Address of the server."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="The server's host, in place of --url.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The server's port, in place of --url.")] = None,
    model: Model = None,
    api_key: Key = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 100,
    request_rate: Annotated[float, typer.Option(min=0, help="Requests per second; 0 or inf sends all at once.")] = 0,
    max_concurrency: Annotated[int, typer.Option(min=0, help="Requests in flight, at most; 0 is any number.")] = 0,
    input_len: Annotated[
        int, typer.Option("--input-len", "--random-input-len", min=1, help="Tokens per prompt.")
    ] = 128,
    output_len: Annotated[
        int, typer.Option("--output-len", "--random-output-len", min=1, help="Tokens per answer.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    debug: Debug = False,
) -> None:
    """Measure a running server under load: rates, and the times to the first token and between tokens."""
    from fairlead_server.bench import bench_serve as run

    status = run(
        _address(url, host, port),
        model=model,
        api_key=api_key,
        num_prompts=num_prompts,
        request_rate=0 if math.isinf(request_rate) else request_rate,
        max_concurrency=max_concurrency,
        input_len=input_len,
        output_len=output_len,
        seed=seed,
    )
    raise typer.Exit(status)


@bench.command("latency")
@with_options(engine_settings())
def bench_latency(
    model_name: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 8,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 128,
    num_iters: Annotated[int, typer.Option(min=1, help="Measured runs.")] = 10,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Runs before them.")] = 2,
    profile: Annotated[bool, typer.Option("--profile", help="Tell where a step's time goes, by op.")] = False,
    **options: Any,
) -> None:
    """Measure how long one batch takes, in this process."""
    settings = gather(options, positional_model=model_name)
    settings.engine_config()
    from fairlead_server.bench import bench_latency as run

    status = run(
        settings.engine,
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        num_iters=num_iters,
        num_warmup=num_iters_warmup,
        profile=profile,
    )
    raise typer.Exit(status)


def _address(url: str | None, host: str | None, port: int | None) -> str:
    if host is None and port is None:
        return url or LOCAL
    if url is not None and url != os.environ.get("FAIRLEAD_URL"):
        raise ConfigError(f"--url and {'--port' if host is None else '--host'} both say where the server is; give one")
    host = host or "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port or 8000}"


def _one(prompt: str | None, quick: str | None) -> str | None:
    if prompt is not None and quick is not None:
        raise ConfigError("the prompt is given twice; leave out --quick or the argument")
    return quick if prompt is None else prompt
