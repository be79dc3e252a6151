"""The application: `create_app(engine)` gives an ASGI app that any server can run."""

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fairlead import __version__
from fairlead.config import ServerConfig
from fairlead.engine.async_engine import AsyncEngine
from fairlead.errors import ConfigError
from fairlead_server import errors, openapi
from fairlead_server.access import OPEN_PATHS, Keys, read_keys
from fairlead_server.middleware import Admission, BodyLimit, Failures, RequestIds
from fairlead_server.routes import chat, completions, health, models, tokenize
from fairlead_server.service import Service

if TYPE_CHECKING:
    from fairlead_server.tracing import Callers


def create_app(engine: AsyncEngine, config: ServerConfig | None = None) -> FastAPI:
    """Serves a started engine, which the caller shuts down; `app.state.service` tells what it is doing.

    Raises ConfigError if the keys cannot be read, or if the package that sends traces is not there.
    """
    config = config or ServerConfig()
    check_tracing(config)
    keys = read_keys(config)
    app = FastAPI(title="Fairlead", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service = Service(engine=engine, config=config)
    for module in (completions, chat, models, tokenize, health):  # looked through in this order
        app.router.routes.extend(module.router(service).routes)  # include_router's are looked up twice for each call
    errors.install(app)
    callers = _trace(service, config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    setattr(app, "openapi", lambda: openapi.document(app, service.model_names))  # noqa: B010  (how FastAPI has it replaced)
    app.add_middleware(Failures)  # the innermost; every further one lies around those before it
    app.add_middleware(BodyLimit)
    app.add_middleware(Admission, service=service)
    if keys:
        open_paths = OPEN_PATHS | {b"/metrics"} if config.metrics_without_key else OPEN_PATHS
        app.add_middleware(Keys, keys=keys, open_paths=open_paths)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=list(config.cors_methods),
            allow_headers=list(config.cors_headers),
            allow_credentials=config.cors_credentials,
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestIds)
    if callers is not None:
        app.add_middleware(callers)
    return app


def check_tracing(config: ServerConfig) -> None:
    """Raises ConfigError if traces are asked for and OpenTelemetry is not installed."""
    if config.otlp_traces_endpoint is None:
        return
    try:
        import fairlead_server.tracing  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint needs OpenTelemetry, but {error}; pip install 'fairlead[otel]'"
        ) from error


def _trace(service: Service, endpoint: str) -> "type[Callers]":
    """Sends traces of the service's requests; returns the middleware that finds out whose they are."""
    from fairlead_server.tracing import CALLER, Callers, Tracing

    Tracing(service.engine, service.model_names[0], endpoint)
    service.caller = CALLER.get
    return Callers
