"""What a request may say: precedence, null, and the fields that are refused rather than ignored."""

from typing import Any

import httpx
import pytest

from fairlead.errors import RequestError
from fairlead.request import SamplingParams
from fairlead_server.protocol import ChatBody, CompletionBody
from fairlead_server.unsupported import NEUTRAL, refuse_unsupported

DEFAULTS = SamplingParams(temperature=0.5, top_p=0.9)


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": "Hi", **fields})


def test_the_request_goes_before_the_model_and_the_model_before_openai() -> None:
    params = completion(temperature=0.1).sampling_params(DEFAULTS)
    assert (params.temperature, params.top_p, params.top_k) == (0.1, 0.9, 0)
    assert params.max_tokens is None
    assert chat(temperature=0).sampling_params(DEFAULTS).temperature == 0


def test_null_is_not_given() -> None:
    fields = [
        *(set(CompletionBody.model_fields) - {"prompt"}),
        *NEUTRAL,
        "best_of",
        "user",
        "store",
        "metadata",
        "request_id",
    ]
    body = completion(**dict.fromkeys(fields))
    body.check()
    assert body.sampling_params(DEFAULTS) == completion().sampling_params(DEFAULTS)
    chat_fields = [*(set(ChatBody.model_fields) - {"messages"}), *NEUTRAL]
    chat(**dict.fromkeys(chat_fields)).check()


def test_every_sampling_field_arrives() -> None:
    fields = {
        "n": 2,
        "temperature": 1.5,
        "top_p": 0.3,
        "top_k": 4,
        "min_p": 0.2,
        "seed": -5,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_tokens": 9,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "min_tokens": 4,
        "logit_bias": {"5": 3},
        "allowed_token_ids": [5, 6],
        "bad_words": ["worse"],
        "best_of": 4,
        "truncate_prompt_tokens": 6,
        "spaces_between_special_tokens": False,
        "prompt_logprobs": 2,
        "logits_processors": ["name"],
    }
    params = chat(**fields, logprobs=True, top_logprobs=3).sampling_params(DEFAULTS)
    assert params == SamplingParams(**{**fields, "logprobs": 3})


def test_beam_fields_arrive() -> None:
    fields = {"use_beam_search": True, "temperature": 0, "best_of": 4, "length_penalty": 0.5, "early_stopping": "never"}
    params = completion(**fields).sampling_params(DEFAULTS)
    assert params == SamplingParams(**fields, top_p=0.9, max_tokens=None)


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).sampling_params(DEFAULTS).max_tokens == 7
    assert chat(max_tokens=5).sampling_params(DEFAULTS).max_tokens == 5


def test_chat_logprobs_without_top_logprobs_are_of_the_sampled_token_alone() -> None:
    assert chat(logprobs=True).sampling_params(DEFAULTS).logprobs == 0
    assert chat(logprobs=False).sampling_params(DEFAULTS).logprobs is None


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Hi", 1), (["Hi", "Ho"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)],
)
def test_prompts_come_in_four_shapes(prompt: object, count: int) -> None:
    assert len(completion(prompt=prompt).prompts()) == count


NOT_NEUTRAL = {
    "tools": [],
    "tool_choice": "auto",
    "suffix": "end",
    "chat_template": "{{ ''.__class__.__mro__ }}",
    "modalities": ["text", "audio"],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not supported") as raised:
        refuse_unsupported({name: NOT_NEUTRAL.get(name, ["anything"])})
    assert raised.value.param == name


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in NEUTRAL.items() for v in values])
def test_a_neutral_value_passes(name: str, value: object) -> None:
    refuse_unsupported({name: value})


def test_a_number_is_no_boolean() -> None:
    with pytest.raises(RequestError):
        refuse_unsupported({"suffix": False})
    refuse_unsupported({"suffix": ""})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"use_beam_search": True, "temperature": 0, "stream": True}, "use_beam_search"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "temperature": 0, "stop": "x"}, "stop"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"early_stopping": True}, "early_stopping"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 2**63}, "truncate_prompt_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"frequency_penalty": False}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
        ({"min_tokens": 2**63}, "min_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"1024": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 1024]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"priority": 1}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"priority": False}, "priority"),
        ({"logits_processors": [{"qualname": "os.system"}]}, "logits_processors"),
    ],
)
def test_the_completions_route_refuses(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/completions", json={"prompt": "Hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"return_dict": True}}, "chat_template_kwargs"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "chat_template"),
        ({"reasoning_effort": "utmost"}, "reasoning_effort"),
        ({"documents": "text"}, "documents"),
        ({"request_id": "a b"}, "request_id"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1000, "max_tokens": 5}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_the_chat_route_refuses(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_harmless_and_unknown_fields_pass(client: httpx.Client) -> None:
    harmless = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "best_of": 1,
        "what_is_this": [1],
        "cache_salt": "mine",
    }
    response = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2, **harmless})
    assert response.status_code == 200
