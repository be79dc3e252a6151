"""The application: `create_app(engine)` gives an ASGI app that any server can run."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from fairlead import __version__
from fairlead.config import ServerConfig
from fairlead.engine.async_engine import AsyncEngine
from fairlead_server import errors, openapi
from fairlead_server.access import OPEN_PATHS, Keys, read_keys
from fairlead_server.middleware import Admission, BodyLimit, Failures, RequestIds
from fairlead_server.routes import chat, completions, health, models, tokenize
from fairlead_server.service import Service


def create_app(engine: AsyncEngine, config: ServerConfig | None = None) -> FastAPI:
    """Serves a started engine, which the caller shuts down; `app.state.service` tells what it is doing.

    Raises ConfigError if the keys cannot be read.
    """
    config = config or ServerConfig()
    keys = read_keys(config)
    app = FastAPI(title="Fairlead", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service = Service(engine=engine, config=config)
    for module in (models, completions, chat, tokenize, health):
        app.include_router(module.router(service))
    errors.install(app)
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
    return app
