"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from fairlead_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes that say what is served."""
    routes = APIRouter()

    def entry(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "fairlead",
            "root": service.model_names[0],
            "parent": None,
            "max_model_len": service.engine.info.max_model_len,
            "permission": [],
        }

    @routes.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return {"object": "list", "data": [entry(name) for name in service.model_names]}

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, object]:
        return entry(service.model_name(model_id))

    return routes
