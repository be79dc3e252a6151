"""/metrics: the names that others read, exact counts, and nothing left over."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fairlead.config import ServerConfig
from fairlead_server.metrics import SERIES, Rates, exposition

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    "num_preemptions",
    "kv_blocks_swapped_out",
    "kv_blocks_swapped_in",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
)


def samples(client: httpx.Client) -> dict[tuple[str, str | None], float]:
    """Every sample by name and finished_reason."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("demo", "0")
            found[sample.name, sample.labels.get("finished_reason")] = sample.value
    return found


@pytest.mark.parametrize("prefix", ["fairlead:", "vllm:"])
def test_the_names_are_there(client: httpx.Client, prefix: str) -> None:
    names = {name for name, _ in samples(client)}
    assert {prefix + name for name in GAUGES} | {f"{prefix}{name}_total" for name in COUNTERS} <= names
    reasons = {reason for name, reason in samples(client) if name == f"{prefix}request_success_total"}
    assert reasons == {"stop", "length", "abort", "error"}


def test_counts_are_exact(client: httpx.Client, until: Any) -> None:
    before = samples(client)
    prompts = [[300] * size for size in range(1, 11)]
    usages = [
        client.post("/v1/completions", json={"prompt": p, "max_tokens": 3, "n": 2, "ignore_eos": True}).json()["usage"]
        for p in prompts
    ]
    client.post("/v1/completions", json={"prompt": [300, 301], "max_tokens": 9, "stop_token_ids": [301]})

    def grown(name: str, reason: str | None = None) -> float:
        return samples(client)[name, reason] - before[name, reason]

    assert until(lambda: grown("fairlead:generation_tokens_total") == 62)
    assert sum(usage["prompt_tokens"] for usage in usages) == 55
    assert grown("fairlead:prompt_tokens_total") == grown("vllm:prompt_tokens_total") == 57
    assert sum(usage["completion_tokens"] for usage in usages) == 60
    assert grown("fairlead:request_success_total", "length") == 20
    assert grown("vllm:request_success_total", "stop") == 1
    assert until(lambda: samples(client)["fairlead:num_requests_running", None] == 0)
    assert samples(client)["vllm:kv_cache_usage_perc", None] == 0


def test_what_clients_send_stands_in_no_label_and_no_log(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def labels() -> set[tuple[str, ...]]:
        families = list(text_string_to_metric_families(client.get("/metrics").text))
        return {(s.name, *s.labels, *s.labels.values()) for family in families for s in family.samples}

    before, canary = labels(), "canary"
    caplog.set_level("DEBUG")
    chat = [{"role": "user", "content": canary}]
    for path, body, status in (
        ("/v1/completions", {"prompt": canary, "stop": [canary], "cache_salt": canary, "request_id": canary}, 200),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 2, "user": canary, "stream": True}, 200),
        ("/v1/completions", {"prompt": canary, "model": canary}, 404),
        ("/v1/completions", {"prompt": canary, "temperature": canary}, 400),
        ("/v1/chat/completions", {"messages": [*chat, {"role": "user"}]}, 400),
        ("/v1/completions", {"prompt": [1003], "max_tokens": 90, "user": canary}, 500),
        ("/tokenize", {"prompt": canary}, 200),
    ):
        response = client.post(path, json=body, headers={"x-request-id": canary})
        assert response.status_code == status, response.text
    assert labels() == before
    clients_own = ("httpx", "httpcore")
    lines = [caplog.handler.format(record) for record in caplog.records if not record.name.startswith(clients_own)]
    assert any("/v1/completions" in line for line in lines)
    assert [line for line in lines if canary in line] == []


def test_every_series_of_the_table_is_exposed_under_its_prefixes(serving: Any) -> None:
    current = {series.name for series in SERIES if not series.is_legacy}
    legacy = {series.name for series in SERIES if series.is_legacy}
    for compat, own, vllm in (
        ("none", current, set()),
        ("vllm", current, current),
        ("vllm-legacy", current, current | legacy),
    ):
        with serving(ServerConfig(metrics_compat=compat)) as server:
            families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
            names = {family.name for family in families if family.samples}
        assert {name.removeprefix("fairlead:") for name in names if name.startswith("fairlead:")} == own
        assert {name.removeprefix("vllm:") for name in names if name.startswith("vllm:")} == vllm
        assert len(names) == len(own) + len(vllm)


def test_histograms_count_each_request_once(serving: Any, until: Any) -> None:
    with serving() as server, httpx.Client(base_url=server.url) as client:
        for size in (1, 5, 9):
            body = {"prompt": [300] * size, "max_tokens": 4, "ignore_eos": True, "n": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        with client.stream("POST", "/v1/completions", json={"prompt": [300], "max_tokens": 200, "stream": True}) as cut:
            next(cut.iter_lines())
        assert until(lambda: samples(client)["fairlead:request_success_total", "abort"] == 1)
        found = samples(client)
        for prefix in ("fairlead:", "vllm:"):
            for name, total in (
                ("request_prompt_tokens", 15),
                ("request_generation_tokens", 24),
                ("request_params_n", 6),
                ("request_params_max_tokens", 12),
            ):
                assert (found[f"{prefix}{name}_count", None], found[f"{prefix}{name}_sum", None]) == (3, total)
            for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
                assert found[f"{prefix}{name}_seconds_count", None] == 3
                assert found[f"{prefix}{name}_seconds_sum", None] >= 0
        parts = ("request_prefill_time_seconds", "request_decode_time_seconds")
        inference = found["fairlead:request_inference_time_seconds_sum", None]
        assert sum(found[f"fairlead:{part}_sum", None] for part in parts) == pytest.approx(inference, abs=0.2)
        assert found["fairlead:inter_token_latency_seconds_count", None] >= 3 * 3
        steps = server.engine.stats
        assert found["fairlead:iteration_tokens_total_sum", None] == steps.num_scheduled_tokens
        assert found["fairlead:iteration_tokens_total_count", None] == steps.num_steps


def test_the_legacy_rates_fall_back_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("fairlead_server.metrics.time.monotonic", lambda: now)
    rates = Rates()
    now = 105.0
    assert rates.read(50, 100) == (10, 20)
    now = 110.0
    assert rates.read(100, 100) == (10, 10)
    now = 130.0
    rates.read(100, 100)
    now = 140.0
    assert rates.read(100, 100) == (0, 0)


def test_others_go_on_between_any_two_metrics() -> None:
    """A scrape is many milliseconds of work: streams must not wait for all of it."""

    class Three(Collector):
        def collect(self) -> Iterator[Metric]:
            for i in range(3):
                turns.append("metrics")
                yield GaugeMetricFamily(f"gauge_{i}", "One of three.", value=i)

    async def other() -> None:
        while True:
            turns.append("other")
            await asyncio.sleep(0)

    async def both() -> bytes:
        task = asyncio.create_task(other())
        text = await exposition(Three())
        task.cancel()
        return text

    turns: list[str] = []
    text = asyncio.run(both())
    assert turns == ["metrics", "other"] * 3
    assert text == generate_latest(Three())
