"""What /openapi.json says beyond FastAPI's own: our errors, in place of its 422, and streams."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
        }
    },
}
EVERYWHERE = {
    "401": "A key is needed.",
    "404": "There is no such route or model.",
    "431": "The head is too large.",
    "503": "The server drains, or its engine has ended.",
}
OF_BODIES = {
    "400": "The request is invalid.",
    "408": "The client stopped sending.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "The queue is full.",
    "500": "The model failed on this request.",
    "504": "The request took too long.",
}
EMPTY = {"/health", "/health/live", "/health/ready", "/health/startup", "/ping"}


def document(app: FastAPI, model_names: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI document of the application, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for schema in schemas.values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"enum": [*model_names, None], "default": None, "title": "Model"}
        schemas["Error"] = ERROR
        for path, methods in made["paths"].items():
            for operation in methods.values():
                _describe(path, operation)
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema


def _describe(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path in EMPTY:
        responses["200"] = {"description": "All is well."}
    elif path == "/metrics":
        responses["200"] = {"description": "Metrics in Prometheus' text format.", "content": {"text/plain": {}}}
    elif path in ("/v1/completions", "/v1/chat/completions"):
        responses["200"]["content"] = {"application/json": {}, "text/event-stream": {}}
    for status, text in (EVERYWHERE | (OF_BODIES if "requestBody" in operation else {})).items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[status] = {"description": text, "content": content}
