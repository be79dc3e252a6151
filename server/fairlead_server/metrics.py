"""Prometheus metrics. Counters and gauges are the engine's own, read when they are asked for: what is shown is exact.

Every series stands under `fairlead:` and, unless --metrics-compat says otherwise, under `vllm:`, the name that load
balancers and dashboards know. SERIES lists them all; the documentation is made from it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fairlead.engine.async_engine import Timeline
from fairlead.request import FinishReason, Request, RequestOutput
from fairlead_server.service import Service

OWN, COMPATIBLE = "fairlead:", "vllm:"
RATE_S = 10.0  # the averages of the legacy series look back so far

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


def _steps(low: float, high: float) -> tuple[float, ...]:
    """1, 2, 5, 10, … times `low`, up to `high`."""
    found, scale = [], low
    while scale <= high:
        found += [scale * factor for factor in (1, 2, 5) if scale * factor <= high]
        scale *= 10
    return tuple(float(f"{value:.6g}") for value in found)


SECONDS, TOKENS, COUNTS = _steps(0.001, 2000), _steps(1, 200_000), _steps(1, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series without its prefix. `extra` names its labels beyond model_name and engine."""

    name: str
    kind: str
    help: str
    extra: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    is_legacy: bool = False

    @property
    def full_name(self) -> str:
        """As it is exposed: counters end in _total."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _gauge(name: str, help: str, *extra: str, legacy: bool = False) -> Series:
    return Series(name=name, kind="gauge", help=help, extra=extra, is_legacy=legacy)


def _counter(name: str, help: str, *extra: str, legacy: bool = False) -> Series:
    return Series(name=name, kind="counter", help=help, extra=extra, is_legacy=legacy)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *, legacy: bool = False) -> Series:
    return Series(name=name, kind="histogram", help=help, buckets=buckets, is_legacy=legacy)


SERIES = (
    _gauge("num_requests_running", "Requests of which a sequence runs."),
    _gauge("num_requests_waiting", "Requests that wait for their first step."),
    _gauge("kv_cache_usage_perc", "Share of the KV blocks that sequences hold, 0 to 1."),
    _gauge("engine_sleep_state", "1 for the state that the engine is in.", "sleep_state"),
    _gauge("cache_config_info", "Always 1; the labels are the cache's settings.", "block_size", "num_gpu_blocks"),
    _counter("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    _counter("prefix_cache_hits", "Tokens found in the prefix cache."),
    _counter("num_preemptions", "Sequences that lost their blocks and were computed again."),
    _counter("kv_blocks_swapped_out", "KV blocks copied to the host."),
    _counter("kv_blocks_swapped_in", "KV blocks copied back from the host."),
    _counter("prompt_tokens", "Prompt tokens of the requests that were taken up."),
    _counter("prompt_tokens_cached", "Prompt tokens whose blocks were found in the prefix cache."),
    _counter("generation_tokens", "Tokens generated."),
    _counter("request_success", "Sequences that ended, by reason.", "finished_reason"),
    _counter("admission_rejections", "Requests that were not run, by reason.", "reason"),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS),
    _histogram("request_generation_tokens", "Tokens that a request generated.", TOKENS),
    _histogram("iteration_tokens_total", "Tokens that a step computed.", TOKENS),
    _histogram("request_params_n", "The n of a request.", COUNTS),
    _histogram("request_params_max_tokens", "The max_tokens of a request.", TOKENS),
    _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS),
    _histogram("inter_token_latency_seconds", "Between two steps in which a request got tokens.", SECONDS),
    _histogram("request_time_per_output_token_seconds", "A request's mean time per token after its first.", SECONDS),
    _histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", SECONDS),
    _histogram("request_queue_time_seconds", "From a request's arrival to its first step.", SECONDS),
    _histogram("request_inference_time_seconds", "From a request's first step to its end.", SECONDS),
    _histogram("request_prefill_time_seconds", "From a request's first step to its first token.", SECONDS),
    _histogram("request_decode_time_seconds", "From a request's first token to its last.", SECONDS),
    _gauge("gpu_cache_usage_perc", "Old name of kv_cache_usage_perc.", legacy=True),
    _counter("gpu_prefix_cache_queries", "Old name of prefix_cache_queries.", legacy=True),
    _counter("gpu_prefix_cache_hits", "Old name of prefix_cache_hits.", legacy=True),
    _gauge("gpu_prefix_cache_hit_rate", "Share of the looked-up tokens that were found.", legacy=True),
    _gauge("num_requests_swapped", "Always 0: a request whose blocks were taken is one that waits.", legacy=True),
    _histogram("time_per_output_token_seconds", "Old name of inter_token_latency_seconds.", SECONDS, legacy=True),
    _gauge("avg_prompt_throughput_toks_per_s", f"Prompt tokens per second, over {RATE_S:g} s.", legacy=True),
    _gauge("avg_generation_throughput_toks_per_s", f"Generated tokens per second, over {RATE_S:g} s.", legacy=True),
)

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values by the labels that a series has beyond the common ones."""


class RequestHistograms:
    """Observes an engine's steps and requests. A request that was aborted is no measurement of the engine."""

    def __init__(self) -> None:
        self.by_name = {
            series.name: Histogram(series.name, series.help, registry=None, buckets=series.buckets)
            for series in SERIES
            if series.kind == "histogram" and not series.is_legacy
        }

    def step(self, num_tokens: float) -> None:
        self._observe("iteration_tokens_total", num_tokens)

    def gap(self, seconds: float) -> None:
        self._observe("inter_token_latency_seconds", seconds)

    def ended(self, request: Request, output: RequestOutput, times: Timeline, now: float) -> None:
        if any(s.finish_reason in (FinishReason.ABORT, FinishReason.ERROR) for s in output.outputs):
            return
        num_generated = sum(len(sequence.token_ids) for sequence in output.outputs)
        self._observe("request_prompt_tokens", len(request.prompt_token_ids))
        self._observe("request_generation_tokens", num_generated)
        self._observe("request_params_n", request.params.n)
        if request.params.max_tokens is not None:
            self._observe("request_params_max_tokens", request.params.max_tokens)
        self._observe("e2e_request_latency_seconds", now - times.arrived)
        if times.first_token is None or times.last_token is None:
            return
        started = times.arrived if times.started is None else times.started
        decode = times.last_token - times.first_token
        self._observe("time_to_first_token_seconds", times.first_token - times.arrived)
        self._observe("request_queue_time_seconds", started - times.arrived)
        self._observe("request_inference_time_seconds", now - started)
        self._observe("request_prefill_time_seconds", times.first_token - started)
        self._observe("request_decode_time_seconds", decode)
        longest = max(len(sequence.token_ids) for sequence in output.outputs)
        if longest > 1:
            self._observe("request_time_per_output_token_seconds", decode / (longest - 1))

    def _observe(self, name: str, value: float) -> None:
        self.by_name[name].observe(value)


class Rates:
    """Tokens per second over the last RATE_S, from counters that are read when somebody asks."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def read(self, num_prompt: int, num_generated: int) -> tuple[float, float]:
        now = time.monotonic()
        while len(self._seen) > 1 and self._seen[1][0] <= now - RATE_S:
            self._seen.popleft()
        then, prompt, generated = self._seen[0]
        self._seen.append((now, num_prompt, num_generated))
        seconds = max(now - then, 0.001)
        return (num_prompt - prompt) / seconds, (num_generated - generated) / seconds


class ServerCollector(Collector):
    """Turns what engine and server count into metrics."""

    def __init__(self, service: Service, histograms: RequestHistograms) -> None:
        self._service, self._histograms = service, histograms
        self._labels = {"model_name": service.model_names[0], "engine": "0"}
        self._rates = Rates()

    def collect(self) -> Iterator[Metric]:
        compat = self._service.config.metrics_compat
        samples = self._samples()
        for prefix in (OWN,) if compat == "none" else (OWN, COMPATIBLE):
            for series in SERIES:
                if not series.is_legacy or (prefix == COMPATIBLE and compat == "vllm-legacy"):
                    yield self._metric(prefix, series, samples)

    def _metric(self, prefix: str, series: Series, samples: Mapping[str, Samples]) -> Metric:
        metric = Metric(prefix + series.name, series.help, series.kind)
        if series.kind == "histogram":
            source = "inter_token_latency_seconds" if series.is_legacy else series.name
            for sample in next(iter(self._histograms.by_name[source].collect())).samples:
                if not sample.name.endswith("_created"):
                    name = prefix + series.name + sample.name.removeprefix(source)
                    metric.add_sample(name, self._labels | sample.labels, sample.value)
            return metric
        for extra, value in samples[series.name]:
            labels = self._labels | dict(zip(series.extra, extra, strict=True))
            metric.add_sample(prefix + series.full_name, labels, value)
        return metric

    def _samples(self) -> Mapping[str, Samples]:
        engine, stats = self._service.engine, self._service.engine.stats
        hit_rate = stats.num_prefix_hits / stats.num_prefix_queries if stats.num_prefix_queries else 0.0
        prompt_rate, generation_rate = self._rates.read(stats.num_prompt_tokens, stats.num_generation_tokens)
        plain: dict[str, float] = {
            "num_requests_running": stats.num_requests_running,
            "num_requests_waiting": stats.num_requests_waiting,
            "kv_cache_usage_perc": stats.kv_cache_usage,
            "prefix_cache_queries": stats.num_prefix_queries,
            "prefix_cache_hits": stats.num_prefix_hits,
            "num_preemptions": stats.num_preemptions,
            "kv_blocks_swapped_out": stats.num_blocks_swapped_out,
            "kv_blocks_swapped_in": stats.num_blocks_swapped_in,
            "prompt_tokens": stats.num_prompt_tokens,
            "prompt_tokens_cached": stats.num_cached_prompt_tokens,
            "generation_tokens": stats.num_generation_tokens,
            "gpu_cache_usage_perc": stats.kv_cache_usage,
            "gpu_prefix_cache_queries": stats.num_prefix_queries,
            "gpu_prefix_cache_hits": stats.num_prefix_hits,
            "gpu_prefix_cache_hit_rate": hit_rate,
            "num_requests_swapped": 0,
            "avg_prompt_throughput_toks_per_s": prompt_rate,
            "avg_generation_throughput_toks_per_s": generation_rate,
        }
        info = engine.info
        return {name: [((), value)] for name, value in plain.items()} | {
            "engine_sleep_state": [((state,), float(state == "awake")) for state in SLEEP_STATES],
            "cache_config_info": [((str(info.block_size), str(info.num_blocks)), 1.0)],
            "request_success": [((reason.value,), count) for reason, count in engine.num_ended.items()],
            "admission_rejections": [((reason,), count) for reason, count in self._service.num_refused.items()],
        }


class _Alone(Collector):
    """One metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


async def exposition(collector: Collector) -> bytes:
    """All metrics as text. It gives way to others after each of them: the whole takes a processor 10 ms and more."""
    text = b""
    for metric in collector.collect():
        text += generate_latest(_Alone(metric))
        await asyncio.sleep(0)
    return text


def observe(service: Service) -> ServerCollector:
    """The metrics of this server alone, whose engine is observed from now on."""
    histograms = RequestHistograms()
    service.engine.observer = histograms
    return ServerCollector(service, histograms)
