"""Every way to ask for structured output over HTTP, and a real engine that keeps to it."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from fairlead.errors import RequestError
from fairlead.request import StructuredOutputParams
from fairlead_server.structured import structured_outputs

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
START_S = 120
LIMIT_S = 5.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a", "json": None, "json_object": False}}, {"regex": "a"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": SCHEMA}),
        ({"guided_json_object": True}, {"json_object": True}),
        ({"guided_json_object": False}, None),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_choice": ["a"]}, {"choice": ("a",)}),
        ({"guided_grammar": 'start: "a"', "response_format": {"type": "text"}}, {"grammar": 'start: "a"'}),
    ],
)
def test_every_spelling_means_one_thing(fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert structured_outputs(fields) == (None if expected is None else StructuredOutputParams(**expected))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}, "response_format"),
    ({"structured_outputs": []}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": 1.5}}, "structured_outputs"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "(" * 30_000}, "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
]


@pytest.mark.parametrize(("fields", "param"), BAD[:-1])
def test_two_at_once_or_malformed_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as raised:
        structured_outputs(fields)
    assert raised.value.param == param


@pytest.mark.parametrize(("fields", "param"), BAD)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_both_routes_answer_400(client: httpx.Client, route: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "Hi"} if route == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    response = client.post(route, json={**prompt, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.fixture(scope="module")
def server(module_server: Any) -> str:
    return str(module_server.wait_for_url(START_S))


@pytest.fixture(scope="module")
def real(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as made:
        yield made


def complete(real: httpx.Client, **fields: Any) -> httpx.Response:
    return real.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 120, "seed": 1, **fields})


def test_a_schema_is_kept_streamed_and_not(real: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}}
    chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 120, "seed": 1, **asked}
    choice = real.post("/v1/chat/completions", json=chat).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"name", "age"}
    lines = real.post("/v1/chat/completions", json={**chat, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert text == choice["message"]["content"]


def test_a_choice_is_one_of_them(real: httpx.Client) -> None:
    answer = complete(real, guided_choice=["yes", "no"], n=8).json()
    assert {choice["text"] for choice in answer["choices"]} <= {"yes", "no"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a+)+b"},
        {"structured_outputs": {"regex": "(((a{1000}){1000}){1000}){1000}("}},
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"enum": [f"v{i}" for i in range(100_000)]}},
        {"guided_grammar": "start: nothing"},
        {"guided_json": {"type": "strng"}},
    ],
)
def test_an_attack_is_400_in_time_and_the_engine_lives(real: httpx.Client, fields: dict[str, Any]) -> None:
    complete(real, guided_choice=["yes"])  # the worker is up
    started = time.monotonic()
    response = complete(real, **fields)
    assert time.monotonic() - started < LIMIT_S
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert complete(real, guided_choice=["yes"]).json()["choices"][0]["text"] == "yes"


def test_a_client_that_leaves_while_its_grammar_compiles_is_forgotten(
    real: httpx.Client, until: Callable[..., bool]
) -> None:
    choices = [f"{i} " + "word " * 8 for i in range(4000)]
    with contextlib.suppress(httpx.TimeoutException):
        real.post("/v1/completions", json={"prompt": "x", "guided_choice": choices, "max_tokens": 900}, timeout=0.15)

    def is_idle() -> bool:
        lines = real.get("/metrics").text.splitlines()
        names = ("fairlead:num_requests_running", "fairlead:num_requests_waiting")
        return all(float(line.split()[-1]) == 0 for line in lines if line.startswith(names))

    assert until(is_idle, 10)
    assert complete(real, guided_choice=["yes"]).json()["choices"][0]["text"] == "yes"
