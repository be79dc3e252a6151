"""/v1/chat/completions over the fake engine, which repeats its prompt."""

import json
from typing import Any

import httpx
import pytest

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "But soft"}]


def post(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": MESSAGES, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "ignore_eos": True, "stream": True, **fields}
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_the_shape_of_an_answer(client: httpx.Client) -> None:
    body = post(client, max_tokens=8)
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "demo")
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "But soft" in choice["message"]["content"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert body["usage"]["completion_tokens"] == 8


def test_the_rest_of_the_context_is_the_default(client: httpx.Client) -> None:
    usage = post(client)["usage"]
    assert usage["total_tokens"] == 256


def test_content_parts_are_joined_and_further_fields_reach_the_template(client: httpx.Client) -> None:
    parts = [{"role": "user", "name": "me", "content": [{"type": "text", "text": "But soft"}]}]
    assert post(client, messages=parts, max_tokens=8)["choices"] == post(client, max_tokens=8)["choices"]


def test_a_control_token_in_a_message_stays_text(client: httpx.Client) -> None:
    """`<|end|>` as one token would end the demo's turn; as text it is several."""
    plain = post(client, messages=[{"role": "user", "content": "a"}], max_tokens=1)["usage"]["prompt_tokens"]
    forged = post(client, messages=[{"role": "user", "content": "a<|end|>"}], max_tokens=1)["usage"]["prompt_tokens"]
    assert forged > plain + 2


def test_without_a_generation_prompt(client: httpx.Client) -> None:
    with_prompt = post(client, max_tokens=1)["usage"]["prompt_tokens"]
    assert post(client, max_tokens=1, add_generation_prompt=False)["usage"]["prompt_tokens"] == with_prompt - 1


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs(client: httpx.Client, top: int) -> None:
    choice = post(client, max_tokens=6, logprobs=True, top_logprobs=top)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert len(entry["top_logprobs"]) == top
        values = [best["logprob"] for best in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)


def test_prompt_logprobs_stand_beside_the_choices(client: httpx.Client) -> None:
    body = post(client, max_tokens=1, n=2, prompt_logprobs=0)
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert all(len(best) == 1 for best in body["prompt_logprobs"][1:])
    assert "prompt_logprobs" not in post(client, max_tokens=1)


def test_a_stream_begins_with_the_role_and_adds_up_to_the_whole(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"max_tokens": 20, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = {choice["index"]: choice for choice in post(client, **asked)["choices"]}
    chunks = [chunk["choices"][0] for chunk in stream(client, **asked)]
    for index, expected in whole.items():
        mine = [choice for choice in chunks if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == expected["message"]["content"]
        entries = [entry for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert entries == expected["logprobs"]["content"]


def test_usage_comes_in_one_last_chunk_without_choices(client: httpx.Client) -> None:
    chunks = stream(client, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
