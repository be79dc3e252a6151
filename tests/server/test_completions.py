"""/v1/completions over the fake engine, which repeats its prompt."""

import json
from typing import Any

import httpx
import pytest

PATH = "/v1/completions"
ROMEO = "But soft"


def post(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": "demo", "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The chunks, after checking how they are framed."""
    response = client.post(PATH, json={"model": "demo", "ignore_eos": True, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.fixture(scope="module")
def tokens(fake_server: Any) -> list[int]:
    return list(fake_server.engine.front_end.encode(ROMEO))


def test_the_shape_of_an_answer(client: httpx.Client, tokens: list[int]) -> None:
    body = post(client, prompt=ROMEO, max_tokens=len(tokens) * 2)
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert isinstance(body["created"], int)
    [choice] = body["choices"]
    assert choice["text"].strip() == ROMEO * 2
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), len(tokens) * 2)
    assert usage["total_tokens"] == len(tokens) * 3


def test_sixteen_tokens_are_the_default_and_never_more_than_fits(client: httpx.Client) -> None:
    assert post(client, prompt=[300])["usage"]["completion_tokens"] == 16
    assert post(client, prompt=[300] * 250)["usage"]["completion_tokens"] == 6


def test_text_and_token_ids_are_the_same_prompt(client: httpx.Client, tokens: list[int]) -> None:
    texts = [post(client, prompt=prompt, max_tokens=8)["choices"][0]["text"] for prompt in (ROMEO, tokens, [tokens])]
    assert len(set(texts)) == 1


def test_prompts_times_n_are_ordered_by_prompt(client: httpx.Client) -> None:
    body = post(client, prompt=[[300], [301], [302]], n=2, max_tokens=3)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize("prompt", [ROMEO, "ids"])
def test_echo_puts_the_prompt_before_the_answer(client: httpx.Client, tokens: list[int], prompt: str) -> None:
    body = post(client, prompt=tokens if prompt == "ids" else prompt, echo=True, max_tokens=len(tokens))
    assert body["choices"][0]["text"].startswith(ROMEO)
    assert body["choices"][0]["text"].count(ROMEO) == 2


def test_stop_strings_are_cut_and_named(client: httpx.Client) -> None:
    choice = post(client, prompt="But soft what ", stop=["soft"], max_tokens=50)["choices"][0]
    assert choice["text"].strip() == "But"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "soft")


def test_stop_tokens_are_named(client: httpx.Client) -> None:
    choice = post(client, prompt=[300, 301], stop_token_ids=[301], max_tokens=50)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 301)


def test_logprobs(client: httpx.Client, tokens: list[int]) -> None:
    body = post(client, prompt=tokens, max_tokens=len(tokens), logprobs=2)
    logprobs = body["choices"][0]["logprobs"]
    assert set(logprobs) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert {len(values) for values in logprobs.values()} == {len(tokens)}
    for token, value, best in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert best[token] == value == -9.5
        assert len(best) == 3
    text = "".join(logprobs["tokens"])
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert text[offset:].startswith(token)


def test_best_of_gives_the_n_best(client: httpx.Client) -> None:
    body = post(client, prompt=[[300, 301], [400]], n=2, best_of=4, max_tokens=3, logprobs=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    values = [choice["logprobs"]["token_logprobs"] for choice in body["choices"]]
    assert values == [[-6.5] * 3, [-7.5] * 3] * 2  # of the fake engine's sequences, the last are the best
    assert body["usage"]["completion_tokens"] == 12
    assert [choice["logprobs"] for choice in post(client, prompt="Hi", best_of=2)["choices"]] == [None]


def test_a_truncated_prompt_is_its_end(client: httpx.Client) -> None:
    body = post(client, prompt=[300, 301, 302, 303], truncate_prompt_tokens=2, max_tokens=2, echo=True, logprobs=0)
    assert body["usage"]["prompt_tokens"] == 2
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 4
    assert post(client, prompt=[300] * 300, truncate_prompt_tokens=-1, max_tokens=6)["usage"]["prompt_tokens"] == 250
    assert post(client, prompt=[300] * 300, truncate_prompt_tokens=9)["usage"]["prompt_tokens"] == 9


def test_echo_with_logprobs_covers_prompt_and_answer(client: httpx.Client) -> None:
    """What evaluation harnesses send."""
    prompts = [[300, 301, 302], [400]]
    body = post(client, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"] == [None, *[-7.5] * (len(prompt) - 1), -9.5]
        assert logprobs["top_logprobs"][0] is None
        for token, value, best in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert best[token] == value
            assert len(best) == 2
        text = "".join(logprobs["tokens"])
        assert choice["text"].strip() == text.strip()
        assert logprobs["text_offset"][0] == 0
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            assert text[offset:].startswith(token)
        assert "prompt_logprobs" not in choice


def test_prompt_logprobs_by_token_id(client: httpx.Client) -> None:
    (choice,) = post(client, prompt=[300, 301], max_tokens=1, prompt_logprobs=1)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert set(second) == {"301", "500"}
    assert (second["301"]["logprob"], second["301"]["rank"], second["500"]["rank"]) == (-7.5, 30, 1)
    assert choice["logprobs"] is None


def test_a_stream_with_echo_and_logprobs_adds_up_to_the_whole(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": [300, 301, 302], "max_tokens": 5, "logprobs": 1, "echo": True, "n": 2}
    whole = {choice["index"]: choice for choice in post(client, **asked)["choices"]}
    chunks = [chunk["choices"][0] for chunk in stream(client, **asked)]
    for index in (0, 1):
        parts = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(part["text"] for part in parts) == whole[index]["text"]
        for name, values in whole[index]["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values


def test_a_stream_adds_up_to_the_whole(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": "But soft, what light: ", "max_tokens": 40, "logprobs": 1}
    whole = post(client, **asked)["choices"][0]
    chunks = stream(client, **asked)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(chunks) > 2
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    for name, values in whole["logprobs"].items():
        parts = [chunk["choices"][0]["logprobs"][name] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        assert [value for part in parts for value in part] == values


@pytest.mark.parametrize("text", ["a 🙂 é!", "日本語", "e\u0301a\u0308ภ", "plain words"])
def test_n16_streamed_or_whole(client: httpx.Client, fake_server: Any, text: str) -> None:
    """Characters split over tokens, a cut one at the end, and stop strings, which straddle tokens and events."""
    ids = fake_server.engine.front_end.tokenizer.encode_continuation(text)
    stops = [None, *(text[i : i + size] for i in range(0, len(text), 2) for size in (1, 3))]
    for stop, max_tokens in [(stop, len(ids)) for stop in stops] + [(None, n) for n in range(1, len(ids), 3)]:
        asked = {"prompt": ids, "max_tokens": max_tokens, "stop": stop}
        whole = post(client, **asked)["choices"][0]
        chunks = [chunk["choices"][0] for chunk in stream(client, **asked)]
        assert "".join(chunk["text"] for chunk in chunks).encode() == whole["text"].encode()
        ends = [(chunk["finish_reason"], chunk["stop_reason"]) for chunk in (chunks[-1], whole)]
        assert ends[0] == ends[1]
        if stop is not None:
            assert whole["text"] == text[: text.index(stop)]


def test_a_stream_of_several_prompts_keeps_their_indices_apart(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": [[300], [301]], "n": 2, "max_tokens": 5, "echo": True}
    whole = {choice["index"]: choice["text"] for choice in post(client, **asked)["choices"]}
    texts = dict.fromkeys(range(4), "")
    for chunk in stream(client, **asked):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == whole


def test_usage_comes_in_one_last_chunk_without_choices(client: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": [300, 301], "max_tokens": 4}
    chunks = stream(client, **asked, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 6
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in stream(client, **asked))
    always = stream(client, **asked, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["prompt_tokens"] for chunk in always] == [2] * len(always)
    assert always[-2]["usage"]["completion_tokens"] == 4
