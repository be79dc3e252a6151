"""`fairlead bench throughput`: what it measures, how platforms take turns, and what it prints."""

import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest

import fairlead
from fairlead.errors import ConfigError
from fairlead_server import cli
from fairlead_server import throughput as bench
from fairlead_server.throughput import Load

LOAD = Load(num_prompts=2, input_len=3, output_len=4, repeats=2, seed=1)


class FakeInfo:
    model, vocab_size, dtype, attention_backend = "demo", 50, "float32", "none"

    def __init__(self, platform: str) -> None:
        self.platform, self.device = platform, f"{platform}:0"


class FakeOutput:
    def __init__(self, num_tokens: int) -> None:
        self.outputs = [self]
        self.token_ids = (0,) * num_tokens


class FakeLLM:
    """Notes who ran what, in order."""

    runs: ClassVar[list[tuple[str, tuple[tuple[int, ...], ...]]]] = []
    closed: ClassVar[list[str]] = []

    def __init__(self, **settings: Any) -> None:
        self.info = FakeInfo(settings["platform"] or "best")
        assert settings["max_num_seqs"] == LOAD.num_prompts

    def generate(self, prompts: list[list[int]], params: Any, *, use_tqdm: bool) -> list[FakeOutput]:
        self.runs.append((self.info.platform, tuple(map(tuple, prompts))))
        return [FakeOutput(params.max_tokens) for _ in prompts]

    def close(self) -> None:
        self.closed.append(self.info.platform)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr(fairlead, "LLM", FakeLLM, raising=False)
    FakeLLM.runs.clear()
    FakeLLM.closed.clear()
    return FakeLLM


def test_platforms_take_turns_on_equal_prompts(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.throughput({"platform": "a, b"}, LOAD) == 0
    assert [name for name, _ in fake.runs] == ["a", "b"] * 3
    prompts = [p for _, p in fake.runs]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == 3  # a repetition finds nothing cached
    report = json.loads(capsys.readouterr().out)
    assert [p["platform"] for p in report["platforms"]] == ["a", "b"]
    assert [len(p["runs"]) for p in report["platforms"]] == [2, 2]
    assert report["platforms"][0]["ratio_to_first"] == 1
    assert (report["num_prompts"], report["input_len"], report["output_len"], report["seed"]) == (2, 3, 4, 1)
    assert fake.closed == ["a", "b"]


def test_without_a_platform_the_best_one_runs(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    bench.throughput({}, LOAD)
    assert [p["platform"] for p in json.loads(capsys.readouterr().out)["platforms"]] == ["best"]


def test_prompts_are_reproducible() -> None:
    assert LOAD.prompts(0, 50) == LOAD.prompts(0, 50) != replace(LOAD, seed=2).prompts(0, 50)
    assert [len(p) for p in LOAD.prompts(0, 50)] == [3, 3]


def test_a_wrong_load_is_refused() -> None:
    with pytest.raises(ConfigError, match="--num-prompts must be at least 1, got 0"):
        replace(LOAD, num_prompts=0)


def test_a_platform_named_twice_is_refused(fake: type[FakeLLM]) -> None:
    with pytest.raises(ConfigError, match="names one twice: a,a"):
        bench.throughput({"platform": "a,a"}, LOAD)


def test_the_command_on_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "throughput", "demo", "--platform", "cpu", "--num-prompts", "2", "--repeats", "1"]
    with pytest.raises(SystemExit) as raised:
        cli.main([*arguments, "--output-len", "4", "--input-len", "5", "--num-blocks", "64"])
    captured = capsys.readouterr()
    assert raised.value.code == 0, captured.err
    [cpu] = json.loads(captured.out)["platforms"]
    assert cpu["platform"] == "cpu"
    assert cpu["output_tokens_per_s"] > 0
