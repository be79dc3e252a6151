"""security.md's tables over HTTP, on every route that takes a body and every field that its schema names."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from bodies import BODIES, schemas

PROBE: dict[str, Any] = {"prompt": [300], "max_tokens": 5, "ignore_eos": True}
GENERATING = ("/v1/completions", "/v1/chat/completions")

ODD: list[Any] = [
    *("1", True, 1.5, -1, 0, 10**9, 2**63, -(2**63) - 1, 10**400, -0.0, 1e308, 2**31),
    *({}, [], [[]], [{}], {"": None}, {"a": {"b": [1]}}, "", "x", "\x00", "../../etc/passwd", "x" * 1_000_000),
    *([None], ["x"] * 10_000, [-1], [1023], [1024], [2**63], [1.5], {"1023": 100}, {"1024": 1}, {"-1": 1}, {"x": 1}),
    *("{{ ''.__class__.__mro__ }}", {"type": "x"}, ["os.system"], "file:///etc/passwd", "http://169.254.169.254/"),
]


ROUTES = {path: sorted(fields) for path, fields in schemas().items()}
UNDECLARED = [  # known to others, or to nobody
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("tools", "tool_choice", "suffix", "chat_template", "prompt_embeds", "lora_request", "model_config", "__class__"),
]


@pytest.fixture(autouse=True)
def survives(fake_server: Any, client: httpx.Client, until: Callable[..., bool]) -> Iterator[None]:
    """ALIVE: after each test the same engine answers, and nothing is left over."""
    pid = fake_server.engine._connection.pid
    yield
    response = client.post("/v1/completions", json=PROBE)
    assert response.json()["usage"]["completion_tokens"] == 5
    assert fake_server.engine._connection.pid == pid
    assert until(lambda: fake_server.engine.stats.kv_cache_usage == 0)
    assert until(lambda: fake_server.service.num_active == 0)


def post(client: httpx.Client, path: str, content: bytes) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": "application/json"})


def refused(response: httpx.Response, *statuses: int) -> None:
    assert response.status_code in statuses, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(response.content) < 4000
    for secret in ("Traceback", "/fairlead", "site-packages", ".py", "0x"):
        assert secret not in response.text


def test_every_route_with_a_body_is_examined() -> None:
    assert set(ROUTES) == set(BODIES)
    assert all(len(fields) >= 2 for fields in ROUTES.values())


@pytest.mark.parametrize("path", ROUTES)
def test_odd_values_on_every_field_are_refused_or_harmless(
    client: httpx.Client, path: str, count: Callable[..., int]
) -> None:
    pairs = [(field, value) for field in (*ROUTES[path], *UNDECLARED) for value in ODD]
    pairs = random.Random(0).sample(pairs, min(count(60, full=10_000), len(pairs)))
    for field, value in pairs:
        body = {**BODIES[path], field: value}
        if path in GENERATING and field != "max_tokens":
            body["max_tokens"] = 2
        if field == "stream":
            body["stream"] = False if value is True else value
        response = post(client, path, json.dumps(body).encode())
        if response.status_code != 200:
            refused(response, 400, 404)


MALFORMED = {
    "empty": b"",
    "cut": b'{"prompt": ',
    "array": b"[]",
    "text": b'"x"',
    "number": b"1",
    "null": b"null",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "NaN": b'{"temperature": NaN, %s',
    "Infinity": b'{"x": -Infinity, %s',
    "digits": b'{"seed": ' + b"9" * 5000 + b", %s",
    "deep": b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b", %s",
    "deep objects": b'{"x": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b", %s",
    "bottomless": b"[" * 1_000_000,
    "trailing": b"{%s}",
    "surrogate": b'{"model": "\\ud800", %s',
    "pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bodies_are_400(client: httpx.Client, path: str, kind: str) -> None:
    rest = json.dumps(BODIES[path]).encode()[1:]
    content = MALFORMED[kind]
    refused(post(client, path, content.replace(b"%s", rest) if b"%s" in content else content), 400)


@pytest.mark.parametrize("path", ROUTES)
def test_other_kinds_of_bodies_are_415_and_other_methods_405(client: httpx.Client, path: str) -> None:
    content = json.dumps(BODIES[path]).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
    ):
        refused(client.post(path, content=content, headers={"content-type": kind}), 415)
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        refused(client.request(method, path), 405)
    gzipped = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(client.post(path, content=b"\x1f\x8b" + b"\x00" * 100, headers=gzipped), 400)


@pytest.mark.parametrize("path", ROUTES)
def test_a_large_body_is_413_before_it_is_parsed(fake_server: Any, path: str) -> None:

    host, port = fake_server.url.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=10)) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {10**12}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


NUMBERS: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 2**63, 10**6],
    "n": [0, -1, 10**9],
    "temperature": [-0.01, 2.01, 1e999],
    "top_p": [0, -0.1, 1.01],
    "top_k": [-2, 1.5],
    "presence_penalty": [2.01, -2.01],
    "frequency_penalty": [2.01, -2.01],
    "seed": [2**63, -(2**63) - 1],
    "logit_bias": [{"1024": 1}, {"1": 101}, {"1": -101}, {str(i): 1 for i in range(100_000)}],
    "stop": ["", [""], ["x"] * 10_000, 5, "x" * 1_000_000, ["y", "x" * 4097]],
    "min_tokens": [-1, 2**63],
    "best_of": [0, 10**9],
    "allowed_token_ids": [[], [-1], [1024]],
    "stop_token_ids": [[-1], [1.5], ["x"]],
    "logits_processors": [[{"qualname": "os.system"}], [""]],
    "prompt_logprobs": [-1, 10**6],
    "truncate_prompt_tokens": [0, -2, 2**63],
    "structured_outputs": [{"json": {}, "regex": "a"}, {"choice": []}, 5, {}],
    "guided_json": ["{", 5],
    "response_format": [{}, {"type": "x"}, {"type": "json_schema"}, "json"],
    "tools": [[], [{"type": "function", "function": {"name": "f"}}]],
    "prompt_embeds": ["AAAA"],
    "chat_template": ["{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"],
    "stream_options": [{"include_usage": True}, 5],
    "priority": [1, 2**63],
    "request_id": ["", "a\nb", "x" * 1000],
}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_and_sizes_out_of_bounds_are_400(client: httpx.Client, path: str, field: str) -> None:
    for value in NUMBERS[field]:
        text = json.dumps({**BODIES[path], field: value}).replace("Infinity", "1e999")
        refused(post(client, path, text.encode()), 400)


@pytest.mark.parametrize(
    "image", ["file:///etc/passwd", "http://127.0.0.1:1/", "http://2130706433/", "data:image/png;base64,AA"]
)
def test_nothing_is_fetched_or_read(client: httpx.Client, image: str) -> None:
    for kind in ("image_url", "video_url", "audio_url", "input_audio", "file"):
        part = {"type": kind, kind: {"url": image, "data": image}}
        refused(client.post(GENERATING[1], json={"messages": [{"role": "user", "content": [part]}]}), 400)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/embeddings", "/v1/responses", "/v1/messages", "/score", "/rerank", "/v1/load_lora_adapter", "/sleep"),
        *("/v1/responses/x", "/v1/responses/x/cancel", "/v1/messages/count_tokens", "/v1/score", "/v1/rerank", "/ui"),
        *("/v2/rerank", "/v1/unload_lora_adapter", "/is_sleeping", "/resume"),
        *(
            "/wake_up",
            "/reset_prefix_cache",
            "/pause",
            "/collective_rpc",
            "/v1/audio/transcriptions",
            "/docs",
            "/redoc",
        ),
    ],
)
def test_routes_that_are_not_there_yet_are_404(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        refused(client.request(method, path, headers={"origin": "https://evil.example"}), 404)


def test_special_tokens_in_a_users_text_stay_text(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    plain, tricky = (
        client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
        for text in ("x", f"x{info['eos_token']}")
    )
    eos = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert len(eos) == 1
    assert tricky.count(eos[0]) == plain.count(eos[0])


def test_a_number_too_many_is_refused_at_once(client: httpx.Client) -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        refused(client.post("/v1/completions", json={"prompt": [300], "n": 10**9}), 400)
        times.append(time.perf_counter() - start)
    print(f"n=10^9 is refused after {min(times) * 1000:.1f} ms")


def test_the_document_names_every_status_and_no_422(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
            assert {"401", "404", "503"} <= set(operation["responses"])
            if "requestBody" in operation:
                assert {"400", "408", "413", "415", "429", "504"} <= set(operation["responses"])
    assert "ValidationError" not in document["components"]["schemas"]
