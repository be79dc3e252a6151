"""`fairlead bench`: what is measured adds up."""

import json
from typing import Any

import pytest

from fairlead_server import cli
from fairlead_server.bench import quantiles, summary
from fairlead_server.load import Answer


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    assert raised.value.code == 0, captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def test_serve_counts_what_the_server_gave(capsys: pytest.CaptureFixture[str], fake_server: Any) -> None:
    sizes = ["--num-prompts", "12", "--input-len", "5", "--output-len", "7", "--max-concurrency", "4"]
    found = bench(capsys, "serve", "--url", fake_server.url, "--request-rate", "200", *sizes)
    assert (found["completed"], found["failed"], found["model"]) == (12, 0, "demo")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (60, 84)
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["e2el_ms"]["p99"]
    assert found["tpot_ms"]["mean"] > 0
    assert 0 < found["client_cpu_share"] <= 1


def test_latency_measures_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch-size", "2", "--input-len", "4", "--output-len", "3", "--num-iters", "2"]
    found = bench(capsys, "latency", "demo", "--num-iters-warmup", "1", *sizes)
    assert (found["batch_size"], found["num_iters"]) == (2, 2)
    assert found["latency_ms"]["mean"] > 0
    assert found["output_throughput"] > 0


def test_a_profile_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch-size", "2", "--input-len", "4", "--output-len", "3", "--num-iters", "1"]
    profile = bench(capsys, "latency", "demo", "--num-iters-warmup", "0", "--profile", *sizes)["profile"]
    prefill, decode = sorted(profile["steps"], key=lambda step: -int(step["num_rows"]))
    assert (prefill["num_rows"], prefill["num_steps"], decode["num_rows"], decode["num_steps"]) == (8, 1, 2, 2)
    for step in (prefill, decode):
        assert sum(one["ms"] for one in step["ops"]) == pytest.approx(step["step_ms"])
        assert {"attention", "linear qkv_proj", "rotary_embedding", "between ops"} <= {one["op"] for one in step["ops"]}
    inside = sum(step["step_ms"] * step["num_steps"] for step in profile["steps"])
    assert inside + profile["head_ms"] + profile["outside_model_ms"] == pytest.approx(profile["total_ms"])


def test_the_summary_of_known_times() -> None:
    good = Answer(start=1.0, end=2.0, times=[1.1, 1.3, 1.5], num_prompt_tokens=4, num_tokens=3)
    bad = Answer(start=1.0, end=9.0, error="status 429")
    found = summary([good, bad], 10.0)
    assert (found["completed"], found["failed"], found["output_throughput"]) == (1, 1, 0.3)
    assert found["ttft_ms"]["mean"] == pytest.approx(100)
    assert found["tpot_ms"]["p50"] == found["itl_ms"]["p50"] == pytest.approx(200)
    assert found["e2el_ms"]["p99"] == pytest.approx(1000)


def test_quantiles() -> None:
    assert quantiles([]) == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert quantiles([0.004, 0.001, 0.002, 0.003]) == {"mean": 2.5, "p50": 2.0, "p90": 4.0, "p99": 4.0}
    assert quantiles([i / 1000 for i in range(1, 101)])["p99"] == 99
