"""GET /health, /ping, /version and /metrics."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from fairlead import __version__
from fairlead_server import metrics
from fairlead_server.errors import ApiError
from fairlead_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes that probes, load balancers and dashboards ask."""
    routes = APIRouter()
    registry = metrics.registry(service.engine, service.model_name)

    @routes.get("/health")
    @routes.get("/ping")
    @routes.post("/ping")
    async def health() -> Response:
        if not service.engine.is_healthy:
            raise ApiError(503, "The engine has ended or hangs.", type="service_unavailable_error")
        return Response()

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @routes.get("/metrics")
    async def get_metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes
