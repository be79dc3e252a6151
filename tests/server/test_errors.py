"""Every error is OpenAI's envelope, on every path, and says nothing about the inside."""

import json
import types
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fairlead.errors import EngineDeadError
from fairlead_server import errors
from fairlead_server.middleware import Failures

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "demo", "prompt": "ROMEO:", "max_tokens": 2},
    CHAT: {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}
POSTS = pytest.mark.parametrize("path", BODIES)


def envelope(response: httpx.Response, status: int, *, param: str | None = None) -> dict[str, Any]:
    """Checks the envelope and returns what is in it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert len(response.text) < 1500
    assert body["error"]["param"] == param, response.text
    return body["error"]


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/v1", "/v1/embeddings", "/health/", "/v1/completions/", "/" + "x" * 5000]
)
def test_a_route_that_is_not_there_is_404(client: httpx.Client, path: str) -> None:
    assert envelope(client.get(path), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", COMPLETIONS), ("PUT", CHAT), ("POST", "/v1/models"), ("DELETE", "/health"), ("POST", "/metrics")],
)
def test_a_wrong_method_is_405(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert envelope(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"]


@POSTS
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"prompt": "x", "unknown": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"prompt": "x", "unknown": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "stop": "\\ud800"}',
    ],
    ids=[
        *("empty", "cut", "words", "array", "string", "null", "no UTF-8", "nested", "5000 digits", "deep"),
        *("NaN", "Infinity", "1e999", "surrogate", "surrogate in a field"),
    ],
)
def test_a_body_that_is_no_json_object_is_400(client: httpx.Client, path: str, content: bytes) -> None:
    envelope(client.post(path, content=content, headers={"content-type": "application/json"}), 400)


@POSTS
def test_a_body_of_another_content_type_is_415(client: httpx.Client, path: str) -> None:
    error = envelope(client.post(path, content=json.dumps(BODIES[path]).encode()), 415)
    assert "application/json" in error["message"]
    envelope(client.post(path, data={"prompt": "x"}), 415)


@POSTS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "1"),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("n", 0),
        ("n", 10**9),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 2**70),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["x"] * 10_000),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**70]),
        ("stop_token_ids", [1.5]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", 1),
        ("model", 3),
    ],
)
def test_a_wrong_value_is_400_and_names_its_field(client: httpx.Client, path: str, field: str, value: object) -> None:
    content = json.dumps({**BODIES[path], field: value}).encode()
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    envelope(response, 400, param=field)


@POSTS
@pytest.mark.parametrize("max_tokens", [1000, 2**63, 2**80])
def test_more_than_the_context_holds_is_400(client: httpx.Client, path: str, max_tokens: int) -> None:
    error = envelope(client.post(path, json={**BODIES[path], "max_tokens": max_tokens}), 400, param="max_tokens")
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 256 tokens" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_400(client: httpx.Client, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "word " * 500}], "stream": stream}
    for response in (
        client.post(COMPLETIONS, json={"prompt": [5] * 256, "stream": stream}),
        client.post(COMPLETIONS, json={"prompt": "word " * 2000, "stream": stream}),
        client.post(CHAT, json=chat),
    ):
        error = envelope(response, 400, param="prompt")
        assert error["code"] == "context_length_exceeded"
        assert "This model's maximum context length is" in error["message"]


@POSTS
def test_an_unknown_model_is_404(client: httpx.Client, path: str) -> None:
    error = envelope(client.post(path, json={**BODIES[path], "model": "gpt-9"}), 404, param="model")
    assert error["message"] == "The model `gpt-9` does not exist."
    envelope(client.post(path, json={**BODIES[path], "model": "x" * 10_000}), 404, param="model")


def test_an_unknown_model_of_the_list_is_404(client: httpx.Client) -> None:
    envelope(client.get("/v1/models/org/name"), 404, param="model")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [""],
        {},
        5,
        None,
        [1.5],
        [True],
        [[1], "a"],
        ["a", 1],
        [-1],
        [5000],
        [10**30],
        ["x"] * 2000,
    ],
    ids=repr,
)
def test_a_wrong_prompt_is_400(client: httpx.Client, prompt: object) -> None:
    content = json.dumps({"prompt": prompt}).encode()
    response = client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    envelope(response, 400, param="prompt")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hi",
        [{}],
        ["Hi"],
        [{"role": "boss", "content": "Hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_wrong_messages_are_400(client: httpx.Client, messages: object) -> None:
    envelope(client.post(CHAT, json={"messages": messages}), 400, param="messages")


def test_surrogates_in_a_message_are_400(client: httpx.Client) -> None:
    content = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_alone_refuses_is_400_even_for_a_stream(
    client: httpx.Client, fake: types.ModuleType, stream: bool
) -> None:
    error = envelope(client.post(COMPLETIONS, json={"prompt": [fake.REJECT], "stream": stream}), 400, param="prompt")
    assert error["message"] == "the fake engine takes no such prompt"


def test_a_sequence_that_fails_is_500(client: httpx.Client, fake: types.ModuleType) -> None:
    response = client.post(COMPLETIONS, json={"prompt": [fake.NAN], "max_tokens": 90})
    assert envelope(response, 500)["type"] == "server_error"


def test_a_dead_engine_is_503(doomed_server: Any, fake: types.ModuleType, until: Callable[..., bool]) -> None:
    with httpx.Client(base_url=doomed_server.url) as client:
        assert client.get("/health").status_code == 200
        envelope(client.post(COMPLETIONS, json={"prompt": [fake.RAISE]}), 503)
        assert until(lambda: client.get("/health").status_code == 503, 1)
        envelope(client.get("/ping"), 503)
        for path, body in BODIES.items():
            assert "engine" in envelope(client.post(path, json=body), 503)["message"]
        assert 'fairlead:num_requests_running{engine="0",model_name="demo"} 0.0' in client.get("/metrics").text


def test_a_fault_of_ours_is_a_bare_500() -> None:
    app = FastAPI()
    errors.install(app)
    app.add_middleware(Failures)

    @app.get("/fault")
    async def fault() -> None:
        raise ZeroDivisionError("secret /etc/path")

    response = TestClient(app, raise_server_exceptions=False).get("/fault")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed on this request."


def test_what_the_client_of_a_dead_engine_sees_names_no_cause() -> None:
    assert "signal" not in str(errors.as_api_error(EngineDeadError("killed by signal 9")))


def test_a_message_is_cut_and_valid_unicode() -> None:
    body = errors.ApiError(400, "\ud800" + "x" * 1000).body
    assert json.dumps(body).startswith('{"error": {"message": "?xxx')
    assert len(json.dumps(body)) < 700
