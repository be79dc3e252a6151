"""OpenTelemetry: a span per request, under the caller's, with counts and no text."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fairlead.config import ServerConfig
from fairlead.errors import ConfigError
from fairlead_server import tracing
from fairlead_server.app import create_app

Serving = Callable[..., AbstractContextManager[Any]]
CONFIG = ServerConfig(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Stands in for the collector."""
    made = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda endpoint: made)
    return made


def test_a_request_is_a_span_under_its_caller(serving: Serving, exporter: InMemorySpanExporter) -> None:
    body = {"prompt": [300, 301], "max_tokens": 5, "n": 2, "ignore_eos": True}
    with serving(CONFIG) as server:
        for headers in ({"traceparent": f"00-{TRACE}-{PARENT}-01"}, {}, {"traceparent": "nonsense"}):
            assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
        assert "request_success_total" in httpx.get(f"{server.url}/metrics").text
        server.engine.observer.provider.force_flush()
        spans = exporter.get_finished_spans()
        server.engine.observer.provider.shutdown()
    assert len(spans) == 3
    first = spans[0]
    assert first.parent is not None
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    assert [span.parent for span in spans[1:]] == [None, None]
    found = dict(first.attributes or {})
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (2, 10)
    assert found["gen_ai.response.finish_reasons"] == ("length", "length")
    assert found["gen_ai.request.model"] == "demo"
    took = found["gen_ai.latency.e2e"]
    assert 0 < found["gen_ai.latency.time_to_first_token"] < took  # type: ignore[operator]
    assert first.end_time is not None
    assert first.start_time is not None
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(took, abs=1e-3)


def test_metrics_still_count(serving: Serving, exporter: InMemorySpanExporter) -> None:
    with serving(CONFIG) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": [300], "max_tokens": 3, "ignore_eos": True})
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        server.engine.observer.provider.shutdown()
    [num] = [line.split()[-1] for line in lines if line.startswith("fairlead:request_generation_tokens_count{")]
    assert float(num) == 1


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairlead_server.tracing", None)
    engine = type("Engine", (), {"info": type("Info", (), {"model": "demo", "max_model_len": 9})(), "observer": None})()
    with pytest.raises(ConfigError, match=r"needs OpenTelemetry, but .*; pip install 'fairlead\[otel\]'"):
        create_app(engine, CONFIG)
