"""OpenTelemetry traces: one span per request of the engine, under the caller's span. Needs fairlead[otel].

What a span is called, and its attributes, follow the semantic conventions for generative AI. No text is in any span.
"""

import contextvars
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from fairlead import __version__
from fairlead.engine.async_engine import AsyncEngine, EngineObserver, Timeline
from fairlead.request import FinishReason, Request, RequestOutput

CALLER: contextvars.ContextVar[Context | None] = contextvars.ContextVar("caller", default=None)
_HEADERS = ("traceparent", "tracestate")


class Tracing:
    """Observes an engine from now on, beside the observer that it has. Spans leave in a thread of their own.

    `endpoint` takes OTLP over HTTP, such as http://localhost:4318/v1/traces; `exporter` takes its place in tests.
    """

    def __init__(self, engine: AsyncEngine, model: str, endpoint: str, exporter: SpanExporter | None = None) -> None:
        self._engine, self._model = engine, model
        self._inner: EngineObserver | None = engine.observer
        resource = Resource.create({"service.name": "fairlead", "service.version": __version__})
        self.provider = TracerProvider(resource=resource)  # it sends what is left when the process exits
        self.provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self.provider.get_tracer("fairlead", __version__)
        engine.observer = self

    def step(self, num_tokens: float) -> None:
        if self._inner is not None:
            self._inner.step(num_tokens)

    def gap(self, seconds: float) -> None:
        if self._inner is not None:
            self._inner.gap(seconds)

    def ended(self, request: Request, output: RequestOutput, times: Timeline, now: float) -> None:
        if self._inner is not None:
            self._inner.ended(request, output, times, now)
        offset_s = time.time() - time.monotonic()
        span = self._tracer.start_span(
            "llm_request",
            context=times.caller if isinstance(times.caller, Context) else Context(),
            kind=SpanKind.SERVER,
            start_time=_ns(times.arrived + offset_s),
            attributes=self._attributes(request, output, times, now),
        )
        if any(sequence.finish_reason == FinishReason.ERROR for sequence in output.outputs):
            span.set_status(Status(StatusCode.ERROR, "the engine failed on this request"))
        span.end(end_time=_ns(now + offset_s))

    def _attributes(
        self, request: Request, output: RequestOutput, times: Timeline, now: float
    ) -> Mapping[str, str | int | float | list[str]]:
        params = request.params
        found: dict[str, str | int | float | list[str]] = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": sum(len(sequence.token_ids) for sequence in output.outputs),
            "gen_ai.response.finish_reasons": [str(sequence.finish_reason) for sequence in output.outputs],
            "gen_ai.latency.e2e": now - times.arrived,
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        if times.started is not None:
            found["gen_ai.latency.time_in_queue"] = times.started - times.arrived
        if times.first_token is not None:
            found["gen_ai.latency.time_to_first_token"] = times.first_token - times.arrived
        return found


class Callers:
    """Notes the trace that a request belongs to, by its `traceparent` header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            CALLER.set(self._propagator.extract({k: named[k] for k in _HEADERS if k in named}, Context()))
        await self._app(scope, receive, send)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
