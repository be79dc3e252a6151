"""The routes that take a body: a right one for each, and the fields of all, as the server publishes them."""

from typing import Any

from fairlead.config import ServerConfig
from fairlead_server.app import create_app

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [300], "max_tokens": 2},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 2},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [300]},
}


def schemas() -> dict[str, dict[str, Any]]:
    """The fields of each route that takes a body, with their schemas."""
    engine = type("Engine", (), {"info": type("Info", (), {"model": "demo", "max_model_len": 9})(), "observer": None})()
    document = create_app(engine, ServerConfig()).openapi()
    found = {}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation:
                name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                found[path] = document["components"]["schemas"][name]["properties"]
    return found
