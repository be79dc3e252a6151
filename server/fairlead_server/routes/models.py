"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from fairlead_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes that say what is served."""
    routes = APIRouter()
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "fairlead",
        "root": service.engine.info.model,
        "parent": None,
        "max_model_len": service.engine.info.max_model_len,
        "permission": [],
    }

    @routes.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return {"object": "list", "data": [model]}

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, object]:
        service.check_model(model_id)
        return model

    return routes
