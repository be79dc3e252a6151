"""The fields of http-api.md beyond sampling, and the routes on tokens; over the fake engine."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from fairlead.config import ServerConfig

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Speak"}]


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_tokenize_and_detokenize_are_each_others_inverse(client: httpx.Client) -> None:
    found = ok(client.post("/tokenize", json={"prompt": "But soft", "return_token_strs": True}))
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
    assert len(found["token_strs"]) == found["count"]
    assert ok(client.post("/detokenize", json={"tokens": found["tokens"]})) == {"prompt": "But soft"}
    assert "token_strs" not in ok(client.post("/tokenize", json={"prompt": "But soft", "model": "demo"}))


def test_a_chat_comes_back_with_its_control_tokens(client: httpx.Client) -> None:
    tokens = ok(client.post("/tokenize", json={"messages": CHAT}))["tokens"]
    text = ok(client.post("/detokenize", json={"tokens": tokens}))["prompt"]
    assert ok(client.get("/tokenizer_info"))["eos_token"] in text
    again = {"prompt": text, "add_special_tokens": False}
    assert ok(client.post("/tokenize", json=again))["tokens"] == tokens


def test_a_chat_is_tokenized_as_it_is_answered(client: httpx.Client) -> None:
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"x": 1}}, {"documents": [{}]}):
        found = ok(client.post("/tokenize", json={"messages": CHAT, **fields}))
        answer = ok(
            client.post(
                "/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1, "return_token_ids": True, **fields}
            )
        )
        assert answer["prompt_token_ids"] == found["tokens"]


def test_the_final_message_is_continued_and_echoed(client: httpx.Client) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "But soft"}]
    body = {"messages": chat, "continue_final_message": True, "max_tokens": 3, "ignore_eos": True}
    tokens = ok(client.post("/tokenize", json={"messages": chat, "continue_final_message": True}))["tokens"]
    text = ok(client.post("/detokenize", json={"tokens": tokens}))["prompt"]
    assert text.endswith("But soft")
    plain = ok(client.post("/v1/chat/completions", json=body))["choices"][0]["message"]["content"]
    echoed = ok(client.post("/v1/chat/completions", json={**body, "echo": True}))["choices"][0]["message"]["content"]
    assert echoed == "But soft" + plain
    chunks = events(client, "/v1/chat/completions", {**body, "echo": True})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == echoed


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": CHAT}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": []}, "prompt"),
        ({"messages": [{"role": "boss"}]}, "messages"),
        ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ({"messages": CHAT, "chat_template": "x"}, "chat_template"),
        ({"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
)
def test_a_wrong_tokenize_is_400(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_long_texts_are_tokenized_and_so_many_tokens_are_given_back(client: httpx.Client) -> None:
    found = ok(client.post("/tokenize", json={"prompt": "But soft " * 5000, "return_token_strs": True}))
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 5000
    short = ok(client.post("/tokenize", json={"prompt": "But soft ", "return_token_strs": True}))
    assert found["token_strs"][: short["count"] - 1] == short["token_strs"][:-1]
    assert ok(client.post("/detokenize", json={"tokens": found["tokens"]}))["prompt"] == "But soft " * 5000
    assert len(ok(client.post("/detokenize", json={"tokens": [300] * 2**17}))["prompt"]) > 2**17
    response = client.post("/detokenize", json={"tokens": [300] * (2**17 + 1)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


@pytest.mark.parametrize("tokens", [None, "x", [-1], [1024], [2**64], [1.5], [True], [[1]]])
def test_a_wrong_detokenize_is_400(client: httpx.Client, tokens: object) -> None:
    response = client.post("/detokenize", json={"tokens": tokens})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


def test_tokenizer_info(client: httpx.Client) -> None:
    info = ok(client.get("/tokenizer_info"))
    assert set(info) == {"tokenizer_class", "bos_token", "eos_token", "chat_template"}
    assert "message" in info["chat_template"]
    assert isinstance(info["eos_token"], str)


def test_token_ids_come_back_whole_and_streamed(client: httpx.Client) -> None:
    body = {"prompt": [300, 301], "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    [choice] = ok(client.post("/v1/completions", json=body))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([300, 301], [300, 301, 300, 301, 300])
    chunks = [chunk["choices"][0] for chunk in events(client, "/v1/completions", body)]
    assert [i for chunk in chunks for i in chunk["token_ids"]] == choice["token_ids"]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[300, 301], *[None] * (len(chunks) - 1)]
    asked = {"messages": CHAT, "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    whole = ok(client.post("/v1/chat/completions", json=asked))
    chat_chunks = events(client, "/v1/chat/completions", asked)
    ids = [i for chunk in chat_chunks for i in chunk["choices"][0].get("token_ids", ())]
    assert ids == whole["choices"][0]["token_ids"]
    assert chat_chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_tokens_are_spelt_as_ids_on_request(client: httpx.Client) -> None:
    body = {"prompt": [300], "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    found = ok(client.post("/v1/completions", json=body))["choices"][0]["logprobs"]
    assert found["tokens"] == ["token_id:300"]
    assert found["top_logprobs"][0]["token_id:300"] == found["token_logprobs"][0]


def test_a_body_may_bring_the_request_id(client: httpx.Client) -> None:
    headers = {"x-request-id": "header"}
    answer = client.post(
        "/v1/completions", json={"prompt": [300], "max_tokens": 1, "request_id": "mine"}, headers=headers
    )
    assert ok(answer)["id"] == "cmpl-mine"
    assert answer.headers["x-request-id"] == "header"


def test_usage_stands_on_every_chunk_if_asked(client: httpx.Client) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_tokens": 4}
    for path, prompt in (("/v1/completions", {"prompt": [300]}), ("/v1/chat/completions", {"messages": CHAT})):
        chunks = events(client, path, {**prompt, **options, "ignore_eos": True})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 4
        assert chunks[-1]["choices"] == []
        assert all(chunk["choices"] for chunk in chunks[:-1])
        assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)


def test_continuous_usage_needs_no_last_chunk(client: httpx.Client) -> None:
    body = {"prompt": [300], "max_tokens": 4, "ignore_eos": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = events(client, "/v1/completions", body)
    assert all(chunk["choices"] for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_max_tokens_comes_from_the_request_then_the_model_then_openai(
    client: httpx.Client, fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lengths(**fields: int) -> list[int]:
        answers = (
            client.post("/v1/completions", json={"prompt": [300], "ignore_eos": True, **fields}),
            client.post("/v1/chat/completions", json={"messages": CHAT, "ignore_eos": True, **fields}),
        )
        return [ok(answer)["usage"]["completion_tokens"] for answer in answers]

    plain = lengths()
    assert plain[0] == 16
    assert plain[1] > 200
    front_end = replace(fake_server.engine.front_end, default_max_tokens=7)
    monkeypatch.setattr(fake_server.engine, "front_end", front_end)
    assert lengths() == [7, 7]
    assert lengths(max_tokens=9) == [9, 9]
    monkeypatch.setattr(fake_server.engine, "front_end", replace(front_end, default_max_tokens=1000))
    assert lengths() == [255, plain[1]]


def test_a_template_of_the_request_is_used_once_it_is_trusted(
    client: httpx.Client, fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body = "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, "return_token_ids": True}
    template = "{{ greeting }}, {{ messages[0].content }}{{ eos_token }}"
    own = {"chat_template": template, "chat_template_kwargs": {"greeting": "But soft"}}
    assert client.post(path, json={**body, **own}).status_code == 400
    monkeypatch.setattr(fake_server.service, "config", ServerConfig(trust_chat_template=True))
    tokens = ok(client.post(path, json={**body, **own}))["prompt_token_ids"]
    assert ok(client.post("/tokenize", json={"messages": CHAT, **own}))["tokens"] == tokens
    eos = ok(client.get("/tokenizer_info"))["eos_token"]
    prompt = {"prompt": "But soft, Speak" + eos, "add_special_tokens": False}
    assert ok(client.post("/tokenize", json=prompt))["tokens"] == tokens
    assert ok(client.post(path, json=body))["prompt_token_ids"] != tokens
    for bad in ("{{ ''.__class__.__mro__ }}", "{% for a in range(10**9) %}{% endfor %}", "{% if %}", "{{ 1/0 }}"):
        response = client.post(path, json={**body, "chat_template": bad})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_null_means_not_given(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    for path, name, body in (
        ("/v1/completions", "CompletionBody", {"prompt": [300]}),
        ("/v1/chat/completions", "ChatBody", {"messages": CHAT}),
        ("/tokenize", "TokenizeBody", {"prompt": "x"}),
    ):
        optional = set(schema[name]["properties"]) - set(schema[name].get("required", ())) - set(body)
        assert len(optional) >= 8
        nulls = dict.fromkeys(sorted(optional - {"messages"}))
        assert ok(client.post(path, json={**nulls, **body, "tools": None, "response_format": None}))


def test_a_head_request_and_a_trailing_query_do_no_harm(client: httpx.Client) -> None:
    assert client.get("/health?x=1").status_code == 200
    assert client.head("/v1/models").status_code == 405


def test_several_names_are_listed_and_each_is_answered_under(serving: Any) -> None:
    with serving(ServerConfig(served_model_name=("a", "org/b"))) as server, httpx.Client(base_url=server.url) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a", "org/b"]
        assert client.get("/v1/models/org/b").json()["id"] == "org/b"
        for asked, shown in (("a", "a"), ("org/b", "org/b"), (None, "a")):
            body = {"model": asked, "prompt": [300], "max_tokens": 1}
            assert ok(client.post("/v1/completions", json=body))["model"] == shown
        for path, body in (
            ("/v1/completions", {"prompt": [300]}),
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert client.post(path, json={**body, "model": "demo"}).status_code == 404
        assert 'model_name="a"' in client.get("/metrics").text


def test_a_priority_reaches_the_engine_under_that_policy(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(scheduling_policy="priority") as server, httpx.Client(base_url=server.url) as client:
        seen: list[int] = []
        submit = server.engine.submit
        monkeypatch.setattr(
            server.engine, "submit", lambda request, **rest: seen.append(request.priority) or submit(request, **rest)
        )
        for priority in (-3, None, 7):
            ok(client.post("/v1/completions", json={"prompt": [300], "max_tokens": 1, "priority": priority}))
    assert seen == [-3, 0, 7]
