"""The command line: exit statuses, one line per error, layers of settings, and what is imported."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke

import fairlead
from fairlead import demo
from fairlead.config import ACCEPTED, ServerConfig, engine_settings, settings_of
from fairlead.errors import ConfigError
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_server import cli
from fairlead_server.cli_options import gather, spread_lists


def fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Runs a command line that fails; returns its one line."""
    code, out, err = invoke(capsys, *arguments)
    assert (code, out) == (status, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--port", "abc"], "--port"),
        (["serve", "demo", "extra"], "extra"),
        (["nothing"], "nothing"),
        (["serve", "--port", "99999"], "port must be from 0 to 65535"),
        (["serve", "--dtype", "int3"], "dtype must be one of"),
        *(
            (["serve", "--quantization", name], f"quantization='{name}': published quantisation formats are not there")
            for name in ("gptq", "AWQ", "awq_marlin", "compressed-tensors", "auto-round", "squeezellm")
        ),
        (["serve", "--quantization", "nonsense"], "quantization must be one of int8, int4, fp8, got 'nonsense'"),
        (["serve", "a", "--model", "b"], "two models are named: 'a' and --model 'b'"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["serve", "--op-providers", "nonsense"], "OP=PROVIDER"),
        (["run", "demo", "--max-tokens", "x"], "--max-tokens"),
        (["run", "demo", "hi", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["platforms", "--port", "1"], "--port"),
        (["api_server_benchmark", "--backend", "x"], "`fairlead bench serve`"),
        (["serve", "demo", "-tp", "2"], "tensor_parallel_size='2': parallelism above 1 is not there yet"),
        (["serve", "demo", "--pipeline-parallel-size=4"], "parallelism above 1 is not there yet"),
        (["serve", "demo", "--enable-lora", "--max-loras", "4"], "serving of LoRA adapters is not there yet"),
        (["serve", "demo", "--speculative-model", "x", "--num-speculative-tokens", "5"], "speculative decoding is not"),
        (["serve", "demo", "--speculative-config", '{"method": "ngram"}'], "speculative decoding is not there yet"),
        (["serve", "demo", "--enable-sleep-mode"], "sleep mode is not there yet"),
        (["serve", "demo", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"], "tool calling is not there"),
        (["serve", "demo", "--ssl-keyfile", "x"], "need ssl_certfile"),
        (["serve", "demo", "--ssl-certfile", "/nowhere.pem"], "ssl_certfile /nowhere.pem cannot be used"),
        (["serve", "demo", "--metrics-compat", "x"], "metrics_compat must be one of none, vllm, vllm-legacy"),
        (["serve", "demo", "--max-queued-requests", "0"], "max_queued_requests must be at least 1"),
        (["serve", "demo", "--api-key-file", "/nowhere"], "api_key_file /nowhere cannot be read"),
    ],
)
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in fails(capsys, 2, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "/nowhere", "--port", "0"], "no model directory '/nowhere'"),
        (["serve", "--host", "999.1.1.1"], "cannot listen on 999.1.1.1"),
        (["run", "demo", "hi", "--temperature", "-1"], "temperature must be"),
        (["run", "demo", "hi", "--max-tokens", "0"], "max_tokens must be"),
    ],
)
def test_a_failure_is_1(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in fails(capsys, 1, *arguments)


def test_a_taken_port_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = fails(capsys, 1, "serve", "/nowhere", "--port", port)  # else it would be the model that is missing
    assert f"port {port}" in message
    assert "--port" in message


@pytest.mark.parametrize("arguments", [["--debug", "serve", "/nowhere"], ["serve", "/nowhere", "--debug"]])
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = invoke(capsys, *arguments, "--port", "0")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: there is no model directory")


def test_a_fault_of_ours_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def discover() -> None:
        raise ZeroDivisionError("what\nnow")

    monkeypatch.setattr(cli, "discover", discover)
    assert "ZeroDivisionError: what now" in fails(capsys, 1, "platforms")


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def discover() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "discover", discover)
    assert invoke(capsys, "platforms")[0] == 130


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(capsys, "--version") == (0, f"fairlead {fairlead.__version__}\n", "")


def test_help_names_every_setting_whole(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "serve", "--help")
    assert code == 0
    flags = set(re.findall(r"--[a-z-]+", out))
    settings = [*engine_settings(), *settings_of("server", ServerConfig)]
    assert {f"--{setting.name.replace('_', '-')}" for setting in settings} <= flags
    assert invoke(capsys)[0] == 0


def test_platforms(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "platforms")
    assert code == 0
    assert re.search(r"^cpu +available +0 +fairlead-cpu", out, re.MULTILINE)
    code, out, _ = invoke(capsys, "platforms", "--json")
    [cpu] = [entry for entry in json.loads(out) if entry["name"] == "cpu"]
    assert cpu["status"] == "available"
    assert cpu["devices"][0]["memory_bytes"] > 0


def test_a_platform_that_cannot_be_used_is_listed_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fairlead.plugins import PlatformRecord

    record = PlatformRecord(name="acme", distribution="a", version="1", status="broken", reason="ImportError: no acme")
    monkeypatch.setattr(cli, "discover", lambda: [record])
    assert "ImportError: no acme" in invoke(capsys, "platforms")[1]
    monkeypatch.setattr(cli, "discover", list)
    assert "pip install" in invoke(capsys, "platforms")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "some/model", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching", "--port", "1"],
        ["serve", "--model", "some/model", "--device-memory-utilization=0.5", "--no-enable-prefix-caching", "--port=1"],
    ],
)
def test_flags_aliases_and_negations_reach_the_config(
    capsys: pytest.CaptureFixture[str], served: list[Any], arguments: list[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in ACCEPTED]
    assert invoke(capsys, *arguments, *flags, "--op-providers", "a=b", "--op-providers", "c=d")[0] == 0
    [(engine, server)] = served
    assert (engine.model.model, server.port) == ("some/model", 1)
    assert engine.cache.device_memory_utilization == 0.5
    assert engine.cache.enable_prefix_caching is False
    assert engine.platform.op_providers == ("a=b", "c=d")


def test_the_layers(
    capsys: pytest.CaptureFixture[str], served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: from/file\nport: 1\nblock-size: 2\nmax_num_seqs: 3\nenable_prefix_caching: false\n")
    monkeypatch.setenv("FAIRLEAD_BLOCK_SIZE", "20")
    monkeypatch.setenv("FAIRLEAD_MAX_NUM_SEQS", "30")
    monkeypatch.setenv("FAIRLEAD_SKIP_TOKENIZER_INIT", "1")
    assert invoke(capsys, "serve", "--config", str(file), "--max-num-seqs", "300")[0] == 0
    [(engine, server)] = served
    assert (engine.model.model, server.port, server.host) == ("from/file", 1, "127.0.0.1")
    assert (engine.cache.block_size, engine.scheduler.max_num_seqs) == (20, 300)
    assert (engine.cache.enable_prefix_caching, engine.model.skip_tokenizer_init) == (False, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prt: 1", "there is no setting 'prt'"),
        ("port: abc", "port: 'abc' is no whole number"),
        ("port: [1]", "port: Expected `int`"),
        ("max_num_seq: 1", "did you mean 'max_num_seqs'?"),
        ("- a", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("op_providers: x", "op_providers: Expected `array`"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)) as raised:
        gather({"config": str(file)}, positional_model=None)
    assert str(file) in str(raised.value)


def test_the_providers_of_a_platform(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "platforms", "--ops", "cpu")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["KIND", "NAME", "PROVIDER", "PRIORITY", "CHOSEN", "FOR", "REFUSES"]
    assert {"torch", "reference"} <= {row[2] for row in rows if row[:2] == ["op", "rms_norm"]}
    assert ["op", "rms_norm", "reference", "0"] in rows
    code, out, _ = invoke(capsys, "platforms", "--ops", "cpu", "--json")
    entries = json.loads(out)
    assert code == 0
    for kind, name in (("attention", ""), ("linear", "unquantized"), ("linear", "int8"), ("op", "draw")):
        found = [e for e in entries if (e["kind"], e["name"]) == (kind, name)]
        assert sorted(dtype for e in found for dtype in e["chosen_for"]) == ["bfloat16", "float32"]
    assert "there is no platform 'acme'" in fails(capsys, 1, "platforms", "--ops", "acme")


@pytest.mark.parametrize("arguments", ["--help", "serve --help", "run --help", "platforms", "--version"])
def test_what_only_informs_imports_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys\n"
        "import fairlead, fairlead_server.cli\n"
        "try:\n"
        f"    fairlead_server.cli.main({arguments.split()!r})\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'fastapi', 'numpy', 'uvicorn', 'tokenizers'} & set(sys.modules)\n"
        "    print('HEAVY', *heavy, file=sys.stderr)\n"
        "    raise\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "HEAVY"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("--num-blocks 64", 0, "64 blocks = 1024 tokens = 1.0 concurrent requests × 1024 tokens"),
        ("", 0, "step       at least 0.01 GiB more, estimated from the model's shapes"),
        ("--num-blocks 10", 1, "set --max-model-len to at most 160"),
        ("--attention-backend none", 2, "attention_backend none (it has "),
    ],
)
def test_a_dry_run_says_what_fits_and_serves_nothing(
    capsys: pytest.CaptureFixture[str], arguments: str, status: int, expected: str
) -> None:
    code, out, err = invoke(capsys, "serve", "demo", "--dry-run", *arguments.split())
    assert code == status
    assert expected in (err if status else out)
    assert "http" not in out


@pytest.fixture
def huge(tmp_path: Path) -> str:
    """A model whose config asks for more weights than any machine holds; its files are small."""
    write_tiny_llama(tmp_path, vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, tmp_path / name)
    sizes = {"hidden_size": 2**16, "intermediate_size": 2**20, "num_hidden_layers": 500, "num_attention_heads": 512}
    config = json.loads((tmp_path / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


WEIGHTS = r"error: the weights need \d+\.\d\d GiB in float32, but platform 'cpu' has .* free of .*; take a smaller"


@pytest.mark.parametrize("options", [["--dry-run"], ["--dry-run", "--num-blocks", "64"]], ids=str)
def test_weights_that_cannot_fit_are_told_before_anything_is_allocated(
    capsys: pytest.CaptureFixture[str], huge: str, options: list[str]
) -> None:
    assert re.match(WEIGHTS, fails(capsys, 1, "serve", huge, *options))


def test_a_server_tells_it_too(huge: str) -> None:
    command = [sys.executable, "-m", "fairlead_server.cli", "serve", huge, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(WEIGHTS, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_run_tells_it_too(capsys: pytest.CaptureFixture[str], huge: str) -> None:
    assert "error: the weights need" in fails(capsys, 1, "run", huge, "hi")


def test_a_tokenizer_larger_than_the_embedding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, vocab_size=1023)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, tmp_path / name)
    message = fails(capsys, 1, "run", str(tmp_path), "hi")
    assert "the tokenizer has 1024 tokens, but config.json has a vocab_size of 1023; give the tokenizer" in message


def test_a_tokenizer_smaller_than_a_padded_embedding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, vocab_size=1088)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, tmp_path / name)
    assert invoke(capsys, "run", str(tmp_path), "hi", "--max-tokens", "1")[0] == 0


def test_the_module_serves_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fairlead_server", "--port", "99999"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "port must be from 0 to 65535" in done.stderr


def test_neutral_values_of_what_is_not_there_yet_pass(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    flags = "-tp 1 --pipeline-parallel-size 1 --kv-cache-dtype auto --tokenizer-mode auto --no-ui"
    assert invoke(capsys, "serve", "demo", *flags.split())[0] == 0
    assert len(served) == 1


def test_lists_are_taken_as_the_guides_write_them(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    names = ["--served-model-name", "a", "b"]
    assert invoke(capsys, "serve", "demo", *names, "--allowed-origins", '["*"]', "--api-key", "k1", "k2")[0] == 0
    [(engine, server)] = served
    assert engine.model.model == "demo"
    assert (server.served_model_name, server.cors_origins, server.api_key) == (("a", "b"), ("*",), ("k1", "k2"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("serve demo --cors-origins x y --port 1", "serve demo --cors-origins x --cors-origins y --port 1"),
        ("serve --cors-origins x demo", "serve --cors-origins x demo"),
        ("serve demo --cors-origins --port 1", "serve demo --cors-origins --port 1"),
        ("serve demo --port 1 2", "serve demo --port 1 2"),
    ],
)
def test_a_list_ends_at_the_next_flag(arguments: str, expected: str) -> None:
    assert spread_lists(arguments.split()) == expected.split()


def test_enable_metrics_is_the_legacy_set(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    assert invoke(capsys, "serve", "demo", "--enable-metrics")[0] == 0
    assert served[0][1].metrics_compat == "vllm-legacy"


def test_secrets_come_from_the_environment_and_show_nowhere(
    capsys: pytest.CaptureFixture[str], served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRLEAD_API_KEY", "s3cret other")
    assert invoke(capsys, "serve", "demo")[0] == 0
    assert served[0][1].api_key == ("s3cret", "other")
    assert "s3cret" not in repr(served)
    code, out, err = invoke(capsys, "serve", "demo", "--port", "x", "--debug")
    assert code == 2
    assert "s3cret" not in out + err


def test_completion_for_the_shell() -> None:
    """What --install-completion puts in place asks the program itself, by these variables."""
    for variables, expected in (
        ({"_FAIRLEAD_COMPLETE": "source_bash"}, "complete -o default -F"),
        ({"_FAIRLEAD_COMPLETE": "complete_bash", "COMP_WORDS": "fairlead ser", "COMP_CWORD": "1"}, "serve"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fairlead_server.cli"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **variables},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout
