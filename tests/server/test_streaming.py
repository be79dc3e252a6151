"""Streams that end early: the client leaves, a sequence fails, the engine dies."""

import gc
import json
import socket
import time
import types
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fairlead_server.service import Generation

LONG = {"prompt": [300, 301], "max_tokens": 200, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100, "ignore_eos": True}
REQUESTS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", LONG),
        ("/v1/completions", {**LONG, "prompt": [[300], [301]], "n": 2, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", CHAT),
    ],
    ids=["completion stream", "completion", "prompts", "chat stream", "chat"],
)


def events_of(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def send(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request and returns its socket, without reading the answer."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@REQUESTS
def test_a_client_that_leaves_aborts_its_request(
    fake_server: Any, until: Callable[..., bool], path: str, body: dict[str, Any]
) -> None:
    engine = fake_server.engine
    steps = engine.stats.num_steps
    connection = send(fake_server.url, path, body)
    assert until(lambda: engine.stats.num_requests_running > 0)
    connection.close()
    assert until(lambda: engine.stats.num_requests_running == 0 and engine.stats.kv_cache_usage == 0, 2)
    assert engine.stats.num_steps - steps < 150
    assert engine._streams == {}
    assert engine._outputs.num_requests == 0


def test_two_hundred_clients_that_leave_at_once(fake_server: Any, until: Callable[..., bool]) -> None:
    engine = fake_server.engine
    connections = [send(fake_server.url, "/v1/completions", {**LONG, "stream": True}) for _ in range(200)]
    assert until(lambda: engine.stats.num_requests_running > 100)
    for connection in connections:
        connection.close()
    assert until(lambda: engine.stats.num_requests_running == 0 and engine.stats.kv_cache_usage == 0, 2)
    assert httpx.post(f"{fake_server.url}/v1/completions", json={"prompt": [300]}).status_code == 200


def test_a_client_that_sends_half_a_body_leaves_nothing(fake_server: Any, client: httpx.Client) -> None:
    host, port = fake_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.05)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": 90}, {"max_tokens": 90, "n": 2}],
)
def test_an_error_in_the_middle_is_one_event_and_no_done(
    client: httpx.Client, fake: types.ModuleType, body: dict[str, Any]
) -> None:
    with client.stream("POST", "/v1/completions", json={"prompt": [fake.NAN], "stream": True, **body}) as response:
        assert response.status_code == 200
        events = events_of(response)
    assert "choices" in json.loads(events[0])
    assert [event for event in events if "error" in json.loads(event)] == events[-1:]
    assert json.loads(events[-1])["error"]["type"] == "server_error"


def test_a_dying_engine_ends_its_streams_with_an_error_within_a_second(
    doomed_server: Any, fake: types.ModuleType
) -> None:
    body = {**CHAT, "stream": True}
    with (
        httpx.Client(base_url=doomed_server.url, timeout=10) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        start = time.monotonic()
        assert httpx.post(f"{doomed_server.url}/v1/completions", json={"prompt": [fake.DIE]}).status_code == 503
        events = [line.removeprefix("data: ") for line in lines if line]
    assert time.monotonic() - start < 1
    assert json.loads(events[-1])["error"]["type"] == "service_unavailable_error"


@REQUESTS
def test_what_a_request_leaves_needs_no_garbage_collector(
    client: httpx.Client, until: Callable[..., bool], path: str, body: dict[str, Any]
) -> None:
    def num_alive() -> int:
        return sum(type(found) is Generation for found in gc.get_objects())  # isinstance would ask each

    gc.collect()
    assert until(lambda: num_alive() == 0)
    gc.disable()  # its passes stop every stream
    try:
        for _ in range(3):
            assert client.post(path, json={**body, "max_tokens": 2}).status_code == 200
        assert until(lambda: num_alive() == 0)
    finally:
        gc.enable()
