"""/metrics: the names that others read, exact counts, and nothing left over."""

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

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
    assert response.headers["content-type"].startswith("text/plain; version=")
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
