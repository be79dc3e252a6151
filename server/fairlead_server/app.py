"""The application: `create_app(engine)` gives an ASGI app that any server can run."""

from fastapi import FastAPI

from fairlead import __version__
from fairlead.engine.async_engine import AsyncEngine
from fairlead_server import errors
from fairlead_server.middleware import BodyLimit, Failures, RequestIds
from fairlead_server.routes import chat, completions, health, models
from fairlead_server.service import Service


def create_app(engine: AsyncEngine, *, model_name: str | None = None) -> FastAPI:
    """Serves a started engine under `model_name` (its own name if not given). The caller shuts the engine down."""
    app = FastAPI(title="Fairlead", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(engine=engine, model_name=model_name or engine.info.model)
    for module in (models, completions, chat, health):
        app.include_router(module.router(service))
    errors.install(app)
    for middleware in (Failures, BodyLimit, RequestIds):  # the last one is the outermost
        app.add_middleware(middleware)
    return app
