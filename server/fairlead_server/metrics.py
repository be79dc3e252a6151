"""Prometheus metrics, read from the engine's own counters when they are asked for: what is shown is exact.

Every series stands under `fairlead:` and under `vllm:`, the name that load balancers and dashboards know.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fairlead.engine.async_engine import AsyncEngine

PREFIXES = ("fairlead:", "vllm:")
_LABELS = ("model_name", "engine")

_GAUGES = {
    "num_requests_running": ("num_requests_running", "Requests of which a sequence runs."),
    "num_requests_waiting": ("num_requests_waiting", "Requests that wait for their first step."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the KV blocks that sequences hold, 0 to 1."),
}
_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences that lost their blocks and were computed again."),
    "kv_blocks_swapped_out": ("num_blocks_swapped_out", "KV blocks copied to the host."),
    "kv_blocks_swapped_in": ("num_blocks_swapped_in", "KV blocks copied back from the host."),
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens of the requests that were taken up."),
    "prompt_tokens_cached": ("num_cached_prompt_tokens", "Prompt tokens whose blocks were found in the prefix cache."),
    "generation_tokens": ("num_generation_tokens", "Tokens generated."),
    "prefix_cache_queries": ("num_prefix_queries", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_prefix_hits", "Tokens found in the prefix cache."),
}


class EngineCollector(Collector):
    """Turns an engine's last statistics into metrics."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = (model_name, "0")

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        for prefix in PREFIXES:
            for name, (attribute, text) in _GAUGES.items():
                gauge = GaugeMetricFamily(prefix + name, text, labels=_LABELS)
                gauge.add_metric(self._labels, getattr(stats, attribute))
                yield gauge
            for name, (attribute, text) in _COUNTERS.items():
                counter = CounterMetricFamily(prefix + name, text, labels=_LABELS)
                counter.add_metric(self._labels, getattr(stats, attribute))
                yield counter
            ended = CounterMetricFamily(
                prefix + "request_success", "Sequences that ended, by reason.", labels=(*_LABELS, "finished_reason")
            )
            for reason, count in self._engine.num_ended.items():
                ended.add_metric((*self._labels, reason.value), count)
            yield ended


def registry(engine: AsyncEngine, model_name: str) -> CollectorRegistry:
    """A registry of this engine alone."""
    made = CollectorRegistry()
    made.register(EngineCollector(engine, model_name))
    return made
