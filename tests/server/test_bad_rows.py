"""security.md's rows over HTTP, each on every route of the published table that it can reach."""

import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
from bodies import BODIES, CHAT, schemas

V = 1024  # of the embedded model, whose tokenizer the fake engine has
SAMPLES: dict[str, list[str]] = {  # JSON by the type that a schema names
    "integer": [],
    "number": [],
    "boolean": ["true"],
    "string": ['"1"'],
    "array": ["[[[]]]"],
    "object": ["{}"],
}
NEVER = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000]


ROUTES = schemas()
GENERATING = [path for path, fields in ROUTES.items() if "max_tokens" in fields]
CHATTING = [path for path, fields in ROUTES.items() if "messages" in fields]


def types_of(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a field takes."""
    if "anyOf" in schema:
        return set().union(*map(types_of, schema["anyOf"]))
    if "$ref" in schema:
        return {"object"}
    if "type" in schema:
        return {schema["type"]}
    return {"string"} if {"enum", "const"} & set(schema) else set(SAMPLES)


def wrong_values(schema: dict[str, Any]) -> Iterator[str]:
    """JSON of every type that the field does not take; a number for a truth value, and a truth value for a number."""
    taken = types_of(schema)
    for kind, samples in SAMPLES.items():
        if kind not in taken and kind != "integer":
            yield from samples
    if "number" not in taken:
        yield "1.5"
    if "boolean" in taken and not {"integer", "number"} & taken:
        yield "1"


def post(client: httpx.Client, path: str, fields: dict[str, Any], name: str = "", literal: str = "") -> httpx.Response:
    body = {key: json.dumps(value) for key, value in {**BODIES[path], **fields}.items()}
    if name:
        body[name] = literal
    content = ", ".join(f"{json.dumps(key)}: {value}" for key, value in body.items())
    return client.post(path, content=f"{{{content}}}".encode(), headers={"content-type": "application/json"})


def refused(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert response.status_code in statuses, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(response.content) < 4000
    return error


@pytest.fixture(autouse=True)
def survives(fake_server: Any, client: httpx.Client) -> Iterator[None]:
    """ALIVE: the same engine answers after each row."""
    pid = fake_server.engine._connection.pid
    yield
    assert post(client, "/v1/completions", {}).status_code == 200
    assert fake_server.engine._connection.pid == pid


def test_the_table_has_every_route() -> None:
    assert set(ROUTES) == set(BODIES)
    assert GENERATING == ["/v1/completions", "/v1/chat/completions"]
    assert set(CHATTING) == {"/v1/chat/completions", "/tokenize"}
    assert types_of({"anyOf": [{"type": "integer"}, {"type": "null"}]}) == {"integer", "null"}
    assert set(wrong_values({"type": "integer"})) == {"1.5", "true", '"1"', "[[[]]]", "{}"}
    assert set(wrong_values({"type": "boolean"})) == {"1", "1.5", '"1"', "[[[]]]", "{}"}


@pytest.mark.parametrize("path", ROUTES)
def test_a_wrong_type_is_400_on_every_field_and_names_it(
    client: httpx.Client, path: str, count: Callable[..., int]
) -> None:
    draw = random.Random(0)
    for name, schema in ROUTES[path].items():
        wrong = list(wrong_values(schema))
        for literal in draw.sample(wrong, min(len(wrong), count(1, full=10))):
            error = refused(post(client, path, {}, name, literal), 400)
            assert error["param"] == name, (name, literal, error)


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_no_number_is_400_on_every_field(client: httpx.Client, path: str, count: Callable[..., int]) -> None:
    draw = random.Random(1)
    for name in ROUTES[path]:
        for literal in draw.sample(NEVER, count(1, full=5)):
            refused(post(client, path, {}, name, literal), 400)


@pytest.mark.parametrize("path", ROUTES)
def test_a_number_of_any_size_is_no_fault_on_any_numeric_field(
    client: httpx.Client, path: str, count: Callable[..., int]
) -> None:
    draw = random.Random(2)
    for name, schema in ROUTES[path].items():
        if {"integer", "number"} & types_of(schema):
            sizes = ["-1", str(2**63), str(-(2**63)), str(2**63 - 1), "10" * 10, "-0.0", "1e308"]
            for literal in draw.sample(sizes, count(2, full=7)):
                response = post(client, path, {}, name, literal)
                assert response.status_code == 200 or refused(response, 400)


ROWS: dict[str, list[dict[str, Any]]] = {
    "code of a request": [{"logits_processors": [{"qualname": "os.system"}]}, {"logits_processors": [""]}],
    "stop": [{"stop": "x" * 1_000_000}, {"stop": ["x"] * 10_000}, {"stop": ""}, {"stop": ["a", ""]}],
    "the wrong width": [
        *({field: [bad]} for field in ("allowed_token_ids", "stop_token_ids") for bad in (-1, 2**31)),
        *({"allowed_token_ids": [V]}, {"logit_bias": {str(V): 1}}, {"logit_bias": {"-1": 1}}),
    ],
    "counts": [{"n": 10**9}, {"n": 0}, {"best_of": 10**9}, {"min_tokens": 2**62}, {"prompt_logprobs": 10**6}],
    "embeddings": [{"prompt_embeds": "gASVAAAAAAAAAA=="}],
    "templates": [{"chat_template": "{{ ''.__class__.__mro__ }}"}],
    "grammars": [
        *({"guided_regex": "(" * 30_000}, {"guided_json": {}, "guided_regex": "a"}, {"guided_choice": []}),
        *({"response_format": {"type": "json_schema"}}, {"structured_outputs": {}}),
    ],
    "tools": [{"tools": [{"type": "function", "function": {"name": "__import__('os')"}}]}, {"tools": []}],
    "the stream": [{"stream_options": {"include_usage": True}}, {"stream": "yes"}],
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("path", GENERATING)
def test_a_row_is_400_on_every_generating_route(client: httpx.Client, path: str, row: str) -> None:
    for fields in ROWS[row]:
        refused(post(client, path, fields), 400)


def test_the_last_token_of_the_vocabulary_passes_and_no_other(client: httpx.Client) -> None:
    for fields in ({"prompt": [V - 1]}, {"allowed_token_ids": [V - 1]}, {"logit_bias": {str(V - 1): 1}}):
        assert post(client, "/v1/completions", fields).status_code == 200
    for wrong in (V, -1, V + 63, 2**31, 2**63):
        refused(post(client, "/v1/completions", {"prompt": [wrong]}), 400)
        refused(post(client, "/detokenize", {"tokens": [wrong]}), 400)


MESSAGES: dict[str, Any] = {
    "none": [],
    "bad role": [{"role": "root", "content": "x"}],
    "null content": [{"role": "user", "content": None}],
    "null of a system": [{"role": "system"}],
    "an assistant without calls": [*CHAT, {"role": "assistant", "content": None}],
    "a number": [{"role": "user", "content": 5}],
    "a surrogate": [{"role": "user", "content": "\ud800"}],
}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("path", CHATTING)
def test_bad_messages_are_400_on_every_route_that_takes_some(client: httpx.Client, path: str, kind: str) -> None:
    fields = {"messages": MESSAGES[kind]} | ({"prompt": None} if path == "/tokenize" else {})
    refused(post(client, path, fields), 400)


@pytest.mark.parametrize("path", CHATTING)
def test_variables_of_a_template_are_no_parameters(client: httpx.Client, path: str) -> None:
    fields: dict[str, Any] = {"messages": CHAT} | ({"prompt": None} if path == "/tokenize" else {})
    for name in ("chat_template", "tokenize", "conversation", "tools", "return_dict"):
        error = refused(post(client, path, {**fields, "chat_template_kwargs": {name: "{{ 1 }}"}}), 400)
        assert error["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("path", CHATTING)
def test_no_address_in_a_message_is_ever_asked(client: httpx.Client, path: str) -> None:
    """0 packets: two sockets listen, and nobody comes."""
    with ExitStack() as stack:
        four = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        port = four.getsockname()[1]
        hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "x@127.0.0.1"]
        urls = [f"http://{host}:{port}/x.png" for host in hosts]
        urls += [f"http:\\\\127.0.0.1:{port}\\x", f"http://127.0.0.1:{port}\\@example.org/", "file:///etc/passwd"]
        urls += ["http://169.254.169.254/latest/", "gopher://127.0.0.1/", "data:image/png;base64,AAAA"]
        for url in urls:
            for kind in ("image_url", "video_url", "audio_url"):
                part = {"type": kind, kind: {"url": url}}
                messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
                fields = {"messages": messages} | ({"prompt": None} if path == "/tokenize" else {})
                refused(post(client, path, fields), 400)
        four.setblocking(False)
        with pytest.raises(BlockingIOError):
            four.accept()


NAMES = ["../../etc/passwd", "/etc/passwd", "demo/../../etc", "demo\x00", "..%2f..%2fetc", "x" * 100_000, "démo"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_name_is_no_path_on_any_route(client: httpx.Client, path: str) -> None:
    for name in NAMES:
        error = refused(post(client, path, {"model": name}), 404)
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["../../etc/passwd", "%2e%2e%2fetc%2fpasswd", "demo%00", "%ff", "a" * 8000])
def test_nor_is_it_in_the_address(client: httpx.Client, name: str) -> None:
    refused(client.get(f"/v1/models/{name}"), 404)


@pytest.mark.parametrize("name", ["load_lora_adapter", "unload_lora_adapter"])
def test_no_adapter_is_read_from_anywhere(client: httpx.Client, name: str) -> None:
    body = {"lora_name": "../../x\x00", "lora_path": "/etc"}
    refused(client.post(f"/v1/{name}", json=body), 404)


def test_an_assistant_that_only_calls_may_say_nothing(client: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in ({}, {"content": None}):
        messages = [*CHAT, {"role": "assistant", "tool_calls": [call], **content}, *CHAT]
        response = post(client, "/v1/chat/completions", {"messages": messages})
        assert response.status_code == 200 or "chat template" in refused(response, 400)["message"]
