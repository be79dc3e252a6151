"""Commands as vLLM's guides write them: what works, what changes nothing, and what says that it is not there yet."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke

from fairlead.config import ACCEPTED, AWAITED, EngineConfig, ServerConfig, absorbed, engine_settings, settings_of
from fairlead.errors import ConfigError
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_server.cli_options import gather, whole_number
from fairlead_server.vllm_flags import AWAITED_COMMANDS, COMMANDS, translate

SETTINGS = [*engine_settings(), *settings_of("server", ServerConfig)]


def flags_of(name: str) -> list[str]:
    [awaited] = [item for item in AWAITED if item.name == name]
    return [f"--{name.replace('_', '-')}", f"--{name}", *([f"-{awaited.short}"] if awaited.short else [])]


def test_no_flag_of_ours_is_taken_for_one_of_vllms() -> None:
    ours = {name for setting in SETTINGS for name in (setting.name, *setting.aliases)}
    taken = {name for command in ("serve", "run") for kind in COMMANDS[command] for name in map(str, names(kind))}
    assert not ours & taken
    everything = [*ACCEPTED, *(item.name for item in AWAITED)]
    assert len(set(everything)) == len(everything)
    shorts = [item.short for item in AWAITED if item.short]
    assert len(set(shorts)) == len(shorts)


def names(kind: tuple[Any, ...]) -> list[str]:
    return [item if isinstance(item, str) else item.name for item in kind]


def test_what_waits_says_so_in_every_spelling() -> None:
    for item in AWAITED:
        for flag in flags_of(item.name):
            ways = [[flag]] if item.is_switch else [[flag, "7x"], [f"{flag}=7x"]]
            for way in ways:
                with pytest.raises(ConfigError, match=f"^{item.name}=.*: .* is not there yet; leave it out") as raised:
                    translate(["serve", "demo", *way])
                assert item.feature in str(raised.value)


def test_what_waits_says_so_in_python_files_and_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    for item in AWAITED:
        value = True if item.is_switch else "7x"
        with pytest.raises(ConfigError, match="is not there yet"):
            EngineConfig.of(**{item.name: value})
    for item in AWAITED[:2]:
        file.write_text(json.dumps({item.name.replace("_", "-"): "7x"}))
        with pytest.raises(ConfigError, match="is not there yet"):
            gather({"config": str(file)}, positional_model=None)
        with monkeypatch.context() as patch:
            patch.setenv(f"FAIRLEAD_{item.name.upper()}", "7x")
            with pytest.raises(ConfigError, match="is not there yet"):
                gather({}, positional_model=None)


def test_neutral_values_and_what_changes_nothing_pass(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in ACCEPTED]
    for item in AWAITED:
        flag = flags_of(item.name)[-1]
        if item.is_switch:
            flags.append(f"--no-{item.name.replace('_', '-')}")
        else:
            flags += [part for value in item.neutral for part in (flag, str(value))]
        for value in item.neutral:
            assert absorbed(item.name, value)
    assert invoke(capsys, "serve", "demo", *flags, "--no-enable-chunked-prefill") == (0, "", "")
    assert served == [(EngineConfig.of(model="demo"), ServerConfig())]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("serve demo --max_model_len 16k", "serve demo --max-model-len 16k"),
        ("serve demo -q int8", "serve demo --quantization int8"),
        ("run demo -q=int8 hi", "run demo --quantization=int8 hi"),
        ("serve demo -tp 1 --port 1", "serve demo --port 1"),
        ("serve demo -tp=1", "serve demo"),
        ("serve demo --enable-chunked-prefill False --port 1", "serve demo --port 1"),
        ("serve demo --enable-chunked-prefill=True", "serve demo"),
        ("serve demo --enable-metrics", "serve demo --metrics-compat vllm-legacy"),
        ("serve demo --disable-uvicorn-access-log", "serve demo --no-access-log"),
        ("--debug serve demo -dp 1", "--debug serve demo"),
        ("run demo -- --max_tokens", "run demo -- --max_tokens"),
        ("serve demo --seed -1", "serve demo --seed -1"),
        ("chat --quick -q", "chat --quick -q"),
        ("chat -q hi", "chat -q hi"),
        (
            "bench serve --backend vllm --dataset-name random --num_prompts 5 --ignore-eos",
            "bench serve --num-prompts 5",
        ),
        ("bench serve --tokenizer x --endpoint /v1/completions", "bench serve"),
        ("bench latency --enforce-eager -tp 1", "bench latency --enforce-eager"),
        ("", ""),
        ("--help", "--help"),
        ("bench", "bench"),
    ],
)
def test_the_spellings_of_others_become_ours(line: str, expected: str) -> None:
    assert translate(line.split()) == expected.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("serve demo --enable-lora", "enable_lora=True: serving of LoRA adapters is not there yet; leave it out"),
        ("serve demo --enable-sleep-mode", "sleep mode is not there yet"),
        ("serve demo -O3", "tuning of compilation and graphs is not there yet"),
        ("serve demo -O.level=3", "tuning of compilation and graphs is not there yet"),
        ("serve demo -O 3", "tuning of compilation and graphs is not there yet"),
        ("serve demo --compilation-config.level 3", "tuning of compilation and graphs is not there yet"),
        ("serve demo --speculative_config.method=ngram", "speculative decoding is not there yet"),
        ("serve demo --lora-modules a=b c=d", "serving of LoRA adapters is not there yet"),
        ("serve demo --tensor-parallel-size", "--tensor-parallel-size needs a value"),
        ("serve demo -q awq", "published quantisation formats are not there yet"),
        ("serve demo --max-model-len many", "'many' is no whole number"),
        ("bench serve --dataset-name sharegpt", "another data set than random tokens is not there yet"),
        ("bench serve --endpoint /v1/chat/completions", "load on another route is not there yet"),
        ("bench throughput --dataset-path x", "another data set than random tokens is not there yet"),
        ("run-batch -i a -o b", "batch files are not there yet"),
        ("bench nothing", "No such command 'nothing'; see `fairlead bench --help`"),
        ("serve demo --model", "requires an argument; see `fairlead serve --help`"),
        ("bench serve --port 0", "Invalid value for '--port'"),
        ("bench serve --request-rate nan", "Invalid value for '--request-rate'"),
        ("bench serve --host x --url http://y", "--url and --host both say where the server is; give one"),
    ],
)
def test_what_cannot_be_had_is_2_in_one_line(capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    code, out, err = invoke(capsys, *line.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert expected in err


def test_the_command_that_waits_is_no_command_yet(capsys: pytest.CaptureFixture[str]) -> None:
    out = invoke(capsys, "--help")[1]
    assert not [name for name in AWAITED_COMMANDS if name in out]


def test_trust_is_answered_with_a_word(capsys: pytest.CaptureFixture[str], served: list[Any]) -> None:
    code, out, err = invoke(capsys, "serve", "demo", "--trust-remote-code")
    assert (code, out, len(served)) == (0, "", 1)
    assert err == "note: --trust-remote-code is not needed: no code of a checkpoint is ever run\n"
    assert invoke(capsys, "serve", "demo", "--no-trust-remote-code") == (0, "", "")


@pytest.mark.parametrize(
    ("text", "number"),
    [("16", 16), ("-1", -1), ("16k", 16_000), ("16K", 16_384), ("2m", 2_000_000), ("1G", 2**30), (" 3 ", 3)],
)
def test_whole_numbers_may_be_in_thousands(text: str, number: int) -> None:
    assert whole_number(text) == number


def test_they_may_in_files_and_the_environment_too(
    capsys: pytest.CaptureFixture[str], served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max-model-len: 1k\nenable-chunked-prefill: true\ntensor-parallel-size: 1\n")
    monkeypatch.setenv("FAIRLEAD_KV_CACHE_MEMORY", "1G")
    monkeypatch.setenv("FAIRLEAD_MODEL", "some/model")
    assert invoke(capsys, "serve", "demo", "--config", str(file)) == (0, "", "")
    [(engine, _)] = served
    assert (engine.model.model, engine.model.max_model_len, engine.cache.kv_cache_memory) == ("demo", 1000, 2**30)
    file.write_text("max-model-len: many\n")
    with pytest.raises(ConfigError, match="max-model-len: 'many' is no whole number"):
        gather({"config": str(file)}, positional_model=None)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FAIRLEAD_PORT", "abc", "; it comes from the environment, where FAIRLEAD_PORT is set; see"),
        ("FAIRLEAD_PORT", "tcp://10.0.0.1:80", "set enableServiceLinks: false"),
        ("FAIRLEAD_ENABLE_PREFIX_CACHING", "perhaps", "where FAIRLEAD_ENABLE_PREFIX_CACHING is set"),
    ],
)
def test_a_bad_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, err = invoke(capsys, "serve", "demo")
    assert (code, err.count("\n")) == (2, 1)
    assert expected in err


def test_a_misspelt_variable_is_told(
    capsys: pytest.CaptureFixture[str], served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("FAIRLEAD_PLUGINS", "FAIRLEAD_TEST_FULL", "FAIRLEAD_PORT_8000_TCP_ADDR", "FAIRLEAD_SERVICE_HOST"):
        monkeypatch.setenv(other, "cpu")
    monkeypatch.setenv("FAIRLEAD_MAX_NUM_SEQ", "1")
    code, _, err = invoke(capsys, "serve", "demo")
    assert (code, len(served)) == (0, 1)
    message = "warning: FAIRLEAD_MAX_NUM_SEQ is no setting and changes nothing; did you mean FAIRLEAD_MAX_NUM_SEQS?\n"
    assert err == message


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("--url http://a:1/v1", "http://a:1/v1"),
        ("--host localhost --port 8001", "http://localhost:8001"),
        ("--host ::1", "http://[::1]:8000"),
        ("--port 8001 --request-rate inf", "http://127.0.0.1:8001"),
    ],
)
def test_a_benchmark_finds_the_server_as_vllms_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, url: str
) -> None:
    from fairlead_server import bench

    seen: list[Any] = []
    monkeypatch.setattr(bench, "bench_serve", lambda url, **rest: seen.append((url, rest["request_rate"])) or 0)
    assert invoke(capsys, "bench", "serve", *flags.split()) == (0, "", "")
    assert seen == [(url, 0)]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", None])
def test_a_checkpoint_that_others_have_rounded_is_2_and_says_it_waits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str | None
) -> None:
    write_tiny_llama(tmp_path, vocab_size=1024)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = invoke(capsys, "serve", str(tmp_path), "--dry-run")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"quant_method {method!r}: published quantisation formats are not there yet" in err
