"""GET /health and its kin, /ping, /version, /load and /metrics."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from fairlead import __version__
from fairlead_server import metrics
from fairlead_server.errors import unavailable
from fairlead_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes that probes, load balancers and dashboards ask."""
    routes = APIRouter()
    collector = metrics.observe(service)

    @routes.get("/health")
    @routes.get("/health/live")
    @routes.get("/ping")
    @routes.post("/ping")
    async def live() -> Response:
        if not service.engine.is_healthy:
            raise unavailable("The engine has ended or hangs.")
        return Response()

    @routes.get("/health/startup")
    async def startup() -> Response:
        """The server answers once the model is loaded, so an answer is all it takes."""
        return Response()

    @routes.get("/health/ready")
    async def ready() -> Response:
        if service.is_draining:
            raise unavailable("The server is about to stop.")
        return await live()

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @routes.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": service.num_active}

    @routes.get("/metrics")
    async def get_metrics() -> Response:
        # The version that every scraper knows; 1.0.0, the library's latest, adds nothing but names that need quotes.
        return Response(await metrics.exposition(collector), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
